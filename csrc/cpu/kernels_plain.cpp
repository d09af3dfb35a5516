// The chunk kernels in plain C++, for every processor; compilers vectorise the loops as far as the
// baseline allows.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../adamw.h"
#include "../random.h"

namespace gradloc::cpu {
namespace {

struct Vec16 {
  float v[16];
  Vec16() = default;
  explicit Vec16(float value) {
    for (float& lane : v) lane = value;
  }
};

template <class Op>
inline Vec16 each(Vec16 a, Vec16 b, Op op) {
  for (int i = 0; i < 16; ++i) a.v[i] = op(a.v[i], b.v[i]);
  return a;
}
inline Vec16 operator+(Vec16 a, Vec16 b) {
  return each(a, b, [](float x, float y) { return x + y; });
}
inline Vec16 operator-(Vec16 a, Vec16 b) {
  return each(a, b, [](float x, float y) { return x - y; });
}
inline Vec16 operator*(Vec16 a, Vec16 b) {
  return each(a, b, [](float x, float y) { return x * y; });
}
inline Vec16 operator/(Vec16 a, Vec16 b) {
  return each(a, b, [](float x, float y) { return x / y; });
}
inline Vec16 square_root(Vec16 a) {
  for (float& lane : a.v) lane = std::sqrt(lane);
  return a;
}
// NaN in either operand stays NaN, as in torch.maximum.
inline Vec16 maximum(Vec16 a, Vec16 b) {
  return each(a, b, [](float x, float y) { return gradloc::maximum(x, y); });
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

struct Bits16 {
  uint32_t v[16];
  Bits16() = default;
  explicit Bits16(uint32_t value) {
    for (uint32_t& lane : v) lane = value;
  }
};

template <class Op>
inline Bits16 each(Bits16 a, Bits16 b, Op op) {
  for (int i = 0; i < 16; ++i) a.v[i] = op(a.v[i], b.v[i]);
  return a;
}
inline Bits16 operator+(Bits16 a, Bits16 b) {
  return each(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline Bits16 operator*(Bits16 a, Bits16 b) {
  return each(a, b, [](uint32_t x, uint32_t y) { return x * y; });
}
inline Bits16 operator^(Bits16 a, Bits16 b) {
  return each(a, b, [](uint32_t x, uint32_t y) { return x ^ y; });
}
inline Bits16 operator&(Bits16 a, Bits16 b) {
  return each(a, b, [](uint32_t x, uint32_t y) { return x & y; });
}
template <int kBits>
inline Bits16 shift_right(Bits16 a) {
  for (uint32_t& lane : a.v) lane >>= kBits;
  return a;
}
inline Bits16 load_bits(const uint32_t* p) {
  Bits16 a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}

// Scaling by 2^112 moves float16's exponent bias to float32's and normalises subnormals in one
// multiplication.
inline float from_float16(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) {
    // Infinity, or NaN made quiet as the hardware conversion does.
    const uint32_t quiet = magnitude > 0x7C00u ? 0x00400000u : 0u;
    return float_of(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13) | quiet);
  }
  return float_of(sign | bits_of(float_of(magnitude << 13) * 0x1p112f));
}

// Round to nearest even, to subnormals and to infinity as IEEE 754 says; NaN keeps its high payload
// bits and is quiet.
inline uint16_t to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) {
    return static_cast<uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  }
  if (magnitude >= 0x47800000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65,536 and above
  if (magnitude < 0x38800000u) {
    // Below 2^-14: adding 0.5 leaves float16's subnormal grid, 2^-24, as the last bit of the float.
    return static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u));
  }
  const uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

inline Vec16 load_float(const float* p) {
  Vec16 a;
  std::memcpy(a.v, p, sizeof a.v);
  return a;
}
inline void store_float(float* p, const Vec16& a) { std::memcpy(p, a.v, sizeof a.v); }
inline Vec16 load_bfloat16(const uint16_t* p) {
  Vec16 a;
  for (int i = 0; i < 16; ++i) a.v[i] = float_of(static_cast<uint32_t>(p[i]) << 16);
  return a;
}
inline Bits16 nearest_addend(const Vec16& a) {
  Bits16 addend;
  for (int i = 0; i < 16; ++i) addend.v[i] = nearest_even_addend(bits_of(a.v[i]));
  return addend;
}
inline void store_bfloat16(uint16_t* p, const Vec16& a, const Bits16& addend) {
  for (int i = 0; i < 16; ++i) p[i] = cut_to_bfloat16(bits_of(a.v[i]), addend.v[i]);
}
inline Vec16 load_float16(const uint16_t* p) {
  Vec16 a;
  for (int i = 0; i < 16; ++i) a.v[i] = from_float16(p[i]);
  return a;
}
inline void store_float16(uint16_t* p, const Vec16& a) {
  for (int i = 0; i < 16; ++i) p[i] = to_float16(a.v[i]);
}

struct SquareLanes {
  double lane[16] = {};

  void add_squares(const Vec16& g) {
    for (int i = 0; i < 16; ++i) {
      const double value = g.v[i];
      lane[i] += value * value;
    }
  }
  void add_squares_at(const float* p) { add_squares(load_float(p)); }
  void add_values(const Vec16& x) {
    for (int i = 0; i < 16; ++i) lane[i] += x.v[i];
  }
  void add(const SquareLanes& other) {
    for (int i = 0; i < 16; ++i) lane[i] += other.lane[i];
  }
  void store(double* out) const { std::memcpy(out, lane, sizeof lane); }
};

}  // namespace
}  // namespace gradloc::cpu

#include "kernels_impl.h"

namespace gradloc::cpu {
const KernelTable kKernelsPlain = {"plain", norm_sq, adamw};
}  // namespace gradloc::cpu
