// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Address ranges, and physical memory that is mapped into them: torch_npu's expandable
// segments, and vllm-ascend's allocator for sleep mode. What is refused is what CANN's
// documents of aclrtMapMem and aclrtFreePhysical exclude.
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <set>

#include "runtime.h"

namespace soft_npu {
namespace {

constexpr size_t kGranularity = 2 << 20;

struct Physical {
  size_t size;
  int32_t device;
  // Where it is mapped, and whether it ever was.
  char *address = nullptr;
  bool used = false;
};
std::mutex lock;
std::set<Physical *> handles;
// Sizes of reserved ranges, by their start, also of those given back; what is mapped.
std::map<char *, size_t> ranges, released;
std::map<char *, Physical *> mapped;

std::string text(const void *address) {
  char buffer[32];
  snprintf(buffer, sizeof buffer, "%p", address);
  return buffer;
}

aclError invalid(const std::string &message) {
  return fail(ACL_ERROR_INVALID_PARAM, message);
}

size_t size_of(size_t size) { return size; }
size_t size_of(const Physical *physical) { return physical->size; }

// The first element that ends behind an address.
template <typename Map>
auto ending_behind(Map &map, const char *address) {
  auto it = map.upper_bound(const_cast<char *>(address));
  if (it == map.begin()) return it;
  const auto before = std::prev(it);
  return before->first + size_of(before->second) > address ? before : it;
}

template <typename Map>
bool overlaps(Map &map, const char *address, size_t size) {
  const auto it = ending_behind(map, address);
  return it != map.end() && it->first < address + size;
}

bool all_mapped(const char *address, size_t size) {
  for (const char *at = address; at < address + size;) {
    if (!overlaps(mapped, at, 1)) return false;
    const auto it = ending_behind(mapped, at);
    at = it->first + it->second->size;
  }
  return true;
}

bool inside_range(const char *address, size_t size) {
  const auto it = ending_behind(ranges, address);
  return it != ranges.end() && it->first <= address &&
         address + size <= it->first + it->second;
}

}  // namespace

aclError refuse_unmapped(const char *what, std::initializer_list<const void *> addresses,
                         size_t size) {
  std::lock_guard<std::mutex> guard(lock);
  for (const void *address : addresses) {
    const char *p = static_cast<const char *>(address);
    if (!overlaps(ranges, p, size) && !overlaps(released, p, size)) continue;
    if (all_mapped(p, size)) continue;
    const auto message = std::string(what) + ": " + std::to_string(size) + " bytes at " +
                         text(p) + " are not mapped to memory";
    // Not every caller looks at the code.
    fprintf(stderr, "soft_npu: %s\n", message.c_str());
    return invalid(message);
  }
  return ACL_SUCCESS;
}

}  // namespace soft_npu

using namespace soft_npu;

extern "C" {

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *, aclrtMemGranularityOptions,
                                          size_t *granularity) {
  *granularity = kGranularity;
  return ACL_SUCCESS;
}

aclError aclrtReserveMemAddress(void **p, size_t size, size_t, void *, uint64_t) {
  if (size == 0) return invalid("aclrtReserveMemAddress: size 0");
  // Starts at a multiple of the granularity, as on a chip.
  void *found = mmap(nullptr, size + kGranularity, PROT_NONE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (found == MAP_FAILED) return fail(ACL_ERROR_RT_MEMORY_ALLOCATION, "address range");
  const auto address = reinterpret_cast<uintptr_t>(found);
  *p = reinterpret_cast<void *>((address + kGranularity - 1) / kGranularity * kGranularity);
  std::lock_guard<std::mutex> guard(lock);
  ranges[static_cast<char *>(*p)] = size;
  return ACL_SUCCESS;
}

// The range is not given back to the host, so that no later one gets its address.
aclError aclrtReleaseMemAddress(void *p) {
  std::lock_guard<std::mutex> guard(lock);
  const auto it = ranges.find(static_cast<char *>(p));
  if (it == ranges.end())
    return invalid("aclrtReleaseMemAddress: " + text(p) + " is not the start of a range");
  if (overlaps(mapped, it->first, it->second))
    return invalid("aclrtReleaseMemAddress: memory is mapped in the range at " + text(p));
  released.insert(*it);
  ranges.erase(it);
  return ACL_SUCCESS;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle *handle, size_t size,
                             const aclrtPhysicalMemProp *properties, uint64_t) {
  if (size == 0 || size % kGranularity)
    return invalid("aclrtMallocPhysical: size " + std::to_string(size) +
                   " is not a multiple of " + std::to_string(kGranularity));
  const int32_t device = int32_t(properties->location.id);
  if (device < 0 || device >= device_count())
    return invalid("aclrtMallocPhysical: there is no device " + std::to_string(device));
  if (aclError error = take(size, device)) return error;
  auto *physical = new Physical{size, device};
  std::lock_guard<std::mutex> guard(lock);
  handles.insert(physical);
  *handle = physical;
  return ACL_SUCCESS;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  std::lock_guard<std::mutex> guard(lock);
  auto *physical = static_cast<Physical *>(handle);
  if (!handles.count(physical)) return invalid("aclrtFreePhysical: not allocated");
  if (physical->address)
    return invalid("aclrtFreePhysical: the memory is mapped at " + text(physical->address));
  give(physical->size, physical->device);
  handles.erase(physical);
  delete physical;
  return ACL_SUCCESS;
}

aclError aclrtMapMem(void *p, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
  std::lock_guard<std::mutex> guard(lock);
  auto *address = static_cast<char *>(p);
  auto *physical = static_cast<Physical *>(handle);
  if (!handles.count(physical)) return invalid("aclrtMapMem: the memory is not allocated");
  if (size != physical->size || offset != 0)
    return invalid("aclrtMapMem: " + std::to_string(size) + " bytes from " +
                   std::to_string(offset) + ", of memory of " +
                   std::to_string(physical->size));
  if (reinterpret_cast<uintptr_t>(p) % kGranularity || !inside_range(address, size))
    return invalid("aclrtMapMem: " + text(p) + " is not in a reserved range, or not aligned");
  if (overlaps(mapped, address, size))
    return invalid("aclrtMapMem: memory is mapped at " + text(p));
  if (physical->address)
    return invalid("aclrtMapMem: the memory is mapped at " + text(physical->address));
  // Nobody does it. It would have to keep what was written.
  if (physical->used)
    return fail(ACL_ERROR_RT_FEATURE_NOT_SUPPORT, "aclrtMapMem: memory that was unmapped");
  map_pages(address, size, physical->device);
  physical->address = address;
  physical->used = true;
  mapped[address] = physical;
  return ACL_SUCCESS;
}

aclError aclrtUnmapMem(void *p) {
  std::lock_guard<std::mutex> guard(lock);
  const auto it = mapped.find(static_cast<char *>(p));
  if (it == mapped.end()) return invalid("aclrtUnmapMem: nothing is mapped at " + text(p));
  unmap_pages(it->first, it->second->size);
  it->second->address = nullptr;
  mapped.erase(it);
  return ACL_SUCCESS;
}

}  // extern "C"
