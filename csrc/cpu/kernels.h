// The chunk kernels of the CPU backend as a table of functions, one table an instruction set. All
// tables give the same bits: same lanes, same order, no fused multiply-add (see kernels_impl.h).
#pragma once

#include <cstdint>

#include "../adamw.h"
#include "../chunks.h"
#include "../random.h"

namespace gradloc::cpu {

// One chunk of an AdamW step. Pointers are to the chunk's first element.
struct AdamWChunk {
  void* param;           // [size], param_dtype; read and written
  const void* grad;      // [size], grad_dtype
  void* exp_avg;         // [size], moment_dtype; read and written
  void* exp_avg_sq;      // [size], moment_dtype; read and written
  void* max_exp_avg_sq;  // [size], moment_dtype, or null without amsgrad; read and written
  const void* anchor;    // [size], anchor_dtype, or null without RecAdam
  int32_t size;          // elements
  DType param_dtype, grad_dtype;
  DType moment_dtype, anchor_dtype;  // kFloat32 or kBFloat16
  AdamWScalars scalars;
  bool stochastic;         // how to round what is stored in bfloat16; else to nearest even
  RoundingKey key;         // used when stochastic, as is the next
  uint64_t first_element;  // position of the chunk's first element in the full tensor
};

struct KernelTable {
  const char* name;
  // Sum of squares of `size` gradients, accumulated in float64.
  double (*norm_sq)(const void* grad, DType dtype, int32_t size);
  // Updates the chunk; returns the sum of squares of its gradients as they came when `with_norm`,
  // else 0.
  double (*adamw)(const AdamWChunk& chunk, bool with_norm);
};

extern const KernelTable kKernelsPlain;
#ifdef GRADLOC_X86
extern const KernelTable kKernelsAvx2;
extern const KernelTable kKernelsAvx512;
#endif

}  // namespace gradloc::cpu
