// Rotate and quantize tokens. Memory-bound: each value is read once (twice by longer tokens with a per-token range) and
// written once.
//
// The product that follows may start before this kernel's own wait: until it has waited too, it reads only weights, and by
// the end of this kernel everything before has ended as well.
//
// Neighbouring lanes hold a block, and 128 values, the longest Hadamard transform. Outputs:
//   tiled: what wgmma and ldmatrix read, [token tiles, K/64, 8 chunks (E4M3: 4), tokens of a tile, 16 bytes]
//   natural: what gemv_w4_mma.cu reads of up to 8 tokens, [K/64, 8 tokens, 2 halves, 4 lanes, 8 values]; odd tokens swap the
//     halves, so that shared memory is read without bank conflicts
//   rows: E4M3 [M, K] for the library's FP8 product
//   plain: bf16 [M, K] (rotated only: the dtype of x), for calibration
//   packed: uint8 codes [M, K/2] and row-major scales, the bytes of a checkpoint's activations
#include <algorithm>

#include "activation_fp4.cuh"
#include "fp4_kernels.h"
#include "pipeline_sm90.cuh"

namespace fp4 {
namespace {

struct ActivationArgs {
  const void *x, *up;
  int64_t stride;
  const float* global;  // float32 [1] or null
  void* out;            // tiled operand, or packed codes
  uint8_t* scales;      // packed output only
  float* token_scale;   // multiplier of a token's results: [1] static, [M] dynamic
  int m, k, k_padded;   // k_padded: multiple of 64
  int token_tile;
  int hadamard;
  ScaleRule rule;
  bool natural;
  bool experts;
};

// The product of experts may read the routing once it runs, before it waits for this kernel: it starts only when all before
// this kernel has ended.
__device__ __forceinline__ void wait_and_launch(const ActivationArgs& a) {
  if (!a.experts) grid_dependency_launch();
  grid_dependency_wait();
  if (a.experts) grid_dependency_launch();
}

template <typename T>
__device__ __forceinline__ float round_to(float v) {
  return static_cast<float>(static_cast<T>(v));
}

// Values of a token from k0 on, as they are in memory: on their way, until they are unpacked. Gated: rounded where PyTorch
// rounds, so that it has the same bits as `F.silu(x) * up`.
template <int kValues, typename T, bool kGated>
struct Input {
  Pairs<kValues> x, up;
  __device__ __forceinline__ Input(const ActivationArgs& a, int token, int k0, bool valid) {
    const int64_t at = static_cast<int64_t>(token) * (kGated ? a.stride : a.k) + k0;
    x = load_pairs<kValues>(static_cast<const T*>(a.x) + at, valid);
    if constexpr (kGated) up = load_pairs<kValues>(static_cast<const T*>(a.up) + at, valid);
  }
  __device__ __forceinline__ Chunk<kValues> unpacked() const {
    Chunk<kValues> c = unpack<T>(x);
    if constexpr (kGated) {
      const Chunk<kValues> by = unpack<T>(up);
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const float silu = __fdiv_rn(c.v[i], 1.0f + expf(-c.v[i]));
        c.v[i] = round_to<T>(round_to<T>(silu) * by.v[i]);
      }
    }
    return c;
  }
};

template <int kCount>
__device__ __forceinline__ void store_words(uint8_t* out, const uint32_t (&w)[kCount]) {
  if constexpr (kCount == 8) {
    reinterpret_cast<uint4*>(out)[0] = make_uint4(w[0], w[1], w[2], w[3]);
    reinterpret_cast<uint4*>(out)[1] = make_uint4(w[4], w[5], w[6], w[7]);
  } else if constexpr (kCount == 4) *reinterpret_cast<uint4*>(out) = make_uint4(w[0], w[1], w[2], w[3]);
  else if constexpr (kCount == 2) *reinterpret_cast<uint2*>(out) = make_uint2(w[0], w[1]);
  else *reinterpret_cast<uint32_t*>(out) = w[0];
}

// 16-bit tiles: chunk 2j holds values 4j, 4j+1 of 16 of each of the four lanes of a 64-block, chunk 2j+1 values 4j+2, 4j+3.
template <int kValues>
__device__ __forceinline__ void store_tiled16(const ActivationArgs& a, int token, int k0, const Pairs<kValues>& p) {
  const TilePlace at = place_in_tiles(a.token_tile, a.k_padded, token, k0);
  const uint32_t chunk = a.token_tile * 16, k = k0;
  uint8_t* block = static_cast<uint8_t*>(a.out) + static_cast<uint64_t>(at.block) * (chunk * 8);
  if (a.natural) return store_natural(reinterpret_cast<uint4*>(block), at.row, k0, p);
  block += k % 16 / 2 * chunk + at.row * 16 + k / 16 % 4 * 4;
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) *reinterpret_cast<uint32_t*>(block + i * chunk) = p.v[i];
}

