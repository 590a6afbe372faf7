// The ring of stages that a producer fills with prepared weights and tokens, and how a consumer warpgroup multiplies 16-bit
// operands from it.
#pragma once

#include "expand_fp4.cuh"
#include "pipeline_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace fp4 {

template <class T>
struct Ring {
  uint32_t base, barriers;
  __device__ __forceinline__ uint32_t stage(int s) const { return base + s * T::kStageBytes; }
  __device__ __forceinline__ uint32_t full(int s) const { return barriers + s * 8; }
  __device__ __forceinline__ uint32_t empty(int s) const { return barriers + (T::kStages + s) * 8; }
  // Called by whole warps: each of a stage's consumers has read it.
  __device__ __forceinline__ void release(int s) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(empty(s));
  }
};

// A place in the ring, moved on without divisions.
template <class T>
struct Cursor {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == T::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Descriptors of tiles of tokens: offsets, in units of 16 bytes, concern the lower half of a descriptor only. kKept: where
// there are registers for it.
template <bool kKept = true>
struct TokenDescriptors {
  uint32_t low, high;
  __device__ __forceinline__ explicit TokenDescriptors(uint64_t first)
      : low(kKept ? uniform(static_cast<uint32_t>(first)) : static_cast<uint32_t>(first)),
        high(static_cast<uint32_t>(first >> 32)) {}
  __device__ __forceinline__ uint64_t at(uint32_t offset) const { return static_cast<uint64_t>(high) << 32 | (low + offset); }
};

// What is computed from v is computed after all volatile instructions above: products are to be on their way first.
__device__ __forceinline__ void not_before(uint4& v) { asm volatile("" : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)); }

// While the tensor cores multiply tile i, tile i + 1 is expanded into the other register buffer and the codes of tile i + 2
// are on their way from shared memory. A warp's own instructions are what a tile takes longest for: all that is the same for
// every tile is computed before the loop, and tiles far from the end are not checked for being the last.
//
// `at` is the first stage and becomes the one after the last.
template <class T, Operand kOperand, Format kFormat, int kTokens>
__device__ __forceinline__ void consume16(const Ring<T>& ring, int tiles, Cursor<T>& at, float (&acc)[kTokens / 2]) {
  constexpr int kPerStage = T::kTilesPerStage, kUnroll = kPerStage < 2 ? 2 : kPerStage, kAhead = 2;
  const int group = threadIdx.x / 128, slice = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t weights = ring.base + T::kWeightOffset + group * T::kWeightStage;
  const uint32_t codes = weights + codes_offset(slice, lane), scales = weights + scales_offset(kFormat, slice, lane);
  const uint32_t first_token = ring.base + T::kTokenOffset;
  const TokenDescriptors<> tokens(T::kSwizzled ? swizzled_descriptor(first_token) : token_descriptor<kTokens>(first_token));
  constexpr int kStep = T::kSwizzled ? 2 : kTokens * 2;  // 16 k, in units of 16 bytes
  uint32_t a[2][4][4], raw_scales;
  uint4 raw;
  Cursor<T> read = at, multiplied = at;  // the stages of raw, and of what is multiplied
  int last = 0;                          // the stage before that, where there is a register for it
  auto load = [&](int in_stage) {
    if (in_stage == 0) barrier_wait(ring.full(read.stage), read.phase);
    const uint32_t offset = read.stage * T::kWeightStride + in_stage * T::kWeightTile;
    raw = load_shared16(codes + offset);
    raw_scales = load_shared2(scales + offset);
    if (in_stage == kPerStage - 1) read.next();
  };
  auto release_last = [&] { ring.release(T::kKeepsLast ? last : (multiplied.stage == 0 ? T::kStages : multiplied.stage) - 1); };
  auto next_stage = [&] {
    last = multiplied.stage;
    multiplied.next();
  };
  auto multiply = [&](int in_stage, uint32_t (&src)[4][4]) {
    const uint32_t tile = multiplied.stage * (T::kTokenStride / 16) + in_stage * (T::kTokenTile / 16);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j) Wgmma<kOperand, kTokens>::run(acc, src[j], tokens.at(tile + j * kStep), 1);
    wgmma_commit();
  };
  // Tile i, the u-th of an iteration.
  auto step = [&](int i, int u, bool far_from_end) {
    multiply(u % kPerStage, a[u & 1]);
    wgmma_wait<1>();  // tile i - 1 has been multiplied: its registers and perhaps its stage are free
    if (u % kPerStage == 0 && i > 0) release_last();
    if (u % kPerStage == kPerStage - 1) next_stage();
    if (far_from_end || i + 1 < tiles) {
      not_before(raw);
      expand16<kOperand, kFormat>(raw, raw_scales, a[(u + 1) & 1]);
    }
    if (far_from_end || i + kAhead < tiles) load((u + kAhead) % kPerStage);
  };

  if (tiles == 0) return;
  load(0);
  expand16<kOperand, kFormat>(raw, raw_scales, a[0]);
  if (tiles > 1) load(1 % kPerStage);
  int i = 0;
  for (; i + kUnroll - 1 + kAhead < tiles; i += kUnroll) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) step(i + u, u, true);
  }
  for (; i < tiles; i += kUnroll) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (i + u < tiles) step(i + u, u, false);
    }
  }
  wgmma_wait<0>();
  if (tiles % kPerStage != 0) next_stage();
  at = multiplied;
  release_last();
}

// Four 8 x 8 matrices of 16 bit, transposed: lane 8i + j has the address where column j of matrix i becomes a row.
__device__ __forceinline__ void store_transposed(uint32_t address, const uint32_t (&m)[2][2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m[0][0]),
               "r"(m[0][1]), "r"(m[1][0]), "r"(m[1][1])
               : "memory");
}

}  // namespace fp4
