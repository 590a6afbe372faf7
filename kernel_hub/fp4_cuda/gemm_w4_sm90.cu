// y[M, N] = tokens x FP4 weight^T on Hopper's tensor cores, any M.
//
// wgmma takes only operand A from registers, so the weights are A (64 rows a warpgroup), expanded from FP4 in registers,
// and the tokens are B (N = 8..256 tokens a tile) in shared memory. A producer warp streams prepared weight tiles and
// token tiles with bulk copies into a ring of stages; two consumer warpgroups expand and multiply. With few tokens the k
// range is split over the blocks of a cluster, which add up through distributed shared memory in a fixed order, so that
// the result is the same every time and no workspace exists.
//
//   bf16 / fp16 operands: the block scale is folded into the weight (exact: E2M1 x E4M3 has 6 significant bits).
//   e4m3 operands (mxfp4 W4A4): E2M1 x 2^e relative to the row's largest block is exact in E4M3; the tensor cores add FP8
//   products with few bits, so every 128 k the sum moves to FP32 registers.
#include "fp4_format.cuh"
#include "fp4_kernels.h"
#include "pipeline_sm90.cuh"
#include "wgmma_sm90.cuh"

namespace fp4 {
namespace {

constexpr int kGroups = 2;                    // consumer warpgroups
constexpr int kRows = 64 * kGroups;           // output features of a block
constexpr int kConsumers = 128 * kGroups;

// Tile sizes by tokens of a tile. Few tokens: many small stages in flight on two blocks per multiprocessor.
template <Operand kOperand, int kTokens>
struct Shape {
  static constexpr bool kFp8 = kOperand == Operand::kE4m3;
  // Accumulators of wide token tiles need more registers than an even share: the producer is then a whole warpgroup,
  // which hands its registers over.
  static constexpr bool kMoveRegisters = kTokens >= 128;
  static constexpr int kThreads = kConsumers + (kMoveRegisters ? 128 : 32);
  static constexpr int kBlocksPerSm = kTokens <= (kFp8 ? 32 : 64) ? 2 : 1;
  static constexpr int kTilesPerStage = kTokens <= 32 ? 4 : kTokens <= 128 ? 2 : 1;
  static constexpr int kStages = kTokens <= 16 ? 4 : kTokens <= 32 ? 3 : kTokens == 64 ? (kFp8 ? 8 : 3) : 5;
};

template <Operand kOperand, Format kFormat, int kTokens>
struct Traits {
  using S = Shape<kOperand, kTokens>;
  static constexpr bool kFp8 = S::kFp8;
  static constexpr int kStages = S::kStages;
  static constexpr int kTilesPerStage = S::kTilesPerStage;
  static constexpr int kWeightTile = tile_bytes(kFormat);
  static constexpr int kTokenTile = kTokens * (kFp8 ? 64 : 128);
  static constexpr int kWeightStage = kTilesPerStage * kWeightTile;  // of one warpgroup
  static constexpr int kStageBytes = (kGroups * kWeightStage + kTilesPerStage * kTokenTile + 127) / 128 * 128;
  static constexpr int kReduceStride = kRows + 4;
  static constexpr int kReduceBytes = kTokens * kReduceStride * 4;
  static constexpr int kRing = kStages * kStageBytes > kReduceBytes ? kStages * kStageBytes : kReduceBytes;
  static constexpr int kSmem = kRing + 256 + 128;  // barriers, alignment
};

struct GemmArgs {
  GemmProblem p;
  float factor;  // of this operand type, on top of row_scale
};

// No-swizzle K-major operand: 8 tokens x 16 bytes are contiguous, the next 8 tokens 128 bytes on, the next 16 bytes of k
// kTokens * 16 bytes on.
template <int kTokens>
__device__ __forceinline__ uint64_t token_descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) | (static_cast<uint64_t>(kTokens) << 16) |
         (static_cast<uint64_t>(8) << 32);
}

