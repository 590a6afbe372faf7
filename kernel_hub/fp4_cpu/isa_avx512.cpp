// AVX-512 (F, BW, DQ, VL), and the same with products of bf16 pairs, and of tiles of them (AMX).
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")

namespace fp4_cpu {
namespace avx512 {

constexpr int kWidth = 16, kPanelTokens = 8, kPanelBlocks = 2;

#include "simd.h"

INLINE Floats isa_multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }

INLINE Floats decode_e2m1(Ints words, int shift) {
  const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f,
                                       -4.0f, -6.0f);
  return _mm512_permutexvar_ps((__m512i)(words >> shift), values);
}

// As half precision floats, whose exponent has a bias of 15 where E4M3 has 7.
INLINE Rows load_e4m3(const uint8_t* bytes) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return {{_mm512_cvtph_ps(_mm256_slli_epi16(wide, 7))}};
}

#include "activation.h"
#include "product.h"
#include "gptq.h"

// Tokens in bf16, two k at a time: the halves of a word, shifted, select from a table of 32 whose halves are equal.
struct Bf16Operand {
  typedef uint16_t Number;
  static constexpr int kSteps = 4;
  static constexpr int64_t place(int step) { return 2 * step; }
  static INLINE Rows weights(const Words& words, int step) {
    typedef uint16_t Table __attribute__((vector_size(64)));
    const Table values = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
                          0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
                          0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
    const __m512i codes = _mm512_srli_epi16((__m512i)words.part[0], 4 * step);
    return {{(Floats)_mm512_permutexvar_epi16(codes, (__m512i)values)}};
  }
  // E2M1 times E4M3 or a power of two has at most 6 significant bits: cutting a float in half is exact.
  static INLINE Rows scaled(const Words& words, int step, const Rows& scale) {
    const Floats even = decode_e2m1(words.part[0], 4 * step) * scale.part[0];
    const Floats odd = decode_e2m1(words.part[0], 4 * step + 16) * scale.part[0];
    const __m512i low = _mm512_srli_epi32((__m512i)even, 16);
    return {{(Floats)_mm512_mask_mov_epi16(low, 0xaaaaaaaau, (__m512i)odd)}};
  }
  static INLINE Rows multiply_add(const Rows& weights, const uint16_t* x, const Rows& sum) {
    const __m512i pair = _mm512_set1_epi32(load<int32_t>(x));
    return {{_mm512_dpbf16_ps(sum.part[0], (__m512bh)weights.part[0], (__m512bh)pair)}};
  }
};

using Bf16Panel = TokenByToken<Bf16Operand>;

#include "moments.h"

#pragma GCC target("amx-tile,amx-bf16")
#include "amx.h"

}  // namespace avx512

using FloatProduct = avx512::RowByRow<avx512::FloatOperand, 4, 4, 2>;
using Bf16Product = avx512::RowByRow<avx512::Bf16Operand, 8, 16>;
using NoBf16Product = avx512::RowByRow<avx512::Bf16Operand, 1, 0>;

const Kernels kAvx512 = {"avx512",
                         kNever,
                         avx512::activation,
                         avx512::product<FloatProduct, avx512::FloatPanel>,
                         nullptr,
                         avx512::solve,
                         avx512::descend,
                         avx512::scales};
const Kernels kAvx512Bf16 = {"avx512_bf16",
                             0,
                             avx512::activation,
                             avx512::product<FloatProduct, avx512::FloatPanel>,
                             avx512::product<Bf16Product, avx512::Bf16Panel>,
                             avx512::solve,
                             avx512::descend,
                             avx512::scales,
                             avx512::pack_moments,
                             avx512::add_moments<avx512::DotMoments>};

const Kernels kAmx = {"amx",
                      FloatProduct::kMost + 1,
                      avx512::activation,
                      avx512::product<FloatProduct, avx512::FloatPanel>,
                      avx512::product<NoBf16Product, avx512::AmxPanel>,
                      avx512::solve,
                      avx512::descend,
                      avx512::scales,
                      avx512::pack_moments,
                      avx512::add_moments<avx512::AmxMoments>};

}  // namespace fp4_cpu
#endif
