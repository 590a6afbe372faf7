// y[M, N] = tokens x FP4 weight^T for 9 to 64 tokens, where latency still counts as much as bytes.
//
// Weights take the short way, as in gemv_w4_mma.cu: prepared tiles stream straight into registers, several ahead and before
// the activation kernel has ended, and mma.sync m16n8k16 multiplies them as A. Tokens are too many for each warp to fetch
// its own: a producer thread copies them into a ring of stages that all warps of the block read, in the layout of the other
// kernel for that many tokens. A block's warps divide its rows and, within a stage, K; blocks of a cluster divide K
// further and share tokens (cluster_sm90.cuh).
#include "cluster_sm90.cuh"
#include "expand_fp4.cuh"
#include "mma_sm80.cuh"

namespace fp4 {
namespace {

constexpr int kSlices = 2;  // 16-row slices of a warp: with more, the sums of 64 tokens leave no registers

// kRowWarps x kDepthWarps warps; kAhead: tiles of weights in flight per warp, in registers; a stage is one tile of tokens
// for each depth warp.
template <int kTokens_, int kRowWarps_, int kDepthWarps_, int kAhead_, int kStages_, int kBlocksPerSm_>
struct StreamShape {
  static constexpr int kTokens = kTokens_, kRowWarps = kRowWarps_, kDepthWarps = kDepthWarps_;
  static constexpr int kAhead = kAhead_, kStages = kStages_, kBlocksPerSm = kBlocksPerSm_;
  static constexpr bool kNatural = kTokens <= 16;  // the layout of the tokens, see activation_fp4_sm90.cu
  static constexpr int kColumns = kTokens / 8, kRows = 16 * kSlices * kRowWarps;
  static constexpr int kWarps = kRowWarps * kDepthWarps, kConsumers = 32 * kWarps;
  // The producer is a whole warpgroup, so that it can hand its registers over.
  static constexpr int kThreads = kConsumers + 128, kRegisters = kBlocksPerSm == 1 ? 240 : 232;
  static constexpr int kTokenTile = kTokens * 128, kStageBytes = kDepthWarps * kTokenTile;
  static constexpr int kStride = kRows + 4;  // of a token's sums; what write_output reads
  static constexpr int kSumBytes = kTokens * kStride * 4;
  static constexpr int kRing =
      kStages * kStageBytes > kDepthWarps * kSumBytes ? kStages * kStageBytes : kDepthWarps * kSumBytes;
  static constexpr int kSmem = kRing + 2 * 8 * kStages;
};

template <class S>
struct StreamRing {
  uint32_t base;
  __device__ __forceinline__ uint32_t stage(int s) const { return base + s * S::kStageBytes; }
  __device__ __forceinline__ uint32_t full(int s) const { return base + S::kRing + s * 8; }
  __device__ __forceinline__ uint32_t empty(int s) const { return base + S::kRing + (S::kStages + s) * 8; }
};

template <class S>
__device__ void produce(const GemmProblem& p, const ClusterPlace& place, const StreamRing<S>& ring, int first, int count) {
  const uint64_t keep = policy_evict_last();
  const uint8_t* tokens = static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(first) * S::kTokenTile;
  grid_dependency_wait();
  int stage = 0;
  uint32_t phase = 1;  // the first pass finds every stage empty
  for (int i = 0; i < count; i += S::kDepthWarps) {
    const int bytes = min(S::kDepthWarps, count - i) * S::kTokenTile;
    barrier_wait(ring.empty(stage), phase);
    barrier_expect(ring.full(stage), bytes);
    place.copy_tokens(ring.stage(stage), tokens + static_cast<int64_t>(i) * S::kTokenTile, bytes, ring.full(stage), keep);
    if (++stage == S::kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
}

// The weights of one warp: two slices of its depth warp's tiles.
template <Format kFormat, class S>
struct WeightStream {
  const uint8_t *codes, *scales;  // of this lane in the block's first tile
  int count;
  uint4 w[S::kAhead][kSlices];
  uint32_t s[S::kAhead][kSlices];

  __device__ __forceinline__ void fetch(int u, int i) {
    if (i >= count) return;
    const uint32_t offset = static_cast<uint32_t>(i) * tile_bytes(kFormat);
#pragma unroll
    for (int r = 0; r < kSlices; ++r) {
      w[u][r] = load_stream16(codes + offset + codes_offset(r, 0));
      s[u][r] = load_stream2(scales + offset + (scales_offset(kFormat, r, 0) - scales_offset(kFormat, 0, 0)));
    }
  }
};

// Operand B of four k16 steps x 8 tokens. `column`: the tile from its token 8c on.
template <class S>
__device__ __forceinline__ void load_column(uint32_t (&b)[2][4], uint32_t column) {
  const int lane = threadIdx.x % 32;
  if constexpr (S::kNatural) {
    const uint32_t at = column + lane / 4 * 128 + (lane / 4 & 1) * 64 + lane % 4 * 16;
    const uint4 lo = load_shared16(at), hi = load_shared16(at ^ 64);
    b[0][0] = lo.x, b[0][1] = lo.y, b[0][2] = lo.z, b[0][3] = lo.w;
    b[1][0] = hi.x, b[1][1] = hi.y, b[1][2] = hi.z, b[1][3] = hi.w;
  } else {
    const uint32_t at = column + lane / 8 * (S::kTokens * 16) + lane % 8 * 16;
    load_matrices(b[0], at);
    load_matrices(b[1], at + 4 * S::kTokens * 16);
  }
}

// One tile: 32 rows x kTokens x 64 k.
template <Operand kOperand, Format kFormat, class S>
__device__ __forceinline__ void multiply_tile(float (&acc)[kSlices][S::kColumns][4], const uint4 (&w)[kSlices],
                                              const uint32_t (&s)[kSlices], uint32_t tokens) {
  uint32_t a[kSlices][4][4];
#pragma unroll
  for (int r = 0; r < kSlices; ++r) expand16<kOperand, kFormat>(w[r], s[r], a[r]);
#pragma unroll
  for (int c = 0; c < S::kColumns; ++c) {
    uint32_t b[2][4];
    load_column<S>(b, tokens + c * (S::kNatural ? 1024 : 128));
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < kSlices; ++r)
        mma<kOperand>(acc[r][c], a[r][j], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
  }
}

template <class S>
__device__ __forceinline__ void consumer_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(S::kConsumers) : "memory");
}

// The depth warps' sums, [kDepthWarps][kTokens][kStride], into the first of them.
template <class S>
__device__ __forceinline__ void add_depth_warps(float* sums) {
  constexpr int kQuads = S::kRows / 4;
  for (int e = threadIdx.x; e < S::kTokens * kQuads; e += S::kConsumers) {
    float4* at = reinterpret_cast<float4*>(sums + e / kQuads * S::kStride + e % kQuads * 4);
    float4 v = *at;
#pragma unroll
    for (int d = 1; d < S::kDepthWarps; ++d) {
      const float4 f = at[d * (S::kSumBytes / 16)];
      v.x += f.x, v.y += f.y, v.z += f.z, v.w += f.w;
    }
    *at = v;
  }
}

template <Operand kOperand, Format kFormat, class S>
__device__ __forceinline__ void consume(const GemmArgs& args, const ClusterPlace& place, const StreamRing<S>& ring,
                                        float* sums, int first, int count) {
  const GemmProblem& p = args.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row_warp = warp % S::kRowWarps, depth = warp / S::kRowWarps;
  const int slice = (place.row_block * S::kRowWarps + row_warp) * kSlices;
  const int row_tile = min(slice / kSlicesPerTile, (p.n + 63) / 64 - 1);
  const uint8_t* tile = p.weight + (static_cast<int64_t>(row_tile) * p.k_tiles + first) * tile_bytes(kFormat);
  WeightStream<kFormat, S> weights{tile + codes_offset(slice % kSlicesPerTile, lane),
                                   tile + scales_offset(kFormat, slice % kSlicesPerTile, lane), count};
  // Weights never depend on the kernel before: fetch them while it still runs.
#pragma unroll
  for (int u = 0; u < S::kAhead; ++u) weights.fetch(u, u * S::kDepthWarps + depth);
  prefetch_row_data<S::kRows>(p.row_scale, p.bias, place.row_block * S::kRows, p.n);
  if (gridDim.x > 1) cluster_wait();

  float acc[kSlices][S::kColumns][4] = {};
  int stage = 0;
  uint32_t phase = 0;
  for (int base = 0; base < count; base += S::kAhead * S::kDepthWarps) {
#pragma unroll
    for (int u = 0; u < S::kAhead; ++u) {
      const int round = base + u * S::kDepthWarps, i = round + depth;
      if (round < count) {
        barrier_wait(ring.full(stage), phase);
        if (i < count) {
          multiply_tile<kOperand, kFormat, S>(acc, weights.w[u], weights.s[u], ring.stage(stage) + depth * S::kTokenTile);
        }
        if (round + S::kStages * S::kDepthWarps < count) {  // it will be filled again
          __syncwarp();
          place.release(ring.empty(stage));
        }
        weights.fetch(u, i + S::kAhead * S::kDepthWarps);
        if (++stage == S::kStages) {
          stage = 0;
          phase ^= 1;
        }
      }
    }
  }

  grid_dependency_wait();
  consumer_sync<S>();  // every stage has been read: the ring becomes the reduction buffer
  float* mine = sums + depth * (S::kSumBytes / 4) + 2 * t * S::kStride + row_warp * (16 * kSlices) + g;
#pragma unroll
  for (int r = 0; r < kSlices; ++r)
#pragma unroll
    for (int c = 0; c < S::kColumns; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) mine[(8 * c + e % 2) * S::kStride + 16 * r + e / 2 * 8] = acc[r][c][e];
  if constexpr (S::kDepthWarps > 1) {
    consumer_sync<S>();
    add_depth_warps<S>(sums);
  }
  finish<S::kTokens, S::kRows, S::kConsumers>(args, place, ring.base, 0, consumer_sync<S>);
}

template <Operand kOperand, Format kFormat, class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocksPerSm) stream_w4_kernel(const __grid_constant__ GemmArgs args) {
  extern __shared__ __align__(128) uint8_t shared[];
  const GemmProblem& p = args.p;
  const StreamRing<S> ring{smem_address(shared)};
  const ClusterPlace place(args);
  const int first = static_cast<int>(static_cast<int64_t>(p.k_tiles) * place.part / place.split);
  const int count = static_cast<int>(static_cast<int64_t>(p.k_tiles) * (place.part + 1) / place.split) - first;

  grid_dependency_launch();
  if (threadIdx.x == S::kConsumers) {
    for (int s = 0; s < S::kStages; ++s) {
      barrier_init(ring.full(s), 1);
      barrier_init(ring.empty(s), S::kWarps * place.share);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (gridDim.x > 1) cluster_arrive_relaxed();  // the other blocks may use this one's barriers: barrier_init_fence
  if (threadIdx.x < S::kConsumers) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(S::kRegisters));
    consume<kOperand, kFormat, S>(args, place, ring, reinterpret_cast<float*>(shared), first, count);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (gridDim.x > 1) cluster_wait();
    if (threadIdx.x == S::kConsumers) produce<S>(p, place, ring, first, count);
  }
}

template <Operand kOperand, Format kFormat, class S>
void launch(const GemmProblem& p, cudaStream_t stream) {
  const auto kernel = stream_w4_kernel<kOperand, kFormat, S>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSmem), "shared memory");
  static const ClusterCounts active = count_clusters(kernel, S::kThreads, S::kSmem);
  // mma.sync reaches about 60 % of wgmma's rate.
  const BlockCost cost{S::kRows * tile_bytes(kFormat) / 64, S::kTokenTile, S::kSumBytes, S::kRows * S::kTokens * 0.03f};
  launch_divided(kernel, active, cost, S::kRows, S::kTokens, S::kThreads, S::kSmem, kOperand, kFormat, false, p, stream);
}

