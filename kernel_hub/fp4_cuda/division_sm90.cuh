// How a product divides its work over blocks.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <random>

#include "fp4_format.cuh"
#include "fp4_kernels.h"
#include "pipeline_sm90.cuh"

namespace fp4 {

// Where blocks hand sums on (hand_on in gemm_w4_sm90.cu).
struct Exchange {
  float4* sums;
  uint64_t* ready;
  uint64_t ticket;  // what `ready` becomes: another number in each launch, that memory does not hold by chance
};

struct GemmArgs {
  GemmProblem p;
  float factor;  // of this operand type, on top of row_scale
  int blocks;    // with work
  int items;     // tiles of tokens x blocks of rows
  int streamed;  // the last so many items are divided evenly in K over all blocks
  Exchange exchange;
};

// One block: rows and tokens of its results, its threads and shared memory; how many of them a multiprocessor has room for;
// bytes of weights per tile of 64 k, tiles of a stage, and the time that a tile takes a block alone.
struct BlockShape {
  int rows, tokens, threads, smem, per_sm;
  int weights, tiles_per_stage;
  float tile_ns;
};

// Of how many blocks an item may have parts: see GemmProblem::split. By the shortest estimated time; the numbers are near to
// what an H200 took (sweep_variants.py).
inline int choose_split(const BlockShape& block, int token_blocks, int row_blocks, int k_tiles, int places) {
  constexpr float kMemory = 3600, kSums = 100;   // bytes per ns, of all blocks and of one
  constexpr float kSegment = 400, kHand = 1500;  // ns
  const int items = token_blocks * row_blocks;
  const float sums = block.rows * block.tokens * 4 / kSums;
  auto tile_ns = [&](int blocks) {
    return std::max(block.tile_ns, token_blocks > 1 ? 0.0f : blocks * block.weights / kMemory);
  };
  const int rounds = (items + places - 1) / places;
  int best = 1;
  float best_cost = rounds * (k_tiles * tile_ns(std::min(items, places)) + kSegment);
  for (int split = 2;; ++split) {
    const int blocks = std::min(items * split, places);
    const float share = static_cast<float>(items) / blocks;  // of a block, in items
    const bool even = items * split <= places;
    const float segments = even ? 1 : std::ceil(share) + 1, sources = std::ceil(1 / share) - (even ? 1 : 0);
    const float cost = share * k_tiles * tile_ns(blocks) + segments * kSegment + kHand + sources * sums;
    if (cost < best_cost && k_tiles * share >= 2 * block.tiles_per_stage) best = split, best_cost = cost;
    if (!even) return best;
  }
}

// A ticket of Exchange: the next of a sequence with a random beginning, scrambled (splitmix64).
inline uint64_t new_ticket() {
  static std::atomic<uint64_t> sequence{(static_cast<uint64_t>(std::random_device()()) << 32) | std::random_device()()};
  uint64_t v = sequence.fetch_add(0x9E3779B97F4A7C15u);
  v = (v ^ (v >> 30)) * 0xBF58476D1CE4E5B9u;
  v = (v ^ (v >> 27)) * 0x94D049BB133111EBu;
  return v ^ (v >> 31);
}

// Two blocks a multiprocessor only where there is an item for more than each: what a kernel finds that starts while another
// ends are places on some multiprocessors and none on others, and sums of fewer blocks are less.
template <typename Kernel>
void launch_divided(Kernel kernel, const BlockShape& block, float factor, const GemmProblem& p, const Allocate& allocate,
                    cudaStream_t stream) {
  const int token_blocks = (p.m + block.tokens - 1) / block.tokens, row_blocks = row_blocks_of(p, block.rows);
  const int items = token_blocks * row_blocks, alone = multiprocessors();
  const int places = items > alone ? alone * block.per_sm : alone;
  const int split = p.split > 0 ? p.split : choose_split(block, token_blocks, row_blocks, p.k_tiles, places);
  const int stages = (p.k_tiles + block.tiles_per_stage - 1) / block.tiles_per_stage;
  const int blocks = std::min(items * std::min(split, stages), places);  // a stage for each
  GemmArgs args{p, factor, blocks, items, 0, {}};
  if (split > 1 && items % blocks != 0) {
    args.streamed = items < blocks ? items : items % blocks + blocks;
    const int64_t sums = static_cast<int64_t>(blocks) * block.rows * block.tokens / 4;
    args.exchange.sums = static_cast<float4*>(allocate(sums * sizeof(float4) + blocks * sizeof(uint64_t)));
    args.exchange.ready = reinterpret_cast<uint64_t*>(args.exchange.sums + sums);
    args.exchange.ticket = new_ticket();
  }
  const int smem = blocks <= alone ? std::max(block.smem, kAloneSmem) : block.smem;
  const int grid = 2 * blocks > alone ? std::max(blocks, alone) : blocks;  // see keep_place
  launch_after(kernel, dim3(grid), dim3(block.threads), smem, stream, args);
}

}  // namespace fp4
