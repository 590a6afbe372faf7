// y[S, N] = rows x FP4 weight^T on Hopper's tensor cores, each row with the weight of its expert.
//
// As in gemm_w4_sm90.cu, weights are operand A, expanded in registers, and tokens are operand B. An item is a tile of up to
// kTokens rows of one expert and the weights of kGroups warpgroups, 64 output features each, for all of K. As many blocks as
// fit on the GPU stay for all items: which experts have rows is known there only, and so the ring is being filled for the
// next item while the last one is multiplied and written. One warp produces: it finds the item's expert in the routing,
// streams that one's weights with bulk copies, and gathers the tokens of the rows with copies of its own, 16 bytes a lane.
// Consumers are told what an item is through the ring.
//
// Few rows per expert: bytes and latency are everything, so items are small and four blocks share a multiprocessor. Many: the
// tokens are most of what crosses from L2, so 256 output features share them.
#include <algorithm>

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
  static constexpr bool kGathers = true, kEndless = true;  // of consume16
  static constexpr int kGroups = kTokens <= 16 ? 1 : kTokens == 32 ? 2 : 4;
  static constexpr int kBlocksPerSm = 4 / kGroups;
  static constexpr int kConsumers = 128 * kGroups, kThreads = kConsumers + 32;
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kWeightTile = tile_bytes(kFormat), kTokenTile = kTokens * kTileK * 2;
  static constexpr int kTilesPerStage = 2;
  static constexpr int kStages = kTokens == 8 ? 8 : kTokens == 32 ? 5 : 6;
  static constexpr int kWeightStage = kTilesPerStage * kWeightTile;  // of one warpgroup
  static constexpr int kTokenOffset = (kGroups * kWeightStage + 127) / 128 * 128;
  static constexpr int kStageBytes = kTokenOffset + kTilesPerStage * kTokenTile;
  static constexpr int kItems = kStages * kStageBytes;  // what begins in a stage, 16 bytes each
  static constexpr int kBarriers = kItems + kStages * 16;
  static constexpr int kStaging = kBarriers + (kStages * 16 + 127) / 128 * 128;
  static constexpr int kStagingWarp = kTokens <= 16 ? 512 : 1024;
  static constexpr int kSmem = kStaging + kConsumers / 32 * kStagingWarp + 128;  // 128: alignment
};

// Rows first.. of the result, by the weights of row_group, of an expert. rows is 0 after the last item.
struct Item {
  int expert, first, rows, row_group;
};

template <class T, int kTokens>
struct Producer {
  const ExpertsArgs& args;
  const Ring<T>& ring;
  uint32_t items;
  Cursor<T> at;
  const uint8_t* weights[T::kGroups];
  const uint8_t* source[kTokens / 8];  // this lane's tokens, one of each 8
  int present;                         // how many of those there are
  uint64_t policy;

  __device__ __forceinline__ Item item_of(int number) const {
    if (number >= args.items) return {0, 0, 0, 0};
    const Segment s = find_segment(args.p.routing, kTokens, number / args.row_groups);
    return {s.expert, s.first, s.rows, number % args.row_groups};
  }

  __device__ __forceinline__ void begin_item(const Item& item) {
    const ExpertsProblem& p = args.p;
    const int lane = threadIdx.x % 32, row_tiles = (p.n + 63) / 64;
#pragma unroll
    for (int g = 0; g < T::kGroups; ++g) {
      const int row_tile = min(item.row_group * T::kGroups + g, row_tiles - 1);
      weights[g] = p.weight + (static_cast<int64_t>(item.expert) * row_tiles + row_tile) * p.k_tiles * T::kWeightTile;
    }
    present = (item.rows - lane % 8 + 7) / 8;
#pragma unroll
    for (int i = 0; i < kTokens / 8; ++i) {
      const int row = item.first + min(8 * i + lane % 8, item.rows - 1);
      source[i] = static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(token_of(p.routing, row)) * p.k_tiles * 128 +
                  lane / 8 * 16;
    }
  }