// ---- FP4 -> 16 bit ------------------------------------------------------------------------------------------------
// Four pairs of a word as bf16 bits of value * 2^-126 (see code_bits_*).
template <Format kFormat>
__device__ __forceinline__ void expand_word(uint32_t w, uint32_t (&pair)[4]) {
  constexpr uint32_t kAll = 0x81C081C0u, kMag = 0x01C001C0u, kSign = 0x80008000u;
  if constexpr (kFormat == Format::kNvfp4) {
    pair[0] = (w << 6) & kAll;
    pair[1] = (w << 2) & kAll;
    pair[2] = __funnelshift_r(w, w, 4) & kAll;
    pair[3] = (w & 0x81808180u) | ((w >> 8) & 0x00400040u);
  } else {
    pair[0] = ((w << 6) & kMag) | ((w << 8) & kSign);
    pair[1] = ((w << 2) & kMag) | (w & kSign);
    pair[2] = ((w >> 2) & kMag) | ((w << 12) & kSign);
    pair[3] = ((w >> 6) & kMag) | ((w << 4) & kSign);
  }
}

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t multiply_fp16(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The prepared scale byte in both halves, as the operand type.
template <Operand kOperand, Format kFormat>
__device__ __forceinline__ uint32_t expand_scale(uint32_t byte) {
  if constexpr (kOperand == Operand::kBf16) {
    return kFormat == Format::kNvfp4 ? byte * 0x00100010u + 0x76807680u : byte * 0x00800080u;
  } else {
    if constexpr (kFormat == Format::kNvfp4) return byte * 0x00800080u + 0x34003400u;
    return static_cast<uint32_t>(max(static_cast<int>(byte) - 223, 0)) * 0x04000400u;
  }
}

// One lane's 2 rows x 16 k -> the A fragments of four k16 steps.
template <Operand kOperand, Format kFormat>
__device__ __forceinline__ void expand16(uint4 raw, uint32_t scales, uint32_t (&a)[4][4]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  const uint32_t s[2] = {expand_scale<kOperand, kFormat>(scales & 0xFF), expand_scale<kOperand, kFormat>(scales >> 8)};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t pair[4];
    expand_word<kFormat>(words[w], pair);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t v = pair[i];
      if constexpr (kOperand == Operand::kFp16) {
        v = (v & 0x01C001C0u) * 8 + (v & 0x80008000u);  // exponent and mantissa sit three bits higher in fp16
        v = multiply_fp16(v, s[w / 2]);
      } else {
        v = multiply_bf16(v, s[w / 2]);
      }
      // Register order of A: row g k-low, row g+8 k-low, row g k-high, row g+8 k-high.
      a[(w % 2) * 2 + i / 2][(i % 2) * 2 + w / 2] = v;
    }
  }
}

// ---- FP4 -> E4M3 --------------------------------------------------------------------------------------------------
// E4M3 bytes of {0, .5, 1, 1.5, 2, 3, 4, 6} * 2^e for e = 6 - below: a table in two registers that prmt indexes.
__device__ __forceinline__ uint2 e4m3_table(int below) {
  if (below <= 11) {  // all normal: an exponent step is 8 in every byte but zero's
    const uint32_t step = static_cast<uint32_t>(11 - below) * 0x08080808u;
    // e = -5: 0, 2^-6, 2^-5, 1.5 * 2^-5 | 2^-4, 1.5 * 2^-4, 2^-3, 1.5 * 2^-3
    return make_uint2(0x14100800u + (step & 0xFFFFFF00u), 0x24201C18u + step);
  }
  switch (below) {  // subnormals, multiples of 2^-9; the last ones round to nearest even
    case 12: return make_uint2(0x0C080400u, 0x1C181410u);
    case 13: return make_uint2(0x06040200u, 0x14100C08u);
    case 14: return make_uint2(0x03020100u, 0x0C080604u);
    case 15: return make_uint2(0x02010000u, 0x06040302u);
    case 16: return make_uint2(0x00000000u, 0x03020201u);
    default: return make_uint2(0u, 0u);
  }
}

__device__ __forceinline__ void expand_word_e4m3(uint32_t w, uint2 table, uint32_t& first, uint32_t& second) {
  const uint32_t magnitudes = w & 0x77777777u;
  const uint32_t select0 = __byte_perm(magnitudes, 0, 0x4420), select1 = __byte_perm(magnitudes, 0, 0x4431);
  first = __byte_perm(table.x, table.y, select0) | (w & 0x80808080u);
  second = __byte_perm(table.x, table.y, select1) | ((w << 4) & 0x80808080u);
}

