// What every instruction set implements. Each function works on a range, which the caller spreads over threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fp4_cpu {

enum Format { kNvfp4 = 0, kMxfp4 = 1 };
enum Rule { kAbsmax = 0, kFourOverSix = 1, kMse = 2 };

// A prepared weight is tiles of 16 rows x 64 k: the codes of 8 k at a time, one 32-bit word per row, then the scale bytes of
// one group at a time, one per row. In a word the even k come first, so that 16-bit halves shifted by 4 j hold k = 2 j and 2 j
// + 1.
constexpr int64_t kRows = 16, kTile = 64, kCodeBytes = kRows * kTile / 2;

constexpr int64_t group_of(Format format) { return format == kNvfp4 ? 16 : 32; }
constexpr int64_t tile_bytes(Format format) { return kCodeBytes + kRows * kTile / group_of(format); }

struct Activation {
  const void* x;  // [m, k], bf16 or float
  bool x_is_bf16;
  int64_t k, k_padded;
  const float* global;  // the nvfp4 divisor, or null: per token
  Format format;
  int64_t hadamard;  // 0: none
  Rule rule;
  bool quantize;
  void* values;  // [m, k_padded]: code * block scale, or what was rotated; or null
  bool values_are_bf16;
  uint8_t* codes;      // [m, k / 2], or null
  uint8_t* scales;     // [m, k / group], or null
  float* token_scale;  // [m] or [1], a multiplier; null if nothing is quantized
  bool per_token;
};

struct Product {
  const uint8_t* packed;
  const float* row_scale;  // [n]
  const void* tokens;      // [m, 64 k_tiles], for product_bf16 bf16 and interleaved, else float
  const float* token_scale;
  int64_t token_scale_stride;
  const void* bias;  // [n] in the output's dtype, or null
  void* out;         // [m, n]
  bool out_is_bf16;
  int64_t m, n, k_tiles;
  Format format;
};

// A block of columns in GPTQ: every pointer is at the block's first column, that of a matrix at its diagonal.
struct SolveBlock {
  float* columns;                // [count, n]
  const float *steps, *inverse;  // [count, n]
  const float* upper;
  float *quantized, *errors;  // [count, n]
  int64_t n, stride, count;   // stride: of upper
};

struct DescendBlock {
  float *current, *gradient;  // [count, n]
  uint8_t* scale;             // [count / group, n]
  const float* matrix;
  const float* global;
  float* moved;  // [count, n], by how much the values became smaller
  int64_t n, stride, count;
  Format format;
};

struct ScaleSearch {
  const float* weight;      // [n, k]
  const float* importance;  // [k], or null
  const float* global;
  const uint8_t* base;   // [n, k / group]
  const int32_t* steps;  // what is added to it, in the order of preference
  int64_t count;         // of steps
  uint8_t* scales;       // [n, k / group]
  int64_t k;
  Format format;
};

// Some tokens of which second += x^T x, up to the end of the panel that a row is in, and cross += original^T x.
struct Moments {
  const uint16_t *x, *original;  // bf16 [tokens, k]; original may be null
  int64_t tokens, token_tiles, k, panel;
  float *second, *cross;                     // [k, k]
  uint16_t *columns, *rows, *original_rows;  // [k / 16, token_tiles, 512] to work in
};

constexpr int64_t kMomentTokens = 512, kNever = INT64_MAX;

struct Kernels {
  const char* name;
  int64_t bf16_from;  // how many tokens are multiplied in bf16, if they fit in it
  void (*activation)(const Activation&, float* row, int64_t begin, int64_t end);  // tokens; row: k_padded floats of its own
  void (*product)(const Product&, int64_t begin, int64_t end);                    // blocks of 16 rows; float tokens
  void (*product_bf16)(const Product&, int64_t begin, int64_t end);
  // Tiles of 64 k of bf16 tokens [m, k] as product_bf16 takes them; or null: as they are. One token stays the same.
  void (*interleave)(const uint16_t* x, int64_t m, int64_t k, uint16_t* to, int64_t begin, int64_t end);
  void (*solve)(const SolveBlock&, int64_t begin, int64_t end);      // strips of 16 rows
  void (*descend)(const DescendBlock&, int64_t begin, int64_t end);  // strips of 16 rows
  void (*scales)(const ScaleSearch&, int64_t begin, int64_t end);    // rows
  void (*pack_moments)(const Moments&, int64_t begin, int64_t end);  // 16 features each; or null
  void (*add_moments)(const Moments&, int64_t begin, int64_t end);   // 32 features each
};

// The best for this processor, or what HF_FP4_CPU_ISA names; null, with what is possible, if it cannot be had.
const Kernels* find_kernels(const char** possible);

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Bf16, kAmx;
#endif

}  // namespace fp4_cpu