  __device__ __forceinline__ void copy_weights(const Cursor<T>& c, const Item& item, int tile) const {
    if (threadIdx.x % 32 != 0) return;
    const int tiles = min(T::kTilesPerStage, args.p.k_tiles - tile);
    if (tile == 0) store_item(c, item);
    barrier_expect(ring.full(c.stage), tiles * T::kGroups * T::kWeightTile);
#pragma unroll
    for (int g = 0; g < T::kGroups; ++g) {
      bulk_copy(ring.stage(c.stage) + g * T::kWeightStage, weights[g] + static_cast<int64_t>(tile) * T::kWeightTile,
                tiles * T::kWeightTile, ring.full(c.stage), policy);
    }
  }

  // Eight tokens and four pieces of 16 bytes at a time: 64 bytes of a token are read together, and what 8 lanes write lies
  // together. Places of absent tokens keep what they have: results of one token do not depend on another's.
  __device__ __forceinline__ void copy_tokens(const Cursor<T>& c, int tile) const {
    const int lane = threadIdx.x % 32;
    const uint32_t to = ring.stage(c.stage) + T::kTokenOffset + lane / 8 * kTokens * 16 + lane % 8 * 16;
    const int64_t from = static_cast<int64_t>(tile) * 128;
#pragma unroll
    for (int u = 0; u < T::kTilesPerStage; ++u) {
      if (tile + u >= args.p.k_tiles) break;
#pragma unroll
      for (int i = 0; i < kTokens / 8; ++i) {
        if (i >= present) continue;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          copy_own16(to + u * T::kTokenTile + half * kTokens * 64 + i * 128, source[i] + from + u * 128 + half * 64);
        }
      }
    }
    barrier_arrive_copied(ring.full(c.stage));
  }

  __device__ __forceinline__ void store_item(const Cursor<T>& c, const Item& item) const {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(items + c.stage * 16), "r"(item.expert), "r"(item.first),
                 "r"(item.rows), "r"(item.row_group)
                 : "memory");
  }

  __device__ __forceinline__ void wait_empty() const { barrier_wait(ring.empty(at.stage), at.phase ^ 1); }

  // What the kernel before wrote are the tokens: weights of the first stages are fetched while it still runs. Routing is
  // older (wait_and_launch in activation_fp4_sm90.cu).
  __device__ void run() {
    const int k_tiles = args.p.k_tiles;
    int number = blockIdx.x, tile = 0;
    Item item = item_of(number);
    if (item.rows > 0) {
      begin_item(item);
      Cursor<T> early = at;
      const int end = min(k_tiles, T::kStages * T::kTilesPerStage);
      for (int i = 0; i < end; i += T::kTilesPerStage, early.next()) copy_weights(early, item, i);
      grid_dependency_wait();
      for (; tile < end; tile += T::kTilesPerStage, at.next()) copy_tokens(at, tile);
    }
    while (item.rows > 0) {
      for (; tile < k_tiles; tile += T::kTilesPerStage, at.next()) {
        wait_empty();
        copy_weights(at, item, tile);
        copy_tokens(at, tile);
      }
      number += gridDim.x;
      item = item_of(number);
      if (item.rows > 0) begin_item(item);
      tile = 0;
    }
    wait_empty();
    if (threadIdx.x % 32 == 0) {
      store_item(at, item);
      barrier_arrive(ring.full(at.stage));
    }
    barrier_arrive_copied(ring.full(at.stage));
  }
};

template <class T>
struct Releaser {
  const Ring<T>& ring;
  __device__ __forceinline__ void release(int stage) const {
    if (threadIdx.x % 32 == 0) barrier_arrive(ring.empty(stage));
  }
};

template <typename Out>
__device__ __forceinline__ uint32_t pack_results(float a, float b) {
  if constexpr (std::is_same_v<Out, __nv_bfloat16>) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  } else {
    const __half2 v = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
}

