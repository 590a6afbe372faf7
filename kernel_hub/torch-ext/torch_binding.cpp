// Torch bindings of the CUDA kernels on the stable ABI: one binary for every torch from 2.11 on.
#if defined(CUDA_KERNEL)
#include "torch_binding.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <algorithm>
#include <array>
#include <new>

#include "../fp4_cuda/fp4_kernels.h"
#include "registration.h"

// Declared only where torch's headers were built with CUDA; the symbol is in every CUDA build of torch.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

// Vectors of compilers from GCC 11 on call it, and the libstdc++ of manylinux_2_28 has none.
namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw bad_alloc(); }
}  // namespace std

namespace {

using torch::headeronly::ScalarType;
using torch::stable::accelerator::DeviceGuard;

enum { kNvfp4 = 0, kMxfp4 = 1 };
// kE4m3: tiles or rows, or bf16 for few tokens, as operand_for says. The last two are for measuring and for tests.
enum { kBf16 = 0, kFp16 = 1, kE4m3 = 2, kE4m3Tiles = 3, kE4m3Rows = 4 };
constexpr int64_t kTileBytesNvfp4 = 2304, kTileBytesMxfp4 = 2176;

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// As new_empty, which finds its operator by name and takes several times as long.
Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle tensor;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                  to<int32_t>(from(dtype)), device_type, like.get_device_index(), &tensor));
  return Tensor(tensor);
}

const void* data_or_null(const std::optional<Tensor>& t) { return t.has_value() ? t->data_ptr() : nullptr; }

int64_t tokens_of(const Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

// Sizes of x without the last one.
std::vector<int64_t> leading_sizes(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  return sizes;
}

std::vector<int64_t> with(std::vector<int64_t> sizes, int64_t last) {
  sizes.push_back(last);
  return sizes;
}

int64_t product_of(const std::vector<int64_t>& sizes) {
  int64_t product = 1;
  for (int64_t size : sizes) product *= size;
  return product;
}

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// mxfp4 W4A4: more tokens than kGemvTokens are multiplied in E4M3, expanded inside the product; for fewer, bf16 operands hold
// the values just as exactly. kLibraryTokens are left to the library's FP8 product, which writes bf16 only, after the weight
// was expanded. The same numbers are in _cuda.py.
constexpr int64_t kGemvTokens = 16, kLibraryTokens = 2048;

// A few tokens are multiplied in E4M3 too where there are more output features than this, since bf16 takes more instructions to
// expand: more than run_gemv has at once on an H200's 132 multiprocessors, in three units of 64 or, of more tokens, one of 32.
constexpr int64_t most_bf16_rows(int64_t m) { return 132 * (m <= 8 ? 3 * 64 : 32); }
static_assert(most_bf16_rows(8) == 25344 && most_bf16_rows(9) == 4224);  // as CARD.md says

// What m tokens are made into: kBf16, kFp16, kE4m3Tiles or kE4m3Rows.
int64_t operand_for(int64_t m, int64_t operand, bool out_is_bf16) {
  if (operand != kE4m3) return operand;
  if (m <= kGemvTokens) return kBf16;
  return m >= kLibraryTokens && out_is_bf16 ? kE4m3Rows : kE4m3Tiles;
}

int64_t bytes_of(int64_t operand) { return operand >= kE4m3 ? 1 : 2; }

// The kernels' number for what operand_for says.
int kernel_operand(int64_t operand) { return static_cast<int>(operand >= kE4m3 ? kE4m3 : operand); }

// Tokens of one tile: a function of M alone, so that activation and GEMM agree.
int64_t token_tile(int64_t m) {
  for (int64_t tile = 8; tile < 256; tile *= 2)
    if (m <= tile) return tile;
  return 256;
}

// Tokens [..., K]. `name`: of the tensor, for messages.
void check_tokens(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_cuda(), name, " must be a CUDA tensor");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half, name,
                  " must be bfloat16 or float16");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0, name, " must be 16-byte aligned; call .clone()");
}

// Values from a token to the next one.
int64_t stride_of(const Tensor& x) { return x.is_contiguous() ? x.size(-1) : x.stride(0); }

