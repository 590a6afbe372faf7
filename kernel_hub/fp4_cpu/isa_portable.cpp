// Any processor: vectors of four, which every compiler knows how to add and multiply.
#include "kernels.h"

namespace fp4_cpu {
namespace portable {

constexpr int kWidth = 4, kPanelTokens = 2, kPanelBlocks = 1;

#include "simd.h"

constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

INLINE Floats isa_multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

INLINE Floats decode_e2m1(Ints words, int shift) {
  const Ints code = (words >> shift) & 15;
  return Floats{kE2m1[code[0]], kE2m1[code[1]], kE2m1[code[2]], kE2m1[code[3]]};
}

INLINE Rows load_e4m3(const uint8_t* bytes) {
  Ints byte[kParts];
  load_bytes(bytes, byte);
  Rows scale;
  EACH_PART scale.part[p] = decode_e4m3(byte[p]) * 0x1p-8f;
  return scale;
}

#include "activation.h"
#include "gptq.h"
#include "product.h"

}  // namespace portable

using PortableProduct = portable::RowByRow<portable::FloatOperand, 2, 4>;

const Kernels kPortable = {
    "portable",
    kNever,
    portable::activation,
    portable::product<portable::Directly<PortableProduct>, portable::FloatPanels>,
    nullptr,
    nullptr,
    portable::solve,
    portable::descend,
    portable::scales,
};

}  // namespace fp4_cpu
