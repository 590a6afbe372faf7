// What the matrix products with many blocks share: how a cluster divides its work, and how its blocks add up.
//
// The blocks of a cluster divide K (split) and stand for neighbouring rows (share). Blocks of the same part of K need the
// same tokens: each fetches a share-th of them and the copy engine delivers it to all. Without that, tokens are most of
// what crosses from L2: per k, 64 tokens are 128 bytes and 128 rows of weights 72.
#pragma once

#include <algorithm>
#include <array>

#include "fp4_format.cuh"
#include "fp4_kernels.h"
#include "pipeline_sm90.cuh"

namespace fp4 {

constexpr int kMostBlocks = 8;  // of a cluster, on every device of this architecture

struct GemmArgs {
  GemmProblem p;
  float factor;  // of this operand type, on top of row_scale
  int split;
  int items;  // tiles of tokens x groups of row blocks
};

// This block in its cluster. Grid: x is the cluster, y the tile of tokens, z the group of row blocks.
struct ClusterPlace {
  int split, share;  // blocks that divide K; blocks that share tokens
  int part, peer;    // this block's part of K, and which of the blocks with this part it is
  int row_block;

  __device__ __forceinline__ explicit ClusterPlace(const GemmArgs& args)
      : split(args.split),
        share(gridDim.x / args.split),
        part(blockIdx.x % args.split),
        peer(blockIdx.x / args.split),
        row_block(row_block_of(blockIdx.z)) {}
  __device__ __forceinline__ int row_block_of(int group) const { return group * share + peer; }
  __device__ __forceinline__ int rank(int part_, int peer_) const { return peer_ * split + part_; }
  // Bits of the blocks with this part of K.
  __device__ __forceinline__ uint16_t sharers() const {
    uint32_t mask = 0;
    for (int i = 0; i < share; ++i) mask |= 1u << rank(part, i);
    return static_cast<uint16_t>(mask);
  }
  // One warp frees a stage of the ring in every block that fills it; only for a stage that is filled again.
  __device__ __forceinline__ void release(uint32_t empty) const {
    const int lane = threadIdx.x % 32;
    if (share == 1 && lane == 0) barrier_arrive(empty);
    if (share > 1 && lane < share) barrier_arrive_cluster(empty, rank(part, lane));
  }
  // Tokens at `src` into every sharer's `dst`: this block sends its part of the bytes.
  __device__ __forceinline__ void copy_tokens(uint32_t dst, const uint8_t* src, uint32_t bytes, uint32_t full,
                                              uint64_t policy) const {
    if (share == 1) return bulk_copy(dst, src, bytes, full, policy);
    const uint32_t piece = bytes / share, offset = piece * peer;
    bulk_copy_shared(dst + offset, src + offset, piece, full, sharers(), policy);
  }
};

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

// Each of the blocks that divided K adds up and writes its share of the tokens x rows. `reduce` is where every one of them
// has its own sums, float32 [kTokens][kRows + 4]. A thread takes the same 8 rows of several tokens at a time, so that it
// waits for what it reads once for all of them.
template <int kTokens, int kRows, int kThreads, typename Out>
__device__ void write_output(const GemmArgs& args, const ClusterPlace& place, uint32_t reduce, int token_block) {
  constexpr int kThreadsPerToken = kRows / 8, kTokensAtOnce = kThreads / kThreadsPerToken;
  constexpr int kBatch = kTokens >= 8 * kTokensAtOnce ? 4 : kTokens >= 4 * kTokensAtOnce ? 2 : 1;
  static_assert(kThreads % kThreadsPerToken == 0);
  const GemmProblem& p = args.p;
  const int tokens = min(kTokens, p.m - token_block * kTokens), step = kTokensAtOnce * place.split;
  const int row = threadIdx.x % kThreadsPerToken * 8, n = place.row_block * kRows + row;
  if (n >= p.n) return;
  const Out* bias = static_cast<const Out*>(p.bias);
  float row_scale[8], added[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    row_scale[i] = p.row_scale[n + i] * args.factor;
    added[i] = bias != nullptr ? static_cast<float>(bias[n + i]) : -0.0f;  // adding -0 changes nothing
  }
  const int first = place.part * kTokensAtOnce + threadIdx.x / kThreadsPerToken;
  for (int token = first; token < tokens; token += kBatch * step) {
    float v[kBatch][8] = {}, token_scale[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int m = token_block * kTokens + min(token + b * step, tokens - 1);
      token_scale[b] = p.token_scale != nullptr ? p.token_scale[m * p.token_scale_stride] : 1.0f;
    }
    for (int r = 0; r < place.split; ++r) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const uint32_t address = reduce + (min(token + b * step, tokens - 1) * (kRows + 4) + row) * 4;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float4 f = load_cluster(address + h * 16, place.rank(r, place.peer));
          v[b][4 * h] += f.x, v[b][4 * h + 1] += f.y, v[b][4 * h + 2] += f.z, v[b][4 * h + 3] += f.w;
        }
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (token + b * step >= tokens) break;
#pragma unroll
      for (int i = 0; i < 8; ++i) v[b][i] = v[b][i] * (row_scale[i] * token_scale[b]) + added[i];
      const uint4 packed = make_uint4(pack_pair<Out>(v[b][0], v[b][1]), pack_pair<Out>(v[b][2], v[b][3]),
                                      pack_pair<Out>(v[b][4], v[b][5]), pack_pair<Out>(v[b][6], v[b][7]));
      Out* out = static_cast<Out*>(p.out) + static_cast<int64_t>(token_block * kTokens + token + b * step) * p.n + n;
      *reinterpret_cast<uint4*>(out) = packed;
    }
  }
}

