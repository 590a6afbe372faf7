// AVX2, FMA and F16C.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c")

namespace fp4_cpu {
namespace avx2 {

constexpr int kWidth = 8, kPanelTokens = 4, kPanelBlocks = 1;

#include "simd.h"

INLINE Floats isa_multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }

INLINE Floats decode_e2m1(Ints words, int shift) {
  const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
  const __m256 magnitude = _mm256_permutevar8x32_ps(magnitudes, (__m256i)(words >> shift));
  return as_floats(bits(magnitude) ^ ((words << (28 - shift)) & INT32_MIN));
}

// As half precision floats, whose exponent has a bias of 15 where E4M3 has 7.
INLINE Rows load_e4m3(const uint8_t* bytes) {
  Rows scale;
  EACH_PART {
    const __m128i wide = _mm_cvtepu8_epi16(_mm_loadu_si64(bytes + p * kWidth));
    scale.part[p] = _mm256_cvtph_ps(_mm_slli_epi16(wide, 7));
  }
  return scale;
}

#include "activation.h"
#include "gptq.h"
#include "product.h"

// A few tokens: bytes of codes become bf16 in two look-ups, and these floats, so that a row's four k lie side by side.
struct FourByFour {
  typedef float Number;
  static constexpr int kTokens = 2;
  static constexpr int64_t kMost = 4;
  struct Sum {
    Floats part[8];  // 4 h + c: rows 8 h + c and 8 h + c + 4
  };

  template <int64_t kGroup, int kCount>
  static INLINE void add(const uint8_t* from, const Rows& scale, const float* x, int64_t k, int64_t first, Sum* total) {
    Sum sum[kCount] = {};
    const __m256i high = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -0x80, -0x41, -0x41, -0x41, -0x40, -0x40, -0x40, -0x40));
    const __m256i low = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40, 0, 0, -0x80, -0x40, 0, 0x40, -0x80, -0x40));
    // The k of the low nibbles of four bytes, and of the high ones.
    const __m256i places[2] = {_mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5), _mm256_setr_epi32(2, 6, 3, 7, 2, 6, 3, 7)};
    const __m256i zero = _mm256_setzero_si256();
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {  // one after the other: there are 16 registers
#pragma GCC unroll 4
      for (int64_t k8 = 0; k8 < kGroup; k8 += 8) {
        const Ints words = load<Ints>(from + k8 * 8 + h * 32);
#pragma GCC unroll 2
        for (int nibble = 0; nibble < 2; ++nibble) {
          const __m256i codes = (__m256i)((words >> (4 * nibble)) & 0x0f0f0f0f);
          const __m256i highs = _mm256_shuffle_epi8(high, codes), lows = _mm256_shuffle_epi8(low, codes);
          const __m256i pairs[2] = {_mm256_unpacklo_epi8(lows, highs), _mm256_unpackhi_epi8(lows, highs)};
          __m256 number[kCount];
          for (int t = 0; t < kCount; ++t)
            number[t] = _mm256_permutevar8x32_ps(load<Floats>(x + t * k + first + k8), places[nibble]);
#pragma GCC unroll 4
          for (int c = 0; c < 4; ++c) {
            const __m256 weights =
                (__m256)(c % 2 == 0 ? _mm256_unpacklo_epi16(zero, pairs[c / 2]) : _mm256_unpackhi_epi16(zero, pairs[c / 2]));
            for (int t = 0; t < kCount; ++t)
              sum[t].part[4 * h + c] = _mm256_fmadd_ps(weights, number[t], sum[t].part[4 * h + c]);
          }
        }
      }
    }
    for (int t = 0; t < kCount; ++t) add_scaled(sum[t], scale, total[t]);
  }

  static INLINE void add_scaled(const Sum& sum, const Rows& scale, Sum& total) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256 s = scale.part[h];
      Floats* to = total.part + 4 * h;
      const Floats* from = sum.part + 4 * h;
      to[0] = _mm256_fmadd_ps(from[0], _mm256_permute_ps(s, 0x00), to[0]);
      to[1] = _mm256_fmadd_ps(from[1], _mm256_permute_ps(s, 0x55), to[1]);
      to[2] = _mm256_fmadd_ps(from[2], _mm256_permute_ps(s, 0xaa), to[2]);
      to[3] = _mm256_fmadd_ps(from[3], _mm256_permute_ps(s, 0xff), to[3]);
    }
  }

  static INLINE Rows rows(const Sum& total) {
    Rows found;
    for (int h = 0; h < 2; ++h) {
      const Floats* of = total.part + 4 * h;
      found.part[h] = _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
    }
    return found;
  }
};

}  // namespace avx2

const Kernels kAvx2 = {
    "avx2",       kNever,  avx2::activation, avx2::product<avx2::Directly<avx2::FourByFour>, avx2::FloatPanels>,
    nullptr,      nullptr, avx2::solve,      avx2::descend,
    avx2::scales,
};

}  // namespace fp4_cpu
#endif
