// y[M, N] = tokens x FP4 weight^T for a few tokens (M <= 16): bytes and latency are everything.
//
// A block owns 16 (or 32) output rows and all of K; its warps split K and add up in shared memory in a fixed order, so no
// second pass and no cluster is needed. A warp streams prepared tiles straight into registers (one 16-byte load a lane is
// 16 rows x 64 k), several tiles ahead and before the activation kernel has ended; mma.sync m16n8k16 multiplies, with the
// weights as A and the tokens as its 8 columns, which costs the same for 1 token as for 8.
//
// For one or two tokens a launch costs more than rotating and quantizing them again in every block: run_gemv_fused does.
#include <algorithm>
#include <type_traits>

#include "activation_fp4.cuh"
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
  FusedTokens fused;
};

// kColumns: blocks of 8 tokens. kSlices: 16-row slices that a block works on at a time. kAhead: tiles of weights in flight
// per warp, in registers. kRing: tiles of tokens per warp in shared memory.
template <int kColumns_, int kSlices_, int kWarps_, int kAhead_, int kRing_>
struct GemvShape {
  static constexpr int kColumns = kColumns_, kSlices = kSlices_, kWarps = kWarps_, kAhead = kAhead_, kRing = kRing_;
  static constexpr int kRows = 16 * kSlices, kTokens = 8 * kColumns;
  static constexpr int kTokenBytes = kTokens * 128;  // 64 k
  static constexpr int kPartialBytes = kWarps * kTokens * (kRows + 4) * 4;
  static constexpr int kSmem = kPartialBytes + kWarps * kRing * kTokenBytes;
};

// Where the tokens of a warp's part of K come from: a tile of the activation kernel.
template <class S>
struct TileSource {
  const uint8_t* source;
  int pieces;  // 16-byte pieces of a tile

  __device__ __forceinline__ void copy(uint32_t dst, int tile) const {
    for (int i = threadIdx.x % 32; i < pieces; i += 32) copy_own16(dst + i * 16, source + tile * S::kTokenBytes + i * 16);
  }
};

// This warp's part of K for every slice of the block: a ring of token tiles in shared memory. If all of the part fits, it
// is read once; else it streams kRing - 1 tiles ahead.
template <class S>
struct TokenRing {
  uint32_t base;
  TileSource<S> source;
  int count, steps;  // tiles; tiles rounded up to whole rounds of kAhead
  bool resident;
  int load_tile = 0, load_slot = 0, slot = 0;

  __device__ __forceinline__ void load_next() {
    if (load_tile < count) source.copy(base + load_slot * S::kTokenBytes, load_tile);
    commit_own();
    load_tile = load_tile + 1 == steps ? 0 : load_tile + 1;
    load_slot = load_slot + 1 == S::kRing ? 0 : load_slot + 1;
  }
  __device__ __forceinline__ void begin() {
    for (int i = 0; i < (resident ? steps : S::kRing - 1); ++i) load_next();
    if (resident) {
      wait_own<0>();
      __syncwarp();
    }
  }
  // Shared-memory address of the next tile.
  __device__ __forceinline__ uint32_t next() {
    if (!resident) {
      wait_own<S::kRing - 2>();
      __syncwarp();
      load_next();
    }
    const uint32_t address = base + slot * S::kTokenBytes;
    slot = slot + 1 == (resident ? steps : S::kRing) ? 0 : slot + 1;
    return address;
  }
};

// All of K of a few tokens, which this block has prepared itself; tiles of `bytes`.
struct ResidentTokens {
  uint32_t base;
  int bytes, steps;
  int slot = 0;
  __device__ __forceinline__ uint32_t next() {
    const uint32_t address = base + slot * bytes;
    slot = slot + 1 == steps ? 0 : slot + 1;
    return address;
  }
};

