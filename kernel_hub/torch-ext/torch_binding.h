#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

using torch::stable::Tensor;

// See torch-ext/hf_fp4_kernels/_cuda.py for shapes and meanings.
std::tuple<Tensor, Tensor> prepare_weight(const Tensor& weight, const Tensor& scale, const std::optional<Tensor>& global);
std::tuple<Tensor, Tensor> restore_weight(const Tensor& packed, const Tensor& row_scale, int64_t n, int64_t k);
std::tuple<Tensor, Tensor, Tensor> rotate_quantize(const Tensor& x, const std::optional<Tensor>& global, int64_t format,
                                                   int64_t hadamard, int64_t rule);
std::tuple<Tensor, Tensor> fake_quantize(const Tensor& x, const std::optional<Tensor>& global, int64_t format, bool quantize,
                                         int64_t hadamard, int64_t rule);
std::tuple<Tensor, Tensor> prepare_activation(const Tensor& x, const std::optional<Tensor>& up,
                                              const std::optional<Tensor>& global, int64_t format, int64_t operand,
                                              bool quantize, int64_t hadamard, int64_t rule);
Tensor prepared_gemm(const Tensor& tokens, const Tensor& token_scale, const Tensor& packed, const Tensor& row_scale,
                     const std::optional<Tensor>& bias, int64_t m, int64_t operand, bool out_is_bf16, int64_t split);
std::vector<Tensor> prepared_linears(const Tensor& x, const std::optional<Tensor>& up, const std::vector<Tensor>& packed,
                                     const std::vector<Tensor>& row_scale, const std::vector<std::optional<Tensor>>& bias,
                                     const std::optional<Tensor>& global, int64_t operand, bool quantize, int64_t hadamard,
                                     int64_t rule);
Tensor grouped_linear(const Tensor& x, const std::optional<Tensor>& up, const Tensor& offsets,
                      const std::optional<Tensor>& index, const Tensor& packed, const Tensor& row_scale,
                      const std::optional<Tensor>& bias, const std::optional<Tensor>& global, int64_t operand, bool quantize,
                      int64_t hadamard, int64_t rule, int64_t tile);