void check_x(const Tensor& x, int64_t multiple) {
  check_tokens(x, "x");
  STD_TORCH_CHECK(x.size(-1) % multiple == 0, "in_features must be a multiple of ", multiple, ", got ", x.size(-1));
  STD_TORCH_CHECK(tokens_of(x) < (1 << 24), "at most 2^24 tokens, got ", tokens_of(x));
}

// Of an MLP: x is the output of gate, and tokens are SiLU(x) * up. Both may be columns of one tensor [M, ...].
void check_up(const Tensor& x, const Tensor& up) {
  check_tokens(up, "up");
  const bool same = up.numel() == x.numel() && up.size(-1) == x.size(-1) && up.scalar_type() == x.scalar_type() &&
                    up.get_device_index() == x.get_device_index() && stride_of(up) == stride_of(x);
  STD_TORCH_CHECK(same, "up must have the shape, strides, dtype and device of x");
  for (const Tensor* t : {&x, &up}) {
    STD_TORCH_CHECK(t->is_contiguous() || (t->dim() == 2 && t->stride(1) == 1 && t->stride(0) % 8 == 0),
                    "x and up must be contiguous, or [M, K] with tokens a multiple of 8 values apart; call .contiguous()");
  }
}

void check_hadamard(int64_t size, int64_t k) {
  STD_TORCH_CHECK(size == 0 || size == 16 || size == 32 || size == 64 || size == 128,
                  "hadamard must be 0, 16, 32, 64 or 128, got ", size);
  STD_TORCH_CHECK(size == 0 || k % size == 0, "hadamard ", size, " does not divide in_features ", k);
}

// Of one matrix [tiles of rows, tiles of k, bytes], or of those of experts [E, ...].
int64_t format_of(const Tensor& packed) {
  STD_TORCH_CHECK(packed.is_cuda() && packed.is_contiguous() && (packed.dim() == 3 || packed.dim() == 4) &&
                      (packed.size(-1) == kTileBytesNvfp4 || packed.size(-1) == kTileBytesMxfp4),
                  "packed must come from prepare_weight");
  return packed.size(-1) == kTileBytesNvfp4 ? kNvfp4 : kMxfp4;
}

int64_t experts_of(const Tensor& packed) { return packed.dim() == 4 ? packed.size(0) : 1; }

fp4::ActivationProblem activation_problem(const Tensor& x, const std::optional<Tensor>& up, const std::optional<Tensor>& global,
                                          int64_t format, int64_t hadamard, int64_t rule) {
  const int64_t k = x.size(-1);
  check_x(x, format == kNvfp4 ? 16 : 32);
  if (up.has_value()) check_up(x, *up);
  else STD_TORCH_CHECK(x.is_contiguous(), "x must be contiguous; call .contiguous()");
  check_hadamard(hadamard, k);
  fp4::ActivationProblem p = {};
  p.x = x.data_ptr();
  p.up = data_or_null(up);
  p.stride = stride_of(x);
  p.x_is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  p.global = static_cast<const float*>(data_or_null(global));
  p.m = static_cast<int>(tokens_of(x));
  p.k = static_cast<int>(k);
  p.k_padded = static_cast<int>(div_up(k, 64) * 64);
  p.token_tile = 8;
  p.hadamard = static_cast<int>(hadamard);
  p.rule = static_cast<int>(rule);
  p.format = static_cast<int>(format);
  return p;
}

fp4::PrepareProblem prepare_problem(const Tensor& packed, const Tensor& row_scale, int64_t n, int64_t k, int64_t format) {
  fp4::PrepareProblem p = {};
  p.packed = static_cast<uint8_t*>(packed.data_ptr());
  p.row_scale = static_cast<float*>(row_scale.data_ptr());
  p.n = static_cast<int>(n);
  p.k = static_cast<int>(k);
  p.format = static_cast<int>(format);
  p.experts = static_cast<int>(experts_of(packed));
  return p;
}

