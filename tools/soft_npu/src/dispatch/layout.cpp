// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// What an operator finds in memory that is in another layout than rows.
#include "layout.h"

#include <cstring>
#include <unordered_map>

#include "torch_npu/csrc/core/NPUStorageImpl.h"

namespace soft_npu {
namespace {

// A row of a tile that the matrix units read.
constexpr int64_t kTileBytes = 32, kTileRows = 16;

struct Entry {
  Layout layout;
  uint64_t generation;
  at::Tensor value;
};
std::mutex lock;
std::unordered_map<const char *, std::vector<Entry>> decoded;

bool same(const Layout &a, const Layout &b) {
  return a.memory == b.memory && a.bytes == b.bytes && a.sizes == b.sizes &&
         a.strides == b.strides && a.dtype == b.dtype;
}

// Marks memory as what came from FRACTAL_NZ; Python's side implements it.
void mark(const at::Tensor &tensor) {
  static auto op = c10::Dispatcher::singleton()
                       .findSchemaOrThrow("soft_npu::decoded", "")
                       .typed<void(const at::Tensor &)>();
  op.call(tensor);
}

at::Tensor decode(const std::string &name, const Layout &layout) {
  std::vector<int64_t> sizes = layout.sizes;
  const size_t n = sizes.size();
  TORCH_CHECK(n >= 2, name, " reads FRACTAL_NZ of ", n, " dimensions");
  const auto &strides = layout.strides;
  const bool transposed = strides[n - 2] == 1 && strides[n - 1] == sizes[n - 2] &&
                          !(sizes[n - 1] == 1 && sizes[n - 2] == 1);
  if (transposed) std::swap(sizes[n - 1], sizes[n - 2]);
  const int64_t item = c10::elementSize(layout.dtype);
  const int64_t rows = sizes[n - 2], row_bytes = sizes[n - 1] * item;
  int64_t batch = 1;
  for (size_t i = 0; i + 2 < n; i++) batch *= sizes[i];
  const int64_t needed = batch * ((rows + kTileRows - 1) / kTileRows * kTileRows) *
                         ((row_bytes + kTileBytes - 1) / kTileBytes * kTileBytes);
  TORCH_CHECK(needed <= int64_t(layout.bytes), name, " reads ", sizes, " in FRACTAL_NZ, ",
              needed, " bytes, of a storage of ", layout.bytes, ": beyond its end");
  at::Tensor value = at::empty(sizes, at::TensorOptions().dtype(layout.dtype));
  from_tiles(static_cast<char *>(value.mutable_data_ptr()), layout.memory, batch, rows,
             row_bytes, kTileBytes);
  mark(value);
  return transposed ? value.transpose(-1, -2) : value;
}

}  // namespace

bool is_nz(const at::Tensor &tensor) {
  if (!tensor.has_storage() || tensor.storage().nbytes() == 0) return false;
  auto *storage = tensor.storage().unsafeGetStorageImpl();
  // torch_npu does not export the type.
  if (strcmp(typeid(*storage).name(), "N9torch_npu14NPUStorageImplE") != 0) return false;
  const auto &desc = static_cast<torch_npu::NPUStorageImpl *>(storage)->npu_desc_;
  if (desc.npu_format_ != ACL_FORMAT_FRACTAL_NZ) return false;
  // If a tile is as wide as the matrix, the tiles are the rows.
  const auto &sizes = desc.base_sizes_;
  return sizes.size() < 2 || sizes.end()[-2] % kTileRows != 0 ||
         sizes.back() * int64_t(tensor.itemsize()) != kTileBytes;
}

at::Tensor read(const std::string &name, const Layout &layout) {
  const uint64_t now = generation(layout.memory);
  {
    std::lock_guard<std::mutex> guard(lock);
    auto &entries = decoded[layout.memory];
    for (auto it = entries.begin(); it != entries.end();) {
      if (it->generation != now) it = entries.erase(it);
      else if (same(it->layout, layout)) return it->value;
      else ++it;
    }
  }
  at::Tensor value = decode(name, layout);
  std::lock_guard<std::mutex> guard(lock);
  decoded[layout.memory].push_back({layout, now, value});
  return value;
}

at::Tensor misread_int4(const at::Tensor &tensor) {
  // The offset is counted in int32 and used in int4, of which a byte holds two.
  auto *base = static_cast<char *>(tensor.storage().mutable_data());
  return at::from_blob(base + tensor.storage_offset() / 2, tensor.sizes(), tensor.strides(),
                       at::TensorOptions().dtype(tensor.scalar_type()));
}

}  // namespace soft_npu
