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

// The same values in 16 bits, two a word, the first one in the lower half.
template <int kValues>
struct Pairs {
  uint32_t v[kValues / 2];
};

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t pair);
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t pair) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

template <typename T, int kValues>
__device__ __forceinline__ Pairs<kValues> pack(const Chunk<kValues>& c) {
  Pairs<kValues> p;
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) p.v[i] = pack_pair<T>(c.v[2 * i], c.v[2 * i + 1]);
  return p;
}

template <typename T, int kValues>
__device__ __forceinline__ Chunk<kValues> unpack(const Pairs<kValues>& p) {
  Chunk<kValues> c;
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    const float2 v = unpack_pair<T>(p.v[i]);
    c.v[2 * i] = v.x;
    c.v[2 * i + 1] = v.y;
  }
  return c;
}

template <int kValues>
__device__ __forceinline__ Pairs<kValues> load_pairs(const void* x, bool valid) {
  Pairs<kValues> p;
#pragma unroll
  for (int i = 0; i < kValues / 8; ++i) {
    const uint4 raw = valid ? __ldg(static_cast<const uint4*>(x) + i) : make_uint4(0, 0, 0, 0);
    p.v[4 * i] = raw.x, p.v[4 * i + 1] = raw.y, p.v[4 * i + 2] = raw.z, p.v[4 * i + 3] = raw.w;
  }
  return p;
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
  for (int h = 1; h * kValues < size; h *= 2) {
    const float sign = threadIdx.x & h ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kValues; ++i) c.v[i] = fmaf(c.v[i], sign, __shfl_xor_sync(0xFFFFFFFFu, c.v[i], h));
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
  float m[kValues / 2];
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) m[i] = fmaxf(fabsf(c.v[i]), fabsf(c.v[i + kValues / 2]));
#pragma unroll
  for (int h = kValues / 4; h > 0; h /= 2) {
#pragma unroll
    for (int i = 0; i < h; ++i) m[i] = fmaxf(m[i], m[i + h]);
  }
  return fmaxf(m[0], 0.0f);  // not a NaN, even if all are
}

// The squared error of a thread's part of a block, where one unit of what values were rounded to is worth `unit`. Added up 8
// values at a time.
template <int kValues>
struct BlockError {
  float sum[kValues / 8] = {};
  __device__ __forceinline__ void add(int i, float value, float rounded, float unit) {
    const float d = fmaf(-rounded, unit, fabsf(value));
    sum[i / 8] = fmaf(d, d, sum[i / 8]);
  }
  template <int kLanes>
  __device__ __forceinline__ float of_block() const {
    return sum_of_block<kLanes>(kValues == 8 ? sum[0] : sum[0] + sum[kValues / 8 - 1]);
  }
};

template <int kValues>
__device__ __forceinline__ void replace_if(bool better, Pairs<kValues>& p, const Pairs<kValues>& other) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) p.v[i] = better ? other.v[i] : p.v[i];
}

// Of magnitudes, those of c.
template <int kValues>
__device__ __forceinline__ void copy_signs(const Chunk<kValues>& c, Pairs<kValues>& p) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    p.v[i] |= __byte_perm(__float_as_uint(c.v[2 * i]), __float_as_uint(c.v[2 * i + 1]), 0x7632) & 0x80008000u;
  }
}

// Each times that of `pair` in its place. For products that 16 bits hold.
template <typename T, int kValues>
__device__ __forceinline__ void multiply(Pairs<kValues>& p, uint32_t pair) {
  using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    const Two product = __hmul2(*reinterpret_cast<const Two*>(&p.v[i]), *reinterpret_cast<const Two*>(&pair));
    p.v[i] = *reinterpret_cast<const uint32_t*>(&product);
  }
}

// Both as E4M3 block scales.
__device__ __forceinline__ float2 round_to_e4m3(float a, float b) {
  constexpr float kLeast = 0x1p-9f;
  const __nv_fp8x2_storage_t bytes =
      __nv_cvt_float2_to_fp8x2(make_float2(fmaxf(a, kLeast), fmaxf(b, kLeast)), __NV_SATFINITE, __NV_E4M3);
  const __half2_raw halves = __nv_cvt_fp8x2_to_halfraw2(bytes, __NV_E4M3);
  return __half22float2(*reinterpret_cast<const __half2*>(&halves));
}

