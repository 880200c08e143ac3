// Copies between host and device, and filling memory.

#include <cstring>

#include "sim.h"

namespace {

// The host's side of a copy that can only be made now: memory that may be swapped out.
bool must_be_made_now(const void* target, const void* source) {
  auto pageable = [](const void* at) { return !sim::is_device_memory(at) && !sim::is_pinned(at); };
  return pageable(target) || pageable(source);
}

void copy(void* target, const void* source, size_t size) {
  memmove(sim::reach(target), sim::reach(source), size);
}

}  // namespace

extern "C" {

aclError aclrtMemcpy(void* target, size_t room, const void* source, size_t size, aclrtMemcpyKind) {
  if (size > room) return ACL_ERROR_RT_PARAM_INVALID;
  if (aclError error = sim::forbidden_by_capture()) return error;
  if (sim::is_device_memory(target) || sim::is_device_memory(source)) sim::note_wait("copy");
  copy(target, source, size);
  return ACL_SUCCESS;
}

aclError aclrtMemcpyAsync(void* target, size_t room, const void* source, size_t size,
                          aclrtMemcpyKind, aclrtStream stream) {
  if (size > room) return ACL_ERROR_RT_PARAM_INVALID;
  if (must_be_made_now(target, source)) {
    if (auto graph = sim::capturing(stream)) {
      return sim::invalidate(graph, ACL_ERROR_RT_CAPTURE_MODE_BLOCK_ASYNC);
    }
    if (aclError error = aclrtSynchronizeStream(stream)) return error;
    copy(target, source, size);
    return ACL_SUCCESS;
  }
  bool on_device = sim::is_device_memory(target) && sim::is_device_memory(source);
  sim::post(stream, on_device ? sim::Work::kDeviceCopy : sim::Work::kHostCopy,
            [=] { copy(target, source, size); });
  return ACL_SUCCESS;
}

aclError aclrtMemset(void* target, size_t room, int32_t value, size_t size) {
  if (size > room) return ACL_ERROR_RT_PARAM_INVALID;
  if (aclError error = aclrtSynchronizeDevice()) return error;
  memset(sim::reach(target), value, size);
  return ACL_SUCCESS;
}

aclError aclrtMemsetAsync(void* target, size_t room, int32_t value, size_t size,
                          aclrtStream stream) {
  if (size > room) return ACL_ERROR_RT_PARAM_INVALID;
  sim::post(stream, sim::Work::kKernel, [=] { memset(sim::reach(target), value, size); });
  return ACL_SUCCESS;
}

}  // extern "C"
