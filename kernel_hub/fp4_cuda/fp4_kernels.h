// Launchers behind the torch bindings: plain pointers and sizes, no torch types.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <functional>

namespace fp4 {

// Of a layer of experts: where each one's rows start, in rows sorted by expert, and which token a row is.
struct Routing {
  const void* offsets;  // int32 or int64 [experts + 1]
  const void* index;    // int32 or int64 [rows], or null: row i is token i
  bool offsets_are_64, index_is_64;
  int experts;
};

struct ActivationProblem {
  const void* x;   // bf16 or fp16 [M, K]
  const void* up;  // null, or as x: what is rotated is SiLU(x) * up. Not for packed and plain outputs
  int64_t stride;  // values from a token of x, and of up, to the next; K without up
  bool x_is_bf16;
  const float* global;  // float32 [1], divisor, or null: per-token range
  void* out;
  uint8_t* scales;
  float* token_scale;
  int m, k, k_padded;
  int token_tile;  // tokens per tile of the tiled output
  int hadamard;    // 0 or 16..128
  int rule;        // ScaleRule
  int format;      // Format
  int operand;     // Operand of the output
  bool rows;       // E4M3: row-major, for the library's product, instead of tiles
  bool quantize;   // false: rotate only
  bool packed;     // codes and row-major scales instead of tiles
  bool plain;      // row-major values instead of tiles
  bool natural;    // tiles of up to 8 tokens, for run_gemv
  bool experts;    // run_experts follows, which reads the routing before it waits for this kernel
};

// One linear: its weight and its results.
struct GemmPart {
  const uint8_t* weight;   // prepared weight
  const float* row_scale;  // float32 [N]
  const void* bias;        // output dtype [N], or null
  void* out;               // bf16 or fp16 [M, N]
  int n;
};

constexpr int kMostParts = 3;

// Up to three linears with the same tokens, such as q, k and v. The first one is the problem itself.
struct GemmProblem : GemmPart {
  GemmPart others[kMostParts - 1];
  int parts;
  const void* x;             // tiled tokens
  const float* token_scale;  // float32 [1] or [M], or null
  int token_scale_stride;
  bool out_is_bf16;
  int m, k_tiles;
  int token_tile;
  int format;
  int operand;
  // 0: all chosen here. Other values are for measuring and for tests.
  // Up to 16 tokens of 16 bit (run_gemv): the variant, 1..4; of more than 8, 1..3, of which the last is run_gemm_sm90's. All
  // others (run_gemm_sm90; the operand was chosen when the tokens were prepared, OPERANDS in _cuda.py): of how many blocks an
  // item may have parts. 1: K is not divided.
  int split;
};

// Device memory that stays until what is launched next on the stream has ended.
using Allocate = std::function<void*(int64_t bytes)>;

// One linear of all experts of a layer.
struct ExpertsProblem {
  const uint8_t* weight;     // prepared weights, [experts, ...]
  const float* row_scale;    // float32 [experts, N]
  const void* x;             // tokens in 16-bit tiles of one token
  const float* token_scale;  // float32 [1] or [tokens], or null
  int token_scale_stride;
  const void* bias;  // output dtype [experts, N], or null
  void* out;         // bf16 or fp16 [rows, N]
  bool out_is_bf16;
  int rows, n, k_tiles;
  int tile;  // rows of a tile: 8, 16, 32 or 96
  int format;
  int operand;
  Routing routing;
};

// Blocks of so many rows, of which none has rows of two linears.
inline int row_blocks_of(const GemmProblem& p, int rows) {
  int blocks = (p.n + rows - 1) / rows;
  for (int i = 0; i + 1 < p.parts; ++i) blocks += (p.others[i].n + rows - 1) / rows;
  return blocks;
}

struct PrepareProblem {
  const uint8_t* weight;  // uint8 [N, K/2]
  const uint8_t* scale;   // E4M3 [N, K/16] or E8M0 [N, K/32]
  const float* global;    // float32 [1] or null
  uint8_t* packed;
  float* row_scale;
  int n, k;
  int format;
  int experts;  // so many matrices one after the other, `global` has one value for each
};

// Row-major E4M3 [N, K] of a prepared mxfp4 weight, and what to multiply each row by.
void run_expand_e4m3(const PrepareProblem& p, uint8_t* out, float* out_scale, cudaStream_t stream);
void run_activation(const ActivationProblem& p, cudaStream_t stream);
void run_gemv(const GemmProblem& p, const Allocate& allocate, cudaStream_t stream);
void run_gemm_sm90(const GemmProblem& p, const Allocate& allocate, cudaStream_t stream);
void run_experts(const ExpertsProblem& p, cudaStream_t stream);
void run_prepare(const PrepareProblem& p, cudaStream_t stream);
void run_restore(const PrepareProblem& p, uint8_t* weight, uint8_t* scale, cudaStream_t stream);

}  // namespace fp4
