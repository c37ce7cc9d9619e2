// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Settings, errors, and faults on demand.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <sstream>
#include <thread>

#include "runtime.h"

namespace soft_npu {
namespace {

thread_local std::string last_error;

struct Fault {
  std::string kind, name;
  uint64_t at;
  bool onwards;
  uint64_t seen = 0;
};
std::mutex lock;
std::vector<Fault> faults;
bool read = false;

std::vector<Fault> parse(const std::string &list) {
  std::vector<Fault> found;
  std::stringstream stream(list);
  for (std::string item; std::getline(stream, item, ',');) {
    const auto at = item.rfind('@');
    const auto colon = item.find(':');
    if (at == std::string::npos) {
      fprintf(stderr, "soft_npu: SOFT_NPU_FAULTS: '%s' has no '@n'\n", item.c_str());
      abort();
    }
    const bool named = colon < at;
    found.push_back({item.substr(0, named ? colon : at),
                     named ? item.substr(colon + 1, at - colon - 1) : "",
                     std::stoull(item.substr(at + 1)), item.back() == '+'});
  }
  return found;
}

}  // namespace

aclError fail(aclError code, const std::string &message) {
  last_error = "soft_npu: " + message;
  return code;
}

aclError refuse(const std::string &what) {
  fprintf(stderr, "soft_npu: %s\n", what.c_str());
  return fail(ACL_ERROR_OP_NOT_FOUND, what);
}

const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value && *value ? value : otherwise;
}

uint64_t number(const char *name, uint64_t otherwise) {
  const char *value = setting(name, nullptr);
  return value ? strtoull(value, nullptr, 10) : otherwise;
}

void set_faults(const std::string &list) {
  std::lock_guard<std::mutex> guard(lock);
  faults = parse(list);
  read = true;
}

bool faulted(const std::string &kind, const std::string &name) {
  std::lock_guard<std::mutex> guard(lock);
  if (!read) {
    faults = parse(setting("SOFT_NPU_FAULTS", ""));
    read = true;
  }
  bool found = false;
  for (auto &fault : faults) {
    if (fault.kind != kind || (!fault.name.empty() && fault.name != name)) continue;
    fault.seen++;
    found |= fault.onwards ? fault.seen >= fault.at : fault.seen == fault.at;
  }
  return found;
}

bool hangs() {
  static bool hung = false;
  hung = hung || faulted("hang", "");
  return hung;
}

aclError hang(int32_t timeout) {
  using std::chrono::milliseconds;
  const auto start = std::chrono::steady_clock::now();
  while (timeout < 0 || std::chrono::steady_clock::now() - start < milliseconds(timeout))
    std::this_thread::sleep_for(milliseconds(10));
  return fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, "the device does not answer");
}

}  // namespace soft_npu

extern "C" {
long soft_npu_missing(const char *name) {
  fprintf(stderr, "soft_npu: %s was called and is not implemented\n", name);
  return soft_npu::fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT,
                        std::string(name) + " is not implemented");
}

const char *aclGetRecentErrMsg() {
  return soft_npu::last_error.empty() ? nullptr : soft_npu::last_error.c_str();
}
}
