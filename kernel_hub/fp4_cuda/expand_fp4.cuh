// Prepared FP4 weights -> tensor-core operand A, in registers.
#pragma once

#include "fp4_format.cuh"

namespace fp4 {

// ---- FP4 -> 16 bit ------------------------------------------------------------------------------------------------
// Four pairs of a word as bf16 bits of value * 2^-126 (see code_bits_*).
template <Format kFormat>
__device__ __forceinline__ void expand_word(uint32_t w, uint32_t (&pair)[4]) {
  constexpr uint32_t kAll = 0x81C081C0u, kMag = 0x01C001C0u, kSign = 0x80008000u;
  if constexpr (kFormat == Format::kNvfp4) {
    pair[0] = (w << 6) & kAll;
    pair[1] = (w << 2) & kAll;
    pair[2] = __funnelshift_r(w, w, 4) & kAll;
    pair[3] = (w & 0x81808180u) | ((w >> 8) & 0x00400040u);
  } else {
    pair[0] = ((w << 6) & kMag) | ((w << 8) & kSign);
    pair[1] = ((w << 2) & kMag) | (w & kSign);
    pair[2] = ((w >> 2) & kMag) | ((w << 12) & kSign);
    pair[3] = ((w >> 6) & kMag) | ((w << 4) & kSign);
  }
}

__device__ __forceinline__ uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
__device__ __forceinline__ uint32_t multiply_fp16(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// The prepared scale byte in both halves, as the operand type.
template <Operand kOperand, Format kFormat>
__device__ __forceinline__ uint32_t expand_scale(uint32_t byte) {
  if constexpr (kOperand == Operand::kBf16) {
    return kFormat == Format::kNvfp4 ? byte * 0x00100010u + 0x76807680u : byte * 0x00800080u;
  } else {
    if constexpr (kFormat == Format::kNvfp4) return byte * 0x00800080u + 0x34003400u;
    return static_cast<uint32_t>(max(static_cast<int>(byte) - 223, 0)) * 0x04000400u;
  }
}

// One lane's 2 rows x 16 k -> the A fragments of four k16 steps.
template <Operand kOperand, Format kFormat>
__device__ __forceinline__ void expand16(uint4 raw, uint32_t scales, uint32_t (&a)[4][4]) {
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  const uint32_t s[2] = {expand_scale<kOperand, kFormat>(scales & 0xFF), expand_scale<kOperand, kFormat>(scales >> 8)};
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    uint32_t pair[4];
    expand_word<kFormat>(words[w], pair);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t v = pair[i];
      if constexpr (kOperand == Operand::kFp16) {
        v = (v & 0x01C001C0u) * 8 + (v & 0x80008000u);  // exponent and mantissa sit three bits higher in fp16
        v = multiply_fp16(v, s[w / 2]);
      } else {
        v = multiply_bf16(v, s[w / 2]);
      }
      // Register order of A: row g k-low, row g+8 k-low, row g k-high, row g+8 k-high.
      a[(w % 2) * 2 + i / 2][(i % 2) * 2 + w / 2] = v;
    }
  }
}

// ---- FP4 -> E4M3 --------------------------------------------------------------------------------------------------
// E4M3 bytes of {0, .5, 1, 1.5, 2, 3, 4, 6} * 2^e for e = 6 - below: a table in two registers that prmt indexes.
__device__ __forceinline__ uint2 e4m3_table(int below) {
  if (below <= 11) {  // all normal: an exponent step is 8 in every byte but zero's
    const uint32_t step = static_cast<uint32_t>(11 - below) * 0x08080808u;
    // e = -5: 0, 2^-6, 2^-5, 1.5 * 2^-5 | 2^-4, 1.5 * 2^-4, 2^-3, 1.5 * 2^-3
    return make_uint2(0x14100800u + (step & 0xFFFFFF00u), 0x24201C18u + step);
  }
  switch (below) {  // subnormals, multiples of 2^-9; the last ones round to nearest even
    case 12: return make_uint2(0x0C080400u, 0x1C181410u);
    case 13: return make_uint2(0x06040200u, 0x14100C08u);
    case 14: return make_uint2(0x03020100u, 0x0C080604u);
    case 15: return make_uint2(0x02010000u, 0x06040302u);
    case 16: return make_uint2(0x00000000u, 0x03020201u);
    default: return make_uint2(0u, 0u);
  }
}

// Four bytes of a table. Bit 3 of each selecting nibble must be clear; __byte_perm would clear it again.
__device__ __forceinline__ uint32_t look_up(uint2 table, uint32_t select) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(table.x), "r"(table.y), "r"(select));
  return r;
}

__device__ __forceinline__ void expand_word_e4m3(uint32_t w, uint2 table, uint32_t& first, uint32_t& second) {
  const uint32_t magnitudes = w & 0x77777777u;
  const uint32_t select0 = __byte_perm(magnitudes, 0, 0x4420), select1 = __byte_perm(magnitudes, 0, 0x4431);
  first = look_up(table, select0) | (w & 0x80808080u);
  second = look_up(table, select1) | ((w << 4) & 0x80808080u);
}

// One lane's 2 rows x 16 k -> the A fragments of two k32 steps. t0, t1: the tables of rows g and g+8. Of the 16 k, register
// 2h + row of step j has 8j + 4h + {0, 2, 1, 3}.
__device__ __forceinline__ void expand8(uint4 raw, uint2 t0, uint2 t1, uint32_t (&a)[2][4]) {
  expand_word_e4m3(raw.x, t0, a[0][0], a[0][2]);
  expand_word_e4m3(raw.y, t0, a[1][0], a[1][2]);
  expand_word_e4m3(raw.z, t1, a[0][1], a[0][3]);
  expand_word_e4m3(raw.w, t1, a[1][1], a[1][3]);
}

}  // namespace fp4
