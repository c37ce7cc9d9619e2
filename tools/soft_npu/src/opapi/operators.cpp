// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Operators of aclnn that torch_npu calls itself, not by way of torch's dispatcher: what
// is not here is not found, and torch_npu says its name. Sources: aclnnInplaceCopy.md and
// aclnnNpuFormatCast.md of CANN's ops-math.
#include "tensor.h"

namespace soft_npu {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 32;

// torch_npu names rows by the number of dimensions.
bool is_rows(aclFormat format) {
  switch (format) {
    case ACL_FORMAT_ND:
    case ACL_FORMAT_NCL:
    case ACL_FORMAT_NCHW:
    case ACL_FORMAT_NCDHW: return true;
    default: return false;
  }
}

std::string described(const aclTensor *tensor) {
  return "type " + std::to_string(int(tensor->type)) + " in format " +
         std::to_string(int(tensor->format));
}

// Between the same types, of one of those that it documents, a row of a tile has 32 bytes.
bool has_tiles(const aclTensor *tensor) {
  switch (tensor->type) {
    case ACL_INT8:
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_FLOAT8_E4M3FN: return tensor->sizes.size() >= 2 && tensor->sizes.size() <= 6;
    default: return false;
  }
}

}  // namespace
}  // namespace soft_npu

using namespace soft_npu;

extern "C" {

aclError aclnnInplaceCopyGetWorkspaceSize(aclTensor *self, const aclTensor *source,
                                          uint64_t *workspace, aclOpExecutor **executor) {
  const auto to = rows_of(self), from = rows_of(source);
  if (!is_rows(self->format) || !is_rows(source->format) || !to.defined() || !from.defined())
    return refuse("aclnnInplaceCopy: from " + described(source) + " to " + described(self));
  const auto copy = [to, from, memory = self->memory] {
    note_write(memory);
    at::Tensor target = to;
    at::_ops::copy_::redispatch(c10::DispatchKeySet(c10::DispatchKey::CPU), target, from, false);
  };
  return prepare(copy, workspace, executor);
}

aclError aclnnInplaceCopy(void *, uint64_t, aclOpExecutor *executor, aclrtStream stream) {
  return execute(executor, stream);
}

aclError aclnnNpuFormatCastCalculateSizeAndFormat(const aclTensor *source, int format, int type,
                                                  int64_t **sizes, uint64_t *count, int *actual) {
  const bool from_rows = is_rows(source->format) && format == ACL_FORMAT_FRACTAL_NZ;
  const bool to_rows = source->format == ACL_FORMAT_FRACTAL_NZ && format == ACL_FORMAT_ND;
  if (!(from_rows || to_rows) || !has_tiles(source) || (type != source->type && type != -1))
    return refuse("aclnnNpuFormatCast: of " + described(source) + " to format " +
                  std::to_string(format) + " for type " + std::to_string(type));
  std::vector<int64_t> found = source->sizes;
  if (from_rows) {
    const int64_t columns = kTileBytes / int64_t(aclDataTypeSize(source->type));
    const int64_t inner = found.back(), outer = found[found.size() - 2];
    found.resize(found.size() - 2);
    found.insert(found.end(), {(inner + columns - 1) / columns,
                               (outer + kTileRows - 1) / kTileRows, kTileRows, columns});
  }
  *sizes = new int64_t[found.size()];  // The caller deletes it.
  std::copy(found.begin(), found.end(), *sizes);
  *count = found.size();
  *actual = format;
  return ACL_SUCCESS;
}

aclError aclnnNpuFormatCastGetWorkspaceSize(const aclTensor *source, aclTensor *target,
                                            uint64_t *workspace, aclOpExecutor **executor) {
  const bool to = target->format == ACL_FORMAT_FRACTAL_NZ;
  const auto rows = rows_of(to ? source : target);
  if (is_rows(source->format) != to || !has_tiles(source) || source->type != target->type ||
      !rows.is_contiguous() || source->offset != 0 || target->offset != 0)
    return refuse("aclnnNpuFormatCast: of " + described(source) + " to " + described(target));
  const int64_t row_bytes = rows.size(-1) * rows.element_size();
  const auto cast = [=, height = rows.size(-2), from = source->memory, into = target->memory] {
    const int64_t batch = rows.numel() ? int64_t(rows.nbytes()) / (height * row_bytes) : 0;
    note_write(into);
    if (to) to_tiles(into, from, batch, height, row_bytes, kTileBytes);
    else from_tiles(into, from, batch, height, row_bytes, kTileBytes);
  };
  return prepare(cast, workspace, executor);
}

aclError aclnnNpuFormatCast(void *, uint64_t, aclOpExecutor *executor, aclrtStream stream) {
  return execute(executor, stream);
}

}  // extern "C"
