// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Operators that torch_npu compiles and runs by name, with a description of each tensor:
// "Identity", which copies from one layout into another, and what torch_npu calls itself,
// not by way of torch's dispatcher: "Fill" and "PadV3".
#include <algorithm>
#include <cstdio>
#include <cstring>

#include "acl/acl_op_compiler.h"
#include "runtime.h"

struct aclTensorDesc {
  aclDataType type;
  std::vector<int64_t> dims, storage_dims;
  aclFormat format, storage_format;
  std::string name;
};
struct aclDataBuffer {
  void *data;
  size_t size;
};
struct aclopAttr {};

namespace soft_npu {
namespace {

constexpr int64_t kRows = 16;

int64_t product(const std::vector<int64_t> &dims, size_t count) {
  int64_t result = 1;
  for (size_t i = 0; i < count; i++) result *= dims[i];
  return result;
}

bool is_nz(const aclTensorDesc *d) { return d->storage_format == ACL_FORMAT_FRACTAL_NZ; }
bool is_rows(const aclTensorDesc *d) {
  return d->storage_format == ACL_FORMAT_ND || d->storage_format == ACL_FORMAT_NCHW;
}

// `tiled` describes the tensor in FRACTAL_NZ, and its `dims` the matrices that are in it.
aclError convert(const aclTensorDesc *tiled, char *tiles, char *rows_of, bool to) {
  std::vector<int64_t> dims = tiled->dims;
  if (dims.size() == 1) dims.push_back(1);
  if (dims.size() < 2 || tiled->storage_dims.size() != dims.size() + 2)
    return refuse("Identity: FRACTAL_NZ of " + std::to_string(dims.size()) + " dimensions");
  const int64_t item = aclDataTypeSize(tiled->type);
  const int64_t batch = product(dims, dims.size() - 2);
  const int64_t rows = dims[dims.size() - 2], row_bytes = dims.back() * item;
  const int64_t tile = tiled->storage_dims.back() * item;
  if (to) to_tiles(tiles, rows_of, batch, rows, row_bytes, tile);
  else from_tiles(rows_of, tiles, batch, rows, row_bytes, tile);
  return ACL_SUCCESS;
}

aclError identity(const aclTensorDesc *from, const aclDataBuffer *source,
                  const aclTensorDesc *to, aclDataBuffer *target) {
  auto *a = static_cast<char *>(source->data);
  auto *b = static_cast<char *>(target->data);
  note_write(b);
  if (is_rows(from) && is_nz(to)) return convert(to, b, a, true);
  if (is_nz(from) && is_rows(to)) return convert(from, a, b, false);
  if (from->storage_format == to->storage_format || (is_rows(from) && is_rows(to))) {
    memmove(b, a, std::min(source->size, target->size));
    return ACL_SUCCESS;
  }
  return refuse("Identity: from format " + std::to_string(int(from->storage_format)) +
                " to " + std::to_string(int(to->storage_format)));
}

aclError fill(const aclTensorDesc *from, const aclDataBuffer *value, const aclTensorDesc *to,
              aclDataBuffer *target) {
  const size_t item = aclDataTypeSize(to->type);
  if (from->type != to->type || !is_rows(to)) return refuse("Fill: of another type");
  for (size_t at = 0; at + item <= target->size; at += item)
    memcpy(static_cast<char *>(target->data) + at, value->data, item);
  return ACL_SUCCESS;
}

// Of one row zeros behind it: torch_npu aligns what it hands to HCCL.
aclError pad(const aclTensorDesc *from, const aclDataBuffer *source, const aclTensorDesc *to,
             aclDataBuffer *target) {
  const size_t item = aclDataTypeSize(from->type);
  const auto count = size_t(product(from->dims, from->dims.size()));
  if (size_t(from->dims.back()) != count || !is_rows(from) || !is_rows(to))
    return refuse("PadV3: of more than one row");
  memcpy(target->data, source->data, count * item);
  memset(static_cast<char *>(target->data) + count * item, 0, target->size - count * item);
  return ACL_SUCCESS;
}

// Calls `copy(tile address, row address, bytes)` for each piece of a row in a tile.
template <typename Copy>
void for_tiles(int64_t batch, int64_t rows, int64_t row_bytes, int64_t tile, Copy copy) {
  const int64_t padded = (rows + kRows - 1) / kRows * kRows;
  const int64_t columns = (row_bytes + tile - 1) / tile;
  for (int64_t b = 0; b < batch; b++)
    for (int64_t c = 0; c < columns; c++)
      for (int64_t r = 0; r < rows; r++)
        copy(((b * columns + c) * padded + r) * tile, (b * rows + r) * row_bytes + c * tile,
             std::min(tile, row_bytes - c * tile));
}

}  // namespace

void to_tiles(char *tiles, const char *rows_of, int64_t batch, int64_t rows,
              int64_t row_bytes, int64_t tile) {
  for_tiles(batch, rows, row_bytes, tile, [&](int64_t t, int64_t r, int64_t n) {
    memcpy(tiles + t, rows_of + r, n);
    memset(tiles + t + n, 0, tile - n);
  });
}

void from_tiles(char *rows_of, const char *tiles, int64_t batch, int64_t rows,
                int64_t row_bytes, int64_t tile) {
  for_tiles(batch, rows, row_bytes, tile,
            [&](int64_t t, int64_t r, int64_t n) { memcpy(rows_of + r, tiles + t, n); });
}

}  // namespace soft_npu