void check_operand(const fp4::ActivationProblem& p, int64_t operand, bool quantize) {
  STD_TORCH_CHECK(operand < kE4m3 || (quantize && p.format == kMxfp4), "E4M3 operands are for mxfp4 W4A4 only");
  STD_TORCH_CHECK(quantize ? operand != kFp16 : (operand == kBf16) == p.x_is_bf16,
                  "operand must be bf16 or E4M3 for W4A4, and the dtype of x for W4A16");
}

ScalarType output_type(bool out_is_bf16) { return out_is_bf16 ? ScalarType::BFloat16 : ScalarType::Half; }

// Without the output.
fp4::GemmPart gemm_part(const Tensor& packed, const Tensor& row_scale, const std::optional<Tensor>& bias, bool out_is_bf16) {
  const int64_t n = row_scale.size(-1), experts = experts_of(packed);
  STD_TORCH_CHECK(div_up(n, 64) == packed.size(-3) && n % 16 == 0 && row_scale.numel() == experts * n,
                  "row_scale does not belong to this prepared weight");
  STD_TORCH_CHECK(!bias.has_value() || (bias->numel() == experts * n && bias->scalar_type() == output_type(out_is_bf16) &&
                                        bias->is_contiguous()),
                  "bias must be contiguous [N], of experts [E, N], of the output dtype");
  return {static_cast<const uint8_t*>(packed.data_ptr()), static_cast<const float*>(row_scale.data_ptr()), data_or_null(bias),
          nullptr, static_cast<int>(n)};
}

// The weights of linears with the same input.
struct Linears {
  const std::vector<Tensor>&packed, &row_scale;
  const std::vector<std::optional<Tensor>>& bias;

  int64_t rows() const {
    int64_t n = 0;
    for (const Tensor& scale : row_scale) n += scale.numel();
    return n;
  }
  void check() const {
    for (const Tensor& p : packed) {
      STD_TORCH_CHECK(p.dim() == 3, "weights of experts are for grouped_linear");
      STD_TORCH_CHECK(format_of(p) == format_of(packed[0]) && p.size(-2) == packed[0].size(-2) &&
                          p.get_device_index() == packed[0].get_device_index(),
                      "linears with the same input must have weights of one format, in_features and device");
    }
  }
};

// Their problem, all but the tokens; `out` gets their outputs, [..., N] for tokens [...].
fp4::GemmProblem gemm_problem(const Linears& linears, const Tensor& like, const std::vector<int64_t>& tokens, int64_t operand,
                              bool out_is_bf16, std::vector<Tensor>& out) {
  linears.check();
  const std::vector<Tensor>& packed = linears.packed;
  fp4::GemmProblem p = {};
  p.parts = static_cast<int>(packed.size());
  p.out_is_bf16 = out_is_bf16;
  p.m = static_cast<int>(product_of(tokens));
  p.k_tiles = static_cast<int>(packed[0].size(-2));
  p.token_tile = static_cast<int>(token_tile(p.m));
  p.format = static_cast<int>(format_of(packed[0]));
  p.operand = kernel_operand(operand);
  for (size_t i = 0; i < packed.size(); ++i) {
    fp4::GemmPart part = gemm_part(packed[i], linears.row_scale[i], linears.bias[i], out_is_bf16);
    out.push_back(new_tensor(like, with(tokens, part.n), output_type(out_is_bf16)));
    part.out = out.back().data_ptr();
    if (i == 0) static_cast<fp4::GemmPart&>(p) = part;
    else p.others[i - 1] = part;
  }
  return p;
}

void run_gemm(const fp4::GemmProblem& p, const Tensor& like) {
  std::vector<Tensor> workspace;
  auto allocate = [&](int64_t bytes) { return workspace.emplace_back(new_tensor(like, {bytes}, ScalarType::Byte)).data_ptr(); };
  if (p.m <= kGemvTokens && p.operand != kE4m3) return fp4::run_gemv(p, allocate, current_stream(like));
  fp4::run_gemm_sm90(p, allocate, current_stream(like));
}

}  // namespace

