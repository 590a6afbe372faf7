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
  uint16_t sharers;  // bits of the blocks with this part of K

  __device__ __forceinline__ ClusterPlace(const GemmArgs& args, int row_group)
      : split(args.split),
        share(gridDim.x / args.split),
        part(blockIdx.x % args.split),
        peer(blockIdx.x / args.split),
        row_block(row_block_of(row_group)),
        sharers(0) {
    for (int i = 0; i < share; ++i) sharers |= 1u << rank(part, i);
  }
  __device__ __forceinline__ int row_block_of(int group) const { return group * share + peer; }
  __device__ __forceinline__ int rank(int part_, int peer_) const { return peer_ * split + part_; }
  // Tokens at `src` into every sharer's `dst`: this block sends its part of the bytes.
  __device__ __forceinline__ void copy_tokens(uint32_t dst, const uint8_t* src, uint32_t bytes, uint32_t full,
                                              uint64_t policy) const {
    if (share == 1) return bulk_copy(dst, src, bytes, full, policy);
    const uint32_t piece = bytes / share, offset = piece * peer;
    bulk_copy_shared(dst + offset, src + offset, piece, full, sharers, policy);
  }
};

// Frees stages of the ring: one warp in every block that fills them; only a stage that is filled again.
struct Releaser {
  uint32_t empty;     // of the first stage, the others follow: this lane's block's
  bool local, remote;  // whether this lane tells its own block, or another through the cluster

  __device__ __forceinline__ Releaser(const ClusterPlace& place, uint32_t empty_) {
    const int lane = threadIdx.x % 32;
    local = place.share == 1 && lane == 0;
    remote = place.share > 1 && lane < place.share;
    empty = remote ? cluster_address(empty_, place.rank(place.part, lane)) : empty_;
  }
  __device__ __forceinline__ void release(int stage) const {
    if (local) barrier_arrive(empty + stage * 8);
    if (remote) barrier_arrive_cluster(empty + stage * 8);
  }
};

__device__ __forceinline__ float token_scale_of(const GemmProblem& p, int token) {
  return p.token_scale != nullptr ? p.token_scale[token * p.token_scale_stride] : 1.0f;
}

// Each of the blocks that divided K adds up and writes its share of the tokens x rows. `reduce` is where every one of them
// has its own sums, float32 [kTokens][kRows + 4]. A thread takes 4 rows of the lower and of the upper half of a token's, so
// that neighbouring lanes read neighbouring banks, and what it reads of kBatch tokens and kRanks blocks is on its way at once.
template <int kTokens, int kRows, int kThreads, int kBatch, int kRanks, typename Out>
__device__ __forceinline__ void write_output(const GemmArgs& args, const ClusterPlace& place, uint32_t reduce,
                                             int token_block) {
  constexpr int kThreadsPerToken = kRows / 8, kTokensAtOnce = kThreads / kThreadsPerToken;
  static_assert(kThreads % kThreadsPerToken == 0);
  const GemmProblem& p = args.p;
  const int tokens = min(kTokens, p.m - token_block * kTokens), step = kTokensAtOnce * place.split;
  const int row = threadIdx.x % kThreadsPerToken * 4, n0 = place.row_block * kRows + row;
  const Out* bias = static_cast<const Out*>(p.bias);
  float row_scale[2][4] = {}, added[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = n0 + h * kRows / 2;
    if (n >= p.n) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row_scale[h][i] = p.row_scale[n + i] * args.factor;
      added[h][i] = bias != nullptr ? static_cast<float>(bias[n + i]) : -0.0f;  // adding -0 changes nothing
    }
  }
  const int first = place.part * kTokensAtOnce + threadIdx.x / kThreadsPerToken;
  for (int token = first; token < tokens; token += kBatch * step) {
    float v[kBatch][2][4] = {}, token_scale[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int m = token_block * kTokens + min(token + b * step, tokens - 1);
      token_scale[b] = token_scale_of(p, m);
    }
    for (int rank = 0; rank < place.split; rank += kRanks) {
      float4 f[kRanks][kBatch][2] = {};
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (rank + r >= place.split || token + b * step >= tokens) continue;
          const uint32_t address = reduce + ((token + b * step) * (kRows + 4) + row) * 4;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            f[r][b][h] = load_cluster(address + h * kRows * 2, place.rank(rank + r, place.peer));
          }
        }
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            v[b][h][0] += f[r][b][h].x, v[b][h][1] += f[r][b][h].y;
            v[b][h][2] += f[r][b][h].z, v[b][h][3] += f[r][b][h].w;
          }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (token + b * step >= tokens) break;
      Out* out = static_cast<Out*>(p.out) + static_cast<int64_t>(token_block * kTokens + token + b * step) * p.n + n0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (n0 + h * kRows / 2 >= p.n) break;
        float* x = v[b][h];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = x[i] * (row_scale[h][i] * token_scale[b]) + added[h][i];
        *reinterpret_cast<uint2*>(out + h * kRows / 2) =
            make_uint2(pack_pair<Out>(x[0], x[1]), pack_pair<Out>(x[2], x[3]));
      }
    }
  }
}