// One lane's 2 rows x 16 k -> the A fragments of two k32 steps.
__device__ __forceinline__ void expand8(uint4 raw, uint32_t scales, uint32_t (&a)[2][4]) {
  const uint2 t0 = e4m3_table(kTopScaleMxfp4 - static_cast<int>(scales & 0xFF));
  const uint2 t1 = e4m3_table(kTopScaleMxfp4 - static_cast<int>(scales >> 8));
  expand_word_e4m3(raw.x, t0, a[0][0], a[0][2]);
  expand_word_e4m3(raw.y, t0, a[1][0], a[1][2]);
  expand_word_e4m3(raw.z, t1, a[0][1], a[0][3]);
  expand_word_e4m3(raw.w, t1, a[1][1], a[1][3]);
}

// ---- The ring ------------------------------------------------------------------------------------------------------
template <class T>
struct Ring {
  uint32_t base, barriers;
  __device__ __forceinline__ uint32_t stage(int s) const { return base + s * T::kStageBytes; }
  __device__ __forceinline__ uint32_t full(int s) const { return barriers + s * 8; }
  __device__ __forceinline__ uint32_t empty(int s) const { return barriers + (T::kStages + s) * 8; }
};

struct Range {
  int first, count;  // k tiles of this block
};

template <class T, int kTokens>
__device__ void produce(const GemmProblem& p, const Ring<T>& ring, Range k, int token_block, int row_block) {
  const int stages = (k.count + T::kTilesPerStage - 1) / T::kTilesPerStage;
  const int last_row_tile = (p.n + 63) / 64 - 1;
  const uint64_t stream_once = policy_evict_first(), keep = policy_evict_last();
  const uint8_t* tokens = static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(token_block) * p.k_tiles * T::kTokenTile;

  auto tiles_of = [&](int i) { return min(T::kTilesPerStage, k.count - i * T::kTilesPerStage); };
  auto copy_weights = [&](int i) {
    const int s = i % T::kStages, tiles = tiles_of(i);
    barrier_expect(ring.full(s), tiles * (kGroups * T::kWeightTile + T::kTokenTile));
    for (int g = 0; g < kGroups; ++g) {
      const int row_tile = min(row_block * kGroups + g, last_row_tile);
      const int64_t tile = static_cast<int64_t>(row_tile) * p.k_tiles + k.first + i * T::kTilesPerStage;
      bulk_copy(ring.stage(s) + g * T::kWeightStage, p.weight + tile * T::kWeightTile, tiles * T::kWeightTile,
                ring.full(s), gridDim.y == 1 ? stream_once : keep);
    }
  };
  auto copy_tokens = [&](int i) {
    const int s = i % T::kStages;
    bulk_copy(ring.stage(s) + kGroups * T::kWeightStage,
              tokens + static_cast<int64_t>(k.first + i * T::kTilesPerStage) * T::kTokenTile, tiles_of(i) * T::kTokenTile,
              ring.full(s), keep);
  };

  // Weights never depend on an earlier kernel of this stream's token path: fetch them while it still runs.
  const int early = min(stages, T::kStages);
  for (int i = 0; i < early; ++i) copy_weights(i);
  grid_dependency_wait();
  for (int i = 0; i < early; ++i) copy_tokens(i);
  for (int i = early; i < stages; ++i) {
    barrier_wait(ring.empty(i % T::kStages), (i / T::kStages - 1) & 1);
    copy_weights(i);
    copy_tokens(i);
  }
}

__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}
__device__ __forceinline__ uint32_t load_shared2(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(address));
  return v;
}

// What a consumer thread knows about its place.
template <class T, Format kFormat>
struct Lane {
  uint32_t codes, scales;  // offsets inside a stage
  __device__ __forceinline__ Lane() {
    const int group = threadIdx.x / 128, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    codes = group * T::kWeightStage + warp * 512 + lane * 16;
    const int in_warp = kFormat == Format::kNvfp4 ? warp * 64 + lane * 2 : warp * 32 + (lane / 4 * 2 + lane % 4 / 2) * 2;
    scales = group * T::kWeightStage + kTileCodeBytes + in_warp;
  }
};

