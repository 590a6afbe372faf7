#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

using torch::stable::Tensor;

// See torch-ext/hf_fp4_kernels/_cpu.py for shapes and meanings.
std::string cpu_isa();
std::tuple<Tensor, Tensor> cpu_prepare_weight(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& global);
std::tuple<Tensor, Tensor> cpu_restore_weight(const Tensor& packed, int64_t n, int64_t k);
std::tuple<Tensor, Tensor, Tensor> cpu_rotate_quantize(const Tensor& x, const std::optional<Tensor>& global, int64_t format,
                                                       int64_t hadamard, int64_t rule);
std::tuple<Tensor, Tensor> cpu_prepare_activation(const Tensor& x, const std::optional<Tensor>& global, int64_t format,
                                                  bool quantize, int64_t hadamard, int64_t rule);
Tensor cpu_gemm(const Tensor& tokens, const Tensor& token_scale, const Tensor& packed, const Tensor& row_scale,
                const std::optional<Tensor>& bias, bool out_is_bf16);
Tensor cpu_linear(const Tensor& x, const Tensor& packed, const Tensor& row_scale, const std::optional<Tensor>& bias,
                  const std::optional<Tensor>& global, bool quantize, int64_t hadamard, int64_t rule);
void cpu_solve_block(const Tensor& columns, const Tensor& steps, const Tensor& inverse, const Tensor& upper,
                     const Tensor& quantized, const Tensor& errors);
void cpu_descend_block(const Tensor& current, const Tensor& gradient, const Tensor& scale, const Tensor& matrix,
                       const std::optional<Tensor>& global, int64_t group, const Tensor& moved);
void cpu_search(const Tensor& weight, const Tensor& base, const Tensor& steps, const std::optional<Tensor>& global,
                const std::optional<Tensor>& importance, int64_t group, const Tensor& scale);
void cpu_add_moments(const Tensor& second, const std::optional<Tensor>& cross, const Tensor& x,
                     const std::optional<Tensor>& original, int64_t panel);
