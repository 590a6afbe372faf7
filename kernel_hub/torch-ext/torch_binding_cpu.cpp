// Torch bindings of the CPU kernels on the stable ABI: one binary for every torch from 2.11 on.
#if defined(CPU_KERNEL)
#include "torch_binding_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../fp4_cpu/kernels.h"
#include "registration.h"

namespace {

using torch::headeronly::ScalarType;
using namespace fp4_cpu;

// What a thread should at least have to do, in products.
constexpr int64_t kWorthAThread = 1 << 17;

const Kernels& kernels() {
  const char* possible = nullptr;
  const Kernels* found = find_kernels(&possible);
  STD_TORCH_CHECK(found != nullptr, "HF_FP4_CPU_ISA must name an instruction set of this processor, which has ", possible);
  return *found;
}

template <class Work>
void spread(int64_t count, int64_t products_of_one, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, products_of_one));
  torch::stable::parallel_for(0, count, grain, work);
}

Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

const float* data_or_null(const std::optional<Tensor>& t) { return t.has_value() ? data<const float>(*t) : nullptr; }

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t tokens_of(const Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

bool is_matrix(const Tensor& t, ScalarType dtype) { return t.is_cpu() && t.dim() == 2 && t.scalar_type() == dtype; }

void check_global(const std::optional<Tensor>& global, bool needed) {
  STD_TORCH_CHECK(!needed || global.has_value(), "nvfp4 needs a global scale");
  STD_TORCH_CHECK(
      !global.has_value() || (global->is_cpu() && global->numel() == 1 && global->scalar_type() == ScalarType::Float),
      "the global scale must be a float32 CPU tensor [1]");
}

Format format_of(const Tensor& packed) {
  const bool tiles = packed.is_cpu() && packed.dim() == 3 && packed.is_contiguous() && packed.scalar_type() == ScalarType::Byte;
  STD_TORCH_CHECK(tiles && (packed.size(2) == tile_bytes(kNvfp4) || packed.size(2) == tile_bytes(kMxfp4)),
                  "packed must come from prepare_weight on a CPU");
  return packed.size(2) == tile_bytes(kNvfp4) ? kNvfp4 : kMxfp4;
}

Format format_of_group(int64_t group) { return group == group_of(kNvfp4) ? kNvfp4 : kMxfp4; }

// Where the codes of row n, k to k + 7 are in a prepared weight, and where the scale of a group is.
int64_t word_at(Format format, int64_t k_tiles, int64_t n, int64_t k) {
  return (n / kRows * k_tiles + k / kTile) * tile_bytes(format) + k % kTile * 8 + n % kRows * 4;
}

int64_t scale_at(Format format, int64_t k_tiles, int64_t n, int64_t k) {
  return (n / kRows * k_tiles + k / kTile) * tile_bytes(format) + kCodeBytes + k % kTile / group_of(format) * kRows + n % kRows;
}

// Eight codes in their stored order, k = 0 in the lowest nibble, with the even ones first, and back.
uint32_t even_first(uint32_t word) {
  uint32_t sorted = 0;
  for (int i = 0; i < 8; ++i) sorted |= (word >> (4 * i) & 15) << (i % 2 * 16 + i / 2 * 4);
  return sorted;
}

uint32_t in_order(uint32_t word) {
  uint32_t stored = 0;
  for (int i = 0; i < 8; ++i) stored |= (word >> (i % 2 * 16 + i / 2 * 4) & 15) << (4 * i);
  return stored;
}

Activation activation_problem(const Tensor& x, const std::optional<Tensor>& global, int64_t format, int64_t hadamard,
                              int64_t rule, bool quantize) {
  const int64_t k = x.size(-1);
  STD_TORCH_CHECK(
      x.is_cpu() && x.is_contiguous() && (x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Float),
      "x must be a contiguous CPU tensor in bfloat16 or float32");
  STD_TORCH_CHECK(format == kNvfp4 || format == kMxfp4, "unknown format ", format);
  STD_TORCH_CHECK(k % group_of(static_cast<Format>(format)) == 0, "in_features must be a multiple of the group, got ", k);
  STD_TORCH_CHECK(hadamard == 0 || hadamard == 16 || hadamard == 32 || hadamard == 64 || hadamard == 128,
                  "hadamard must be 0, 16, 32, 64 or 128, got ", hadamard);
  STD_TORCH_CHECK(hadamard == 0 || k % hadamard == 0, "hadamard ", hadamard, " does not divide in_features ", k);
  check_global(global, false);
  Activation a = {};
  a.x = x.data_ptr();
  a.x_is_bf16 = x.scalar_type() == ScalarType::BFloat16;
  a.k = k;
  a.k_padded = div_up(k, kTile) * kTile;
  a.format = static_cast<Format>(format);
  a.global = a.format == kNvfp4 ? data_or_null(global) : nullptr;
  a.hadamard = hadamard;
  a.rule = static_cast<Rule>(rule);
  a.quantize = quantize;
  a.per_token = quantize && a.format == kNvfp4 && a.global == nullptr;
  return a;
}

void run_activation(const Activation& a, int64_t tokens) {
  const Kernels& isa = kernels();
  spread(tokens, 8 * a.k, [&](int64_t begin, int64_t end) {
    std::vector<float> row(a.k_padded);
    isa.activation(a, row.data(), begin, end);
  });
}

Tensor new_token_scale(const Tensor& x, const Activation& a, int64_t tokens) {
  Tensor scale = new_tensor(x, {a.per_token ? tokens : a.quantize ? 1 : 0}, ScalarType::Float);
  // Without tokens nobody writes it.
  if (a.quantize && !a.per_token) *data<float>(scale) = 1.0f / (a.global == nullptr ? 1.0f : *a.global);
  return scale;
}

}  // namespace