// bf16 / fp16: while the tensor cores multiply tile i, tile i + 1 is expanded into the other register buffer.
template <class T, Operand kOperand, Format kFormat, int kTokens>
__device__ __forceinline__ void consume16(const Ring<T>& ring, int tiles, float (&acc)[kTokens / 2]) {
  const Lane<T, kFormat> lane;
  uint32_t a[2][4][4];
  auto expand = [&](int i, uint32_t (&dst)[4][4]) {
    const int stage = i / T::kTilesPerStage, in_stage = i % T::kTilesPerStage, s = stage % T::kStages;
    if (in_stage == 0) barrier_wait(ring.full(s), (stage / T::kStages) & 1);
    const uint32_t base = ring.stage(s) + in_stage * T::kWeightTile;
    expand16<kOperand, kFormat>(load_shared16(base + lane.codes), load_shared2(base + lane.scales), dst);
  };
  auto multiply = [&](int i, uint32_t (&src)[4][4]) {
    const int s = i / T::kTilesPerStage % T::kStages;
    const uint32_t tokens = ring.stage(s) + kGroups * T::kWeightStage + i % T::kTilesPerStage * T::kTokenTile;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 4; ++j)
      Wgmma<kOperand, kTokens>::run(acc, src[j], token_descriptor<kTokens>(tokens + j * kTokens * 32), 1);
    wgmma_commit();
  };
  auto release = [&](int i) {  // tile i has been multiplied
    if (i % T::kTilesPerStage == T::kTilesPerStage - 1 && threadIdx.x % 32 == 0)
      barrier_arrive(ring.empty(i / T::kTilesPerStage % T::kStages));
  };

  if (tiles == 0) return;
  expand(0, a[0]);
  for (int i = 0; i < tiles; i += 2) {
    multiply(i, a[0]);
    if (i > 0) {
      wgmma_wait<1>();
      release(i - 1);
    }
    if (i + 1 < tiles) {
      expand(i + 1, a[1]);
      multiply(i + 1, a[1]);
      wgmma_wait<1>();
      release(i);
      if (i + 2 < tiles) expand(i + 2, a[0]);
    }
  }
  wgmma_wait<0>();
}

// E4M3: two tiles (128 k) are added inside the tensor cores, then move to FP32.
template <class T, int kTokens>
__device__ __forceinline__ void consume8(const Ring<T>& ring, int tiles, float (&acc)[kTokens / 2]) {
  const Lane<T, Format::kMxfp4> lane;
  uint32_t a[2][4][4];
  float part[kTokens / 2];
  const int pairs = (tiles + 1) / 2;
  auto expand = [&](int pair, uint32_t (&dst)[4][4]) {
    const int i = 2 * pair, stage = i / T::kTilesPerStage, in_stage = i % T::kTilesPerStage, s = stage % T::kStages;
    if (in_stage == 0) barrier_wait(ring.full(s), (stage / T::kStages) & 1);
    const uint32_t base = ring.stage(s) + in_stage * T::kWeightTile;
    uint32_t half[2][4];
    expand8(load_shared16(base + lane.codes), load_shared2(base + lane.scales), half);
#pragma unroll
    for (int r = 0; r < 4; ++r) dst[0][r] = half[0][r], dst[1][r] = half[1][r];
    if (i + 1 < tiles) {
      expand8(load_shared16(base + T::kWeightTile + lane.codes), load_shared2(base + T::kWeightTile + lane.scales), half);
    } else {
#pragma unroll
      for (int r = 0; r < 4; ++r) half[0][r] = half[1][r] = 0;
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) dst[2][r] = half[0][r], dst[3][r] = half[1][r];
  };
  auto multiply = [&](int pair, uint32_t (&src)[4][4]) {
    const int i = 2 * pair, s = i / T::kTilesPerStage % T::kStages;
    const uint32_t tokens = ring.stage(s) + kGroups * T::kWeightStage + i % T::kTilesPerStage * T::kTokenTile;
    const uint32_t second = i + 1 < tiles ? tokens + T::kTokenTile : tokens;  // with zero weights
    wgmma_fence();
    Wgmma<Operand::kE4m3, kTokens>::run(part, src[0], token_descriptor<kTokens>(tokens), 0);
    Wgmma<Operand::kE4m3, kTokens>::run(part, src[1], token_descriptor<kTokens>(tokens + kTokens * 32), 1);
    Wgmma<Operand::kE4m3, kTokens>::run(part, src[2], token_descriptor<kTokens>(second), 1);
    Wgmma<Operand::kE4m3, kTokens>::run(part, src[3], token_descriptor<kTokens>(second + kTokens * 32), 1);
    wgmma_commit();
  };
  auto finish = [&](int pair) {
    wgmma_wait<0>();
#pragma unroll
    for (int r = 0; r < kTokens / 2; ++r) acc[r] += part[r];
    const int i = 2 * pair + 1;
    if (i % T::kTilesPerStage == T::kTilesPerStage - 1 && threadIdx.x % 32 == 0)
      barrier_arrive(ring.empty(i / T::kTilesPerStage % T::kStages));
  };

  if (tiles == 0) return;
  expand(0, a[0]);
  for (int pair = 0; pair < pairs; pair += 2) {
    multiply(pair, a[0]);
    if (pair + 1 < pairs) expand(pair + 1, a[1]);
    finish(pair);
    if (pair + 1 < pairs) {
      multiply(pair + 1, a[1]);
      if (pair + 2 < pairs) expand(pair + 2, a[0]);
      finish(pair + 1);
    }
  }
}

