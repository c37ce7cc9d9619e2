// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Ranks that meet in shared memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace soft_npu {

class Comm {
 public:
  // Waits for the other ranks.
  Comm(const std::string &name, uint32_t ranks, uint32_t rank);
  ~Comm();

  // Shows `size` bytes to all ranks, and calls `read` when all have shown theirs. Within
  // it `fetch` reads what another shows.
  void exchange(const char *what, const void *data, size_t size,
                const std::function<void()> &read);
  void fetch(uint32_t rank, size_t offset, void *to, size_t size) const;
  // A message, which waits until it is read.
  void send(uint32_t rank, const void *data, size_t size);
  void receive(uint32_t rank, void *to, size_t size);

  const std::string name;
  const uint32_t ranks, rank;

 private:
  struct Shared {
    std::atomic<uint32_t> arrived, round;
  };
  void barrier(const char *what);
  std::string path(const std::string &part) const;

  Shared *shared_;
  std::vector<int> files_;
  std::map<uint32_t, uint64_t> sent_, received_;
};

// By its name, which operators are given; null for none.
Comm *find_comm(const std::string &name);

}  // namespace soft_npu
