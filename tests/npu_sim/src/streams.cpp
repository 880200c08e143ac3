// Streams and events. Every stream has a thread of its own, so what the host posts really happens
// later, and what it forgets to wait for is really not there yet.

#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <mutex>
#include <set>
#include <string>
#include <thread>

#include "sim.h"

namespace {

using Clock = std::chrono::steady_clock;

// ---- what has gone wrong -----------------------------------------------------------------------

// What lives for ever is never destroyed: streams' threads outlive the process's last function.
std::mutex failure_mutex;
std::string& failure = *new std::string;  // empty as long as all is well

aclError outcome() {
  std::lock_guard<std::mutex> lock(failure_mutex);
  return failure.empty() ? ACL_SUCCESS : ACL_ERROR_RT_AICORE_EXCEPTION;
}

// ---- streams -----------------------------------------------------------------------------------

class Stream {
 public:
  void push(sim::Work kind, sim::Task task) {
    std::lock_guard<std::mutex> lock(mutex_);
    tasks_.push_back({kind, std::move(task)});
    changed_.notify_all();
  }

  // Run what is posted until the stream is closed; the body of its thread.
  void run() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return closed_ || !tasks_.empty(); });
      if (tasks_.empty()) return;
      auto [kind, task] = std::move(tasks_.front());
      tasks_.pop_front();
      busy_ = true;
      lock.unlock();
      if (uint32_t delay = sim::draw_delay(kind)) usleep(delay);
      task();
      task = nullptr;  // what it holds goes before the host hears that it is done
      lock.lock();
      busy_ = false;
      changed_.notify_all();
    }
  }

  void close() {
    std::lock_guard<std::mutex> lock(mutex_);
    closed_ = true;
    changed_.notify_all();
  }

  bool idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return tasks_.empty() && !busy_;
  }

  // Whether the stream has become idle within so many milliseconds (negative: however long).
  bool wait(int milliseconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto done = [&] { return tasks_.empty() && !busy_; };
    if (milliseconds >= 0) {
      return changed_.wait_for(lock, std::chrono::milliseconds(milliseconds), done);
    }
    changed_.wait(lock, done);
    return true;
  }

 private:
  struct Posted {
    sim::Work kind;
    sim::Task task;
  };
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Posted> tasks_;
  bool busy_ = false, closed_ = false;
};

std::mutex streams_mutex;
auto& streams = *new std::set<std::shared_ptr<Stream>>;

std::shared_ptr<Stream> make_stream() {
  auto made = std::make_shared<Stream>();
  std::lock_guard<std::mutex> lock(streams_mutex);
  streams.insert(made);
  std::thread([made] { made->run(); }).detach();
  return made;
}

Stream& of(aclrtStream handle) {
  static Stream* null_stream = make_stream().get();
  return handle != nullptr ? *static_cast<Stream*>(handle) : *null_stream;
}

aclError wait_for(aclrtStream handle, int milliseconds) {
  if (auto graph = sim::capturing(handle)) {
    return sim::invalidate(graph, ACL_ERROR_RT_STREAM_CAPTURED);
  }
  if (aclError error = sim::forbidden_by_capture()) return error;
  sim::note_wait("stream");
  sim::WithoutPythonLock unlocked;
  return of(handle).wait(milliseconds) ? outcome() : ACL_ERROR_RT_STREAM_SYNC_TIMEOUT;
}

aclError wait_for_all(int milliseconds) {
  if (aclError error = sim::forbidden_by_capture()) return error;
  sim::note_wait("device");
  sim::WithoutPythonLock unlocked;
  std::set<std::shared_ptr<Stream>> all;
  {
    std::lock_guard<std::mutex> lock(streams_mutex);
    all = streams;
  }
  for (auto& stream : all) {
    if (!stream->wait(milliseconds)) return ACL_ERROR_RT_STREAM_SYNC_TIMEOUT;
  }
  return outcome();
}

// ---- events ------------------------------------------------------------------------------------

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0, passed = 0;  // how often it was recorded, and the latest that was reached
  Clock::time_point time;
  sim::GraphPointer graph;  // of the captured stream that recorded it last

  void pass(uint64_t number) {
    std::lock_guard<std::mutex> lock(mutex);
    passed = number;
    time = Clock::now();
    changed.notify_all();
  }

  void wait(uint64_t number) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return passed >= number; });
  }
};

// A handle owns a share, so that a destroyed event lives on in the tasks that need it.
std::shared_ptr<Event>& of_event(aclrtEvent handle) {
  return *static_cast<std::shared_ptr<Event>*>(handle);
}

}  // namespace

namespace sim {

void post(aclrtStream stream, Work kind, Task task) {
  if (auto graph = capturing(stream)) {
    add_to(graph, kind, std::move(task));
  } else {
    of(stream).push(kind, std::move(task));
  }
}

void fail(const std::string& cause) {
  std::lock_guard<std::mutex> lock(failure_mutex);
  if (failure.empty()) failure = cause;
  fprintf(stderr, "[npu_sim] %s\n", cause.c_str());
}

}  // namespace sim

