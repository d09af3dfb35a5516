// A thread of a block as the emulator sees it, and the words for what it waits for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {

enum class State { kReady, kWaits, kEnded };

struct Thread {
  State state = State::kReady;
  // What it waits for, or waited for last.
  Meeting meeting{};
  Place place{};
  unsigned mask = 0;       // lanes that the warp's functions are for; 0 for the block's
  uint64_t value = 0;      // what it brings to a shuffle
  bool predicate = false;  // what it brings to a vote
  int source = 0;          // the lane that it wants a value of, or -1: the votes
  uint64_t result = 0;     // what it takes away

  bool waits_with(const Thread& other) const {
    return state == State::kWaits && meeting == other.meeting && mask == other.mask &&
           place.line() == other.place.line() && place.column() == other.place.column() &&
           (place.file_name() == other.place.file_name() ||
            std::string_view(place.file_name()) == other.place.file_name());
  }
};

bool is_barrier(Meeting meeting);

// As "__shfl_down_sync(mask 0xffffffff) at block_sum.cuh:22".
std::string name_call(Meeting meeting, unsigned mask, Place place);

// What each thread of a block that can't go on waits for.
std::string describe_hang(const std::vector<Thread>& threads);

}  // namespace emulator