// What a warp's 16 output features n0.. of an expert are multiplied by, and added to: rows g and g + 8 of this lane.
struct RowData {
  float scale[2], bias[2];
  template <typename Out>
  __device__ __forceinline__ void load(const ExpertsArgs& args, int expert, int n0) {
    const ExpertsProblem& p = args.p;
    const int g = threadIdx.x % 32 / 4;
    const int64_t row = static_cast<int64_t>(expert) * p.n + min(n0, p.n - 16) + g;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      scale[r] = p.row_scale[row + 8 * r];
      bias[r] = p.bias != nullptr ? static_cast<float>(static_cast<const Out*>(p.bias)[row + 8 * r])
                                  : -0.0f;  // adding -0 changes nothing
    }
  }
};

// Each warp writes its 16 output features without the others. `staging`: where 16 tokens at a time are transposed, so that 32
// bytes of a row are written together.
template <int kTokens, typename Out>
__device__ __forceinline__ void write_item(const ExpertsArgs& args, const Item& item, const RowData& rows, int n0,
                                           uint32_t staging, const float (&acc)[kTokens / 2]) {
  const ExpertsProblem& p = args.p;
  const int lane = threadIdx.x % 32, t = lane % 4;
  auto token_scale = [&](int m) {
    if (p.token_scale == nullptr) return 1.0f;
    return p.token_scale_stride == 0 ? *p.token_scale
                                     : p.token_scale[token_of(p.routing, item.first + min(m, item.rows - 1))];
  };
  Out* out = static_cast<Out*>(p.out) + (static_cast<int64_t>(item.first) + lane / 2) * p.n + n0 + lane % 2 * 8;
#pragma unroll
  for (int i = 0; i < kTokens / 8; i += 2) {  // tokens 8i..8i+15
    if (8 * i >= item.rows) break;
    uint32_t pairs[2][2] = {};  // [8 tokens][8 rows]: tokens 2t, 2t+1 of row g
#pragma unroll
    for (int h = 0; h < 2 && i + h < kTokens / 8; ++h) {
      const float scale[2] = {token_scale(8 * (i + h) + 2 * t), token_scale(8 * (i + h) + 2 * t + 1)};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float* v = acc + 4 * (i + h) + 2 * r;
        const float row_scale = rows.scale[r] * args.factor;
        pairs[h][r] = pack_results<Out>(v[0] * (row_scale * scale[0]) + rows.bias[r],
                                        v[1] * (row_scale * scale[1]) + rows.bias[r]);
      }
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
__device__ __forceinline__ void consume_items(const ExpertsArgs& args, const Ring<T>& ring, uint32_t items,
                                              uint32_t staging) {
  const int warp = threadIdx.x / 32;
  const Releaser<T> releaser{ring};
  Cursor<T> at;
  while (true) {
    barrier_wait(ring.full(at.stage), at.phase);
    const uint4 v = load_shared16(items + at.stage * 16);
    const Item item{static_cast<int>(v.x), static_cast<int>(v.y), static_cast<int>(v.z), static_cast<int>(v.w)};
    if (item.rows == 0) break;
    const int n0 = item.row_group * T::kRows + warp * 16;
    RowData rows;  // on its way while the item is multiplied
    rows.load<Out>(args, item.expert, n0);
    float acc[kTokens / 2];
#pragma unroll
    for (int r = 0; r < kTokens / 2; ++r) acc[r] = 0.0f;
    consume16<T, kOperand, kFormat, kTokens>(ring, releaser, args.p.k_tiles, at, acc);
    grid_dependency_wait();
    write_item<kTokens, Out>(args, item, rows, n0, staging, acc);
  }
}

template <Operand kOperand, Format kFormat, int kTokens>
__global__ void __launch_bounds__(Traits<kFormat, kTokens>::kThreads, Traits<kFormat, kTokens>::kBlocksPerSm)
    experts_w4_kernel(const __grid_constant__ ExpertsArgs args) {
  using T = Traits<kFormat, kTokens>;
  extern __shared__ uint8_t raw[];
  const uint32_t base = (smem_address(raw) + 127) & ~127u;
  const Ring<T> ring{base, base + T::kBarriers};
  const int warp = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / 32), 0);

  grid_dependency_launch();
  if (threadIdx.x == T::kConsumers) {
    for (int s = 0; s < T::kStages; ++s) {
      barrier_init(ring.full(s), 1 + 32);  // the weights' bytes, and every lane's copies
      barrier_init(ring.empty(s), T::kConsumers / 32);
    }
    barrier_init_fence();
  }
  __syncthreads();

  if (warp == T::kConsumers / 32) {
    Producer<T, kTokens> producer{args, ring, base + T::kItems};
    producer.policy = kTokens <= 16 ? policy_evict_first() : policy_evict_last();
    producer.run();
  } else {
    const int end = load_integer(args.p.routing.offsets, args.p.routing.offsets_are_64, args.p.routing.experts);
    if (end < args.p.rows) {
      grid_dependency_wait();
      zero_absent_rows(args.p.out, args.p.n, end, args.p.rows, T::kConsumers);
    }
    const uint32_t staging = base + T::kStaging + warp * T::kStagingWarp;
    if (args.p.out_is_bf16) {
      consume_items<T, kOperand, kFormat, kTokens, __nv_bfloat16>(args, ring, base + T::kItems, staging);
    } else {
      consume_items<T, kOperand, kFormat, kTokens, __half>(args, ring, base + T::kItems, staging);
    }
  }
}

