// Multiplies E4M3 tiles on the CPU: the kernels' own code lays out weights and tokens and expands the weights, what wgmma
// m64nNk32 does with registers and descriptors is written down here from the PTX ISA. Any k out of place is a wrong result.
// Compiled as C++ by test_e4m3_layout.py. Prints the number of wrong results.
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include <random>
#include <vector>

static dim3 threadIdx;
static uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t select) {
  const uint64_t bytes = a | static_cast<uint64_t>(b) << 32;
  uint32_t r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<uint32_t>(bytes >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
  return r;
}
static uint32_t __funnelshift_r(uint32_t lo, uint32_t hi, uint32_t n) { return (lo | static_cast<uint64_t>(hi) << 32) >> n; }
static uint32_t __float_as_uint(float v) {
  uint32_t r;
  memcpy(&r, &v, 4);
  return r;
}
static float __uint_as_float(uint32_t v) {
  float r;
  memcpy(&r, &v, 4);
  return r;
}
static int max(int a, int b) { return a > b ? a : b; }
static int min(int a, int b) { return a < b ? a : b; }
static float __fadd_rn(float a, float b) { return a + b; }
static float __fsub_rn(float a, float b) { return a - b; }
static float __fdiv_rn(float a, float b) { return a / b; }
static float __shfl_xor_sync(uint32_t, float v, int) { return v; }  // of functions that are not called
static bool __all_sync(uint32_t, bool v) { return v; }
static int __clz(uint32_t v) { return __builtin_clz(v); }
template <typename T>
static T __ldg(const T* p) {
  return *p;
}

#include "activation_fp4.cuh"
#include "expand_fp4.cuh"
#include "wgmma_sm90.cuh"

using namespace fp4;

constexpr float kValuesOfCodes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
static float value_of(int code) { return code & 8 ? -kValuesOfCodes[code & 7] : kValuesOfCodes[code & 7]; }

template <int kTokens>
static int wrong_results(std::mt19937& random, int m, int k_tiles) {
  constexpr int kValues = kTokens < 128 ? 8 : 16;  // of a thread that quantizes
  const int k = k_tiles * kTileK, token_tiles = (m + kTokens - 1) / kTokens;
  std::vector<float> weight(64 * k), token(m * k);
  std::vector<uint8_t> prepared(k_tiles * kTileBytesMxfp4), tiled(token_tiles * kTokens * k, 0x7F);  // NaN
  for (int tile = 0; tile < k_tiles; ++tile)
    for (int warp = 0; warp < 4; ++warp)
      for (int lane = 0; lane < 32; ++lane) {  // prepare_kernel
        uint8_t* out = prepared.data() + tile * kTileBytesMxfp4;
        uint32_t words[4] = {};
        uint8_t* scales = out + scales_offset(Format::kMxfp4, warp, lane);
        if (lane % 2 == 0) scales[0] = kTopScaleMxfp4 - random() % 14, scales[1] = kTopScaleMxfp4 - random() % 14;
        for (int w = 0; w < 4; ++w)
          for (int i = 0; i < 8; ++i) {
            const int code = random() % 16, row = warp * 16 + lane / 4 + 8 * (w / 2);
            words[w] |= place_code(Format::kMxfp4, i, code);
            weight[row * k + tile * kTileK + lane % 4 * 16 + 8 * (w % 2) + i] =
                value_of(code) * exp2f(6 - (kTopScaleMxfp4 - scales[w / 2]));
          }
        memcpy(out + codes_offset(warp, lane), words, 16);
      }
  for (int t = 0; t < m; ++t)
    for (int k0 = 0; k0 < k; k0 += kValues) {
      Chunk<kValues> q;
      const float s = exp2f(static_cast<int>(random() % 13) - 6);
      for (int i = 0; i < kValues; ++i) {
        q.v[i] = value_of(random() % 16);
        token[t * k + k0 + i] = q.v[i] * s;
      }
      Pairs<kValues> p = pack<__half>(q);
      multiply<__half>(p, pack_pair<__half>(s, s));
      store_tiled8(tiled.data(), kTokens, k, t, k0, p);
    }

  int wrong = 0;
  for (int tile_m = 0; tile_m < token_tiles; ++tile_m) {
    std::vector<double> acc(64 * kTokens);
    for (int tile = 0; tile < k_tiles; ++tile) {
      const uint8_t* tokens = tiled.data() + (tile_m * k_tiles + tile) * kTokens * kTileK;
      float a[2][64][32];
      for (int warp = 0; warp < 4; ++warp)
        for (int lane = 0; lane < 32; ++lane) {
          const uint8_t* in = prepared.data() + tile * kTileBytesMxfp4;
          const uint8_t* scales = in + scales_offset(Format::kMxfp4, warp, lane);
          uint4 raw;
          memcpy(&raw, in + codes_offset(warp, lane), 16);
          uint32_t fragment[2][4];
          expand8(raw, e4m3_table(kTopScaleMxfp4 - scales[0]), e4m3_table(kTopScaleMxfp4 - scales[1]), fragment);
          // PTX ISA, wgmma m64k32, A in registers, 8-bit: element i of 16 is in row g + 8 (i / 4 odd), column 4t + i % 4,
          // and 16 further for i >= 8.
          for (int j = 0; j < 2; ++j)
            for (int i = 0; i < 16; ++i)
              a[j][warp * 16 + lane / 4 + i / 4 % 2 * 8][lane % 4 * 4 + i % 4 + i / 8 * 16] =
                  e4m3_to_float(fragment[j][i / 4] >> 8 * (i % 4) & 255);
        }
      for (int j = 0; j < 2; ++j) {
        const uint64_t descriptor = token_descriptor<kTokens>(j * kTokens * 32);  // as multiply in gemm_w4_sm90.cu
        const int start = (descriptor & 0x3FFF) * 16, leading = (descriptor >> 16 & 0x3FFF) * 16,
                  stride = (descriptor >> 32 & 0x3FFF) * 16;
        for (int column = 0; column < kTokens; ++column)
          for (int kk = 0; kk < 32; ++kk) {
            const float b = e4m3_to_float(tokens[start + kk / 16 * leading + column / 8 * stride + column % 8 * 16 + kk % 16]);
            for (int row = 0; row < 64; ++row) acc[row * kTokens + column] += static_cast<double>(a[j][row][kk]) * b;
          }
      }
    }
    for (int column = 0; column < kTokens && tile_m * kTokens + column < m; ++column)
      for (int row = 0; row < 64; ++row) {
        double exact = 0;
        for (int i = 0; i < k; ++i)
          exact += static_cast<double>(weight[row * k + i]) * token[(tile_m * kTokens + column) * k + i];
        wrong += acc[row * kTokens + column] != exact;
      }
  }
  return wrong;
}

int main() {
  std::mt19937 random(0);
  printf("%d %d %d %d\n", wrong_results<32>(random, 17, 3), wrong_results<64>(random, 64, 2), wrong_results<128>(random, 65, 1),
         wrong_results<256>(random, 300, 3));
}