// How an nvfp4 block is rounded under its scale s: values are multiplied by global / s, and one unit is then worth s / global.
struct Step {
  float inverse, unit;
};

__device__ __forceinline__ float approximate_reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}

// a / b as division rounds it, by one correction of the product with b's reciprocal: for an E4M3 scale and a divisor all
// mantissas were tried, with reciprocals up to two units off. Not where anything may be subnormal.
__device__ __forceinline__ float quotient(float a, float b, float reciprocal) {
  const float q = a * reciprocal;
  return fmaf(fmaf(-q, b, a), reciprocal, q);
}

// Magnitudes on the grid, and the squared error that they leave in the block.
template <int kValues>
struct Rounded {
  Pairs<kValues> q;
  BlockError<kValues> error;
  __device__ __forceinline__ void set(int i, const Chunk<kValues>& c, const float (&rounded)[2], float unit) {
    q.v[i / 2] = pack_pair<__nv_bfloat16>(rounded[0], rounded[1]);
#pragma unroll
    for (int j = 0; j < 2; ++j) error.add(i + j, c.v[i + j], rounded[j], unit);
  }
  __device__ __forceinline__ float of_block() const { return error.template of_block<16 / kValues>(); }
};

// The candidates for a block's scale: amax at 6, amax at 4, and the one below the first.
struct Scales {
  float six, four, below;
};

// Ordinary blocks (quantize_nvfp4). No value up to 6 under the first scale rounds to more than 6 under another, and those above
// round as it does.
template <int kValues>
struct FastSearch {
  const Chunk<kValues>& c;
  float global, reciprocal, most;
  __device__ __forceinline__ FastSearch(const Chunk<kValues>& c, float global, float six) : c(c), global(global) {
    const float r = approximate_reciprocal(global);
    reciprocal = fmaf(fmaf(-r, global, 1.0f), r, r);
    most = six * (6.0f * reciprocal);
  }
  __device__ __forceinline__ Step under(float s) const {
    return {quotient(global, s, approximate_reciprocal(s)), quotient(s, global, reciprocal)};
  }
  __device__ __forceinline__ Rounded<kValues> round(float s) const {
    const Step step = under(s);
    Rounded<kValues> r;
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      float rounded[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float a = fminf(fabsf(c.v[i + j]), most) * step.inverse;
        rounded[j] = round_under(a, power_under(a));
      }
      r.set(i, c, rounded, step.unit);
    }
    return r;
  }
  // Also under a scale of up to 9/8 of s, with the powers of two of s: 2 and 4 under s are at least 1.75 and 3.5 under it,
  // from where on values round to 2 and 4 with the larger step too.
  __device__ __forceinline__ void round(float s, float above, Rounded<kValues>& r, Rounded<kValues>& r_above) const {
    const Step step = under(s), step_above = under(above);
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      float rounded[2], rounded_above[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float v = fminf(fabsf(c.v[i + j]), most), a = v * step.inverse, power = power_under(a);
        rounded[j] = round_under(a, power);
        rounded_above[j] = round_under(v * step_above.inverse, power);
      }
      r.set(i, c, rounded, step.unit);
      r_above.set(i, c, rounded_above, step_above.unit);
    }
  }
};

// All others.
template <int kValues>
struct PlainSearch {
  const Chunk<kValues>& c;
  float global;
  __device__ __forceinline__ Rounded<kValues> round(float s) const {
    const float inverse = __fdiv_rn(global, s), unit = __fdiv_rn(s, global);
    Rounded<kValues> r;
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      const float rounded[2] = {round_e2m1_magnitude(fabsf(c.v[i]) * inverse),
                                round_e2m1_magnitude(fabsf(c.v[i + 1]) * inverse)};
      r.set(i, c, rounded, unit);
    }
    return r;
  }
  __device__ __forceinline__ void round(float s, float above, Rounded<kValues>& r, Rounded<kValues>& r_above) const {
    r = round(s);
    r_above = round(above);
  }
};