// The sums of a cluster that divided K are in shared memory: waits for them, writes the results, and keeps this block alive
// until no other reads its sums. (Nothing else may still be on its way to a block: it has waited for every copy into it, and
// warps release only stages whose next copy it has waited for.) Called by kThreads threads.
template <int kTokens, int kRows, int kThreads, typename Out>
__device__ __forceinline__ void add_and_write(const GemmArgs& args, const ClusterPlace& place, uint32_t reduce,
                                              int token_block) {
  cluster_sync();
  if (place.split < 4) write_output<kTokens, kRows, kThreads, 2, 2, Out>(args, place, reduce, token_block);
  else write_output<kTokens, kRows, kThreads, 1, 4, Out>(args, place, reduce, token_block);
  cluster_arrive_relaxed();  // what was read has been used: nothing to wait for
  cluster_wait();
}

// ---- Host: how to divide a problem ------------------------------------------------------------------------------------
using ClusterCounts = std::array<int, kMostBlocks + 1>;

// Shared memory that leaves no room for a second block on a multiprocessor.
constexpr int kAloneSmem = 227 << 10;

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
  int per_sm;  // blocks of a multiprocessor
};

struct Division {
  int split, share;
};

// Clusters that fit at once, several of their blocks on a multiprocessor where the kernel allows it, and one. Work for which
// one is enough is launched like that: where a multiprocessor has room for two blocks, a kernel that starts while another
// ends gets the places that are free by then, two on some and none on others, and takes up to 1.5 times as long.
struct Room {
  ClusterCounts shared, alone;
};

// The division with the shortest estimated time. A tile of k takes as long as the slowest of four: what crosses from L2,
// what comes from memory, the tensor cores, and the latency of one step. They are fitted, and not those of the hardware:
// under these its choices are nearly the best of what an H200 took for 32 to 512 tokens (sweep_variants.py).
inline Division choose_division(const Room& room, const BlockCost& block, int most_share, int token_blocks, int row_blocks,
                                int k_tiles) {
  constexpr float kL2 = 9300, kMemory = 1550, kPeers = 2500;              // bytes per ns
  constexpr float kStep = 230, kStart = 380, kShare = 2350, kAdd = 1000;  // ns
  Division best{1, 1};
  float best_cost = 1e30f;
  for (int share = 1; share <= most_share; share *= 2) {
    for (int split = 1; split * share <= kMostBlocks && (split == 1 || k_tiles / split >= 4); ++split) {
      const int size = split * share;
      if (room.shared[size] == 0) continue;
      const int clusters = token_blocks * ((row_blocks + share - 1) / share);
      const bool alone = clusters <= room.alone[size];
      const int rounds = (clusters + room.shared[size] - 1) / room.shared[size];
      const int blocks = std::min(clusters, room.shared[size]) * size, per_sm = alone ? 1 : block.per_sm;
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
inline Division division_of(int forced, const Room& room) {
  const Division d{forced % 10, std::max(forced / 10, 1)};
  const bool possible = d.split > 0 && (d.share & (d.share - 1)) == 0 && d.split * d.share <= kMostBlocks &&
                        room.shared[d.split * d.share] > 0;
  if (!possible) throw std::runtime_error("split: no such division of the work, " + std::to_string(forced));
  return d;
}

// takes_items: where there are more clusters than fit on the GPU and K is not divided, the kernel takes a grid of those that
// fit, and each of them does several one after the other.
template <typename Kernel>
void launch_divided(Kernel kernel, const Room& room, const BlockCost& cost, int rows, int tokens, int threads, int smem,
                    Operand operand, Format format, bool takes_items, const GemmProblem& p,
                    cudaStream_t stream) {
  const int token_blocks = (p.m + tokens - 1) / tokens, row_blocks = row_blocks_of(p, rows);
  const int most_share = token_blocks > 1 ? 4 : 1;  // with one tile of tokens it gained nothing
  const Division d = p.split > 0 ? division_of(p.split, room)
                                 : choose_division(room, cost, most_share, token_blocks, row_blocks, p.k_tiles);
  const int size = d.split * d.share, groups = (row_blocks + d.share - 1) / d.share;
  const bool some = takes_items && d.split == 1 && token_blocks * groups > room.shared[size];
  const dim3 grid = some ? dim3(size, 1, room.shared[size]) : dim3(size, token_blocks, groups);
  if (token_blocks * groups <= room.alone[size]) smem = kAloneSmem;
  launch_after(kernel, grid, dim3(threads), smem, size, stream,
               GemmArgs{p, factor_of(operand, format), d.split, token_blocks * groups});
}

}  // namespace fp4
