// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#pragma once

#include "call.h"

namespace soft_npu {

// Whether memory is in FRACTAL_NZ that differs from rows, by the descriptor that torch_npu
// keeps of a storage.
bool is_nz(const at::Tensor &tensor);

// The matrices that an operator finds which takes a storage for FRACTAL_NZ of these sizes,
// whatever sizes it was converted from. Kept until the memory is converted to anew.
at::Tensor read(const std::string &name, const Layout &layout);

// The int4 that an operator finds in a slice of int32 which hold eight of them each.
// op-plugin hands over the slice's offset, counted in int32; aclnn then calls the tensor
// int4 and keeps the number.
at::Tensor misread_int4(const at::Tensor &tensor);

}  // namespace soft_npu