// What activation_static_kernel does, into this block's shared memory, [K/64, m tokens, 128 bytes].
template <Operand kOperand, Format kFormat>
__device__ __forceinline__ void prepare_tokens(const GemvArgs& args, float global, uint4* out) {
  using Token = std::conditional_t<kOperand == Operand::kBf16, __nv_bfloat16, __half>;
  const GemmProblem& p = args.p;
  const FusedTokens& f = args.fused;
  const int chunks = (p.k_tiles + 1) / 2 * kLanesPerBlock;  // of a token
  for (int base = 0; base < p.m * chunks; base += blockDim.x) {
    const int token = (base + threadIdx.x) / chunks, k0 = (base + threadIdx.x) % chunks * kValues;
    const bool valid = token < p.m && k0 < f.k;
    const int64_t at = static_cast<int64_t>(token) * f.k + k0;
    Chunk c = p.out_is_bf16 ? load_chunk(static_cast<const __nv_bfloat16*>(f.x) + at, valid)
                            : load_chunk(static_cast<const __half*>(f.x) + at, valid);
    rotate(c, f.hadamard);
    float s = 1.0f;
    if (kOperand == Operand::kBf16 && f.quantize) {
      Chunk q;
      const ScaleRule rule = static_cast<ScaleRule>(f.rule);
      if constexpr (kFormat == Format::kNvfp4) s = e4m3_to_float(quantize_nvfp4(c, global, rule, q));
      else s = exp2_int(quantize_mxfp4(c, rule, q));
      c = q;
    }
    if (token < p.m && k0 < p.k_tiles * 64) store_natural<Token>(out + k0 / 64 * p.m * 8, token, k0, c, s);
  }
  __syncthreads();
}

enum class Tokens { kPrepared, kFused };