// All sums of the cluster are in shared memory: waits for them, writes the results, and keeps this block alive until no
// other reads its sums. (Nothing else may still be on its way to a block: it has waited for every copy into it, and warps
// release only stages whose next copy it has waited for.) `block_sync` is a barrier of the kThreads threads that call this.
template <int kTokens, int kRows, int kThreads, class Sync>
__device__ __forceinline__ void finish(const GemmArgs& args, const ClusterPlace& place, uint32_t reduce, int token_block,
                                       Sync block_sync) {
  if (place.split > 1) cluster_sync();
  else block_sync();
  if (args.p.out_is_bf16) write_output<kTokens, kRows, kThreads, __nv_bfloat16>(args, place, reduce, token_block);
  else write_output<kTokens, kRows, kThreads, __half>(args, place, reduce, token_block);
  if (place.split > 1) {
    cluster_arrive_relaxed();  // what was read has been used: nothing to wait for
    cluster_wait();
  }
}

// ---- Host: how to divide a problem ------------------------------------------------------------------------------------
using ClusterCounts = std::array<int, kMostBlocks + 1>;

// How many clusters of each size fit on the GPU at once: less than its multiprocessors divided by the size, because a
// cluster stays inside one group of them.
template <typename Kernel>
ClusterCounts count_clusters(Kernel kernel, int threads, int smem) {
  ClusterCounts active = {};
  for (int size = 1; size <= kMostBlocks; ++size) {
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = size;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(size);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = smem;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaOccupancyMaxActiveClusters(&active[size], kernel, &config), "cudaOccupancyMaxActiveClusters");
  }
  return active;
}

// One block: bytes of weights and tokens per tile of 64 k, bytes of its sums, and the tensor cores' time per tile.
struct BlockCost {
  int weights, tokens, sums;
  float math_ns;
};

struct Division {
  int split, share;
};

// The division with the shortest estimated time. A tile of k takes as long as the slowest of four: what crosses from L2,
// what comes from memory, the tensor cores, and the latency of one step. They are
// fitted, and not those of the hardware: under these its choices are best on what an H100 took for 32 to 4096 tokens.
inline Division choose_division(const ClusterCounts& active, const BlockCost& block, int token_blocks, int row_blocks,
                                int k_tiles) {
  constexpr float kL2 = 8750, kMemory = 1300, kPeers = 4900;              // bytes per ns
  constexpr float kStep = 280, kStart = 470, kShare = 1800, kAdd = 900;  // ns
  constexpr int kSms = 132;
  Division best{1, 1};
  float best_cost = 1e30f;
  for (int share = 1; share <= (token_blocks > 1 ? 4 : 1); share *= 2) {  // with one tile of tokens it gained nothing
    for (int split = 1; split * share <= kMostBlocks && (split == 1 || k_tiles / split >= 4); ++split) {
      const int size = split * share;
      if (active[size] == 0) continue;
      const int clusters = token_blocks * ((row_blocks + share - 1) / share);
      const int rounds = (clusters + active[size] - 1) / active[size];
      const int blocks = std::min(clusters, active[size]) * size, per_sm = (blocks + kSms - 1) / kSms;
      const float memory = token_blocks > 1 ? 0.0f : blocks * block.weights / kMemory;
      const float l2 = blocks * (block.weights + static_cast<float>(block.tokens) / share) / kL2;
      const float tile = std::max({l2, memory, per_sm * block.math_ns, kStep});
      const float add = split > 1 ? kAdd + blocks * static_cast<float>(block.sums) / kPeers : 0.0f;
      const int tiles = (k_tiles + split - 1) / split;
      const float cost = rounds * (tiles * tile + kStart + add) + (share > 1 ? kShare : 0.0f);
      if (cost < best_cost) {
        best = {split, share};
        best_cost = cost;
      }
    }
  }
  return best;
}

// See GemmProblem::split.
inline Division division_of(int forced, const ClusterCounts& active) {
  const Division d{forced % 10, std::max(forced / 10, 1)};
  const bool possible = d.split > 0 && (d.share & (d.share - 1)) == 0 && d.split * d.share <= kMostBlocks &&
                        active[d.split * d.share] > 0;
  if (!possible) throw std::runtime_error("split: no such division of the work, " + std::to_string(forced));
  return d;
}

// takes_items: where there are more clusters than fit on the GPU and K is not divided, the kernel takes a grid of those that
// fit, and each of them does several one after the other.
template <typename Kernel>
void launch_divided(Kernel kernel, const ClusterCounts& active, const BlockCost& cost, int rows, int tokens, int threads,
                    int smem, Operand operand, Format format, bool takes_items, const GemmProblem& p,
                    cudaStream_t stream) {
  const int token_blocks = (p.m + tokens - 1) / tokens, row_blocks = (p.n + rows - 1) / rows;
  const Division d = p.split > 0 ? division_of(p.split, active)
                                       : choose_division(active, cost, token_blocks, row_blocks, p.k_tiles);
  const float factor = operand == Operand::kE4m3                                    ? kFactorE4m3
                       : operand == Operand::kFp16 && format == Format::kMxfp4 ? 0.5f
                                                                               : 1.0f;
  const int size = d.split * d.share, groups = (row_blocks + d.share - 1) / d.share;
  const bool some = takes_items && d.split == 1 && token_blocks * groups > active[size];
  const dim3 grid = some ? dim3(size, 1, active[size]) : dim3(size, token_blocks, groups);
  launch_after(kernel, grid, dim3(threads), smem, size, stream, GemmArgs{p, factor, d.split, token_blocks * groups});
}

}  // namespace fp4
