#include "communicator.h"

#include <algorithm>
#include <cstdio>

#include "sim.h"

namespace sim {
namespace {

// What tests look at and change.
std::mutex state_mutex;
// In the order in which they were made.
auto& communicators = *new std::vector<CommunicatorPointer>;
bool report_lost_peers = false;
uint64_t batches = 0, repeated = 0;

}  // namespace

bool Communicator::connect(const std::string& meeting, double seconds) {
  return ranks == 1 || mesh_.connect(meeting, seconds);
}

bool Communicator::exchange(const std::vector<Message>& messages) {
  if (error() == HCCL_SUCCESS) {
    if (mesh_.exchange(messages)) return true;
    std::unique_lock<std::mutex> lock(state_mutex);
    bool report = report_lost_peers;
    lock.unlock();
    if (report) set_error(HCCL_E_REMOTE);
  }
  hang();
  return false;
}

HcclResult Communicator::error() {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

void Communicator::set_error(HcclResult code) {
  std::lock_guard<std::mutex> lock(mutex_);
  error_ = code;
}

void Communicator::hang() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return closed_; });
}

void Communicator::close() {
  std::lock_guard<std::mutex> lock(mutex_);
  closed_ = true;
  mesh_.close();
  changed_.notify_all();
}

void add_communicator(const CommunicatorPointer& comm) {
  std::lock_guard<std::mutex> lock(state_mutex);
  communicators.push_back(comm);
}

CommunicatorPointer find_communicator(HcclComm handle) {
  std::lock_guard<std::mutex> lock(state_mutex);
  for (auto& comm : communicators) {
    if (comm.get() == handle) return comm;
  }
  return nullptr;
}

void remove_communicator(const CommunicatorPointer& comm) {
  std::lock_guard<std::mutex> lock(state_mutex);
  communicators.erase(std::find(communicators.begin(), communicators.end(), comm));
}

void count_batch(uint64_t beyond_the_first) {
  std::lock_guard<std::mutex> lock(state_mutex);
  batches++;
  repeated += beyond_the_first;
}

}  // namespace sim

// ---- for tests ---------------------------------------------------------------------------------

extern "C" {

// Let communicators that lose a peer report an error (otherwise they only wait).
void npu_sim_report_lost_peers(int report) {
  std::lock_guard<std::mutex> lock(sim::state_mutex);
  sim::report_lost_peers = report != 0;
}

// Break the n-th of the communicators that exist: it reports `code`, and what it is given from now
// on never ends.
int npu_sim_break_communicator(uint64_t number, int code) {
  std::lock_guard<std::mutex> lock(sim::state_mutex);
  if (number >= sim::communicators.size()) return 0;
  sim::communicators[number]->set_error(static_cast<HcclResult>(code));
  return 1;
}

// One line for each communicator that exists: ranks, rank, buffer in MiB, name.
void npu_sim_describe_communicators(char* text, uint64_t room) {
  std::lock_guard<std::mutex> lock(sim::state_mutex);
  std::string lines;
  for (auto& comm : sim::communicators) {
    lines += std::to_string(comm->ranks) + " " + std::to_string(comm->rank) + " " +
             std::to_string(comm->buffer) + " " + comm->name + "\n";
  }
  snprintf(text, room, "%s", lines.c_str());
}

void npu_sim_count_batches(uint64_t* calls, uint64_t* beyond_the_first) {
  std::lock_guard<std::mutex> lock(sim::state_mutex);
  *calls = sim::batches;
  *beyond_the_first = sim::repeated;
}

}  // extern "C"
