// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// What CANN's operator library (aclnn) is given: descriptions of tensors, and a call in
// two phases.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <vector>

#include "../runtime/runtime.h"

struct aclTensor {
  std::vector<int64_t> sizes, strides, storage_sizes;
  int64_t offset;
  aclDataType type;
  aclFormat format;
  char *memory;
};

// What the second phase does.
struct aclOpExecutor {
  std::function<void()> run;
};

namespace soft_npu {

// A CPU tensor over the memory of rows; undefined for a type that torch has not.
at::Tensor rows_of(const aclTensor *tensor);

// Ends the first phase of a call that needs no workspace.
aclError prepare(std::function<void()> run, uint64_t *workspace, aclOpExecutor **executor);
// The second phase, which releases the executor.
aclError execute(aclOpExecutor *executor, aclrtStream stream);

}  // namespace soft_npu
