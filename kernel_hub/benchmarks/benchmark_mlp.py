"""The MLP of Llama-3.1-8B, down(silu(gate(x)) * up(x)), in FP4 and in bf16: us and ratio. Cold weights, CUDA graphs.

    python benchmarks/benchmark_mlp.py [--m 1 16 64] [--mode nvfp4_w4a4 ...]

"gated by PyTorch": its SiLU and its product of two tensors, then the linear; else `down` reads gate and up and makes that of them
itself. Both give the same bits, which is checked. In bf16, gate and up are one product, as FP4's are one call.
"""

import argparse

import torch
import torch.nn.functional as F
from benchmark_linear import COLD_BYTES, MODES, describe, load_variant, ref, time_graph, variant_paths
from problems import LLAMA_8B, LLAMA_8B_LINEARS

(WIDE, HIDDEN), INNER = LLAMA_8B["gate_up"], LLAMA_8B["down"][1]


def bf16_calls(x: torch.Tensor) -> list:
    weights = [
        [torch.randn(n, k, dtype=torch.bfloat16) for n, k in ((WIDE, HIDDEN), (HIDDEN, INNER))]
        for _ in range(2)
    ]

    def call(into, down):
        gate, up = F.linear(x, into).chunk(2, -1)
        return F.linear(F.silu(gate) * up, down)

    return [lambda w=w: call(*w) for w in weights]


def fp4_calls(kernels, mode, x: torch.Tensor) -> tuple[list, list]:
    """With the gate made by `down`, and by PyTorch."""
    options = {
        "activations": mode.activations,
        "hadamard": mode.hadamard,
        "rule": mode.rule,
        "input_global_scale": torch.tensor([64.0])
        if mode.format == "nvfp4" and mode.activations == "fp4"
        else None,
    }
    rows = [*LLAMA_8B_LINEARS["gate_up"], HIDDEN]
    stored = [
        ref.random_weight(n, k, mode.format) for n, k in zip(rows, (HIDDEN, HIDDEN, INNER), strict=True)
    ]
    sets = [[kernels.prepare_weight(*weight) for weight in stored]]
    sets += [[(packed.clone(), scale) for packed, scale in sets[0]] for _ in range(COLD_BYTES // (88 << 20))]

    def call(weights, by_kernels):
        gate, up = kernels.linears(x, weights[:2], [None, None], **options)
        if by_kernels:
            return kernels.linear(gate, *weights[2], up=up, **options)
        return kernels.linear(F.silu(gate) * up, *weights[2], **options)

    if not torch.equal(call(sets[0], True), call(sets[-1], False)):
        raise SystemExit(f"{mode.id} m={len(x)}: the results differ; not timed")
    return tuple([lambda w=w, b=b: call(w, b) for w in sets] for b in (True, False))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 128, 512, 4096])
    parser.add_argument("--mode", nargs="+", default=list(MODES)[:4], choices=list(MODES))
    args = parser.parse_args()
    kernels = load_variant(variant_paths()["cuda"])
    torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    print(describe(kernels))
    print(f"{'M':>5} {'mode':<20} {'bf16 us':>8} {'us':>8} {'x bf16':>7} {'gated by PyTorch us':>20}")
    for m in args.m:
        x = torch.randn(m, HIDDEN, dtype=torch.bfloat16)
        repeats = 12 if m <= 512 else 3
        bf16 = time_graph(bf16_calls(x) * repeats)
        for name in args.mode:
            own, separate = (time_graph(calls * repeats) for calls in fp4_calls(kernels, MODES[name], x))
            print(
                f"{m:>5} {name:<20} {bf16:>8.1f} {own:>8.1f} {bf16 / own:>7.2f} {separate:>20.1f}", flush=True
            )


if __name__ == "__main__":
    main()
