// The chunk kernels, written once over `Vec16` (16 float32 lanes) and included by one source file
// an instruction set, after the header that defines its Vec16.
//
// Everything here is in an unnamed namespace on purpose: the same template compiled with different
// -m flags under one external name would let the linker keep the AVX-512 copy for every machine.
//
// Same bits everywhere: lane i of a sum takes elements i, i+64, ... of the chunk in that order,
// squares are exact products (in float64, or in float32 for half-width elements), and the build
// turns off contraction.
#pragma once

#include "kernels.h"

namespace gradloc::cpu {
namespace {

// Reads and writes 16 elements, or the first n of a tail, of a tensor of type D.
template <DType D>
struct Lanes {
  static Vec16 load(const void* base, int64_t at) {
    if constexpr (D == DType::kFloat32) return load_float(static_cast<const float*>(base) + at);
    if constexpr (D == DType::kBFloat16)
      return load_bfloat16(static_cast<const uint16_t*>(base) + at);
    if constexpr (D == DType::kFloat16)
      return load_float16(static_cast<const uint16_t*>(base) + at);
  }
  static void store(void* base, int64_t at, Vec16 value) {
    if constexpr (D == DType::kFloat32) store_float(static_cast<float*>(base) + at, value);
    if constexpr (D == DType::kBFloat16) store_bfloat16(static_cast<uint16_t*>(base) + at, value);
    if constexpr (D == DType::kFloat16) store_float16(static_cast<uint16_t*>(base) + at, value);
  }

  using Element = std::conditional_t<D == DType::kFloat32, float, uint16_t>;

  static Vec16 load_tail(const void* base, int64_t at, int n) {
    Element buffer[16] = {};
    for (int i = 0; i < n; ++i) buffer[i] = static_cast<const Element*>(base)[at + i];
    return load(buffer, 0);
  }
  static void store_tail(void* base, int64_t at, int n, Vec16 value) {
    Element buffer[16];
    store(buffer, 0, value);
    for (int i = 0; i < n; ++i) static_cast<Element*>(base)[at + i] = buffer[i];
  }
};

// 64 float64 lanes: four accumulators hide the latency of the additions.
struct SquareSum {
  SquareLanes lanes[4];

  double total() {
    lanes[0].add(lanes[1]);
    lanes[2].add(lanes[3]);
    lanes[0].add(lanes[2]);
    double lane[16];
    lanes[0].store(lane);
    double sum = 0.0;
    for (double value : lane) sum += value;
    return sum;
  }
};

template <DType D>
double norm_sq_wide(const void* grad, int32_t size) {
  using G = Lanes<D>;
  SquareSum sum;
  int32_t at = 0;
  for (; at + 64 <= size; at += 64) {
    for (int k = 0; k < 4; ++k) {
      if constexpr (D == DType::kFloat32) {
        sum.lanes[k].add_squares_at(static_cast<const float*>(grad) + at + 16 * k);
      } else {
        sum.lanes[k].add_squares(G::load(grad, at + 16 * k));
      }
    }
  }
  for (int k = 0; at < size; at += 16, ++k) {
    sum.lanes[k].add_squares(at + 16 <= size ? G::load(grad, at)
                                             : G::load_tail(grad, at, size - at));
  }
  return sum.total();
}

// Half-width gradients are read so fast that widening each square to float64 would be the limit.
// Their squares are exact in float32, so runs of 16 are added there first: a relative error below
// 15·2^-24 of the sum, half of that of the norm.
template <DType D>
double norm_sq_half(const void* grad, int32_t size) {
  using G = Lanes<D>;
  constexpr int32_t kRun = 16 * 64;
  SquareSum sum;
  int32_t at = 0;
  for (; at + kRun <= size; at += kRun) {
    Vec16 run[4] = {Vec16(0.0f), Vec16(0.0f), Vec16(0.0f), Vec16(0.0f)};
    for (int32_t i = at; i < at + kRun; i += 64) {
      for (int k = 0; k < 4; ++k) {
        const Vec16 g = G::load(grad, i + 16 * k);
        run[k] = run[k] + g * g;
      }
    }
    for (int k = 0; k < 4; ++k) sum.lanes[k].add_values(run[k]);
  }
  const char* rest = static_cast<const char*>(grad) + at * dtype_bytes(D);
  const double total = sum.total() + norm_sq_wide<D>(rest, size - at);
  // Squares of bfloat16 may leave the range of float32 (infinite, or so small that bits are lost)
  // where float64 holds them.
  const bool in_range = total > 1e-26 && total < 1e38;
  return in_range ? total : norm_sq_wide<D>(grad, size);
}

template <DType D>
double norm_sq_chunk(const void* grad, int32_t size) {
  return D == DType::kFloat32 ? norm_sq_wide<D>(grad, size) : norm_sq_half<D>(grad, size);
}

// `Full` groups of 16 use whole loads; the tail of the chunk goes through padded copies.
template <DType P, DType G, bool kAmsgrad, bool kNorm>
struct AdamWWalk {
  const AdamWChunk& c;
  SquareSum sum;

