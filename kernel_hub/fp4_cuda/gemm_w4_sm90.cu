// y[M, N] = tokens x FP4 weight^T on Hopper's tensor cores, for more than a few tokens.
//
// wgmma takes only operand A from registers, so the weights are A (64 rows a warpgroup), expanded from FP4 in registers
// with their block scales folded in (exact: E2M1 x E4M3 has 6 significant bits, and E2M1 x 2^e is an E4M3 number), and the
// tokens are B (8..256 tokens a tile) in shared memory. A producer warp streams prepared weight tiles and token tiles with
// bulk copies into a ring of stages; two consumer warpgroups expand and multiply. Work that does not fall evenly to all
// multiprocessors is divided in K too: see Work.
#include "consume16_sm90.cuh"
#include "division_sm90.cuh"
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

// Sizes by tokens of a tile.
template <Operand kOperand, int kTokens>
struct Shape {
  static constexpr bool kE4m3 = kOperand == Operand::kE4m3;
  static constexpr bool kFew = kTokens <= (kE4m3 ? 64 : 32);
  static constexpr int kBlocksPerSm = kFew ? 2 : 1;  // where there is work for two
  // Accumulators of wide token tiles, with E4M3 twice as many, need more registers than an even share: the producer is then
  // a whole warpgroup, which hands its registers over.
  static constexpr bool kMoveRegisters = kTokens >= (kE4m3 ? 32 : 256);
  static constexpr int kThreads = kConsumers + (kMoveRegisters ? 128 : 64);
  // As if there were so many threads, which leaves registers for blocks that quantize the next tokens.
  static constexpr int kBound = kFew ? (!kE4m3 && kTokens == 32 ? 640 : 768) : kMoveRegisters ? kThreads : 512;
  static constexpr bool kTurns = kE4m3 && kTokens >= 128;  // see consume_e4m3
  static constexpr int kTilesPerStage = kE4m3 ? kPromoteTiles : kTokens <= 128 ? 2 : 1;
  static constexpr int kStages = kE4m3 ? (kTokens == 64    ? 6
                                          : kTokens == 256 ? 5
                                                           : 8)
                                       : (kTokens <= 32    ? 6
                                          : kTokens == 64  ? 7
                                          : kTokens == 128 ? 4
                                                           : 5);
};

// Where a warpgroup's results lie between registers and memory: two buffers in turn of 64 rows of some tokens.
template <int kTokens>
struct Staging {
  static constexpr int kAtOnce = kTokens <= 64 ? 16 : 32;
  static constexpr int kStride = 64 * 2 + 16;  // of a token; 8 of them are in different banks
  static constexpr int kBuffer = kAtOnce * kStride, kBytes = 2 * kBuffer;
};

// What an item's sums are multiplied by, and what is added then, as floats in shared memory.
template <int kTokens>
struct Factors {
  static constexpr int kRowScales = kTokens * 4, kAdded = kRowScales + kRows * 4, kBytes = kAdded + kRows * 4;
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
  static constexpr bool kSwizzled = false, kKeepsLast = true;  // of consume16
  // Read here at least: E4M3 does not.
  static_assert(kWeightOffset + kWeightStride == kTokenStride && !kSwizzled && kKeepsLast);
  static constexpr int kRing = S::kStages * kStageBytes;
  static constexpr int kTableOffset = kRing + 256;  // after the barriers
  static constexpr int kStagingOffset = kTableOffset + (S::kE4m3 ? 256 * 8 : 0);
  static constexpr int kFactorsOffset = kStagingOffset + kGroups * Staging<kTokens>::kBytes;
  static constexpr int kSmem = kFactorsOffset + Factors<kTokens>::kBytes + 128;  // 128: alignment
};

struct Range {
  int first, count;  // k tiles
};

// A tile of tokens times a block of rows, and the part of K.
struct Segment {
  int item;
  Range k;
};

