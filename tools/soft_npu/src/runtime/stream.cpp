// SPDX-License-Identifier: Apache-2.0
// SPDX-FileCopyrightText: Copyright contributors to the vllm-ascend-ct project
//
// Streams do what they are given at once, in the thread that gives it, unless something
// before it waits for a value or an event.
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <list>
#include <mutex>
#include <thread>

#include "runtime.h"

namespace soft_npu {
namespace {

struct Event {
  double ms = 0;
  bool done = true;
  Graph *captured_by = nullptr;
};

// Milliseconds in which another thread does what it has begun.
constexpr double kPatience = 1000;
std::mutex lock;
std::condition_variable changed;
uint64_t changes = 0;
std::list<Stream> streams;
int32_t next_id = 1;

double now() {
  using std::chrono::duration;
  return duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

class RecordEvent : public Task {
 public:
  explicit RecordEvent(Event *event) : event_(event) {}
  bool run() override {
    event_->ms = now();
    event_->done = true;
    return true;
  }

 private:
  Event *event_;
};

class WaitEvent : public Task {
 public:
  explicit WaitEvent(Event *event) : event_(event) {}
  bool run() override { return event_->done; }

 private:
  Event *event_;
};

class WaitValue : public Task {
 public:
  WaitValue(void *address, uint64_t value)
      : address_(static_cast<volatile uint64_t *>(address)), value_(value) {}
  bool run() override {
    if (*address_ == value_) return true;
    counters().waits++;
    return false;
  }

 private:
  volatile uint64_t *address_;
  uint64_t value_;
};

// Does what a stream can do now; whether that was something.
bool advance(Stream &stream) {
  bool any = false;
  for (;;) {
    std::shared_ptr<Task> task;
    uint64_t seen;
    {
      std::lock_guard<std::mutex> guard(lock);
      if (stream.running || stream.tasks.empty()) return any;
      task = stream.tasks.front();
      stream.running = true;
      seen = changes;
    }
    bool done = false;
    try {
      done = task->run();
    } catch (...) {
      std::lock_guard<std::mutex> guard(lock);
      stream.running = false;
      stream.tasks.pop_front();
      throw;
    }
    std::lock_guard<std::mutex> guard(lock);
    stream.running = false;
    if (done) {
      stream.tasks.pop_front();
      any = true;
    } else if (seen == changes) {
      return any;
    }
  }
}

aclError wait_until(const std::function<bool()> &done, int32_t timeout, const char *what) {
  if (hangs()) return hang(timeout);
  std::unique_lock<std::mutex> guard(lock);
  if (timeout < 0) {
    changed.wait(guard, done);
  } else if (!changed.wait_for(guard, std::chrono::milliseconds(timeout), done)) {
    return fail(ACL_ERROR_RT_STREAM_SYNC_TIMEOUT, std::string(what) + ": timeout");
  }
  return ACL_SUCCESS;
}

aclError synchronize(aclrtStream handle, int32_t timeout) {
  Stream &stream = stream_of(handle);
  counters().synchronizations++;
  if (stream.captured_by)
    return fail(ACL_ERROR_RT_STREAM_CAPTURED,
                "synchronizing a stream that is captured: a graph cannot wait for the host");
  return wait_until([&] { return stream.tasks.empty(); }, timeout, "stream");
}

aclError synchronize_device(int32_t timeout) {
  counters().synchronizations++;
  if (any_captured(current_device()))
    return fail(ACL_ERROR_RT_STREAM_CAPTURED, "synchronizing a device while it is captured");
  return wait_until(
      [] {
        for (auto &stream : streams)
          if (stream.device == current_device() && !stream.tasks.empty()) return false;
        return true;
      },
      timeout, "device");
}

}  // namespace

Stream &stream_of(aclrtStream handle) {
  if (handle) return *static_cast<Stream *>(handle);
  // The default stream of each device.
  static Stream of_device[16];
  Stream &stream = of_device[current_device()];
  stream.device = current_device();
  return stream;
}

aclError launch(aclrtStream handle, std::shared_ptr<Task> task) {
  Stream &stream = stream_of(handle);
  {
    std::lock_guard<std::mutex> guard(lock);
    if (stream.captured_by) {
      stream.captured_by->tasks.push_back(std::move(task));
      return ACL_SUCCESS;
    }
    stream.tasks.push_back(std::move(task));
  }
  progress();
  return ACL_SUCCESS;
}

aclError launch(aclrtStream stream, std::function<void()> function) {
  return launch(stream, std::make_shared<Function>(std::move(function)));
}

bool idle(aclrtStream handle) {
  std::lock_guard<std::mutex> guard(lock);
  return stream_of(handle).tasks.empty();
}

bool settles(aclrtStream handle) {
  const double start = now();
  while (!idle(handle)) {
    if (now() - start > kPatience) return false;
    progress();
    std::this_thread::yield();
  }
  return true;
}

void progress() {
  {
    std::lock_guard<std::mutex> guard(lock);
    changes++;
  }
  bool again = true;
  while (again) {
    again = advance(stream_of(nullptr));
    for (auto &stream : streams) again |= advance(stream);
  }
  changed.notify_all();
}

}  // namespace soft_npu

using namespace soft_npu;

extern "C" {

aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t) {
  std::lock_guard<std::mutex> guard(lock);
  streams.emplace_back();
  streams.back().id = next_id++;
  streams.back().device = current_device();
  *stream = &streams.back();
  return ACL_SUCCESS;
}
aclError aclrtCreateStream(aclrtStream *stream) {
  return aclrtCreateStreamWithConfig(stream, 0, 0);
}
// Others may still walk over the list: it stays in it.
aclError aclrtDestroyStream(aclrtStream) { return ACL_SUCCESS; }
aclError aclrtDestroyStreamForce(aclrtStream) { return ACL_SUCCESS; }

aclError aclrtStreamGetId(aclrtStream stream, int32_t *id) {
  *id = stream_of(stream).id;
  return ACL_SUCCESS;
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
  if (stream_of(stream).captured_by)
    return fail(ACL_ERROR_RT_STREAM_CAPTURED, "asking for the status of a captured stream");
  *status = idle(stream) ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue *) {
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeStream(aclrtStream stream) { return synchronize(stream, -1); }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t timeout) {
  return synchronize(stream, timeout);
}
aclError aclrtSynchronizeDevice() { return synchronize_device(-1); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) {
  return synchronize_device(timeout);
}

aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t) {
  *event = new Event;
  return ACL_SUCCESS;
}
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) {
  return aclrtCreateEventExWithFlag(event, flag);
}
// A waiting task may still ask it.
aclError aclrtDestroyEvent(aclrtEvent) { return ACL_SUCCESS; }

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  auto *event = static_cast<Event *>(handle);
  event->captured_by = capturing(stream);
  event->done = false;
  return launch(stream, std::make_shared<RecordEvent>(event));
}

