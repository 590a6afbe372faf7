"""The experts of one MoE layer against bf16 `grouped_mm`: us and ratio. CUDA graphs, another routing at every call.

    python benchmarks/benchmark_experts.py [--tokens 1 16 4096] [--mode nvfp4_w4a16 ...] [--json out.json]

Qwen3-30B-A3B's layer: 128 experts, hidden 2048, expert 768, top 8, experts drawn at random. Both run gate and up, SiLU, and
down on sorted rows. A result that fails its check is not timed.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from benchmark_linear import MODES, load_variant, ref, time_graph, variant_paths

EXPERTS, HIDDEN, INNER, TOP = 128, 2048, 768, 8
ROUTINGS = 16


def routing(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each row, sorted by expert, and where each expert's rows start [EXPERTS + 1]."""
    chosen = torch.rand(tokens, EXPERTS, device="cuda").topk(TOP).indices.flatten()
    experts, order = chosen.sort(stable=True)
    return order // TOP, torch.searchsorted(experts, torch.arange(EXPERTS + 1, device="cuda"))


def gated(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def time_bf16(tokens: int, routings: list) -> float:
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    into = torch.randn(EXPERTS, HIDDEN, 2 * INNER, device="cuda", dtype=torch.bfloat16) * 0.02
    down = torch.randn(EXPERTS, INNER, HIDDEN, device="cuda", dtype=torch.bfloat16) * 0.02
    grouped_mm = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm

    def call(index: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        ends = offsets[1:].int()
        return grouped_mm(gated(grouped_mm(x[index], into, offs=ends)), down, offs=ends)

    return time_graph([lambda r=r: call(*r) for r in routings])


def time_fp4(kernels, mode, tokens: int, routings: list) -> float:
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    static = mode.format == "nvfp4" and mode.activations == "fp4"
    arguments = {"activations": mode.activations, "hadamard": mode.hadamard, "rule": mode.rule}
    arguments["input_global_scale"] = torch.tensor([64.0], device="cuda") if static else None
    prepared, first = [], []
    for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
        weights = [ref.random_weight(n, k, mode.format, "cuda") for _ in range(EXPERTS)]
        stacked = [torch.stack([weight[i] for weight in weights]) for i in range(2)]
        divisors = torch.cat([weight[2] for weight in weights]) if mode.format == "nvfp4" else None
        prepared.append(kernels.prepare_experts(*stacked, divisors))
        first.append(weights)

    def call(index: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        inner = gated(kernels.grouped_linear(x, offsets, *prepared[0], index=index, **arguments))
        return kernels.grouped_linear(inner, offsets, *prepared[1], **arguments)

    index, offsets = routings[0]
    y = kernels.grouped_linear(x, offsets, *prepared[0], index=index, **arguments)
    expert = int(offsets.diff().argmax())
    rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
    values = ref.activation_values(x[index[rows]], mode, arguments["input_global_scale"])
    error = ref.relative_error(y[rows], values @ ref.weight_values(*first[0][expert]).T)
    if not error < 6e-3:
        raise SystemExit(f"{mode.id}, {tokens} tokens: wrong result, error {error:.2e}; not timed")
    return time_graph([lambda r=r: call(*r) for r in routings])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 4096])
    parser.add_argument("--mode", nargs="+", default=list(MODES)[:4], choices=list(MODES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kernels = load_variant(next(iter(variant_paths().values())))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"{'tokens':>6} {'mode':<20} {'us':>9} {'x bf16':>7}")
    results = []
    for tokens in args.tokens:
        routings = [routing(tokens) for _ in range(ROUTINGS)]
        bf16 = time_bf16(tokens, routings)
        print(f"{tokens:>6} {'bf16 grouped_mm':<20} {bf16:>9.1f}")
        for name in args.mode:
            us = time_fp4(kernels, MODES[name], tokens, routings)
            results.append({"tokens": tokens, "mode": name, "us": us, "bf16_us": bf16})
            print(f"{tokens:>6} {name:<20} {us:>9.1f} {bf16 / us:>7.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
