// y[M, N] = tokens x FP4 weight^T on Hopper's tensor cores, for more than a few tokens.
//
// wgmma takes only operand A from registers, so the weights are A (64 rows a warpgroup), expanded from FP4 in registers
// with their block scales folded in (exact: E2M1 x E4M3 has 6 significant bits, and E2M1 x 2^e is an E4M3 number), and the
// tokens are B (16..256 tokens a tile) in shared memory. A producer warp streams prepared weight tiles and token tiles with
// bulk copies into a ring of stages; two consumer warpgroups expand and multiply. With few blocks the k range is split over
// the blocks of a cluster, which add up through distributed shared memory in a fixed order, so that the result is the same
// every time and no workspace exists. Blocks of a cluster with neighbouring rows share the tokens they fetch.
#include "cluster_sm90.cuh"
#include "consume16_sm90.cuh"
#include "expand_fp4.cuh"
#include "gemm_parts.cuh"
#include "wgmma_sm90.cuh"

namespace fp4 {
namespace {

constexpr int kGroups = 2;           // consumer warpgroups
constexpr int kRows = 64 * kGroups;  // output features of a block
constexpr int kConsumers = 128 * kGroups;
// E4M3: the tensor cores add up so many tiles of 64 k before the sums go on in FP32. Inside, they keep about 14 bits.
constexpr int kPromoteTiles = 2;

// Sizes by tokens of a tile. Few tokens: two blocks per multiprocessor.
template <Operand kOperand, int kTokens>
struct Shape {
  static constexpr bool kE4m3 = kOperand == Operand::kE4m3;
  // Accumulators of wide token tiles, with E4M3 twice as many, need more registers than an even share: the producer is then
  // a whole warpgroup, which hands its registers over.
  static constexpr bool kMoveRegisters = kTokens >= (kE4m3 ? 64 : 128);
  static constexpr int kThreads = kConsumers + (kMoveRegisters ? 128 : 32);
  static constexpr int kBlocksPerSm = kTokens <= 64 ? 2 : 1;
  // Alone on its multiprocessor and with registers to spare, a block does several items, so that the ring is filled for the
  // next one while the results of one are written.
  static constexpr bool kItems = kTokens >= 128;
  static constexpr int kTilesPerStage = kE4m3 ? kPromoteTiles : kTokens <= 128 ? 2 : 1;
  static constexpr int kStages = kE4m3 ? (kTokens == 64 ? 6 : kTokens == 256 ? 5 : 8)
                                       : (kTokens <= 32 ? 6 : kTokens == 64 ? 4 : 5);
};

template <Operand kOperand, Format kFormat, int kTokens>
struct Traits : Shape<kOperand, kTokens> {
  using S = Shape<kOperand, kTokens>;
  static constexpr int kWeightTile = tile_bytes(kFormat);
  static constexpr int kTokenTile = kTokens * kTileK * (S::kE4m3 ? 1 : 2);
  static constexpr int kWeightStage = S::kTilesPerStage * kWeightTile;  // of one warpgroup
  static constexpr int kTokenOffset = (kGroups * kWeightStage + 127) / 128 * 128;
  static constexpr int kStageBytes = kTokenOffset + S::kTilesPerStage * kTokenTile;
  static constexpr int kWeightOffset = 0, kWeightStride = kStageBytes, kTokenStride = kStageBytes;
  static constexpr bool kSwizzled = false, kEndless = false;  // of consume16
  static_assert(kWeightOffset + kWeightStride == kTokenStride && !kSwizzled && !kEndless);  // read here at least: E4M3 does not
  static constexpr int kReduceStride = kRows + 4;  // what write_output reads
  static constexpr int kReduceBytes = kTokens * kReduceStride * 4;
  static constexpr int kRing = S::kStages * kStageBytes > kReduceBytes ? S::kStages * kStageBytes : kReduceBytes;
  static constexpr int kTableOffset = kRing + 256;  // after the barriers
  static constexpr int kStagingOffset = kTableOffset + (S::kE4m3 ? 256 * 8 : 0);
  static constexpr int kSmem = kStagingOffset + kConsumers / 32 * 1024 + 128;  // 128: alignment
};

struct Range {
  int first, count;  // k tiles of this block
};

// What a cluster does one after the other: tiles of tokens of a group of row blocks, then of the next group, so that
// clusters at work share weights and tokens in L2. More than one only with Shape::kItems and where K is not divided.
struct Items {
  int token_blocks, first, step, count;
  __device__ __forceinline__ Items(const GemmArgs& args, int tokens)
      : token_blocks((args.p.m + tokens - 1) / tokens),
        first(blockIdx.z * gridDim.y + blockIdx.y),
        step(gridDim.y * gridDim.z),
        count(args.items == step ? 1 : (args.items - first + step - 1) / step) {}
  __device__ __forceinline__ int token_block(int i) const {
    return token_blocks == 1 ? 0 : (first + i * step) % token_blocks;
  }
  __device__ __forceinline__ int row_group(int i) const {
    return token_blocks == 1 ? first + i * step : (first + i * step) / token_blocks;
  }
};

template <class T>
__device__ __forceinline__ int stages_for(int tiles) {
  return (tiles + T::kTilesPerStage - 1) / T::kTilesPerStage;
}

// One warp, all of whose lanes go the same way.
template <class T>
struct Producer {
  const GemmProblem& p;
  const ClusterPlace& place;
  const Ring<T>& ring;
  Range k;
  const Items& items;
  uint64_t stream_once = policy_evict_first(), keep = policy_evict_last();

