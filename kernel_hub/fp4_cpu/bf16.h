// Products of tokens in bf16. Included inside the namespace of isa_avx512.cpp.

// Two k at a time, which tokens multiplied together have side by side: [k / 2][token][2]. A word's halves, shifted, select from
// a table of 32 whose halves are equal.
struct Bf16Operand {
  typedef uint16_t Number;
  typedef uint16_t Pairs __attribute__((vector_size(64)));
  static constexpr int kSteps = 4;
  static constexpr int64_t place(int step) { return 2 * step; }
  template <int kCount>
  static INLINE const uint16_t* at(const uint16_t* x, int64_t, int t, int64_t i) {
    return x + i * kCount + 2 * t;
  }
  static INLINE Pairs select(const Words& words, int step, Pairs values) {
    return (Pairs)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)words.part[0], 4 * step), (__m512i)values);
  }
  static INLINE Rows weights(const Words& words, int step) {
    return {{(Floats)select(words, step,
                            Pairs{0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
                                  0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                                  0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0})}};
  }
  // Scaled as integers, by instructions that leave alone the two units of `vdpbf16ps`. E2M1 times E4M3 or a power of two has at
  // most 6 significant bits: bf16 holds it, and its bits are those of twice the value less those of 2 over the scale. Only 1.5,
  // 3 and 6 may carry: the table has all of their last seven bits, and `kept` those by which the scale's grow times 1.5.
  struct Scale {
    Pairs kept, less;
    INLINE explicit Scale(const Rows& scale) {
      const Ints s = bits(scale.part[0]), half = s - (1 << 23), zero = (s - 1) >> 31;
      const Pairs once = twice(s), more = twice(bits(scale.part[0] + as_floats(half)));
      kept = ((more - once) | 0xff80) & ~(Pairs)zero;
      less = 0x4000 - once;
    }
    static INLINE Pairs twice(Ints x) { return (Pairs)(x | (Ints)_mm512_srli_epi32((__m512i)x, 16)); }
  };
  static INLINE Rows scaled(const Words& words, int step, const Scale& scale) {
    const Pairs kept = scale.kept & select(words, step, Pairs{0x0000, 0x3f80, 0x4000, 0x407f, 0x4080, 0x40ff, 0x4100, 0x417f,
                                                              0x0000, 0xbf80, 0xc000, 0xc07f, 0xc080, 0xc0ff, 0xc100, 0xc17f,
                                                              0x0000, 0x3f80, 0x4000, 0x407f, 0x4080, 0x40ff, 0x4100, 0x417f,
                                                              0x0000, 0xbf80, 0xc000, 0xc07f, 0xc080, 0xc0ff, 0xc100, 0xc17f});
    return {{(Floats)((kept > scale.less ? kept : scale.less) - scale.less)}};
  }
  static INLINE Rows multiply_add(const Rows& weights, const uint16_t* x, const Rows& sum) {
    const __m512i pair = _mm512_set1_epi32(load<int32_t>(x));
    return {{_mm512_dpbf16_ps(sum.part[0], (__m512bh)weights.part[0], (__m512bh)pair)}};
  }
};

// With 16 tokens weights are scaled, not sums, whose multiplications would compete with `vdpbf16ps`.
struct Bf16Direct : RowByRow<Bf16Operand, 16, kNever> {
  template <int64_t kGroup, int kCount>
  static INLINE void add(const uint8_t* from, const Rows& scale, const uint16_t* x, int64_t k, int64_t first, Rows* total) {
    if constexpr (kCount < 16) return RowByRow::add<kGroup, kCount>(from, scale, x, k, first, total);
    const Scale factor(scale);
#pragma GCC unroll 4
    for (int64_t k8 = 0; k8 < kGroup; k8 += 8) {
      const Words words = load<Words>(from + k8 * 8);
#pragma GCC unroll 4
      for (int step = 0; step < kSteps; ++step) {
        const Rows weights = scaled(words, step, factor);
#pragma GCC unroll 16
        for (int t = 0; t < kCount; ++t)
          total[t] = multiply_add(weights, at<kCount>(x, k, t, first + k8 + place(step)), total[t]);
      }
    }
  }
};

// Vectors of one row each become vectors in which the rows' numbers alternate.
template <int kCount, int... kLane>
INLINE void alternate(Ints* rows, std::integer_sequence<int, kLane...>) {
  for (int length = 1; length < kCount; length *= 2) {
    Ints halves[kCount];
    for (int i = 0; i < kCount / 2; ++i) {
      const Ints a = rows[i], b = rows[i + kCount / 2];
      halves[2 * i] = __builtin_shuffle(a, b, Ints{(kLane % 2 * kWidth + kLane / 2)...});
      halves[2 * i + 1] = __builtin_shuffle(a, b, Ints{(kLane % 2 * kWidth + kLane / 2 + kWidth / 2)...});
    }
    for (int i = 0; i < kCount; ++i) rows[i] = halves[i];
  }
}

template <int kCount>
INLINE void interleave_from(const uint16_t* x, int64_t m, int64_t k, uint16_t* to, int64_t token, int64_t begin, int64_t end) {
  for (; token + kCount <= m; token += kCount) {
    for (int64_t i = begin * kTile; i < end * kTile; i += 2 * kWidth) {
      Ints pairs[kCount];
      for (int t = 0; t < kCount; ++t) pairs[t] = load<Ints>(x + (token + t) * k + i);
      alternate<kCount>(pairs, std::make_integer_sequence<int, kWidth>());
      for (int t = 0; t < kCount; ++t) store(to + token * k + i * kCount + t * 2 * kWidth, pairs[t]);
    }
  }
  if constexpr (kCount > 1) interleave_from<kCount / 2>(x, m, k, to, token, begin, end);
}

// Tokens as they were, k apart, would all compete for the same few lines of the first cache.
static void interleave(const uint16_t* x, int64_t m, int64_t k, uint16_t* to, int64_t begin, int64_t end) {
  interleave_from<Bf16Direct::kTokens>(x, m, k, to, 0, begin, end);
}