extern "C" {

aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  *stream = make_stream().get();
  return ACL_SUCCESS;
}

aclError aclrtCreateStream(aclrtStream* stream) { return aclrtCreateStreamWithConfig(stream, 0, 0); }

aclError aclrtDestroyStream(aclrtStream stream) {
  sim::forget_captures_of(stream);
  std::lock_guard<std::mutex> lock(streams_mutex);
  for (auto it = streams.begin(); it != streams.end(); ++it) {
    if (it->get() != stream) continue;
    (*it)->close();
    streams.erase(it);
    return ACL_SUCCESS;
  }
  return ACL_ERROR_RT_PARAM_INVALID;
}

aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtSynchronizeStream(aclrtStream stream) { return wait_for(stream, -1); }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t milliseconds) {
  return wait_for(stream, milliseconds);
}
aclError aclrtSynchronizeDevice() { return wait_for_all(-1); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t milliseconds) {
  return wait_for_all(milliseconds);
}

aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus* status) {
  if (auto graph = sim::capturing(stream)) {
    return sim::invalidate(graph, ACL_ERROR_RT_STREAM_CAPTURED);
  }
  *status = of(stream).idle() ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t) {
  *event = new std::shared_ptr<Event>(new Event);
  return ACL_SUCCESS;
}

aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
  return aclrtCreateEventExWithFlag(event, flag);
}

aclError aclrtDestroyEvent(aclrtEvent event) {
  delete &of_event(event);
  return ACL_SUCCESS;
}

aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  auto event = of_event(handle);
  uint64_t number;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    number = ++event->recorded;
    event->graph = sim::capturing(stream);
    // In a graph the order of its tasks stands for the event.
    if (event->graph) return ACL_SUCCESS;
  }
  sim::post(stream, sim::Work::kKernel, [event, number] { event->pass(number); });
  return ACL_SUCCESS;
}

aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
  auto event = of_event(handle);
  uint64_t number;
  sim::GraphPointer captured;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    number = event->recorded;
    captured = event->graph;
  }
  auto graph = sim::capturing(stream);
  if (captured != nullptr) {
    if (graph == nullptr) {
      sim::join(captured, stream);
    } else if (graph != captured) {
      return sim::invalidate(graph, ACL_ERROR_RT_CAPTURE_DEPENDENCY);
    }
    return ACL_SUCCESS;
  }
  if (graph != nullptr && number > 0) {
    // It would be waited for at the capture only, and at no replay.
    return sim::invalidate(graph, ACL_ERROR_RT_CAPTURE_DEPENDENCY);
  }
  sim::post(stream, sim::Work::kKernel, [event, number] { event->wait(number); });
  return ACL_SUCCESS;
}

aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  auto event = of_event(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  if (event->graph) return sim::invalidate(event->graph, ACL_ERROR_RT_EVENT_CAPTURED);
  // Asking is no copy, and no capture forbids it: torch_npu's watchdog asks all the time.
  *status = event->passed >= event->recorded ? ACL_EVENT_RECORDED_STATUS_COMPLETE
                                             : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
  aclrtEventRecordedStatus recorded;
  if (aclError error = aclrtQueryEventStatus(handle, &recorded)) return error;
  *status = recorded == ACL_EVENT_RECORDED_STATUS_COMPLETE ? ACL_EVENT_WAIT_STATUS_COMPLETE
                                                           : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  auto event = of_event(handle);
  uint64_t number;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    if (event->graph) return sim::invalidate(event->graph, ACL_ERROR_RT_EVENT_CAPTURED);
    number = event->recorded;
  }
  if (aclError error = sim::forbidden_by_capture()) return error;
  sim::note_wait("event");
  sim::WithoutPythonLock unlocked;
  event->wait(number);
  return outcome();
}

aclError aclrtEventElapsedTime(float* milliseconds, aclrtEvent first, aclrtEvent second) {
  auto between = of_event(second)->time - of_event(first)->time;
  *milliseconds = std::chrono::duration<float, std::milli>(between).count();
  return ACL_SUCCESS;
}

const char* aclGetRecentErrMsg() {
  static thread_local std::string message;
  std::lock_guard<std::mutex> lock(failure_mutex);
  message = failure;
  return message.c_str();
}

// ---- for kernels, which are written in Python --------------------------------------------------

// Run `function(argument)` on the stream, once, or at every replay of the graph that it becomes a
// part of; then call `release(argument)`.
void npu_sim_launch(aclrtStream stream, void (*function)(long), void (*release)(long),
                    long argument) {
  auto owned = std::shared_ptr<void>(nullptr, [=](void*) { release(argument); });
  sim::post(stream, sim::Work::kKernel, [=] {
    (void)owned;
    function(argument);
  });
}

void npu_sim_fail(const char* cause) { sim::fail(cause); }

}  // extern "C"