  struct Feed {  // what fills a stage: tiles from `tile` on of this block's k range
    Cursor<T> at;
    int item, tile;
    const uint8_t* weights[kGroups];  // where the k range begins
    const uint8_t* tokens;
  };
  __device__ __forceinline__ Feed feed(Cursor<T> at, int item) const {
    Feed f{at, item, 0};
    int row_block = place.row_block_of(items.row_group(item));
    const GemmPart part = part_of(p, kRows, row_block);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int64_t row_tile = min(row_block * kGroups + g, (part.n + 63) / 64 - 1);
      f.weights[g] = part.weight + (row_tile * p.k_tiles + k.first) * T::kWeightTile;
    }
    const int64_t token_tile = static_cast<int64_t>(items.token_block(item)) * p.k_tiles + k.first;
    f.tokens = static_cast<const uint8_t*>(p.x) + token_tile * T::kTokenTile;
    return f;
  }
  __device__ __forceinline__ void next(Feed& f) const {
    f.at.next();
    f.tile += T::kTilesPerStage;
    if (f.tile >= k.count && f.item + 1 < items.count) f = feed(f.at, f.item + 1);
  }
  __device__ __forceinline__ int stages() const { return items.count * stages_for<T>(k.count); }
  __device__ __forceinline__ int tiles_of(const Feed& f) const { return min(T::kTilesPerStage, k.count - f.tile); }

  __device__ __forceinline__ void copy_weights(const Feed& f) const {
    const int tiles = tiles_of(f);
    const uint32_t full = ring.full(f.at.stage);
    barrier_expect(full, tiles * (kGroups * T::kWeightTile + T::kTokenTile));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      bulk_copy(ring.stage(f.at.stage) + g * T::kWeightStage, f.weights[g] + f.tile * T::kWeightTile, tiles * T::kWeightTile,
                full, items.token_blocks == 1 ? stream_once : keep);
    }
  }
  __device__ __forceinline__ void copy_tokens(const Feed& f) const {
    place.copy_tokens(ring.stage(f.at.stage) + T::kTokenOffset, f.tokens + static_cast<int64_t>(f.tile) * T::kTokenTile,
                      tiles_of(f) * T::kTokenTile, ring.full(f.at.stage), keep);
  }
  // Weights never depend on the kernel before, and need no other block's barriers: fetch them while it still runs.
  __device__ void begin() const {
    Feed f = feed({}, 0);
    for (int i = 0; i < min(stages(), T::kStages); ++i, next(f)) copy_weights(f);
  }
  __device__ void run() const {
    Feed f = feed({}, 0);
    const int early = min(stages(), T::kStages);
    grid_dependency_wait();
    for (int i = 0; i < early; ++i, next(f)) copy_tokens(f);
    for (int i = early; i < stages(); ++i, next(f)) {
      barrier_wait(ring.empty(f.at.stage), f.at.phase ^ 1);
      copy_weights(f);
      copy_tokens(f);
    }
  }
};

