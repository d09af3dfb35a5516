// The sum of squares of a few gradients, for the norms. Float32 where that loses nothing that
// matters: graphics cards have few float64 units, and one addition for every element would be
// slower than the memory.
#pragma once

#include <cuda_runtime.h>

#include "vectors.cuh"

namespace gradloc::cuda {

// words: n float32 as their bits. Squares of half-width values are exact in float32, those of
// float32 values rounded once: a relative error of at most n·2^-24. Sums outside float32's safe
// range (infinite, or so small that bits are lost) are made again in float64.
template <int n>
inline __device__ double sum_of_squares(const uint32_t* words) {
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float value = __uint_as_float(words[i]);
    sum += value * value;
  }
  if (sum > 1e-26f && sum < 1e38f) return sum;
  uint32_t bits = 0u;
#pragma unroll
  for (int i = 0; i < n; ++i) bits |= words[i];
  if (bits << 1 == 0u) return 0.0;  // all zeros, as the gradients of unused embeddings
  double wide = 0.0;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const double value = __uint_as_float(words[i]);
    wide += value * value;
  }
  return wide;
}

}  // namespace gradloc::cuda