// Of the scales that the rule allows the one of the least error; of equals, the first of six, four, below.
template <int kValues, class Search>
__device__ __forceinline__ float search_nvfp4(const Search& search, const Scales& scales, ScaleRule rule, Pairs<kValues>& q) {
  Rounded<kValues> six;
  float best = scales.six, least_of_two, error_of_six;
  if (rule == ScaleRule::kMse) {
    Rounded<kValues> below;
    search.round(scales.below, scales.six, below, six);
    error_of_six = six.of_block();
    least_of_two = below.of_block();
    const bool better = least_of_two < error_of_six;
    q = six.q;
    replace_if(better, q, below.q);
    best = better ? scales.below : best;
  } else {
    six = search.round(scales.six);
    q = six.q;
    if (rule == ScaleRule::kAbsmax) return best;
    error_of_six = least_of_two = six.of_block();
  }
  const Rounded<kValues> four = search.round(scales.four);
  const float error = four.of_block();
  const bool better = error < error_of_six && !(least_of_two < error);
  replace_if(better, q, four.q);
  return better ? scales.four : best;
}

// nvfp4 block: returns its scale, which E4M3 has; q holds grid values.
template <int kValues>
__device__ __forceinline__ float quantize_nvfp4(const Chunk<kValues>& c, float global, ScaleRule rule, Pairs<kValues>& q) {
  const float amax = most_of_block<16 / kValues>(amax_of(c));
  const float sixth = fmaf(amax, 0x1.555554p-3f, amax * 0x1.555556p-27f) * global;  // amax / 6 as division rounds it
  // Where all that FastSearch does holds. Of mantissas one is out, all ones: its reciprocal is too close to half way. Of blocks
  // those whose first scale is subnormal and not the least: neighbours are too far from it.
  const bool ordinary = (global >= 0x1p-100f) & (global <= 0x1p100f) & ((~__float_as_uint(global) & 0x007FFFFFu) != 0) &
                        ((sixth < 0x1p-9f) | (sixth >= 0x1.2p-6f));
  float s;
  if (!__all_sync(0xFFFFFFFFu, ordinary)) {
    const uint32_t byte = encode_block_scale(__fdiv_rn(amax, 6.0f) * global);
    const uint32_t fourth = encode_block_scale(__fdiv_rn(amax, 4.0f) * global);
    const Scales scales = {e4m3_to_float(byte), e4m3_to_float(fourth), e4m3_to_float(max(byte - 1, 1u))};
    s = search_nvfp4(PlainSearch<kValues>{c, global}, scales, rule, q);
  } else {
    const float2 first = round_to_e4m3(sixth, amax * (0.25f * global));
    const float below = fmaxf(__uint_as_float(__float_as_uint(first.x) - 0x00100000u), 0x1p-9f);
    s = search_nvfp4(FastSearch<kValues>(c, global, first.x), {first.x, first.y, below}, rule, q);
  }
  copy_signs(c, q);
  return s;
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

// mxfp4 block: returns e; q holds multiples of 2^e. The block's exponent is e and these are grid values, or, if `raised`, it is
// e + 1 and these are their doubles.
template <typename T, int kValues>
__device__ __forceinline__ int quantize_mxfp4(const Chunk<kValues>& c, ScaleRule rule, Pairs<kValues>& q, bool& raised) {
  constexpr int kLanes = 32 / kValues;
  const int e = exponent_of_block(most_of_block<kLanes>(amax_of(c)));
  const float inverse = exp2_int(-e), unit = exp2_int(e);
  raised = false;
  if (rule == ScaleRule::kMse) {
    Pairs<kValues> other;
    BlockError<kValues> error, other_error;
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      float rounded[2], doubles[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float a = fabsf(c.v[i + j]) * inverse, power = power_under(a);
        rounded[j] = fminf(round_under(a, power), 6.0f);
        doubles[j] = round_under(a, fmaxf(power, 2.0f));  // of a / 2: at most 8
        error.add(i + j, c.v[i + j], rounded[j], unit);
        other_error.add(i + j, c.v[i + j], doubles[j], unit);
      }
      q.v[i / 2] = pack_pair<T>(rounded[0], rounded[1]);
      other.v[i / 2] = pack_pair<T>(doubles[0], doubles[1]);
    }
    raised = other_error.template of_block<kLanes>() < error.template of_block<kLanes>();
    replace_if(raised, q, other);
  } else {
#pragma unroll
    for (int i = 0; i < kValues; i += 2) {
      q.v[i / 2] =
          pack_pair<T>(round_e2m1_magnitude(fabsf(c.v[i]) * inverse), round_e2m1_magnitude(fabsf(c.v[i + 1]) * inverse));
    }
  }
  copy_signs(c, q);
  return e;
}

