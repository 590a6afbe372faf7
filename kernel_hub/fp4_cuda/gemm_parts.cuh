// Which of a product's linears a block works on.
#pragma once

#include "fp4_kernels.h"

namespace fp4 {

// `block` counts blocks of `rows` rows of all linears; becomes its number in the one that has it. Past the end: the last one.
__device__ __forceinline__ GemmPart part_of(const GemmProblem& p, int rows, int& block) {
  GemmPart part = p;
#pragma unroll
  for (int i = 0; i + 1 < kMostParts; ++i) {
    const int blocks = (part.n + rows - 1) / rows;
    if (i + 1 >= p.parts || block < blocks) break;
    block -= blocks;
    part = p.others[i];
  }
  return part;
}

}  // namespace fp4
