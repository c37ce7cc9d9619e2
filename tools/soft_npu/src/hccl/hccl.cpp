// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// HCCL's functions: torch_npu's own process group calls them.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>

#include "../runtime/runtime.h"
#include "comm.h"
#include "third_party/hccl/inc/hccl/hccl.h"

using namespace soft_npu;

namespace {

size_t item_size(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT16:
    case HCCL_DATA_TYPE_UINT16:
    case HCCL_DATA_TYPE_FP16:
    case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32:
    case HCCL_DATA_TYPE_UINT32:
    case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64:
    case HCCL_DATA_TYPE_UINT64:
    case HCCL_DATA_TYPE_FP64: return 8;
    case HCCL_DATA_TYPE_INT128: return 16;
    default: return 1;
  }
}

struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
  }
  BFloat16 &operator=(float value) {
    uint32_t wide;
    memcpy(&wide, &value, sizeof wide);
    // To the nearest, to even of two.
    const bool nan = value != value;
    bits = nan ? 0x7FC0 : uint16_t((wide + 0x7FFF + ((wide >> 16) & 1)) >> 16);
    return *this;
  }
};

// Adds in `Wide` in the order of ranks, and rounds once: not the order of a chip's ring.
template <typename Item, typename Wide>
void reduce(const Comm &comm, size_t first, size_t count, HcclReduceOp op, void *to) {
  std::vector<Wide> total(count);
  std::vector<Item> part(count);
  for (uint32_t rank = 0; rank < comm.ranks; rank++) {
    comm.fetch(rank, first * sizeof(Item), part.data(), count * sizeof(Item));
    for (size_t i = 0; i < count; i++) {
      const Wide value = part[i];
      Wide &sum = total[i];
      if (rank == 0) sum = value;
      else if (op == HCCL_REDUCE_SUM) sum += value;
      else if (op == HCCL_REDUCE_PROD) sum *= value;
      else if (op == HCCL_REDUCE_MAX) sum = std::max(sum, value);
      else sum = std::min(sum, value);
    }
  }
  for (size_t i = 0; i < count; i++) static_cast<Item *>(to)[i] = total[i];
}

void reduce_any(const Comm &comm, size_t first, size_t count, HcclDataType type,
                HcclReduceOp op, void *to) {
  switch (type) {
    case HCCL_DATA_TYPE_FP32: return reduce<float, float>(comm, first, count, op, to);
    case HCCL_DATA_TYPE_FP16: return reduce<_Float16, float>(comm, first, count, op, to);
    case HCCL_DATA_TYPE_BFP16: return reduce<BFloat16, float>(comm, first, count, op, to);
    case HCCL_DATA_TYPE_INT8: return reduce<int8_t, int8_t>(comm, first, count, op, to);
    case HCCL_DATA_TYPE_INT32: return reduce<int32_t, int32_t>(comm, first, count, op, to);
    case HCCL_DATA_TYPE_INT64: return reduce<int64_t, int64_t>(comm, first, count, op, to);
    default: throw std::runtime_error("soft_npu: HCCL does not reduce type " + std::to_string(type));
  }
}

// In the order of the stream, or when a graph is replayed.
HcclResult enqueue(aclrtStream stream, std::function<void()> function) {
  try {
    return launch(stream, std::move(function)) == ACL_SUCCESS ? HCCL_SUCCESS : HCCL_E_RUNTIME;
  } catch (const std::exception &error) {
    fprintf(stderr, "%s\n", error.what());
    fail(ACL_ERROR_RT_INTERNAL_ERROR, error.what());
    return HCCL_E_TIMEOUT;
  }
}

Comm &of(HcclComm handle) { return *static_cast<Comm *>(handle); }

std::vector<uint64_t> copied(const void *values, size_t count) {
  const auto *p = static_cast<const uint64_t *>(values);
  return {p, p + count};
}

