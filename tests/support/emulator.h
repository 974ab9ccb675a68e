// Runs CUDA kernels on the CPU: every thread of a block is a fiber, and blocks run one after another.
//
// Include it before the kernels. It supports 1-D grids and blocks, __syncthreads, __shfl_down_sync on full warps,
// __shared__ arrays and one array of dynamic shared memory. A barrier that not all threads of its block (or warp)
// reach at the same place ends the program with a message. It finds wrong indices, tails, strides, reductions and
// barriers, and more with the sanitizers. It measures no speed and lacks CUDA's own maths.

#ifndef BANDPO_EMULATOR
#define BANDPO_EMULATOR

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static
#define BAND_TABLE_IN_SHARED_MEMORY(name) unsigned* name = emulator::shared.get()

namespace emulator {

struct Size {
  unsigned x;
};

constexpr int WARP = 32;
constexpr size_t STACK = 256 * 1024;

enum class State { RUNNING, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[STACK]};
  State state = State::DONE;
  int place = 0;           // of the barrier that it waits at
  unsigned exchanges = 0;  // shuffles so far
  void* fake_stack = nullptr;
};

inline Size grid_size, block_size, block_index, thread_index;
inline std::unique_ptr<unsigned[]> shared;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<unsigned long long> exchanged;  // a set for even shuffles, a set for odd ones
inline ucontext_t scheduler;
inline void* scheduler_stack = nullptr;
inline const void* scheduler_bottom = nullptr;
inline size_t scheduler_size = 0;
inline void (*kernel)(void**) = nullptr;
inline void** arguments = nullptr;
inline bool last_warp_first = false;

[[noreturn]] inline void fail(const char* reason) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", reason, block_index.x, thread_index.x);
  std::abort();
}

inline void switch_to_scheduler(Fiber& fiber, bool forever) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, scheduler_bottom, scheduler_size);
#else
  (void)forever;
#endif
  swapcontext(&fiber.context, &scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

// `place` tells barriers in the source apart.
inline void wait(State barrier, int place) {
  Fiber& fiber = *fibers[thread_index.x];
  fiber.state = barrier;
  fiber.place = place;
  switch_to_scheduler(fiber, false);
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  Fiber& fiber = *fibers[thread_index.x];
  kernel(arguments);
  fiber.state = State::DONE;
  switch_to_scheduler(fiber, true);
}

// Resumes `count` threads from `first` on, and returns true, if all of them wait at the same barrier.
inline bool release(unsigned first, unsigned count, State barrier) {
  const int place = fibers[first]->place;
  for (unsigned t = first; t < first + count; ++t) {
    if (fibers[t]->state != barrier || fibers[t]->place != place) return false;
  }
  for (unsigned t = first; t < first + count; ++t) fibers[t]->state = State::RUNNING;
  return true;
}

inline void resume(unsigned t) {
  thread_index.x = t;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler_stack, fibers[t]->stack.get(), STACK);
#endif
  swapcontext(&scheduler, &fibers[t]->context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler_stack, nullptr, nullptr);
#endif
}

inline void run_block() {
  const unsigned threads = block_size.x;
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = *fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
    fiber.state = State::RUNNING;
    fiber.exchanges = 0;
  }
  // A warp runs as far as it can before the next one starts, so that a missing barrier shows: in one order the
  // first warp is ahead, in the other the last.
  for (;;) {
    for (unsigned k = 0; k < threads; k += WARP) {
      const unsigned first = last_warp_first ? threads - WARP - k : k;
      do {
        for (unsigned t = first; t < first + WARP; ++t) {
          if (fibers[t]->state == State::RUNNING) resume(t);
        }
      } while (release(first, WARP, State::AT_WARP_BARRIER));
    }
    if (release(0, threads, State::AT_BLOCK_BARRIER)) continue;
    for (unsigned t = 0; t < threads; ++t) {
      if (fibers[t]->state != State::DONE) fail("a barrier that not all threads reach");
    }
    return;
  }
}

template <class T>
T shuffle_down(T value, unsigned distance, int place) {
  static_assert(sizeof(T) <= sizeof(unsigned long long), "wider than a slot");
  const unsigned thread = thread_index.x, lane = thread % WARP;
  // Two sets of slots in turn, because a thread that is ahead must not overwrite a slot that is still read.
  unsigned long long* slots = &exchanged[fibers[thread]->exchanges++ % 2 * block_size.x];
  std::memcpy(&slots[thread], &value, sizeof value);
  wait(State::AT_WARP_BARRIER, place);
  const unsigned from = lane + distance < WARP ? thread + distance : thread;
  std::memcpy(&value, &slots[from], sizeof value);
  return value;
}

inline bool all_of_warp(bool vote, int place) {
  const unsigned first = thread_index.x / WARP * WARP;
  const unsigned set = fibers[thread_index.x]->exchanges++ % 2 * block_size.x;
  exchanged[set + thread_index.x] = vote;
  wait(State::AT_WARP_BARRIER, place);
  for (unsigned t = first; t < first + WARP; ++t) vote = vote && exchanged[set + t];
  return vote;
}

// Runs the blocks of a launch from `first` on.
inline void launch(void (*entry)(void**), unsigned blocks, unsigned first, unsigned threads, unsigned shared_bytes,
                   void** with) {
  if (threads % WARP != 0) fail("blocks must be made of whole warps");
  kernel = entry;
  arguments = with;
  grid_size.x = blocks;
  block_size.x = threads;
  shared.reset(new unsigned[shared_bytes / sizeof(unsigned)]);  // no larger, for the address sanitizer
  exchanged.assign(2 * threads, 0);
  while (fibers.size() < threads) fibers.emplace_back(new Fiber);
  for (block_index.x = first; block_index.x < blocks; ++block_index.x) run_block();
}

// Calls a kernel with an array of pointers to its arguments, as a driver does.
template <auto Kernel>
struct Call;
template <class... Parameters, void (*Kernel)(Parameters...)>
struct Call<Kernel> {
  template <size_t... K>
  static void with(void** pointers, std::index_sequence<K...>) {
    Kernel(*static_cast<std::remove_const_t<Parameters>*>(pointers[K])...);
  }
  static void run(void** pointers) { with(pointers, std::index_sequence_for<Parameters...>()); }
  static constexpr int COUNT = sizeof...(Parameters);
};

}  // namespace emulator

#define gridDim emulator::grid_size
#define blockDim emulator::block_size
#define blockIdx emulator::block_index
#define threadIdx emulator::thread_index
#define __syncthreads() emulator::wait(emulator::State::AT_BLOCK_BARRIER, __COUNTER__)
// The emulator runs one thread at a time.
template <class T>
static inline T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = before + value;
  return before;
}

#define __shfl_down_sync(mask, value, distance)                              \
  ((mask) == 0xffffffffu ? emulator::shuffle_down(value, distance, __COUNTER__) \
                         : (emulator::fail("a shuffle of a part of a warp"), value))
#define __all_sync(mask, vote)                                      \
  ((mask) == 0xffffffffu ? emulator::all_of_warp(vote, __COUNTER__) \
                         : (emulator::fail("a vote of a part of a warp"), false))

#endif