// What a block does one after the other; its ring is filled for the next segment while the results of one are written.
//
// First its share of the last `args.streamed` items (stream-K): their stages lie in a row, of which each block takes an equal
// part, so that all blocks end at the same time however many items there are. Of an item that is divided so, the block that has
// its end adds up the sums of all, in a fixed order, and writes the results; the others hand their sums on. A block begins at
// the end of its part, with what others wait for. Blocks wait only for those before them, which were started earlier.
//
// Then whole items, every step-th: all tiles of tokens of a block of rows, then of the next one, so that blocks at work share
// weights and tokens in L2.
template <class T>
struct Work {
  int token_blocks, k_tiles, item_stages;
  int first, step, wholes;                 // whole items
  int streamed_first, begin, end, pieces;  // item, and this block's part of the stages from there on
  int sources;                             // blocks before this one whose sums it adds to those of its last piece
  __device__ __forceinline__ Work(const GemmArgs& args, int tokens)
      : token_blocks((args.p.m + tokens - 1) / tokens),
        k_tiles(args.p.k_tiles),
        item_stages((k_tiles + T::kTilesPerStage - 1) / T::kTilesPerStage),
        first(blockIdx.x),
        step(args.blocks),
        streamed_first(args.items - args.streamed),
        begin(0),
        end(0),
        pieces(0),
        sources(0) {
    wholes = first < streamed_first ? (streamed_first - first + step - 1) / step : 0;
    if (args.streamed == 0 || first >= step) return;
    const uint32_t stages = args.streamed * item_stages;
    begin = stages * first / step;
    end = stages * (first + 1) / step;
    pieces = (end - 1) / item_stages - begin / item_stages + 1;
    const bool has_an_end = pieces > 1 || !hands_on();
    const uint32_t item_begin = begin / item_stages * item_stages;
    if (has_an_end) sources = first - static_cast<int>(((item_begin + 1) * step - 1) / stages);
  }
  __device__ __forceinline__ int stages() const { return end - begin + wholes * item_stages; }
  __device__ __forceinline__ int segments() const { return pieces + wholes; }
  __device__ __forceinline__ bool hands_on() const { return end % item_stages != 0; }  // segment 0
  __device__ __forceinline__ bool takes_over(int i) const { return i + 1 == pieces && sources > 0; }
  __device__ __forceinline__ Segment segment(int i) const {
    if (i >= pieces) return {first + (i - pieces) * step, {0, k_tiles}};
    const int item = (end - 1) / item_stages - i, item_begin = item * item_stages;
    const int from = max(begin - item_begin, 0) * T::kTilesPerStage;
    return {streamed_first + item, {from, min((end - item_begin) * T::kTilesPerStage, k_tiles) - from}};
  }
  __device__ __forceinline__ int token_block(int item) const { return token_blocks == 1 ? 0 : item % token_blocks; }
  __device__ __forceinline__ int row_block(int item) const { return token_blocks == 1 ? item : item / token_blocks; }
};

// One warp, all of whose lanes go the same way.
template <class T>
struct Producer {
  const GemmProblem& p;
  const Ring<T>& ring;
  const Work<T>& work;
  uint64_t stream_once = policy_evict_first(), keep = policy_evict_last();

