// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Of CANN's header what vllm-ascend's C++ code names to plan its own kernels.
#pragma once
#include <cstdint>

namespace platform_ascendc {
enum class CoreMemType { L0_A, L0_B, L0_C, L1, L2, UB, HBM };

struct PlatformAscendC {
  void GetCoreMemSize(CoreMemType, uint64_t &) const;
  uint32_t GetCoreNum() const;
  uint32_t GetCoreNumAic() const;
  uint32_t GetCoreNumAiv() const;
  uint32_t GetLibApiWorkSpaceSize() const;
};

struct PlatformAscendCManager {
  static PlatformAscendC *GetInstance();
};
}  // namespace platform_ascendc