HcclResult reduced(const char *what, void *from, void *to, uint64_t shown, uint64_t first,
                   uint64_t count, HcclDataType type, HcclReduceOp op, HcclComm handle,
                   aclrtStream stream) {
  return enqueue(stream, [=] {
    Comm &comm = of(handle);
    comm.exchange(what, from, shown * item_size(type),
                  [&] { reduce_any(comm, first, count, type, op, to); });
  });
}

}  // namespace

extern "C" {

HcclResult HcclGetRootInfo(HcclRootInfo *info) {
  static std::atomic<int> number{0};
  snprintf(info->internal, sizeof info->internal, "hccl_%d_%d_%08x", getpid(), number++,
           std::random_device()());
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo *info, uint32_t rank,
                                HcclComm *comm) {
  try {
    *comm = new Comm(info->internal, ranks, rank);
    return HCCL_SUCCESS;
  } catch (const std::exception &error) {
    fprintf(stderr, "%s\n", error.what());
    return HCCL_E_TIMEOUT;
  }
}

HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo *info, uint32_t rank,
                                      const HcclCommConfig *, HcclComm *comm) {
  return HcclCommInitRootInfo(ranks, info, rank, comm);
}

HcclResult HcclCommDestroy(HcclComm comm) {
  delete static_cast<Comm *>(comm);
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm comm, char *name) {
  strncpy(name, of(comm).name.c_str(), COMM_NAME_MAX_LENGTH);
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankSize(HcclComm comm, uint32_t *size) {
  *size = of(comm).ranks;
  return HCCL_SUCCESS;
}
HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank) {
  *rank = of(comm).rank;
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommAsyncError(HcclComm, HcclResult *error) {
  *error = HCCL_SUCCESS;
  return HCCL_SUCCESS;
}
const char *HcclGetErrorString(HcclResult) { return aclGetRecentErrMsg(); }
uint32_t HcclGetCommConfigCapability() { return 0; }
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }

HcclResult HcclAllReduce(void *from, void *to, uint64_t count, HcclDataType type,
                         HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return reduced("HcclAllReduce", from, to, count, 0, count, type, op, comm, stream);
}

HcclResult HcclReduceScatter(void *from, void *to, uint64_t count, HcclDataType type,
                             HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return reduced("HcclReduceScatter", from, to, count * of(comm).ranks,
                 count * of(comm).rank, count, type, op, comm, stream);
}

HcclResult HcclReduce(void *from, void *to, uint64_t count, HcclDataType type, HcclReduceOp op,
                      uint32_t root, HcclComm comm, aclrtStream stream) {
  const uint64_t wanted = of(comm).rank == root ? count : 0;
  return reduced("HcclReduce", from, to, count, 0, wanted, type, op, comm, stream);
}

HcclResult HcclAllGather(void *from, void *to, uint64_t count, HcclDataType type, HcclComm handle,
                         aclrtStream stream) {
  return enqueue(stream, [=] {
    Comm &comm = of(handle);
    const size_t size = count * item_size(type);
    comm.exchange("HcclAllGather", from, size, [&] {
      for (uint32_t rank = 0; rank < comm.ranks; rank++)
        comm.fetch(rank, 0, static_cast<char *>(to) + rank * size, size);
    });
  });
}

HcclResult HcclAllGatherV(void *from, uint64_t count, void *to, const void *counts,
                          const void *places, HcclDataType type, HcclComm handle,
                          aclrtStream stream) {
  const auto sizes = copied(counts, of(handle).ranks), starts = copied(places, of(handle).ranks);
  return enqueue(stream, [=] {
    Comm &comm = of(handle);
    const size_t item = item_size(type);
    comm.exchange("HcclAllGatherV", from, count * item, [&] {
      for (uint32_t rank = 0; rank < comm.ranks; rank++)
        comm.fetch(rank, 0, static_cast<char *>(to) + starts[rank] * item, sizes[rank] * item);
    });
  });
}

HcclResult HcclBroadcast(void *data, uint64_t count, HcclDataType type, uint32_t root,
                         HcclComm handle, aclrtStream stream) {
  return enqueue(stream, [=] {
    Comm &comm = of(handle);
    const size_t size = comm.rank == root ? count * item_size(type) : 0;
    comm.exchange("HcclBroadcast", data, size, [&] {
      if (comm.rank != root) comm.fetch(root, 0, data, count * item_size(type));
    });
  });
}