  struct Feed {  // what fills a stage: tiles from `tile` on of a segment
    Cursor<T> at;
    int segment, tile, tiles;
    const uint8_t* weights[kGroups];  // where the segment begins
    const uint8_t* tokens;
  };
  __device__ __forceinline__ Feed feed(Cursor<T> at, int segment) const {
    const Segment s = work.segment(segment);
    Feed f{at, segment, 0, s.k.count};
    int row_block = work.row_block(s.item);
    const GemmPart part = part_of(p, kRows, row_block);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const int64_t row_tile = min(row_block * kGroups + g, (part.n + 63) / 64 - 1);
      f.weights[g] = part.weight + (row_tile * p.k_tiles + s.k.first) * T::kWeightTile;
    }
    const int64_t token_tile = static_cast<int64_t>(work.token_block(s.item)) * p.k_tiles + s.k.first;
    f.tokens = static_cast<const uint8_t*>(p.x) + token_tile * T::kTokenTile;
    return f;
  }
  __device__ __forceinline__ void next(Feed& f) const {
    f.at.next();
    f.tile += T::kTilesPerStage;
    if (f.tile >= f.tiles && f.segment + 1 < work.segments()) f = feed(f.at, f.segment + 1);
  }
  __device__ __forceinline__ int tiles_of(const Feed& f) const { return min(T::kTilesPerStage, f.tiles - f.tile); }

  __device__ __forceinline__ void copy_weights(const Feed& f) const {
    const int tiles = tiles_of(f);
    const uint32_t full = ring.full(f.at.stage);
    barrier_expect(full, tiles * (kGroups * T::kWeightTile + T::kTokenTile));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      bulk_copy(ring.stage(f.at.stage) + g * T::kWeightStage, f.weights[g] + f.tile * T::kWeightTile, tiles * T::kWeightTile,
                full, work.token_blocks == 1 ? stream_once : keep);
    }
  }
  __device__ __forceinline__ void copy_tokens(const Feed& f) const {
    bulk_copy(ring.stage(f.at.stage) + T::kTokenOffset, f.tokens + static_cast<int64_t>(f.tile) * T::kTokenTile,
              tiles_of(f) * T::kTokenTile, ring.full(f.at.stage), keep);
  }
  // Weights never depend on the kernel before: fetch them while it still runs.
  __device__ void begin() const {
    Feed f = feed({}, 0);
    for (int i = 0; i < min(work.stages(), T::kStages); ++i, next(f)) copy_weights(f);
  }
  __device__ void run() const {
    Feed f = feed({}, 0);
    const int stages = work.stages(), early = min(stages, T::kStages);
    grid_dependency_wait();
    for (int i = 0; i < early; ++i, next(f)) copy_tokens(f);
    for (int i = early; i < stages; ++i, next(f)) {
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

// Named barriers: of all consumers and the messenger (carry_messages); of a group; of both groups; of a group and the
// messenger.
enum Barrier : int {
  kHandedOn = 1,
  kTakenOver,
  kOfGroup,
  kTurnOf = kOfGroup + kGroups,
  kFactorsThere = kTurnOf + kGroups,
  kFactorsRead = kFactorsThere + kGroups
};

template <int kThreads>
__device__ __forceinline__ void named_sync(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}
template <int kThreads>
__device__ __forceinline__ void named_arrive(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

// A stage's tiles are multiplied into `sums`, which then are added to `acc`. 256 tokens leave no registers for all sums: they
// are taken 128 tokens at a time. The two warpgroups of a block that is alone on its multiprocessor take turns: one gives the
// tensor cores a stage's products while the other adds its last ones and expands its next tiles. What an expansion reads is on
// its way before it, but with 256 tokens, again for want of registers.
//
// `at` is the first stage and becomes the one after the last.
template <class T, int kTokens>
__device__ __forceinline__ void consume_e4m3(const Ring<T>& ring, int tiles, uint32_t table, Cursor<T>& at,
                                             float (&acc)[kTokens / 2]) {
  static_assert(kPromoteTiles == 2 && T::kTilesPerStage == 2);
  constexpr int kPart = kTokens < 128 ? kTokens : 128, kParts = kTokens / kPart;
  constexpr bool kLoadAhead = kTokens < 256;
  const int group = threadIdx.x / 128, slice = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const uint32_t codes = ring.base + group * T::kWeightStage + codes_offset(slice, lane);
  const uint32_t scales = ring.base + group * T::kWeightStage + scales_offset(Format::kMxfp4, slice, lane);
  const TokenDescriptors<kTokens != 256> tokens(token_descriptor<kTokens>(ring.base + T::kTokenOffset));
  uint32_t a[2][2][4];
  float sums[kPart / 2] = {};
  struct Loaded {
    uint4 raw;
    uint2 tables[2];
  } loaded[2];
  Cursor<T> read = at;
  auto load = [&](int tile) {
    if (tile == 0) barrier_wait(ring.full(read.stage), read.phase);
    const uint32_t offset = read.stage * T::kStageBytes + tile * T::kWeightTile, s = load_shared2(scales + offset);
    loaded[tile].raw = load_shared16(codes + offset);
    loaded[tile].tables[0] = load_table(table, s & 0xFF);
    loaded[tile].tables[1] = load_table(table, s >> 8);
    if (tile == 1) read.next();
  };
  auto load_ahead = [&](int tile) {
    if (kLoadAhead) load(tile);
  };
  auto expand = [&](int tile) {
    if (!kLoadAhead) load(tile);
    not_before(loaded[tile].raw);
    expand8(loaded[tile].raw, loaded[tile].tables[0], loaded[tile].tables[1], a[tile]);
  };
  auto multiply = [&](int tile, int part) {
    const uint32_t first = at.stage * (T::kStageBytes / 16) + tile * (T::kTokenTile / 16) + part * kPart;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j)
      Wgmma<Operand::kE4m3, kPart>::run(sums, a[tile][j], tokens.at(first + j * kTokens * 2), tile + j > 0);
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
    const bool two = far_from_end || i + 1 < tiles, more = far_from_end || i + 2 < tiles,
               two_more = far_from_end || i + 3 < tiles;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part > 0) promote(part - 1);
      if (T::kTurns) named_sync<kConsumers>(kTurnOf + group);
      multiply(0, part);
      if (two) multiply(1, part);
      if (T::kTurns) named_arrive<kConsumers>(kTurnOf + (group ^ 1));
    }
    if (more) load_ahead(0);
    if (two_more) load_ahead(1);
    if (more) {
      wgmma_wait<1>();  // tile 0 has been multiplied: its registers are free
      expand(0);
    }
    promote(kParts - 1);
    ring.release(at.stage);
    if (two_more) expand(1);
    at.next();
  };

  if (tiles == 0) return;
  load_ahead(0);
  if (tiles > 1) load_ahead(1);
  expand(0);
  if (tiles > 1) expand(1);
  int i = 0;
  for (; i + 3 < tiles; i += 2) stage(i, true);
  for (; i < tiles; i += 2) stage(i, false);
}

