// Products of tokens with a prepared weight. Included inside an instruction set's namespace, which defines load_e4m3,
// decode_e2m1, isa_multiply_add, kPanelTokens and kPanelBlocks, and chooses the operands: what tokens are multiplied in.
//
// Both kinds have: Number, a token's type in memory; kSteps, how many products take the 8 k of a word; place(step), the first
// k of a step; and multiply_add(weights, x, sum), which reads a step's numbers of one token.
//   Direct, for up to kMost tokens, kTokens at a time: Sum, what 16 rows add up to; add<kGroup, kCount>(words, scale, x, k,
//     first, total), the products of the group at k = first with kCount tokens; rows(total).
//   Panel, for many: Scale, what is made of a group's scales; scaled(words, step, scale), values times them; kTiles and
//     kBlocks, how many tiles and blocks of 16 rows are decoded at a time; add(panel, k_count, x, k, count, sums), the
//     products with `count` tokens, between start(count) and stop().

constexpr int64_t kChunkTokens = 256;

struct Words {
  Ints part[kParts];
};

// What a row's sums must still be multiplied by: load_e4m3 gives 2^-8 of a scale.
constexpr float scale_factor(Format format) { return format == kNvfp4 ? 256.0f : 1.0f; }

INLINE Ints exponents(Floats row_scale) { return (bits(row_scale) >> 23) & 0xff; }

// A group's scales of 16 rows; mxfp4: over the row's largest, which row_scale holds.
template <Format kFormat>
INLINE Rows load_scales(const uint8_t* bytes, const float* row_scale) {
  if (kFormat == kNvfp4) return load_e4m3(bytes);
  Ints byte[kParts];
  load_bytes(bytes, byte);
  Rows scale;
  EACH_PART {
    const Ints exponent = byte[p] - exponents(load<Floats>(row_scale + p * kWidth)) + 127;
    scale.part[p] = as_floats((exponent > 0 ? exponent : Ints{}) << 23);
  }
  return scale;
}

constexpr int64_t kAhead = 4096;  // bytes: the processor's own prefetching stops where a page does

// Asks for a tile that will be needed.
template <Format kFormat>
INLINE void fetch(const uint8_t* tile) {
#pragma GCC unroll 16
  for (int64_t line = 0; line < tile_bytes(kFormat); line += 64) __builtin_prefetch(tile + line);
}

INLINE void finish(const Product& p, int64_t block, int64_t token, const float* sums) {
  const float scale = scale_factor(p.format) * (p.token_scale == nullptr ? 1.0f : p.token_scale[token * p.token_scale_stride]);
  for (int64_t r = 0; r < kRows; r += kWidth) {
    const int64_t row = block * kRows + r;
    Floats y = load<Floats>(sums + r) * (load<Floats>(p.row_scale + row) * scale);
    if (p.bias != nullptr) y += load_numbers(p.bias, p.out_is_bf16, row);
    store_numbers(p.out, p.out_is_bf16, token * p.n + row, y);
  }
}

// Some tokens, with which weights are multiplied as soon as they are decoded.
template <class Direct, Format kFormat, int kCount>
INLINE void direct(const Product& p, int64_t block, int64_t token) {
  constexpr int64_t group = group_of(kFormat);
  const int64_t k = p.k_tiles * kTile;
  const auto* x = static_cast<const typename Direct::Number*>(p.tokens) + token * k;
  const uint8_t* tile = p.packed + block * p.k_tiles * tile_bytes(kFormat);
  typename Direct::Sum total[kCount] = {};
  for (int64_t i = 0; i < p.k_tiles; ++i, tile += tile_bytes(kFormat)) {
    fetch<kFormat>(tile + kAhead);
#pragma GCC unroll 4
    for (int64_t first = 0; first < kTile; first += group) {
      const Rows scale = load_scales<kFormat>(tile + kCodeBytes + first / group * kRows, p.row_scale + block * kRows);
      Direct::template add<group, kCount>(tile + first * 8, scale, x, k, i * kTile + first, total);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kCount; ++t) {
    float sums[kRows];
    store(sums, Direct::rows(total[t]));
    finish(p, block, token + t, sums);
  }
}

// Many tokens: tiles of up to kBlocks x 16 rows are decoded and scaled into a panel, which all tokens of a chunk use.
template <class Operand, Format kFormat>
INLINE void decode_panel(const Product& p, int64_t block, int64_t blocks, int64_t tile, int64_t tiles, Rows* panel) {
  constexpr int64_t group = group_of(kFormat);
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = 0; i < tiles; ++i) {
      const uint8_t* from = p.packed + ((block + b) * p.k_tiles + tile + i) * tile_bytes(kFormat);
      fetch<kFormat>(from + Operand::kTiles * tile_bytes(kFormat));
      for (int64_t first = 0; first < kTile; first += group) {
        const typename Operand::Scale scale(
            load_scales<kFormat>(from + kCodeBytes + first / group * kRows, p.row_scale + (block + b) * kRows));
#pragma GCC unroll 4
        for (int64_t k8 = first; k8 < first + group; k8 += 8) {
          const Words words = load<Words>(from + k8 * 8);
#pragma GCC unroll 8
          for (int step = 0; step < Operand::kSteps; ++step)
            panel[((i * kTile + k8) / 8 * Operand::kSteps + step) * Operand::kBlocks + b] = Operand::scaled(words, step, scale);
        }
      }
    }
  }
}

