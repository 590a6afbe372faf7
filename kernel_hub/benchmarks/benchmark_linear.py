"""FP4 linears against bf16 F.linear, per shape: us, ratio, share of the bound. Cold weights. q, k and v, and gate and up, are
linears of their own in one call of `linears`, as in a model; for bf16 they are one product.

    python benchmarks/benchmark_linear.py [--m 1 16 64] [--mode nvfp4_w4a4 ...] [--backend triton] [--json out.json]
    OMP_NUM_THREADS=2 python benchmarks/benchmark_linear.py --backend cpu

On a GPU in CUDA graphs; on a CPU every call of one is followed by a call of each other, and the fastest of each counts,
so that what else the machine does matters little. Weights rotate through a set larger than the last cache. A result that fails its check is not timed. The bound is the larger
of the weight bytes over the measured copy bandwidth and the operations over the measured rate of a bf16 product (for
mxfp4 W4A4 twice that).
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import reference as ref
from conftest import load_variant, variant_paths
from problems import LLAMA_8B, LLAMA_8B_LINEARS, Mode

MODES = {
    "nvfp4_w4a4": Mode("nvfp4", "fp4", 16, rule="mse"),
    "mxfp4_w4a4": Mode("mxfp4", "fp4", 32, rule="mse"),
    "nvfp4_w4a16": Mode("nvfp4", "bf16", None),
    "mxfp4_w4a16": Mode("mxfp4", "bf16", None),
    "nvfp4_w4a4_absmax": Mode("nvfp4", "fp4", 16),
    "mxfp4_w4a4_absmax": Mode("mxfp4", "fp4", 32),
}
COLD_BYTES = 160 << 20


def time_graph(calls, replays=7) -> float:
    """Median microseconds of one call; the graph runs all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def time_in_turns(calls: dict[str, list], rounds: int) -> dict[str, float]:
    """The least microseconds of one call of each; in every round one after the other."""
    times = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, some in calls.items():
            start = time.perf_counter()
            some[i % len(some)]()
            times[name].append((time.perf_counter() - start) * 1e6)
    return {name: min(taken[1:]) for name, taken in times.items()}


def time_each(calls: dict[str, list], m: int) -> dict[str, float]:
    if torch.get_default_device().type == "cpu":
        return time_in_turns(calls, rounds=31 if m <= 16 else 9)
    return {name: time_graph(some * (3 if m <= 512 else 1)) for name, some in calls.items()}


def measure_bounds() -> tuple[float, float]:
    """Bytes/s of a device copy (read plus written), on a CPU of reading alone; FLOP/s of a bf16 product."""
    if torch.get_default_device().type == "cpu":
        numbers, x = torch.ones(1 << 26), torch.randn(2048, 2048, dtype=torch.bfloat16)
        times = time_in_turns({"read": [numbers.sum], "product": [lambda: x @ x]}, rounds=9)
        return 4 * numbers.numel() / (times["read"] * 1e-6), 2 * 2048**3 / (times["product"] * 1e-6)
    a = torch.empty(1 << 30, dtype=torch.uint8)
    b = torch.empty_like(a)
    copy = 2 * a.numel() / (time_graph([lambda: b.copy_(a)] * 4) * 1e-6)
    x = torch.randn(8192, 8192, dtype=torch.bfloat16)
    return copy, 2 * 8192**3 / (time_graph([lambda: x @ x] * 3) * 1e-6)


def repeat(count: int) -> int:
    return max(2, min(count, 40))