std::string cpu_isa() { return kernels().name; }

std::tuple<Tensor, Tensor> cpu_prepare_weight(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& global) {
  STD_TORCH_CHECK(is_matrix(weight, ScalarType::Byte) && weight.is_contiguous(), "weight must be contiguous uint8 [N, K/2]");
  const int64_t n = weight.size(0), k = weight.size(1) * 2;
  const Format format = scale.scalar_type() == ScalarType::Float8_e4m3fn ? kNvfp4 : kMxfp4;
  const int64_t group = group_of(format), k_tiles = div_up(k, kTile);
  STD_TORCH_CHECK(n % kRows == 0 && k % group == 0, "N must be a multiple of 16 and K of ", group, ", got ", n, " x ", k);
  STD_TORCH_CHECK(is_matrix(scale, format == kNvfp4 ? ScalarType::Float8_e4m3fn : ScalarType::Byte) && scale.is_contiguous() &&
                      scale.size(0) == n && scale.size(1) == k / group,
                  "weight_scale must be a contiguous [N, K/", group, "], float8_e4m3fn (nvfp4) or uint8 (mxfp4)");
  check_global(global, format == kNvfp4);
  Tensor packed = new_tensor(weight, {n / kRows, k_tiles, tile_bytes(format)}, ScalarType::Byte);
  Tensor row_scale = new_tensor(weight, {n}, ScalarType::Float);
  const uint8_t *codes = data<uint8_t>(weight), *scales = data<uint8_t>(scale);
  uint8_t* out = data<uint8_t>(packed);
  float* rows = data<float>(row_scale);
  spread(n / kRows, kRows * k, [&](int64_t begin, int64_t end) {
    const int64_t block = k_tiles * tile_bytes(format);
    std::memset(out + begin * block, 0, (end - begin) * block);
    for (int64_t row = begin * kRows; row < end * kRows; ++row) {
      for (int64_t i = 0; i < k; i += 8) {
        uint32_t word;
        std::memcpy(&word, codes + (row * k + i) / 2, 4);
        word = even_first(word);
        std::memcpy(out + word_at(format, k_tiles, row, i), &word, 4);
      }
      int top = 0;
      for (int64_t i = 0; i < k; i += group) {
        const uint8_t byte = scales[(row * k + i) / group];
        out[scale_at(format, k_tiles, row, i)] = byte;
        top = std::max<int>(top, byte);
      }
      rows[row] = format == kNvfp4 ? 1.0f / *data_or_null(global) : std::ldexp(1.0f, top - 127);
    }
  });
  return {packed, row_scale};
}

