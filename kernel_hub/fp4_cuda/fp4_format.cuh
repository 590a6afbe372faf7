// FP4 number formats and the prepared (re-laid-out) byte layouts that all kernels share.
//
// E2M1 code: bit 3 sign, bits 2..0 index into {0, .5, 1, 1.5, 2, 3, 4, 6}. Rounding is to nearest, ties to the even
// code, saturating at 6: what cvt.rn.satfinite.e2m1x2 does on chips that have it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

#include <type_traits>

namespace fp4 {

enum class Format : int { kNvfp4 = 0, kMxfp4 = 1 };
enum class ScaleRule : int { kAbsmax = 0, kFourOverSix = 1, kMse = 2 };
// What the tensor cores see: the type of the tokens and of the expanded weights.
enum class Operand : int { kBf16 = 0, kFp16 = 1, kE4m3 = 2 };

// ---- Prepared weight ----------------------------------------------------------------------------------------------
// uint8 [ceil(N/64), ceil(K/64), tile_bytes]. One tile is 64 output rows x 64 k: the codes [4 row slices][32 lanes][16
// bytes], then the scales [4 row slices][64 (nvfp4) or 32 (mxfp4) bytes]. Tiles of 64 rows follow each other along k.
// Lane (g, t) = (lane / 4, lane % 4) of a slice owns its rows g and g+8 and the 16 consecutive k 16t..16t+15: words 0, 1
// are row g (k 0..7, 8..15 of the lane), words 2, 3 row g+8. So one 16-byte load feeds the four k16 steps of a tensor-core
// A fragment, and all 16 codes of a row share one block scale. The tensor cores' own k order inside a 64-block is
// therefore a permutation; the activation kernel writes tokens in the same one.
constexpr int kSliceRows = 16;
constexpr int kSlicesPerTile = 4;
constexpr int kTileK = 64;
constexpr int kSliceCodeBytes = kSliceRows * kTileK / 2;
constexpr int kTileCodeBytes = kSlicesPerTile * kSliceCodeBytes;
constexpr int kTileBytesNvfp4 = kTileCodeBytes + kSlicesPerTile * kSliceRows * 4;
constexpr int kTileBytesMxfp4 = kTileCodeBytes + kSlicesPerTile * kSliceRows * 2;

__host__ __device__ constexpr int tile_bytes(Format f) { return f == Format::kNvfp4 ? kTileBytesNvfp4 : kTileBytesMxfp4; }

// Where in a tile a lane's 16 bytes of codes are, and its two scale bytes (rows g, g+8).
__host__ __device__ constexpr int codes_offset(int slice, int lane) { return slice * kSliceCodeBytes + lane * 16; }
__host__ __device__ constexpr int scales_offset(Format f, int slice, int lane) {
  return kTileCodeBytes + (f == Format::kNvfp4 ? slice * 64 + lane * 2 : slice * 32 + (lane / 4 * 2 + lane % 4 / 2) * 2);
}

// ---- Bit placement inside a 32-bit word of 8 codes k0..k7 -----------------------------------------------------------
// A bf16 pair (k 2p, 2p+1) is E2M1 bits at 8..6 and the sign at 15 of each half: value * 2^-126. Plain nibbles cost 15
// integer operations a word; these placements cost 9 (nvfp4) and let mxfp4 also expand to E4M3 in 8.
struct CodeBits {
  uint8_t m0, m1, m2, sign;  // bit positions of mantissa, low and high exponent bit, sign
};

__host__ __device__ constexpr CodeBits code_bits_nvfp4(int i) {
  const int half = (i & 1) * 16;
  switch (i >> 1) {
    case 0: return {uint8_t(half + 0), uint8_t(half + 1), uint8_t(half + 2), uint8_t(half + 9)};
    case 1: return {uint8_t(half + 4), uint8_t(half + 5), uint8_t(half + 6), uint8_t(half + 13)};
    case 2: return {uint8_t(half + 10), uint8_t(half + 11), uint8_t(half + 12), uint8_t((half + 19) & 31)};
    default: return {uint8_t(half + 14), uint8_t(half + 7), uint8_t(half + 8), uint8_t(half + 15)};
  }
}

__host__ __device__ constexpr CodeBits code_bits_mxfp4(int i) {
  const int half = (i & 1) * 16;
  const int pair = i >> 1;
  const int sign = pair == 0 ? 7 : pair == 1 ? 15 : pair == 2 ? 3 : 11;
  return {uint8_t(half + 4 * pair), uint8_t(half + 4 * pair + 1), uint8_t(half + 4 * pair + 2), uint8_t(half + sign)};
}

__host__ __device__ constexpr CodeBits code_bits(Format f, int i) {
  return f == Format::kNvfp4 ? code_bits_nvfp4(i) : code_bits_mxfp4(i);
}

__device__ __forceinline__ uint32_t place_code(Format f, int i, uint32_t code) {
  const CodeBits b = code_bits(f, i);
  return ((code & 1) << b.m0) | (((code >> 1) & 1) << b.m1) | (((code >> 2) & 1) << b.m2) | ((code >> 3) << b.sign);
}

__device__ __forceinline__ uint32_t extract_code(Format f, int i, uint32_t word) {
  const CodeBits b = code_bits(f, i);
  return ((word >> b.m0) & 1) | (((word >> b.m1) & 1) << 1) | (((word >> b.m2) & 1) << 2) | (((word >> b.sign) & 1) << 3);
}

// ---- Prepared scale bytes -------------------------------------------------------------------------------------------
// nvfp4: a byte b whose bf16 value bits(b * 16 + 0x7680) is scale * 2^119, for E4M3 subnormals too; 152 is minus zero.
// mxfp4: 253 - (largest exponent of the row - exponent), at least 0; bf16 bits(b * 128) is 2^(b - 127).
constexpr int kZeroScaleNvfp4 = 152;
constexpr int kTopScaleMxfp4 = 253;
constexpr float kFactorE4m3 = 0.015625f;  // of results: a row's largest exponent is 6 in E4M3 weights

// What results are multiplied by for the operand type, on top of row_scale.
constexpr float factor_of(Operand operand, Format format) {
  if (operand == Operand::kE4m3) return kFactorE4m3;
  return operand == Operand::kFp16 && format == Format::kMxfp4 ? 0.5f : 1.0f;
}

__host__ __device__ inline int encode_scale_nvfp4(int e4m3) {
  const int e = (e4m3 >> 3) & 15, m = e4m3 & 7;
  if (e > 0) return (e4m3 & 127) + 16;
  if (m == 0) return kZeroScaleNvfp4;
  if (m == 1) return 0;
  if (m < 4) return 8 + (m - 2) * 4;
  return 16 + (m - 4) * 2;
}

__host__ __device__ inline int decode_scale_nvfp4(int b) {
  if (b == kZeroScaleNvfp4) return 0;
  if (b >= 24) return b - 16;
  if (b >= 16) return 4 + (b - 16) / 2;
  if (b >= 8) return 2 + (b - 8) / 4;
  return 1;
}

// Two values as a pair of 16-bit ones, `a` in the lower half.
template <typename T>
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

// f(operand, format) with std::integral_constants for a 16-bit operand type and a format that are known at run time.
template <class F>
void with_types(int operand, int format, const F& f) {
  auto with_operand = [&](auto type) {
    if (format == static_cast<int>(Format::kNvfp4)) return f(type, std::integral_constant<Format, Format::kNvfp4>());
    f(type, std::integral_constant<Format, Format::kMxfp4>());
  };
  if (operand == static_cast<int>(Operand::kBf16)) return with_operand(std::integral_constant<Operand, Operand::kBf16>());
  with_operand(std::integral_constant<Operand, Operand::kFp16>());
}

// ---- Rounding -------------------------------------------------------------------------------------------------------
// a >= 0 rounded to the E2M1 grid: adding and subtracting 2^23 * step rounds to a multiple of step, ties to even; the step is
// half the power of two under a, and at least 0.5. In parts, the second of which has no upper limit.
__device__ __forceinline__ float power_under(float a) { return __uint_as_float(__float_as_uint(fmaxf(a, 1.0f)) & 0x7F800000u); }
__device__ __forceinline__ float round_under(float a, float power) {
  return fmaf(power, -4194304.0f, fmaf(power, 4194304.0f, a));
}
__device__ __forceinline__ float round_e2m1_magnitude(float a) { return fminf(round_under(a, power_under(a)), 6.0f); }

// The 4-bit code of a value that is on the grid.
__device__ __forceinline__ uint32_t code_of_e2m1(float v) {
  const uint32_t bits = __float_as_uint(v);
  const uint32_t mag = bits & 0x7FFFFFFFu;
  const uint32_t code = mag >= 0x3F800000u ? (mag >> 22) - 0xFCu : (mag != 0 ? 1u : 0u);
  return code | ((bits >> 31) << 3);
}

__device__ __forceinline__ float e4m3_to_float(uint32_t byte) {
  __half_raw h = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte), __NV_E4M3);
  return __half2float(*reinterpret_cast<__half*>(&h));
}

// E4M3 byte of a block scale: nearest even, saturating, never below 2^-9 (a zero scale could not be divided by).
__device__ __forceinline__ uint32_t encode_block_scale(float v) {
  const uint32_t b = __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
  return b == 0 ? 1u : b;
}

// 2^e for e in -127..127; 2^-127 is a subnormal.
__device__ __forceinline__ float exp2_int(int e) {
  return e > -127 ? __uint_as_float(static_cast<uint32_t>(e + 127) << 23) : __uint_as_float(0x00400000u);
}

}  // namespace fp4