template <class S>
__device__ __forceinline__ void write_outputs(const GemmProblem& p, float factor, const float* partial, int n0,
                                              float common_scale) {
  for (int e = threadIdx.x; e < S::kTokens * S::kRows; e += S::kWarps * 32) {
    const int m = e / S::kRows, row = e % S::kRows, n = n0 + row;
    if (m >= p.m || n >= p.n) continue;
    float v = 0.0f;
#pragma unroll
    for (int w = 0; w < S::kWarps; ++w) v += partial[(w * S::kTokens + m) * (S::kRows + 4) + row];
    const float token_scale = p.token_scale != nullptr ? p.token_scale[m * p.token_scale_stride] : common_scale;
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

template <Operand kOperand, Format kFormat, class S, Tokens kTokens>
__device__ __forceinline__ void multiply_slices(const GemvArgs& args) {
  const GemmProblem& p = args.p;
  constexpr int kTileBytes = tile_bytes(kFormat);
  constexpr bool kFused = kTokens == Tokens::kFused;
  extern __shared__ __align__(16) uint8_t shared[];
  float* partial = reinterpret_cast<float*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int first = p.k_tiles * warp / S::kWarps, count = p.k_tiles * (warp + 1) / S::kWarps - first;
  const int most = (p.k_tiles + S::kWarps - 1) / S::kWarps;
  const int steps = (most + S::kAhead - 1) / S::kAhead * S::kAhead;

  // This warp's tiles of a unit, which is kSlices slices of a tile of 64 rows; null past the last unit.
  struct Unit {
    const uint8_t* tiles;
    int slice;
  };
  auto unit_of = [&](int number) {
    const GemmPart part = part_of(p, S::kRows, number);
    const int slice = number * S::kSlices;
    const uint8_t* tiles = part.weight + (static_cast<int64_t>(slice / 4) * p.k_tiles + first) * kTileBytes;
    return Unit{slice * 16 < part.n ? tiles : nullptr, slice % 4};
  };
  uint4 w[S::kAhead][S::kSlices];
  uint32_t s[S::kAhead][S::kSlices];
  auto fetch = [&](int u, const Unit& unit, int i) {
    if (i >= count || unit.tiles == nullptr) return;
    const uint8_t* tile = unit.tiles + i * kTileBytes;
#pragma unroll
    for (int r = 0; r < S::kSlices; ++r) {
      w[u][r] = load_stream16(tile + codes_offset(unit.slice + r, lane));
      s[u][r] = load_stream2(tile + scales_offset(kFormat, unit.slice + r, lane));
    }
  };

  grid_dependency_launch();
  int number = blockIdx.x;
  Unit unit = unit_of(number);
#pragma unroll
  for (int u = 0; u < S::kAhead; ++u) fetch(u, unit, u);
  {
    int in_part = number;
    const GemmPart part = part_of(p, S::kRows, in_part);
    prefetch_row_data<S::kRows>(part.row_scale, part.bias, in_part * S::kRows, part.n);
  }
  grid_dependency_wait();
  float common_scale = 1.0f;  // of all tokens
  auto ring = [&] {
    if constexpr (kFused) {
      const float global = args.fused.global != nullptr ? *args.fused.global : 1.0f;
      common_scale = __fdiv_rn(1.0f, global);
      prepare_tokens<kOperand, kFormat>(args, global, reinterpret_cast<uint4*>(shared + S::kPartialBytes));
      const int bytes = p.m * 128;
      return ResidentTokens{smem_address(shared) + S::kPartialBytes + first * bytes, bytes, steps};
    } else {
      const TileSource<S> source{static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(first) * S::kTokenBytes, p.m * 8};
      TokenRing<S> tokens{smem_address(shared) + S::kPartialBytes + warp * S::kRing * S::kTokenBytes, source, count,
                          steps, steps <= S::kRing};
      tokens.begin();
      return tokens;
    }
  }();
  const int token = kFused ? min(g, p.m - 1) : g;  // of this lane; results of a token past the last are dropped
  const uint32_t lane_tokens = token * 128 + (token & 1) * 64 + t * 16;

  while (unit.tiles != nullptr) {
    float acc[S::kSlices][S::kColumns][4] = {};
    for (int base = 0; base < steps; base += S::kAhead) {
#pragma unroll
      for (int u = 0; u < S::kAhead; ++u) {
        const uint32_t tokens = ring.next() + lane_tokens;
        if (base + u < count) {
          uint32_t b[S::kColumns][8];
#pragma unroll
          for (int c = 0; c < S::kColumns; ++c) {
            const uint4 lo = load_shared16(tokens + c * 1024), hi = load_shared16((tokens + c * 1024) ^ 64);
            b[c][0] = lo.x, b[c][1] = lo.y, b[c][2] = lo.z, b[c][3] = lo.w;
            b[c][4] = hi.x, b[c][5] = hi.y, b[c][6] = hi.z, b[c][7] = hi.w;
          }
#pragma unroll
          for (int r = 0; r < S::kSlices; ++r) {
            uint32_t a[4][4];
            expand16<kOperand, kFormat>(w[u][r], s[u][r], a);
#pragma unroll
            for (int j = 0; j < 4; ++j)
#pragma unroll
              for (int c = 0; c < S::kColumns; ++c) mma<kOperand>(acc[r][c], a[j], b[c][2 * j], b[c][2 * j + 1]);
          }
        }
        if (base + u + S::kAhead < steps) fetch(u, unit, base + u + S::kAhead);
        else fetch(u, unit_of(number + gridDim.x), u);
      }
    }
#pragma unroll
    for (int r = 0; r < S::kSlices; ++r)
#pragma unroll
      for (int c = 0; c < S::kColumns; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          partial[(warp * S::kTokens + 8 * c + 2 * t + i % 2) * (S::kRows + 4) + 16 * r + g + i / 2 * 8] = acc[r][c][i];
    __syncthreads();
    GemmProblem mine = p;
    int in_part = number;
    static_cast<GemmPart&>(mine) = part_of(p, S::kRows, in_part);
    write_outputs<S>(mine, args.factor, partial, in_part * S::kRows, common_scale);
    number += gridDim.x;
    unit = unit_of(number);
    if (unit.tiles != nullptr) __syncthreads();
  }
}

template <Operand kOperand, Format kFormat, class S, Tokens kTokens>
__global__ void __launch_bounds__(S::kWarps * 32, 16 / S::kWarps) gemv_w4_kernel(const __grid_constant__ GemvArgs args) {
  multiply_slices<kOperand, kFormat, S, kTokens>(args);
}

// Blocks that stay for several units (slices of a block's rows), or one block per unit.
enum class Grid { kUnits, kResident };

template <Operand kOperand, Format kFormat, class S, Tokens kTokens>
void launch(const GemmProblem& p, const FusedTokens& fused, cudaStream_t stream, Grid grid = Grid::kUnits) {
  const auto kernel = gemv_w4_kernel<kOperand, kFormat, S, kTokens>;
  const int smem = kTokens == Tokens::kFused ? S::kPartialBytes + p.k_tiles * p.m * 128 : S::kSmem;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem), "shared memory");
  int blocks = row_blocks_of(p, S::kRows);
  if (grid == Grid::kResident) {
    int device = 0, sms = 0, per_sm = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    check_cuda(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, S::kWarps * 32, smem), "occupancy");
    const int rounds = (blocks + sms * per_sm - 1) / (sms * per_sm);
    blocks = (blocks + rounds - 1) / rounds;
  }
  launch_after(kernel, dim3(blocks), dim3(S::kWarps * 32), smem, 1, stream,
               GemvArgs{p, factor_of(kOperand, kFormat), fused});
}