std::tuple<Tensor, Tensor> prepare_weight(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& global) {
  STD_TORCH_CHECK(weight.is_cuda() && weight.is_contiguous() && weight.scalar_type() == ScalarType::Byte &&
                      (weight.dim() == 2 || weight.dim() == 3),
                  "weight must be a contiguous CUDA uint8 tensor [N, K/2] or, of experts, [E, N, K/2]");
  const int64_t n = weight.size(-2), k = weight.size(-1) * 2, experts = weight.dim() == 3 ? weight.size(0) : 1;
  const int64_t format = scale.scalar_type() == ScalarType::Float8_e4m3fn ? kNvfp4 : kMxfp4;
  STD_TORCH_CHECK(format == kNvfp4 || scale.scalar_type() == ScalarType::Byte,
                  "weight_scale must be float8_e4m3fn (nvfp4) or uint8 (mxfp4)");
  const int64_t group = format == kNvfp4 ? 16 : 32;
  STD_TORCH_CHECK(n % 16 == 0 && k % group == 0, "N must be a multiple of 16 and K of ", group, ", got ", n, " x ", k);
  STD_TORCH_CHECK(scale.is_contiguous() && scale.dim() == weight.dim() && scale.size(-2) == n && scale.size(-1) == k / group &&
                      scale.numel() == experts * n * (k / group),
                  "weight_scale must be a contiguous [N, K/", group, "] or, of experts, [E, N, K/", group, "]");
  STD_TORCH_CHECK(!global.has_value() || (global->numel() == experts && global->is_contiguous()),
                  "weight_global_scale must be contiguous, with one value for each expert");
  STD_TORCH_CHECK(experts > 0 && experts < 65536, "1 to 65535 experts, got ", experts);
  const DeviceGuard guard(weight.get_device_index());
  const int64_t tile = format == kNvfp4 ? kTileBytesNvfp4 : kTileBytesMxfp4;
  const bool stacked = weight.dim() == 3;
  Tensor packed = stacked ? new_tensor(weight, {experts, div_up(n, 64), div_up(k, 64), tile}, ScalarType::Byte)
                          : new_tensor(weight, {div_up(n, 64), div_up(k, 64), tile}, ScalarType::Byte);
  Tensor row_scale = stacked ? new_tensor(weight, {experts, n}, ScalarType::Float) : new_tensor(weight, {n}, ScalarType::Float);
  fp4::PrepareProblem p = prepare_problem(packed, row_scale, n, k, format);
  p.weight = static_cast<const uint8_t*>(weight.data_ptr());
  p.scale = static_cast<const uint8_t*>(scale.data_ptr());
  p.global = static_cast<const float*>(data_or_null(global));
  fp4::run_prepare(p, current_stream(weight));
  return {packed, row_scale};
}

std::tuple<Tensor, Tensor> restore_weight(const Tensor& packed, const Tensor& row_scale, int64_t n, int64_t k) {
  const int64_t format = format_of(packed);
  const int64_t experts = experts_of(packed), scales = k / (format == kNvfp4 ? 16 : 32);
  STD_TORCH_CHECK(div_up(n, 64) == packed.size(-3) && div_up(k, 64) == packed.size(-2) && row_scale.numel() == experts * n,
                  "restore_weight: ", n, " x ", k, " is not the shape of this prepared weight");
  const DeviceGuard guard(packed.get_device_index());
  const bool stacked = packed.dim() == 4;
  const ScalarType scale_type = format == kNvfp4 ? ScalarType::Float8_e4m3fn : ScalarType::Byte;
  Tensor weight =
      stacked ? new_tensor(packed, {experts, n, k / 2}, ScalarType::Byte) : new_tensor(packed, {n, k / 2}, ScalarType::Byte);
  Tensor scale = stacked ? new_tensor(packed, {experts, n, scales}, scale_type) : new_tensor(packed, {n, scales}, scale_type);
  fp4::run_restore(prepare_problem(packed, row_scale, n, k, format), static_cast<uint8_t*>(weight.data_ptr()),
                   static_cast<uint8_t*>(scale.data_ptr()), current_stream(packed));
  return {weight, scale};
}

