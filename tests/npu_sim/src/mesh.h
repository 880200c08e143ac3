// Sockets between the ranks of one communicator.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

namespace sim {

struct Message {
  bool sending;
  uint32_t peer;
  char* data;  // where this process can reach it
  uint64_t bytes;
};

// A unix socket from every rank to every other, in the abstract namespace: no files are left behind.
class Mesh {
 public:
  Mesh(uint32_t rank, uint32_t ranks) : rank_(rank), sockets_(ranks, -1) {}
  ~Mesh();
  Mesh(const Mesh&) = delete;
  Mesh& operator=(const Mesh&) = delete;

  // Meet the other ranks that know the name. False if they do not all come in time.
  bool connect(const std::string& name, double seconds);

  // Send and receive, everything at once; messages between two ranks keep their order in each
  // direction. Returns when all are done; false when a peer's end is closed, or this one's.
  bool exchange(const std::vector<Message>& messages);

  // Let an exchange that waits return.
  void close();

 private:
  uint32_t rank_;
  std::vector<int> sockets_;
  std::mutex exchanging_;
  std::atomic<bool> closed_{false};
};

}  // namespace sim
