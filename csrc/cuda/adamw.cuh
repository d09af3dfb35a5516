// One AdamW step over all tensors in one launch, a block a chunk. The arithmetic of an element is
// adamw_element's (csrc/adamw.h); here are its operands' ways in and out, and the end of a step.
#pragma once

#include <limits>

#include "block_sum.cuh"
#include "params.h"
#include "squares.cuh"
#include "vectors.cuh"

namespace gradloc::cuda {

// What is the same for all elements of a chunk; made by one thread for its block.
struct ChunkScalars {
  AdamWScalars adamw;
  // For stochastic rounding. A chunk is far shorter than 2^32, so that the high word of an
  // element's position changes once at most.
  RoundingKey key;
  uint32_t high,
      terms[2];  // the high word where the chunk begins, and the terms of it and the next
};

template <int kCapacity>
inline __device__ const GroupEntry& group_of(const AdamWParams<kCapacity>& p, int32_t group) {
  return p.group_table != nullptr ? p.group_table[group] : p.groups[group];
}

template <bool kStochastic, bool kAnchored, int kCapacity>
inline __device__ ChunkScalars chunk_scalars(const AdamWParams<kCapacity>& p,
                                             const TensorEntry& tensor, int64_t offset) {
  ChunkScalars scalars;
  const GroupEntry& entry = group_of(p, tensor.group);
  const double lr = entry.lr_on_device != nullptr ? *entry.lr_on_device : entry.group.lr;
  const float step = *tensor.step + 1.0f;
  const double coef = p.control != nullptr ? p.control->grad_coef : p.grad_coef;
  const double scale = p.tables.scales[tensor.layer];
  const RecAdam* recadam = nullptr;
  if constexpr (kAnchored) recadam = &p.recadam;
  scalars.adamw = adamw_scalars(entry.group, lr, step, scale, coef, recadam);
  if constexpr (kStochastic) {
    const auto position = static_cast<uint64_t>(tensor.first_element + offset);
    scalars.key = rounding_key(p.rounding_seed, static_cast<uint64_t>(step),
                               static_cast<uint64_t>(tensor.id));
    scalars.high = static_cast<uint32_t>(position >> 32);
    scalars.terms[0] = high_term(scalars.key, scalars.high);
    scalars.terms[1] = high_term(scalars.key, scalars.high + 1);
  }
  return scalars;
}

// The first random word of each of a thread's elements. position: of the chunk's first element.
inline __device__ void first_words(const ChunkScalars& scalars, uint64_t position, Spot at,
                                   uint32_t (&words)[kGroup]) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    const uint64_t element = position + static_cast<uint64_t>(at.index(i));
    const bool next = static_cast<uint32_t>(element >> 32) != scalars.high;
    words[i] = first_word(static_cast<uint32_t>(element), scalars.key, scalars.terms[next]);
  }
}

// A chunk's arrays, and how threads share out its elements.
struct ChunkStreams {
  Stream param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor;
  int32_t size;
  bool amsgrad;
  // Whether all arrays are float32: then a warp's 16-byte accesses lie side by side. Narrower
  // arrays bring eight elements in 16 bytes, so that a thread's elements are neighbours.
  bool wide;

  __device__ Spot spot(int32_t base) const {
    const auto thread = static_cast<int32_t>(threadIdx.x);
    if (wide) return {base + 4 * thread, base + 4 * thread + 4 * kThreads};
    return {base + kGroup * thread, base + kGroup * thread + 4};
  }
};

struct Operands {
  Raw param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, anchor;
};

template <bool kAmsgrad, bool kAnchored>
inline __device__ void load_operands(const ChunkStreams& streams, Spot at, bool whole,
                                     Operands& raw) {
  load(streams.grad, at, streams.size, whole, raw.grad);
  load(streams.param, at, streams.size, whole, raw.param);
  load(streams.exp_avg, at, streams.size, whole, raw.exp_avg);
  load(streams.exp_avg_sq, at, streams.size, whole, raw.exp_avg_sq);
  if constexpr (kAmsgrad) {
    raw.max_exp_avg_sq = {};  // a maximum of 0 is as good as none: second moments are not below it
    if (streams.amsgrad) {
      load(streams.max_exp_avg_sq, at, streams.size, whole, raw.max_exp_avg_sq);
    }
  }
  if constexpr (kAnchored) load(streams.anchor, at, streams.size, whole, raw.anchor);
}

template <class Rounding>
inline __device__ void store_rounded(const Stream& stream, Spot at, int32_t size, bool whole,
                                     Raw& raw, const Rounding& rounding) {
  narrow(raw, stream.dtype, rounding);
  store(stream, at, size, whole, raw);
}

