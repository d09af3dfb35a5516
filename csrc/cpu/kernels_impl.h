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

#include "../random.h"
#include "kernels.h"

namespace gradloc::cpu {
namespace {

// Values of a store: for bfloat16 with what is added before they are cut, see random.h.
struct Nearest {
  Bits16 addend(Vec16 value) const { return nearest_addend(value); }
};
struct Random {
  Bits16 bits;  // 16 random bits a lane
  Bits16 addend(Vec16) const { return bits; }
};

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
  // `rounding` is Nearest or Random, and matters to bfloat16 alone.
  template <class R>
  static void store(void* base, int64_t at, Vec16 value, [[maybe_unused]] const R& rounding) {
    if constexpr (D == DType::kFloat32) store_float(static_cast<float*>(base) + at, value);
    if constexpr (D == DType::kBFloat16)
      store_bfloat16(static_cast<uint16_t*>(base) + at, value, rounding.addend(value));
    if constexpr (D == DType::kFloat16) store_float16(static_cast<uint16_t*>(base) + at, value);
  }

  using Element = std::conditional_t<D == DType::kFloat32, float, uint16_t>;

  static Vec16 load_tail(const void* base, int64_t at, int n) {
    Element buffer[16] = {};
    for (int i = 0; i < n; ++i) buffer[i] = static_cast<const Element*>(base)[at + i];
    return load(buffer, 0);
  }
  template <class R>
  static void store_tail(void* base, int64_t at, int n, Vec16 value, const R& rounding) {
    Element buffer[16];
    store(buffer, 0, value, rounding);
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

// The random words of a chunk's elements, 16 at a time.
class ChunkWords {
 public:
  explicit ChunkWords(const AdamWChunk& c)
      : first_(c.first_element),
        key_(c.key),
        high_(static_cast<uint32_t>(first_ >> 32)),
        // A chunk is far shorter than 2^32, so that the high word changes once at most.
        terms_{high_term(c.key, high_), high_term(c.key, high_ + 1)} {}

  // First words of elements at .. at + 15 of the chunk.
  Bits16 first(int32_t at) const {
    const uint64_t position = first_ + static_cast<uint64_t>(at);
    const auto low = static_cast<uint32_t>(position);
    uint32_t lanes[16];
    if (low > 0xFFFFFFF0u) {  // the high word changes within the 16: lane by lane
      for (uint32_t i = 0; i < 16; ++i) lanes[i] = first_word(low + i, key_, term(position + i));
      return load_bits(lanes);
    }
    for (uint32_t i = 0; i < 16; ++i) lanes[i] = i;
    return first_word(load_bits(lanes) + Bits16(low), key_, term(position));
  }

 private:
  uint32_t term(uint64_t position) const {
    return terms_[static_cast<uint32_t>(position >> 32) != high_];
  }

  uint64_t first_;
  RoundingKey key_;
  uint32_t high_;
  uint32_t terms_[2];
};

struct NoWords {
  explicit NoWords(const AdamWChunk&) {}
};

// Groups of 16 use whole loads; the tail of the chunk goes through padded copies. Kernels for
// anchors exist once a kind of dtypes: what else they are to do they ask the chunk, in branches
// that always go the same way. As template arguments these would double what there is to compile.
template <DType P, DType G, DType M, bool kStochastic, bool kAnchored, bool kAmsgrad, bool kNorm>
struct AdamWWalk {
  const AdamWChunk& c;
  std::conditional_t<kStochastic, ChunkWords, NoWords> words;
  SquareSum sum;

  explicit AdamWWalk(const AdamWChunk& chunk) : c(chunk), words(chunk) {}

  template <bool kTail, DType D>
  static Vec16 load(const void* base, int32_t at, int n) {
    if constexpr (kTail) return Lanes<D>::load_tail(base, at, n);
    return Lanes<D>::load(base, at);
  }
  template <bool kTail, DType D, class R>
  static void store(void* base, int32_t at, int n, Vec16 value, const R& rounding) {
    if constexpr (kTail) {
      Lanes<D>::store_tail(base, at, n, value, rounding);
    } else {
      Lanes<D>::store(base, at, value, rounding);
    }
  }

  bool has_max() const { return kAmsgrad && (!kAnchored || c.max_exp_avg_sq != nullptr); }

  template <bool kTail>
  Vec16 load_anchor(int32_t at, int n) const {
    return c.anchor_dtype == DType::kFloat32 ? load<kTail, DType::kFloat32>(c.anchor, at, n)
                                             : load<kTail, DType::kBFloat16>(c.anchor, at, n);
  }

  // n elements from `at`: 16, or fewer in the tail. k: which of the four sums takes their squares.
  template <bool kTail>
  void group(int32_t at, int n, int k) {
    Vec16 param = load<kTail, P>(c.param, at, n);
    const Vec16 grad = load<kTail, G>(c.grad, at, n);
    Vec16 exp_avg = load<kTail, M>(c.exp_avg, at, n);
    Vec16 exp_avg_sq = load<kTail, M>(c.exp_avg_sq, at, n);
    Vec16 max_sq(0.0f);
    // A maximum of 0 is as good as none: second moments are not below it.
    if (has_max()) max_sq = load<kTail, M>(c.max_exp_avg_sq, at, n);
    Vec16 anchor(0.0f);
    if constexpr (kAnchored) anchor = load_anchor<kTail>(at, n);
    if constexpr (kNorm) sum.lanes[k].add_squares(grad);
    adamw_element<kAmsgrad, kAnchored>(param, grad, exp_avg, exp_avg_sq, max_sq, anchor, c.scalars);
    if constexpr (kStochastic) {
      const Bits16 first = words.first(at), kLow(0xFFFFu);
      store<kTail, P>(c.param, at, n, param, Random{first & kLow});
      store<kTail, M>(c.exp_avg, at, n, exp_avg, Random{shift_right<16>(first)});
      if constexpr (M == DType::kBFloat16) {
        const Bits16 second = second_word(first);
        store<kTail, M>(c.exp_avg_sq, at, n, exp_avg_sq, Random{second & kLow});
        if (has_max())
          store<kTail, M>(c.max_exp_avg_sq, at, n, max_sq, Random{shift_right<16>(second)});
        return;
      }
    } else {
      store<kTail, P>(c.param, at, n, param, Nearest{});
      store<kTail, M>(c.exp_avg, at, n, exp_avg, Nearest{});
    }
    store<kTail, M>(c.exp_avg_sq, at, n, exp_avg_sq, Nearest{});
    if (has_max()) store<kTail, M>(c.max_exp_avg_sq, at, n, max_sq, Nearest{});
  }

  double run() {
    int32_t at = 0;
    for (; at + 64 <= c.size; at += 64) {
      for (int k = 0; k < 4; ++k) group<false>(at + 16 * k, 16, k);
    }
    for (int k = 0; at < c.size; at += 16, ++k) {
      if (at + 16 <= c.size) {
        group<false>(at, 16, k);
      } else {
        group<true>(at, c.size - at, k);
      }
    }
    return kNorm ? sum.total() : 0.0;
  }
};

template <DType P, DType G, DType M, bool kStochastic>
double adamw_rounded(const AdamWChunk& c, bool with_norm) {
  if (c.anchor != nullptr) {
    const double sum = AdamWWalk<P, G, M, kStochastic, true, true, true>(c).run();
    return with_norm ? sum : 0.0;
  }
  if (c.max_exp_avg_sq != nullptr) {
    return with_norm ? AdamWWalk<P, G, M, kStochastic, false, true, true>(c).run()
                     : AdamWWalk<P, G, M, kStochastic, false, true, false>(c).run();
  }
  return with_norm ? AdamWWalk<P, G, M, kStochastic, false, false, true>(c).run()
                   : AdamWWalk<P, G, M, kStochastic, false, false, false>(c).run();
}

template <DType P, DType G, DType M>
double adamw_chunk(const AdamWChunk& c, bool with_norm) {
  if constexpr (P == DType::kBFloat16 || M == DType::kBFloat16) {
    if (c.stochastic) return adamw_rounded<P, G, M, true>(c, with_norm);
  }
  return adamw_rounded<P, G, M, false>(c, with_norm);
}

template <DType P, DType G>
double adamw_by_moment(const AdamWChunk& c, bool with_norm) {
  return c.moment_dtype == DType::kFloat32 ? adamw_chunk<P, G, DType::kFloat32>(c, with_norm)
                                           : adamw_chunk<P, G, DType::kBFloat16>(c, with_norm);
}

template <DType P>
double adamw_by_grad(const AdamWChunk& c, bool with_norm) {
  switch (c.grad_dtype) {
    case DType::kFloat32:
      return adamw_by_moment<P, DType::kFloat32>(c, with_norm);
    case DType::kBFloat16:
      return adamw_by_moment<P, DType::kBFloat16>(c, with_norm);
    default:
      return adamw_by_moment<P, DType::kFloat16>(c, with_norm);
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