std::tuple<Tensor, Tensor, Tensor> rotate_quantize(const Tensor& x, const std::optional<Tensor>& global, int64_t format,
                                                   int64_t hadamard, int64_t rule) {
  fp4::ActivationProblem p = activation_problem(x, std::nullopt, global, format, hadamard, rule);
  const DeviceGuard guard(x.get_device_index());
  const bool nvfp4 = format == kNvfp4;
  Tensor codes = new_tensor(x, {p.m, p.k / 2}, ScalarType::Byte);
  Tensor scales =
      nvfp4 ? new_tensor(x, {p.m, p.k / 16}, ScalarType::Float8_e4m3fn) : new_tensor(x, {p.m, p.k / 32}, ScalarType::Byte);
  Tensor token_scale = new_tensor(x, {nvfp4 && !global.has_value() ? p.m : 1}, ScalarType::Float);
  p.out = codes.data_ptr();
  p.scales = static_cast<uint8_t*>(scales.data_ptr());
  p.token_scale = static_cast<float*>(token_scale.data_ptr());
  p.quantize = true;
  p.packed = true;
  fp4::run_activation(p, current_stream(x));
  return {codes, scales, token_scale};
}

std::tuple<Tensor, Tensor> fake_quantize(const Tensor& x, const std::optional<Tensor>& global, int64_t format, bool quantize,
                                         int64_t hadamard, int64_t rule) {
  fp4::ActivationProblem p = activation_problem(x, std::nullopt, global, format, hadamard, rule);
  const DeviceGuard guard(x.get_device_index());
  const bool per_token = quantize && format == kNvfp4 && !global.has_value();
  Tensor values = new_tensor(x, {p.m, p.k}, quantize ? ScalarType::BFloat16 : x.scalar_type());
  Tensor token_scale = new_tensor(x, {per_token ? p.m : quantize ? 1 : 0}, ScalarType::Float);
  p.out = values.data_ptr();
  p.token_scale = quantize ? static_cast<float*>(token_scale.data_ptr()) : nullptr;
  p.quantize = quantize;
  p.plain = true;
  fp4::run_activation(p, current_stream(x));
  return {values, token_scale};
}

std::tuple<Tensor, Tensor> prepare_activation(const Tensor& x, const std::optional<Tensor>& up,
                                              const std::optional<Tensor>& global, int64_t format, int64_t operand,
                                              bool quantize, int64_t hadamard, int64_t rule) {
  fp4::ActivationProblem p = activation_problem(x, up, global, format, hadamard, rule);
  check_operand(p, operand, quantize);
  const DeviceGuard guard(x.get_device_index());
  operand = operand_for(p.m, operand, p.x_is_bf16);
  const bool library = operand == kE4m3Rows;
  p.token_tile = static_cast<int>(token_tile(p.m));
  p.natural = p.token_tile == 8 && operand < kE4m3;
  p.quantize = quantize;
  p.operand = kernel_operand(operand);
  p.rows = library;
  const int64_t bytes =
      library ? static_cast<int64_t>(p.m) * p.k : div_up(p.m, p.token_tile) * p.token_tile * p.k_padded * bytes_of(operand);
  const bool per_token = quantize && (operand >= kE4m3 || (format == kNvfp4 && !global.has_value()));
  Tensor tokens = new_tensor(x, {bytes}, library ? ScalarType::Float8_e4m3fn : ScalarType::Byte);
  Tensor token_scale = new_tensor(x, {per_token ? p.m : quantize ? 1 : 0}, ScalarType::Float);
  p.out = tokens.data_ptr();
  p.token_scale = quantize ? static_cast<float*>(token_scale.data_ptr()) : nullptr;
  fp4::run_activation(p, current_stream(x));
  return {tokens, token_scale};
}

