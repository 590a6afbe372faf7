// Rotation and quantization of tokens, 8 or 16 consecutive values of a token per thread: with few tokens, how long the
// instructions of one thread take is what the product waits for; with many, all of their number. Both give the same bits.
#pragma once

#include "fp4_format.cuh"

namespace fp4 {

template <int kValues>
constexpr int kLanesOf128 = 128 / kValues;

template <int kValues>
struct Chunk {
  float v[kValues];
};

template <int kValues, typename T>
__device__ __forceinline__ Chunk<kValues> load_chunk(const T* x, bool valid) {
  Chunk<kValues> c;
  uint4 raw[kValues / 8] = {};
  if (valid) {
#pragma unroll
    for (int i = 0; i < kValues / 8; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(x) + i);
  }
  const T* t = reinterpret_cast<const T*>(raw);
#pragma unroll
  for (int i = 0; i < kValues; ++i) c.v[i] = static_cast<float>(t[i]);
  return c;
}

// Fast Walsh-Hadamard transform, natural order, in registers and then across lanes; then the factor 1/sqrt(size).
template <int kValues>
__device__ __forceinline__ void rotate(Chunk<kValues>& c, int size) {
  if (size < 16) return;
#pragma unroll
  for (int h = 1; h < kValues; h *= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if ((i & h) == 0) {
        const float a = c.v[i], b = c.v[i + h];
        c.v[i] = a + b;
        c.v[i + h] = a - b;
      }
    }
  }
  const int lane = threadIdx.x & 31;
  for (int h = 1; h * kValues < size; h *= 2) {
    const bool upper = lane & h;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float other = __shfl_xor_sync(0xFFFFFFFFu, c.v[i], h);
      c.v[i] = upper ? other - c.v[i] : c.v[i] + other;
    }
  }
  const float norm = size == 16 ? 0.25f : size == 32 ? 0.17677669529663687f : size == 64 ? 0.125f : 0.08838834764831845f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) c.v[i] *= norm;
}

// Of a block of kLanes neighbouring lanes, the same in each of them.
template <int kLanes>
__device__ __forceinline__ float most_of_block(float v) {
#pragma unroll
  for (int h = 1; h < kLanes; h *= 2) v = fmaxf(v, __shfl_xor_sync(0xFFFFFFFFu, v, h));
  return v;
}
template <int kLanes>
__device__ __forceinline__ float sum_of_block(float v) {
#pragma unroll
  for (int h = 1; h < kLanes; h *= 2) v += __shfl_xor_sync(0xFFFFFFFFu, v, h);
  return v;
}

template <int kValues>
__device__ __forceinline__ float amax_of(const Chunk<kValues>& c) {
  float m = 0.0f;
#pragma unroll
  for (int i = 0; i < kValues; ++i) m = fmaxf(m, fabsf(c.v[i]));
  return m;
}

// The squared error that rounding to E2M1 under x * inverse leaves in a block, where one unit is worth `step`.
// Added up 8 values at a time.
template <int kLanes, int kValues>
__device__ __forceinline__ float block_error(const Chunk<kValues>& c, float inverse, float step) {
  float error[kValues / 8] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) {
    const float magnitude = fabsf(c.v[i]), d = fmaf(-round_e2m1_magnitude(magnitude * inverse), step, magnitude);
    error[i / 8] = fmaf(d, d, error[i / 8]);
  }
  return sum_of_block<kLanes>(kValues == 8 ? error[0] : error[0] + error[kValues / 8 - 1]);
}

// Grid values under x * inverse.
template <int kValues>
__device__ __forceinline__ void round_block(const Chunk<kValues>& c, float inverse, Chunk<kValues>& q) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) q.v[i] = round_e2m1(c.v[i] * inverse);
}

// nvfp4 block: returns the E4M3 scale byte; q holds grid values.
template <int kValues>
__device__ __forceinline__ uint32_t quantize_nvfp4(const Chunk<kValues>& c, float global, ScaleRule rule, Chunk<kValues>& q) {
  constexpr int kLanes = 16 / kValues;
  const float amax = most_of_block<kLanes>(amax_of(c));
  const uint32_t byte6 = encode_block_scale(__fdiv_rn(amax, 6.0f) * global);
  uint32_t best = byte6;
  if (rule != ScaleRule::kAbsmax) {
    auto error_of = [&](uint32_t byte) {
      const float s = e4m3_to_float(byte);
      return block_error<kLanes>(c, __fdiv_rn(global, s), __fdiv_rn(s, global));
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

// mxfp4 block: returns the exponent; q holds grid values.
template <int kValues>
__device__ __forceinline__ int quantize_mxfp4(const Chunk<kValues>& c, ScaleRule rule, Chunk<kValues>& q) {
  constexpr int kLanes = 32 / kValues;
  int e = exponent_of_block(most_of_block<kLanes>(amax_of(c)));
  if (rule == ScaleRule::kMse) {
    const float error = block_error<kLanes>(c, exp2_int(-e), exp2_int(e));
    e += block_error<kLanes>(c, exp2_int(-e - 1), exp2_int(e + 1)) < error;
  }
  round_block(c, exp2_int(-e), q);
  return e;
}

// 8 of the values, times s, as 16 bytes of T.
template <typename T>
__device__ __forceinline__ uint4 pack_values(const float* v, float s) {
  return make_uint4(pack_pair<T>(v[0] * s, v[1] * s), pack_pair<T>(v[2] * s, v[3] * s), pack_pair<T>(v[4] * s, v[5] * s),
                    pack_pair<T>(v[6] * s, v[7] * s));
}

// Values, times s, into the layout of gemv_w4_mma.cu for up to 8 tokens: `block` is the 64-block of k0, 8 pieces of 16 bytes
// a token.
template <typename T, int kValues>
__device__ __forceinline__ void store_natural(uint4* block, int token, int k0, const Chunk<kValues>& q, float s) {
#pragma unroll
  for (int i = 0; i < kValues; i += 8)
    block[token * 8 + ((k0 + i) / 8 % 2 ^ (token & 1)) * 4 + k0 / 16 % 4] = pack_values<T>(q.v + i, s);
}

__device__ __forceinline__ uint32_t pack8(float a, float b, float c, float d) {
  const uint32_t lo = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t hi = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return lo | (hi << 16);
}

// Values, times s, into E4M3 tiles (gemm_w4_sm90.cu): chunk c holds values 4c, 4c+2, 4c+1, 4c+3 of 16 of each of the four
// lanes of a 64-block, the order of expand8.
template <int kValues>
__device__ __forceinline__ void store_tiled8(uint8_t* out, int token_tile, int k_padded, int token, int k0,
                                             const Chunk<kValues>& q, float s) {
  const int tile = token / token_tile, row = token % token_tile;
  const int64_t block = static_cast<int64_t>(tile) * (k_padded / 64) + k0 / 64;
  uint32_t* word = reinterpret_cast<uint32_t*>(out) + block * (token_tile * 16) + row * 4 + k0 / 16 % 4;
#pragma unroll
  for (int i = 0; i < kValues; i += 4)
    word[(k0 % 16 + i) / 4 * token_tile * 4] = pack8(q.v[i] * s, q.v[i + 2] * s, q.v[i + 1] * s, q.v[i + 3] * s);
}

}  // namespace fp4