using namespace soft_npu;

extern "C" {

size_t aclDataTypeSize(aclDataType type) {
  switch (type) {
    case ACL_INT8:
    case ACL_UINT8:
    case ACL_FLOAT8_E5M2:
    case ACL_FLOAT8_E4M3FN:
    case ACL_FLOAT8_E8M0:
    case ACL_BOOL: return 1;
    case ACL_FLOAT16:
    case ACL_BF16:
    case ACL_INT16: return 2;
    case ACL_FLOAT:
    case ACL_INT32: return 4;
    case ACL_INT64:
    case ACL_DOUBLE: return 8;
    default: return 0;
  }
}

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int count, const int64_t *dims,
                                   aclFormat format) {
  std::vector<int64_t> shape(dims, dims + count);
  return new aclTensorDesc{type, shape, shape, format, format, ""};
}
void aclDestroyTensorDesc(const aclTensorDesc *desc) { delete desc; }
aclError aclSetTensorFormat(aclTensorDesc *desc, aclFormat format) {
  desc->storage_format = format;
  return ACL_SUCCESS;
}
aclError aclSetTensorShape(aclTensorDesc *desc, int count, const int64_t *dims) {
  desc->storage_dims.assign(dims, dims + count);
  return ACL_SUCCESS;
}
void aclSetTensorDescName(aclTensorDesc *desc, const char *name) { desc->name = name; }
aclError aclSetTensorPlaceMent(aclTensorDesc *, aclMemType) { return ACL_SUCCESS; }
aclDataType aclGetTensorDescType(const aclTensorDesc *desc) { return desc->type; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc *desc) { return desc->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc *desc) { return desc->dims.size(); }
aclError aclGetTensorDescDimV2(const aclTensorDesc *desc, size_t index, int64_t *size) {
  if (index >= desc->dims.size()) return fail(ACL_ERROR_INVALID_PARAM, "dimension");
  *size = desc->dims[index];
  return ACL_SUCCESS;
}

aclDataBuffer *aclCreateDataBuffer(void *data, size_t size) {
  return new aclDataBuffer{data, size};
}
aclError aclDestroyDataBuffer(const aclDataBuffer *buffer) {
  delete buffer;
  return ACL_SUCCESS;
}

aclopAttr *aclopCreateAttr() { return new aclopAttr; }
void aclopDestroyAttr(const aclopAttr *attribute) { delete attribute; }
aclError aclopSetAttrBool(aclopAttr *, const char *, uint8_t) { return ACL_SUCCESS; }
aclError aclopSetAttrInt(aclopAttr *, const char *, int64_t) { return ACL_SUCCESS; }
aclError aclopSetAttrString(aclopAttr *, const char *, const char *) { return ACL_SUCCESS; }

aclError aclopCompileAndExecute(const char *type, int inputs, const aclTensorDesc *const from[],
                                const aclDataBuffer *const sources[], int outputs,
                                const aclTensorDesc *const to[], aclDataBuffer *const targets[],
                                const aclopAttr *, aclopEngineType, aclopCompileType,
                                const char *, aclrtStream stream) {
  const std::string name(type);
  if (capturing(stream))
    return refuse("operator " + name + " is not in aclnn and cannot be captured in a graph");
  if (name == "Identity" && inputs == 1 && outputs == 1)
    return identity(from[0], sources[0], to[0], targets[0]);
  if (name == "Fill" && inputs == 2 && outputs == 1)
    return fill(from[1], sources[1], to[0], targets[0]);
  if (name == "PadV3" && outputs == 1) return pad(from[0], sources[0], to[0], targets[0]);
  return refuse("operator " + name + " is not emulated");
}

aclError aclopCompileAndExecuteV2(const char *type, int inputs, aclTensorDesc *from[],
                                  aclDataBuffer *sources[], int outputs, aclTensorDesc *to[],
                                  aclDataBuffer *targets[], aclopAttr *attribute,
                                  aclopEngineType engine, aclopCompileType compile,
                                  const char *path, aclrtStream stream) {
  return aclopCompileAndExecute(type, inputs, from, sources, outputs, to, targets, attribute,
                                engine, compile, path, stream);
}

}  // extern "C"
