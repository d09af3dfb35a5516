// Small kernels for the emulator's own tests: right ones, and ones with a planted defect. Each has
// a C function that launches it and returns CUDA's error, for ctypes; gradloc's kernels are not
// here.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <string>

#include "controls.h"

namespace samples {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xFFFFFFFFu;

// A tree in shared memory. Without its barriers, threads read what others have not yet written.
template <bool kBarriers>
__global__ void tree_sum_kernel(const float* values, float* sums) {
  __shared__ float parts[kThreads];
  parts[threadIdx.x] = values[blockIdx.x * kThreads + threadIdx.x];
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (kBarriers) __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = parts[0];
}

// kind: 0 shfl, 1 up, 2 down, 3 xor.
template <class T>
__global__ void shuffle_kernel(int kind, int amount, int width, const T* values, T* results) {
  const T value = values[threadIdx.x];
  T result = value;
  if (kind == 0) result = __shfl_sync(kAll, value, amount, width);
  if (kind == 1) result = __shfl_up_sync(kAll, value, static_cast<unsigned>(amount), width);
  if (kind == 2) result = __shfl_down_sync(kAll, value, static_cast<unsigned>(amount), width);
  if (kind == 3) result = __shfl_xor_sync(kAll, value, amount, width);
  results[threadIdx.x] = result;
}

// The even lanes and the odd lanes of a warp each meet among themselves, as often as they like.
__global__ void halves_kernel(const int* values, int* results) {
  const unsigned odd = threadIdx.x & 1u;
  const unsigned mask = odd != 0 ? 0xAAAAAAAAu : 0x55555555u;
  int sum = values[threadIdx.x];
  for (unsigned round = 0; round < 1 + odd; ++round) {
    for (int distance = 2; distance < 32; distance *= 2) {
      sum += __shfl_xor_sync(mask, sum, distance);
    }
  }
  __syncwarp();
  results[threadIdx.x] = sum;
}

__global__ void vote_kernel(const int* values, unsigned* results) {
  const int value = values[threadIdx.x];
  unsigned* own = results + 6 * threadIdx.x;
  own[0] = __ballot_sync(kAll, value);
  own[1] = static_cast<unsigned>(__any_sync(kAll, value));
  own[2] = static_cast<unsigned>(__all_sync(kAll, value));
  own[3] = static_cast<unsigned>(__syncthreads_or(value));
  own[4] = static_cast<unsigned>(__syncthreads_and(value));
  own[5] = static_cast<unsigned>(__syncthreads_count(value));
}

// order[i]: the thread of the grid that came as number i.
__global__ void ticket_kernel(unsigned* counter, unsigned* order) {
  order[atomicAdd(counter, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void atomics_kernel(unsigned* words) {
  atomicAdd(reinterpret_cast<int*>(words), -2);
  atomicInc(words + 1, 4);
  if (atomicCAS(words + 2, 0u, threadIdx.x + 1) == 0) atomicExch(words + 3, threadIdx.x + 1);
}

struct LastBlock {
  const double* values;  // [blocks, kThreads]
  double* parts;         // [blocks]
  unsigned* counter;     // [1], 0 before and after
  double* sum;           // [1]
  unsigned* last;        // [1] the block that added the parts up
};

// One sum over all blocks: each hands in its part, whichever comes last adds them up.
__global__ void last_block_kernel(const __grid_constant__ LastBlock p) {
  __shared__ double warps[kThreads / 32];
  __shared__ bool is_last;
  double value = p.values[blockIdx.x * kThreads + threadIdx.x];
  for (unsigned distance = 16; distance > 0; distance /= 2) {
    value += __shfl_down_sync(kAll, value, distance);
  }
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0.0;
    for (double warp : warps) sum += warp;
    p.parts[blockIdx.x] = sum;
    __threadfence();
    is_last = atomicAdd(p.counter, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last || threadIdx.x != 0) return;
  double sum = 0.0;
  for (unsigned block = 0; block < gridDim.x; ++block) sum += p.parts[block];
  *p.sum = sum;
  *p.last = blockIdx.x;
  *p.counter = 0;
}

// Counts how often each thread of a grid of any shape runs.
__global__ void visit_kernel(unsigned* visits) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  visits[block * blockDim.x * blockDim.y * blockDim.z + thread] += 1;
}

// What a block finds in shared memory, which no block may rely on.
__global__ void leftover_kernel(float* found) {
  __shared__ float kept;
  if (threadIdx.x == 0) {
    found[blockIdx.x] = kept;
    kept = 1.0f;
  }
}

template <int kWords>
struct Large {
  unsigned* out;
  unsigned words[kWords];
};

template <int kWords>
__global__ void large_kernel(const __grid_constant__ Large<kWords> p) {
  for (unsigned i = threadIdx.x; i < kWords; i += blockDim.x) atomicAdd(p.out, p.words[i]);
}

__global__ void overwriting_kernel(Large<8> p) {
  p.words[threadIdx.x % 8] += 1;
  atomicAdd(p.out, p.words[7 - threadIdx.x % 8]);
}

// Defects of meeting; 0 has none.
__global__ void meeting_kernel(int defect) {
  const unsigned thread = threadIdx.x;
  if (defect == 1 && thread < 3) return;  // ended before the barrier
  __syncthreads();
  if (defect == 2) {  // two barriers
    if (thread < 40) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  }
  if (defect == 3 && thread % 32 < 30) __shfl_sync(kAll, 1, 0);  // lanes that never come
  if (defect == 4) {  // some at a barrier, some at a shuffle
    if (thread == 5) {
      __syncthreads();
    } else {
      __shfl_down_sync(kAll, 1.0f, 1);
    }
  }
  if (defect == 5) __shfl_sync(0x1u, 1, 0);  // a lane that the mask does not name
  if (defect == 6) __shfl_sync(kAll, 1, 0, 12);
  if (defect == 7) __syncwarp(thread < 16 ? 0xFFFFu : kAll);  // masks that contradict each other
  __syncthreads();
}

__global__ void read_kernel(const float* values, int index, float* out) { *out = values[index]; }

__global__ void shared_read_kernel(int index, float* out) {
  __shared__ float values[kThreads];
  values[threadIdx.x] = 1.0f;
  __syncthreads();
  const float* pointer = values;
  if (threadIdx.x == 0) *out = pointer[index];
}

__global__ void vector_read_kernel(const char* bytes, int offset, unsigned* out) {
  *out = reinterpret_cast<const uint4*>(bytes + offset)->y;
}

template <class... Params, class... Arguments>
int start(dim3 grid, dim3 block, void (*kernel)(Params...), Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <int kWords>
int start_large(unsigned* out) {
  Large<kWords> params{};
  params.out = out;
  for (int i = 0; i < kWords; ++i) params.words[i] = static_cast<unsigned>(i);
  return start(3, kThreads, large_kernel<kWords>, params);
}

}  // namespace samples

#pragma GCC visibility push(default)
extern "C" {

using namespace samples;

int tree_sum(bool barriers, unsigned blocks, const float* values, float* sums) {
  return start(blocks, kThreads, barriers ? tree_sum_kernel<true> : tree_sum_kernel<false>, values,
               sums);
}
int shuffle_int(int kind, int amount, int width, const int* values, int* results) {
  return start(1, kThreads, shuffle_kernel<int>, kind, amount, width, values, results);
}
int shuffle_double(int kind, int amount, int width, const double* values, double* results) {
  return start(1, kThreads, shuffle_kernel<double>, kind, amount, width, values, results);
}
int halves(const int* values, int* results) {
  return start(1, kThreads, halves_kernel, values, results);
}
int votes(const int* values, unsigned* results) {
  return start(1, kThreads, vote_kernel, values, results);
}
int tickets(unsigned blocks, unsigned threads, unsigned* counter, unsigned* order) {
  return start(blocks, threads, ticket_kernel, counter, order);
}
int atomics(unsigned* words) { return start(2, kThreads, atomics_kernel, words); }
int last_block(unsigned blocks, const double* values, double* parts, unsigned* counter, double* sum,
               unsigned* last) {
  const LastBlock params{values, parts, counter, sum, last};
  return start(blocks, kThreads, last_block_kernel, params);
}
int visit(const unsigned* grid, const unsigned* block, unsigned* visits) {
  return start(dim3(grid[0], grid[1], grid[2]), dim3(block[0], block[1], block[2]), visit_kernel,
               visits);
}
int leftover(unsigned blocks, float* found) { return start(blocks, 32, leftover_kernel, found); }
int large_fits(unsigned* out) { return start_large<8188>(out); }
int large_does_not_fit(unsigned* out) { return start_large<8190>(out); }
int overwriting(unsigned* out) { return start(1, 32, overwriting_kernel, Large<8>{out, {}}); }
int meeting(int defect, unsigned threads) { return start(2, threads, meeting_kernel, defect); }
int read(const float* values, int index, float* out) {
  return start(1, 32, read_kernel, values, index, out);
}
int shared_read(int index, float* out) {
  return start(1, kThreads, shared_read_kernel, index, out);
}
int vector_read(const char* bytes, int offset, unsigned* out) {
  return start(1, 32, vector_read_kernel, bytes, offset, out);
}

// On the host: these have no kernel.
void to_half(int count, const float* values, uint16_t* bits) {
  for (int i = 0; i < count; ++i) bits[i] = __half_as_ushort(__float2half_rn(values[i]));
}
void from_half(int count, const uint16_t* bits, float* values) {
  for (int i = 0; i < count; ++i) values[i] = __half2float(__ushort_as_half(bits[i]));
}

void set_seed(uint64_t seed) { emulator::set_seed(seed); }
const char* error_text() {
  thread_local std::string text;
  text = emulator::last_error_text();
  return text.c_str();
}
const char* error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
}
#pragma GCC visibility pop