// Row-major E4M3 [M, K] of fp16 values, for a library product.
template <int kValues>
__device__ __forceinline__ void store_rows8(const ActivationArgs& a, int token, int k0, const Pairs<kValues>& p) {
  uint32_t w[kValues / 4];
#pragma unroll
  for (int i = 0; i < kValues / 4; ++i) w[i] = pack8(p.v[2 * i]) | pack8(p.v[2 * i + 1]) << 16;
  store_words(static_cast<uint8_t*>(a.out) + static_cast<int64_t>(token) * a.k + k0, w);
}

template <int kValues>
__device__ __forceinline__ void store_packed(const ActivationArgs& a, int token, int k0, const Pairs<kValues>& grid) {
  const Chunk<kValues> q = unpack<__nv_bfloat16>(grid);
  uint32_t w[kValues / 8] = {};
#pragma unroll
  for (int i = 0; i < kValues; ++i) w[i / 8] |= code_of_e2m1(q.v[i]) << (4 * (i % 8));
  store_words(static_cast<uint8_t*>(a.out) + (static_cast<int64_t>(token) * a.k + k0) / 2, w);
}

template <int kValues>
__device__ __forceinline__ void store_plain(const ActivationArgs& a, int token, int k0, const Pairs<kValues>& p) {
  if (k0 >= a.k) return;
  store_words(reinterpret_cast<uint8_t*>(static_cast<uint16_t*>(a.out) + static_cast<int64_t>(token) * a.k + k0), p.v);
}

enum class Output : int { kRotated, kTiled16, kPacked, kRows8, kTiled8, kPlain, kRotatedPlain };

// Quantize one chunk under a range that is known, if any, and store it.
template <typename T, Format F, Output O, int kValues>
__device__ __forceinline__ void finish_chunk(const ActivationArgs& a, int token, int k0, const Chunk<kValues>& c, float global,
                                             bool store) {
  if constexpr (O == Output::kRotated) {
    if (store) store_tiled16(a, token, k0, pack<T>(c));
  } else if constexpr (O == Output::kRotatedPlain) {
    if (store) store_plain(a, token, k0, pack<T>(c));
  } else if constexpr (O == Output::kTiled16 || O == Output::kPlain) {
    const Pairs<kValues> values = quantized_values<F>(c, global, a.rule);
    if (!store) return;
    if constexpr (O == Output::kTiled16) store_tiled16(a, token, k0, values);
    else store_plain(a, token, k0, values);
  } else {
    static_assert(O == Output::kPacked);
    Pairs<kValues> q;
    uint8_t scale;
    if constexpr (F == Format::kNvfp4) {
      scale = encode_block_scale(quantize_nvfp4(c, global, a.rule, q));
    } else {
      bool raised;
      scale = quantize_mxfp4<__nv_bfloat16>(c, a.rule, q, raised) + raised + 127;
      if (raised) multiply<__nv_bfloat16>(q, pack_pair<__nv_bfloat16>(0.5f, 0.5f));
    }
    if (!store || k0 >= a.k) return;
    constexpr int kBlock = F == Format::kNvfp4 ? 16 : 32;
    store_packed(a, token, k0, q);
    if (k0 % kBlock == 0) a.scales[(static_cast<int64_t>(token) * a.k + k0) / kBlock] = scale;
  }
}

// Whether blocks may take several groups of tokens, one after the other, to be no more than find room beside a product: of few
// tokens only, whose kernel has few registers.
template <Output O, int kValues>
constexpr bool kSeveralGroups = kValues == 8 && (O == Output::kRotated || O == Output::kTiled16);

