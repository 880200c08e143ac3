#include "mesh.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <deque>

#include "sim.h"

namespace sim {
namespace {

using Clock = std::chrono::steady_clock;

sockaddr_un address_of(const std::string& name, uint32_t rank, socklen_t* length) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  // The first byte is zero: an abstract name.
  int used = snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "npu_sim-%s-%u",
                      name.c_str(), rank);
  *length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + used);
  return address;
}

int new_socket() { return socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0); }

// A connection to a rank that may not be listening yet; -1 if it does not in time.
int call(const std::string& name, uint32_t rank, Clock::time_point deadline) {
  socklen_t length;
  auto address = address_of(name, rank, &length);
  while (Clock::now() < deadline) {
    int file = new_socket();
    if (::connect(file, reinterpret_cast<sockaddr*>(&address), length) == 0) return file;
    ::close(file);
    usleep(2000);
  }
  return -1;
}

// The next connection that comes in; -1 if none does in time.
int answer(int listener, Clock::time_point deadline) {
  pollfd waiting{listener, POLLIN, 0};
  auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now());
  if (left.count() <= 0 || poll(&waiting, 1, static_cast<int>(left.count())) != 1) return -1;
  return accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
}

// What is to go one way between this rank and a peer: every message after its length.
class Lane {
 public:
  void add(const Message* message) { todo_.push_back(message); }
  bool done() const { return todo_.empty(); }

  enum class Step { kBlocked, kDone, kLost };

  // Move as much as goes without waiting.
  Step advance(int file, bool sending) {
    while (!todo_.empty()) {
      const Message& message = *todo_.front();
      bool in_header = moved_ < sizeof header_;
      if (sending && moved_ == 0) header_ = message.bytes;
      char* data = in_header ? reinterpret_cast<char*>(&header_) + moved_
                             : message.data + (moved_ - sizeof header_);
      size_t left = (in_header ? 0 : message.bytes) + sizeof header_ - moved_;
      if (left > 0) {
        ssize_t now = sending ? send(file, data, left, MSG_NOSIGNAL | MSG_DONTWAIT)
                              : recv(file, data, left, MSG_DONTWAIT);
        if (now < 0 && errno == EINTR) continue;
        if (now < 0 && errno == EAGAIN) return Step::kBlocked;
        if (now <= 0) return Step::kLost;
        moved_ += static_cast<size_t>(now);
      }
      if (!sending && moved_ == sizeof header_ && header_ != message.bytes) {
        fail("a receive of " + std::to_string(message.bytes) + " bytes from rank " +
             std::to_string(message.peer) + " met a send of " + std::to_string(header_));
        return Step::kLost;
      }
      if (moved_ == sizeof header_ + message.bytes) {
        todo_.pop_front();
        moved_ = 0;
      }
    }
    return Step::kDone;
  }

 private:
  std::deque<const Message*> todo_;
  uint64_t header_ = 0;
  size_t moved_ = 0;  // of the first message, its length included
};

// Messages from a rank to itself: the n-th send is what the n-th receive gets.
void deliver_here(const std::vector<Message>& messages, uint32_t rank) {
  std::deque<const Message*> sends;
  for (auto& message : messages) {
    if (message.peer == rank && message.sending) sends.push_back(&message);
  }
  for (auto& message : messages) {
    if (message.peer != rank || message.sending) continue;
    if (sends.empty() || sends.front()->bytes != message.bytes) {
      return fail("a receive of a rank from itself met no send of its size");
    }
    memmove(message.data, sends.front()->data, message.bytes);
    sends.pop_front();
  }
}

}  // namespace

Mesh::~Mesh() {
  for (int file : sockets_) {
    if (file >= 0) ::close(file);
  }
}

bool Mesh::connect(const std::string& name, double seconds) {
  auto deadline = Clock::now() + std::chrono::milliseconds(static_cast<int>(1000 * seconds));
  uint32_t ranks = static_cast<uint32_t>(sockets_.size());
  socklen_t length;
  auto address = address_of(name, rank_, &length);
  int listener = new_socket();
  bool met = bind(listener, reinterpret_cast<sockaddr*>(&address), length) == 0 &&
             listen(listener, static_cast<int>(ranks)) == 0;
  // Every rank calls those before it, says who it is, and is called by those after it.
  for (uint32_t peer = 0; met && peer < rank_; peer++) {
    sockets_[peer] = call(name, peer, deadline);
    met = sockets_[peer] >= 0 && send(sockets_[peer], &rank_, sizeof rank_, MSG_NOSIGNAL) > 0;
  }
  for (uint32_t more = rank_ + 1; met && more < ranks; more++) {
    int file = answer(listener, deadline);
    uint32_t peer;
    met = file >= 0 && recv(file, &peer, sizeof peer, MSG_WAITALL) == sizeof peer;
    if (met) sockets_[peer] = file;
  }
  ::close(listener);
  return met;
}

bool Mesh::exchange(const std::vector<Message>& messages) {
  std::lock_guard<std::mutex> one_at_a_time(exchanging_);
  deliver_here(messages, rank_);
  size_t ranks = sockets_.size();
  std::vector<Lane> out(ranks), in(ranks);
  for (auto& message : messages) {
    if (message.peer != rank_) (message.sending ? out : in)[message.peer].add(&message);
  }
  for (;;) {
    if (closed_) return false;
    std::vector<pollfd> waiting;
    for (size_t peer = 0; peer < ranks; peer++) {
      auto sent = out[peer].advance(sockets_[peer], true);
      auto received = in[peer].advance(sockets_[peer], false);
      if (sent == Lane::Step::kLost || received == Lane::Step::kLost) return false;
      short events = static_cast<short>((sent == Lane::Step::kBlocked ? POLLOUT : 0) |
                                        (received == Lane::Step::kBlocked ? POLLIN : 0));
      if (events != 0) waiting.push_back({sockets_[peer], events, 0});
    }
    if (waiting.empty()) return true;
    poll(waiting.data(), waiting.size(), -1);
  }
}

void Mesh::close() {
  closed_ = true;
  for (int file : sockets_) {
    if (file >= 0) shutdown(file, SHUT_RDWR);
  }
}

}  // namespace sim
