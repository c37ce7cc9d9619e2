// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// What the parts of the runtime share, and what the dispatch library asks of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <initializer_list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "acl/acl.h"

namespace soft_npu {

// --- errors and settings (settings.cpp)

// Returns `code`, with what `aclGetRecentErrMsg` then says.
aclError fail(aclError code, const std::string &message);
// The same of an operator that is not emulated, which is printed as well.
aclError refuse(const std::string &what);
const char *setting(const char *name, const char *otherwise);
uint64_t number(const char *name, uint64_t otherwise);

// Whether this call, of a kind ("allocate", "operator", "hang") and by a name, is to fail.
// `SOFT_NPU_FAULTS` is a list "kind[:name]@n" or "kind[:name]@n+", n counted from 1.
bool faulted(const std::string &kind, const std::string &name);
void set_faults(const std::string &list);
// Blocks for a device that does not answer; returns an error at the timeout, in ms, or never.
bool hangs();
aclError hang(int32_t timeout);

// --- memory (memory.cpp)

struct MemoryInfo {
  size_t total, used, peak;
};
// All processes' together.
MemoryInfo memory_info(int32_t device);
void reset_peak(int32_t device);
// Takes memory from a device's budget, or fails; gives it back.
aclError take(size_t size, int32_t device);
void give(size_t size, int32_t device);
// Makes whole pages device memory that nobody has written; and pages whose access ends
// the process.
void map_pages(char *address, size_t size, int32_t device);
void unmap_pages(char *address, size_t size);
// Fills with a pattern that is NaN in each float and negative, but not -1, in each int.
void poison(void *address, size_t size);
void zero(void *address, size_t size);
bool on_device(const void *address);
bool on_host(const void *address);
// Grows each time that something in another layout than rows is written at an address.
uint64_t generation(const void *address);
void note_write(const void *address);

// --- virtual memory (virtual_memory.cpp)

// Fails if a range starting at one of the addresses is reserved, and not all mapped.
aclError refuse_unmapped(const char *what, std::initializer_list<const void *> addresses,
                         size_t size);

// --- devices (device.cpp)

int32_t current_device();
int32_t device_count();

// --- streams (stream.cpp)

// What a stream does.
class Task {
 public:
  virtual ~Task() = default;
  // Whether it is done. If not it is asked again when a value or an event was written.
  virtual bool run() = 0;
};

class Function : public Task {
 public:
  explicit Function(std::function<void()> function) : function_(std::move(function)) {}
  bool run() override {
    function_();
    return true;
  }

 private:
  std::function<void()> function_;
};

struct Graph;

struct Stream {
  int32_t id = 0, device = 0;
  // Not done yet; the first waits for something.
  std::deque<std::shared_ptr<Task>> tasks;
  bool running = false;
  Graph *captured_by = nullptr;
};

Stream &stream_of(aclrtStream handle);
// Does a task in the order of its stream: now, behind what the stream waits for, or, if
// the stream is captured, whenever the graph is replayed.
aclError launch(aclrtStream stream, std::shared_ptr<Task> task);
aclError launch(aclrtStream stream, std::function<void()> function);
// Whether nothing waits in it.
bool idle(aclrtStream stream);
// The same, once other threads have done what they have begun.
bool settles(aclrtStream stream);
// A value or an event was written: goes on with what waited.
void progress();

// --- graphs (graph.cpp)

struct Graph {
  std::vector<std::shared_ptr<Task>> tasks;
  std::vector<Stream *> streams;
  // At the end of the capture.
  std::vector<std::function<void()>> at_end;
  aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  std::thread::id thread;
  size_t group_begin = 0;
};

// Tasks of a graph whose arguments can be exchanged.
struct TaskGroup {
  Graph *graph;
  size_t begin, end, next;
};

// The graph that captures a stream; null for none.
Graph *capturing(aclrtStream stream);
// A stream that waits for a captured one is captured as well.
void join(Graph *graph, Stream &stream);
// The group whose arguments calls on this stream exchange; null for none.
TaskGroup *updating(aclrtStream stream);
// Refuses what a capture forbids to its thread, or to all threads.
aclError refuse_in_capture(const char *what);
bool any_captured(int32_t device);

struct Counters {
  uint64_t replays = 0, replayed = 0, waits = 0, updates = 0;
  // How often the host waits for the device, and copies between them.
  uint64_t synchronizations = 0, to_host = 0, to_host_bytes = 0, to_device = 0,
           to_device_bytes = 0;
};
Counters &counters();
// Counts a copy if it is one between host and device.
void count_copy(size_t bytes, aclrtMemcpyKind kind);

// --- operators of the graph engine (aclop.cpp)

// Copies matrices [batch, rows, columns], in bytes, to or from tiles of `tile` bytes a
// row and 16 rows.
void to_tiles(char *tiles, const char *rows_of, int64_t batch, int64_t rows,
              int64_t row_bytes, int64_t tile);
void from_tiles(char *rows_of, const char *tiles, int64_t batch, int64_t rows,
                int64_t row_bytes, int64_t tile);

}  // namespace soft_npu

// What generated stubs of functions that are not implemented call.
extern "C" long soft_npu_missing(const char *name);