std::tuple<Tensor, Tensor> cpu_restore_weight(const Tensor& packed, int64_t n, int64_t k) {
  const Format format = format_of(packed);
  const int64_t group = group_of(format), k_tiles = packed.size(1);
  STD_TORCH_CHECK(n == packed.size(0) * kRows && k % group == 0 && div_up(k, kTile) == k_tiles, "restore_weight: ", n, " x ", k,
                  " is not the shape of this prepared weight");
  Tensor weight = new_tensor(packed, {n, k / 2}, ScalarType::Byte);
  Tensor scale = new_tensor(packed, {n, k / group}, format == kNvfp4 ? ScalarType::Float8_e4m3fn : ScalarType::Byte);
  const uint8_t* from = data<uint8_t>(packed);
  uint8_t *codes = data<uint8_t>(weight), *scales = data<uint8_t>(scale);
  spread(n, k, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = 0; i < k; i += 8) {
        uint32_t word;
        std::memcpy(&word, from + word_at(format, k_tiles, row, i), 4);
        word = in_order(word);
        std::memcpy(codes + (row * k + i) / 2, &word, 4);
      }
      for (int64_t i = 0; i < k; i += group) scales[(row * k + i) / group] = from[scale_at(format, k_tiles, row, i)];
    }
  });
  return {weight, scale};
}

std::tuple<Tensor, Tensor, Tensor> cpu_rotate_quantize(const Tensor& x, const std::optional<Tensor>& global, int64_t format,
                                                       int64_t hadamard, int64_t rule) {
  Activation a = activation_problem(x, global, format, hadamard, rule, true);
  const int64_t tokens = tokens_of(x), group = group_of(a.format);
  Tensor codes = new_tensor(x, {tokens, a.k / 2}, ScalarType::Byte);
  Tensor scales = new_tensor(x, {tokens, a.k / group}, a.format == kNvfp4 ? ScalarType::Float8_e4m3fn : ScalarType::Byte);
  Tensor token_scale = new_token_scale(x, a, tokens);
  a.codes = data<uint8_t>(codes);
  a.scales = data<uint8_t>(scales);
  a.token_scale = data<float>(token_scale);
  run_activation(a, tokens);
  return {codes, scales, token_scale};
}

// Tokens as a product takes them, in bf16 or float.
std::tuple<Tensor, Tensor> prepare_tokens(const Tensor& x, const std::optional<Tensor>& global, int64_t format, bool quantize,
                                          int64_t hadamard, int64_t rule, bool as_bf16) {
  Activation a = activation_problem(x, global, format, hadamard, rule, quantize);
  const int64_t tokens = tokens_of(x);
  Tensor token_scale = new_token_scale(x, a, tokens);
  a.values_are_bf16 = as_bf16;
  Tensor values = new_tensor(x, {tokens, a.k_padded}, as_bf16 ? ScalarType::BFloat16 : ScalarType::Float);
  a.values = values.data_ptr();
  a.token_scale = quantize ? data<float>(token_scale) : nullptr;
  run_activation(a, tokens);
  return {values, token_scale};
}

// Quantized tokens are exact in bf16.
bool fit_bf16(const Tensor& x, bool quantize) { return quantize || x.scalar_type() == ScalarType::BFloat16; }

std::tuple<Tensor, Tensor> cpu_prepare_activation(const Tensor& x, const std::optional<Tensor>& global, int64_t format,
                                                  bool quantize, int64_t hadamard, int64_t rule) {
  return prepare_tokens(x, global, format, quantize, hadamard, rule, fit_bf16(x, quantize));
}

