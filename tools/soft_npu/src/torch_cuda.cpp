// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// The classes of CUDA whose type information torch's Python bindings read.

namespace c10d {
struct ProcessGroupNCCL {
  virtual void none();
};
void ProcessGroupNCCL::none() {}
}  // namespace c10d

namespace torch {
namespace cuda::CUDAPluggableAllocator {
struct CUDAPluggableAllocator {
  virtual void none();
};
void CUDAPluggableAllocator::none() {}
}  // namespace cuda::CUDAPluggableAllocator
namespace inductor {
struct AOTIModelContainerRunnerCuda {
  virtual void none();
};
void AOTIModelContainerRunnerCuda::none() {}
}  // namespace inductor
namespace jit::tensorexpr {
struct CudaCodeGen {
  virtual void none();
};
void CudaCodeGen::none() {}
}  // namespace jit::tensorexpr
}  // namespace torch
