// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Device memory is the host's, with a budget. What all processes take of a device is
// counted in a file that they share.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <mutex>

#include "runtime.h"

namespace soft_npu {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kLarge = 4 << 20;
constexpr size_t kPattern = 16 << 20;
constexpr uint16_t kPoison = 0xFFC1;
constexpr int kDevices = 16, kProcesses = 64;

struct Share {
  std::atomic<pid_t> process;
  std::atomic<size_t> used;
};
struct Ledger {
  std::atomic<size_t> peak;
  Share shares[kProcesses];

  size_t used() {
    size_t sum = 0;
    for (auto &share : shares) {
      const pid_t process = share.process;
      if (process == 0) continue;
      // A chip takes back what a process that died held.
      if (process != getpid() && kill(process, 0) != 0 && errno == ESRCH) {
        share.used = 0;
        share.process = 0;
      }
      sum += share.used;
    }
    return sum;
  }

  Share &own() {
    for (auto &share : shares)
      if (share.process == getpid()) return share;
    for (auto &share : shares) {
      pid_t nobody = 0;
      if (share.process.compare_exchange_strong(nobody, getpid())) {
        share.used = 0;
        return share;
      }
    }
    fprintf(stderr, "soft_npu: more than %d processes\n", kProcesses);
    abort();
  }
};

Ledger *ledgers() {
  static Ledger *all = [] {
    const size_t size = sizeof(Ledger) * kDevices;
    const char *directory = setting("SOFT_NPU_STATE", nullptr);
    int file = -1;
    if (directory) {
      file = open((std::string(directory) + "/memory").c_str(), O_RDWR | O_CREAT, 0600);
      if (file < 0 || ftruncate(file, size) != 0) {
        fprintf(stderr, "soft_npu: cannot write to SOFT_NPU_STATE=%s\n", directory);
        abort();
      }
    }
    void *p = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                   file < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, file, 0);
    return static_cast<Ledger *>(p);
  }();
  return all;
}

struct Block {
  size_t size;
  int32_t device;
};
std::mutex lock;
std::map<const char *, Block> blocks, host_blocks;
// By the start of what is written in another layout than rows.
std::map<const char *, uint64_t> generations;

// Bytes were written, or lost: what was decoded from them is not in memory any more.
void outdate(const char *p, size_t size) {
  for (auto it = generations.lower_bound(p); it != generations.end() && it->first < p + size; ++it)
    it->second++;
}

void copy(void *to, const void *from, size_t count) {
  memmove(to, from, count);
  std::lock_guard<std::mutex> guard(lock);
  outdate(static_cast<char *>(to), count);
}

void set(void *p, int32_t value, size_t count) {
  memset(p, value, count);
  std::lock_guard<std::mutex> guard(lock);
  outdate(static_cast<char *>(p), count);
}

// The block around an address.
bool inside(const std::map<const char *, Block> &map, const void *address) {
  const char *p = static_cast<const char *>(address);
  auto it = map.upper_bound(p);
  if (it == map.begin()) return false;
  --it;
  return p < it->first + std::max<size_t>(it->second.size, 1);
}

size_t whole_pages(size_t size) { return (size + kPage - 1) / kPage * kPage; }

void fill(char *p, size_t size) {
  const size_t words = size / sizeof kPoison;
  std::fill_n(reinterpret_cast<uint16_t *>(p), words, kPoison);
  if (size % sizeof kPoison) p[size - 1] = static_cast<char>(kPoison & 0xFF);
}

// A file of poison. Mapped privately it costs memory only where somebody writes.
int pattern() {
  static const int file = [] {
    const int descriptor = memfd_create("soft_npu_poison", MFD_CLOEXEC);
    if (descriptor < 0 || ftruncate(descriptor, kPattern) != 0) abort();
    void *p = mmap(nullptr, kPattern, PROT_WRITE, MAP_SHARED, descriptor, 0);
    fill(static_cast<char *>(p), kPattern);
    munmap(p, kPattern);
    return descriptor;
  }();
  return file;
}

