// How a product with many blocks divides its work, and how the blocks of a cluster that divide K add up.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <random>

#include "fp4_format.cuh"
#include "fp4_kernels.h"
#include "pipeline_sm90.cuh"

namespace fp4 {

constexpr int kMostBlocks = 8;  // of a cluster, on every device of this architecture
constexpr int kStreamed = 9;    // see GemmProblem::split

// Where blocks hand sums on (hand_on in gemm_w4_sm90.cu).
struct Exchange {
  float4* sums;
  uint64_t* ready;
  uint64_t ticket;  // what `ready` becomes: another number in each launch, that memory does not hold by chance
};

struct GemmArgs {
  GemmProblem p;
  float factor;  // of this operand type, on top of row_scale
  int items;     // tiles of tokens x blocks of rows
  int streamed;  // the last so many items are divided evenly in K over all blocks
  Exchange exchange;
};

__device__ __forceinline__ float token_scale_of(const GemmProblem& p, int token) {
  return p.token_scale != nullptr ? p.token_scale[token * p.token_scale_stride] : 1.0f;
}

// Each of the blocks that divided K adds up and writes its share of the tokens x rows. `reduce` is where every one of them
// has its own sums, float32 [kTokens][kRows + 4]. A thread takes 4 rows of the lower and of the upper half of a token's, so
// that neighbouring lanes read neighbouring banks, and what it reads of kBatch tokens and kRanks blocks is on its way at once.
template <int kTokens, int kRows, int kThreads, int kBatch, int kRanks, typename Out>
__device__ __forceinline__ void write_output(const GemmArgs& args, const GemmPart& part, uint32_t reduce, int row_block,
                                             int token_block) {
  constexpr int kThreadsPerToken = kRows / 8, kTokensAtOnce = kThreads / kThreadsPerToken;
  static_assert(kThreads % kThreadsPerToken == 0);
  const GemmProblem& p = args.p;
  const int tokens = min(kTokens, p.m - token_block * kTokens), split = gridDim.x, step = kTokensAtOnce * split;
  const int row = threadIdx.x % kThreadsPerToken * 4, n0 = row_block * kRows + row;
  const Out* bias = static_cast<const Out*>(part.bias);
  float row_scale[2][4] = {}, added[2][4];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int n = n0 + h * kRows / 2;
    if (n >= part.n) break;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      row_scale[h][i] = part.row_scale[n + i] * args.factor;
      added[h][i] = bias != nullptr ? static_cast<float>(bias[n + i]) : -0.0f;  // adding -0 changes nothing
    }
  }
  const int first = blockIdx.x * kTokensAtOnce + threadIdx.x / kThreadsPerToken;
  for (int token = first; token < tokens; token += kBatch * step) {
    float v[kBatch][2][4] = {}, token_scale[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int m = token_block * kTokens + min(token + b * step, tokens - 1);
      token_scale[b] = token_scale_of(p, m);
    }
#pragma unroll 1
    for (int rank = 0; rank < split; rank += kRanks) {
      float4 f[kRanks][kBatch][2] = {};
#pragma unroll
      for (int r = 0; r < kRanks; ++r)
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          if (rank + r >= split || token + b * step >= tokens) continue;
          const uint32_t address = reduce + ((token + b * step) * (kRows + 4) + row) * 4;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            f[r][b][h] = load_cluster(address + h * kRows * 2, rank + r);
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
      Out* out = static_cast<Out*>(part.out) + static_cast<int64_t>(token_block * kTokens + token + b * step) * part.n + n0;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (n0 + h * kRows / 2 >= part.n) break;
        float* x = v[b][h];
#pragma unroll
        for (int i = 0; i < 4; ++i) x[i] = x[i] * (row_scale[h][i] * token_scale[b]) + added[h][i];
        *reinterpret_cast<uint2*>(out + h * kRows / 2) = make_uint2(pack_pair<Out>(x[0], x[1]), pack_pair<Out>(x[2], x[3]));
      }
    }
  }
}

