// Re-layout of a stored FP4 weight for the sm_90 GEMM, once at load, and its exact inverse.
#include "expand_fp4.cuh"
#include "fp4_kernels.h"
#include "pipeline_sm90.cuh"

namespace fp4 {
namespace {

__device__ __forceinline__ uint32_t stored_code(const uint8_t* weight, int n, int k, int row, int col) {
  if (row >= n || col >= k) return 0;
  return (weight[(static_cast<int64_t>(row) * k + col) / 2] >> (4 * (col & 1))) & 15;
}

// The matrix of expert blockIdx.y.
__device__ __forceinline__ PrepareProblem of_expert(PrepareProblem p) {
  const int64_t expert = blockIdx.y, rows = expert * p.n;
  const bool nvfp4 = p.format == static_cast<int>(Format::kNvfp4);
  if (p.weight != nullptr) p.weight += rows * (p.k / 2);
  if (p.scale != nullptr) p.scale += rows * (p.k / (nvfp4 ? 16 : 32));
  if (p.global != nullptr) p.global += expert;
  p.packed += expert * ((p.n + 63) / 64) * ((p.k + 63) / 64) * tile_bytes(static_cast<Format>(p.format));
  p.row_scale += rows;
  return p;
}

// Largest E8M0 exponent of each row, as the row's scale 2^(e-127); nvfp4: 2^7 / global for every row.
__global__ void row_scale_kernel(const PrepareProblem all) {
  const PrepareProblem p = of_expert(all);
  const int row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, lane = threadIdx.x & 31;
  if (row >= p.n) return;
  if (p.format == static_cast<int>(Format::kNvfp4)) {
    const float global = p.global != nullptr ? *p.global : 1.0f;
    if (lane == 0) p.row_scale[row] = __fdiv_rn(128.0f, global);
    return;
  }
  int top = 0;
  const int groups = p.k / 32;
  for (int i = lane; i < groups; i += 32) top = max(top, static_cast<int>(p.scale[static_cast<int64_t>(row) * groups + i]));
  for (int h = 16; h > 0; h /= 2) top = max(top, __shfl_xor_sync(0xFFFFFFFFu, top, h));
  if (lane == 0) p.row_scale[row] = exp2_int(top - 127);
}

__device__ __forceinline__ int top_exponent(float row_scale) { return static_cast<int>(__float_as_uint(row_scale) >> 23); }

template <Format F>
__device__ __forceinline__ int prepared_scale(const PrepareProblem& p, int row, int col) {
  constexpr int kGroup = F == Format::kNvfp4 ? 16 : 32;
  if (row >= p.n || col >= p.k) return 0;
  const int stored = p.scale[static_cast<int64_t>(row) * (p.k / kGroup) + col / kGroup];
  if constexpr (F == Format::kNvfp4) return encode_scale_nvfp4(stored);
  return max(kTopScaleMxfp4 - (top_exponent(p.row_scale[row]) - stored), 0);
}

// One block of 128 threads per 64 x 64 tile; a thread owns one lane's 16 bytes.
template <Format F>
__global__ void __launch_bounds__(128) prepare_kernel(const PrepareProblem all) {
  const PrepareProblem p = of_expert(all);
  const int k_tiles = (p.k + 63) / 64;
  const int tile_n = blockIdx.x / k_tiles, tile_k = blockIdx.x % k_tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  uint8_t* tile = p.packed + static_cast<int64_t>(blockIdx.x) * tile_bytes(F);
  const int row = tile_n * 64 + warp * 16 + g, k0 = tile_k * 64 + t * 16;
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      words[w] |= place_code(F, i, stored_code(p.weight, p.n, p.k, row + 8 * (w / 2), k0 + 8 * (w % 2) + i));
  }
  *reinterpret_cast<uint4*>(tile + warp * 512 + lane * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  const int s0 = prepared_scale<F>(p, row, k0), s1 = prepared_scale<F>(p, row + 8, k0);
  const uint16_t pair = s0 | (s1 << 8);
  uint8_t* scales = tile + kTileCodeBytes;
  if constexpr (F == Format::kNvfp4) {
    *reinterpret_cast<uint16_t*>(scales + warp * 64 + lane * 2) = pair;
  } else if (t % 2 == 0) {
    *reinterpret_cast<uint16_t*>(scales + warp * 32 + (g * 2 + t / 2) * 2) = pair;
  }
}

template <Format F>
__global__ void __launch_bounds__(128) restore_kernel(const PrepareProblem all, uint8_t* weight, uint8_t* scale) {
  constexpr int kGroup = F == Format::kNvfp4 ? 16 : 32;
  const PrepareProblem p = of_expert(all);
  weight += static_cast<int64_t>(blockIdx.y) * p.n * (p.k / 2);
  scale += static_cast<int64_t>(blockIdx.y) * p.n * (p.k / kGroup);
  const int k_tiles = (p.k + 63) / 64;
  const int tile_n = blockIdx.x / k_tiles, tile_k = blockIdx.x % k_tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  const uint8_t* tile = p.packed + static_cast<int64_t>(blockIdx.x) * tile_bytes(F);
  const uint4 raw = *reinterpret_cast<const uint4*>(tile + warp * 512 + lane * 16);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
  const int k0 = tile_k * 64 + t * 16;
  if (k0 >= p.k) return;
  for (int half = 0; half < 2; ++half) {
    const int row = tile_n * 64 + warp * 16 + g + 8 * half;
    if (row >= p.n) continue;
    for (int b = 0; b < 8; ++b) {
      const uint32_t word = words[2 * half + b / 4];
      const uint32_t lo = extract_code(F, 2 * b % 8, word), hi = extract_code(F, 2 * b % 8 + 1, word);
      weight[(static_cast<int64_t>(row) * p.k + k0) / 2 + b] = lo | (hi << 4);
    }
    const int index = F == Format::kNvfp4 ? warp * 64 + lane * 2 : warp * 32 + (g * 2 + t / 2) * 2;
    const int s = tile[kTileCodeBytes + index + half];
    if (F == Format::kMxfp4 && t % 2 != 0) continue;
    uint8_t* out = scale + static_cast<int64_t>(row) * (p.k / kGroup) + k0 / kGroup;
    if constexpr (F == Format::kNvfp4) *out = decode_scale_nvfp4(s);
    else *out = max(top_exponent(p.row_scale[row]) - (kTopScaleMxfp4 - s), 0);
  }
}

// bytes k0, k2, k1, k3 of the tensor cores' order -> k0..k3
__device__ __forceinline__ uint32_t in_order(uint32_t x) { return __byte_perm(x, 0, 0x3120); }

__global__ void __launch_bounds__(128) expand_e4m3_kernel(const PrepareProblem p, uint8_t* out, float* out_scale) {
  const int k_tiles = (p.k + 63) / 64;
  const int tile_n = blockIdx.x / k_tiles, tile_k = blockIdx.x % k_tiles;
  const int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  const uint8_t* tile = p.packed + static_cast<int64_t>(blockIdx.x) * kTileBytesMxfp4;
  const uint4 raw = *reinterpret_cast<const uint4*>(tile + warp * 512 + lane * 16);
  const uint32_t scales = *reinterpret_cast<const uint16_t*>(tile + kTileCodeBytes + warp * 32 + (g * 2 + t / 2) * 2);
  uint32_t a[2][4];
  expand8(raw, e4m3_table(kTopScaleMxfp4 - static_cast<int>(scales & 0xFF)),
          e4m3_table(kTopScaleMxfp4 - static_cast<int>(scales >> 8)), a);
  const int row = tile_n * 64 + warp * 16 + g, k0 = tile_k * 64 + t * 16;
  if (k0 >= p.k) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (k0 == 0 && row + 8 * h < p.n) out_scale[row + 8 * h] = p.row_scale[row + 8 * h] * kFactorE4m3;
    if (row + 8 * h < p.n)
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(row + 8 * h) * p.k + k0) =
          make_uint4(in_order(a[0][h]), in_order(a[0][2 + h]), in_order(a[1][h]), in_order(a[1][2 + h]));
  }
}

}  // namespace