def bf16_calls(n, k, m) -> list:
    copies = repeat(COLD_BYTES // (n * k * 2) + 1)
    weights = [torch.randn(n, k, dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(m, k, dtype=torch.bfloat16)
    return [lambda w=w: F.linear(x, w) for w in weights]


def fp4_calls(kernels, mode, layer, m) -> list:
    (n, k), rows = LLAMA_8B[layer], LLAMA_8B_LINEARS[layer]
    copies = repeat(COLD_BYTES * 2 // (n * k) + 1)
    x = torch.randn(m, k, dtype=torch.bfloat16)
    g = torch.tensor([64.0]) if mode.format == "nvfp4" and mode.activations == "fp4" else None
    weight = ref.random_weight(n, k, mode.format)
    parts = zip(weight[0].split(rows), weight[1].split(rows), strict=True)
    first = [kernels.prepare_weight(*part, weight[2]) for part in parts]
    prepared = [first] + [[(packed.clone(), scale) for packed, scale in first] for _ in range(copies - 1)]

    def call(p):
        return kernels.linears(
            x,
            p,
            [None] * len(rows),
            activations=mode.activations,
            hadamard=mode.hadamard,
            rule=mode.rule,
            input_global_scale=g,
        )

    some = slice(0, min(m, 256))
    want = ref.activation_values(x[some], mode, g).float() @ ref.weight_values(*weight).float().T
    got = torch.cat(call(prepared[-1]), dim=-1)[some]
    error = ref.relative_error(got, want.double())
    if not error < 6e-3:
        raise SystemExit(f"{mode.id} m={m} n={n} k={k}: wrong result, error {error:.2e}; not timed")
    return [lambda p=p: call(p) for p in prepared]


def describe(kernels) -> str:
    if torch.get_default_device().type == "cpu":
        isa = kernels._ops.ops.cpu_isa()
        return f"{platform.machine()}, {isa}, {torch.get_num_threads()} of {os.cpu_count()} cores, torch {torch.__version__}"
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 128, 512, 4096])
    parser.add_argument("--mode", nargs="+", default=list(MODES)[:4], choices=list(MODES))
    parser.add_argument("--backend", default="cuda", choices=["cuda", "triton", "cpu"])
    parser.add_argument("--layer", nargs="+", default=list(LLAMA_8B), choices=list(LLAMA_8B))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kernels = load_variant(variant_paths()[args.backend])
    if args.backend != "cpu":  # a default device makes Python look at every call, which costs a CPU time
        torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    bandwidth, rate = measure_bounds()
    print(describe(kernels))
    print(f"memory {bandwidth / 1e9:.0f} GB/s, bf16 product {rate / 1e12:.3g} TFLOP/s")
    results = []
    print(
        f"{'M':>5} {'mode':<20} "
        + " ".join(f"{name + ' us (x, %)':>22}" for name in args.layer)
        + f" {'sum us':>8} {'x bf16':>7}"
    )
    for m in args.m:
        times = {}
        for layer in args.layer:
            n, k = LLAMA_8B[layer]
            calls = {"bf16": bf16_calls(n, k, m)}
            calls |= {name: fp4_calls(kernels, MODES[name], layer, m) for name in args.mode}
            times[layer] = time_each(calls, m)
        bf16 = {layer: taken["bf16"] for layer, taken in times.items()}
        total = sum(bf16.values())
        print(f"{m:>5} {'bf16':<20} " + " ".join(f"{t:>22.1f}" for t in bf16.values()) + f" {total:>8.1f}")
        for name in args.mode:
            mode, cells = MODES[name], []
            fp4 = {layer: taken[name] for layer, taken in times.items()}
            for layer, t in fp4.items():
                n, k = LLAMA_8B[layer]
                bytes_ = n * k * (0.5625 if mode.format == "nvfp4" else 0.53125) + 2 * m * (n + k)
                speed = rate * (2 if name.startswith("mxfp4_w4a4") and args.backend != "cpu" else 1)
                bound = max(bytes_ / bandwidth, 2 * m * n * k / speed) * 1e6
                cells.append(f"{t:>8.1f} ({bf16[layer] / t:>4.2f}, {100 * bound / t:>3.0f}%)")
            fp4_total = sum(fp4.values())
            results.append(
                {
                    "m": m,
                    "mode": name,
                    "us": fp4,
                    "sum": fp4_total,
                    "bf16_us": bf16,
                    "ratio": total / fp4_total,
                }
            )
            print(
                f"{m:>5} {name:<20} "
                + " ".join(f"{c:>22}" for c in cells)
                + f" {fp4_total:>8.1f} {total / fp4_total:>7.2f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
