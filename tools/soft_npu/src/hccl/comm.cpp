// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
#include "comm.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "../runtime/runtime.h"

namespace soft_npu {
namespace {

std::mutex lock;
std::map<std::string, Comm *> comms;

// Asks again and again, as others of few cores have to run.
void wait_for(const std::string &what, const std::function<bool()> &done) {
  static const auto limit = std::chrono::seconds(number("SOFT_NPU_HCCL_TIMEOUT", 300));
  const auto start = std::chrono::steady_clock::now();
  for (int asked = 0; !done(); asked++) {
    if (asked < 100) std::this_thread::yield();
    else std::this_thread::sleep_for(std::chrono::microseconds(asked < 1000 ? 50 : 1000));
    if (std::chrono::steady_clock::now() - start > limit)
      throw std::runtime_error("soft_npu: " + what + ": no answer from another rank");
  }
}

void whole(ssize_t done, size_t size, const char *what) {
  if (done != ssize_t(size))
    throw std::runtime_error(std::string("soft_npu: ") + what + ": " + strerror(errno));
}

}  // namespace

Comm *find_comm(const std::string &name) {
  std::lock_guard<std::mutex> guard(lock);
  const auto it = comms.find(name);
  return it == comms.end() ? nullptr : it->second;
}

std::string Comm::path(const std::string &part) const {
  return std::string(setting("SOFT_NPU_STATE", "/dev/shm")) + "/" + name + "-" + part;
}

Comm::Comm(const std::string &name, uint32_t ranks, uint32_t rank)
    : name(name), ranks(ranks), rank(rank) {
  const int file = open(path("round").c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, sizeof(Shared)) != 0)
    throw std::runtime_error("soft_npu: cannot write " + path("round"));
  shared_ = static_cast<Shared *>(
      mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
  close(file);
  files_.resize(ranks);
  files_[rank] = open(path(std::to_string(rank)).c_str(), O_RDWR | O_CREAT, 0600);
  barrier("HcclCommInit");
  for (uint32_t other = 0; other < ranks; other++)
    if (other != rank) files_[other] = open(path(std::to_string(other)).c_str(), O_RDONLY);
  barrier("HcclCommInit");
  unlink(path(std::to_string(rank)).c_str());
  if (rank == 0) unlink(path("round").c_str());
  std::lock_guard<std::mutex> guard(lock);
  comms[name] = this;
}

Comm::~Comm() {
  for (int file : files_) close(file);
  munmap(shared_, sizeof(Shared));
  std::lock_guard<std::mutex> guard(lock);
  comms.erase(name);
}

void Comm::barrier(const char *what) {
  const uint32_t round = shared_->round;
  if (shared_->arrived.fetch_add(1) + 1 == ranks) {
    shared_->arrived = 0;
    shared_->round++;
    return;
  }
  wait_for(what, [&] { return shared_->round != round; });
}

void Comm::exchange(const char *what, const void *data, size_t size,
                    const std::function<void()> &read) {
  whole(pwrite(files_[rank], data, size, 0), size, what);
  barrier(what);
  read();
  barrier(what);
}

void Comm::fetch(uint32_t other, size_t offset, void *to, size_t size) const {
  whole(pread(files_[other], to, size, offset), size, "a rank shows less than another reads");
}

void Comm::send(uint32_t other, const void *data, size_t size) {
  const auto message = path(std::to_string(rank) + "-" + std::to_string(other) + "-" +
                            std::to_string(sent_[other]++));
  const auto unfinished = message + ".part";
  const int file = open(unfinished.c_str(), O_WRONLY | O_CREAT, 0600);
  whole(write(file, data, size), size, "HcclSend");
  close(file);
  rename(unfinished.c_str(), message.c_str());
}

void Comm::receive(uint32_t other, void *to, size_t size) {
  const auto message = path(std::to_string(other) + "-" + std::to_string(rank) + "-" +
                            std::to_string(received_[other]++));
  int file = -1;
  wait_for("HcclRecv", [&] { return (file = open(message.c_str(), O_RDONLY)) >= 0; });
  whole(::read(file, to, size), size, "HcclRecv");
  close(file);
  unlink(message.c_str());
}

}  // namespace soft_npu