// The E4M3 bytes of all codes under a prepared scale byte: table[byte].
__device__ __forceinline__ uint2 load_table(uint32_t table, uint32_t byte) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(table + byte * 8));
  return v;
}

// A stage's tiles are multiplied into `sums`, which then are added to `acc`: one warpgroup adds while the other multiplies.
// 256 tokens leave no registers for all sums: they are taken 128 tokens at a time. Tile 1 is expanded while the tensor
// cores multiply tile 0, and the next stage's tile 0 while they multiply tile 1. What an expansion reads is on its way before
// the products that come first, but with 256 tokens, again for want of registers.
//
// Per 64 k, the tensor cores of a multiprocessor need 2 x kTokens cycles. From L2 it takes 4352 bytes of weights and
// 64 x kTokens / share of tokens, of about 24 bytes a cycle: 256 tokens are 40 bytes a cycle alone, 25 shared by two
// blocks, 17 by four; 128 tokens 49, 33 and 25.
//
// `at` is the first stage and becomes the one after the last; stages_after: how many will still be consumed then.
template <class T, int kTokens>
__device__ __forceinline__ void consume_e4m3(const Ring<T>& ring, const Releaser& releaser, int tiles, int stages_after,
                                             uint32_t table, Cursor<T>& at, float (&acc)[kTokens / 2]) {
  static_assert(kPromoteTiles == 2 && T::kTilesPerStage == 2);
  constexpr int kPart = kTokens < 128 ? kTokens : 128, kParts = kTokens / kPart;
  constexpr bool kLoadAhead = kTokens < 256;
  const int group = threadIdx.x / 128, slice = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t codes = ring.base + group * T::kWeightStage + codes_offset(slice, lane);
  const uint32_t scales = ring.base + group * T::kWeightStage + scales_offset(Format::kMxfp4, slice, lane);
  const uint64_t tokens = token_descriptor<kTokens>(ring.base + T::kTokenOffset);
  uint32_t a[2][2][4];
  float sums[kPart / 2] = {};
  uint4 raw;  // the tile that is expanded next, and the tables of its rows
  uint2 tables[2];
  Cursor<T> read = at;
  auto load = [&](int tile) {
    if (tile == 0) barrier_wait(ring.full(read.stage), read.phase);
    const uint32_t offset = read.stage * T::kStageBytes + tile * T::kWeightTile, s = load_shared2(scales + offset);
    raw = load_shared16(codes + offset);
    tables[0] = load_table(table, s & 0xFF);
    tables[1] = load_table(table, s >> 8);
    if (tile == 1) read.next();
  };
  auto load_ahead = [&](int tile) {
    if (kLoadAhead) load(tile);
  };
  auto expand = [&](int tile) {
    if (!kLoadAhead) load(tile);
    not_before(raw);
    expand8(raw, tables[0], tables[1], a[tile]);
  };
  auto multiply = [&](int tile, int part) {
    const uint64_t first = tokens + (at.stage * T::kStageBytes + tile * T::kTokenTile) / 16 + part * kPart;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j)
      Wgmma<Operand::kE4m3, kPart>::run(sums, a[tile][j], first + j * kTokens * 2, tile + j > 0);
    wgmma_commit();
  };
  auto promote = [&](int part) {
    wgmma_wait<0>();
#pragma unroll
    for (int r = 0; r < kPart / 2; ++r) {
      asm volatile("" : "+f"(sums[r]));  // not before the wait
      acc[part * (kPart / 2) + r] += sums[r];
    }
  };
  // The stage of tiles i and i + 1.
  auto stage = [&](int i, bool far_from_end) {
    const bool two = far_from_end || i + 1 < tiles, more = far_from_end || i + 2 < tiles;
    multiply(0, 0);
    if (two) expand(1);
    if (more) load_ahead(0);
    if (two) multiply(1, 0);
#pragma unroll
    for (int part = 1; part < kParts; ++part) {
      promote(part - 1);
      multiply(0, part);
      if (two) multiply(1, part);
    }
    if (more) {
      wgmma_wait<1>();  // tile 0 has been multiplied: its registers are free
      expand(0);
      if (far_from_end || i + 3 < tiles) load_ahead(1);
    }
    promote(kParts - 1);
    if (i + 2 * (T::kStages - stages_after) < tiles) releaser.release(at.stage);
    at.next();
  };

  if (tiles == 0) return;
  load_ahead(0);
  expand(0);
  if (tiles > 1) load_ahead(1);
  int i = 0;
  for (; i + 3 < tiles; i += 2) stage(i, true);
  for (; i < tiles; i += 2) stage(i, false);
}

