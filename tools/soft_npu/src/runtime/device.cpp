// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Devices, their properties, contexts, and versions.
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "acl/acl_op_compiler.h"
#include "runtime.h"

namespace soft_npu {
namespace {

struct Chip {
  const char *soc, *name;
  int64_t cube_cores, vector_cores, l2_bytes;
};
// CANN's platform_config of each. The first is the default.
constexpr Chip kChips[] = {
    {"A2", "Ascend910B1", 24, 48, 192 << 20},
    {"A3", "Ascend910_9391", 24, 48, 192 << 20},
    {"310P", "Ascend310P3", 8, 8, 16 << 20},
    {"A5", "Ascend950PR_9589", 32, 64, 128 << 20},
};

const Chip &chip() {
  static const Chip &found = [&]() -> const Chip & {
    const char *soc = setting("SOFT_NPU_SOC", kChips[0].soc);
    for (const auto &chip : kChips)
      if (strcmp(chip.soc, soc) == 0) return chip;
    fprintf(stderr, "soft_npu: SOFT_NPU_SOC=%s; supported: A2, A3, 310P, A5\n", soc);
    abort();
  }();
  return found;
}

constexpr int kMost = 16;
thread_local int32_t device = 0;
thread_local aclrtContext context = nullptr;
char contexts[kMost];

}  // namespace

int32_t current_device() { return device; }
int32_t device_count() { return int32_t(number("SOFT_NPU_DEVICES", 1)); }

}  // namespace soft_npu

using namespace soft_npu;

extern "C" {

aclError aclInit(const char *) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }

const char *aclrtGetSocName() { return chip().name; }

aclError aclrtGetDeviceCount(uint32_t *count) {
  *count = device_count();
  return ACL_SUCCESS;
}

aclError aclrtSetDevice(int32_t d) {
  if (d < 0 || d >= std::min(device_count(), kMost))
    return fail(ACL_ERROR_RT_INVALID_DEVICEID, "there is no device " + std::to_string(d));
  device = d;
  context = &contexts[d];
  return ACL_SUCCESS;
}

aclError aclrtGetDevice(int32_t *d) {
  if (context == nullptr) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device is set");
  *d = device;
  return ACL_SUCCESS;
}

aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }

aclError aclrtGetCurrentContext(aclrtContext *c) {
  if (context == nullptr) return fail(ACL_ERROR_RT_CONTEXT_NULL, "no device is set");
  *c = context;
  return ACL_SUCCESS;
}

aclError aclrtSetCurrentContext(aclrtContext c) {
  context = c;
  if (c) device = int32_t(static_cast<char *>(c) - contexts);
  return ACL_SUCCESS;
}

aclError aclrtGetPrimaryCtxState(int32_t, uint32_t *flags, int32_t *active) {
  if (flags) *flags = 0;
  *active = 1;
  return ACL_SUCCESS;
}

aclError aclrtGetLogicDevIdByUserDevId(const int32_t user, int32_t *const logic) {
  *logic = user;
  return ACL_SUCCESS;
}

aclError aclrtDeviceGetBareTgid(int32_t *process) {
  *process = getpid();
  return ACL_SUCCESS;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) {
  *can = 0;
  return ACL_SUCCESS;
}

aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo info, int64_t *value) {
  *value = info == ACL_DEVICE_INFO_AI_CORE_NUM       ? chip().cube_cores
           : info == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? chip().vector_cores
                                                     : chip().l2_bytes;
  return ACL_SUCCESS;
}

aclError aclrtGetDeviceInfo(uint32_t d, aclrtDevAttr attribute, int64_t *value) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM: *value = chip().cube_cores; return ACL_SUCCESS;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM: *value = chip().vector_cores; return ACL_SUCCESS;
    case ACL_DEV_ATTR_L2_CACHE_SIZE: *value = chip().l2_bytes; return ACL_SUCCESS;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE: *value = memory_info(d).total; return ACL_SUCCESS;
    case ACL_DEV_ATTR_PHY_CHIP_ID: *value = d; return ACL_SUCCESS;
    case ACL_DEV_ATTR_IS_VIRTUAL:
    case ACL_DEV_ATTR_SMP_ID: *value = 0; return ACL_SUCCESS;
    default:
      return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                  "aclrtGetDeviceInfo has no attribute " + std::to_string(int(attribute)));
  }
}

static aclError cores(aclrtDevResLimitType type, uint32_t *value) {
  *value = type == ACL_RT_DEV_RES_CUBE_CORE ? chip().cube_cores : chip().vector_cores;
  return ACL_SUCCESS;
}
aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType type, uint32_t *value) {
  return cores(type, value);
}
aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type, uint32_t *value) {
  return cores(type, value);
}
aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t *value) {
  return cores(type, value);
}

aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion *version) {
  memset(version, 0, sizeof *version);
  strcpy(version->version, "9.0.0");
  strcpy(version->majorVersion, "9");
  strcpy(version->minorVersion, "0");
  strcpy(version->releaseVersion, "0");
  strcpy(version->patchVersion, "0");
  return ACL_SUCCESS;
}
aclError aclsysGetVersionStr(char *, char *version) {
  strcpy(version, "9.0.0");
  return ACL_SUCCESS;
}

// Modes of computing, which the operators here have not.
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOutV2(uint64_t, uint64_t *actual) {
  *actual = 0;
  return ACL_SUCCESS;
}
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtGetSysParamOpt(aclSysParamOpt, int64_t *value) {
  *value = 0;
  return ACL_SUCCESS;
}
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
aclError aclrtSetSysParamOpt(aclSysParamOpt, int64_t) { return ACL_SUCCESS; }
size_t aclGetCompileoptSize(aclCompileOpt) { return 32; }
aclError aclGetCompileopt(aclCompileOpt, char *value, size_t length) {
  memset(value, 0, length);
  return ACL_SUCCESS;
}
aclError aclSetCompileopt(aclCompileOpt, const char *) { return ACL_SUCCESS; }

// CANN's log, which nobody reads here.
void aclAppLog(aclLogLevel, const char *, const char *, uint32_t, const char *, ...) {}

aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

}  // extern "C"
