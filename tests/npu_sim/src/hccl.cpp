// HCCL's functions: what they make their streams do. All is messages, reductions included.

#include "communicator.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "numbers.h"
#include "sim.h"

namespace {

constexpr double kConnectSeconds = 60.0;

aclDataType acl_type(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8: return ACL_INT8;
    case HCCL_DATA_TYPE_UINT8: return ACL_UINT8;
    case HCCL_DATA_TYPE_INT16: return ACL_INT16;
    case HCCL_DATA_TYPE_UINT16: return ACL_UINT16;
    case HCCL_DATA_TYPE_INT32: return ACL_INT32;
    case HCCL_DATA_TYPE_UINT32: return ACL_UINT32;
    case HCCL_DATA_TYPE_INT64: return ACL_INT64;
    case HCCL_DATA_TYPE_UINT64: return ACL_UINT64;
    case HCCL_DATA_TYPE_FP16: return ACL_FLOAT16;
    case HCCL_DATA_TYPE_BFP16: return ACL_BF16;
    case HCCL_DATA_TYPE_FP32: return ACL_FLOAT;
    case HCCL_DATA_TYPE_FP64: return ACL_DOUBLE;
    case HCCL_DATA_TYPE_HIF8: return ACL_HIFLOAT8;
    case HCCL_DATA_TYPE_FP8E4M3: return ACL_FLOAT8_E4M3FN;
    case HCCL_DATA_TYPE_FP8E5M2: return ACL_FLOAT8_E5M2;
    case HCCL_DATA_TYPE_FP8E8M0: return ACL_FLOAT8_E8M0;
    default: return ACL_DT_UNDEFINED;
  }
}

size_t bytes_of(HcclDataType type) { return sim::element_size(acl_type(type)); }

sim::Message message(bool sending, uint32_t peer, const void* data, uint64_t bytes) {
  return {sending, peer, sim::reach(data), bytes};
}

HcclResult post(HcclComm handle, aclrtStream stream, std::vector<sim::Message> messages) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  for (auto& each : messages) {
    if (each.peer >= comm->ranks) return HCCL_E_PARA;
    if (each.data == nullptr && each.bytes > 0) return HCCL_E_PTR;
  }
  sim::post(stream, sim::Work::kTransfer, [=] { comm->exchange(messages); });
  return HCCL_SUCCESS;
}

// ---- reductions --------------------------------------------------------------------------------

sim::Number combine(HcclReduceOp op, const sim::Number& a, const sim::Number& b) {
  auto apply = [op](auto x, auto y) {
    switch (op) {
      case HCCL_REDUCE_SUM: return x + y;
      case HCCL_REDUCE_PROD: return x * y;
      case HCCL_REDUCE_MAX: return std::max(x, y);
      default: return std::min(x, y);
    }
  };
  if (a.integer) return {true, apply(a.whole, b.whole), 0.0};
  return {false, 0, apply(a.real, b.real)};
}

// Reduce `parts`, one rank's after the other's, into the first of them: in the same order on all
// ranks, so that they agree in every bit.
void reduce(std::vector<char>& parts, uint64_t count, uint32_t ranks, HcclDataType type,
            HcclReduceOp op) {
  aclDataType as = acl_type(type);
  size_t size = bytes_of(type);
  for (uint64_t at = 0; at < count; at++) {
    char* total = parts.data() + at * size;
    sim::Number number = sim::load(as, total);
    for (uint32_t rank = 1; rank < ranks; rank++) {
      number = combine(op, number, sim::load(as, total + rank * count * size));
    }
    sim::store(as, total, number);
  }
}

// Every rank sends a part of its own buffer to each target (all of it, or the target's share), which
// reduces what it gets.
HcclResult post_reduction(const void* from, void* to, uint64_t count, HcclDataType type,
                          HcclReduceOp op, HcclComm handle, aclrtStream stream, bool shares,
                          int only_to) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  if (!sim::can_convert(acl_type(type)) || op > HCCL_REDUCE_MIN) return HCCL_E_NOT_SUPPORT;
  sim::post(stream, sim::Work::kTransfer, [=] {
    uint64_t bytes = count * bytes_of(type);
    bool here = only_to < 0 || comm->rank == static_cast<uint32_t>(only_to);
    std::vector<char> parts(here ? bytes * comm->ranks : 0);
    std::vector<sim::Message> messages;
    for (uint32_t peer = 0; peer < comm->ranks; peer++) {
      auto* part = sim::reach(from) + (shares ? peer * bytes : 0);
      if (only_to < 0 || peer == static_cast<uint32_t>(only_to)) {
        messages.push_back({true, peer, part, bytes});
      }
      if (here) messages.push_back({false, peer, parts.data() + peer * bytes, bytes});
    }
    if (!comm->exchange(messages) || !here) return;
    reduce(parts, count, comm->ranks, type, op);
    memcpy(sim::reach(to), parts.data(), bytes);
  });
  return HCCL_SUCCESS;
}