template <class T, int kTokens>
__device__ __forceinline__ void store_accumulators(uint32_t reduce, const float (&acc)[kTokens / 2]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  reduce += (2 * t * T::kReduceStride + warp * 16 + g) * 4;
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      store_shared4(reduce + ((8 * i + j % 2) * T::kReduceStride + j / 2 * 8) * 4, acc[4 * i + j]);
}

// Where K is not divided, each warp writes its 16 rows without the others. `staging`: 1 KB of its own, where 16 tokens at a
// time are transposed, so that 32 bytes of a token are written together. The same bits as by write_output.
template <int kTokens, typename Out>
__device__ __forceinline__ void write_rows(const GemmArgs& args, int row_block, int token_block, uint32_t staging,
                                           const float (&acc)[kTokens / 2]) {
  const GemmProblem& p = args.p;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int n0 = row_block * kRows + warp * 16, tokens = min(kTokens, p.m - token_block * kTokens);
  if (n0 >= p.n) return;
  const Out* bias = static_cast<const Out*>(p.bias);
  float row_scale[2], added[2];  // of rows g and g+8
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    row_scale[r] = p.row_scale[n0 + g + 8 * r] * args.factor;
    added[r] = bias != nullptr ? static_cast<float>(bias[n0 + g + 8 * r]) : -0.0f;  // adding -0 changes nothing
  }
  // Of the thread's tokens 8i + 2t and the next, then those 8 on. Fetched one step ahead.
  auto token_scales = [&](int i) {
    const int token = 8 * i + 2 * t;
    auto scale = [&](int m) { return token_scale_of(p, token_block * kTokens + min(m, tokens - 1)); };
    return make_float4(scale(token), scale(token + 1), scale(token + 8), scale(token + 9));
  };
  float4 ahead = token_scales(0);
  Out* out = static_cast<Out*>(p.out) + (static_cast<int64_t>(token_block) * kTokens + lane / 2) * p.n + n0 + lane % 2 * 8;