// Measured on an H100: few rows need 16 warps a block to fill the GPU, unless that leaves a second, partly filled round;
// many rows are read fastest by blocks of 64 rows that stay.
int variant_of(const GemmProblem& p) {
  const int slices = row_blocks_of(p, 16);
  return p.split > 0 ? p.split : slices > 8 * 132 ? 3 : slices > 2 * 132 ? 2 : 1;
}

template <Operand kOperand, Format kFormat, Tokens kTokens>
void dispatch_8(const GemmProblem& p, const FusedTokens& fused, cudaStream_t stream) {
  switch (variant_of(p)) {
    case 3: return launch<kOperand, kFormat, GemvShape<1, 4, 8, 2, 8>, kTokens>(p, fused, stream, Grid::kResident);
    case 2: return launch<kOperand, kFormat, GemvShape<1, 2, 8, 4, 8>, kTokens>(p, fused, stream);
    default: return launch<kOperand, kFormat, GemvShape<1, 2, 16, 2, 4>, kTokens>(p, fused, stream);
  }
}

template <Operand kOperand, Format kFormat>
void dispatch_16(const GemmProblem& p, cudaStream_t stream) {
  switch (variant_of(p)) {
    case 3: return launch<kOperand, kFormat, GemvShape<2, 4, 8, 2, 4>, Tokens::kPrepared>(p, {}, stream, Grid::kResident);
    case 2: return launch<kOperand, kFormat, GemvShape<2, 2, 8, 4, 4>, Tokens::kPrepared>(p, {}, stream);
    default: return launch<kOperand, kFormat, GemvShape<2, 2, 16, 2, 4>, Tokens::kPrepared>(p, {}, stream);
  }
}

template <Operand kOperand, Format kFormat>
void dispatch(const GemmProblem& p, const FusedTokens* fused, cudaStream_t stream) {
  if (fused != nullptr) return dispatch_8<kOperand, kFormat, Tokens::kFused>(p, *fused, stream);
  if (p.token_tile == 8) return dispatch_8<kOperand, kFormat, Tokens::kPrepared>(p, {}, stream);
  dispatch_16<kOperand, kFormat>(p, stream);
}

void run(const GemmProblem& p, const FusedTokens* fused, cudaStream_t stream) {
  if (p.m == 0) return;
  const bool nvfp4 = p.format == static_cast<int>(Format::kNvfp4);
  if (p.operand == static_cast<int>(Operand::kBf16)) {
    return nvfp4 ? dispatch<Operand::kBf16, Format::kNvfp4>(p, fused, stream)
                 : dispatch<Operand::kBf16, Format::kMxfp4>(p, fused, stream);
  }
  return nvfp4 ? dispatch<Operand::kFp16, Format::kNvfp4>(p, fused, stream)
               : dispatch<Operand::kFp16, Format::kMxfp4>(p, fused, stream);
}

}  // namespace

void run_gemv(const GemmProblem& p, cudaStream_t stream) { run(p, nullptr, stream); }

void run_gemv_fused(const GemmProblem& p, const FusedTokens& tokens, cudaStream_t stream) { run(p, &tokens, stream); }

}  // namespace fp4