// A block hands its sums of an item on to the one that has the item's end. Consumers neither wait until their sums are there
// for others, nor look for those of others: the messenger does.
template <int kTokens>
__device__ __forceinline__ float4* handed_sums(const Exchange& exchange, int block) {
  return exchange.sums + (block * (kConsumers / 32) + threadIdx.x / 32) * (kTokens / 8 * 32) + threadIdx.x % 32;
}

template <int kTokens>
__device__ __forceinline__ void hand_on(const Exchange& exchange, int block, const float (&acc)[kTokens / 2]) {
  float4* sums = handed_sums<kTokens>(exchange, block);
#pragma unroll
  for (int i = 0; i < kTokens / 8; ++i)
    __stcg(sums + i * 32, make_float4(acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]));
  named_arrive<kConsumers + 32>(kHandedOn);
}

// Adds the sums of the `sources` blocks before this one, as much at once as there are registers for.
template <int kTokens, bool kFew>
__device__ __forceinline__ void take_over(const Exchange& exchange, int block, int sources, float (&acc)[kTokens / 2]) {
  constexpr int kAll = kTokens / 8, kMost = kFew ? 8 : 16, kAtOnce = kAll < kMost ? kAll : kMost, kSources = kMost / kAtOnce;
  named_sync<kConsumers + 32>(kTakenOver);
#pragma unroll 1
  for (int source = block - sources; source < block; source += kSources) {
#pragma unroll
    for (int first = 0; first < kAll; first += kAtOnce) {
      float4 v[kSources][kAtOnce];
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        if (s > 0 && source + s >= block) break;
        const float4* sums = handed_sums<kTokens>(exchange, source + s);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) v[s][i] = __ldcg(sums + (first + i) * 32);
      }
#pragma unroll
      for (int s = 0; s < kSources; ++s) {
        if (s > 0 && source + s >= block) break;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          float* a = acc + 4 * (first + i);
          a[0] += v[s][i].x, a[1] += v[s][i].y, a[2] += v[s][i].z, a[3] += v[s][i].w;
        }
      }
      if (first + kAtOnce < kAll) __syncwarp();  // no loads of the next ones yet
    }
  }
}

