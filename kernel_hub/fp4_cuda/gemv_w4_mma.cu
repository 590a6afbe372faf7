// y[M, N] = tokens x FP4 weight^T for a few tokens (M <= 16): bytes and latency are everything.
//
// A block owns a few units of 16 to 64 output rows and all of K; its warps split K and add up in shared memory in a fixed
// order, so no second pass and no cluster is needed. Each warp has a ring of its own, which bulk copies fill several tiles
// ahead with weights, before the activation kernel has ended, and with tokens. (Loads into registers do not run ahead: the
// compiler counts all of them with one scoreboard, so that a warp waits for the last one.) mma.sync m16n8k16 multiplies, with
// the weights as A and the tokens as its 8 columns, which costs the same for 1 token as for 8.
//
// Up to 8 tokens come in an order of their own, of which any number can be copied alone; 9 to 16 as wgmma takes them, since for
// many rows gemm_w4_sm90.cu is faster.
#include <algorithm>

#include "expand_fp4.cuh"
#include "fp4_kernels.h"
#include "gemm_parts.cuh"
#include "mma_sm80.cuh"
#include "pipeline_sm90.cuh"

namespace fp4 {
namespace {

struct GemvArgs {
  GemmProblem p;
  float factor;
  int units;  // of all linears
};

// kColumns: blocks of 8 tokens. kSlices: 16-row slices of a unit. kStages: tiles of a warp's ring. kBlocks: so many at a time
// on a multiprocessor and no more: where there was room for others, those of the next kernel would not spread evenly.
template <int kColumns_, int kSlices_, int kWarps_, int kStages_, int kBlocks_>
struct GemvShape {
  static constexpr int kColumns = kColumns_, kSlices = kSlices_, kWarps = kWarps_, kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kRows = 16 * kSlices, kTokens = 8 * kColumns;
  static constexpr int kTokenBytes = kTokens * 128;  // of 64 k, prepared
  static constexpr int kRowStride = kRows + 4;       // of a token's partial sums
};

constexpr int kMultiprocessorBytes = 228 << 10, kBlockBytes = 1 << 10;  // of shared memory; what the system takes of a block's

// Shared memory: each warp's ring, the rings' barriers, and twice every warp's partial sums.
template <class S, Format kFormat>
struct Places {
  static constexpr int kWeights = S::kSlices * (tile_bytes(kFormat) / kSlicesPerTile);
  int stage, barriers, partial, end;
  __host__ __device__ static int token_bytes(int m) { return S::kColumns == 1 ? m * 128 : S::kTokenBytes; }  // of a tile
  __host__ __device__ __forceinline__ explicit Places(int m) {
    stage = kWeights + token_bytes(m);
    barriers = S::kWarps * S::kStages * stage;
    partial = barriers + (S::kWarps * S::kStages * 8 + 15) / 16 * 16;
    end = partial + 2 * S::kWarps * m * S::kRowStride * 4;
    const int most = (kMultiprocessorBytes / (S::kBlocks + 1) - kBlockBytes) / 128 * 128;  // that one more block could have
    end = end > most ? end : most + 128;
  }
};

// partial: [warps, m, kRowStride].
template <class S>
__device__ __forceinline__ void write_outputs(const GemmProblem& p, float factor, const float* partial, int n0) {
  for (int e = threadIdx.x; e < p.m * S::kRows; e += S::kWarps * 32) {
    const int m = e / S::kRows, row = e % S::kRows, n = n0 + row;
    if (n >= p.n) continue;
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) v += partial[(w * p.m + m) * S::kRowStride + row];
    const float token_scale = p.token_scale != nullptr ? p.token_scale[m * p.token_scale_stride] : 1.0f;
    v *= (p.row_scale[n] * factor) * token_scale;
    const int64_t out = static_cast<int64_t>(m) * p.n + n;
    if (p.out_is_bf16) {
      if (p.bias != nullptr) v += __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[n]);
      static_cast<__nv_bfloat16*>(p.out)[out] = __float2bfloat16_rn(v);
    } else {
      if (p.bias != nullptr) v += __half2float(static_cast<const __half*>(p.bias)[n]);
      static_cast<__half*>(p.out)[out] = __float2half_rn(v);
    }
  }
}

// What a warp fetches: the tiles of the warp's part of K, of one of the block's units after the other.
template <class S, Format kFormat>
struct Feed {
  const GemvArgs& args;
  int first, count;  // the part of K
  uint32_t ring, barriers;
  int stage_bytes, left;  // tiles that are not fetched yet
  int number = blockIdx.x, tile = 0, slot = 0;
  const uint8_t* codes = nullptr;  // of the unit's first tile
  int scales = 0;                  // from there on