// ---- point-to-point operations between HcclGroupStart and HcclGroupEnd -------------------------

struct Batch {
  HcclComm comm;
  aclrtStream stream;
  std::vector<sim::Message> messages;
};

thread_local int group_depth = 0;
thread_local std::vector<Batch> grouped;

HcclResult post_one(sim::Message one, HcclComm comm, aclrtStream stream) {
  if (group_depth == 0) return post(comm, stream, {one});
  for (auto& batch : grouped) {
    if (batch.comm != comm || batch.stream != stream) continue;
    batch.messages.push_back(one);
    return HCCL_SUCCESS;
  }
  grouped.push_back({comm, stream, {one}});
  return HCCL_SUCCESS;
}

}  // namespace

extern "C" {

// ---- communicators -----------------------------------------------------------------------------

HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  memset(info, 0, sizeof *info);
  std::random_device random;
  snprintf(info->internal, sizeof info->internal, "%08x%08x", random(), random());
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfoConfig(uint32_t ranks, const HcclRootInfo* info, uint32_t rank,
                                      const HcclCommConfig* config, HcclComm* handle) {
  auto comm = std::make_shared<sim::Communicator>(rank, ranks);
  if (config != nullptr) {
    if (config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET) {
      comm->buffer = config->hcclBufferSize;
    }
    comm->name = config->hcclCommName;
  }
  sim::WithoutPythonLock unlocked;
  if (!comm->connect(info->internal, kConnectSeconds)) return HCCL_E_TIMEOUT;
  sim::add_communicator(comm);
  *handle = comm.get();
  return HCCL_SUCCESS;
}

HcclResult HcclCommInitRootInfo(uint32_t ranks, const HcclRootInfo* info, uint32_t rank,
                                HcclComm* handle) {
  return HcclCommInitRootInfoConfig(ranks, info, rank, nullptr, handle);
}

HcclResult HcclCommDestroy(HcclComm handle) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  comm->close();
  sim::remove_communicator(comm);
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommAsyncError(HcclComm handle, HcclResult* error) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  *error = comm->error();
  return HCCL_SUCCESS;
}

HcclResult HcclGetCommName(HcclComm handle, char* name) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  strcpy(name, comm->name.c_str());
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankSize(HcclComm handle, uint32_t* ranks) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  *ranks = comm->ranks;
  return HCCL_SUCCESS;
}

HcclResult HcclGetRankId(HcclComm handle, uint32_t* rank) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  *rank = comm->rank;
  return HCCL_SUCCESS;
}

const char* HcclGetErrorString(HcclResult) { return "reported by the simulated HCCL"; }
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }

HcclResult HcclGetConfig(HcclConfig, HcclConfigValue* value) {
  value->value = 0;
  return HCCL_SUCCESS;
}

// ---- point to point ----------------------------------------------------------------------------

HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm,
                             aclrtStream stream) {
  std::vector<sim::Message> messages;
  std::set<std::pair<HcclSendRecvType, uint32_t>> seen;
  uint64_t again = 0;
  for (uint32_t at = 0; at < count; at++) {
    auto& item = items[at];
    messages.push_back(message(item.sendRecvType == HCCL_SEND, item.remoteRank, item.buf,
                               item.count * bytes_of(item.dataType)));
    again += !seen.insert({item.sendRecvType, item.remoteRank}).second;
  }
  sim::count_batch(again);
  return post(comm, stream, std::move(messages));
}

HcclResult HcclSend(void* data, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm,
                    aclrtStream stream) {
  return post_one(message(true, peer, data, count * bytes_of(type)), comm, stream);
}

HcclResult HcclRecv(void* data, uint64_t count, HcclDataType type, uint32_t peer, HcclComm comm,
                    aclrtStream stream) {
  return post_one(message(false, peer, data, count * bytes_of(type)), comm, stream);
}

HcclResult HcclGroupStart() {
  group_depth++;
  return HCCL_SUCCESS;
}

HcclResult HcclGroupEnd() {
  if (--group_depth > 0) return HCCL_SUCCESS;
  auto ended = std::move(grouped);
  grouped.clear();
  for (auto& batch : ended) {
    HcclResult result = post(batch.comm, batch.stream, std::move(batch.messages));
    if (result != HCCL_SUCCESS) return result;
  }
  return HCCL_SUCCESS;
}