#pragma unroll
  for (int i = 0; i < kTokens / 8; i += 2) {  // tokens 8i..8i+15
    if (8 * i >= tokens) break;
    const float token_scale[2][2] = {{ahead.x, ahead.y}, {ahead.z, ahead.w}};
    if (i + 2 < kTokens / 8) ahead = token_scales(i + 2);
    uint32_t pairs[2][2];  // [8 tokens][8 rows]: tokens 2t, 2t+1 of row g
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* v = acc + 4 * (i + h) + 2 * r;
        pairs[h][r] = pack_pair<Out>(v[0] * (row_scale[r] * token_scale[h][0]) + added[r],
                                     v[1] * (row_scale[r] * token_scale[h][1]) + added[r]);
      }
    const uint32_t buffer = staging + i / 2 % 2 * 512;  // two in turn: one barrier of the warp is enough
    store_transposed(buffer + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16, pairs);
    __syncwarp();
    const uint4 rows = load_shared16(buffer + lane * 16);  // token 8i + lane / 2, 8 rows
    if (8 * i + lane / 2 < tokens) __stcg(reinterpret_cast<uint4*>(out + static_cast<int64_t>(8 * i) * p.n), rows);
  }
}

__device__ __forceinline__ void consumer_sync() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

// The results of one item.
template <class T, int kTokens, typename Out>
__device__ __forceinline__ void write(const GemmArgs& args, const ClusterPlace& place, uint32_t base, int token_block,
                                      const float (&acc)[kTokens / 2]) {
  if (place.split == 1) {  // the ring stays as it is: it may be being filled for the next item
    const uint32_t staging = base + T::kStagingOffset + threadIdx.x / 32 * 1024;
    return write_rows<kTokens, Out>(args, place.row_block, token_block, staging, acc);
  }
  consumer_sync();  // every stage has been read: the ring becomes the reduction buffer
  store_accumulators<T, kTokens>(base, acc);
  add_and_write<kTokens, kRows, kConsumers, Out>(args, place, base, token_block);
}

template <Operand kOperand, Format kFormat, int kTokens>
__device__ __forceinline__ void multiply_block(const GemmArgs& args, ClusterPlace place, const Items& items) {
  using T = Traits<kOperand, kFormat, kTokens>;
  extern __shared__ uint8_t raw[];
  const GemmProblem& p = args.p;
  const uint32_t base = (smem_address(raw) + 127) & ~127u;
  const Ring<T> ring{base, base + T::kRing};
  const int first = static_cast<int>(static_cast<int64_t>(p.k_tiles) * place.part / place.split);
  const Range k{first, static_cast<int>(static_cast<int64_t>(p.k_tiles) * (place.part + 1) / place.split) - first};
  const bool clustered = gridDim.x > 1;
  // The same in all lanes, and known to be: what only depends on it then needs no register of a lane.
  const int warp = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0);

  grid_dependency_launch();
  if (threadIdx.x == kConsumers) {
    for (int s = 0; s < T::kStages; ++s) {
      barrier_init(ring.full(s), 1);
      barrier_init(ring.empty(s), 4 * kGroups * place.share);
    }
    barrier_init_fence();
  }
  if constexpr (T::kE4m3) {
    uint2* table = reinterpret_cast<uint2*>(raw + (base - smem_address(raw)) + T::kTableOffset);
    if (threadIdx.x < 256) table[threadIdx.x] = e4m3_table(kTopScaleMxfp4 - static_cast<int>(threadIdx.x));
  }
  __syncthreads();
  if (clustered) cluster_arrive_relaxed();  // the other blocks may use this one's barriers: barrier_init_fence

  if (warp >= kConsumers / 32) {
    if constexpr (T::kMoveRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    const Producer<T> producer{p, place, ring, k, items};
    const bool works = warp == kConsumers / 32;
    if (works) producer.begin();
    if (clustered) cluster_wait();
    if (works) producer.run();
  } else {
    if constexpr (T::kMoveRegisters) {
      // With 24 of a producer thread, all registers of a block.
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::kBlocksPerSm == 1 ? 240 : 104));
    }
    {
      int row_block = place.row_block;
      const GemmPart part = part_of(p, kRows, row_block);
      prefetch_row_data<kRows>(part.row_scale, part.bias, row_block * kRows, part.n);
    }
    if (clustered) cluster_wait();
    const Releaser releaser(place, ring.empty(0));
    Cursor<T> at;
    for (int i = 0; i < (T::kItems ? items.count : 1); ++i) {
      const int token_block = items.token_block(i);
      place.row_block = place.row_block_of(items.row_group(i));
      float acc[kTokens / 2];
#pragma unroll
      for (int r = 0; r < kTokens / 2; ++r) acc[r] = 0.0f;
      const int stages_after = T::kItems ? (items.count - 1 - i) * stages_for<T>(k.count) : 0;
      if constexpr (T::kE4m3) {
        consume_e4m3<T, kTokens>(ring, releaser, k.count, stages_after, base + T::kTableOffset, at, acc);
      } else {
        consume16<T, kOperand, kFormat, kTokens>(ring, releaser, k.count, stages_after, at, acc);
      }
      grid_dependency_wait();
      GemmArgs mine = args;
      static_cast<GemmPart&>(mine.p) = part_of(p, kRows, place.row_block);
      if (p.out_is_bf16) write<T, kTokens, __nv_bfloat16>(mine, place, base, token_block, acc);
      else write<T, kTokens, __half>(mine, place, base, token_block, acc);
    }
  }
}