namespace {

struct Tokens {
  const void* numbers;  // [count, 64 k_tiles]
  bool are_bf16;
  int64_t count;
  const Tensor* scale;  // [count], [1], or null or [0]: none
};

Tensor multiply(const Tokens& tokens, const Tensor& packed, const Tensor& row_scale, const std::optional<Tensor>& bias,
                bool out_is_bf16) {
  const ScalarType dtype = out_is_bf16 ? ScalarType::BFloat16 : ScalarType::Float;
  Product p = {};
  p.format = format_of(packed);
  p.k_tiles = packed.size(1);
  p.n = packed.size(0) * kRows;
  p.m = tokens.count;
  STD_TORCH_CHECK(row_scale.is_cpu() && row_scale.numel() == p.n && row_scale.is_contiguous() &&
                      row_scale.scalar_type() == ScalarType::Float,
                  "row_scale does not belong to this prepared weight");
  STD_TORCH_CHECK(
      !bias.has_value() || (bias->is_cpu() && bias->numel() == p.n && bias->scalar_type() == dtype && bias->is_contiguous()),
      "bias must be contiguous [N] of the output dtype");
  const int64_t scales = tokens.scale == nullptr ? 0 : tokens.scale->numel();
  STD_TORCH_CHECK(scales <= 1 || scales == p.m, "token_scale must be [M], [1] or [0]");
  Tensor out = new_tensor(packed, {p.m, p.n}, dtype);
  if (p.m == 0) return out;
  const Kernels& isa = kernels();
  p.packed = data<uint8_t>(packed);
  p.row_scale = data<float>(row_scale);
  p.tokens = tokens.numbers;
  p.token_scale = scales > 0 ? data<float>(*tokens.scale) : nullptr;
  p.token_scale_stride = scales > 1 ? 1 : 0;
  p.bias = bias.has_value() ? bias->data_ptr() : nullptr;
  p.out = out.data_ptr();
  p.out_is_bf16 = out_is_bf16;
  const int64_t k = p.k_tiles * kTile;
  std::unique_ptr<uint16_t[]> interleaved;
  if (tokens.are_bf16 && isa.interleave != nullptr && p.m > 1) {
    interleaved.reset(new uint16_t[p.m * k]);
    const auto* from = static_cast<const uint16_t*>(tokens.numbers);
    spread(p.k_tiles, kTile * p.m,
           [&](int64_t begin, int64_t end) { isa.interleave(from, p.m, k, interleaved.get(), begin, end); });
    p.tokens = interleaved.get();
  }
  const auto product = tokens.are_bf16 ? isa.product_bf16 : isa.product;
  spread(packed.size(0), kRows * k * p.m, [&](int64_t begin, int64_t end) { product(p, begin, end); });
  return out;
}

}  // namespace

Tensor cpu_gemm(const Tensor& tokens, const Tensor& token_scale, const Tensor& packed, const Tensor& row_scale,
                const std::optional<Tensor>& bias, bool out_is_bf16) {
  const int64_t k = packed.size(1) * kTile;
  const bool bf16 = tokens.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((bf16 || tokens.scalar_type() == ScalarType::Float) && tokens.is_cpu() && tokens.dim() == 2 &&
                      tokens.is_contiguous() && tokens.size(1) == k,
                  "the tokens have ", tokens.size(-1), " features (padded), the weight has ", k);
  const bool wide = bf16 && tokens.size(0) < kernels().bf16_from;
  const Tensor numbers = wide ? torch::stable::to(tokens, ScalarType::Float) : tokens;
  return multiply({numbers.data_ptr(), bf16 && !wide, tokens.size(0), &token_scale}, packed, row_scale, bias, out_is_bf16);
}

Tensor cpu_linear(const Tensor& x, const Tensor& packed, const Tensor& row_scale, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& global, bool quantize, int64_t hadamard, int64_t rule) {
  const Format format = format_of(packed);
  const bool out_is_bf16 = x.scalar_type() == ScalarType::BFloat16,
             as_bf16 = fit_bf16(x, quantize) && tokens_of(x) >= kernels().bf16_from;
  if (!quantize && hadamard == 0 && as_bf16 == out_is_bf16 && x.size(-1) == packed.size(1) * kTile && x.is_contiguous())
    return multiply({x.data_ptr(), as_bf16, tokens_of(x), nullptr}, packed, row_scale, bias, out_is_bf16);
  auto [tokens, token_scale] = prepare_tokens(x, global, format, quantize, hadamard, rule, as_bf16);
  return cpu_gemm(tokens, token_scale, packed, row_scale, bias, out_is_bf16);
}