// Maps each whole page of a range anew: `map` gets an address and a size of at most
// kPattern. `edge` gets the rest.
template <typename Map, typename Edge>
void for_pages(char *p, size_t size, Map map, Edge edge) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  char *first = reinterpret_cast<char *>((address + kPage - 1) / kPage * kPage);
  char *last = reinterpret_cast<char *>((address + size) / kPage * kPage);
  edge(p, first - p);
  for (char *at = first; at < last; at += kPattern)
    map(at, std::min<size_t>(kPattern, last - at));
  edge(last, p + size - last);
}

void remap(char *p, size_t size, int flags, int file, int rights = PROT_READ | PROT_WRITE) {
  void *got = mmap(p, size, rights, MAP_PRIVATE | MAP_FIXED | flags, file, 0);
  if (got != p) {
    fprintf(stderr, "soft_npu: mmap: %s\n", strerror(errno));
    abort();
  }
}

aclError allocate(void **p, size_t size) {
  const int32_t device = current_device();
  if (aclError error = take(size, device)) return error;
  *p = mmap(nullptr, std::max(whole_pages(size), kPage), PROT_READ | PROT_WRITE,
            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*p == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "mmap");
  std::lock_guard<std::mutex> guard(lock);
  blocks[static_cast<char *>(*p)] = {size, device};
  poison(*p, size);
  return ACL_SUCCESS;
}

aclError allocate_host(void **p, size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  if (posix_memalign(p, kPage, std::max(whole_pages(size), kPage)))
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "host memory");
  host_blocks[static_cast<char *>(*p)] = {size, -1};
  return ACL_SUCCESS;
}

}  // namespace

MemoryInfo memory_info(int32_t device) {
  static const size_t total = number("SOFT_NPU_MEMORY", size_t(1) << 30);
  auto &ledger = ledgers()[device];
  return {total, ledger.used(), ledger.peak};
}

aclError take(size_t size, int32_t device) {
  if (faulted("allocate", "")) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "planted");
  static std::mutex one_at_a_time;
  std::lock_guard<std::mutex> guard(one_at_a_time);
  auto &ledger = ledgers()[device];
  const auto info = memory_info(device);
  if (info.used + size > info.total)
    return fail(ACL_ERROR_RT_MEMORY_ALLOCATION,
                "out of memory: " + std::to_string(size) + " bytes asked for, " +
                    std::to_string(info.total - info.used) + " of " +
                    std::to_string(info.total) + " free");
  ledger.own().used += size;
  size_t peak = ledger.peak;
  const size_t used = ledger.used();
  while (used > peak && !ledger.peak.compare_exchange_weak(peak, used)) {}
  return ACL_SUCCESS;
}

void give(size_t size, int32_t device) { ledgers()[device].own().used -= size; }

void reset_peak(int32_t device) { ledgers()[device].peak = ledgers()[device].used(); }

void poison(void *address, size_t size) {
  static const bool wanted = number("SOFT_NPU_POISON", 1);
  if (!wanted) return;
  if (size < kLarge) return fill(static_cast<char *>(address), size);
  for_pages(
      static_cast<char *>(address), size,
      [](char *p, size_t n) { remap(p, n, 0, pattern()); }, fill);
}

void zero(void *address, size_t size) {
  if (size < kLarge) {
    memset(address, 0, size);
    return;
  }
  for_pages(
      static_cast<char *>(address), size,
      [](char *p, size_t n) { remap(p, n, MAP_ANONYMOUS | MAP_NORESERVE, -1); },
      [](char *p, size_t n) { memset(p, 0, n); });
}

void map_pages(char *p, size_t size, int32_t device) {
  remap(p, size, MAP_ANONYMOUS | MAP_NORESERVE, -1);
  poison(p, size);
  std::lock_guard<std::mutex> guard(lock);
  blocks[p] = {size, device};
  outdate(p, size);
}

void unmap_pages(char *p, size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  blocks.erase(p);
  remap(p, size, MAP_ANONYMOUS | MAP_NORESERVE, -1, PROT_NONE);
}

bool on_device(const void *address) {
  std::lock_guard<std::mutex> guard(lock);
  return inside(blocks, address);
}

bool on_host(const void *address) {
  std::lock_guard<std::mutex> guard(lock);
  return inside(host_blocks, address);
}

