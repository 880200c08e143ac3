// Memory: one arena for the device, mapped twice, and page-locked memory of the host.
//
// Tensors get addresses of the first mapping, which cannot be read or written: whatever in the host's
// code touches device memory crashes at once. Kernels and copies use the second mapping (`reach`).

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "sim.h"

namespace {

constexpr size_t kArenaBytes = size_t{4} << 30;
constexpr size_t kAlignment = 512;
// The runtime pads every block by so much; torch_npu counts on it.
constexpr size_t kPadding = 32;
constexpr int kGarbage = 0xA5;  // fresh memory holds no zeros

struct Arena {
  char* device = nullptr;
  char* here = nullptr;

  Arena() {
    int file = memfd_create("npu_sim", 0);
    if (file < 0 || ftruncate(file, kArenaBytes) != 0) abort();
    device = static_cast<char*>(mmap(nullptr, kArenaBytes, PROT_NONE, MAP_SHARED, file, 0));
    here = static_cast<char*>(
        mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0));
    if (device == MAP_FAILED || here == MAP_FAILED) abort();
    close(file);
  }
};

// Made at the first use, so that processes that are forked before that have arenas of their own.
Arena& arena() {
  static Arena* made = new Arena;
  return *made;
}

// Blocks in use by address, with their sizes.
class Blocks {
 public:
  void add(char* start, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_[start] = size;
    used_ += size;
  }

  bool remove(char* start) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = blocks_.find(start);
    if (found == blocks_.end()) return false;
    used_ -= found->second;
    blocks_.erase(found);
    return true;
  }

  // The first gap of an arena that is large enough; nullptr if there is none.
  char* take(char* begin, char* end, size_t size) {
    std::lock_guard<std::mutex> lock(mutex_);
    char* at = begin;
    for (auto& [start, length] : blocks_) {
      if (at + size <= start) break;
      at = start + length;
    }
    if (at + size > end) return nullptr;
    blocks_[at] = size;
    used_ += size;
    return at;
  }

  bool contain(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto* at = static_cast<char*>(const_cast<void*>(address));
    auto next = blocks_.upper_bound(at);
    if (next == blocks_.begin()) return false;
    auto& [start, size] = *std::prev(next);
    return at < start + size;
  }

  size_t used() {
    std::lock_guard<std::mutex> lock(mutex_);
    return used_;
  }

 private:
  std::mutex mutex_;
  std::map<char*, size_t> blocks_;
  size_t used_ = 0;
};

Blocks& on_device() {
  static Blocks* blocks = new Blocks;
  return *blocks;
}

Blocks& pinned() {
  static Blocks* blocks = new Blocks;
  return *blocks;
}

}  // namespace

namespace sim {

bool is_device_memory(const void* address) {
  auto* at = static_cast<const char*>(address);
  return at >= arena().device && at < arena().device + kArenaBytes;
}

char* reach(const void* address) {
  auto* at = static_cast<char*>(const_cast<void*>(address));
  return is_device_memory(address) ? arena().here + (at - arena().device) : at;
}

bool is_pinned(const void* address) { return pinned().contain(address); }

}  // namespace sim

extern "C" {

// Memory may be taken while a graph is captured: torch_npu's allocator does, in the capturing thread,
// and CANN's documentation does not name it among the unsafe functions.
aclError aclrtMalloc(void** block, size_t size, aclrtMemMallocPolicy) {
  size = (size + kPadding + kAlignment - 1) / kAlignment * kAlignment;
  // Not from the first byte, so that no valid address equals the arena's.
  char* at = on_device().take(arena().device + kAlignment, arena().device + kArenaBytes, size);
  if (at == nullptr) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  memset(sim::reach(at), kGarbage, size);
  *block = at;
  return ACL_SUCCESS;
}

aclError aclrtMallocAlign32(void** block, size_t size, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(block, size, policy);
}

aclError aclrtMallocWithCfg(void** block, size_t size, aclrtMemMallocPolicy policy,
                            aclrtMallocConfig*) {
  return aclrtMalloc(block, size, policy);
}

aclError aclrtFree(void* block) {
  return on_device().remove(static_cast<char*>(block)) ? ACL_SUCCESS : ACL_ERROR_RT_PARAM_INVALID;
}

aclError aclrtMallocHost(void** block, size_t size) {
  if (posix_memalign(block, 4096, size) != 0) return ACL_ERROR_RT_MEMORY_ALLOCATION;
  pinned().add(static_cast<char*>(*block), size);
  return ACL_SUCCESS;
}

aclError aclrtMallocHostWithCfg(void** block, uint64_t size, aclrtMallocConfig*) {
  return aclrtMallocHost(block, size);
}

aclError aclrtFreeHost(void* block) {
  if (!pinned().remove(static_cast<char*>(block))) return ACL_ERROR_RT_PARAM_INVALID;
  free(block);
  return ACL_SUCCESS;
}

aclError aclrtGetMemInfo(aclrtMemAttr, size_t* unused, size_t* total) {
  *unused = kArenaBytes - on_device().used();
  *total = kArenaBytes;
  return ACL_SUCCESS;
}

aclError aclrtPointerGetAttributes(const void* address, aclrtPtrAttributes* attributes) {
  *attributes = {};
  attributes->location.type = sim::is_device_memory(address) ? ACL_MEM_LOCATION_TYPE_DEVICE
                              : sim::is_pinned(address)      ? ACL_MEM_LOCATION_TYPE_HOST
                                                             : ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  return ACL_SUCCESS;
}

// For kernels, which are written in Python.
void* npu_sim_reach(const void* address) { return sim::reach(address); }

}  // extern "C"