// By the messenger.
template <int kTokens>
__device__ __forceinline__ void fetch_factors(const GemmProblem& p, int row_block, int token_block, uint32_t factors) {
  using F = Factors<kTokens>;
  const GemmPart part = part_of(p, kRows, row_block);
  const int lane = threadIdx.x % 32, first_token = token_block * kTokens;
#pragma unroll 1
  for (int i = lane; i < kTokens; i += 32) {
    const int token = min(first_token + i, p.m - 1);
    if (p.token_scale == nullptr) store_shared4(factors + i * 4, 1.0f);
    else copy_own4(factors + i * 4, p.token_scale + token * p.token_scale_stride);
  }
#pragma unroll 1
  for (int i = lane; i < kRows; i += 32) {
    const int row = min(row_block * kRows + i, part.n - 1);
    copy_own4(factors + F::kRowScales + i * 4, part.row_scale + row);
    float added = -0.0f;  // adding it changes nothing
    if (part.bias != nullptr) {
      added = p.out_is_bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(part.bias)[row])
                            : __half2float(static_cast<const __half*>(part.bias)[row]);
    }
    store_shared4(factors + F::kAdded + i * 4, added);
  }
  commit_own();
  wait_own<0>();
}

// What the messenger, a warp, does. While consumers multiply for an item, it fetches what the results need.
template <class T, int kTokens>
__device__ __forceinline__ void carry_messages(const GemmArgs& args, const Work<T>& work, uint32_t factors) {
  const Exchange& exchange = args.exchange;
  const int lane = threadIdx.x % 32;
  grid_dependency_wait();
  for (int segment = 0; segment < work.segments(); ++segment) {
    if (segment == 0 && work.hands_on()) {
      named_sync<kConsumers + 32>(kHandedOn);
      if (lane == 0) store_release(exchange.ready + work.first, exchange.ticket);
      continue;
    }
    const int item = work.segment(segment).item;
    fetch_factors<kTokens>(args.p, work.row_block(item), work.token_block(item), factors);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) named_arrive<128 + 32>(kFactorsThere + g);
    if (work.takes_over(segment)) {
      for (int i = lane; i < work.sources; i += 32) {
        uint64_t* ready = exchange.ready + work.first - 1 - i;
        while (load_acquire(ready) != exchange.ticket) __nanosleep(40);
        *ready = 0;  // a replayed graph has the same ticket
      }
      __syncwarp();
      named_arrive<kConsumers + 32>(kTakenOver);
    }
#pragma unroll
    for (int g = 0; g < kGroups; ++g) named_sync<128 + 32>(kFactorsRead + g);
  }
}

// The results of one item. Each warpgroup writes its 64 rows without the other: of some tokens at a time, transposed, so that
// 128 bytes of a token are written together.
template <int kTokens, typename Out>
struct Results {
  using S = Staging<kTokens>;
  using F = Factors<kTokens>;
  const uint32_t factors, staging;  // of the item; of this warpgroup
  int group = threadIdx.x / 128, slice = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  int tokens, n0, n;
  Out* out;  // of the item's first token

  __device__ __forceinline__ Results(const GemmProblem& p, int row_block, int token_block, uint32_t factors,
                                     uint32_t all_staging)
      : factors(factors),
        staging(all_staging + threadIdx.x / 128 * S::kBytes),
        tokens(min(kTokens, p.m - token_block * kTokens)) {
    const GemmPart part = part_of(p, kRows, row_block);
    n = part.n;
    n0 = row_block * kRows + group * 64;
    out = static_cast<Out*>(part.out) + static_cast<int64_t>(token_block) * kTokens * n;
  }

  __device__ __forceinline__ uint32_t buffer_of(int first) const { return staging + first / S::kAtOnce % 2 * S::kBuffer; }

