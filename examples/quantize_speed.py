"""How long quantizing takes, stage by stage, on a model of a given shape with random weights and random tokens.

    python examples/quantize_speed.py                      # Llama-3.1-8B's shape, 128 x 2048 tokens, on a GPU
    python examples/quantize_speed.py --layers 4           # four blocks of it; a block's time does not depend on its number
    python examples/quantize_speed.py --recipe paper --format mxfp4 --json times.json
    python examples/quantize_speed.py --shape llama-70b --layers 2 --model-device cpu --total-only    # weights wait on the CPU
    python examples/quantize_speed.py --recipe rtn         # rounding while a checkpoint loads, beside loading it as it is
    torchrun --nproc-per-node 2 examples/quantize_speed.py --layers 4    # two GPUs together; the first one's times

Stages are timed with the device synchronised before and after, which costs a little overlap; the total is of a second run
without that, unless `--stages-only`. What happens once, before the first block and at each kernel's first use, counts for
"everything else" or for the stage that meets it first: with few `--layers` it weighs more than in a whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_fp4 import MRGPTQConfig
from hf_fp4.calibration import data, driver, forwards, group

LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
LLAMA_70B = LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
SHAPES = {"llama-8b": LLAMA_8B, "llama-70b": LLAMA_70B}

STAGES: dict[str, tuple[Any, str]] = {
    "probe": (driver, "probe"),
    "equalization": (driver, "equalize"),
    "forward passes": (forwards.PausedForward, "_advance"),
    "second moments": (group.SecondMoments, "add"),
    "rotate and quantize inputs": (group.Group, "_quantize_input"),
    "choice of rotations": (group.Group, "_best_size"),
    "factorization": (group.OrderedFactor, "of"),
    "correction": (group.OrderedFactor, "correct_target"),
    "inverse of the factor": (group.OrderedFactor, "upper"),
    "scale search": (group, "weight_scales"),
    "columns (GPTQ)": (group, "solve"),
    "coordinate descent": (group, "descend"),
    "rounding to nearest": (group, "round_weight"),
    "error report": (group, "output_power"),
    "FP4 layers": (group.Group, "_take"),
}
"""Where each stage's time is taken; what a stage calls within another one counts for the inner one only."""


