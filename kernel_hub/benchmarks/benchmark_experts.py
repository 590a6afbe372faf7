"""The experts of one MoE layer against bf16 `grouped_mm`: us and ratio. CUDA graphs, another routing at every call.

    python benchmarks/benchmark_experts.py [--tokens 1 16 4096] [--mode nvfp4_w4a16 ...] [--tiles 0 8 ...] [--backend triton]

Qwen3-30B-A3B's layer: 128 experts, hidden 2048, expert 768, top 8, experts drawn at random. Both run gate and up, SiLU, and
down on sorted rows, which for FP4 is two calls; "into" and "down" are the two alone, SiLU with the second. --tiles: rows of a
tile of the CUDA kernels, 0 what they choose (`grouped_linear` in torch_binding.cpp). A result that fails its check is not
timed.
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


class Layer:
    """The layer's FP4 weights, and its two products, of which the second begins with SiLU."""

    def __init__(self, kernels, mode):
        self.kernels, self.mode = kernels, mode
        static = mode.format == "nvfp4" and mode.activations == "fp4"
        self.input_global_scale = torch.tensor([64.0], device="cuda") if static else None
        self.weights, self.prepared = [], []
        for n, k in ((2 * INNER, HIDDEN), (HIDDEN, INNER)):
            weights = [ref.random_weight(n, k, mode.format, "cuda") for _ in range(EXPERTS)]
            stacked = [torch.stack([weight[i] for weight in weights]) for i in range(2)]
            divisors = torch.cat([weight[2] for weight in weights]) if mode.format == "nvfp4" else None
            self.prepared.append(kernels.prepare_experts(*stacked, divisors))
            self.weights.append(weights)

    def product(self, which: int, x: torch.Tensor, offsets: torch.Tensor, index=None, tile: int = 0):
        mode, numbers = self.mode, self.kernels._cuda
        x, up = x.chunk(2, -1) if which == 1 else (x, None)
        if tile:
            return self.kernels._ops.ops.grouped_linear(
                x, up, offsets, index, *self.prepared[which], None, self.input_global_scale, numbers.OPERANDS["bf16"],
                mode.activations == "fp4", mode.hadamard or 0, numbers.RULES[mode.rule], tile,
            )  # fmt: skip
        return self.kernels.grouped_linear(
            x, offsets, *self.prepared[which], up=up, index=index, activations=mode.activations, hadamard=mode.hadamard,
            rule=mode.rule, input_global_scale=self.input_global_scale,
        )  # fmt: skip

    def check(self, which: int, y: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor) -> None:
        """Of the experts with the most and with the fewest rows."""
        counts = offsets.diff()
        for expert in (int(counts.argmax()), int(counts.masked_fill(counts == 0, 1 << 30).argmin())):
            mine = slice(int(offsets[expert]), int(offsets[expert + 1]))
            values = ref.activation_values(rows[mine], self.mode, self.input_global_scale)
            error = ref.relative_error(y[mine], values @ ref.weight_values(*self.weights[which][expert]).T)
            if not error < 6e-3:
                raise SystemExit(
                    f"{self.mode.id}, product {which}: wrong result, error {error:.2e}; not timed"
                )


def time_fp4(layer: Layer, tokens: int, routings: list, tile: int) -> list[float]:
    """Microseconds of the layer, and of its two products alone."""
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    inner = torch.randn(tokens * TOP, 2 * INNER, device="cuda", dtype=torch.bfloat16)

    def into(index: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return layer.product(0, x, offsets, index, tile)

    def down(offsets: torch.Tensor, inner: torch.Tensor = inner) -> torch.Tensor:
        return layer.product(1, inner, offsets, None, tile)

    index, offsets = routings[0]
    layer.check(0, into(index, offsets), x[index], offsets)
    layer.check(1, down(offsets), gated(inner), offsets)
    calls = [
        [lambda r=r: down(r[1], into(*r)) for r in routings],
        [lambda r=r: into(*r) for r in routings],
        [lambda r=r: down(r[1]) for r in routings],
    ]
    return [time_graph(each) for each in calls]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 4096])
    parser.add_argument("--mode", nargs="+", default=list(MODES)[:4], choices=list(MODES))
    parser.add_argument("--backend", default="cuda", choices=["cuda", "triton"])
    parser.add_argument("--tiles", type=int, nargs="+", default=[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kernels = load_variant(variant_paths()[args.backend])
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"{'tokens':>6} {'mode':<20} {'tile':>7} {'us':>9} {'x bf16':>7} {'into':>9} {'down':>9}")
    layers = {name: Layer(kernels, MODES[name]) for name in args.mode}
    results = []
    for tokens in args.tokens:
        routings = [routing(tokens) for _ in range(ROUTINGS)]
        bf16 = time_bf16(tokens, routings)
        print(f"{tokens:>6} {'bf16 grouped_mm':<20} {'':>7} {bf16:>9.1f}")
        for name, layer in layers.items():
            for tile in args.tiles:
                us, into, down = time_fp4(layer, tokens, routings, tile)
                results.append({"tokens": tokens, "mode": name, "tile": tile, "bf16_us": bf16})
                results[-1] |= {"us": us, "into_us": into, "down_us": down}
                print(
                    f"{tokens:>6} {name:<20} {tile:>7} {us:>9.1f} {bf16 / us:>7.2f} {into:>9.1f} {down:>9.1f}",
                    flush=True,
                )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