uint64_t generation(const void *address) {
  std::lock_guard<std::mutex> guard(lock);
  return generations[static_cast<const char *>(address)];
}

void note_write(const void *address) {
  std::lock_guard<std::mutex> guard(lock);
  generations[static_cast<const char *>(address)]++;
}

}  // namespace soft_npu

using namespace soft_npu;

extern "C" {

aclError aclrtMalloc(void **p, size_t size, aclrtMemMallocPolicy) { return allocate(p, size); }
aclError aclrtMallocAlign32(void **p, size_t size, aclrtMemMallocPolicy) {
  return allocate(p, size);
}

aclError aclrtFree(void *p) {
  std::lock_guard<std::mutex> guard(lock);
  auto it = blocks.find(static_cast<char *>(p));
  if (it == blocks.end()) return fail(ACL_ERROR_INVALID_PARAM, "aclrtFree: not allocated");
  give(it->second.size, it->second.device);
  munmap(p, std::max(whole_pages(it->second.size), kPage));
  blocks.erase(it);
  return ACL_SUCCESS;
}

aclError aclrtMallocHost(void **p, size_t size) { return allocate_host(p, size); }
aclError aclrtMallocHostWithCfg(void **p, uint64_t size, aclrtMallocConfig *) {
  return allocate_host(p, size);
}

aclError aclrtFreeHost(void *p) {
  std::lock_guard<std::mutex> guard(lock);
  if (!host_blocks.erase(static_cast<char *>(p)))
    return fail(ACL_ERROR_INVALID_PARAM, "aclrtFreeHost: not allocated");
  free(p);
  return ACL_SUCCESS;
}

aclError aclrtHostRegisterV2(void *p, uint64_t size, uint32_t) {
  std::lock_guard<std::mutex> guard(lock);
  host_blocks[static_cast<char *>(p)] = {size, -1};
  return ACL_SUCCESS;
}

aclError aclrtHostUnregister(void *p) {
  std::lock_guard<std::mutex> guard(lock);
  host_blocks.erase(static_cast<char *>(p));
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free, size_t *total) {
  const auto info = memory_info(current_device());
  *total = info.total;
  *free = info.total - info.used;
  return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void *p, aclrtPtrAttributes *attributes) {
  memset(attributes, 0, sizeof *attributes);
  attributes->location.type = on_host(p)     ? ACL_MEM_LOCATION_TYPE_HOST
                              : on_device(p) ? ACL_MEM_LOCATION_TYPE_DEVICE
                                             : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  return ACL_SUCCESS;
}

// Copies. Of two streams' the order is that of their calls.
aclError aclrtMemcpy(void *to, size_t, const void *from, size_t count, aclrtMemcpyKind kind) {
  if (aclError error = refuse_in_capture("aclrtMemcpy")) return error;
  if (aclError error = refuse_unmapped("aclrtMemcpy", {to, from}, count)) return error;
  count_copy(count, kind);
  copy(to, from, count);
  return hangs() ? hang(-1) : ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void *to, size_t, const void *from, size_t count,
                          aclrtMemcpyKind kind, aclrtStream stream) {
  if (aclError error = refuse_unmapped("aclrtMemcpyAsync", {to, from}, count)) return error;
  count_copy(count, kind);
  return launch(stream, [=] { copy(to, from, count); });
}

aclError aclrtMemcpyAsyncWithCondition(void *to, size_t size, const void *from, size_t count,
                                       aclrtMemcpyKind kind, aclrtStream stream) {
  return aclrtMemcpyAsync(to, size, from, count, kind, stream);
}

aclError aclrtMemset(void *p, size_t, int32_t value, size_t count) {
  if (aclError error = refuse_in_capture("aclrtMemset")) return error;
  if (aclError error = refuse_unmapped("aclrtMemset", {p}, count)) return error;
  set(p, value, count);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void *p, size_t, int32_t value, size_t count, aclrtStream stream) {
  if (aclError error = refuse_unmapped("aclrtMemsetAsync", {p}, count)) return error;
  return launch(stream, [=] { set(p, value, count); });
}

}  // extern "C"