// The sums of a cluster that divided K are in shared memory: waits for them, writes the results, and keeps this block alive
// until no other reads its sums. (Nothing else may still be on its way to a block: it has waited for every copy into it, and
// warps release only stages whose next copy it has waited for.) Called by kThreads threads.
template <int kTokens, int kRows, int kThreads, typename Out>
__device__ __forceinline__ void add_and_write(const GemmArgs& args, const GemmPart& part, uint32_t reduce, int row_block,
                                              int token_block) {
  cluster_sync();
  if (gridDim.x < 4) write_output<kTokens, kRows, kThreads, 2, 2, Out>(args, part, reduce, row_block, token_block);
  else write_output<kTokens, kRows, kThreads, 1, 4, Out>(args, part, reduce, row_block, token_block);
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

// One block: rows and tokens of its results, its threads and shared memory; bytes of weights per tile of 64 k, bytes of its
// sums, and the tensor cores' time per tile.
struct BlockShape {
  int rows, tokens, threads, smem;
  int weights, sums;
  float math_ns;
  int per_sm;  // blocks of a multiprocessor; one that is alone there does several segments, and can stream K
};

// Clusters that fit at once, several of their blocks on a multiprocessor where the kernel allows it, and one. Work for which
// one is enough is launched like that: where a multiprocessor has room for two blocks, a kernel that starts while another
// ends gets the places that are free by then, two on some and none on others, and takes up to 1.5 times as long.
struct Room {
  ClusterCounts shared, alone;
};

// How K is divided: over so many blocks of a cluster, or kStreamed. By the shortest estimated time. A tile of k takes as long
// as the slowest of three: what comes from memory, the tensor cores, and the latency of one step. They are fitted, only their
// ratios count, and they are not those of the hardware: under them the choices are nearly the best of what an H200 took
// (sweep_variants.py).
inline int choose_split(const Room& room, const BlockShape& block, int token_blocks, int row_blocks, int k_tiles) {
  constexpr float kMemory = 1000, kPeers = 1800;                       // bytes per ns
  constexpr float kStep = 390, kStart = 330, kAdd = 850, kHand = 780;  // ns
  const int items = token_blocks * row_blocks;
  auto tile_ns = [&](int blocks, int per_sm) {
    const float memory = token_blocks > 1 ? 0.0f : blocks * block.weights / kMemory;
    return std::max({memory, per_sm * block.math_ns, kStep});
  };
  int best = 1;
  float best_cost = 1e30f;
  auto consider = [&](int split, float cost) {
    if (cost < best_cost) best = split, best_cost = cost;
  };
  for (int split = 1; split <= kMostBlocks && (split == 1 || k_tiles / split >= 4); ++split) {
    if (room.shared[split] == 0) continue;
    const int rounds = (items + room.shared[split] - 1) / room.shared[split];
    const int blocks = std::min(items, room.shared[split]) * split, tiles = (k_tiles + split - 1) / split;
    const float add = split > 1 ? kAdd + blocks * static_cast<float>(block.sums) / kPeers : 0.0f;
    consider(split, rounds * (tiles * tile_ns(blocks, items <= room.alone[split] ? 1 : block.per_sm) + kStart + add));
  }
  if (block.per_sm == 1) {
    const int blocks = room.shared[1];
    const float share = static_cast<float>(items) / blocks;        // of a block, in items
    const float links = std::max(1.0f, std::ceil(1 / share) - 1);  // blocks that an item goes through after the first
    consider(kStreamed, share * k_tiles * tile_ns(blocks, 1) + kStart * (std::ceil(share) + 1) +
                            links * (kHand + blocks * static_cast<float>(block.sums) / kPeers));
  }
  return best;
}

// A ticket of Exchange: the next of a sequence with a random beginning, scrambled (splitmix64).
inline uint64_t new_ticket() {
  static std::atomic<uint64_t> sequence{(static_cast<uint64_t>(std::random_device()()) << 32) | std::random_device()()};
  uint64_t v = sequence.fetch_add(0x9E3779B97F4A7C15u);
  v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
  v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
  return v ^ (v >> 31);
}

// Where blocks do several segments, K is not divided and there are more items than fit on the GPU, the grid is of those blocks
// that fit, and each of them does several one after the other.
template <typename Kernel>
void launch_divided(Kernel kernel, const Room& room, const BlockShape& block, float factor, const GemmProblem& p,
                    const Allocate& allocate, cudaStream_t stream) {
  const bool many_segments = block.per_sm == 1;
  const int token_blocks = (p.m + block.tokens - 1) / block.tokens, row_blocks = row_blocks_of(p, block.rows);
  const int items = token_blocks * row_blocks;
  const int split = p.split > 0 ? p.split : choose_split(room, block, token_blocks, row_blocks, p.k_tiles);
  const bool streamed = split == kStreamed && many_segments;
  if (!streamed && (split > kMostBlocks || room.shared[split] == 0)) {
    throw std::runtime_error("split: no such division of the work, " + std::to_string(split));
  }
  GemmArgs args{p, factor, items, 0, {}};
  int smem = block.smem;
  dim3 grid(split, items);
  if (streamed) {
    const int blocks = std::min(room.shared[1], items * ((p.k_tiles + 1) / 2));  // a stage for each, of at most two tiles
    grid = dim3(1, blocks);
    args.streamed = items < blocks ? items : items % blocks == 0 ? 0 : items % blocks + blocks;
    const int64_t sums = static_cast<int64_t>(blocks) * block.rows * block.tokens / 4;
    args.exchange.sums = static_cast<float4*>(allocate(sums * sizeof(float4) + blocks * sizeof(uint64_t)));
    args.exchange.ready = reinterpret_cast<uint64_t*>(args.exchange.sums + sums);
    args.exchange.ticket = new_ticket();
  } else {
    if (many_segments && split == 1) grid.y = std::min(items, room.shared[1]);
    if (items <= room.alone[split]) smem = kAloneSmem;
  }
  launch_after(kernel, grid, dim3(block.threads), smem, grid.x, stream, args);
}

}  // namespace fp4