int multiprocessors() {
  int device = 0, count = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

template <Operand kOperand, Format kFormat, int kTokens>
void launch(const ExpertsProblem& p, cudaStream_t stream) {
  using T = Traits<kFormat, kTokens>;
  const auto kernel = experts_w4_kernel<kOperand, kFormat, kTokens>;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, T::kSmem), "shared memory");
  const int row_groups = (p.n + T::kRows - 1) / T::kRows;
  // An expert with rows has at most one tile that is not full.
  const int tiles = p.rows / kTokens + std::min(p.routing.experts, p.rows), items = tiles * row_groups;
  const float factor = kOperand == Operand::kFp16 && kFormat == Format::kMxfp4 ? 0.5f : 1.0f;
  launch_after(kernel, dim3(std::min(items, multiprocessors() * T::kBlocksPerSm)), dim3(T::kThreads), T::kSmem, 1, stream,
               ExpertsArgs{p, factor, row_groups, items});
}

template <Operand kOperand, Format kFormat>
void dispatch(const ExpertsProblem& p, cudaStream_t stream) {
  switch (p.tile) {
    case 8: return launch<kOperand, kFormat, 8>(p, stream);
    case 16: return launch<kOperand, kFormat, 16>(p, stream);
    case 32: return launch<kOperand, kFormat, 32>(p, stream);
    case 64: return launch<kOperand, kFormat, 64>(p, stream);
  }
  throw std::runtime_error("experts_w4_sm90: tile must be 8, 16, 32 or 64, got " + std::to_string(p.tile));
}

}  // namespace

void run_experts(const ExpertsProblem& p, cudaStream_t stream) {
  if (p.rows == 0) return;
  const bool nvfp4 = p.format == static_cast<int>(Format::kNvfp4);
  if (p.operand == static_cast<int>(Operand::kBf16)) {
    return nvfp4 ? dispatch<Operand::kBf16, Format::kNvfp4>(p, stream)
                 : dispatch<Operand::kBf16, Format::kMxfp4>(p, stream);
  }
  return nvfp4 ? dispatch<Operand::kFp16, Format::kNvfp4>(p, stream)
               : dispatch<Operand::kFp16, Format::kMxfp4>(p, stream);
}

}  // namespace fp4
