// The chunk kernels for processors with AVX-512 F, BW, DQ and VL. Only this file is compiled with
// those flags.
#include <immintrin.h>

#include <cstdint>
#include <type_traits>

#include "../random.h"

namespace gradloc::cpu {
namespace {

struct Vec16 {
  __m512 v;
  Vec16() = default;
  explicit Vec16(__m512 value) : v(value) {}
  explicit Vec16(float value) : v(_mm512_set1_ps(value)) {}
};

inline Vec16 operator+(Vec16 a, Vec16 b) { return Vec16(_mm512_add_ps(a.v, b.v)); }
inline Vec16 operator-(Vec16 a, Vec16 b) { return Vec16(_mm512_sub_ps(a.v, b.v)); }
inline Vec16 operator*(Vec16 a, Vec16 b) { return Vec16(_mm512_mul_ps(a.v, b.v)); }
inline Vec16 operator/(Vec16 a, Vec16 b) { return Vec16(_mm512_div_ps(a.v, b.v)); }
inline Vec16 square_root(Vec16 a) { return Vec16(_mm512_sqrt_ps(a.v)); }
// NaN in either operand stays NaN, as in torch.maximum; vmaxps alone returns its second operand.
inline Vec16 maximum(Vec16 a, Vec16 b) {
  const __mmask16 nan_a = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return Vec16(_mm512_mask_blend_ps(nan_a, _mm512_max_ps(a.v, b.v), a.v));
}

struct Bits16 {
  __m512i v;
  explicit Bits16(__m512i value) : v(value) {}
  explicit Bits16(uint32_t value) : v(_mm512_set1_epi32(static_cast<int>(value))) {}
};

inline Bits16 operator+(Bits16 a, Bits16 b) { return Bits16(_mm512_add_epi32(a.v, b.v)); }
inline Bits16 operator*(Bits16 a, Bits16 b) { return Bits16(_mm512_mullo_epi32(a.v, b.v)); }
inline Bits16 operator^(Bits16 a, Bits16 b) { return Bits16(_mm512_xor_si512(a.v, b.v)); }
inline Bits16 operator&(Bits16 a, Bits16 b) { return Bits16(_mm512_and_si512(a.v, b.v)); }
template <int kBits>
inline Bits16 shift_right(Bits16 a) {
  return Bits16(_mm512_srli_epi32(a.v, kBits));
}
inline Bits16 load_bits(const uint32_t* p) { return Bits16(_mm512_loadu_si512(p)); }

inline Vec16 load_float(const float* p) { return Vec16(_mm512_loadu_ps(p)); }
inline void store_float(float* p, Vec16 a) { _mm512_storeu_ps(p, a.v); }

inline Vec16 load_bfloat16(const uint16_t* p) {
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return Vec16(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
}
// Vector twins of nearest_even_addend and cut_to_bfloat16 in random.h.
inline Bits16 nearest_addend(Vec16 a) {
  const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
  const __m512i odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
  return Bits16(_mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
}
inline void store_bfloat16(uint16_t* p, Vec16 a, Bits16 addend) {
  __m512i rounded = _mm512_add_epi32(_mm512_castps_si512(a.v), addend.v);
  rounded = _mm512_srli_epi32(rounded, 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  rounded = _mm512_mask_blend_epi32(nan, rounded, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(rounded));
}

inline Vec16 load_float16(const uint16_t* p) {
  return Vec16(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline void store_float16(uint16_t* p, Vec16 a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

struct SquareLanes {
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();

  void add_squares(Vec16 g) {
    const __m512d a = _mm512_cvtps_pd(_mm512_castps512_ps256(g.v));
    const __m512d b = _mm512_cvtps_pd(_mm512_extractf32x8_ps(g.v, 1));
    low = _mm512_fmadd_pd(a, a, low);  // a·a is exact in float64: fused or not, the same bits
    high = _mm512_fmadd_pd(b, b, high);
  }
  // Straight from memory: the conversion loads its half, and no shuffle is needed.
  void add_squares_at(const float* p) {
    const __m512d a = _mm512_cvtps_pd(_mm256_loadu_ps(p));
    const __m512d b = _mm512_cvtps_pd(_mm256_loadu_ps(p + 8));
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  }
  void add_values(Vec16 x) {
    low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(x.v)));
    high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(x.v, 1)));
  }
  void add(const SquareLanes& other) {
    low = _mm512_add_pd(low, other.low);
    high = _mm512_add_pd(high, other.high);
  }
  void store(double* out) const {
    _mm512_storeu_pd(out, low);
    _mm512_storeu_pd(out + 8, high);
  }
};

}  // namespace
}  // namespace gradloc::cpu

#include "kernels_impl.h"

namespace gradloc::cpu {
const KernelTable kKernelsAvx512 = {"avx512", norm_sq, adamw};
}  // namespace gradloc::cpu