// A warp takes two or four tokens x 128 values, so that tiled stores of a chunk fill 32 or 64 bytes.
template <typename T, Format F, Output O, bool kGated, int kValues>
__global__ void __launch_bounds__(128) activation_static_kernel(const ActivationArgs a) {
  wait_and_launch(a);
  const int lane = threadIdx.x & 31;
  constexpr int kLanes = kLanesOf128<kValues>, kTokens = 32 / kLanes;
  const int k_first = (blockIdx.y * 4 + threadIdx.x / 32) * 128, k0 = k_first + lane % kLanes * kValues;
  const float global = a.global != nullptr ? __ldg(a.global) : 1.0f;
  if (a.token_scale != nullptr && (blockIdx.x | blockIdx.y | threadIdx.x) == 0) a.token_scale[0] = __fdiv_rn(1.0f, global);
  if (k_first >= a.k_padded) return;
  auto load = [&](int token) { return Input<kValues, T, kGated>(a, token, k0, token < a.m && k0 < a.k); };
  const int step = gridDim.x * kTokens;
  int token = blockIdx.x * kTokens + lane / kLanes;
  Input<kValues, T, kGated> next = load(token);
  for (int first = blockIdx.x * kTokens; first < a.m; first += step, token += step) {
    Chunk<kValues> c = next.unpacked();
    if (kSeveralGroups<O, kValues> && first + step < a.m) next = load(token + step);
    rotate(c, a.hadamard);
    finish_chunk<T, F, O>(a, token, k0, c, global, token < a.m && k0 < a.k_padded);
    if (!kSeveralGroups<O, kValues>) break;
  }
}

// What a thread keeps of a chunk until the token's range is known. Its part of the range is an integer that orders as the
// range.
template <Format F, int kValues>
struct Held;

// The largest value, and the values: what they round to depends on the range.
template <int kValues>
struct Held<Format::kNvfp4, kValues> {
  Chunk<kValues> c;
  __device__ __forceinline__ int hold(const ActivationArgs& a, const Chunk<kValues>& rotated) {
    c = rotated;
    return __float_as_int(amax_of(c));
  }
};

// The largest exponent of a block, and quantized values, which the range only shifts.
template <int kValues>
struct Held<Format::kMxfp4, kValues> {
  Pairs<kValues> q;
  int exponent;
  __device__ __forceinline__ int hold(const ActivationArgs& a, const Chunk<kValues>& rotated) {
    bool raised;  // of no interest: q is what 2^exponent multiplies
    exponent = quantize_mxfp4<__half>(rotated, a.rule, q, raised);
    return exponent;
  }
};

// One cluster of blocks per token: the first pass finds the token's range, the second stores what it rounds to. A thread's
// first chunks stay in registers in between.
constexpr int kMostBlocks = 8;  // blocks of a cluster, on every device of this architecture
template <Format F, int kValues>
constexpr int kMostThreads = F == Format::kNvfp4 && kValues == 16 ? 384 : 512;  // which need more registers
constexpr int kKept = 32;                                                       // values of a thread
template <Format F, int kValues>
constexpr int kMostKept = kKept * kMostThreads<F, kValues>;  // values of a token, of one block

