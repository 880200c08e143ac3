// Graph capture: what streams are given is kept instead of run, and run at every replay.
//
// Who may do what while a graph is captured follows the rules that the runtime shares with CUDA: a
// mode is chosen at the beginning ("global" forbids unsafe calls to all threads, "thread local" to
// the capturing one, "relaxed" to none), and a thread may exempt itself for a while.

#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "sim.h"

namespace sim {

struct Graph {
  struct Node {
    Work kind;
    Task task;
  };
  std::vector<Node> nodes;
  aclrtStream origin = nullptr;
  // What torch_npu knows it by, from the beginning on.
  GraphPointer* handle = nullptr;
  aclmdlRICaptureMode mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
  std::thread::id owner;
  aclError error = ACL_SUCCESS;
};

namespace {

std::mutex mutex;
// Streams that are being captured now.
auto& captured = *new std::map<aclrtStream, GraphPointer>;
thread_local aclmdlRICaptureMode thread_mode = ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;

// Graph handles own a share, so that replays that are under way outlive a destroyed graph.
GraphPointer& of(aclmdlRI handle) { return *static_cast<GraphPointer*>(handle); }

GraphPointer find(aclrtStream stream) {
  auto found = captured.find(stream);
  return found == captured.end() ? nullptr : found->second;
}

bool forbids(const Graph& graph) {
  if (thread_mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
  if (graph.mode == ACL_MODEL_RI_CAPTURE_MODE_RELAXED) return false;
  if (graph.owner == std::this_thread::get_id()) return true;
  return thread_mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL &&
         graph.mode == ACL_MODEL_RI_CAPTURE_MODE_GLOBAL;
}

}  // namespace

GraphPointer capturing(aclrtStream stream) {
  std::lock_guard<std::mutex> lock(mutex);
  return find(stream);
}

void add_to(const GraphPointer& graph, Work kind, Task task) {
  std::lock_guard<std::mutex> lock(mutex);
  graph->nodes.push_back({kind, std::move(task)});
}

void join(const GraphPointer& graph, aclrtStream stream) {
  std::lock_guard<std::mutex> lock(mutex);
  // Only as long as the capture lasts: an event may outlive it.
  if (find(graph->origin) == graph) captured[stream] = graph;
}

aclError invalidate(const GraphPointer& graph, aclError code) {
  std::lock_guard<std::mutex> lock(mutex);
  if (graph->error == ACL_SUCCESS) graph->error = code;
  return code;
}

aclError forbidden_by_capture() {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto& [stream, graph] : captured) {
    if (!forbids(*graph)) continue;
    if (graph->error == ACL_SUCCESS) graph->error = ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT;
    return ACL_ERROR_RT_CAPTURE_MODE_NOT_SUPPORT;
  }
  return ACL_SUCCESS;
}

void forget_captures_of(aclrtStream stream) {
  std::lock_guard<std::mutex> lock(mutex);
  captured.erase(stream);
}

}  // namespace sim

extern "C" {

aclError aclmdlRICaptureBegin(aclrtStream stream, aclmdlRICaptureMode mode) {
  std::lock_guard<std::mutex> lock(sim::mutex);
  if (sim::find(stream) != nullptr) return ACL_ERROR_RT_STREAM_CAPTURED;
  auto graph = std::make_shared<sim::Graph>();
  graph->origin = stream;
  graph->mode = mode;
  graph->owner = std::this_thread::get_id();
  graph->handle = new sim::GraphPointer(graph);
  sim::captured[stream] = graph;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureGetInfo(aclrtStream stream, aclmdlRICaptureStatus* status,
                                aclmdlRI* handle) {
  std::lock_guard<std::mutex> lock(sim::mutex);
  auto graph = sim::find(stream);
  *status = graph == nullptr            ? ACL_MODEL_RI_CAPTURE_STATUS_NONE
            : graph->error != ACL_SUCCESS ? ACL_MODEL_RI_CAPTURE_STATUS_INVALIDATED
                                          : ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE;
  if (handle != nullptr) *handle = graph == nullptr ? nullptr : graph->handle;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureEnd(aclrtStream stream, aclmdlRI* handle) {
  std::lock_guard<std::mutex> lock(sim::mutex);
  auto graph = sim::find(stream);
  if (graph == nullptr) return ACL_ERROR_RT_STREAM_NOT_CAPTURED;
  if (graph->origin != stream) return ACL_ERROR_RT_STREAM_CAPTURE_UNMATCHED;
  for (auto it = sim::captured.begin(); it != sim::captured.end();) {
    it = it->second == graph ? sim::captured.erase(it) : std::next(it);
  }
  if (graph->error != ACL_SUCCESS) {
    delete graph->handle;
    return graph->error;
  }
  *handle = graph->handle;
  return ACL_SUCCESS;
}

aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode* mode) {
  std::swap(*mode, sim::thread_mode);
  return ACL_SUCCESS;
}

aclError aclmdlRIExecuteAsync(aclmdlRI handle, aclrtStream stream) {
  auto graph = sim::of(handle);
  for (auto& node : graph->nodes) {
    // The share keeps what the task reads alive until it has run.
    sim::post(stream, node.kind, [graph, &node] { node.task(); });
  }
  return ACL_SUCCESS;
}

aclError aclmdlRIDestroy(aclmdlRI handle) {
  delete &sim::of(handle);
  return ACL_SUCCESS;
}

}  // extern "C"