  __device__ __forceinline__ void begin_unit() {
    int in_part = number;
    const GemmPart part = part_of(args.p, S::kRows, in_part);
    const int slice = in_part * S::kSlices % kSlicesPerTile;
    const int64_t at = static_cast<int64_t>(in_part * S::kSlices / kSlicesPerTile) * args.p.k_tiles + first;
    codes = part.weight + at * tile_bytes(kFormat) + codes_offset(slice, 0);
    scales = scales_offset(kFormat, slice, 0) - codes_offset(slice, 0);
  }
  __device__ __forceinline__ uint32_t barrier() const { return barriers + slot * 8; }
  __device__ __forceinline__ void copy_weights() const {
    constexpr int kCodes = S::kSlices * kSliceCodeBytes, kWeights = Places<S, kFormat>::kWeights;
    const uint32_t stage = ring + slot * stage_bytes;
    const uint8_t* from = codes + tile * tile_bytes(kFormat);
    const uint64_t once = policy_evict_first();
    barrier_expect(barrier(), stage_bytes);
    if constexpr (S::kSlices == kSlicesPerTile) {
      bulk_copy(stage, from, kWeights, barrier(), once);
    } else {
      bulk_copy(stage, from, kCodes, barrier(), once);
      bulk_copy(stage + kCodes, from + scales, kWeights - kCodes, barrier(), once);
    }
  }
  __device__ __forceinline__ void copy_tokens() const {
    using P = Places<S, kFormat>;
    const int64_t from = static_cast<int64_t>(first + tile) * S::kTokenBytes;
    bulk_copy(ring + slot * stage_bytes + P::kWeights, static_cast<const uint8_t*>(args.p.x) + from, P::token_bytes(args.p.m),
              barrier(), policy_evict_last());
  }
  __device__ __forceinline__ void next() {
    slot = slot + 1 == S::kStages ? 0 : slot + 1;
    if (--left > 0 && ++tile == count) {
      tile = 0;
      number += gridDim.x;
      begin_unit();
    }
  }
};

template <Operand kOperand, Format kFormat, class S>
__global__ void __launch_bounds__(S::kWarps * 32, S::kBlocks) gemv_w4_kernel(const __grid_constant__ GemvArgs args) {
  const GemmProblem& p = args.p;
  extern __shared__ __align__(128) uint8_t shared[];
  const Places<S, kFormat> places(p.m);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const int first = p.k_tiles * warp / S::kWarps, count = p.k_tiles * (warp + 1) / S::kWarps - first;
  const int units = (args.units - static_cast<int>(blockIdx.x) + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x);
  const uint32_t base = smem_address(shared), ring = base + warp * S::kStages * places.stage;
  const uint32_t barriers = base + places.barriers + warp * S::kStages * 8;

  grid_dependency_launch();
  Feed<S, kFormat> feed{args, first, count, ring, barriers, places.stage, units * count};
  const int early = min(feed.left, S::kStages);
  feed.begin_unit();
  if (lane == 0) {
    for (int i = 0; i < S::kStages; ++i) barrier_init(barriers + i * 8, 1);
    barrier_init_fence();
  }
  __syncwarp();
  {
    Feed<S, kFormat> weights = feed;
    for (int i = 0; i < early; ++i, weights.next()) weights.copy_weights();
  }
  {
    int in_part = blockIdx.x;
    const GemmPart part = part_of(p, S::kRows, in_part);
    prefetch_row_data<S::kRows>(part.row_scale, part.bias, in_part * S::kRows, part.n);
  }
  grid_dependency_wait();
  for (int i = 0; i < early; ++i, feed.next()) feed.copy_tokens();
  // What this lane reads of a tile of tokens. Of up to 8, those past the last read that one, and their results are dropped.
  const int token = min(g, p.m - 1);
  const uint32_t lane_tokens = S::kColumns == 1 ? token * 128 + (token & 1) * 64 + t * 16 : lane / 8 * 256 + lane % 8 * 16;

  int slot = 0, number = blockIdx.x;
  uint32_t phase = 0;
  float* partial = reinterpret_cast<float*>(shared + places.partial);
  float* other_partial = partial + S::kWarps * p.m * S::kRowStride;
  for (; number < args.units; number += gridDim.x) {
    float acc[S::kSlices][S::kColumns][4] = {};
    for (int i = 0; i < count; ++i) {
      const uint32_t stage = ring + slot * places.stage;
      const uint32_t tokens = stage + places.kWeights;
      barrier_wait(barriers + slot * 8, phase);
      uint32_t b[S::kColumns][2][4];  // [16 k steps 2h and 2h + 1]
#pragma unroll
      for (int c = 0; c < S::kColumns; ++c)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          if constexpr (S::kColumns == 1) {
            const uint4 v = load_shared16(tokens + (lane_tokens ^ h * 64));
            b[c][h][0] = v.x, b[c][h][1] = v.y, b[c][h][2] = v.z, b[c][h][3] = v.w;
          } else {
            load_matrices(b[c][h], tokens + lane_tokens + h * 1024 + c * 128);
          }
        }
#pragma unroll
      for (int r = 0; r < S::kSlices; ++r) {
        uint32_t a[4][4];
        expand16<kOperand, kFormat>(
            load_shared16(stage + codes_offset(r, lane)),
            load_shared2(stage + S::kSlices * kSliceCodeBytes + scales_offset(kFormat, r, lane) - kTileCodeBytes), a);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int c = 0; c < S::kColumns; ++c) {
            const uint32_t* step = b[c][j / 2] + j % 2 * 2;
            mma<kOperand>(acc[r][c], a[j], step[0], step[1]);
          }
      }
      __syncwarp();
      if (feed.left > 0) {
        feed.copy_weights();
        feed.copy_tokens();
        feed.next();
      }
      if (++slot == S::kStages) {
        slot = 0;
        phase ^= 1;
      }
    }