// ---- Epilogue ------------------------------------------------------------------------------------------------------
template <typename Out>
__device__ __forceinline__ uint32_t pack_pair(float a, float b);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float a, float b) {
  __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&v);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float a, float b) {
  __half2 v = __floats2half2_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&v);
}

// Each block of the cluster adds up and writes its share of the tokens x rows, 8 rows at a time.
template <class T, int kTokens, typename Out>
__device__ void write_output(const GemmArgs& args, uint32_t reduce, int token_block, int row_block, int split, int rank) {
  const GemmProblem& p = args.p;
  const int tokens = min(kTokens, p.m - token_block * kTokens);
  const Out* bias = static_cast<const Out*>(p.bias);
  Out* out = static_cast<Out*>(p.out);
  for (int c = rank * kConsumers + threadIdx.x; c < tokens * (kRows / 8); c += split * kConsumers) {
    const int token = c / (kRows / 8), row = c % (kRows / 8) * 8;
    const int n = row_block * kRows + row;
    if (n >= p.n) continue;
    const int m = token_block * kTokens + token;
    const uint32_t address = reduce + (token * T::kReduceStride + row) * 4;
    float v[8] = {};
    for (int r = 0; r < split; ++r) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float4 f = load_cluster(address + h * 16, r);
        v[4 * h] += f.x, v[4 * h + 1] += f.y, v[4 * h + 2] += f.z, v[4 * h + 3] += f.w;
      }
    }
    const float token_scale = p.token_scale != nullptr ? p.token_scale[m * p.token_scale_stride] : 1.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] *= (p.row_scale[n + i] * args.factor) * token_scale;
      if (bias != nullptr) v[i] += static_cast<float>(bias[n + i]);
    }
    const uint4 packed = make_uint4(pack_pair<Out>(v[0], v[1]), pack_pair<Out>(v[2], v[3]), pack_pair<Out>(v[4], v[5]),
                                    pack_pair<Out>(v[6], v[7]));
    *reinterpret_cast<uint4*>(out + static_cast<int64_t>(m) * p.n + n) = packed;
  }
}

template <class T, int kTokens>
__device__ __forceinline__ void store_accumulators(float* reduce, const float (&acc)[kTokens / 2]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  reduce += 2 * t * T::kReduceStride + warp * 16 + g;
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i) {
    float* r = reduce + i * 8 * T::kReduceStride;
    r[0] = acc[4 * i];
    r[T::kReduceStride] = acc[4 * i + 1];
    r[8] = acc[4 * i + 2];
    r[T::kReduceStride + 8] = acc[4 * i + 3];
  }
}

__device__ __forceinline__ void consumer_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

