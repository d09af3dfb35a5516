// How eight elements of a chunk get from memory into registers and back: 16 bytes at a time where
// addresses allow it, and as float32 in between. Knows nothing of what is computed.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "../chunks.h"
#include "../random.h"

namespace gradloc::cuda {

// Elements that a thread holds at a time.
inline constexpr int kGroup = 8;

// Where a thread's eight elements are: four from `first` and four from `second`.
struct Spot {
  int32_t first, second;  // indices in the chunk

  __device__ int32_t index(int i) const { return i < 4 ? first + i : second + i - 4; }
};

// One array of a chunk. `vectors`: its address is a multiple of 16.
struct Stream {
  char* base;
  DType dtype;
  bool vectors;
};

inline __device__ bool is_vector_address(const void* address) {
  return (reinterpret_cast<uintptr_t>(address) & 15u) == 0;
}

// Addresses that come out of a table might be shared memory for all that the compiler knows, and
// accesses to "any" memory take an instruction that looks first.
inline __device__ void assume_global([[maybe_unused]] const void* address) {
#ifdef __NVCC__
  __builtin_assume(__isGlobal(address));
#endif
}

// `first`: the tensor's first element; `offset`: where the chunk begins.
inline __device__ Stream stream_of(const void* first, DType dtype, int64_t offset) {
  char* base = static_cast<char*>(const_cast<void*>(first)) + offset * dtype_bytes(dtype);
  assume_global(base);
  return {base, dtype, is_vector_address(base)};
}

// Eight elements as their bits: float32 in one word each, narrower ones two in each of the first
// four words, the earlier one below.
struct Raw {
  uint32_t words[kGroup];
};

// Whole groups of an aligned stream: one 16-byte access, or two for float32.
inline __device__ void load_vectors(const Stream& stream, Spot at, Raw& raw) {
  const auto put = [&raw](int word, uint4 vector) {
    raw.words[word] = vector.x;
    raw.words[word + 1] = vector.y;
    raw.words[word + 2] = vector.z;
    raw.words[word + 3] = vector.w;
  };
  if (stream.dtype == DType::kFloat32) {
    const float* base = reinterpret_cast<const float*>(stream.base);
    put(0, *reinterpret_cast<const uint4*>(base + at.first));
    put(4, *reinterpret_cast<const uint4*>(base + at.second));
  } else {
    put(0, *reinterpret_cast<const uint4*>(stream.base + 2 * at.first));
  }
}

// Any address, and the end of a chunk: elements from `size` on are 0.
inline __device__ void load_elements(const Stream& stream, Spot at, int32_t size, Raw& raw) {
  if (stream.dtype == DType::kFloat32) {
    const uint32_t* base = reinterpret_cast<const uint32_t*>(stream.base);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      raw.words[i] = at.index(i) < size ? base[at.index(i)] : 0u;
    }
  } else {
    const uint16_t* base = reinterpret_cast<const uint16_t*>(stream.base);
#pragma unroll
    for (int i = 0; i < kGroup; i += 2) {
      const uint32_t low = at.index(i) < size ? base[at.index(i)] : 0u;
      const uint32_t high = at.index(i + 1) < size ? base[at.index(i + 1)] : 0u;
      raw.words[i / 2] = low | high << 16;
    }
  }
}

// `whole`: all eight elements lie inside the chunk.
inline __device__ void load(const Stream& stream, Spot at, int32_t size, bool whole, Raw& raw) {
  if (whole && stream.vectors) {
    load_vectors(stream, at, raw);
  } else {
    load_elements(stream, at, size, raw);
  }
}

inline __device__ float float16_to_float(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// In place: afterwards each word is a float32.
inline __device__ void widen(Raw& raw, DType dtype) {
  if (dtype == DType::kFloat32) return;
#pragma unroll
  for (int i = kGroup / 2 - 1; i >= 0; --i) {  // from the end, so that nothing is overwritten early
    const uint32_t pair = raw.words[i];
    if (dtype == DType::kBFloat16) {
      raw.words[2 * i] = pair << 16;
      raw.words[2 * i + 1] = pair & 0xFFFF0000u;
    } else {
      raw.words[2 * i] = __float_as_uint(float16_to_float(pair & 0xFFFFu));
      raw.words[2 * i + 1] = __float_as_uint(float16_to_float(pair >> 16));
    }
  }
}

// What is added before a float32 is cut to bfloat16, see random.h.
struct Nearest {
  __device__ uint32_t addend(int, uint32_t float_bits) const {
    return nearest_even_addend(float_bits);
  }
};
struct Random {
  const uint32_t* words;  // [kGroup] one of each element
  int shift;              // 0 or 16: which half of the word

  __device__ uint32_t addend(int i, uint32_t) const { return (words[i] >> shift) & 0xFFFFu; }
};

// In place, the opposite of `widen`.
template <class Rounding>
inline __device__ void narrow(Raw& raw, DType dtype, const Rounding& rounding) {
  if (dtype == DType::kFloat32) return;
#pragma unroll
  for (int i = 0; i < kGroup; i += 2) {
    const uint32_t low = raw.words[i], high = raw.words[i + 1];
    if (dtype == DType::kBFloat16) {
      const uint32_t cut_high = cut_to_bfloat16(high, rounding.addend(i + 1, high));
      raw.words[i / 2] = cut_to_bfloat16(low, rounding.addend(i, low)) | cut_high << 16;
    } else {
      const uint32_t half_high = __half_as_ushort(__float2half_rn(__uint_as_float(high)));
      raw.words[i / 2] = __half_as_ushort(__float2half_rn(__uint_as_float(low))) | half_high << 16;
    }
  }
}

inline __device__ void store_vectors(const Stream& stream, Spot at, const Raw& raw) {
  const auto four = [&raw](int word) {
    return make_uint4(raw.words[word], raw.words[word + 1], raw.words[word + 2],
                      raw.words[word + 3]);
  };
  if (stream.dtype == DType::kFloat32) {
    float* base = reinterpret_cast<float*>(stream.base);
    *reinterpret_cast<uint4*>(base + at.first) = four(0);
    *reinterpret_cast<uint4*>(base + at.second) = four(4);
  } else {
    *reinterpret_cast<uint4*>(stream.base + 2 * at.first) = four(0);
  }
}

inline __device__ void store_elements(const Stream& stream, Spot at, int32_t size, const Raw& raw) {
  if (stream.dtype == DType::kFloat32) {
    uint32_t* base = reinterpret_cast<uint32_t*>(stream.base);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (at.index(i) < size) base[at.index(i)] = raw.words[i];
    }
  } else {
    uint16_t* base = reinterpret_cast<uint16_t*>(stream.base);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      if (at.index(i) < size) {
        base[at.index(i)] = static_cast<uint16_t>(raw.words[i / 2] >> (i % 2 * 16));
      }
    }
  }
}

inline __device__ void store(const Stream& stream, Spot at, int32_t size, bool whole,
                             const Raw& raw) {
  if (whole && stream.vectors) {
    store_vectors(stream, at, raw);
  } else {
    store_elements(stream, at, size, raw);
  }
}

}  // namespace gradloc::cuda
