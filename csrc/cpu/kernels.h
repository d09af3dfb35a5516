// The chunk kernels of the CPU backend as a table of functions, one table an instruction set. All
// tables give the same bits: same lanes, same order, no fused multiply-add (see kernels_impl.h).
#pragma once

#include <cstdint>

#include "../adamw.h"
#include "../chunks.h"

namespace gradloc::cpu {

// One chunk of an AdamW step. Pointers are to the chunk's first element.
struct AdamWChunk {
  void* param;            // [size], param_dtype; read and written
  const void* grad;       // [size], grad_dtype
  float* exp_avg;         // [size]; read and written
  float* exp_avg_sq;      // [size]; read and written
  float* max_exp_avg_sq;  // [size], or null without amsgrad; read and written
  int32_t size;           // elements
  DType param_dtype, grad_dtype;
  AdamWScalars scalars;
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
