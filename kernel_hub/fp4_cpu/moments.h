// Sums of products of bf16 tokens, x^T x, for GPTQ. Included inside the namespace of isa_avx512.cpp.
//
// What is chosen adds up tiles: start(), stop(), and add<kTwoRows, kTwoColumns>(a, b, tiles, total, k), total[32, 32], or
// [16, ...] without kTwoRows and [..., 16] without kTwoColumns, += a^T b.

template <int kBit, int... kLane>
INLINE void exchange(Ints& a, Ints& b, std::integer_sequence<int, kLane...>) {
  const Ints first = __builtin_shuffle(a, b, Ints{(kLane & kBit ? kWidth + (kLane & ~kBit) : kLane)...});
  b = __builtin_shuffle(a, b, Ints{(kLane & kBit ? kWidth + kLane : kLane | kBit)...});
  a = first;
}

template <int kBit = 1>
INLINE void transpose(Ints* rows) {
  if constexpr (kBit < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i)
      if (!(i & kBit)) exchange<kBit>(rows[i], rows[i | kBit], std::make_integer_sequence<int, kWidth>());
    transpose<2 * kBit>(rows);
  }
}

constexpr int64_t kTileNumbers = 512;  // of bf16

// Tokens of 16 features as tiles of B, and of A, which are their transposes.
INLINE void pack_moments(const uint16_t* x, int64_t tokens, int64_t k, uint16_t* as_b, uint16_t* as_a) {
  for (int64_t first = 0; first < tokens; first += 32, as_a += kTileNumbers) {
    Ints rows[16];
    for (int64_t i = 0; i < 16; ++i) {
      const int64_t token = first + 2 * i;
      const __m256i none = _mm256_setzero_si256();
      const __m256i even = token < tokens ? load<__m256i>(x + token * k) : none;
      const __m256i odd = token + 1 < tokens ? load<__m256i>(x + (token + 1) * k) : none;
      rows[i] = (Ints)_mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
    }
    if (as_b != nullptr) {
      for (int64_t i = 0; i < 16; ++i) store(as_b + i * 32, rows[i]);
      as_b += kTileNumbers;
    }
    transpose(rows);
    for (int64_t i = 0; i < 16; ++i) store(as_a + i * 32, rows[i]);
  }
}

static void pack_moments(const Moments& m, int64_t begin, int64_t end) {
  const int64_t size = m.token_tiles * kTileNumbers;
  for (int64_t f = begin; f < end; ++f) {
    pack_moments(m.x + f * 16, m.tokens, m.k, m.columns + f * size, m.rows + f * size);
    if (m.original != nullptr) pack_moments(m.original + f * 16, m.tokens, m.k, nullptr, m.original_rows + f * size);
  }
}

// Sums of products of `vdpbf16ps`, which takes denormal floats for zero as AMX does: 8 rows by kColumns x 16 at a time.
template <int kColumns>
INLINE void add_dots(const uint16_t* a, const uint16_t* b, int64_t tiles, float* total, int64_t k) {
  __m512 sum[8][kColumns];
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < kColumns; ++c) sum[r][c] = _mm512_loadu_ps(total + r * k + c * 16);
  for (int64_t i = 0; i < tiles; ++i, a += kTileNumbers, b += kTileNumbers) {
    for (int64_t pair = 0; pair < 16; ++pair) {
      __m512bh column[kColumns];
      for (int c = 0; c < kColumns; ++c) column[c] = (__m512bh)load<Ints>(b + c * tiles * kTileNumbers + pair * 32);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        const __m512bh row = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + r * 32 + pair * 2));
        for (int c = 0; c < kColumns; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], row, column[c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < kColumns; ++c) _mm512_storeu_ps(total + r * k + c * 16, sum[r][c]);
}

struct DotMoments {
  static void start() {}
  static void stop() {}
  template <bool kTwoRows, bool kTwoColumns>
  static void add(const uint16_t* a, const uint16_t* b, int64_t tiles, float* total, int64_t k) {
    for (int64_t block = 0; block < (kTwoRows ? 2 : 1); ++block)
      for (int64_t r = 0; r < 16; r += 8)
        add_dots<kTwoColumns ? 2 : 1>(a + block * tiles * kTileNumbers + r * 32, b, tiles, total + (block * 16 + r) * k, k);
  }
};

template <class Tiles, bool kTwoRows>
INLINE void add_rows(const uint16_t* a, const Moments& m, float* total, int64_t columns) {
  const int64_t size = m.token_tiles * kTileNumbers;
  int64_t j = 0;
  for (; j + 2 <= columns; j += 2)
    Tiles::template add<kTwoRows, true>(a, m.columns + j * size, m.token_tiles, total + j * 16, m.k);
  if (j < columns) Tiles::template add<kTwoRows, false>(a, m.columns + j * size, m.token_tiles, total + j * 16, m.k);
}

template <class Tiles>
static void add_moments(const Moments& m, int64_t begin, int64_t end) {
  Tiles::start();
  const int64_t size = m.token_tiles * kTileNumbers, blocks = m.k / 16, pairs = (blocks + 1) / 2;
  for (int64_t task = begin; task < end; ++task) {
    // Later rows of a symmetric matrix have more columns: the first and the last in turns.
    const int64_t first = 2 * (task % 2 == 0 ? task / 2 : pairs - 1 - task / 2);
    const bool two = first + 1 < blocks;
    const int64_t last = first * 16 + (two ? 31 : 15), stop = (last / m.panel + 1) * m.panel;
    const int64_t columns = stop < m.k ? (stop + 15) / 16 : blocks;
    const auto add = two ? add_rows<Tiles, true> : add_rows<Tiles, false>;
    add(m.rows + first * size, m, m.second + first * 16 * m.k, columns);
    if (m.original != nullptr) add(m.original_rows + first * size, m, m.cross + first * 16 * m.k, blocks);
  }
  Tiles::stop();
}