// The bf16 values that a block's stand for once they are quantized, without an nvfp4 token's `global`.
template <Format F, int kValues>
__device__ __forceinline__ Pairs<kValues> quantized_values(const Chunk<kValues>& c, float global, ScaleRule rule) {
  Pairs<kValues> q;
  float s;
  if constexpr (F == Format::kNvfp4) {
    s = quantize_nvfp4(c, global, rule, q);
  } else {
    bool raised;  // of no interest: q is what 2^e multiplies
    s = exp2_int(quantize_mxfp4<__nv_bfloat16>(c, rule, q, raised));
  }
  multiply<__nv_bfloat16>(q, pack_pair<__nv_bfloat16>(s, s));
  return q;
}

// 16-bit values into the layout of gemv_w4_mma.cu for up to 8 tokens: `block` is the 64-block of k0, 8 pieces of 16 bytes
// a token.
template <int kValues>
__device__ __forceinline__ void store_natural(uint4* block, uint32_t token, uint32_t k0, const Pairs<kValues>& p) {
#pragma unroll
  for (int i = 0; i < kValues / 8; ++i)
    block[token * 8 + ((k0 / 8 + i) % 2 ^ (token & 1)) * 4 + k0 / 16 % 4] =
        make_uint4(p.v[4 * i], p.v[4 * i + 1], p.v[4 * i + 2], p.v[4 * i + 3]);
}

// E4M3 bytes of a pair of fp16 values.
__device__ __forceinline__ uint32_t pack8(uint32_t pair) {
  return __nv_cvt_halfraw2_to_fp8x2(*reinterpret_cast<const __half2_raw*>(&pair), __NV_SATFINITE, __NV_E4M3);
}

// Where a token's 64-block of k0 is in tiles, and which row of its tile the token is.
struct TilePlace {
  uint32_t block, row;
};
__device__ __forceinline__ TilePlace place_in_tiles(uint32_t token_tile, uint32_t k_padded, uint32_t token, uint32_t k0) {
  const uint32_t tile = token >> (31 - __clz(token_tile));  // a power of two
  return {tile * (k_padded / 64) + k0 / 64, token & (token_tile - 1)};
}

// fp16 values into E4M3 tiles (gemm_w4_sm90.cu): chunk c holds values 4c, 4c+2, 4c+1, 4c+3 of 16 of each of the four lanes of
// a 64-block, the order of expand8.
template <int kValues>
__device__ __forceinline__ void store_tiled8(uint8_t* out, int token_tile, int k_padded, int token, int k0,
                                             const Pairs<kValues>& p) {
  const TilePlace at = place_in_tiles(token_tile, k_padded, token, k0);
  const uint32_t chunk = token_tile * 16, k = k0;
  uint8_t* word = out + static_cast<uint64_t>(at.block) * (chunk * 4) + k % 16 / 4 * chunk + at.row * 16 + k / 16 % 4 * 4;
#pragma unroll
  for (int i = 0; i < kValues; i += 4)
    *reinterpret_cast<uint32_t*>(word + i / 4 * chunk) = __byte_perm(pack8(p.v[i / 2]), pack8(p.v[i / 2 + 1]), 0x5140);
}

}  // namespace fp4
