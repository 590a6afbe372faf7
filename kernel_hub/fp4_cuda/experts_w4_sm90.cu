// y[S, N] = rows x FP4 weight^T on Hopper's tensor cores, each row with the weight of its expert.
//
// As in gemm_w4_sm90.cu, weights are operand A, expanded in registers, and tokens are operand B. An item is a tile of up to
// kTokens rows of one expert and the weights of kGroups warpgroups, 64 output features each, for all of K. As many blocks as
// fit on the GPU stay for all items: which experts have rows is known there only, and so the ring is being filled for the
// next item while the last one is multiplied and written. Producers find the item's expert in the routing, stream that one's
// weights with bulk copies, and gather the tokens of the rows with copies of their own, 16 bytes a lane: one warp, or with 96
// tokens, for which it would be too slow, one for weights and three for tokens. Consumers are told what an item is through the
// ring.
//
// Few rows per expert: bytes and latency are everything, so items are small and four blocks share a multiprocessor. Many: the
// tokens are most of what crosses from L2, so 256 output features share them.
#include <algorithm>
#include <type_traits>

#include "consume16_sm90.cuh"
#include "fp4_kernels.h"
#include "routing.cuh"

namespace fp4 {
namespace {

struct ExpertsArgs {
  ExpertsProblem p;
  float factor;    // of this operand type, on top of row_scale
  int row_groups;  // items of a tile of rows
  int items;       // as many as there can be
};

template <Format kFormat, int kTokens>
struct Traits {
  static constexpr bool kSwizzled = true, kKeepsLast = kTokens != 96;  // of consume16
  static constexpr int kGroups = kTokens <= 16 ? 1 : kTokens == 32 ? 2 : 4;
  static constexpr int kBlocksPerSm = 4 / kGroups;
  // Accumulators of 96 tokens need more registers than an even share: the producers are then a whole warpgroup, which hands
  // some of its own over, and of which one warp fetches weights and the others tokens. Else one warp does both.
  static constexpr bool kMoveRegisters = kTokens == 96;
  static constexpr int kConsumers = 128 * kGroups, kProducers = kMoveRegisters ? 128 : 32;
  static constexpr int kThreads = kConsumers + kProducers;
  static constexpr int kTokenWarps = kMoveRegisters ? 3 : 1, kFirstTokenWarp = kMoveRegisters ? 1 : 0;  // of the producers
  static constexpr int kLaneExperts = kMoveRegisters ? 2 : 4;      // of find_segment, which takes registers
  static constexpr int kLaneTokens = kTokens / (4 * kTokenWarps);  // of a producer
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kWeightTile = tile_bytes(kFormat), kTokenTile = kTokens * kTileK * 2;
  static constexpr int kTilesPerStage = 2;
  static constexpr int kStages = kTokens == 8 ? 8 : kTokens == 16 ? 6 : kTokens == 32 ? 5 : 4;
  static constexpr int kWeightStage = kTilesPerStage * kWeightTile;  // of one warpgroup
  static constexpr int kTokenOffset = 0, kTokenStride = kTilesPerStage * kTokenTile;
  static constexpr int kWeightOffset = kStages * kTokenStride, kWeightStride = kGroups * kWeightStage;
  static constexpr int kItems = kWeightOffset + kStages * kWeightStride;  // what begins in a stage, 16 bytes each
  static constexpr int kBarriers = kItems + kStages * 16;
  static constexpr int kStaging = kBarriers + kStages * 16;
  static constexpr int kStagingWarp = kTokens <= 16 ? 512 : 1024;
  static constexpr int kSmem = kStaging + kConsumers / 32 * kStagingWarp + 1024;  // 1024: alignment
  // Stages whose tokens a producer has on their way before it tells consumers of the first. Consumers wait for the stage
  // after the one they multiply, which is not released yet; one more is released while they multiply.
  static constexpr int kBehind = kStages > 4 ? 2 : 1;
  static_assert(kBehind <= kStages - 3 && kWeightOffset % 128 == 0 && kStaging % 16 == 0);
};

// Rows first.. of the result, by the weights of row_group, of an expert. rows is 0 after the last item.
struct Item {
  int expert, first, rows, row_group;

  __device__ __forceinline__ void store(uint32_t address) const {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(expert), "r"(first), "r"(rows), "r"(row_group)
                 : "memory");
  }
};

__device__ __forceinline__ Item load_item(uint32_t address) {
  const uint4 v = load_shared16(address);
  return {static_cast<int>(v.x), static_cast<int>(v.y), static_cast<int>(v.z), static_cast<int>(v.w)};
}

// kWeights, kGathers: whether this warp fetches weights, and tokens.
template <class T, int kTokens, bool kWeights, bool kGathers>
struct Producer {
  const ExpertsArgs& args;
  const Ring<T>& ring;
  Cursor<T> at, told;  // the stages that are filled next, and whose tokens consumers are told of next
  int behind;          // stages in between
  Item item;
  const uint8_t* weights[T::kGroups];
  uint32_t tokens[T::kLaneTokens];  // where this lane's are, one of each four: in units of 128 bytes
  int present;                      // how many of those there are