  // row_scale, added: of rows g and g+8.
  __device__ __forceinline__ void stage(int first, const float (&acc)[kTokens / 2], const float (&row_scale)[2],
                                        const float (&added)[2]) const {
    const uint32_t buffer = buffer_of(first);
#pragma unroll
    for (int h = 0; h < S::kAtOnce / 8; h += 2) {
      uint32_t pairs[2][2];  // [8 tokens][8 rows]: tokens 2t, 2t+1 of row g
#pragma unroll
      for (int b = 0; b < 2; ++b) {
        const int block = min(first / 8 + h + b, kTokens / 8 - 1);  // of 8 tokens, twice
        const float2 scale = load_shared8(factors + block * 32 + lane % 4 * 8);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* v = acc + 4 * block + 2 * r;
          pairs[b][r] = pack_pair<Out>(v[0] * (row_scale[r] * scale.x) + added[r], v[1] * (row_scale[r] * scale.y) + added[r]);
        }
      }
      store_transposed(buffer + (8 * h + lane / 16 * 8 + lane % 8) * S::kStride + slice * 32 + lane / 8 % 2 * 16, pairs);
    }
  }

  __device__ __forceinline__ void write(float factor, const float (&acc)[kTokens / 2]) const {
    named_sync<128 + 32>(kFactorsThere + group);  // and the results before have been read
    float row_scale[2], added[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t row = (group * 64 + slice * 16 + lane / 4 + 8 * r) * 4;
      row_scale[r] = load_shared4(factors + F::kRowScales + row) * factor;
      added[r] = load_shared4(factors + F::kAdded + row);
    }
    const int piece = lane % 8, writer = slice * 4 + lane / 8;  // what this lane writes: 8 rows of every 16th token
    stage(0, acc, row_scale, added);
#pragma unroll
    for (int first = 0; first < kTokens; first += S::kAtOnce) {
      if (first >= tokens) break;
      named_sync<128>(kOfGroup + group);  // one is enough: what is staged next is where nothing is read from now on
      if (first + S::kAtOnce < kTokens) stage(first + S::kAtOnce, acc, row_scale, added);
#pragma unroll
      for (int i = 0; i < S::kAtOnce; i += 16) {
        const int token = first + i + writer;
        const uint4 rows = load_shared16(buffer_of(first) + (i + writer) * S::kStride + piece * 16);
        if (token < tokens && n0 + piece * 8 < n) {
          __stcg(reinterpret_cast<uint4*>(out + static_cast<int64_t>(token) * n + n0 + piece * 8), rows);
        }
      }
    }
    named_arrive<128 + 32>(kFactorsRead + group);
  }
};

// What a block without work does. Blocks that quantize the next tokens come as soon as the last tokens are there; where a
// multiprocessor was empty then, as many would crowd on it as it has room for, and be waited for.
__device__ __forceinline__ void keep_place() {
  constexpr int kCycles = 3500;  // 2 us
  grid_dependency_wait();
  for (const int64_t begin = clock64(); clock64() - begin < kCycles;) __nanosleep(200);
}

template <Operand kOperand, Format kFormat, int kTokens>
__device__ __forceinline__ void multiply_block(const GemmArgs& args) {
  using T = Traits<kOperand, kFormat, kTokens>;
  extern __shared__ uint8_t raw[];
  const GemmProblem& p = args.p;
  const uint32_t base = (smem_address(raw) + 127) & ~127u;
  const Ring<T> ring{base, base + T::kRing};
  const Work<T> work(args, kTokens);
  const int warp = uniform(threadIdx.x / 32);

  grid_dependency_launch();
  if (threadIdx.x == kConsumers) {
    for (int s = 0; s < T::kStages; ++s) {
      barrier_init(ring.full(s), 1);
      barrier_init(ring.empty(s), kConsumers / 32);
    }
    barrier_init_fence();
  }
  if constexpr (T::kE4m3) {
    uint2* table = reinterpret_cast<uint2*>(raw + (base - smem_address(raw)) + T::kTableOffset);
    if (threadIdx.x < 256) table[threadIdx.x] = e4m3_table(kTopScaleMxfp4 - static_cast<int>(threadIdx.x));
  }
  __syncthreads();

  if (warp >= kConsumers / 32) {
    if constexpr (T::kMoveRegisters) asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    const Producer<T> producer{p, ring, work};
    if (warp == kConsumers / 32) {
      producer.begin();
      producer.run();
    }
    if (warp == kConsumers / 32 + 1) carry_messages<T, kTokens>(args, work, base + T::kFactorsOffset);
  } else {
    if constexpr (T::kMoveRegisters) {
      // With 24 of a producer thread, all registers of a block.
      asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(T::kFew ? 104 : 240));
    }
    if (T::kTurns && warp / 4 == 1) named_arrive<kConsumers>(kTurnOf);
    Cursor<T> at;
    for (int i = 0; i < work.segments(); ++i) {
      const Segment s = work.segment(i);
      float acc[kTokens / 2];
#pragma unroll
      for (int r = 0; r < kTokens / 2; ++r) acc[r] = 0.0f;
      if constexpr (T::kE4m3) {
        consume_e4m3<T, kTokens>(ring, s.k.count, base + T::kTableOffset, at, acc);
      } else {
        consume16<T, kOperand, kFormat, kTokens>(ring, s.k.count, at, acc);
      }
      grid_dependency_wait();
      if (i == 0 && work.hands_on()) {
        hand_on<kTokens>(args.exchange, work.first, acc);
        continue;
      }
      if (work.takes_over(i)) take_over<kTokens, T::kFew>(args.exchange, work.first, work.sources, acc);
      auto finish = [&](auto out) {
        const Results<kTokens, decltype(out)> results(p, work.row_block(s.item), work.token_block(s.item),
                                                      base + T::kFactorsOffset, base + T::kStagingOffset);
        results.write(args.factor, acc);
      };
      if (p.out_is_bf16) finish(__nv_bfloat16());
      else finish(__half());
    }
    if (T::kTurns && warp / 4 == 0) named_sync<kConsumers>(kTurnOf);
  }
  if (blockIdx.x >= args.blocks) keep_place();
}