void cpu_solve_block(const Tensor& columns, const Tensor& steps, const Tensor& inverse, const Tensor& upper,
                     const Tensor& quantized, const Tensor& errors) {
  SolveBlock s = {data<float>(columns), data<float>(steps), data<float>(inverse), data<float>(upper), data<float>(quantized),
                  data<float>(errors),  columns.size(1),    upper.stride(0),      columns.size(0)};
  STD_TORCH_CHECK(s.count % 16 == 0 && s.count <= 128, "a block has 128 columns at most, and a multiple of 16");
  const Kernels& isa = kernels();
  spread(div_up(s.n, kRows), kRows * s.count * s.count, [&](int64_t begin, int64_t end) { isa.solve(s, begin, end); });
}

void cpu_descend_block(const Tensor& current, const Tensor& gradient, const Tensor& scale, const Tensor& matrix,
                       const std::optional<Tensor>& global, int64_t group, const Tensor& moved) {
  DescendBlock d = {data<float>(current), data<float>(gradient), data<uint8_t>(scale), data<float>(matrix),
                    data_or_null(global), data<float>(moved),    current.size(1),      matrix.stride(0),
                    current.size(0),      format_of_group(group)};
  check_global(global, d.format == kNvfp4);
  STD_TORCH_CHECK(d.count % group_of(d.format) == 0 && d.count <= 128, "a block has 128 columns at most, in whole groups");
  const Kernels& isa = kernels();
  spread(div_up(d.n, kRows), kRows * d.count * d.count, [&](int64_t begin, int64_t end) { isa.descend(d, begin, end); });
}

void cpu_search(const Tensor& weight, const Tensor& base, const Tensor& steps, const std::optional<Tensor>& global,
                const std::optional<Tensor>& importance, int64_t group, const Tensor& scale) {
  ScaleSearch s = {};
  s.format = format_of_group(group);
  check_global(global, s.format == kNvfp4);
  s.weight = data<float>(weight);
  s.base = data<uint8_t>(base);
  s.steps = data<int32_t>(steps);
  s.count = steps.numel();
  s.global = data_or_null(global);
  s.importance = data_or_null(importance);
  s.scales = data<uint8_t>(scale);
  s.k = weight.size(1);
  const Kernels& isa = kernels();
  spread(weight.size(0), s.k * s.count, [&](int64_t begin, int64_t end) { isa.scales(s, begin, end); });
}

void cpu_add_moments(const Tensor& second, const std::optional<Tensor>& cross, const Tensor& x,
                     const std::optional<Tensor>& original, int64_t panel) {
  const Kernels& isa = kernels();
  STD_TORCH_CHECK(isa.add_moments != nullptr, isa.name, " has no products of moments");
  const int64_t k = x.size(1), tokens = x.size(0), tile = 512, blocks = k / 16;
  STD_TORCH_CHECK(is_matrix(x, ScalarType::BFloat16) && x.is_contiguous() && k % 16 == 0 && panel > 0 &&
                      cross.has_value() == original.has_value(),
                  "x must be contiguous bfloat16 [M, K], K a multiple of 16, and cross and original go together");
  STD_TORCH_CHECK(!original.has_value() || (is_matrix(*original, ScalarType::BFloat16) && original->is_contiguous() &&
                                            original->size(0) == tokens && original->size(1) == k),
                  "original must be bfloat16 of the shape of x");
  for (const Tensor* sum : {&second, cross.has_value() ? &*cross : &second})
    STD_TORCH_CHECK(is_matrix(*sum, ScalarType::Float) && sum->is_contiguous() && sum->size(0) == k && sum->size(1) == k,
                    "moments must be contiguous float32 [K, K]");
  const int64_t most = std::min(kMomentTokens, div_up(tokens, 32) * 32);
  Tensor memory = new_tensor(x, {original.has_value() ? 3 : 2, k * most}, ScalarType::BFloat16);
  Moments m = {};
  m.k = k;
  m.panel = panel;
  m.second = data<float>(second);
  m.cross = cross.has_value() ? data<float>(*cross) : nullptr;
  m.columns = data<uint16_t>(memory);
  m.rows = m.columns + k * most;
  m.original_rows = original.has_value() ? m.rows + k * most : nullptr;
  for (int64_t first = 0; first < tokens; first += kMomentTokens) {
    m.tokens = std::min(kMomentTokens, tokens - first);
    m.token_tiles = div_up(m.tokens, 32);
    m.x = data<uint16_t>(x) + first * k;
    m.original = original.has_value() ? data<uint16_t>(*original) + first * k : nullptr;
    spread(blocks, m.token_tiles * tile, [&](int64_t begin, int64_t end) { isa.pack_moments(m, begin, end); });
    spread(div_up(blocks, 2), 32 * k * m.tokens, [&](int64_t begin, int64_t end) { isa.add_moments(m, begin, end); });
  }
}

