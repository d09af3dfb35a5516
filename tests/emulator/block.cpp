// The threads of a block: who is ready, who waits for whom, and who can never go on.
//
// One thread runs at a time, until it meets others or ends; which one is next is drawn from the
// seed. When nobody is ready, either the whole block has met at one barrier, or the block hangs: on
// a device it would wait for ever, or go on with some threads missing.
#include "block.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "diagnosis.h"
#include "fibers.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// Where the linker script puts the shared variables; null in a module without any.
extern "C" {
extern char __start_emulated_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_emulated_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emulator {
namespace {

constexpr int kLanes = warpSize;
constexpr int kNobody = -1;

// Of the launch that runs now; launch.cpp lets in one at a time.
Fiber caller;
std::deque<Fiber> fibers;  // kept for later launches; a deque, because they must not move
std::vector<Thread> threads;
std::vector<uint3> thread_indices;
std::vector<int> ready;  // threads that can go on, in no order
Random* draw = nullptr;
int current = kNobody;
std::string error;

int num_threads() { return static_cast<int>(threads.size()); }

// Whether all threads wait at one barrier; then they can go on, and know how many came with `true`.
bool release_barrier() {
  const Thread& first = threads[0];
  int count = 0;
  for (const Thread& thread : threads) {
    if (!thread.waits_with(first) || !is_barrier(thread.meeting)) return false;
    count += thread.predicate;
  }
  for (int i = 0; i < num_threads(); ++i) {
    threads[i].state = State::kReady;
    threads[i].result = static_cast<uint64_t>(count);
    ready.push_back(i);
  }
  return true;
}

// The next to run, or kNobody: the block has ended, or hangs.
int pick() {
  if (ready.empty()) {
    const bool over = std::all_of(threads.begin(), threads.end(), [](const Thread& thread) {
      return thread.state == State::kEnded;
    });
    if (over) return kNobody;
    if (!release_barrier()) {
      error = describe_hang(threads);
      return kNobody;
    }
  }
  const size_t at = draw->below(ready.size());
  const int next = ready[at];
  ready[at] = ready.back();
  ready.pop_back();
  return next;
}

void switch_to(int next, bool ends) {
  Fiber& from = current == kNobody ? caller : fibers[current];
  if (next == current) return;
  current = next;
  if (next != kNobody) threadIdx = thread_indices[next];
  switch_fiber(from, next == kNobody ? caller : fibers[next], ends);
}

void end_thread() {
  threads[current].state = State::kEnded;
  switch_to(pick(), true);
}

[[noreturn]] void fail(const std::string& what) {
  error = "thread " + std::to_string(current) + " " + what;
  switch_to(kNobody, true);
  __builtin_unreachable();
}

// Lets the lanes of a mask go on if all of them wait for each other.
void release_lanes(int first, unsigned mask) {
  const Thread& own = threads[current];
  unsigned votes = 0;
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if (first + lane >= num_threads()) return;
    const Thread& other = threads[first + lane];
    if (!other.waits_with(own)) return;
    votes |= static_cast<unsigned>(other.predicate) << lane;
  }
  for (unsigned left = mask; left != 0; left &= left - 1) {
    Thread& thread = threads[first + std::countr_zero(left)];
    if (thread.source == kNobody) {
      thread.result = votes;
    } else {
      const bool present = mask >> thread.source & 1u;
      thread.result = present ? threads[first + thread.source].value : ~uint64_t{0};
    }
  }
  for (unsigned left = mask; left != 0; left &= left - 1) {
    const int index = first + std::countr_zero(left);
    threads[index].state = State::kReady;
    ready.push_back(index);
  }
}

uint64_t meet_warp(Meeting meeting, unsigned mask, uint64_t value, bool predicate, int source,
                   Place place) {
  Thread& own = threads[current];
  const int lane = current % kLanes;
  if ((mask >> lane & 1u) == 0)
    fail("calls " + name_call(meeting, mask, place) + " without naming itself");
  own.state = State::kWaits;
  own.meeting = meeting;
  own.place = place;
  own.mask = mask;
  own.value = value;
  own.predicate = predicate;
  own.source = source;
  release_lanes(current - lane, mask);
  switch_to(pick(), false);
  return own.result;
}

// By hand and unseen by AddressSanitizer: the gaps between variables are filled as well.
__attribute__((no_sanitize("address"))) void poison_shared_memory() {
  for (char* at = __start_emulated_shared; at != __stop_emulated_shared; ++at) {
    *static_cast<volatile char*>(at) = static_cast<char>(0xFF);
  }
}

}  // namespace

int lane_id() { return current % kLanes; }

int check_width(Meeting meeting, int width, Place place) {
  if (width < 1 || width > kLanes || (width & (width - 1)) != 0) {
    fail("calls " + name_call(meeting, 0, place) + " with width=" + std::to_string(width) +
         ", which is no power of two up to 32");
  }
  return width;
}

int meet_block(Meeting meeting, bool predicate, Place place) {
  Thread& own = threads[current];
  own.state = State::kWaits;
  own.meeting = meeting;
  own.place = place;
  own.mask = 0;
  own.predicate = predicate;
  switch_to(pick(), false);
  return static_cast<int>(own.result);
}

uint64_t meet_lanes(Meeting meeting, unsigned mask, uint64_t value, int source, Place place) {
  return meet_warp(meeting, mask, value, false, source, place);
}

unsigned meet_vote(Meeting meeting, unsigned mask, bool predicate, Place place) {
  return static_cast<unsigned>(meet_warp(meeting, mask, 0, predicate, kNobody, place));
}

void begin_launch(dim3 grid, dim3 block, const Call& call) {
  gridDim = grid;
  blockDim = block;
  const size_t count = size_t{block.x} * block.y * block.z;
  threads.resize(count);
  thread_indices.clear();
  for (unsigned z = 0; z < block.z; ++z) {
    for (unsigned y = 0; y < block.y; ++y) {
      for (unsigned x = 0; x < block.x; ++x) thread_indices.push_back({x, y, z});
    }
  }
  while (fibers.size() < count) allocate_stack(fibers.emplace_back());
  if (can_place_images && call.image != nullptr) {
    for (size_t i = 0; i < count; ++i) place_image(fibers[i], call.image, call.image_bytes);
  }
}

std::string run_block(uint3 index, const Call& call, Random& random) {
  blockIdx = index;
  draw = &random;
  error.clear();
  ready.clear();
  poison_shared_memory();
  Start start{call.run, call.arguments, end_thread};
  if (can_place_images && call.image != nullptr) {
    start.function = reinterpret_cast<void (*)(const void*)>(const_cast<void*>(call.kernel));
  }
  for (int i = 0; i < num_threads(); ++i) {
    threads[i] = Thread{};
    prepare(fibers[i], start);
    ready.push_back(i);
  }
  current = kNobody;
  switch_to(pick(), false);
  for (int i = 0; i < num_threads(); ++i) fibers[i].abandoned = !error.empty();
  return error;
}

std::string end_launch(const Call& call) {
  if (!can_place_images || call.image == nullptr) return "";
  for (int i = 0; i < num_threads(); ++i) {
    if (!image_is(fibers[i], call.image, call.image_bytes)) {
      return "thread " + std::to_string(i) +
             " wrote to the kernel's parameters, which are constant";
    }
  }
  return "";
}

}  // namespace emulator