// 1: 128 rows, tokens cross from L2 least often. 2: 64 rows, K divided by 4 inside the block, so less over the cluster.
// 3: 128 rows and half the warps, two blocks on a multiprocessor: one starts or ends while the other multiplies.
template <Operand kOperand, Format kFormat, int kTokens>
void dispatch_variant(const GemmProblem& p, cudaStream_t stream) {
  constexpr int kAhead = kTokens <= 32 ? 8 : 6;
  // More blocks of 128 rows than multiprocessors: two at a time on each leave no second, partly filled round.
  const int variant = p.split > 0 ? p.split / 100 : p.n > 128 * 132 ? 3 : 1;
  switch (variant) {
    case 1: return launch<kOperand, kFormat, StreamShape<kTokens, 4, 2, kAhead, 6, 1>>(p, stream);
    case 2: return launch<kOperand, kFormat, StreamShape<kTokens, 2, 4, kAhead, 4, 1>>(p, stream);
    case 3: return launch<kOperand, kFormat, StreamShape<kTokens, 4, 1, kAhead, 8, 2>>(p, stream);
  }
  throw std::runtime_error("split: no variant " + std::to_string(variant) + " of the kernel for 9 to 64 tokens");
}

template <Operand kOperand, Format kFormat>
void dispatch_tokens(const GemmProblem& p, cudaStream_t stream) {
  if (p.m > p.token_tile) throw std::runtime_error("gemm_w4_mma takes one tile of tokens");
  if (p.token_tile == 16) return dispatch_variant<kOperand, kFormat, 16>(p, stream);
  if (p.token_tile == 32) return dispatch_variant<kOperand, kFormat, 32>(p, stream);
  if (p.token_tile == 64) return dispatch_variant<kOperand, kFormat, 64>(p, stream);
  throw std::runtime_error("gemm_w4_mma: token_tile must be 16, 32 or 64, got " + std::to_string(p.token_tile));
}

}  // namespace

void run_gemm_mma(const GemmProblem& p, cudaStream_t stream) {
  if (p.m == 0) return;
  const bool nvfp4 = p.format == static_cast<int>(Format::kNvfp4);
  if (p.operand == static_cast<int>(Operand::kBf16)) {
    return nvfp4 ? dispatch_tokens<Operand::kBf16, Format::kNvfp4>(p, stream)
                 : dispatch_tokens<Operand::kBf16, Format::kMxfp4>(p, stream);
  }
  return nvfp4 ? dispatch_tokens<Operand::kFp16, Format::kNvfp4>(p, stream)
               : dispatch_tokens<Operand::kFp16, Format::kMxfp4>(p, stream);
}

}  // namespace fp4