// One product for all of them, [..., sum of N]: several take longer. tokens: row-major E4M3 [M, K]. Accumulation in FP32: with
// use_fast_accum, sums of one sign lose their small addends.
static Tensor library_gemm(const Tensor& tokens, const Tensor& token_scale, const Linears& linears,
                           const std::vector<int64_t>& sizes) {
  linears.check();
  const int64_t m = product_of(sizes), n = linears.rows(), k = tokens.numel() / m;
  cudaStream_t stream = current_stream(tokens);
  Tensor weight = new_tensor(tokens, {n, k}, ScalarType::Float8_e4m3fn), scale = new_tensor(tokens, {n}, ScalarType::Float);
  std::optional<Tensor> bias;
  for (const std::optional<Tensor>& b : linears.bias) {
    if (b.has_value()) bias = new_tensor(tokens, {n}, ScalarType::BFloat16);
  }
  int64_t row = 0;
  for (size_t i = 0; i < linears.packed.size(); ++i) {
    const Tensor& packed = linears.packed[i];
    const fp4::GemmPart part = gemm_part(packed, linears.row_scale[i], linears.bias[i], true);
    fp4::run_expand_e4m3(prepare_problem(packed, linears.row_scale[i], part.n, k, kMxfp4),
                         static_cast<uint8_t*>(weight.data_ptr()) + row * k, static_cast<float*>(scale.data_ptr()) + row,
                         stream);
    if (bias.has_value()) {
      uint16_t* to = static_cast<uint16_t*>(bias->data_ptr()) + row;
      const size_t bytes = part.n * sizeof(*to);
      const cudaError_t error = part.bias != nullptr ? cudaMemcpyAsync(to, part.bias, bytes, cudaMemcpyDeviceToDevice, stream)
                                                     : cudaMemsetAsync(to, 0, bytes, stream);
      STD_TORCH_CHECK(error == cudaSuccess, "bias: ", cudaGetErrorString(error));
    }
    row += part.n;
  }
  using torch::stable::detail::from;
  Tensor rows = torch::stable::view(tokens, {m, k}), token_column = torch::stable::view(token_scale, {m, 1});
  Tensor columns = torch::stable::transpose(weight, 0, 1), row_line = torch::stable::view(scale, {1, n});
  std::array<StableIValue, 8> stack{from(rows),
                                    from(columns),
                                    from(token_column),
                                    from(row_line),
                                    from(bias),
                                    from(std::optional<Tensor>()),
                                    from(std::optional<ScalarType>(ScalarType::BFloat16)),
                                    from(false)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_scaled_mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::view(torch::stable::detail::to<Tensor>(stack[0]), with(sizes, n));
}

// A tensor for each of them, or of the library's product one for all. sizes: of the tokens.
static std::vector<Tensor> gemms(const Tensor& tokens, const Tensor& token_scale, const Linears& linears,
                                 const std::vector<int64_t>& sizes, int64_t operand, bool out_is_bf16, int64_t split) {
  const int64_t m = product_of(sizes), format = format_of(linears.packed[0]), k_tiles = linears.packed[0].size(-2);
  operand = operand_for(m, operand, out_is_bf16);
  const bool library = operand == kE4m3Rows;
  const int64_t tile = token_tile(m);
  STD_TORCH_CHECK(library ? div_up(tokens.numel() / m, 64) == k_tiles
                          : tokens.numel() == div_up(m, tile) * tile * k_tiles * 64 * bytes_of(operand),
                  "tokens were prepared for another shape or operand type");
  STD_TORCH_CHECK(operand < kE4m3 || format == kMxfp4, "E4M3 operands are for mxfp4 weights");
  STD_TORCH_CHECK(!library || out_is_bf16, "the library's product writes bf16 only");
  const DeviceGuard guard(tokens.get_device_index());
  if (library) return {library_gemm(tokens, token_scale, linears, sizes)};
  std::vector<Tensor> out;
  fp4::GemmProblem p = gemm_problem(linears, tokens, sizes, operand, out_is_bf16, out);
  p.x = tokens.data_ptr();
  p.token_scale = token_scale.numel() > 0 ? static_cast<const float*>(token_scale.data_ptr()) : nullptr;
  p.token_scale_stride = token_scale.numel() > 1 ? 1 : 0;
  p.split = static_cast<int>(split);
  run_gemm(p, tokens);
  return out;
}

Tensor prepared_gemm(const Tensor& tokens, const Tensor& token_scale, const Tensor& packed, const Tensor& row_scale,
                     const std::optional<Tensor>& bias, int64_t m, int64_t operand, bool out_is_bf16, int64_t split) {
  return gemms(tokens, token_scale, {{packed}, {row_scale}, {bias}}, {m}, operand, out_is_bf16, split)[0];
}

// One launch for all of them. Returns what gemms does.
std::vector<Tensor> prepared_linears(const Tensor& x, const std::optional<Tensor>& up, const std::vector<Tensor>& packed,
                                     const std::vector<Tensor>& row_scale, const std::vector<std::optional<Tensor>>& bias,
                                     const std::optional<Tensor>& global, int64_t operand, bool quantize, int64_t hadamard,
                                     int64_t rule) {
  STD_TORCH_CHECK(
      !packed.empty() && packed.size() <= fp4::kMostParts && packed.size() == row_scale.size() && packed.size() == bias.size(),
      "1 to ", fp4::kMostParts, " linears with as many row scales and biases, got ", packed.size(), ", ", row_scale.size(),
      " and ", bias.size());
  const Linears linears{packed, row_scale, bias};
  const bool out_is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  const int64_t m = tokens_of(x);
  STD_TORCH_CHECK(div_up(x.size(-1), 64) == packed[0].size(-2), "x has ", x.size(-1), " features, the weight does not");
  if (operand == kE4m3 && m <= kGemvTokens && linears.rows() > most_bf16_rows(m)) operand = kE4m3Tiles;
  auto [tokens, token_scale] = prepare_activation(x, up, global, format_of(packed[0]), operand, quantize, hadamard, rule);
  return gemms(tokens, token_scale, linears, leading_sizes(x), operand, out_is_bf16, 0);
}

// Rows of a tile, by rows per expert on average.
static int64_t expert_tile(int64_t rows, int64_t experts) {
  if (rows <= 4 * experts) return 8;
  if (rows <= 12 * experts) return 16;
  return rows <= 24 * experts ? 32 : 96;
}

static bool is_integer(const Tensor& t) {
  return t.is_cuda() && t.is_contiguous() && t.dim() == 1 &&
         (t.scalar_type() == ScalarType::Long || t.scalar_type() == ScalarType::Int);
}

static fp4::Routing routing_of(const Tensor& offsets, const std::optional<Tensor>& index, int64_t experts) {
  STD_TORCH_CHECK(is_integer(offsets) && offsets.numel() == experts + 1, "offsets must be contiguous CUDA int64 or int32 [",
                  experts + 1, "]");
  STD_TORCH_CHECK(!index.has_value() || is_integer(*index), "index must be contiguous CUDA int64 or int32 [S]");
  fp4::Routing r = {};
  r.offsets = offsets.data_ptr();
  r.index = data_or_null(index);
  r.offsets_are_64 = offsets.scalar_type() == ScalarType::Long;
  r.index_is_64 = index.has_value() && index->scalar_type() == ScalarType::Long;
  r.experts = static_cast<int>(experts);
  return r;
}

// tile: rows of a tile; 0, or for measuring and tests 8, 16, 32 or 96.
Tensor grouped_linear(const Tensor& x, const std::optional<Tensor>& up, const Tensor& offsets,
                      const std::optional<Tensor>& index, const Tensor& packed, const Tensor& row_scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& global, int64_t operand, bool quantize,
                      int64_t hadamard, int64_t rule, int64_t tile) {
  const bool out_is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  const int64_t format = format_of(packed), experts = experts_of(packed);
  // Every token by itself: rotated and quantized once, however many experts it goes to.
  fp4::ActivationProblem a = activation_problem(x, up, global, format, hadamard, rule);
  a.quantize = quantize;
  a.token_tile = 1;
  a.experts = true;
  check_operand(a, operand, quantize);
  STD_TORCH_CHECK(packed.dim() == 4 && operand < kE4m3, "grouped_linear takes weights of experts, and 16-bit operands");
  STD_TORCH_CHECK(a.k_padded == packed.size(-2) * 64, "x has ", a.k, " features, the weights do not");
  const int64_t rows = index.has_value() ? index->numel() : a.m;
  const DeviceGuard guard(x.get_device_index());
  const cudaStream_t stream = current_stream(x);
  const fp4::GemmPart part = gemm_part(packed, row_scale, bias, out_is_bf16);
  Tensor out = new_tensor(x, {rows, part.n}, x.scalar_type());
  if (rows == 0) return out;
  const bool per_token = quantize && format == kNvfp4 && !global.has_value();
  Tensor tokens = new_tensor(x, {static_cast<int64_t>(a.m) * a.k_padded * 2}, ScalarType::Byte);
  Tensor token_scale = new_tensor(x, {per_token ? a.m : quantize ? 1 : 0}, ScalarType::Float);
  a.out = tokens.data_ptr();
  a.token_scale = quantize ? static_cast<float*>(token_scale.data_ptr()) : nullptr;
  fp4::run_activation(a, stream);
  fp4::ExpertsProblem p = {};
  p.weight = part.weight;
  p.row_scale = part.row_scale;
  p.x = a.out;
  p.token_scale = a.token_scale;
  p.token_scale_stride = per_token ? 1 : 0;
  p.bias = part.bias;
  p.out = out.data_ptr();
  p.out_is_bf16 = out_is_bf16;
  p.rows = static_cast<int>(rows);
  p.n = part.n;
  p.k_tiles = static_cast<int>(packed.size(-2));
  p.tile = static_cast<int>(tile > 0 ? tile : expert_tile(rows, experts));
  p.format = static_cast<int>(format);
  p.operand = kernel_operand(operand);
  p.routing = routing_of(offsets, index, experts);
  fp4::run_experts(p, stream);
  return out;
}

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("prepare_weight(Tensor weight, Tensor scale, Tensor? global_scale) -> (Tensor, Tensor)");
  ops.def("restore_weight(Tensor packed, Tensor row_scale, int n, int k) -> (Tensor, Tensor)");
  ops.def("rotate_quantize(Tensor x, Tensor? global_scale, int format, int hadamard, int rule) -> (Tensor, Tensor, Tensor)");
  ops.def(
      "fake_quantize(Tensor x, Tensor? global_scale, int format, bool quantize, int hadamard, int rule)"
      " -> (Tensor, Tensor)");
  ops.def(
      "prepare_activation(Tensor x, Tensor? up, Tensor? global_scale, int format, int operand, bool quantize, int hadamard,"
      " int rule) -> (Tensor, Tensor)");
  ops.def(
      "prepared_gemm(Tensor tokens, Tensor token_scale, Tensor packed, Tensor row_scale, Tensor? bias, int m, int operand,"
      " bool out_is_bf16, int split) -> Tensor");
  ops.def(
      "prepared_linears(Tensor x, Tensor? up, Tensor[] packed, Tensor[] row_scale, Tensor?[] bias, Tensor? global_scale,"
      " int operand, bool quantize, int hadamard, int rule) -> Tensor[]");
  ops.def(
      "grouped_linear(Tensor x, Tensor? up, Tensor offsets, Tensor? index, Tensor packed, Tensor row_scale, Tensor? bias,"
      " Tensor? global_scale, int operand, bool quantize, int hadamard, int rule, int tile) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CUDA, ops) {
  ops.impl("prepare_weight", TORCH_BOX(&prepare_weight));
  ops.impl("restore_weight", TORCH_BOX(&restore_weight));
  ops.impl("rotate_quantize", TORCH_BOX(&rotate_quantize));
  ops.impl("fake_quantize", TORCH_BOX(&fake_quantize));
  ops.impl("prepare_activation", TORCH_BOX(&prepare_activation));
  ops.impl("prepared_gemm", TORCH_BOX(&prepared_gemm));
  ops.impl("prepared_linears", TORCH_BOX(&prepared_linears));
  ops.impl("grouped_linear", TORCH_BOX(&grouped_linear));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
#endif
