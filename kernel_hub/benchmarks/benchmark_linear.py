"""FP4 linears against bf16 F.linear, per shape: us, ratio, share of the bound. CUDA graphs, cold weights.

    python benchmarks/benchmark_linear.py [--m 1 16 64] [--mode nvfp4_w4a4 ...] [--backend triton] [--json out.json]

Weights rotate through a set larger than the L2 cache. A result that fails its check is not timed. The bound is the larger
of the weight bytes over the measured copy bandwidth and the operations over the measured rate of a bf16 product (for
mxfp4 W4A4 twice that).
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import reference as ref
from conftest import load_variant, variant_paths
from problems import LLAMA_8B, Mode

MODES = {
    "nvfp4_w4a4": Mode("nvfp4", "fp4", 16),
    "mxfp4_w4a4": Mode("mxfp4", "fp4", 32),
    "nvfp4_w4a16": Mode("nvfp4", "bf16", None),
    "mxfp4_w4a16": Mode("mxfp4", "bf16", None),
    "nvfp4_w4a4_h128_46": Mode("nvfp4", "fp4", 128, rule="four_over_six"),
    "mxfp4_w4a4_h128_mse": Mode("mxfp4", "fp4", 128, rule="mse"),
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


def measure_bounds() -> tuple[float, float]:
    """Bytes/s of a device copy (read plus written), FLOP/s of a bf16 product."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copy = 2 * a.numel() / (time_graph([lambda: b.copy_(a)] * 4) * 1e-6)
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return copy, 2 * 8192**3 / (time_graph([lambda: x @ x] * 3) * 1e-6)


def repeat(count: int) -> int:
    return max(2, min(count, 40))


def time_bf16(n, k, m) -> float:
    copies = repeat(COLD_BYTES // (n * k * 2) + 1)
    weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return time_graph([lambda w=w: F.linear(x, w) for w in weights] * (3 if m <= 512 else 1))


def time_fp4(kernels, mode, n, k, m) -> float:
    copies = repeat(COLD_BYTES * 2 // (n * k) + 1)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    g = torch.tensor([64.0], device="cuda") if mode.format == "nvfp4" and mode.activations == "fp4" else None
    weight = ref.random_weight(n, k, mode.format, "cuda")
    first = kernels.prepare_weight(*weight)
    prepared = [first] + [(first[0].clone(), first[1]) for _ in range(copies - 1)]

    def call(p):
        return kernels.linear(
            x,
            *p,
            None,
            activations=mode.activations,
            hadamard=mode.hadamard,
            rule=mode.rule,
            input_global_scale=g,
        )

    rows = slice(0, min(m, 256))
    want = ref.activation_values(x[rows], mode, g).float() @ ref.weight_values(*weight).float().T
    error = ref.relative_error(call(prepared[-1])[rows], want.double())
    if not error < 6e-3:
        raise SystemExit(f"{mode.id} m={m} n={n} k={k}: wrong result, error {error:.2e}; not timed")
    return time_graph([lambda p=p: call(p) for p in prepared] * (3 if m <= 512 else 1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=int, nargs="+", default=[1, 16, 64, 128, 512, 4096])
    parser.add_argument("--mode", nargs="+", default=list(MODES)[:4], choices=list(MODES))
    parser.add_argument("--backend", default="cuda", choices=["cuda", "triton"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    kernels = load_variant(variant_paths()[args.backend])
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    bandwidth, rate = measure_bounds()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s")
    results = []
    print(
        f"{'M':>5} {'mode':<20} "
        + " ".join(f"{name + ' us (x, %)':>22}" for name in LLAMA_8B)
        + f" {'sum us':>8} {'x bf16':>7}"
    )
    for m in args.m:
        bf16 = {name: time_bf16(n, k, m) for name, (n, k) in LLAMA_8B.items()}
        total = sum(bf16.values())
        print(f"{m:>5} {'bf16':<20} " + " ".join(f"{t:>22.1f}" for t in bf16.values()) + f" {total:>8.1f}")
        for name in args.mode:
            mode, cells, times = MODES[name], [], {}
            for layer, (n, k) in LLAMA_8B.items():
                t = times[layer] = time_fp4(kernels, mode, n, k, m)
                bytes_ = n * k * (0.5625 if mode.format == "nvfp4" else 0.53125) + 2 * m * (n + k)
                speed = rate * (2 if name.startswith("mxfp4_w4a4") else 1)
                bound = max(bytes_ / bandwidth, 2 * m * n * k / speed) * 1e6
                cells.append(f"{t:>8.1f} ({bf16[layer] / t:>4.2f}, {100 * bound / t:>3.0f}%)")
            fp4 = sum(times.values())
            results.append(
                {"m": m, "mode": name, "us": times, "sum": fp4, "bf16_us": bf16, "ratio": total / fp4}
            )
            print(
                f"{m:>5} {name:<20} "
                + " ".join(f"{c:>22}" for c in cells)
                + f" {fp4:>8.1f} {total / fp4:>7.2f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
