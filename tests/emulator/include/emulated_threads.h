// What a CUDA thread knows about itself and how it meets others: indices, barriers, shuffles and
// votes. Every meeting takes the place in the source that it was called from, to tell meetings
// apart and to name them; the meetings themselves are in ../block.cpp.
#pragma once

#include <bit>
#include <cstdint>
#include <source_location>
#include <type_traits>

#include "cuda_runtime_api.h"

struct uint3 {
  unsigned x, y, z;
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emulator {

using Place = std::source_location;

// The functions at which threads wait for each other; block.cpp has their names.
enum class Meeting {
  kSyncThreads,
  kSyncThreadsOr,
  kSyncThreadsAnd,
  kSyncThreadsCount,
  kSyncWarp,
  kBallot,
  kAny,
  kAll,
  kShfl,
  kShflUp,
  kShflDown,
  kShflXor,
};

// Waits for all threads of the block. Returns how many came with a predicate that is not 0.
int meet_block(Meeting meeting, bool predicate, Place place);

// Waits for the lanes in `mask`. Returns the value that lane `source` brought; all bits are 1 if
// that lane is not in the mask, where a device says nothing about the result.
uint64_t meet_lanes(Meeting meeting, unsigned mask, uint64_t value, int source, Place place);

// Waits for the lanes in `mask`. Returns the lanes whose predicate is true.
unsigned meet_vote(Meeting meeting, unsigned mask, bool predicate, Place place);

int lane_id();
int check_width(Meeting meeting, int width, Place place);

// `own` where the source lane is outside of the lane's group of `width`.
struct Group {
  int lane, first, width;
};
inline Group lane_group(int width) { return {lane_id(), lane_id() & ~(width - 1), width}; }

template <class T>
T exchange(Meeting meeting, unsigned mask, T value, int source, Place place) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles take numbers of 4 or 8 bytes");
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const uint64_t got = meet_lanes(meeting, mask, std::bit_cast<Bits>(value), source, place);
  return std::bit_cast<T>(static_cast<Bits>(got));
}

}  // namespace emulator

inline void __syncthreads(emulator::Place place = emulator::Place::current()) {
  emulator::meet_block(emulator::Meeting::kSyncThreads, false, place);
}
inline int __syncthreads_or(int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::meet_block(emulator::Meeting::kSyncThreadsOr, predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::meet_block(emulator::Meeting::kSyncThreadsAnd, predicate == 0, place) == 0;
}
inline int __syncthreads_count(int predicate, emulator::Place place = emulator::Place::current()) {
  return emulator::meet_block(emulator::Meeting::kSyncThreadsCount, predicate != 0, place);
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu,
                       emulator::Place place = emulator::Place::current()) {
  emulator::meet_vote(emulator::Meeting::kSyncWarp, mask, false, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              emulator::Place place = emulator::Place::current()) {
  return emulator::meet_vote(emulator::Meeting::kBallot, mask, predicate != 0, place);
}
inline int __any_sync(unsigned mask, int predicate,
                      emulator::Place place = emulator::Place::current()) {
  return emulator::meet_vote(emulator::Meeting::kAny, mask, predicate != 0, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      emulator::Place place = emulator::Place::current()) {
  return emulator::meet_vote(emulator::Meeting::kAll, mask, predicate == 0, place) == 0;
}

// A lane whose source lies outside of its group keeps its own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              emulator::Place place = emulator::Place::current()) {
  const auto group =
      emulator::lane_group(emulator::check_width(emulator::Meeting::kShfl, width, place));
  return emulator::exchange(emulator::Meeting::kShfl, mask, value,
                            group.first + (source & (width - 1)), place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                 emulator::Place place = emulator::Place::current()) {
  const auto group =
      emulator::lane_group(emulator::check_width(emulator::Meeting::kShflUp, width, place));
  const bool inside = delta <= static_cast<unsigned>(group.lane - group.first);
  return emulator::exchange(emulator::Meeting::kShflUp, mask, value,
                            inside ? group.lane - static_cast<int>(delta) : group.lane, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                   emulator::Place place = emulator::Place::current()) {
  const auto group =
      emulator::lane_group(emulator::check_width(emulator::Meeting::kShflDown, width, place));
  const bool inside = delta < static_cast<unsigned>(group.first + width - group.lane);
  return emulator::exchange(emulator::Meeting::kShflDown, mask, value,
                            inside ? group.lane + static_cast<int>(delta) : group.lane, place);
}
// As on a device, lanes of earlier groups can be reached, those of later ones can't.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                  emulator::Place place = emulator::Place::current()) {
  const auto group =
      emulator::lane_group(emulator::check_width(emulator::Meeting::kShflXor, width, place));
  const int other = group.lane ^ (lane_mask & (warpSize - 1));
  return emulator::exchange(emulator::Meeting::kShflXor, mask, value,
                            other < group.first + width ? other : group.lane, place);
}
