// A communicator of HCCL, and what tests do to it.
#pragma once

#include <acl/acl.h>

#include "third_party/hccl/inc/hccl/hccl.h"

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "mesh.h"

namespace sim {

class Communicator {
 public:
  Communicator(uint32_t rank, uint32_t ranks) : rank(rank), ranks(ranks), mesh_(rank, ranks) {}

  const uint32_t rank, ranks;
  uint32_t buffer = HCCL_COMM_DEFAULT_BUFFSIZE;  // MiB
  std::string name;

  // Meet the others. False if they do not all come in time.
  bool connect(const std::string& meeting, double seconds);

  // Carry out messages, on a stream's thread. As on a device, what waits for a peer that is gone
  // keeps its stream, until the communicator is closed: then the answer is false.
  bool exchange(const std::vector<Message>& messages);

  HcclResult error();
  void set_error(HcclResult code);
  void close();

 private:
  void hang();

  Mesh mesh_;
  std::mutex mutex_;
  std::condition_variable changed_;
  HcclResult error_ = HCCL_SUCCESS;
  bool closed_ = false;
};

// Whoever runs later holds a share; a handle is the object's address.
using CommunicatorPointer = std::shared_ptr<Communicator>;

void add_communicator(const CommunicatorPointer& comm);
CommunicatorPointer find_communicator(HcclComm handle);  // nullptr if it is none
void remove_communicator(const CommunicatorPointer& comm);
// One HcclBatchSendRecv, with so many messages beyond the first to or from one peer.
void count_batch(uint64_t beyond_the_first);

}  // namespace sim