HcclResult HcclScatter(void *from, void *to, uint64_t count, HcclDataType type, uint32_t root,
                       HcclComm handle, aclrtStream stream) {
  return enqueue(stream, [=] {
    Comm &comm = of(handle);
    const size_t size = count * item_size(type);
    comm.exchange("HcclScatter", from, comm.rank == root ? size * comm.ranks : 0,
                  [&] { comm.fetch(root, comm.rank * size, to, size); });
  });
}

HcclResult HcclBarrier(HcclComm handle, aclrtStream stream) {
  return enqueue(stream, [=] { of(handle).exchange("HcclBarrier", nullptr, 0, [] {}); });
}

// Each rank shows its counts and places before its data, for the others to find theirs.
HcclResult HcclAlltoAllV(const void *from, const void *send_counts, const void *send_places,
                         HcclDataType type, const void *to, const void *receive_counts,
                         const void *receive_places, HcclDataType, HcclComm handle,
                         aclrtStream stream) {
  const uint32_t ranks = of(handle).ranks;
  const auto counts = copied(send_counts, ranks), places = copied(send_places, ranks);
  const auto wanted = copied(receive_counts, ranks), targets = copied(receive_places, ranks);
  return enqueue(stream, [=] {
    Comm &comm = of(handle);
    const size_t item = item_size(type);
    size_t end = 0;
    for (uint32_t r = 0; r < ranks; r++) end = std::max(end, places[r] + counts[r]);
    const size_t head = ranks * sizeof(uint64_t);
    std::vector<char> shown(head + end * item);
    memcpy(shown.data(), places.data(), head);
    if (end) memcpy(shown.data() + head, from, end * item);
    comm.exchange("HcclAlltoAllV", shown.data(), shown.size(), [&] {
      for (uint32_t r = 0; r < ranks; r++) {
        uint64_t place;
        comm.fetch(r, comm.rank * sizeof place, &place, sizeof place);
        auto *target = static_cast<char *>(const_cast<void *>(to)) + targets[r] * item;
        if (wanted[r]) comm.fetch(r, head + place * item, target, wanted[r] * item);
      }
    });
  });
}

HcclResult HcclAlltoAll(const void *from, uint64_t count, HcclDataType type, const void *to,
                        uint64_t, HcclDataType, HcclComm handle, aclrtStream stream) {
  return enqueue(stream, [=] {
    Comm &comm = of(handle);
    const size_t size = count * item_size(type);
    comm.exchange("HcclAlltoAll", from, size * comm.ranks, [&] {
      for (uint32_t rank = 0; rank < comm.ranks; rank++)
        comm.fetch(rank, comm.rank * size,
                   static_cast<char *>(const_cast<void *>(to)) + rank * size, size);
    });
  });
}

HcclResult HcclSend(void *data, uint64_t count, HcclDataType type, uint32_t to, HcclComm comm,
                    aclrtStream stream) {
  return enqueue(stream, [=] { of(comm).send(to, data, count * item_size(type)); });
}

HcclResult HcclRecv(void *data, uint64_t count, HcclDataType type, uint32_t from, HcclComm comm,
                    aclrtStream stream) {
  return enqueue(stream, [=] { of(comm).receive(from, data, count * item_size(type)); });
}

HcclResult HcclBatchSendRecv(HcclSendRecvItem *given, uint32_t count, HcclComm handle,
                             aclrtStream stream) {
  const std::vector<HcclSendRecvItem> items(given, given + count);
  return enqueue(stream, [=] {
    Comm &comm = of(handle);
    for (const auto &i : items)
      if (i.sendRecvType == HCCL_SEND)
        comm.send(i.remoteRank, i.buf, i.count * item_size(i.dataType));
    for (const auto &i : items)
      if (i.sendRecvType == HCCL_RECV)
        comm.receive(i.remoteRank, i.buf, i.count * item_size(i.dataType));
  });
}

}  // extern "C"