  void full(int32_t at, int k) {
    Vec16 param = Lanes<P>::load(c.param, at);
    const Vec16 grad = Lanes<G>::load(c.grad, at);
    Vec16 exp_avg = load_float(c.exp_avg + at);
    Vec16 exp_avg_sq = load_float(c.exp_avg_sq + at);
    Vec16 max_sq = kAmsgrad ? load_float(c.max_exp_avg_sq + at) : Vec16(0.0f);
    if constexpr (kNorm) sum.lanes[k].add_squares(grad);
    adamw_element<kAmsgrad>(param, grad, exp_avg, exp_avg_sq, max_sq, c.scalars);
    Lanes<P>::store(c.param, at, param);
    store_float(c.exp_avg + at, exp_avg);
    store_float(c.exp_avg_sq + at, exp_avg_sq);
    if constexpr (kAmsgrad) store_float(c.max_exp_avg_sq + at, max_sq);
  }

  void tail(int32_t at, int n, int k) {
    using M = Lanes<DType::kFloat32>;
    Vec16 param = Lanes<P>::load_tail(c.param, at, n);
    const Vec16 grad = Lanes<G>::load_tail(c.grad, at, n);
    Vec16 exp_avg = M::load_tail(c.exp_avg, at, n);
    Vec16 exp_avg_sq = M::load_tail(c.exp_avg_sq, at, n);
    Vec16 max_sq = kAmsgrad ? M::load_tail(c.max_exp_avg_sq, at, n) : Vec16(0.0f);
    if constexpr (kNorm) sum.lanes[k].add_squares(grad);
    adamw_element<kAmsgrad>(param, grad, exp_avg, exp_avg_sq, max_sq, c.scalars);
    Lanes<P>::store_tail(c.param, at, n, param);
    M::store_tail(c.exp_avg, at, n, exp_avg);
    M::store_tail(c.exp_avg_sq, at, n, exp_avg_sq);
    if constexpr (kAmsgrad) M::store_tail(c.max_exp_avg_sq, at, n, max_sq);
  }

  double run() {
    int32_t at = 0;
    for (; at + 64 <= c.size; at += 64) {
      for (int k = 0; k < 4; ++k) full(at + 16 * k, k);
    }
    for (int k = 0; at < c.size; at += 16, ++k) {
      if (at + 16 <= c.size) {
        full(at, k);
      } else {
        tail(at, c.size - at, k);
      }
    }
    return kNorm ? sum.total() : 0.0;
  }
};

template <DType P, DType G>
double adamw_chunk(const AdamWChunk& c, bool with_norm) {
  if (c.max_exp_avg_sq != nullptr) {
    return with_norm ? AdamWWalk<P, G, true, true>{c, {}}.run()
                     : AdamWWalk<P, G, true, false>{c, {}}.run();
  }
  return with_norm ? AdamWWalk<P, G, false, true>{c, {}}.run()
                   : AdamWWalk<P, G, false, false>{c, {}}.run();
}

template <DType P>
double adamw_by_grad(const AdamWChunk& c, bool with_norm) {
  switch (c.grad_dtype) {
    case DType::kFloat32:
      return adamw_chunk<P, DType::kFloat32>(c, with_norm);
    case DType::kBFloat16:
      return adamw_chunk<P, DType::kBFloat16>(c, with_norm);
    default:
      return adamw_chunk<P, DType::kFloat16>(c, with_norm);
  }
}

double adamw(const AdamWChunk& c, bool with_norm) {
  switch (c.param_dtype) {
    case DType::kFloat32:
      return adamw_by_grad<DType::kFloat32>(c, with_norm);
    case DType::kBFloat16:
      return adamw_by_grad<DType::kBFloat16>(c, with_norm);
    default:
      return adamw_by_grad<DType::kFloat16>(c, with_norm);
  }
}

double norm_sq(const void* grad, DType dtype, int32_t size) {
  switch (dtype) {
    case DType::kFloat32:
      return norm_sq_chunk<DType::kFloat32>(grad, size);
    case DType::kBFloat16:
      return norm_sq_chunk<DType::kBFloat16>(grad, size);
    default:
      return norm_sq_chunk<DType::kFloat16>(grad, size);
  }
}

}  // namespace
}  // namespace gradloc::cpu
