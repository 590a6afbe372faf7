"""Times every way to multiply tokens (operand and `split` of prepared_gemm) on the linears of Llama-3.1-8B.

    python benchmarks/sweep_variants.py [--m 1 64] [--format mxfp4] [--operand e4m3_tiles e4m3_rows] [--json out.json]

Whole linears (rotation, activation quantization, product) in CUDA graphs with cold weights, like benchmark_linear.py; one
line per problem: `linear` (the released choice), then the variants, fastest first. Variants are named
1000 * operand + split (problems.choices). A variant whose result is wrong, or differs between two runs, or that raises, is
FAILED and not timed. The work is done by a second process, so that a variant that hangs or breaks the CUDA context costs a
restart and not the sweep.
"""

import argparse
import json
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]

from problems import FLOORS, LLAMA_8B, Mode, choices

OPERANDS = {"bf16": 0, "e4m3_tiles": 3, "e4m3_rows": 4}  # of _cuda.py, those that a variant can name
MODES = {"nvfp4": Mode("nvfp4", "fp4", 16), "mxfp4": Mode("mxfp4", "fp4", 32)}
LINEAR = 0  # in the place of a variant: the op as released
START_SECONDS, TASK_SECONDS = 60, 10  # silence after which the worker counts as hung
MOST_CRASHES = 2  # of one kernel; then its other variants are left out
REPLAYS = 5


def tasks(sizes, formats, operands):
    """(M, format, layer, variant): a problem's variants follow each other."""
    numbers = [OPERANDS[name] for name in operands]
    return [
        (m, format, layer, variant)
        for m in sizes
        for format in formats
        for layer in LLAMA_8B
        for variant in [LINEAR, *choices(m, format)]
        if variant == LINEAR or variant // 1000 in numbers
    ]