template <Operand kOperand, Format kFormat, int kTokens>
__global__ void __launch_bounds__(Shape<kOperand, kTokens>::kBound, 1) gemm_w4_kernel(const __grid_constant__ GemmArgs args) {
  multiply_block<kOperand, kFormat, kTokens>(args);
}

template <Operand kOperand, Format kFormat, int kTokens>
void launch(const GemmProblem& p, const Allocate& allocate, cudaStream_t stream) {
  using T = Traits<kOperand, kFormat, kTokens>;
  const auto kernel = gemm_w4_kernel<kOperand, kFormat, kTokens>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, std::max(T::kSmem, kAloneSmem)),
             "shared memory");
  const float tile_ns =
      T::kE4m3 ? std::max(110 + kTokens, kTokens * 19 / 10) : std::max(130 + kTokens * 3 / 2, kTokens * 12 / 5);
  const BlockShape block{kRows,  kTokens, T::kThreads, T::kSmem, T::kBlocksPerSm, kGroups * T::kWeightTile, T::kTilesPerStage,
                         tile_ns};
  launch_divided(kernel, block, factor_of(kOperand, kFormat), p, allocate, stream);
}

template <Operand kOperand, Format kFormat>
void dispatch_tokens(const GemmProblem& p, const Allocate& allocate, cudaStream_t stream) {
  switch (p.token_tile) {
    case 8:
      if constexpr (kOperand == Operand::kE4m3) return launch<kOperand, kFormat, 8>(p, allocate, stream);
      break;
    case 16: return launch<kOperand, kFormat, 16>(p, allocate, stream);
    case 32: return launch<kOperand, kFormat, 32>(p, allocate, stream);
    case 64: return launch<kOperand, kFormat, 64>(p, allocate, stream);
    case 128: return launch<kOperand, kFormat, 128>(p, allocate, stream);
    case 256: return launch<kOperand, kFormat, 256>(p, allocate, stream);
  }
  throw std::runtime_error("gemm_w4_sm90: token_tile must be 8 (of E4M3 operands), 16, 32, 64, 128 or 256, got " +
                           std::to_string(p.token_tile));
}

}  // namespace

void run_gemm_sm90(const GemmProblem& p, const Allocate& allocate, cudaStream_t stream) {
  if (p.m == 0) return;
  if (p.operand == static_cast<int>(Operand::kE4m3)) {
    return dispatch_tokens<Operand::kE4m3, Format::kMxfp4>(p, allocate, stream);
  }
  with_types(p.operand, p.format,
             [&](auto operand, auto format) { dispatch_tokens<operand.value, format.value>(p, allocate, stream); });
}

}  // namespace fp4