void run_expand_e4m3(const PrepareProblem& p, uint8_t* out, float* out_scale, cudaStream_t stream) {
  expand_e4m3_kernel<<<(p.n + 63) / 64 * ((p.k + 63) / 64), 128, 0, stream>>>(p, out, out_scale);
  check_cuda(cudaGetLastError(), "expand_e4m3_kernel");
}

void run_prepare(const PrepareProblem& p, cudaStream_t stream) {
  const dim3 tiles((p.n + 63) / 64 * ((p.k + 63) / 64), p.experts);
  row_scale_kernel<<<dim3((p.n + 7) / 8, p.experts), 256, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "row_scale_kernel");
  if (p.format == static_cast<int>(Format::kNvfp4)) prepare_kernel<Format::kNvfp4><<<tiles, 128, 0, stream>>>(p);
  else prepare_kernel<Format::kMxfp4><<<tiles, 128, 0, stream>>>(p);
  check_cuda(cudaGetLastError(), "prepare_kernel");
}

void run_restore(const PrepareProblem& p, uint8_t* weight, uint8_t* scale, cudaStream_t stream) {
  const dim3 tiles((p.n + 63) / 64 * ((p.k + 63) / 64), p.experts);
  if (p.format == static_cast<int>(Format::kNvfp4)) restore_kernel<Format::kNvfp4><<<tiles, 128, 0, stream>>>(p, weight, scale);
  else restore_kernel<Format::kMxfp4><<<tiles, 128, 0, stream>>>(p, weight, scale);
  check_cuda(cudaGetLastError(), "restore_kernel");
}

}  // namespace fp4