constexpr int64_t kPanelRows = kPanelBlocks * kRows;

template <class Operand, int kCount>
INLINE void add_panel(const Rows* panel, int64_t k_count, const typename Operand::Number* x, int64_t k, float* sums) {
  Rows sum[kCount][kPanelBlocks];
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 2
    for (int b = 0; b < kPanelBlocks; ++b) sum[t][b] = load<Rows>(sums + t * kPanelRows + b * kRows);
  for (int64_t k8 = 0; k8 < k_count; k8 += 8) {
#pragma GCC unroll 8
    for (int step = 0; step < Operand::kSteps; ++step, panel += kPanelBlocks) {
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 2
        for (int b = 0; b < kPanelBlocks; ++b)
          sum[t][b] = Operand::multiply_add(panel[b], x + t * k + k8 + Operand::place(step), sum[t][b]);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 2
    for (int b = 0; b < kPanelBlocks; ++b) store(sums + t * kPanelRows + b * kRows, sum[t][b]);
}

// The tokens from `token` on, as many at a time as go.
template <class Operand, int kCount>
INLINE void add_panel_from(const Rows* panel, int64_t k_count, const typename Operand::Number* x, int64_t k, int64_t token,
                           int64_t count, float* sums) {
  for (; token + kCount <= count; token += kCount)
    add_panel<Operand, kCount>(panel, k_count, x + token * k, k, sums + token * kPanelRows);
  if constexpr (kCount > 1) add_panel_from<Operand, kCount / 2>(panel, k_count, x, k, token, count, sums);
}

// Panel for an operand that is multiplied with one number, or a few, of a token at a time.
template <class Operand>
struct TokenByToken : Operand {
  static constexpr int64_t kTiles = 2, kBlocks = kPanelBlocks;
  static INLINE void start(int64_t) {}
  static INLINE void stop() {}
  static INLINE void add(const Rows* panel, int64_t k_count, const typename Operand::Number* x, int64_t k, int64_t count,
                         float* sums) {
    add_panel_from<Operand, kPanelTokens>(panel, k_count, x, k, 0, count, sums);
  }
};

template <class Operand, Format kFormat>
static void panels(const Product& p, int64_t block, int64_t blocks, int64_t first, int64_t count) {
  constexpr int64_t rows = Operand::kBlocks * kRows;
  alignas(64) float sums[kChunkTokens * rows];
  alignas(64) Rows panel[Operand::kTiles * kTile / 8 * Operand::kSteps * Operand::kBlocks] = {};
  __builtin_memset(sums, 0, count * rows * sizeof(float));
  const int64_t k = p.k_tiles * kTile;
  Operand::start(count);
  for (int64_t tile = 0; tile < p.k_tiles; tile += Operand::kTiles) {
    const int64_t tiles = p.k_tiles - tile < Operand::kTiles ? p.k_tiles - tile : Operand::kTiles;
    decode_panel<Operand, kFormat>(p, block, blocks, tile, tiles, panel);
    const auto* x = static_cast<const typename Operand::Number*>(p.tokens) + first * k + tile * kTile;
    Operand::add(panel, tiles * kTile, x, k, count, sums);
  }
  Operand::stop();
  for (int64_t t = 0; t < count; ++t)
    for (int64_t b = 0; b < blocks; ++b) finish(p, block + b, first + t, sums + t * rows + b * kRows);
}

// The tokens from `token` on, as many at a time as go.
template <class Direct, Format kFormat, int kCount>
INLINE void direct_from(const Product& p, int64_t block, int64_t token, int64_t end) {
  for (; token + kCount <= end; token += kCount) direct<Direct, kFormat, kCount>(p, block, token);
  if constexpr (kCount > 1) direct_from<Direct, kFormat, kCount / 2>(p, block, token, end);
}

// Ways to multiply `count` tokens from `first` on by the rows of up to kBlocks blocks.
template <class Direct>
struct Directly {
  static constexpr int64_t kMost = Direct::kMost, kBlocks = 1;
  template <Format kFormat>
  static void multiply(const Product& p, int64_t block, int64_t, int64_t first, int64_t count) {
    direct_from<Direct, kFormat, Direct::kTokens>(p, block, first, first + count);
  }
};

template <class Panel>
struct InPanels {
  static constexpr int64_t kMost = kNever, kBlocks = Panel::kBlocks;
  template <Format kFormat>
  static void multiply(const Product& p, int64_t block, int64_t blocks, int64_t first, int64_t count) {
    panels<Panel, kFormat>(p, block, blocks, first, count);
  }
};

template <class Way, Format kFormat>
static void product_of(const Product& p, int64_t begin, int64_t end) {
  for (int64_t first = 0; first < p.m; first += kChunkTokens)
    for (int64_t block = begin; block < end; block += Way::kBlocks)
      Way::template multiply<kFormat>(p, block, end - block < Way::kBlocks ? end - block : Way::kBlocks, first,
                                      p.m - first < kChunkTokens ? p.m - first : kChunkTokens);
}

// In the first way that takes so many tokens.
template <class Way, class... Others>
static void product(const Product& p, int64_t begin, int64_t end) {
  if constexpr (sizeof...(Others) > 0)
    if (p.m > Way::kMost) return product<Others...>(p, begin, end);
  if (p.format == kNvfp4) product_of<Way, kNvfp4>(p, begin, end);
  else product_of<Way, kMxfp4>(p, begin, end);
}

// Direct for an operand whose weights(words, step) has one row in each place, and whose numbers from k = i on, of the t-th of
// kCount tokens, are at<kCount>(x, k, t, i). A group's products are added up in kChains sums, which its scale multiplies.
template <class Operand, int kAtATime, int64_t kInAll, int kChains = 1>
struct RowByRow : Operand {
  typedef Rows Sum;
  static constexpr int kTokens = kAtATime;
  static constexpr int64_t kMost = kInAll;
  template <int64_t kGroup, int kCount>
  static INLINE void add(const uint8_t* from, const Rows& scale, const typename Operand::Number* x, int64_t k, int64_t first,
                         Rows* total) {
    Rows sum[kChains][kCount] = {};
#pragma GCC unroll 4
    for (int64_t k8 = 0; k8 < kGroup; k8 += 8) {
      const Words words = load<Words>(from + k8 * 8);
#pragma GCC unroll 8
      for (int step = 0; step < Operand::kSteps; ++step) {
        const Rows weights = Operand::weights(words, step);
#pragma GCC unroll 8
        for (int t = 0; t < kCount; ++t) {
          Rows& chain = sum[step % kChains][t];
          const auto* numbers = Operand::template at<kCount>(x, k, t, first + k8 + Operand::place(step));
          chain = Operand::multiply_add(weights, numbers, chain);
        }
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      for (int c = 1; c < kChains; ++c) EACH_PART sum[0][t].part[p] += sum[c][t].part[p];
      EACH_PART total[t].part[p] = isa_multiply_add(sum[0][t].part[p], scale.part[p], total[t].part[p]);
    }
  }
  static INLINE Rows rows(const Rows& total) { return total; }
};

// Tokens in float: nibble i of a word is k = 2 i, or for the upper four 2 i - 7.
struct FloatOperand {
  typedef float Number;
  typedef Rows Scale;
  static constexpr int kSteps = 8;
  static constexpr int64_t place(int step) { return step < 4 ? 2 * step : 2 * step - 7; }
  template <int kCount>
  static INLINE const float* at(const float* x, int64_t k, int t, int64_t i) {
    return x + t * k + i;
  }
  static INLINE Rows weights(const Words& words, int step) {
    Rows values;
    EACH_PART values.part[p] = decode_e2m1(words.part[p], 4 * step);
    return values;
  }
  static INLINE Rows scaled(const Words& words, int step, const Rows& scale) {
    Rows values = weights(words, step);
    EACH_PART values.part[p] *= scale.part[p];
    return values;
  }
  static INLINE Rows multiply_add(const Rows& weights, const float* x, Rows sum) {
    const Floats number = all(*x);
    EACH_PART sum.part[p] = isa_multiply_add(weights.part[p], number, sum.part[p]);
    return sum;
  }
};

using FloatPanels = InPanels<TokenByToken<FloatOperand>>;
