// Products of bf16 matrices in AMX's tiles. Included inside the namespace of isa_avx512.cpp.
//
// A tile has 16 rows of 64 bytes: of A 16 rows of 32 numbers, of B 16 pairs of k by 16 columns, of C 16 x 16 floats. Sums are
// added up in float; AMX takes denormal floats for zero. The intrinsics do not tell the compiler that they read memory.

INLINE void memory_is_current() { __asm__ volatile("" ::: "memory"); }

// C is tiles 0 to 3, A 4 and 5, B 6 and 7; with fewer rows in `short_tiles`, a set of bits.
INLINE void configure_tiles(int short_tiles, int64_t rows) {
  struct {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(short_tiles >> i & 1 ? rows : 16);
  }
  memory_is_current();
  _tile_loadconfig(&config);
}

// Many tokens: 16 at a time are A, as they lie in memory, and what Bf16Operand decodes of 16 rows is B.
struct AmxPanel : Bf16Operand {
  static constexpr int64_t kTiles = 2, kBlocks = 4;
  static void start(int64_t count) { configure_tiles(0x1f, count < 16 ? count : 16); }
  static void stop() { _tile_release(); }
  static void add(const Rows* panel, int64_t k_count, const uint16_t* x, int64_t k, int64_t count, float* sums) {
    constexpr int64_t kColumns = kBlocks * kRows, kSumBytes = kColumns * 4, kPanelBytes = kBlocks * sizeof(Rows);
    const int64_t rest = count > 16 ? count % 16 : 0;
    for (int64_t token = 0; token < count; token += 16) {
      if (rest != 0 && token == count - rest) configure_tiles(0x1f, rest);
      float* sum = sums + token * kColumns;
      memory_is_current();
      _tile_loadd(0, sum, kSumBytes);
      _tile_loadd(1, sum + kRows, kSumBytes);
      _tile_loadd(2, sum + 2 * kRows, kSumBytes);
      _tile_loadd(3, sum + 3 * kRows, kSumBytes);
      for (int64_t first = 0; first < k_count; first += 32) {
        const Rows* weights = panel + first / 2 * kBlocks;
        _tile_loadd(4, x + token * k + first, k * 2);
        _tile_loadd(6, weights, kPanelBytes);
        _tile_loadd(7, weights + 1, kPanelBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(6, weights + 2, kPanelBytes);
        _tile_loadd(7, weights + 3, kPanelBytes);
        _tile_dpbf16ps(2, 4, 6);
        _tile_dpbf16ps(3, 4, 7);
      }
      _tile_stored(0, sum, kSumBytes);
      _tile_stored(1, sum + kRows, kSumBytes);
      _tile_stored(2, sum + 2 * kRows, kSumBytes);
      _tile_stored(3, sum + 3 * kRows, kSumBytes);
      memory_is_current();
    }
    if (rest != 0) start(16);
  }
};

struct AmxMoments {
  static void start() { configure_tiles(0, 0); }
  static void stop() { _tile_release(); }
  template <bool kTwoRows, bool kTwoColumns>
  static void add(const uint16_t* a, const uint16_t* b, int64_t tiles, float* total, int64_t k) {
    memory_is_current();
    _tile_loadd(0, total, k * 4);
    if (kTwoColumns) _tile_loadd(1, total + 16, k * 4);
    if (kTwoRows) _tile_loadd(2, total + 16 * k, k * 4);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, total + 16 * k + 16, k * 4);
    for (int64_t i = 0; i < tiles; ++i, a += kTileNumbers, b += kTileNumbers) {
      _tile_loadd(4, a, 64);
      _tile_loadd(6, b, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (kTwoColumns) _tile_loadd(7, b + tiles * kTileNumbers, 64);
      if (kTwoColumns) _tile_dpbf16ps(1, 4, 7);
      if (kTwoRows) _tile_loadd(5, a + tiles * kTileNumbers, 64);
      if (kTwoRows) _tile_dpbf16ps(2, 5, 6);
      if (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, total, k * 4);
    if (kTwoColumns) _tile_stored(1, total + 16, k * 4);
    if (kTwoRows) _tile_stored(2, total + 16 * k, k * 4);
    if (kTwoRows && kTwoColumns) _tile_stored(3, total + 16 * k + 16, k * 4);
    memory_is_current();
  }
};
