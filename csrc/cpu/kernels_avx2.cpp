// The chunk kernels for processors with AVX2, FMA and F16C. Only this file is compiled with those
// flags.
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "../random.h"

namespace gradloc::cpu {
namespace {

// Lanes 0-7 and 8-15.
struct Vec16 {
  __m256 lo, hi;
  Vec16() = default;
  Vec16(__m256 low, __m256 high) : lo(low), hi(high) {}
  explicit Vec16(float value) : lo(_mm256_set1_ps(value)), hi(lo) {}
};

inline Vec16 operator+(Vec16 a, Vec16 b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
inline Vec16 operator-(Vec16 a, Vec16 b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
inline Vec16 operator*(Vec16 a, Vec16 b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Vec16 operator/(Vec16 a, Vec16 b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
inline Vec16 square_root(Vec16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
// NaN in either operand stays NaN, as in torch.maximum; vmaxps alone returns its second operand.
inline __m256 maximum8(__m256 a, __m256 b) {
  return _mm256_blendv_ps(_mm256_max_ps(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
}
inline Vec16 maximum(Vec16 a, Vec16 b) { return {maximum8(a.lo, b.lo), maximum8(a.hi, b.hi)}; }

struct Bits16 {
  __m256i lo, hi;
  Bits16(__m256i low, __m256i high) : lo(low), hi(high) {}
  explicit Bits16(uint32_t value) : lo(_mm256_set1_epi32(static_cast<int>(value))), hi(lo) {}
};

inline Bits16 operator+(Bits16 a, Bits16 b) {
  return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)};
}
inline Bits16 operator*(Bits16 a, Bits16 b) {
  return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)};
}
inline Bits16 operator^(Bits16 a, Bits16 b) {
  return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)};
}
inline Bits16 operator&(Bits16 a, Bits16 b) {
  return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)};
}
template <int kBits>
inline Bits16 shift_right(Bits16 a) {
  return {_mm256_srli_epi32(a.lo, kBits), _mm256_srli_epi32(a.hi, kBits)};
}
inline Bits16 load_bits(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
}

inline Vec16 load_float(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store_float(float* p, Vec16 a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}

inline __m128i load_half(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
inline __m256 widen_bfloat16(__m128i half) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
inline Vec16 load_bfloat16(const uint16_t* p) {
  return {widen_bfloat16(load_half(p)), widen_bfloat16(load_half(p + 8))};
}
// Vector twins of nearest_even_addend and cut_to_bfloat16 in random.h.
inline __m256i nearest_addend8(__m256 a) {
  const __m256i upper = _mm256_srli_epi32(_mm256_castps_si256(a), 16);
  const __m256i odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
  return _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
}
inline Bits16 nearest_addend(Vec16 a) { return {nearest_addend8(a.lo), nearest_addend8(a.hi)}; }
inline __m256i narrow_bfloat16(__m256 a, __m256i addend) {
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_castps_si256(a), addend), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
}
inline void store_bfloat16(uint16_t* p, Vec16 a, Bits16 addend) {
  // packus works within 128-bit halves; the permutation puts the four quarters back in order.
  const __m256i packed =
      _mm256_packus_epi32(narrow_bfloat16(a.lo, addend.lo), narrow_bfloat16(a.hi, addend.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
}

inline Vec16 load_float16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_half(p)), _mm256_cvtph_ps(load_half(p + 8))};
}
inline void store_float16(uint16_t* p, Vec16 a) {
  constexpr int kNearestEven = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.lo, kNearestEven));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(a.hi, kNearestEven));
}

struct SquareLanes {
  __m256d lane[4] = {_mm256_setzero_pd(), _mm256_setzero_pd(), _mm256_setzero_pd(),
                     _mm256_setzero_pd()};

  // a·a is exact in float64: fused or not, the same bits.
  static __m256d add_square(__m256d sum, __m128 g) {
    const __m256d a = _mm256_cvtps_pd(g);
    return _mm256_fmadd_pd(a, a, sum);
  }
  void add_squares(Vec16 g) {
    lane[0] = add_square(lane[0], _mm256_castps256_ps128(g.lo));
    lane[1] = add_square(lane[1], _mm256_extractf128_ps(g.lo, 1));
    lane[2] = add_square(lane[2], _mm256_castps256_ps128(g.hi));
    lane[3] = add_square(lane[3], _mm256_extractf128_ps(g.hi, 1));
  }
  // Straight from memory: the conversion loads its quarter, and no shuffle is needed.
  void add_squares_at(const float* p) {
    for (int i = 0; i < 4; ++i) lane[i] = add_square(lane[i], _mm_loadu_ps(p + 4 * i));
  }
  void add_values(Vec16 x) {
    lane[0] = _mm256_add_pd(lane[0], _mm256_cvtps_pd(_mm256_castps256_ps128(x.lo)));
    lane[1] = _mm256_add_pd(lane[1], _mm256_cvtps_pd(_mm256_extractf128_ps(x.lo, 1)));
    lane[2] = _mm256_add_pd(lane[2], _mm256_cvtps_pd(_mm256_castps256_ps128(x.hi)));
    lane[3] = _mm256_add_pd(lane[3], _mm256_cvtps_pd(_mm256_extractf128_ps(x.hi, 1)));
  }
  void add(const SquareLanes& other) {
    for (int i = 0; i < 4; ++i) lane[i] = _mm256_add_pd(lane[i], other.lane[i]);
  }
  void store(double* out) const {
    for (int i = 0; i < 4; ++i) _mm256_storeu_pd(out + 4 * i, lane[i]);
  }
};

}  // namespace
}  // namespace gradloc::cpu

#include "kernels_impl.h"

namespace gradloc::cpu {
const KernelTable kKernelsAvx2 = {"avx2", norm_sq, adamw};
}  // namespace gradloc::cpu
