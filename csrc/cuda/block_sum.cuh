// Sums over a block and over the blocks of a launch, in an order that never changes. The second are
// made by whichever block is done last, so that no further launch is needed: all others have then
// written theirs. Which block that is changes from run to run, what it adds up and in which order
// does not.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace gradloc::cuda {

inline constexpr int kWarp = 32;
inline constexpr int kWarps = kThreads / kWarp;

// The sum of every thread's value, in thread 0; the others get a part of it. A fixed tree.
inline __device__ double block_sum(double value) {
  __shared__ double warp_sums[kWarps];
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xFFFFFFFFu, value, distance);
  }
  __syncthreads();  // a caller may come again at once, while thread 0 still reads
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0) {
    for (double warp_sum : warp_sums) sum += warp_sum;
  }
  return sum;
}

// Whether this block is the last of `expected` to come here; what the others wrote before they came
// can be read then. The counter is 0 again afterwards. (Pattern of "threadFenceReduction" in
// NVIDIA's CUDA samples: a write, a fence, an atomic increment.)
inline __device__ bool came_last(unsigned* counter, int32_t expected) {
  __shared__ bool is_last;
  __syncthreads();  // all threads have written, and nobody reads `is_last` of an earlier call
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(counter, 1u) + 1u == static_cast<unsigned>(expected);
    if (is_last) *counter = 0u;
    __threadfence();
  }
  __syncthreads();
  return is_last;
}

// Hands in the sum of this block's chunk (thread 0's value counts). True for the block that comes
// last of all: every segment sum is there then.
inline __device__ bool hand_in(const Tables& tables, const Scratch& scratch, double chunk_sum) {
  if (tables.num_chunks == 0) return true;  // one block that has nothing to do
  const int32_t segment = tables.chunks[blockIdx.x].segment;
  const SegmentEntry range = tables.segments[segment];
  if (threadIdx.x == 0) scratch.chunk_sums[blockIdx.x] = chunk_sum;
  if (!came_last(scratch.segment_counters + segment, range.num_chunks)) return false;
  // Volatile: other blocks wrote them during this launch, so no cached copy will do.
  const volatile double* sums = scratch.chunk_sums + range.first_chunk;
  double sum = 0.0;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < range.num_chunks; i += kThreads) {
    sum += sums[i];
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) scratch.segment_sums[segment] = sum;
  return came_last(scratch.counter, tables.num_segments);
}

// For the block that came last: segments into layers. Returns the sum over all layers in thread 0.
inline __device__ double write_layers(const Tables& tables, const Scratch& scratch,
                                      double* norm_sq) {
  const volatile double* sums = scratch.segment_sums;
  double total = 0.0;
  for (int32_t layer = static_cast<int32_t>(threadIdx.x); layer < tables.num_layers;
       layer += kThreads) {
    double sum = 0.0;
    for (int32_t i = tables.layer_segments[layer]; i < tables.layer_segments[layer + 1]; ++i) {
      sum += sums[i];
    }
    norm_sq[layer] = sum;
    total += sum;
  }
  return block_sum(total);
}

}  // namespace gradloc::cuda
