// What the sources of the simulated CANN share; ../README.md says what is simulated.
#pragma once

#include <acl/acl.h>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

namespace sim {

using Task = std::function<void()>;

// What keeps a stream busy. Each kind can be slowed down by itself.
enum class Work { kKernel, kHostCopy, kDeviceCopy, kTransfer, kKinds };

// ---- memory.cpp --------------------------------------------------------------------------------

// Where code that runs here can reach an address: device memory through its second mapping, anything
// else as it is.
char* reach(const void* address);
bool is_device_memory(const void* address);
// Whether the address lies in memory from aclrtMallocHost: only that can be copied asynchronously.
bool is_pinned(const void* address);

// ---- streams.cpp -------------------------------------------------------------------------------

// Give a stream a task. It runs later, on the stream's own thread, after all that the stream was
// given before; while the stream is being captured it becomes a part of the graph instead.
void post(aclrtStream stream, Work kind, Task task);

// Something ran wrong on the device: `cause` is printed, and waiting for the device is an error from
// now on, as after an exception of a real kernel.
void fail(const std::string& cause);

// ---- capture.cpp -------------------------------------------------------------------------------

// A captured graph: tasks in the order in which the host posted them, which is an order in which
// they may run.
struct Graph;
using GraphPointer = std::shared_ptr<Graph>;

// Which graph a stream is being captured into; none if it is not.
GraphPointer capturing(aclrtStream stream);
void add_to(const GraphPointer& graph, Work kind, Task task);
// A stream that waits for an event of a captured one is captured as well.
void join(const GraphPointer& graph, aclrtStream stream);
// Mark the graph invalid, and return the code.
aclError invalidate(const GraphPointer& graph, aclError code);
// Nothing, or why this thread must not do now what waits for the device, allocates or asks events,
// because a graph is being captured.
aclError forbidden_by_capture();
void forget_captures_of(aclrtStream stream);

// ---- observe.cpp -------------------------------------------------------------------------------

// The host is about to wait for the device; `why` is a word that stays alive.
void note_wait(const char* why);
// How long a task of this kind is to be held up, in microseconds.
uint32_t draw_delay(Work kind);

// Releases Python's lock while the host waits, if this thread holds it: kernels here are Python
// functions, so a host that waits with it would wait for ever. On a device that makes no difference.
class WithoutPythonLock {
 public:
  WithoutPythonLock();
  ~WithoutPythonLock();
  WithoutPythonLock(const WithoutPythonLock&) = delete;
  WithoutPythonLock& operator=(const WithoutPythonLock&) = delete;

 private:
  void* saved_ = nullptr;
};

}  // namespace sim
