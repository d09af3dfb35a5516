// Runs one block of a kernel: its threads as fibers, in an order drawn from a seed, and the
// meetings at which they wait for each other. Knows neither devices nor streams; launch.cpp calls
// it.
#pragma once

#include <cstdint>
#include <string>

#include "cuda_runtime.h"

namespace emulator {

// SplitMix64 (Steele, Lea & Flood 2014): small, and good enough to draw orders.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t x = state_ += 0x9E3779B97F4A7C15u;
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
  }

  // 0 to bound - 1.
  uint64_t below(uint64_t bound) {
    return static_cast<uint64_t>(static_cast<unsigned __int128>(next()) * bound >> 64);
  }

 private:
  uint64_t state_;
};

// For all blocks of a launch: grid and block size as the kernel sees them, stacks, parameters.
void begin_launch(dim3 grid, dim3 block, const Call& call);

// Runs the block to its end. Returns what went wrong, empty if nothing; the block's threads are
// then left where they were. The launch ends with that.
std::string run_block(uint3 index, const Call& call, Random& random);

// What the threads did to parameters that are constant; empty if nothing.
std::string end_launch(const Call& call);

}  // namespace emulator