template <bool kAmsgrad, bool kStochastic>
inline __device__ void store_operands(const ChunkStreams& streams, const ChunkScalars& scalars,
                                      uint64_t position, Spot at, bool whole, Operands& raw) {
  const auto put = [&](const Stream& stream, Raw& values, const auto& rounding) {
    store_rounded(stream, at, streams.size, whole, values, rounding);
  };
  if constexpr (kStochastic) {
    uint32_t words[kGroup];
    first_words(scalars, position, at, words);
    put(streams.param, raw.param, Random{words, 0});
    put(streams.exp_avg, raw.exp_avg, Random{words, 16});
#pragma unroll
    for (int i = 0; i < kGroup; ++i) words[i] = second_word(words[i]);
    put(streams.exp_avg_sq, raw.exp_avg_sq, Random{words, 0});
    if constexpr (kAmsgrad) {
      if (streams.amsgrad) put(streams.max_exp_avg_sq, raw.max_exp_avg_sq, Random{words, 16});
    }
  } else {
    put(streams.param, raw.param, Nearest{});
    put(streams.exp_avg, raw.exp_avg, Nearest{});
    put(streams.exp_avg_sq, raw.exp_avg_sq, Nearest{});
    if constexpr (kAmsgrad) {
      if (streams.amsgrad) put(streams.max_exp_avg_sq, raw.max_exp_avg_sq, Nearest{});
    }
  }
}

// Eight elements, in place.
template <bool kAmsgrad, bool kAnchored>
inline __device__ void update(Operands& raw, const AdamWScalars& scalars) {
#pragma unroll
  for (int i = 0; i < kGroup; ++i) {
    float param = __uint_as_float(raw.param.words[i]);
    const float grad = __uint_as_float(raw.grad.words[i]);
    float exp_avg = __uint_as_float(raw.exp_avg.words[i]);
    float exp_avg_sq = __uint_as_float(raw.exp_avg_sq.words[i]);
    float max_sq = 0.0f;
    if constexpr (kAmsgrad) max_sq = __uint_as_float(raw.max_exp_avg_sq.words[i]);
    float anchor = 0.0f;
    if constexpr (kAnchored) anchor = __uint_as_float(raw.anchor.words[i]);
    adamw_element<kAmsgrad, kAnchored>(param, grad, exp_avg, exp_avg_sq, max_sq, anchor, scalars);
    raw.param.words[i] = __float_as_uint(param);
    raw.exp_avg.words[i] = __float_as_uint(exp_avg);
    raw.exp_avg_sq.words[i] = __float_as_uint(exp_avg_sq);
    if constexpr (kAmsgrad) raw.max_exp_avg_sq.words[i] = __float_as_uint(max_sq);
  }
}

// Streams that were kept in shared memory, where the compiler forgot what their addresses are.
inline __device__ ChunkStreams of_global_memory(const ChunkStreams& kept) {
  ChunkStreams streams = kept;
  assume_global(streams.param.base);
  assume_global(streams.exp_avg.base);
  assume_global(streams.exp_avg_sq.base);
  assume_global(streams.max_exp_avg_sq.base);
  return streams;
}

template <bool kAnchored>
inline __device__ ChunkStreams chunk_streams(const TensorEntry& tensor, const void* grad,
                                             DType grad_dtype, const ChunkEntry& chunk) {
  ChunkStreams streams;
  const DType moments = tensor.moment_dtype;
  streams.param = stream_of(tensor.param, tensor.param_dtype, chunk.offset);
  streams.grad = stream_of(grad, grad_dtype, chunk.offset);
  streams.exp_avg = stream_of(tensor.exp_avg, moments, chunk.offset);
  streams.exp_avg_sq = stream_of(tensor.exp_avg_sq, moments, chunk.offset);
  streams.amsgrad = tensor.max_exp_avg_sq != nullptr;
  streams.max_exp_avg_sq =
      stream_of(streams.amsgrad ? tensor.max_exp_avg_sq : tensor.exp_avg_sq, moments, chunk.offset);
  streams.size = chunk.size;
  streams.wide = tensor.param_dtype == DType::kFloat32 && grad_dtype == DType::kFloat32 &&
                 moments == DType::kFloat32;
  if constexpr (kAnchored) {
    streams.anchor = stream_of(tensor.anchor, tensor.anchor_dtype, chunk.offset);
    streams.wide = streams.wide && tensor.anchor_dtype == DType::kFloat32;
  }
  return streams;
}

