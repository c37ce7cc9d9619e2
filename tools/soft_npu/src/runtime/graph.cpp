// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// A graph is the list of what its streams were given while they were captured. It is
// replayed by doing that again, on the same memory.
#include <mutex>
#include <set>

#include "runtime.h"

namespace soft_npu {
namespace {

std::mutex lock;
std::set<Graph *> captures;
thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

struct Update {
  Stream *stream;
  TaskGroup *group;
};
thread_local Update update = {nullptr, nullptr};

class Replay : public Task {
 public:
  explicit Replay(Graph *graph) : graph_(graph) {}
  bool run() override {
    for (; at_ < graph_->tasks.size(); at_++) {
      if (!graph_->tasks[at_]->run()) return false;
      counters().replayed++;
    }
    return true;
  }

 private:
  Graph *graph_;
  size_t at_ = 0;
};

}  // namespace

Counters &counters() {
  static Counters all;
  return all;
}

void count_copy(size_t bytes, aclrtMemcpyKind kind) {
  auto &all = counters();
  if (kind == ACL_MEMCPY_DEVICE_TO_HOST) {
    all.to_host++;
    all.to_host_bytes += bytes;
  } else if (kind == ACL_MEMCPY_HOST_TO_DEVICE) {
    all.to_device++;
    all.to_device_bytes += bytes;
  }
}

Graph *capturing(aclrtStream stream) { return stream_of(stream).captured_by; }

void join(Graph *graph, Stream &stream) {
  if (stream.captured_by == graph) return;
  stream.captured_by = graph;
  graph->streams.push_back(&stream);
}

TaskGroup *updating(aclrtStream stream) {
  return update.group && update.stream == &stream_of(stream) ? update.group : nullptr;
}

bool any_captured(int32_t device) {
  std::lock_guard<std::mutex> guard(lock);
  for (auto *graph : captures)
    for (auto *stream : graph->streams)
      if (stream->device == device) return true;
  return false;
}

aclError refuse_in_capture(const char *what) {
  if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return ACL_SUCCESS;
  std::lock_guard<std::mutex> guard(lock);
  for (auto *graph : captures) {
    const bool everywhere = graph->mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
    const bool here = graph->mode == ACL_MODEL_RI_CAPTURE_MODE_THREAD_LOCAL &&
                      graph->thread == std::this_thread::get_id();
    if (everywhere || here)
      return fail(ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT,
                  std::string(what) + " while a graph is captured");
  }
  return ACL_SUCCESS;
}

}  // namespace soft_npu

using namespace soft_npu;

extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
  if (capturing(stream)) return fail(ACL_ERROR_RT_STREAM_CAPTURED, "it is captured already");
  auto *graph = new Graph;
  graph->mode = mode;
  graph->thread = std::this_thread::get_id();
  join(graph, stream_of(stream));
  std::lock_guard<std::mutex> guard(lock);
  captures.insert(graph);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI *model) {
  auto *graph = capturing(stream);
  if (!graph) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "it is not captured");
  {
    std::lock_guard<std::mutex> guard(lock);
    captures.erase(graph);
  }
  for (auto *member : graph->streams) member->captured_by = nullptr;
  for (auto &function : graph->at_end) function();
  graph->at_end.clear();
  *model = graph;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus *status,
                                aclmdlRI *model) {
  auto *graph = capturing(stream);
  *status =
      graph ? ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE : ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (model) *model = graph;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode *mode) {
  std::swap(*mode, thread_mode);
  return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI model, aclrtStream stream) {
  counters().replays++;
  return launch(stream, std::make_shared<Replay>(static_cast<Graph *>(model)));
}

aclError aclmdlRIDestroy(aclmdlRI model) {
  delete static_cast<Graph *>(model);
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpBegin(aclrtStream stream) {
  auto *graph = capturing(stream);
  if (!graph) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "a task group, not captured");
  graph->group_begin = graph->tasks.size();
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskGrpEnd(aclrtStream stream, aclrtTaskGrp *handle) {
  auto *graph = capturing(stream);
  if (!graph) return fail(ACL_ERROR_RT_STREAM_NOT_CAPTURED, "a task group, not captured");
  *handle = new TaskGroup{graph, graph->group_begin, graph->tasks.size(), 0};
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateBegin(aclrtStream stream, aclrtTaskGrp handle) {
  auto *group = static_cast<TaskGroup *>(handle);
  group->next = group->begin;
  update = {&stream_of(stream), group};
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureTaskUpdateEnd(aclrtStream) {
  update = {nullptr, nullptr};
  return ACL_SUCCESS;
}

}  // extern "C"