class Stopwatch:
    """Seconds per stage, of the innermost one that runs."""

    def __init__(self, synchronize: Callable[[], None]):
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._synchronize, self._running = synchronize, []

    def timed(self, stage: str, function: Callable) -> Callable:
        """``function``, its time added to ``stage``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append([stage, time.perf_counter()])
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()
                if self._running:
                    self._running[-1][1] = time.perf_counter()

        return run

    def _switch(self) -> None:
        self._synchronize()
        if self._running:
            stage, start = self._running[-1]
            self.seconds[stage] += time.perf_counter() - start


@contextmanager
def watching(watch: Stopwatch):
    """Context in which every stage is timed."""
    with ExitStack() as stack:
        for stage, (owner, name) in STAGES.items():
            bound = owner.__dict__.get(name)
            if isinstance(bound, classmethod):
                wrapped = staticmethod(watch.timed(stage, getattr(owner, name)))
            else:
                wrapped = watch.timed(stage, getattr(owner, name))
            stack.enter_context(mock.patch.object(owner, name, wrapped))
        yield


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which shape, in which format, on which device."""
    parser.add_argument(
        "--shape",
        default="llama-8b",
        help=f"{', '.join(SHAPES)}, or a model whose config.json gives the shape",
    )
    parser.add_argument("--layers", type=int, help="number of decoder blocks")
    parser.add_argument("--format", default="nvfp4", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--activations", default="fp4", choices=["fp4", "bf16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def shape_of(name: str, layers: int | None) -> Any:
    """The config of a model of one of SHAPES, or of another model; with so many blocks, if given."""
    named = SHAPES.get(name)
    config = AutoConfig.from_pretrained(name) if named is None else LlamaConfig(**named)
    if layers:
        config.num_hidden_layers = layers
    return config


def random_model(config: Any, device: str) -> PreTrainedModel:
    """Weights as a fresh initialisation has them, in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def random_tokens(args: argparse.Namespace, vocab_size: int) -> data.CalibrationData:
    """Tokens drawn uniformly; timing does not depend on which they are."""
    ids = torch.randint(
        0, vocab_size, (args.num_samples, args.sequence_length), generator=torch.Generator().manual_seed(1)
    )
    return data.CalibrationData(list(ids.split(args.batch_size)), "random", "random tokens")


def quantize(args: argparse.Namespace, shape: Any, watch: Stopwatch | None) -> dict[str, float]:
    """One run; returns its seconds and, on a GPU, the peak of its memory over the weights in GB."""
    model = random_model(shape, args.device).to(args.model_device)
    make = MRGPTQConfig.paper if args.recipe == "paper" else MRGPTQConfig
    config = make(
        format=args.format,
        activations=args.activations,
        batch_size=args.batch_size,
        calibration_device=args.device if args.model_device != args.device else None,
    )
    tokens = random_tokens(args, model.config.vocab_size)
    on_gpu = torch.device(args.device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        weights = torch.cuda.memory_allocated()
    start = time.perf_counter()
    with watching(watch) if watch else ExitStack():
        driver.quantize_model(model, config, tokens)
    if on_gpu:
        torch.cuda.synchronize()
    result = {"seconds": time.perf_counter() - start}
    if on_gpu:
        result["peak_gb_over_weights"] = (torch.cuda.max_memory_allocated() - weights) / 1e9
        result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return result


def round_on_load(args: argparse.Namespace, shape: Any) -> dict[str, float]:
    """Seconds of loading a checkpoint from local files as it is, and rounded to FP4; both of files that were read before."""
    seconds = {}
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        random_model(shape, args.device).save_pretrained(directory)
        config = MRGPTQConfig(method="rtn", format=args.format, activations=args.activations)
        runs = {"first reading": None, "reading": None, "first reading and rounding": config}
        for name, quantization in {**runs, "reading and rounding": config}.items():
            start = time.perf_counter()
            model = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.bfloat16,
                device_map=args.model_device,
                quantization_config=quantization,
            )
            if torch.device(args.model_device).type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
            del model
    seconds["beyond reading"] = seconds["reading and rounding"] - seconds["reading"]
    return seconds


def table(stages: dict[str, float], total: float, layers: int) -> str:
    """Markdown: seconds per stage and per block, and their share."""
    rest = total - sum(stages.values())
    lines = ["| stage | s | s per block | share |", "| --- | --- | --- | --- |"]
    for name, seconds in [*stages.items(), ("everything else", rest), ("total", total)]:
        lines.append(f"| {name} | {seconds:.2f} | {seconds / layers:.3f} | {100 * seconds / total:.0f} % |")
    return "\n".join(lines)


def join_others() -> str | None:
    """The GPU of this process of torchrun's, of which the first one prints; None without torchrun or a GPU."""
    if "LOCAL_RANK" not in os.environ:
        return None
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    return f"cuda:{torch.cuda.current_device()}" if on_gpu else None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--recipe", default="default", choices=["default", "paper", "rtn"])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--model-device", help="where the weights are; default: where they are calibrated")
    parser.add_argument("--directory", type=Path, help="for rtn: where the checkpoint is written meanwhile")
    runs = parser.add_mutually_exclusive_group()
    runs.add_argument("--stages-only", action="store_true", help="leave out the run without stages")
    runs.add_argument("--total-only", action="store_true", help="leave out the run with stages")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    args.device = join_others() or args.device
    args.model_device = args.model_device or args.device
    shape = shape_of(args.shape, args.layers)
    name = torch.cuda.get_device_name() if torch.device(args.device).type == "cuda" else args.device
    print(
        f"{name}, torch {torch.__version__}, {shape.num_hidden_layers} blocks, {args.recipe} {args.format} {args.activations}"
    )

    result: dict[str, Any] = {}
    if args.recipe == "rtn":
        result["total"] = round_on_load(args, shape)
    elif not args.total_only:
        watch = Stopwatch(torch.cuda.synchronize if torch.cuda.is_available() else lambda: None)
        result = {"staged": quantize(args, shape, watch), "stages": watch.seconds}
        print(table(watch.seconds, result["staged"]["seconds"], shape.num_hidden_layers), flush=True)
    if not args.stages_only and args.recipe != "rtn":
        result["total"] = quantize(args, shape, None)
    shown = result.get("total") or result["staged"]
    print(", ".join(f"{key.replace('_', ' ')}: {value:.2f}" for key, value in shown.items()))
    if args.json and not (dist.is_initialized() and dist.get_rank()):
        args.json.write_text(json.dumps(result, indent=1))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
