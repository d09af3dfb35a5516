// The random bits of stochastic rounding, and the rounding of one value with them. Every backend
// includes this file; gradloc/reference.py specifies the same bits in plain integer arithmetic.
//
// The generator has no state: the bits are a function of (seed, step, tensor, position of the
// element in the full tensor), so that they depend neither on the backend nor on threads or
// shards. docs/decisions/0004-stochastic-rounding.md says why it is this one.
//
// Functions are static on purpose, see cpu/kernels_impl.h: each file that includes this is compiled
// for another processor, and the linker must not keep one's copy for all.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace gradloc {

// What is the same for all elements of a tensor in one step.
struct RoundingKey {
  uint32_t low;   // meets the low word of the element's position
  uint32_t high;  // meets the high word
};

// The finaliser of SplitMix64 (Steele, Lea & Flood 2014).
GRADLOC_HOST_DEVICE static inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

// step: the tensor's step count after this step; tensor: its identity in the optimizer.
GRADLOC_HOST_DEVICE static inline RoundingKey rounding_key(uint64_t seed, uint64_t step,
                                                           uint64_t tensor) {
  constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
  uint64_t key = mix64(seed + kGolden);
  key = mix64((key ^ step) + kGolden);
  key = mix64((key ^ tensor) + kGolden);
  return {static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)};
}

// A template with the distance as its argument, because vector shifts want a constant.
template <int kBits>
GRADLOC_HOST_DEVICE static inline uint32_t shift_right(uint32_t x) {
  return x >> kBits;
}

// A 32-bit finaliser of low bias (`lowbias32`, C. Wellons 2018). U is uint32_t, or a vector of them
// with ^ + * and shift_right.
template <class U>
GRADLOC_HOST_DEVICE static inline U mix32(U x) {
  x = (x ^ shift_right<16>(x)) * U(0x7FEB352Du);
  x = (x ^ shift_right<15>(x)) * U(0x846CA68Bu);
  return x ^ shift_right<16>(x);
}

// The part of an element's word that its position's high word gives: the same for 2^32 neighbours.
GRADLOC_HOST_DEVICE static inline uint32_t high_term(RoundingKey key, uint32_t high) {
  return mix32(high ^ key.high);
}

// First word of the element with this low word: the parameter's 16 bits below, exp_avg's above.
template <class U>
GRADLOC_HOST_DEVICE static inline U first_word(U low, RoundingKey key,
                                               uint32_t high_term_of_element) {
  return mix32(mix32(low ^ U(key.low)) + U(high_term_of_element));
}

// Second word: exp_avg_sq's 16 bits below, max_exp_avg_sq's above.
template <class U>
GRADLOC_HOST_DEVICE static inline U second_word(U first) {
  return mix32(first + U(0x9E3779B9u));
}

// What is added to the bits of a float32 before they are cut to bfloat16's 16: a carry rounds up in
// magnitude. Random bits make the mean the value itself; half less a bit, and one more for an odd
// result, round to nearest even. Exact values and infinity never move.
GRADLOC_HOST_DEVICE static inline uint32_t nearest_even_addend(uint32_t float_bits) {
  return 0x7FFFu + ((float_bits >> 16) & 1u);
}

// NaN, whose bits might carry into the sign, becomes the quiet NaN 0x7FC0, as torch writes it.
GRADLOC_HOST_DEVICE static inline uint16_t cut_to_bfloat16(uint32_t float_bits, uint32_t addend) {
  const bool is_nan = (float_bits & 0x7FFFFFFFu) > 0x7F800000u;
  return static_cast<uint16_t>(is_nan ? 0x7FC0u : (float_bits + addend) >> 16);
}

}  // namespace gradloc