// ---- collectives -------------------------------------------------------------------------------

HcclResult HcclAlltoAllV(const void* from, const void* send_counts, const void* send_starts,
                         HcclDataType send_type, const void* to, const void* receive_counts,
                         const void* receive_starts, HcclDataType receive_type, HcclComm handle,
                         aclrtStream stream) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  auto numbers = [](const void* array) { return static_cast<const uint64_t*>(array); };
  auto *input = static_cast<const char*>(from), *output = static_cast<const char*>(to);
  std::vector<sim::Message> messages;
  for (uint32_t peer = 0; peer < comm->ranks; peer++) {
    size_t out = bytes_of(send_type), in = bytes_of(receive_type);
    messages.push_back(message(true, peer, input + numbers(send_starts)[peer] * out,
                               numbers(send_counts)[peer] * out));
    messages.push_back(message(false, peer, output + numbers(receive_starts)[peer] * in,
                               numbers(receive_counts)[peer] * in));
  }
  return post(handle, stream, std::move(messages));
}

HcclResult HcclAlltoAll(const void* from, uint64_t send_count, HcclDataType send_type,
                        const void* to, uint64_t receive_count, HcclDataType receive_type,
                        HcclComm handle, aclrtStream stream) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  std::vector<uint64_t> sent(comm->ranks, send_count), received(comm->ranks, receive_count);
  std::vector<uint64_t> send_starts, receive_starts;
  for (uint32_t peer = 0; peer < comm->ranks; peer++) {
    send_starts.push_back(peer * send_count);
    receive_starts.push_back(peer * receive_count);
  }
  return HcclAlltoAllV(from, sent.data(), send_starts.data(), send_type, to, received.data(),
                       receive_starts.data(), receive_type, handle, stream);
}

HcclResult HcclAllGather(void* from, void* to, uint64_t count, HcclDataType type, HcclComm handle,
                         aclrtStream stream) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  std::vector<sim::Message> messages;
  uint64_t bytes = count * bytes_of(type);
  for (uint32_t peer = 0; peer < comm->ranks; peer++) {
    messages.push_back(message(true, peer, from, bytes));
    messages.push_back(message(false, peer, static_cast<char*>(to) + peer * bytes, bytes));
  }
  return post(handle, stream, std::move(messages));
}

HcclResult HcclBroadcast(void* data, uint64_t count, HcclDataType type, uint32_t root,
                         HcclComm handle, aclrtStream stream) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  std::vector<sim::Message> messages;
  uint64_t bytes = count * bytes_of(type);
  for (uint32_t peer = 0; peer < comm->ranks; peer++) {
    if (comm->rank == root && peer != root) messages.push_back(message(true, peer, data, bytes));
  }
  if (comm->rank != root) messages.push_back(message(false, root, data, bytes));
  return post(handle, stream, std::move(messages));
}

HcclResult HcclScatter(void* from, void* to, uint64_t count, HcclDataType type, uint32_t root,
                       HcclComm handle, aclrtStream stream) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  std::vector<sim::Message> messages;
  uint64_t bytes = count * bytes_of(type);
  for (uint32_t peer = 0; comm->rank == root && peer < comm->ranks; peer++) {
    messages.push_back(message(true, peer, static_cast<char*>(from) + peer * bytes, bytes));
  }
  messages.push_back(message(false, root, to, bytes));
  return post(handle, stream, std::move(messages));
}

HcclResult HcclAllReduce(void* from, void* to, uint64_t count, HcclDataType type, HcclReduceOp op,
                         HcclComm comm, aclrtStream stream) {
  return post_reduction(from, to, count, type, op, comm, stream, false, -1);
}

HcclResult HcclReduceScatter(void* from, void* to, uint64_t count, HcclDataType type,
                             HcclReduceOp op, HcclComm comm, aclrtStream stream) {
  return post_reduction(from, to, count, type, op, comm, stream, true, -1);
}

HcclResult HcclReduce(void* from, void* to, uint64_t count, HcclDataType type, HcclReduceOp op,
                      uint32_t root, HcclComm comm, aclrtStream stream) {
  return post_reduction(from, to, count, type, op, comm, stream, false, static_cast<int>(root));
}

HcclResult HcclBarrier(HcclComm handle, aclrtStream stream) {
  auto comm = sim::find_communicator(handle);
  if (comm == nullptr) return HCCL_E_PARA;
  std::vector<sim::Message> messages;
  for (uint32_t peer = 0; peer < comm->ranks; peer++) {
    messages.push_back(message(true, peer, nullptr, 0));
    messages.push_back(message(false, peer, nullptr, 0));
  }
  return post(handle, stream, std::move(messages));
}

}  // extern "C"