  // Whether there is an item of this number.
  __device__ __forceinline__ bool begin_item(int number) {
    if (number >= args.items) return false;
    const Segment segment = find_segment<T::kLaneExperts>(args.p.routing, kTokens, number / args.row_groups);
    if (__shfl_sync(0xFFFFFFFFu, segment.rows, 0) == 0) return false;
    item = {segment.expert, segment.first, segment.rows, number % args.row_groups};
    if constexpr (kWeights) {
      const int row_tiles = (args.p.n + 63) / 64, first = item.row_group * T::kGroups;
#pragma unroll
      for (int g = 0; g < T::kGroups; ++g) {
        const int64_t row_tile = item.expert * row_tiles + min(first + g, row_tiles - 1);
        weights[g] = args.p.weight + row_tile * args.p.k_tiles * T::kWeightTile;
      }
    }
    if constexpr (kGathers) {
      const int token = first_token();
      present = (item.rows - token + 3) / 4;
#pragma unroll
      for (int i = 0; i < T::kLaneTokens; ++i) {
        tokens[i] = token_of(args.p.routing, item.first + min(4 * i + token, item.rows - 1)) * args.p.k_tiles;
      }
    }
    return true;
  }

  __device__ __forceinline__ bool is_leader() const { return threadIdx.x == T::kConsumers; }

  __device__ __forceinline__ void copy_weights(const Cursor<T>& c, int tile) const {
    const int tiles = min(T::kTilesPerStage, args.p.k_tiles - tile);
    if (tile == 0) {
      if (is_leader()) item.store(ring.base + T::kItems + c.stage * 16);
      __syncwarp();
    }
    const uint64_t policy = kTokens <= 16 ? policy_evict_first() : policy_evict_last();  // read once, or by the next tile too
    barrier_expect(ring.full(c.stage), tiles * T::kGroups * T::kWeightTile);
#pragma unroll
    for (int g = 0; g < T::kGroups; ++g) {
      bulk_copy(ring.base + T::kWeightOffset + c.stage * T::kWeightStride + g * T::kWeightStage,
                weights[g] + tile * T::kWeightTile, tiles * T::kWeightTile, ring.full(c.stage), policy);
    }
  }

  // A warp copies 128 bytes of each of four tokens at a time, piece by piece into their places of a swizzled operand. Places
  // of absent tokens keep what they have: results of one token do not depend on another's.
  __device__ __forceinline__ void copy_tokens(int tile) {
    // Where this lane's piece of its even tokens belongs; of odd ones it lies 64 bytes away.
    const uint32_t to = ring.base + T::kTokenOffset + at.stage * T::kTokenStride + first_token() * 128 +
                        (threadIdx.x % 8 ^ threadIdx.x % 32 / 8) * 16;
    const uint8_t* from = static_cast<const uint8_t*>(args.p.x) + static_cast<int64_t>(tile) * 128 + threadIdx.x % 8 * 16;
    const bool two = tile + 1 < args.p.k_tiles;
    static_assert(T::kTilesPerStage == 2);
#pragma unroll
    for (int i = 0; i < T::kLaneTokens; ++i) {
      if (i >= present) continue;
      uint32_t token = tokens[i];
      asm volatile("" : "+r"(token));  // addresses are computed anew each time: the producers have no registers to keep them
      const uint32_t place = (i % 2 == 0 ? to : to ^ 64) + i * 512;
      const uint8_t* values = from + static_cast<uint64_t>(token) * 128;
      copy_own16(place, values);
      if (two) copy_own16(place + T::kTokenTile, values + 128);
    }
    commit_own();
    if (behind == T::kBehind) tell<T::kBehind>();
    else ++behind;
  }

  // The tokens of the stage that is kPending behind the last one are there.
  template <int kPending>
  __device__ __forceinline__ void tell() {
    wait_own<kPending>();
    fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.full(told.stage));
    told.next();
  }

  __device__ __forceinline__ int first_token() const {
    static_assert(T::kLaneTokens % 2 == 0);
    return ((threadIdx.x - T::kConsumers) / 32 - T::kFirstTokenWarp) * T::kLaneTokens * 4 + threadIdx.x % 32 / 8;
  }

  __device__ __forceinline__ void wait_empty() const { barrier_wait(ring.empty(at.stage), at.phase ^ 1); }

