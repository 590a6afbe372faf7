// Rotation and quantization of tokens, 16 consecutive values of a token per thread.
#pragma once

#include "fp4_format.cuh"

namespace fp4 {

constexpr int kValues = 16;
constexpr int kLanesPerBlock = 8;  // 128 values

struct Chunk {
  float v[kValues];
};

template <typename T>
__device__ __forceinline__ Chunk load_chunk(const T* x, bool valid) {
  Chunk c;
  if (!valid) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) c.v[i] = 0.0f;
    return c;
  }
  const uint4* p = reinterpret_cast<const uint4*>(x);
  uint4 raw[2] = {__ldg(p), __ldg(p + 1)};
  const T* t = reinterpret_cast<const T*>(raw);
#pragma unroll
  for (int i = 0; i < kValues; ++i) c.v[i] = static_cast<float>(t[i]);
  return c;
}

// Fast Walsh-Hadamard transform, natural order: 16 in registers, 32..128 across lanes; then the factor 1/sqrt(size).
__device__ __forceinline__ void rotate(Chunk& c, int size) {
  if (size < 16) return;
#pragma unroll
  for (int h = 1; h < 16; h *= 2) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      if ((i & h) == 0) {
        const float a = c.v[i], b = c.v[i + h];
        c.v[i] = a + b;
        c.v[i + h] = a - b;
      }
    }
  }
  const int lane = threadIdx.x & 31;
  for (int h = 1; h * 16 < size; h *= 2) {
    const bool upper = lane & h;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, c.v[i], h);
      c.v[i] = upper ? other - c.v[i] : c.v[i] + other;
    }
  }
  const float norm = size == 16 ? 0.25f : size == 32 ? 0.17677669529663687f : size == 64 ? 0.125f : 0.08838834764831845f;
#pragma unroll
  for (int i = 0; i < 16; ++i) c.v[i] *= norm;
}

__device__ __forceinline__ float amax_of(const Chunk& c) {
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) m = fmaxf(m, fabsf(c.v[i]));
  return m;
}

// The squared error that rounding to E2M1 under x * inverse leaves, where one unit is worth `step`.
__device__ __forceinline__ float block_error(const Chunk& c, float inverse, float step) {
  float error = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float magnitude = fabsf(c.v[i]), d = fmaf(-round_e2m1_magnitude(magnitude * inverse), step, magnitude);
    error = fmaf(d, d, error);
  }
  return error;
}

// Grid values under x * inverse.
__device__ __forceinline__ void round_block(const Chunk& c, float inverse, Chunk& q) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) q.v[i] = round_e2m1(c.v[i] * inverse);
}

// nvfp4 block: returns the E4M3 scale byte; q holds grid values.
__device__ __forceinline__ uint32_t quantize_nvfp4(const Chunk& c, float global, ScaleRule rule, Chunk& q) {
  const float amax = amax_of(c);
  const uint32_t byte6 = encode_block_scale(__fdiv_rn(amax, 6.0f) * global);
  uint32_t best = byte6;
  if (rule != ScaleRule::kAbsmax) {
    auto error_of = [&](uint32_t byte) {
      const float s = e4m3_to_float(byte);
      return block_error(c, __fdiv_rn(global, s), __fdiv_rn(s, global));
    };
    float least = error_of(byte6);
    auto consider = [&](uint32_t byte) {
      const float error = error_of(byte);
      best = error < least ? byte : best;
      least = fminf(error, least);
    };
    consider(encode_block_scale(__fdiv_rn(amax, 4.0f) * global));
    if (rule == ScaleRule::kMse) consider(max(byte6 - 1, 1u));
  }
  round_block(c, __fdiv_rn(global, e4m3_to_float(best)), q);
  return best;
}

// A token's divisor: the power of two that takes its largest value to at most 256 * 6, so that multiplying by it is exact.
__device__ __forceinline__ float token_range(float amax) {
  const float ratio = __fdiv_rn(1536.0f, fmaxf(amax, 0x1p-100f));
  const int exponent = min(max(static_cast<int>(__float_as_uint(ratio) >> 23) - 127, -100), 100);
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

__device__ __forceinline__ int exponent_of_block(float amax) {
  return max(static_cast<int>(__float_as_uint(amax) >> 23) - 129, -127);
}

// mxfp4 block, shared by lanes l and l ^ 1: returns the exponent; q holds grid values.
__device__ __forceinline__ int quantize_mxfp4(const Chunk& c, ScaleRule rule, Chunk& q) {
  float amax = amax_of(c);
  amax = fmaxf(amax, __shfl_xor_sync(0xFFFFFFFFu, amax, 1));
  int e = exponent_of_block(amax);
  if (rule == ScaleRule::kMse) {
    float error = block_error(c, exp2_int(-e), exp2_int(e)), above = block_error(c, exp2_int(-e - 1), exp2_int(e + 1));
    error += __shfl_xor_sync(0xFFFFFFFFu, error, 1);
    above += __shfl_xor_sync(0xFFFFFFFFu, above, 1);
    e += above < error;
  }
  round_block(c, exp2_int(-e), q);
  return e;
}

// 16 values, times s, into the layout of gemv_w4_mma.cu: `block` is the 64-block of k0, 8 pieces of 16 bytes a token.
template <typename T>
__device__ __forceinline__ void store_natural(uint4* block, int token, int k0, const Chunk& q, float s) {
  uint4* out = block + token * 8 + (k0 / 16) % 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = pack_pair<T>(q.v[8 * h + 2 * i] * s, q.v[8 * h + 2 * i + 1] * s);
    out[(h ^ (token & 1)) * 4] = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

__device__ __forceinline__ uint32_t pack8(float a, float b, float c, float d) {
  const uint32_t lo = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t hi = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return lo | (hi << 16);
}

// 16 values, times s, into E4M3 tiles (gemm_w4_sm90.cu): chunk c holds values 4c, 4c+2, 4c+1, 4c+3 of each of the four
// lanes of a 64-block, the order of expand8.
__device__ __forceinline__ void store_tiled8(uint8_t* out, int token_tile, int k_padded, int token, int k0, const Chunk& q,
                                             float s) {
  const int tile = token / token_tile, row = token % token_tile;
  const int64_t block = static_cast<int64_t>(tile) * (k_padded / 64) + k0 / 64;
  uint32_t* word = reinterpret_cast<uint32_t*>(out) + block * (token_tile * 16) + row * 4 + (k0 / 16) % 4;
#pragma unroll
  for (int c = 0; c < 4; ++c)
    word[c * token_tile * 4] = pack8(q.v[4 * c] * s, q.v[4 * c + 2] * s, q.v[4 * c + 1] * s, q.v[4 * c + 3] * s);
}

}  // namespace fp4
