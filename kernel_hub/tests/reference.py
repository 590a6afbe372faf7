"""Plain torch, FP32 and FP64: what the kernels must compute. Its tables come from the OCP MX and NVFP4 formats."""

import math

import torch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def e2m1_values(codes: torch.Tensor) -> torch.Tensor:
    table = torch.cat([E2M1, -E2M1]).to(codes.device)
    return table[codes.long()]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Codes of |x|; ties to the even code, saturating."""
    a = x.abs()
    code = (a > 0.25).int() + (a >= 0.75) + (a > 1.25) + (a >= 1.75) + (a > 2.5) + (a >= 3.5) + (a > 5)
    return code | (torch.signbit(x).int() << 3)


def hadamard_matrix(size: int, device) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.float64, device=device)
    while h.shape[0] < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h / math.sqrt(size)


def rotate(x: torch.Tensor, size: int | None) -> torch.Tensor:
    x = x.double()
    if size is not None:
        x = (x.view(x.shape[0], -1, size) @ hadamard_matrix(size, x.device)).view(x.shape)
    return x.float()


def e4m3(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(max=448.0).to(torch.float8_e4m3fn).float().clamp(min=2.0**-9)


def quantize_nvfp4(x: torch.Tensor, g: torch.Tensor, rule: str):
    """x: rotated float32 [M, K]; g: [1] or [M, 1] divisor. Codes [M, K], scales [M, K/16] (float)."""
    blocks = x.view(x.shape[0], -1, 16)
    g = g.view(-1, 1)
    amax = blocks.abs().amax(-1)

    def under(s):
        codes = round_e2m1(blocks * (g / s)[..., None])
        error = (blocks - e2m1_values(codes) * (s / g)[..., None]).square().sum(-1)
        return s, codes, error

    def neighbour(s, distance):
        code = s.to(torch.float8_e4m3fn).view(torch.uint8).int() + distance
        return code.clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).float()

    six, four = e4m3(amax / 6 * g), e4m3(amax / 4 * g)
    others = {
        "absmax": [],
        "four_over_six": [four],
        "mse": [four, *(neighbour(near, distance) for near in (six, four) for distance in (-1, 1))],
    }
    s, codes, error = under(six)
    for other in others[rule]:
        _, other_codes, other_error = under(other)
        better = other_error < error
        s, codes = torch.where(better, other, s), torch.where(better[..., None], other_codes, codes)
        error = torch.where(better, other_error, error)
    return codes.view(x.shape), s


def quantize_mxfp4(x: torch.Tensor, rule: str):
    """Codes [M, K], exponents [M, K/32]."""
    blocks = x.view(x.shape[0], -1, 32)
    amax = blocks.abs().amax(-1)
    e = torch.where(amax > 0, torch.frexp(amax).exponent - 1 - 2, -127).clamp(-127, 127)

    def under(e):
        codes = round_e2m1(torch.ldexp(blocks.double(), -e[..., None]).float())
        value = torch.ldexp(e2m1_values(codes).double(), e[..., None]).float()
        return codes, (blocks - value).square().sum(-1)

    codes, error = under(e)
    if rule == "mse":
        codes1, error1 = under(e + 1)
        up = error1 < error
        e, codes = torch.where(up, e + 1, e), torch.where(up[..., None], codes1, codes)
    return codes.view(x.shape), e


def dynamic_global(x: torch.Tensor) -> torch.Tensor:
    """Per token the power of two that takes its largest value to at most 256 * 6."""
    _, exponent = torch.frexp(1536.0 / x.abs().amax(-1, keepdim=True).clamp_min(2.0**-100))
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (exponent - 1).clamp(-100, 100))


def activation_values(x: torch.Tensor, mode, input_global_scale) -> torch.Tensor:
    """Rotated and, for "fp4", quantized and dequantized tokens, float64 [M, K]."""
    x = rotate(x, mode.hadamard)
    if mode.activations == "bf16":
        return x.double()
    if mode.format == "nvfp4":
        g = dynamic_global(x) if input_global_scale is None else input_global_scale
        codes, s = quantize_nvfp4(x, g, mode.rule)
        return e2m1_values(codes).double() * s.double().repeat_interleave(16, 1) / g.double().view(-1, 1)
    codes, e = quantize_mxfp4(x, mode.rule)
    return torch.ldexp(e2m1_values(codes).double(), e.repeat_interleave(32, 1))


def weight_values(weight, weight_scale, weight_global_scale) -> torch.Tensor:
    """float64 [N, K]."""
    values = e2m1_values(unpack(weight)).double()
    if weight_scale.dtype == torch.uint8:
        return torch.ldexp(values, weight_scale.int().repeat_interleave(32, 1) - 127)
    return values * weight_scale.double().repeat_interleave(16, 1) / weight_global_scale.double()


def random_weight(n: int, k: int, format: str, device=None, spread: int = 3):
    """Random codes and scales: weight, weight_scale, weight_global_scale."""
    weight = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    if format == "mxfp4":
        return weight, torch.randint(118 - spread, 119, (n, k // 32), dtype=torch.uint8, device=device), None
    bytes_ = torch.randint(0x38, 0x78, (n, k // 16), dtype=torch.uint8, device=device)
    return weight, bytes_.view(torch.float8_e4m3fn), torch.tensor([2048.0 * 1.37], device=device)


def relative_error(y: torch.Tensor, reference: torch.Tensor) -> float:
    return ((y.double() - reference).norm() / reference.norm().clamp(min=1e-300)).item()


def expected(x, weight, bias, mode, g, floor: float):
    """The exact result (float64) and how far from it, relative to its norm, a kernel's may be: twice what eager 16-bit
    with the same quantized operands (scaled into range) and the same bias is, plus `floor`."""
    values, w = activation_values(x, mode, g), weight_values(*weight)
    added = 0 if bias is None else bias.double()
    exact = values @ w.T + added
    operand = torch.bfloat16 if mode.activations == "fp4" else x.dtype
    sw, sx = w.abs().amax(), values.abs().amax().clamp(min=1e-30)
    eager = torch.nn.functional.linear((values / sx).to(operand), (w / sw).to(operand)).double() * (sw * sx)
    return exact, 2 * relative_error((eager + added).to(x.dtype), exact) + floor