  // What the kernel before wrote are the tokens: weights of the first stages are fetched while it still runs. Routing is
  // older (wait_and_launch in activation_fp4_sm90.cu).
  __device__ void run() {
    const int k_tiles = args.p.k_tiles;
    int number = blockIdx.x, early = 0;  // tiles of the first item whose weights are on their way
    bool more = begin_item(number);
    if (kWeights && kGathers && more) {
      Cursor<T> stage = at;
      for (; early < min(k_tiles, T::kStages * T::kTilesPerStage); early += T::kTilesPerStage, stage.next()) {
        copy_weights(stage, early);
      }
    }
    if (kGathers) grid_dependency_wait();
    for (; more; more = begin_item(number += gridDim.x), early = 0) {
      for (int tile = 0; tile < k_tiles; tile += T::kTilesPerStage, at.next()) {
        wait_empty();
        if (kWeights && tile >= early) copy_weights(at, tile);
        if (kGathers) copy_tokens(tile);
      }
    }
    wait_empty();
    if (kWeights && is_leader()) {
      Item{}.store(ring.base + T::kItems + at.stage * 16);
      barrier_arrive(ring.full(at.stage));
    }
    if (kGathers) {
      for (++behind; behind > 0; --behind) tell<0>();  // the end is a stage too
    }
  }
};

// What a warp's results are multiplied by and added to: of 16 output features n0.. of an expert, g and g + 8 of this lane;
// token_scale: unless each token has one of its own.
struct RowData {
  float scale[2], bias[2], token_scale;
  template <typename Out>
  __device__ __forceinline__ void load(const ExpertsArgs& args, int expert, int n0) {
    const ExpertsProblem& p = args.p;
    const int g = threadIdx.x % 32 / 4;
    const int64_t row = static_cast<int64_t>(expert) * p.n + min(n0, p.n - 16) + g;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scale[r] = p.row_scale[row + 8 * r] * args.factor;
      bias[r] = p.bias != nullptr ? static_cast<float>(static_cast<const Out*>(p.bias)[row + 8 * r])
                                  : -0.0f;  // adding -0 changes nothing
    }
    token_scale = p.token_scale != nullptr ? __ldcg(p.token_scale) : 1.0f;
  }
};

// Each warp writes its 16 output features without the others. `staging`: where 16 tokens at a time are transposed, so that 32
// bytes of a row are written together.
template <int kTokens, typename Out>
__device__ __forceinline__ void write_item(const ExpertsArgs& args, const Item& item, const RowData& rows, int n0,
                                           uint32_t staging, const float (&acc)[kTokens / 2]) {
  const ExpertsProblem& p = args.p;
  const int lane = threadIdx.x % 32, t = lane % 4;
  // Of this lane's four tokens of 16, fetched one step ahead.
  auto token_scales = [&](int i) {
    auto scale = [&](int m) {
      if (p.token_scale_stride == 0) return rows.token_scale;
      return __ldcg(p.token_scale + token_of(p.routing, item.first + min(m, item.rows - 1)));
    };
    const int m = 8 * i + 2 * t;
    return make_float4(scale(m), scale(m + 1), scale(m + 8), scale(m + 9));
  };
  float4 ahead = token_scales(0);
  Out* out = static_cast<Out*>(p.out) + (static_cast<int64_t>(item.first) + lane / 2) * p.n + n0 + lane % 2 * 8;
#pragma unroll
  for (int i = 0; i < kTokens / 8; i += 2) {  // tokens 8i..8i+15
    if (8 * i >= item.rows) break;
    const float token_scale[2][2] = {{ahead.x, ahead.y}, {ahead.z, ahead.w}};
    if (i + 2 < kTokens / 8) ahead = token_scales(i + 2);
    uint32_t pairs[2][2] = {};  // [8 tokens][8 features]: tokens 2t, 2t+1 of feature g
#pragma unroll
    for (int h = 0; h < 2 && i + h < kTokens / 8; ++h)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* v = acc + 4 * (i + h) + 2 * r;
        pairs[h][r] = pack_pair<Out>(v[0] * (rows.scale[r] * token_scale[h][0]) + rows.bias[r],
                                     v[1] * (rows.scale[r] * token_scale[h][1]) + rows.bias[r]);
      }
    const uint32_t buffer = staging + (kTokens > 16 ? i / 2 % 2 * 512 : 0);  // two in turn: one barrier of the warp is enough
    store_transposed(buffer + (lane / 16 * 8 + lane % 8) * 32 + lane / 8 % 2 * 16, pairs);
    __syncwarp();
    const uint4 values = load_shared16(buffer + lane * 16);  // token 8i + lane / 2, 8 features
    if (8 * i + lane / 2 < item.rows && n0 < p.n) {
      __stcg(reinterpret_cast<uint4*>(out + static_cast<int64_t>(8 * i) * p.n), values);
    }
  }
  __syncwarp();  // the staging of the next item
}