def kernel_of(m, variant):
    """Variants that are likely to fail together."""
    return (
        (m, variant)
        if variant == LINEAR or (m <= 16 and variant < 1000)
        else (variant // 1000, variant % 100 > 9)
    )


# ---- The worker: does tasks from the list on its input, one line of output before and after each ----------------------
class Problems:
    """Weights and expected results, made when a task first needs them."""

    def __init__(self):
        import torch
        from conftest import load_variant, variant_paths

        self.torch = torch
        self.kernels = load_variant(variant_paths()["cuda"])
        self.weights, self.key, self.inputs = {}, None, None

    def weight(self, format, layer):
        import reference as ref
        from benchmark_linear import COLD_BYTES, repeat

        if (format, layer) not in self.weights:
            n, k = LLAMA_8B[layer]
            stored = ref.random_weight(n, k, format, "cuda")
            first = self.kernels.prepare_weight(*stored)
            copies = repeat(COLD_BYTES * 2 // (n * k) + 1)
            self.weights[format, layer] = (
                stored,
                [first] + [(first[0].clone(), first[1]) for _ in range(copies - 1)],
            )
        return self.weights[format, layer]

    def problem(self, m, format, layer):
        import reference as ref

        if self.key != (m, format, layer):
            torch, mode = self.torch, MODES[format]
            torch.cuda.empty_cache()  # every graph had its own memory
            torch.manual_seed(m)
            stored, _ = self.weight(format, layer)
            x = torch.randn(m, LLAMA_8B[layer][1], device="cuda", dtype=torch.bfloat16)
            g = torch.tensor([64.0], device="cuda") if format == "nvfp4" else None
            self.key = m, format, layer
            self.inputs = x, g, *ref.expected(x, stored, None, mode, g, FLOORS["bfloat16"])
        return self.inputs

    def run(self, m, format, layer, variant) -> float:
        import reference as ref
        from benchmark_linear import time_graph

        x, g, exact, limit = self.problem(m, format, layer)
        prepared = self.weight(format, layer)[1]
        ops, numbers, mode = self.kernels._ops.ops, self.kernels._cuda, MODES[format]
        operand, split = variant // 1000, variant % 1000
        if variant == LINEAR and format == "mxfp4":
            operand = numbers.OPERANDS["e4m3"]

        def call(p):
            if variant == LINEAR:
                (y,) = ops.prepared_linears(
                    x, None, *([v] for v in p), [None], g, operand, True, mode.hadamard, 0
                )
                return y
            tokens = ops.prepare_activation(
                x, None, g, numbers.FORMATS[format], operand, True, mode.hadamard, 0
            )
            return ops.prepared_gemm(*tokens, *p, None, m, operand, True, split)

        first, second = call(prepared[-1]), call(prepared[0])
        error = ref.relative_error(first, exact)
        if not error <= limit:
            raise ValueError(f"error {error:.1e}, limit {limit:.1e}")
        if not self.torch.equal(first, second):
            raise ValueError("two runs differ")
        return time_graph([lambda p=p: call(p) for p in prepared], REPLAYS)


def work() -> None:
    problems = Problems()
    print("ready", problems.torch.cuda.get_device_name(), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = {"us": problems.run(*task)}
        except (RuntimeError, ValueError) as error:
            answer = {"failed": (str(error).strip() or repr(error)).splitlines()[0][:120]}
        print(json.dumps(answer), flush=True)
        if "failed" in answer:
            try:
                problems.torch.cuda.synchronize()
            except RuntimeError:
                sys.exit(1)  # the CUDA context is lost


# ---- The other side ----------------------------------------------------------------------------------------------------
class Worker:
    def __init__(self):
        self.lines = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        threading.Thread(target=self._read, args=(self.process.stdout, self.lines), daemon=True).start()
        self.greeting = self.next_line(START_SECONDS)
        if self.greeting is None:
            self.close()
            raise SystemExit("the worker did not start")

    @staticmethod
    def _read(stream, lines):
        for line in stream:
            lines.put(line)
        lines.put(None)

    def next_line(self, seconds):
        """None: it hangs or has ended."""
        try:
            return self.lines.get(timeout=seconds)
        except queue.Empty:
            return None

    def do(self, task):
        try:
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()
        except OSError:
            return None
        line = self.next_line(TASK_SECONDS)
        return None if line is None else json.loads(line)

    def close(self):
        self.process.kill()
        self.process.wait()


def report(problem, results) -> None:
    m, format, layer = problem
    released = results.get(LINEAR, {})
    others = {v: r for v, r in results.items() if v != LINEAR}
    timed = sorted((r["us"], v) for v, r in others.items() if "us" in r)
    failed = [f"{v}: {r['failed']}" for v, r in results.items() if "failed" in r]
    cells = [
        f"{m:>4} {format} {layer:<8} linear " + (f"{released['us']:.1f}" if "us" in released else "FAILED")
    ]
    cells += [" ".join(f"{v}:{us:.1f}" for us, v in timed)]
    if failed:
        cells.append("FAILED " + "; ".join(failed))
    print(" | ".join(cells), flush=True)


def summary(results, sizes, formats) -> None:
    """Per layer sums: as released, and with the fastest variant of each linear."""
    for m in sizes:
        for format in formats:
            rows = [results.get((m, format, layer), {}) for layer in LLAMA_8B]
            if not all("us" in row.get(LINEAR, {}) for row in rows):
                continue
            best = [min((r["us"], v) for v, r in row.items() if "us" in r) for row in rows]
            print(
                f"{m:>4} {format} sum: released {sum(row[LINEAR]['us'] for row in rows):.1f},"
                f" fastest {sum(us for us, _ in best):.1f} ({', '.join(str(v) for _, v in best)})"
            )


def sweep(todo, seconds):
    results, crashes, worker, begin = {}, Counter(), None, time.monotonic()
    for i, task in enumerate(todo):
        m, format, layer, variant = task
        kernel, problem = kernel_of(m, variant), (m, format, layer)
        if crashes[kernel] >= MOST_CRASHES:
            answer = {"failed": "left out after crashes"}
        elif time.monotonic() - begin > seconds:
            answer = {"failed": "no time left"}
        else:
            if worker is None:
                worker = Worker()
                print(worker.greeting.strip(), flush=True)
            answer = worker.do(task)
            if answer is None or worker.process.poll() is not None:
                crashes[kernel] += 1
                worker.close()
                worker = None
            answer = answer or {"failed": "hangs, or ended the process"}
        results.setdefault(problem, {})[variant] = answer
        if i + 1 == len(todo) or todo[i + 1][:3] != task[:3]:
            report(problem, results[problem])
    if worker is not None:
        worker.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--m", type=int, nargs="+", default=[64, 1, 128, 16, 32, 2, 17, 8, 96])
    parser.add_argument("--format", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--operand", nargs="+", default=list(OPERANDS), choices=list(OPERANDS))
    parser.add_argument("--seconds", type=float, default=90, help="no new variant is started after this long")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work()
    results = sweep(tasks(args.m, args.format, args.operand), args.seconds)
    summary(results, args.m, args.format)
    if args.json:
        flat = [{"problem": list(p), "variant": v, **r} for p, row in results.items() for v, r in row.items()]
        args.json.write_text(json.dumps(flat, indent=1))


if __name__ == "__main__":
    main()