template <typename T, Format F, Output O, bool kGated, int kValues>
__global__ void __launch_bounds__((kMostThreads<F, kValues>), 2) activation_dynamic_kernel(const ActivationArgs a) {
  const int parts = cluster_size(), part = blockIdx.x % parts, token = blockIdx.x / parts;
  if (parts > 1) cluster_arrive();
  wait_and_launch(a);
  constexpr int kHeld = kKept / kValues, kNone = -1000;
  __shared__ int warp_range[16], block_range[kMostBlocks];
  const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, warps = blockDim.x / 32;

  const int stride = parts * blockDim.x * kValues, k_first = (part * blockDim.x + threadIdx.x) * kValues;
  auto load = [&](int k0) { return Input<kValues, T, kGated>(a, token, k0, k0 < a.k); };
  auto hold = [&](Held<F, kValues>& held, const Input<kValues, T, kGated>& input) {
    Chunk<kValues> c = input.unpacked();
    rotate(c, a.hadamard);
    return held.hold(a, c);
  };

  int range = kNone;
  Held<F, kValues> held[kHeld];
  Input<kValues, T, kGated> next = load(k_first);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * stride >= a.k_padded) break;
    const Input<kValues, T, kGated> input = next;
    if (i + 1 < kHeld) next = load(k_first + (i + 1) * stride);
    range = max(range, hold(held[i], input));
  }
  for (int base = kHeld * stride; base < a.k_padded; base += stride) {
    Held<F, kValues> dropped;  // the compiler leaves out what makes more than the range
    range = max(range, hold(dropped, load(k_first + base)));
  }
  range = __reduce_max_sync(0xFFFFFFFFu, range);
  if (lane == 0) warp_range[warp] = range;
  __syncthreads();
  range = __reduce_max_sync(0xFFFFFFFFu, warp_range[lane % warps]);
  if (parts > 1) {
    cluster_wait();  // all blocks have started
    if (threadIdx.x < parts) store_cluster(smem_address(block_range + part), threadIdx.x, range);
    cluster_arrive();
    cluster_wait();
    range = __reduce_max_sync(0xFFFFFFFFu, block_range[lane % parts]);
  }

  float global = 1.0f, token_scale;
  int token_exponent = 0;
  if constexpr (F == Format::kNvfp4) {
    global = token_range(__int_as_float(range));
    token_scale = __fdiv_rn(1.0f, global);
  } else {
    // The largest block lands at E4M3 exponent 6 (7 would overflow); rule mse may raise a block by one.
    token_exponent = range + (a.rule == ScaleRule::kMse ? 1 : 0) - 6;
    token_scale = ldexpf(1.0f, token_exponent);
  }
  if (part == 0 && threadIdx.x == 0) a.token_scale[token] = token_scale;
  auto finish = [&](int k0, Held<F, kValues>& h) {
    if constexpr (F == Format::kNvfp4) {
      finish_chunk<T, F, O>(a, token, k0, h.c, global, k0 < a.k_padded);
    } else {
      // Under 2^-13 all are zero in E4M3, and fp16 has its least power of two that is not subnormal.
      multiply<__half>(h.q, static_cast<uint32_t>(max(h.exponent - token_exponent, -14) + 15) * 0x04000400u);
      if constexpr (O == Output::kTiled8) {
        if (k0 < a.k_padded) store_tiled8(static_cast<uint8_t*>(a.out), a.token_tile, a.k_padded, token, k0, h.q);
      } else {
        if (k0 < a.k) store_rows8(a, token, k0, h.q);
      }
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * stride < a.k_padded) finish(k_first + i * stride, held[i]);
  }
  for (int base = kHeld * stride; base < a.k_padded; base += stride) {
    Held<F, kValues> again;
    hold(again, load(k_first + base));
    finish(k_first + base, again);
  }
}

template <typename T, Format F, Output O, bool kGated, int kValues>
void launch_chunks(const ActivationArgs& a, [[maybe_unused]] bool dynamic, cudaStream_t stream) {
  constexpr bool kE4m3 = O == Output::kTiled8 || O == Output::kRows8;
  constexpr bool kEither = F == Format::kNvfp4 && O != Output::kRotated && O != Output::kRotatedPlain;
  if constexpr (kE4m3 || kEither) {
    if (kE4m3 || dynamic) {
      constexpr int kMost = kMostThreads<F, kValues>;
      int parts = 1, chunks = a.k_padded / kValues;
      // Long rows of few tokens: where threads would have several chunks and multiprocessors nothing.
      for (; parts < kMostBlocks && 2 * parts * a.m <= multiprocessors() && chunks > kMost; parts *= 2)
        chunks = (chunks + 1) / 2;
      const int each = (chunks + kMost - 1) / kMost, threads = (chunks + 32 * each - 1) / (32 * each) * 32;
      const auto kernel = activation_dynamic_kernel<T, F, O, kGated, kValues>;
      // The products before and after leave no room beside them; each alone on a multiprocessor, all take the same time.
      const int smem = a.token_tile == 128 && each > 1 && a.m * parts <= multiprocessors() ? kAloneSmem : 0;
      if (smem > 0)
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem), "shared memory");
      return launch_after(kernel, dim3(a.m * parts), dim3(threads), smem, stream, a, parts);
    }
  }
  if constexpr (!kE4m3) {
    constexpr int kTokens = 32 / kLanesOf128<kValues>;
    const int groups = (a.m + kTokens - 1) / kTokens, parts = (a.k_padded + 511) / 512;
    int each = 1;  // groups of a block
    // As many blocks as find room beside the product before: with more, the last ones would wait until it ends, crowd where
    // it ends first, and keep the next product from beginning there. One of more than 128 tokens leaves no room.
    if (kSeveralGroups<O, kValues> && !a.experts && a.token_tile <= 128) {
      const int most = std::max(2 * multiprocessors() / parts, 1);
      each = (groups + most - 1) / most;
    }
    const dim3 grid((groups + each - 1) / each, parts);
    launch_after(activation_static_kernel<T, F, O, kGated, kValues>, grid, dim3(128), 0, stream, a);
  }
}