template <class T, Operand kOperand, Format kFormat, int kTokens, typename Out>
__device__ __forceinline__ void consume_items(const ExpertsArgs& args, const Ring<T>& ring) {
  const int warp = threadIdx.x / 32;
  const uint32_t staging = ring.base + T::kStaging + warp * T::kStagingWarp;
  Cursor<T> at;
  while (true) {
    barrier_wait(ring.full(at.stage), at.phase);
    const Item item = load_item(ring.base + T::kItems + at.stage * 16);
    if (item.rows == 0) break;
    grid_dependency_wait();
    const int n0 = item.row_group * T::kRows + warp * 16;
    RowData rows;  // on its way while the item is multiplied
    rows.load<Out>(args, item.expert, n0);
    auto run = [&](auto tokens) {
      float acc[tokens.value / 2];
#pragma unroll
      for (int r = 0; r < tokens.value / 2; ++r) acc[r] = 0.0f;
      consume16<T, kOperand, kFormat, tokens.value>(ring, args.p.k_tiles, at, acc);
      write_item<tokens.value, Out>(args, item, rows, n0, staging, acc);
    };
    if constexpr (kTokens == 96) {  // the last tile of an expert is rarely full
      if (item.rows <= 32) run(std::integral_constant<int, 32>());
      else if (item.rows <= 64) run(std::integral_constant<int, 64>());
      else run(std::integral_constant<int, 96>());
    } else {
      run(std::integral_constant<int, kTokens>());
    }
  }
}

template <Operand kOperand, Format kFormat, int kTokens>
__global__ void __launch_bounds__(Traits<kFormat, kTokens>::kThreads, Traits<kFormat, kTokens>::kBlocksPerSm)
    experts_w4_kernel(const __grid_constant__ ExpertsArgs args) {
  using T = Traits<kFormat, kTokens>;
  extern __shared__ uint8_t raw[];
  const uint32_t base = (smem_address(raw) + 1023) & ~1023u;
  const Ring<T> ring{base, base + T::kBarriers};
  const int warp = uniform(threadIdx.x / 32);

  grid_dependency_launch();
  if (threadIdx.x == T::kConsumers) {
    for (int s = 0; s < T::kStages; ++s) {
      barrier_init(ring.full(s), 1 + T::kTokenWarps);  // the weights' bytes, and every warp's tokens
      barrier_init(ring.empty(s), T::kConsumers / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp >= T::kConsumers / 32) {
    if constexpr (T::kMoveRegisters) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
      if (warp == T::kConsumers / 32) Producer<T, kTokens, true, false>{args, ring}.run();
      else Producer<T, kTokens, false, true>{args, ring}.run();
    } else {
      Producer<T, kTokens, true, true>{args, ring}.run();
    }
  } else {
    if constexpr (T::kMoveRegisters) asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    const int end = load_integer(args.p.routing.offsets, args.p.routing.offsets_are_64, args.p.routing.experts);
    if (end < args.p.rows) {
      grid_dependency_wait();
      zero_absent_rows(args.p.out, args.p.n, end, args.p.rows, T::kConsumers);
    }
    if (args.p.out_is_bf16) consume_items<T, kOperand, kFormat, kTokens, __nv_bfloat16>(args, ring);
    else consume_items<T, kOperand, kFormat, kTokens, __half>(args, ring);
  }
}

template <Operand kOperand, Format kFormat, int kTokens>
void launch(const ExpertsProblem& p, cudaStream_t stream) {
  using T = Traits<kFormat, kTokens>;
  const auto kernel = experts_w4_kernel<kOperand, kFormat, kTokens>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSmem), "shared memory");
  const int row_groups = (p.n + T::kRows - 1) / T::kRows;
  // An expert with rows has at most one tile that is not full.
  const int tiles = p.rows / kTokens + std::min(p.routing.experts, p.rows), items = tiles * row_groups;
  launch_after(kernel, dim3(std::min(items, multiprocessors() * T::kBlocksPerSm)), dim3(T::kThreads), T::kSmem, stream,
               ExpertsArgs{p, factor_of(kOperand, kFormat), row_groups, items});
}

template <Operand kOperand, Format kFormat>
void dispatch(const ExpertsProblem& p, cudaStream_t stream) {
  switch (p.tile) {
    case 8: return launch<kOperand, kFormat, 8>(p, stream);
    case 16: return launch<kOperand, kFormat, 16>(p, stream);
    case 32: return launch<kOperand, kFormat, 32>(p, stream);
    case 96: return launch<kOperand, kFormat, 96>(p, stream);
  }
  throw std::runtime_error("experts_w4_sm90: tile must be 8, 16, 32 or 96, got " + std::to_string(p.tile));
}

}  // namespace

void run_experts(const ExpertsProblem& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  with_types(p.operand, p.format, [&](auto operand, auto format) { dispatch<operand.value, format.value>(p, stream); });
}

}  // namespace fp4