template <Operand kOperand, Format kFormat, int kTokens>
__global__ void __launch_bounds__(Shape<kOperand, kTokens>::kThreads, Shape<kOperand, kTokens>::kBlocksPerSm)
    gemm_w4_kernel(const __grid_constant__ GemmArgs args) {
  using T = Traits<kOperand, kFormat, kTokens>;
  extern __shared__ uint8_t raw[];
  const GemmProblem& p = args.p;
  const uint32_t base = (smem_address(raw) + 127) & ~127u;
  const Ring<T> ring{base, base + T::kRing};
  const int split = gridDim.x, rank = blockIdx.x, token_block = blockIdx.y, row_block = blockIdx.z;
  const int first = static_cast<int>(static_cast<int64_t>(p.k_tiles) * rank / split);
  const Range k{first, static_cast<int>(static_cast<int64_t>(p.k_tiles) * (rank + 1) / split) - first};

  if (threadIdx.x == kConsumers) {
    for (int s = 0; s < T::kStages; ++s) {
      barrier_init(ring.full(s), 1);
      barrier_init(ring.empty(s), 4 * kGroups);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (threadIdx.x >= kConsumers) {
    if constexpr (Shape<kOperand, kTokens>::kMoveRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == kConsumers) produce<T, kTokens>(p, ring, k, token_block, row_block);
  } else {
    if constexpr (Shape<kOperand, kTokens>::kMoveRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    float acc[kTokens / 2];
#pragma unroll
    for (int r = 0; r < kTokens / 2; ++r) acc[r] = 0.0f;
    if constexpr (T::kFp8) consume8<T, kTokens>(ring, k.count, acc);
    else consume16<T, kOperand, kFormat, kTokens>(ring, k.count, acc);

    grid_dependency_wait();
    consumer_sync();  // every stage has been read: the ring becomes the reduction buffer
    store_accumulators<T, kTokens>(reinterpret_cast<float*>(raw + (base - smem_address(raw))), acc);
    if (split > 1) cluster_sync();
    else consumer_sync();
    if (p.out_is_bf16) write_output<T, kTokens, __nv_bfloat16>(args, base, token_block, row_block, split, rank);
    else write_output<T, kTokens, __half>(args, base, token_block, row_block, split, rank);
    if (split > 1) cluster_sync();  // a peer may still read this block's shared memory
  }
}

int choose_split(int blocks, int k_tiles, int slots) {
  int split = slots / blocks;
  if (split > 8) split = 8;
  while (split > 1 && k_tiles / split < 4) --split;
  return split < 1 ? 1 : split;
}

int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

template <Operand kOperand, Format kFormat, int kTokens>
void launch(const GemmProblem& p, cudaStream_t stream) {
  using T = Traits<kOperand, kFormat, kTokens>;
  const auto kernel = gemm_w4_kernel<kOperand, kFormat, kTokens>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSmem), "shared memory");
  const int token_blocks = (p.m + kTokens - 1) / kTokens, row_blocks = (p.n + kRows - 1) / kRows;
  const int split = p.split > 0 ? p.split
                                : choose_split(token_blocks * row_blocks, p.k_tiles,
                                               multiprocessors() * Shape<kOperand, kTokens>::kBlocksPerSm);
  const float factor = kOperand == Operand::kE4m3 ? 1.0f / 64.0f
                       : kOperand == Operand::kFp16 && kFormat == Format::kMxfp4 ? 0.5f : 1.0f;
  launch_after(kernel, dim3(split, token_blocks, row_blocks), dim3(Shape<kOperand, kTokens>::kThreads), T::kSmem, split, stream,
               GemmArgs{p, factor});
}

template <Operand kOperand, Format kFormat>
void dispatch_tokens(const GemmProblem& p, cudaStream_t stream) {
  switch (p.token_tile) {
    case 8: return launch<kOperand, kFormat, 8>(p, stream);
    case 16: return launch<kOperand, kFormat, 16>(p, stream);
    case 32: return launch<kOperand, kFormat, 32>(p, stream);
    case 64: return launch<kOperand, kFormat, 64>(p, stream);
    case 128: return launch<kOperand, kFormat, 128>(p, stream);
    case 256:
      if constexpr (kOperand != Operand::kE4m3) return launch<kOperand, kFormat, 256>(p, stream);
      break;
  }
  throw std::runtime_error("gemm_w4_sm90: token_tile must be 8, 16, 32, 64, 128 or (not for E4M3) 256, got " +
                           std::to_string(p.token_tile));
}

}  // namespace

void run_gemm_sm90(const GemmProblem& p, cudaStream_t stream) {
  if (p.m == 0) return;
  const bool nvfp4 = p.format == static_cast<int>(Format::kNvfp4);
  switch (static_cast<Operand>(p.operand)) {
    case Operand::kBf16:
      return nvfp4 ? dispatch_tokens<Operand::kBf16, Format::kNvfp4>(p, stream)
                   : dispatch_tokens<Operand::kBf16, Format::kMxfp4>(p, stream);
    case Operand::kFp16:
      return nvfp4 ? dispatch_tokens<Operand::kFp16, Format::kNvfp4>(p, stream)
                   : dispatch_tokens<Operand::kFp16, Format::kMxfp4>(p, stream);
    case Operand::kE4m3: return dispatch_tokens<Operand::kE4m3, Format::kMxfp4>(p, stream);
  }
}

}  // namespace fp4