template <typename T, Format F, Output O, bool kGated = false>
void launch(const ActivationArgs& a, bool dynamic, cudaStream_t stream) {
  constexpr int64_t kMany = 132 * 1024 * 8;  // values that half fill the GPU, 8 a thread
  if constexpr (O == Output::kRotated || O == Output::kTiled16 || O == Output::kTiled8) {  // a product waits for them
    // Threads with 8 values at a time keep longer rows of nvfp4.
    const bool longer = F == Format::kNvfp4 && dynamic && a.k_padded > kMostKept<F, 16>;
    if (static_cast<int64_t>(a.m) * a.k < kMany || longer) return launch_chunks<T, F, O, kGated, 8>(a, dynamic, stream);
  }
  launch_chunks<T, F, O, kGated, 16>(a, dynamic, stream);
}

// What a product multiplies.
template <typename T, bool kGated>
void launch_operand(const ActivationProblem& p, const ActivationArgs& a, cudaStream_t stream) {
  if (!p.quantize) return launch<T, Format::kNvfp4, Output::kRotated, kGated>(a, false, stream);
  if (p.format == static_cast<int>(Format::kNvfp4)) {
    return launch<T, Format::kNvfp4, Output::kTiled16, kGated>(a, p.global == nullptr, stream);
  }
  if (p.operand != static_cast<int>(Operand::kE4m3)) {
    return launch<T, Format::kMxfp4, Output::kTiled16, kGated>(a, false, stream);
  }
  if (p.rows) return launch<T, Format::kMxfp4, Output::kRows8, kGated>(a, true, stream);
  launch<T, Format::kMxfp4, Output::kTiled8, kGated>(a, true, stream);
}

template <typename T>
void dispatch(const ActivationProblem& p, cudaStream_t stream) {
  const ActivationArgs a{p.x,
                         p.up,
                         p.stride,
                         p.global,
                         p.out,
                         p.scales,
                         p.token_scale,
                         p.m,
                         p.k,
                         p.k_padded,
                         p.token_tile,
                         p.hadamard,
                         static_cast<ScaleRule>(p.rule),
                         p.natural,
                         p.experts};
  const bool nvfp4 = p.format == static_cast<int>(Format::kNvfp4);
  const bool dynamic = nvfp4 && p.global == nullptr;
  if (p.packed) {
    if (nvfp4) return launch<T, Format::kNvfp4, Output::kPacked>(a, dynamic, stream);
    return launch<T, Format::kMxfp4, Output::kPacked>(a, false, stream);
  }
  if (p.plain) {
    if (!p.quantize) return launch<T, Format::kNvfp4, Output::kRotatedPlain>(a, false, stream);
    if (nvfp4) return launch<T, Format::kNvfp4, Output::kPlain>(a, dynamic, stream);
    return launch<T, Format::kMxfp4, Output::kPlain>(a, false, stream);
  }
  if (p.up != nullptr) return launch_operand<T, true>(p, a, stream);
  launch_operand<T, false>(p, a, stream);
}

}  // namespace

void run_activation(const ActivationProblem& p, cudaStream_t stream) {
  if (p.m == 0) return;
  if (p.x_is_bf16) return dispatch<__nv_bfloat16>(p, stream);
  dispatch<__half>(p, stream);
}

}  // namespace fp4
