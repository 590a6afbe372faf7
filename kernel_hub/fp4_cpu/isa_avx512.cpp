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
  const __m512 values =
      _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
  return _mm512_permutexvar_ps((__m512i)(words >> shift), values);
}

// As half precision floats, whose exponent has a bias of 15 where E4M3 has 7.
INLINE Rows load_e4m3(const uint8_t* bytes) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return {{_mm512_cvtph_ps(_mm256_slli_epi16(wide, 7))}};
}

#include "activation.h"
#include "gptq.h"
#include "product.h"

#include "bf16.h"
#include "moments.h"

#pragma GCC target("amx-tile,amx-bf16")
#include "amx.h"

}  // namespace avx512

using FloatDirect = avx512::RowByRow<avx512::FloatOperand, 4, 4, 2>;
constexpr auto kFloatProduct = avx512::product<avx512::Directly<FloatDirect>, avx512::FloatPanels>;

const Kernels kAvx512 = {
    "avx512", kNever, avx512::activation, kFloatProduct, nullptr, nullptr, avx512::solve, avx512::descend, avx512::scales,
};
const Kernels kAvx512Bf16 = {
    "avx512_bf16",
    0,
    avx512::activation,
    kFloatProduct,
    avx512::product<avx512::Directly<avx512::Bf16Direct>>,
    avx512::interleave,
    avx512::solve,
    avx512::descend,
    avx512::scales,
    avx512::pack_moments,
    avx512::add_moments<avx512::DotMoments>,
};

const Kernels kAmx = {
    "amx",
    FloatDirect::kMost + 1,
    avx512::activation,
    kFloatProduct,
    avx512::product<avx512::InPanels<avx512::AmxPanel>>,
    nullptr,
    avx512::solve,
    avx512::descend,
    avx512::scales,
    avx512::pack_moments,
    avx512::add_moments<avx512::AmxMoments>,
};

}  // namespace fp4_cpu
#endif
