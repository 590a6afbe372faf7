// Which rows of a layer of experts belong to whom. Rows are sorted by expert; a tile is up to so many rows of one expert.
#pragma once

#include "fp4_kernels.h"

namespace fp4 {

// Rows first..first + rows - 1 of the sorted rows, which `expert` gets; none if rows is 0.
struct Segment {
  int expert, first, rows;
};

// Past the caches of this multiprocessor: an earlier kernel may have written it while this one was being launched.
__device__ __forceinline__ int load_integer(const void* p, bool is_64, int64_t i) {
  return is_64 ? static_cast<int>(__ldcg(static_cast<const long long*>(p) + i)) : __ldcg(static_cast<const int*>(p) + i);
}

// The token that a row is.
__device__ __forceinline__ int token_of(const Routing& r, int row) {
  return r.index != nullptr ? load_integer(r.index, r.index_is_64, row) : row;
}

// The tiles of all experts are numbered one after the other: tile `number`, or one without rows if there are fewer.
// Called by a whole warp.
template <int kLaneExperts = 4>
__device__ __forceinline__ Segment find_segment(const Routing& r, int tile, int number) {
  const int lane = threadIdx.x % 32;
  auto offset = [&](int expert) { return load_integer(r.offsets, r.offsets_are_64, min(expert, r.experts)); };
  Segment found{0, 0, 0};
  int before = 0;
  for (int base = 0; base < r.experts; base += 32 * kLaneExperts) {
    int start[kLaneExperts + 1], tiles = 0;
#pragma unroll
    for (int i = 0; i <= kLaneExperts; ++i) start[i] = offset(base + lane * kLaneExperts + i);
    auto tiles_of = [&](int i) { return (start[i + 1] - start[i] + tile - 1) / tile; };
#pragma unroll
    for (int i = 0; i < kLaneExperts; ++i) tiles += tiles_of(i);
    int ends = tiles;
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
      const int other = __shfl_up_sync(0xFFFFFFFFu, ends, h);
      if (lane >= h) ends += other;
    }
    ends += before;
    const uint32_t reach = __ballot_sync(0xFFFFFFFFu, ends > number);
    if (reach != 0) {
      int left = number - (ends - tiles);
#pragma unroll
      for (int i = 0; i < kLaneExperts; ++i) {
        const int mine = tiles_of(i);
        if (left >= 0 && left < mine) {
          found.expert = base + lane * kLaneExperts + i;
          found.first = start[i] + left * tile;
          found.rows = min(tile, start[i + 1] - found.first);
        }
        left -= mine;
      }
      const int owner = __ffs(reach) - 1;
      found.expert = __shfl_sync(0xFFFFFFFFu, found.expert, owner);
      found.first = __shfl_sync(0xFFFFFFFFu, found.first, owner);
      found.rows = __shfl_sync(0xFFFFFFFFu, found.rows, owner);
      break;
    }
    before = __shfl_sync(0xFFFFFFFFu, ends, 31);
  }
  return found;
}

// Rows of no expert are zeros: rows from..to of out [to, n], shared out among the first `threads` of each block of the grid.
__device__ __forceinline__ void zero_absent_rows(void* out, int n, int from, int to, int threads) {
  for (int row = from + blockIdx.x; row < to; row += gridDim.x) {
    uint4* p = reinterpret_cast<uint4*>(static_cast<uint16_t*>(out) + static_cast<int64_t>(row) * n);
    for (int i = threadIdx.x; i < n / 8; i += threads) p[i] = make_uint4(0, 0, 0, 0);
  }
}

}  // namespace fp4
