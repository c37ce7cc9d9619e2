// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#include "tensor.h"

#include <map>

namespace soft_npu {
namespace {

const std::map<aclDataType, at::ScalarType> kTypes = {
    {ACL_FLOAT, at::kFloat},
    {ACL_FLOAT16, at::kHalf},
    {ACL_BF16, at::kBFloat16},
    {ACL_DOUBLE, at::kDouble},
    {ACL_BOOL, at::kBool},
    {ACL_INT8, at::kChar},
    {ACL_UINT8, at::kByte},
    {ACL_INT16, at::kShort},
    {ACL_INT32, at::kInt},
    {ACL_INT64, at::kLong},
    {ACL_FLOAT8_E5M2, at::kFloat8_e5m2},
    {ACL_FLOAT8_E4M3FN, at::kFloat8_e4m3fn},
    {ACL_FLOAT8_E8M0, at::kFloat8_e8m0fnu},
};

}  // namespace

at::Tensor rows_of(const aclTensor *tensor) {
  const auto type = kTypes.find(tensor->type);
  if (type == kTypes.end()) return {};
  const int64_t item = c10::elementSize(type->second);
  return at::from_blob(tensor->memory + tensor->offset * item, tensor->sizes, tensor->strides,
                       at::TensorOptions().dtype(type->second));
}

aclError prepare(std::function<void()> run, uint64_t *workspace, aclOpExecutor **executor) {
  *workspace = 0;
  *executor = new aclOpExecutor{std::move(run)};
  return ACL_SUCCESS;
}

aclError execute(aclOpExecutor *executor, aclrtStream stream) {
  auto run = std::move(executor->run);
  delete executor;
  return launch(stream, std::move(run));
}

}  // namespace soft_npu

extern "C" {

aclTensor *aclCreateTensor(const int64_t *sizes, uint64_t count, aclDataType type,
                           const int64_t *strides, int64_t offset, aclFormat format,
                           const int64_t *storage, uint64_t storage_count, void *memory) {
  return new aclTensor{{sizes, sizes + count},
                       {strides, strides + count},
                       {storage, storage + storage_count},
                       offset,
                       type,
                       format,
                       static_cast<char *>(memory)};
}

int aclDestroyTensor(const aclTensor *tensor) {
  delete tensor;
  return ACL_SUCCESS;
}

}  // extern "C"