aclError aclrtResetEvent(aclrtEvent event, aclrtStream stream) {
  return launch(stream, [event] { static_cast<Event *>(event)->done = false; });
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
  auto *event = static_cast<Event *>(handle);
  if (event->captured_by) {
    // Within a graph order is that of the calls.
    join(event->captured_by, stream_of(stream));
    return ACL_SUCCESS;
  }
  return launch(stream, std::make_shared<WaitEvent>(event));
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  auto *event = static_cast<Event *>(handle);
  counters().synchronizations++;
  if (event->captured_by)
    return fail(ACL_ERROR_RT_EVENT_CAPTURED, "synchronizing an event that is captured");
  return wait_until([event] { return event->done; }, -1, "event");
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus *status) {
  auto *event = static_cast<Event *>(handle);
  if (event->captured_by)
    return fail(ACL_ERROR_RT_EVENT_CAPTURED, "asking for the status of a captured event");
  *status = event->done ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
  *status = static_cast<Event *>(event)->done ? ACL_EVENT_WAIT_STATUS_COMPLETE
                                              : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtEventElapsedTime(float *ms, aclrtEvent start, aclrtEvent end) {
  *ms = float(static_cast<Event *>(end)->ms - static_cast<Event *>(start)->ms);
  return ACL_SUCCESS;
}

aclError aclrtValueWait(void *address, uint64_t value, uint32_t, aclrtStream stream) {
  return launch(stream, std::make_shared<WaitValue>(address, value));
}

aclError aclrtValueWrite(void *address, uint64_t value, uint32_t, aclrtStream stream) {
  return launch(stream, [=] { *static_cast<volatile uint64_t *>(address) = value; });
}

aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void *arguments) {
  return launch(stream, [=] { function(arguments); });
}

aclError aclrtLaunchCallback(aclrtCallback function, void *data, aclrtCallbackBlockType,
                             aclrtStream stream) {
  return launch(stream, [=] { function(data); });
}

// Callbacks run where they are launched.
aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtProcessReport(int32_t timeout) {
  std::this_thread::sleep_for(std::chrono::milliseconds(timeout < 0 ? 100 : timeout));
  return ACL_SUCCESS;
}

}  // extern "C"
