// Sums of squared gradients by layer, and what follows from them for the step: one launch for all
// tensors, a block a chunk.
#pragma once

#include "block_sum.cuh"
#include "params.h"
#include "squares.cuh"
#include "vectors.cuh"

namespace gradloc::cuda {

// 16-byte loads that a thread has under way at a time.
inline constexpr int kNormLoads = 4;

// The squares of one 16-byte vector.
inline __device__ double vector_squares(uint4 vector, DType dtype) {
  Raw raw = {{vector.x, vector.y, vector.z, vector.w, 0u, 0u, 0u, 0u}};
  if (dtype == DType::kFloat32) return sum_of_squares<4>(raw.words);
  widen(raw, dtype);
  return sum_of_squares<8>(raw.words);
}

inline __device__ double element_squares(const char* first, int32_t at, DType dtype) {
  double value;
  if (dtype == DType::kFloat32) {
    value = reinterpret_cast<const float*>(first)[at];
  } else {
    const uint32_t bits = reinterpret_cast<const uint16_t*>(first)[at];
    value = dtype == DType::kBFloat16 ? __uint_as_float(bits << 16) : float16_to_float(bits);
  }
  return value * value;
}

// This thread's part of a chunk: up to the first multiple of 16 bytes element by element, then
// vectors, then the rest.
inline __device__ double chunk_squares(const char* first, int32_t size, DType dtype) {
  const int32_t width = static_cast<int32_t>(dtype_bytes(dtype));
  const int32_t per_vector = 16 / width;
  const int32_t thread = static_cast<int32_t>(threadIdx.x);
  const auto beyond = static_cast<int32_t>(reinterpret_cast<uintptr_t>(first) & 15u);
  const int32_t to_boundary = beyond == 0 ? 0 : (16 - beyond) / width;
  const int32_t head = to_boundary < size ? to_boundary : size;
  const int32_t num_vectors = (size - head) / per_vector;
  const int32_t tail = head + num_vectors * per_vector;
  const uint4* vectors = reinterpret_cast<const uint4*>(first + head * width);

  double sum = 0.0;
  int32_t at = thread;
  for (; at + (kNormLoads - 1) * kThreads < num_vectors; at += kNormLoads * kThreads) {
    uint4 loaded[kNormLoads];
#pragma unroll
    for (int i = 0; i < kNormLoads; ++i) loaded[i] = vectors[at + i * kThreads];
#pragma unroll
    for (int i = 0; i < kNormLoads; ++i) sum += vector_squares(loaded[i], dtype);
  }
  for (; at < num_vectors; at += kThreads) sum += vector_squares(vectors[at], dtype);
  if (thread < head) sum += element_squares(first, thread, dtype);
  if (tail + thread < size) sum += element_squares(first, tail + thread, dtype);
  return sum;
}

// coef = min(1, max_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ has it.
// total: the sum of squares over all layers, of gradients as they came.
inline __device__ void decide(const Decision& decision, double total) {
  const double unscale = decision.grad_scale != nullptr ? 1.0 / *decision.grad_scale : 1.0;
  const double norm = sqrt(total) * unscale;
  const double ratio = decision.max_norm / (norm + 1e-6);
  const double clip = ratio > 1.0 ? 1.0 : ratio;  // NaN stays NaN
  const bool overflow = decision.found_inf != nullptr && *decision.found_inf != 0.0f;
  const bool skip = overflow || (decision.skip_nonfinite && !isfinite(norm));
  Control& control = *decision.control;
  control.grad_coef = static_cast<float>(decision.max_norm < 0.0 ? unscale : clip * unscale);
  control.skip = skip ? 1.0f : 0.0f;
  if (skip) control.num_skipped += 1.0f;
}

template <int kCapacity>
__global__ void __launch_bounds__(kThreads, 5)
    norms_kernel(const __grid_constant__ NormParams<kCapacity> p) {
  double sum = 0.0;
  if (p.tables.num_chunks > 0) {
    const ChunkEntry chunk = p.tables.chunks[blockIdx.x];
    const void* grad = p.grads.at(chunk.tensor);
    if (grad != nullptr) {
      const Stream stream = stream_of(grad, p.tables.grad_dtypes[chunk.tensor], chunk.offset);
      sum = block_sum(chunk_squares(stream.base, chunk.size, stream.dtype));
    }
  }
  if (!hand_in(p.tables, p.scratch, sum)) return;
  const double total = write_layers(p.tables, p.scratch, p.norm_sq);
  if (threadIdx.x == 0 && p.decision.control != nullptr) decide(p.decision, total);
}

}  // namespace gradloc::cuda