STABLE_TORCH_LIBRARY_EXPAND(TORCH_EXTENSION_NAME, ops) {
  ops.def("cpu_isa() -> str");
  ops.def("cpu_prepare_weight(Tensor weight, Tensor scale, Tensor? global_scale) -> (Tensor, Tensor)");
  ops.def("cpu_restore_weight(Tensor packed, int n, int k) -> (Tensor, Tensor)");
  ops.def(
      "cpu_rotate_quantize(Tensor x, Tensor? global_scale, int format, int hadamard, int rule)"
      " -> (Tensor, Tensor, Tensor)");
  ops.def(
      "cpu_prepare_activation(Tensor x, Tensor? global_scale, int format, bool quantize, int hadamard, int rule)"
      " -> (Tensor, Tensor)");
  ops.def(
      "cpu_gemm(Tensor tokens, Tensor token_scale, Tensor packed, Tensor row_scale, Tensor? bias, bool out_is_bf16)"
      " -> Tensor");
  ops.def(
      "cpu_linear(Tensor x, Tensor packed, Tensor row_scale, Tensor? bias, Tensor? global_scale, bool quantize,"
      " int hadamard, int rule) -> Tensor");
  ops.def(
      "cpu_solve_block(Tensor columns, Tensor steps, Tensor inverse, Tensor upper, Tensor(a!) quantized,"
      " Tensor(b!) errors) -> ()");
  ops.def(
      "cpu_descend_block(Tensor(a!) current, Tensor gradient, Tensor(b!) scale, Tensor matrix, Tensor? global_scale,"
      " int group, Tensor(c!) moved) -> ()");
  ops.def(
      "cpu_search(Tensor weight, Tensor base, Tensor steps, Tensor? global_scale, Tensor? importance, int group,"
      " Tensor(a!) scale) -> ()");
  ops.def("cpu_add_moments(Tensor(a!) second, Tensor(b!)? cross, Tensor x, Tensor? original, int panel) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CPU, ops) {
  ops.impl("cpu_prepare_weight", TORCH_BOX(&cpu_prepare_weight));
  ops.impl("cpu_restore_weight", TORCH_BOX(&cpu_restore_weight));
  ops.impl("cpu_rotate_quantize", TORCH_BOX(&cpu_rotate_quantize));
  ops.impl("cpu_prepare_activation", TORCH_BOX(&cpu_prepare_activation));
  ops.impl("cpu_gemm", TORCH_BOX(&cpu_gemm));
  ops.impl("cpu_linear", TORCH_BOX(&cpu_linear));
  ops.impl("cpu_solve_block", TORCH_BOX(&cpu_solve_block));
  ops.impl("cpu_descend_block", TORCH_BOX(&cpu_descend_block));
  ops.impl("cpu_search", TORCH_BOX(&cpu_search));
  ops.impl("cpu_add_moments", TORCH_BOX(&cpu_add_moments));
}

STABLE_TORCH_LIBRARY_IMPL_EXPAND(TORCH_EXTENSION_NAME, CompositeExplicitAutograd, ops) {
  ops.impl("cpu_isa", TORCH_BOX(&cpu_isa));
}

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
#endif