#pragma unroll
    for (int r = 0; r < S::kSlices; ++r)
#pragma unroll
      for (int c = 0; c < S::kColumns; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = 8 * c + 2 * t + i % 2;
          if (token < p.m) partial[(warp * p.m + token) * S::kRowStride + 16 * r + g + i / 2 * 8] = acc[r][c][i];
        }
    __syncthreads();
    GemmProblem mine = p;
    int in_part = number;
    static_cast<GemmPart&>(mine) = part_of(p, S::kRows, in_part);
    write_outputs<S>(mine, args.factor, partial, in_part * S::kRows);
    float* const last = partial;  // read until the next unit's barrier
    partial = other_partial;
    other_partial = last;
  }
}

template <Operand kOperand, Format kFormat, class S>
void launch(const GemmProblem& p, cudaStream_t stream) {
  const auto kernel = gemv_w4_kernel<kOperand, kFormat, S>;
  const int smem = Places<S, kFormat>(p.m).end;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem), "shared memory");
  const int per_sm = std::min(S::kBlocks, kMultiprocessorBytes / (smem + kBlockBytes));
  const int units = row_blocks_of(p, S::kRows);
  launch_after(kernel, dim3(std::min(units, multiprocessors() * per_sm)), dim3(S::kWarps * 32), smem, stream,
               GemvArgs{p, factor_of(kOperand, kFormat), units});
}

// By what an H200 measured: 1 where units of 32 rows fit on its multiprocessors at once, 2 where those of 64 do, 3 where two of
// them do, 4 for more. With more places than work for them, some multiprocessors would get two units and others none.
int variant_of(const GemmProblem& p) {
  constexpr int kMultiprocessors = 132;
  if (p.split > 0) return p.split;
  if (row_blocks_of(p, 32) <= kMultiprocessors) return 1;
  const int units = row_blocks_of(p, 64);
  return units <= kMultiprocessors ? 2 : units <= 2 * kMultiprocessors ? 3 : 4;
}

template <Operand kOperand, Format kFormat>
void dispatch_8(const GemmProblem& p, cudaStream_t stream) {
  switch (variant_of(p)) {
    case 1: return launch<kOperand, kFormat, GemvShape<1, 2, 16, 2, 1>>(p, stream);
    case 2: return launch<kOperand, kFormat, GemvShape<1, 4, 16, 2, 1>>(p, stream);
    case 3: return launch<kOperand, kFormat, GemvShape<1, 4, 8, 2, 2>>(p, stream);
    default: return launch<kOperand, kFormat, GemvShape<1, 4, 8, 2, 3>>(p, stream);
  }
}

template <Operand kOperand, Format kFormat>
void dispatch_16(const GemmProblem& p, const Allocate& allocate, cudaStream_t stream) {
  switch (variant_of(p)) {
    case 1: return launch<kOperand, kFormat, GemvShape<2, 2, 16, 2, 1>>(p, stream);
    case 2: return launch<kOperand, kFormat, GemvShape<2, 4, 8, 2, 1>>(p, stream);
  }
  GemmProblem divided = p;
  divided.split = 0;
  run_gemm_sm90(divided, allocate, stream);
}

}  // namespace

void run_gemv(const GemmProblem& p, const Allocate& allocate, cudaStream_t stream) {
  if (p.m == 0) return;
  with_types(p.operand, p.format, [&](auto operand, auto format) {
    if (p.token_tile == 8) dispatch_8<operand.value, format.value>(p, stream);
    else dispatch_16<operand.value, format.value>(p, allocate, stream);
  });
}

}  // namespace fp4