// Updates the block's chunk; returns this thread's part of the sum of squares of the gradients as
// they came, 0 unless `with_norms`.
template <bool kAmsgrad, bool kStochastic, bool kAnchored, int kCapacity>
inline __device__ double update_chunk(const AdamWParams<kCapacity>& p, const ChunkEntry& chunk,
                                      const void* grad, bool with_norms) {
  __shared__ ChunkScalars scalars;
  // The same streams to store to: six addresses, kept in registers over the arithmetic, would
  // spill.
  [[maybe_unused]] __shared__ ChunkStreams targets;
  const TensorEntry& tensor = p.tables.tensors[chunk.tensor];
  const ChunkStreams streams =
      chunk_streams<kAnchored>(tensor, grad, p.tables.grad_dtypes[chunk.tensor], chunk);
  const auto position = static_cast<uint64_t>(tensor.first_element + chunk.offset);
  double sum = 0.0;
  for (int32_t base = 0; base < chunk.size; base += kGroup * kThreads) {
    const Spot at = streams.spot(base);
    const bool whole = at.second + 4 <= chunk.size;
    Operands raw;
    load_operands<kAmsgrad, kAnchored>(streams, at, whole, raw);
    if (base == 0) {  // after the first loads were sent off, so that they overlap
      if (threadIdx.x == 0) {
        scalars = chunk_scalars<kStochastic, kAnchored>(p, tensor, chunk.offset);
        if constexpr (kAnchored) targets = streams;
      }
      __syncthreads();
    }
    widen(raw.grad, streams.grad.dtype);
    widen(raw.param, streams.param.dtype);
    widen(raw.exp_avg, streams.exp_avg.dtype);
    widen(raw.exp_avg_sq, streams.exp_avg_sq.dtype);
    if constexpr (kAmsgrad) widen(raw.max_exp_avg_sq, streams.max_exp_avg_sq.dtype);
    if constexpr (kAnchored) widen(raw.anchor, streams.anchor.dtype);
    if (with_norms) sum += sum_of_squares<kGroup>(raw.grad.words);
    update<kAmsgrad, kAnchored>(raw, scalars.adamw);
    if constexpr (kAnchored) {
      store_operands<kAmsgrad, kStochastic>(of_global_memory(targets), scalars, position, at, whole,
                                            raw);
    } else {
      store_operands<kAmsgrad, kStochastic>(streams, scalars, position, at, whole, raw);
    }
  }
  return sum;
}

// Counts the step of every tensor that has a gradient.
template <int kCapacity>
inline __device__ void count_steps(const AdamWParams<kCapacity>& p) {
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < p.tables.num_tensors; i += kThreads) {
    if (p.grads.at(i) != nullptr) *p.tables.tensors[i].step += 1.0f;
  }
}

inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// A step that does not happen leaves its norms unmeasured.
template <int kCapacity>
inline __device__ void skip_step(const AdamWParams<kCapacity>& p) {
  if (p.norm_sq == nullptr || blockIdx.x != 0) return;
  for (int32_t layer = static_cast<int32_t>(threadIdx.x); layer < p.tables.num_layers;
       layer += kThreads) {
    p.norm_sq[layer] = kNaN;
  }
}

// kAmsgrad: whether tensors may have a max_exp_avg_sq. kCapacity: gradient addresses in the
// parameters.
template <bool kAmsgrad, bool kStochastic, bool kAnchored, int kCapacity>
__global__ void __launch_bounds__(kThreads, kAmsgrad ? 2 : 3)
    adamw_kernel(const __grid_constant__ AdamWParams<kCapacity> p) {
  static_assert(kAmsgrad || !kAnchored);
  if (p.control != nullptr && p.control->skip != 0.0f) return skip_step(p);
  const bool with_norms = p.norm_sq != nullptr;
  double sum = 0.0;
  if (p.tables.num_chunks > 0) {
    const ChunkEntry chunk = p.tables.chunks[blockIdx.x];
    const void* grad = p.grads.at(chunk.tensor);
    if (grad != nullptr) {
      sum = update_chunk<kAmsgrad, kStochastic, kAnchored>(p, chunk, grad, with_norms);
      if (with_norms) sum = block_sum(sum);
    }
  }
  // Only when all blocks have read the step counts may they change.
  if (!hand_in(p.tables, p.scratch, sum)) return;
  if (with_norms) write_layers(p.tables, p.scratch, p.norm_sq);
  count_steps(p);
}

}  // namespace gradloc::cuda
