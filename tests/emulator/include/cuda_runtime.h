// CUDA's device language for a plain C++ compiler: kernels include this in place of CUDA's own
// header and run on fibers, one a CUDA thread (see ../block.cpp). Holds what gradloc's kernels use.
// Left out on purpose: floating-point atomics (results must not depend on an order) and dynamic
// shared memory.
#pragma once

#include <math.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "emulated_threads.h"

#define __host__
#define __device__
#define __constant__
// Visible, so that a launch can be named.
#define __global__ __attribute__((visibility("default")))
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

// Blocks run one after the other, so that a static variable is what the threads of a block share. A
// section a declaration, because a compiler refuses to mix variables of inline functions with
// others in one; ../shared_memory.ld puts them side by side, to be filled with NaN before each
// block.
#define EMULATOR_TEXT(x) #x
#define EMULATOR_SECTION(n) "emulated_shared_" EMULATOR_TEXT(n)
#define __shared__ __attribute__((section(EMULATOR_SECTION(__COUNTER__)))) static

// Aligned as on the device: a misaligned access is one for UndefinedBehaviorSanitizer too.
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};

inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// Memory is one and threads run one at a time: a fence has nothing to do. What it lets the compiler
// assume is kept.
inline void __threadfence() { asm volatile("" ::: "memory"); }
inline void __threadfence_block() { asm volatile("" ::: "memory"); }

template <class T>
inline T emulator_atomic(T* address, T desired) {
  const T old = *address;
  *address = desired;
  return old;
}
inline int atomicAdd(int* p, int x) { return emulator_atomic(p, *p + x); }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return emulator_atomic(p, *p + x); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long x) {
  return emulator_atomic(p, *p + x);
}
inline unsigned atomicInc(unsigned* p, unsigned last) {
  return emulator_atomic(p, *p >= last ? 0u : *p + 1u);
}
inline unsigned atomicExch(unsigned* p, unsigned x) { return emulator_atomic(p, x); }
inline unsigned atomicCAS(unsigned* p, unsigned expected, unsigned x) {
  return emulator_atomic(p, *p == expected ? x : *p);
}

namespace emulator {

// A launch as the template below hands it over.
struct Call {
  const void* kernel;                  // its address, by which it is named
  void (*run)(const void* arguments);  // calls the kernel with copies of the arguments
  const void* arguments;               //
  size_t param_bytes;                  // what the kernel's parameters take on a device
  // The only parameter, where it goes to the kernel in memory; null otherwise. See Fiber.
  const void* image;
  size_t image_bytes;
};

cudaError_t launch(const cudaLaunchConfig_t* config, const Call& call);

template <class... Params>
constexpr size_t param_bytes() {
  size_t bytes = 0;
  ((bytes = (bytes + alignof(Params) - 1) / alignof(Params) * alignof(Params) + sizeof(Params)),
   ...);
  return bytes;
}

}  // namespace emulator

template <class... Params, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<Params> && ...), "a kernel's parameters are copied");
  struct State {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  };
  const State state{kernel, std::tuple<Params...>(std::forward<Arguments>(arguments)...)};
  emulator::Call call{};
  call.kernel = reinterpret_cast<const void*>(kernel);
  call.run = [](const void* opaque) {
    const State& own = *static_cast<const State*>(opaque);
    std::apply(own.kernel, own.arguments);
  };
  call.arguments = &state;
  call.param_bytes = emulator::param_bytes<Params...>();
  if constexpr (sizeof...(Params) == 1 && (sizeof(Params) + ... + 0) > 16) {
    call.image = &std::get<0>(state.arguments);
    call.image_bytes = call.param_bytes;
  }
  return emulator::launch(config, call);
}
