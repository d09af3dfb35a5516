// What a kernel is given: plain structs that the host fills and the device reads. Holds addresses
// of device memory only; computes nothing.
#pragma once

#include <cstdint>

#include "../adamw.h"
#include "../chunks.h"

namespace gradloc::cuda {

// Threads of a block, for every kernel. bench/results/predicted.md says what the choice rests on.
inline constexpr int kThreads = 256;

// Gradient addresses and param groups that fit into a kernel's own parameters, which reach the
// device with the launch. A launch with many parameters takes a little longer, hence two sizes;
// more than the larger number of tensors (or more groups) come through a table in device memory.
inline constexpr int kSmallCapacity = 416;
inline constexpr int kLargeCapacity = 4000;
inline constexpr int kMaxInlineGroups = 8;
inline constexpr int kMaxParamBytes = 32764;  // CUDA 12.1 and later, on architectures from 70

// One chunk; block i of a launch works on chunk i. Chunks are sorted by layer.
struct ChunkEntry {
  int64_t offset;  // first element, counted in the tensor
  int32_t size;    // elements, 1 to kChunkElements
  int32_t tensor;  // index into the tensor list
  int32_t segment;
  int32_t unused;
};

// A run of chunks of one layer. Whichever block finishes a segment last adds up its chunks.
struct SegmentEntry {
  int32_t first_chunk;
  int32_t num_chunks;  // 1 to kMaxSegmentChunks
};
inline constexpr int32_t kMaxSegmentChunks = 1024;

// A parameter with its state. Every pointer is to the tensor's first element.
struct TensorEntry {
  void* param;            // [size], param_dtype
  void* exp_avg;          // [size], moment_dtype; likewise the next two
  void* exp_avg_sq;       //
  void* max_exp_avg_sq;   // null without amsgrad
  float* step;            // [1] steps taken so far
  int64_t id;             // for stochastic rounding: what tells it from other tensors,
  int64_t first_element;  // and where a shard begins in the whole
  int32_t group;          // index of the param group
  int32_t layer;
  DType param_dtype, moment_dtype, anchor_dtype;
  const void* anchor;  // [size], anchor_dtype; null without RecAdam
};

// What stays the same between steps. In device memory, uploaded when it changes.
struct Tables {
  const ChunkEntry* chunks;       // [num_chunks]
  const SegmentEntry* segments;   // [num_segments], in the order of layers
  const int32_t* layer_segments;  // [num_layers + 1] first segment of each layer, and the end
  const DType* grad_dtypes;       // [num_tensors]
  const TensorEntry* tensors;     // [num_tensors]; null for norms alone
  const double* scales;           // [num_layers] learning-rate scales; null for norms alone
  int32_t num_chunks, num_segments, num_layers, num_tensors;
};

// Memory that launches leave their intermediate results in; the counters are 0 between launches.
struct Scratch {
  double* chunk_sums;          // [num_chunks]
  double* segment_sums;        // [num_segments]
  unsigned* segment_counters;  // [num_segments] chunks of the segment that are done
  unsigned* counter;           // [1] segments that are done
};

// Three floats in device memory that say what the step does with its gradients.
struct Control {
  float grad_coef;    // what gradients are multiplied by: clipping, and undoing a loss scale
  float skip;         // 1: the step does not happen
  float num_skipped;  // steps that did not happen so far
};

// What turns norms into a Control, in the block that finishes last.
struct Decision {
  Control* control;         // [1], or null: norms only
  double max_norm;          // clip to this; negative: don't
  const float* found_inf;   // [1] or null: not 0 skips the step (GradScaler)
  const float* grad_scale;  // [1] or null: gradients are this times too large
  bool skip_nonfinite;      // whether an infinite or NaN norm skips the step
};

// The addresses of the gradients, null where there is none.
template <int kCapacity>
struct Gradients {
  const void* const* table;        // [num_tensors] in device memory; null: what follows
  const void* inlined[kCapacity];  //

  GRADLOC_HOST_DEVICE const void* at(int32_t tensor) const {
    return table != nullptr ? table[tensor] : inlined[tensor];
  }
};

template <int kCapacity>
struct NormParams {
  Tables tables;
  Scratch scratch;
  double* norm_sq;  // [num_layers] sums of squares
  Decision decision;
  Gradients<kCapacity> grads;
};

// A param group; with `lr_on_device` the learning rate is read when the kernel runs.
struct GroupEntry {
  AdamWGroup group;
  const float* lr_on_device;  // [1] or null
};

template <int kCapacity>
struct AdamWParams {
  Tables tables;
  Scratch scratch;
  double* norm_sq;         // [num_layers] sums of squares of the gradients as they come, or null
  const Control* control;  // or null: grad_coef
  double grad_coef;
  uint64_t rounding_seed;         // of stochastic rounding
  RecAdam recadam;                // of kernels for anchors
  const GroupEntry* group_table;  // [groups] in device memory; null: what follows
  GroupEntry groups[kMaxInlineGroups];
  Gradients<kCapacity> grads;
};

static_assert(sizeof(AdamWParams<kLargeCapacity>) <= kMaxParamBytes);
static_assert(sizeof(NormParams<kLargeCapacity>) <= kMaxParamBytes);
static_assert(sizeof(AdamWParams<kSmallCapacity>) <= 4096);

}  // namespace gradloc::cuda
