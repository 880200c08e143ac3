// What tests see and steer: delays, waits of the host.

#include <array>
#include <atomic>
#include <mutex>
#include <random>

#include "sim.h"

// The interpreter's own functions, where there is an interpreter.
extern "C" {
int PyGILState_Check() __attribute__((weak));
void* PyEval_SaveThread() __attribute__((weak));
void PyEval_RestoreThread(void*) __attribute__((weak));
}

namespace {

struct Delay {
  uint32_t least = 0, most = 0;  // microseconds
  uint32_t one_in = 1;           // tasks of which one is held up
};

std::mutex delays_mutex;
std::array<Delay, static_cast<size_t>(sim::Work::kKinds)> delays;
std::mt19937 dice;

// Of one thread: the watchdogs of process groups must not be taken for the model's host.
thread_local void (*on_wait)(const char*) = nullptr;

}  // namespace

namespace sim {

uint32_t draw_delay(Work kind) {
  std::lock_guard<std::mutex> lock(delays_mutex);
  const Delay& delay = delays[static_cast<size_t>(kind)];
  if (delay.most == 0 || dice() % delay.one_in != 0) return 0;
  return std::uniform_int_distribution<uint32_t>(delay.least, delay.most)(dice);
}

void note_wait(const char* why) {
  if (on_wait != nullptr) on_wait(why);
}

WithoutPythonLock::WithoutPythonLock() {
  if (PyGILState_Check != nullptr && PyGILState_Check() == 1) saved_ = PyEval_SaveThread();
}

WithoutPythonLock::~WithoutPythonLock() {
  if (saved_ != nullptr) PyEval_RestoreThread(saved_);
}

}  // namespace sim

extern "C" {

// Hold up one of `one_in` tasks of a kind for `least` to `most` microseconds, drawn from `seed`.
void npu_sim_set_delay(int kind, uint32_t least, uint32_t most, uint32_t one_in, uint32_t seed) {
  std::lock_guard<std::mutex> lock(delays_mutex);
  delays[kind] = {least, most, one_in};
  dice.seed(seed);
}

// Call `function` whenever this thread is about to wait for the device; nullptr ends that.
void npu_sim_on_wait(void (*function)(const char*)) { on_wait = function; }

}  // extern "C"