template <Operand kOperand, Format kFormat, int kTokens>
__global__ void __launch_bounds__(Shape<kOperand, kTokens>::kThreads, Shape<kOperand, kTokens>::kBlocksPerSm)
    gemm_w4_kernel(const __grid_constant__ GemmArgs args) {
  multiply_block<kOperand, kFormat, kTokens>(args, ClusterPlace(args, blockIdx.z), Items(args, kTokens));
}

template <Operand kOperand, Format kFormat, int kTokens>
void launch(const GemmProblem& p, cudaStream_t stream) {
  using T = Traits<kOperand, kFormat, kTokens>;
  const auto kernel = gemm_w4_kernel<kOperand, kFormat, kTokens>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kAloneSmem), "shared memory");
  static const Room room{count_clusters(kernel, T::kThreads, T::kSmem), count_clusters(kernel, T::kThreads, kAloneSmem)};
  // E4M3 has twice the tensor cores' rate, and of few tokens the expansion takes longer.
  const float math_ns = kGroups * (T::kE4m3 ? kTokens * 0.51f + 11 : kTokens * 1.06f + 3.7f);
  const BlockCost cost{kGroups * T::kWeightTile, T::kTokenTile, T::kReduceBytes, math_ns, T::kBlocksPerSm};
  launch_divided(kernel, room, cost, kRows, kTokens, T::kThreads, T::kSmem, kOperand, kFormat, T::kItems, p, stream);
}

template <Operand kOperand, Format kFormat>
void dispatch_tokens(const GemmProblem& p, cudaStream_t stream) {
  switch (p.token_tile) {
    case 16:
      if constexpr (kOperand != Operand::kE4m3) return launch<kOperand, kFormat, 16>(p, stream);
      break;
    case 32: return launch<kOperand, kFormat, 32>(p, stream);
    case 64: return launch<kOperand, kFormat, 64>(p, stream);
    case 128: return launch<kOperand, kFormat, 128>(p, stream);
    case 256: return launch<kOperand, kFormat, 256>(p, stream);
  }
  throw std::runtime_error("gemm_w4_sm90: token_tile must be 16 (of 16-bit operands), 32, 64, 128 or 256, got " +
                           std::to_string(p.token_tile));
}

}  // namespace

void run_gemm_sm90(const GemmProblem& p, cudaStream_t stream) {
  if (p.m == 0) return;
  if (p.operand == static_cast<int>(Operand::kE4m3)) return dispatch_tokens<Operand::kE4m3, Format::kMxfp4>(p, stream);
  with_types(p.operand, p.format,
             [&](auto operand, auto format) { dispatch_tokens<operand.value, format.value>(p, stream); });
}

}  // namespace fp4
