"""Seconds and output error of hf-fp4's solver beside those of FP-Quant and llm-compressor, on the same matrices and moments.

    python examples/compare_solvers.py                                      # shapes of Llama-3.1-8B, hf-fp4 alone
    python examples/compare_solvers.py --fp-quant FP-Quant --llm-compressor # beside the others
    python examples/compare_solvers.py --shapes 576x576 1536x576 --device cpu

`--fp-quant` is a checkout of github.com/IST-DASLab/FP-Quant, of which only `src` is read; `--llm-compressor` needs llmcompressor
0.14 installed, or its directory and compressed-tensors' on PYTHONPATH. Each solver gets the weight and the second moments of its
inputs and chooses scales, factors and rounds. The error is what the rounded weight changes in the outputs, squared, over the
outputs squared, in exact arithmetic on those moments. None rotates or corrects its target here, each layer is solved by itself,
and scales of activations play no part. The second of two runs is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
import types
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_fp4 import MRGPTQConfig
from hf_fp4.backends import select
from hf_fp4.gptq import activation_order, descend, output_power, round_weight, solve
from hf_fp4.hessian import OrderedFactor
from hf_fp4.scales import weight_global_scale, weight_scales

LLAMA_8B = ["4096x4096", "6144x4096", "28672x4096", "4096x14336"]
Solver = Callable[[Tensor, Tensor], Tensor]
"""Weight [N, K] and second moments [K, K], float32 -> the values of the rounded weight [N, K]; neither is changed."""


def ours(config: MRGPTQConfig, device: torch.device) -> Solver:
    """hf-fp4's, as a group of linears is solved, without rotation and correction."""
    fmt, kernels = config.fp4_format, select(config.kernel_source, device)

    def run(weight: Tensor, second: Tensor) -> Tensor:
        divisor = weight_global_scale(weight.abs().amax().view(1)) if fmt.has_global_scale else None
        scale = weight_scales(weight, fmt, config.weight_rule, divisor, second.diagonal())
        if config.method == "rtn":
            return round_weight(weight, scale, fmt, divisor).dequantize()
        order = activation_order(second)
        factor = OrderedFactor.of(second, order, config.damp_percent, "the matrix")
        rounded = solve(weight, scale, fmt, divisor, factor.upper(), order, kernels)
        if config.descent_passes:
            rounded = descend(weight, rounded, second, factor.added, config.descent_passes, kernels)
        return rounded.dequantize()

    return run


def fp_quant(checkout: Path, format: str) -> Solver:
    """FP-Quant's, with the options of its README: MSE scales, activation order, 1 % damping.

    What its solver's file imports for whole models is stood in for, since it asks for packages that the solver does without.
    """
    if not (checkout / "src" / "quantization" / "gptq.py").is_file():
        raise ValueError(f"--fp-quant must be a checkout of IST-DASLab/FP-Quant, got {checkout}")
    sys.path.insert(0, str(checkout.resolve()))

    def stand_in(name: str, **names: object) -> None:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(names)

    unused = dict.fromkeys(("BaseTransform", "build_transform", "get_transform_matrix"))
    stand_in("src.transforms.transforms", **unused)
    stand_in("src.quantization.accumulate_hessian", accumulate_hessian=None)
    unused = dict.fromkeys(("InputCollector", "ForwardInterrupt", "get_attention_layer", "get_mlp_layer"))
    stand_in(
        "src.utils.model_utils", get_number_of_rows_and_cols=lambda layer: tuple(layer.weight.shape), **unused
    )
    stand_in("src.quantization.rtn", rtn_quantization=None)
    from src.quantization.gptq import GPTQ
    from src.quantization.quantizer import Quantizer

    group, precision = (16, "e4m3") if format == "nvfp4" else (32, "e8m0")

    def run(weight: Tensor, second: Tensor) -> Tensor:
        quantizer = Quantizer(
            bits=4,
            format="nvfp" if format == "nvfp4" else "mxfp",
            granularity="group",
            observer="mse",
            group_size=group,
            scale_precision=precision,
        )
        quantizer.global_scale = quantizer.global_scale.to(weight.device)
        handle = GPTQ(as_linear(weight), quantizer, quantization_order="activation", rel_damp=0.01)
        handle.H, handle.num_samples = second.clone(), 1
        return handle.quantize()[0]

    return run


def llm_compressor(format: str) -> Solver:
    """llm-compressor's, with its defaults: min-max scales, static activation order, 1 % damping."""
    from compressed_tensors.quantization import ActivationOrdering, preset_name_to_scheme
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    args = preset_name_to_scheme("NVFP4" if format == "nvfp4" else "MXFP4", ["Linear"]).weights
    args = args.model_copy(update={"actorder": ActivationOrdering.WEIGHT})

    def run(weight: Tensor, second: Tensor) -> Tensor:
        layer = as_linear(weight)
        observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=args)
        layer.register_module("weight_observer", observer)
        observer.attach(layer)
        found = observer(layer.weight).get_qparams()
        scale, zero, divisor = (found.get(key) for key in ("scale", "zero_point", "global_scale"))
        scale, zero = scale[None], None if zero is None else zero[None]
        divisor = None if divisor is None else divisor[None]
        values, _, failed = quantize_weight(
            weight[None].clone(), second[None].clone(), scale, zero, divisor, args
        )
        if failed.any():
            raise RuntimeError("llm-compressor fell back to rounding to nearest")
        return values[0]

    return run


def as_linear(weight: Tensor) -> nn.Linear:
    """A linear with this weight."""
    layer = nn.Linear(*weight.T.shape, bias=False, device="meta").requires_grad_(False)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return layer


def random_matrices(shape: str, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A weight, and moments of inputs that are correlated and of very different sizes, as in real models."""
    rows, columns = map(int, shape.split("x"))
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    mixing = draw(64, columns) * 0.3
    x = (draw(tokens, columns) + draw(tokens, 64) @ mixing) * draw(columns).exp()
    return draw(rows, columns) * 0.02, x.T @ x / tokens


def real_matrices(model: str, names: list[str], text: Path, tokens: int, device: torch.device) -> dict:
    """Weights of a model's linears, and the moments of their inputs on a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(model)(
        text.read_text(encoding="utf-8"), return_tensors="pt"
    ).input_ids
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def add(module: nn.Module, inputs: tuple) -> None:
            x = inputs[0].flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x.T @ x

        return add

    for name in names:
        loaded.get_submodule(name).register_forward_pre_hook(hook(name))
    used = ids[0, : tokens - tokens % 512].view(-1, 512).to(device)
    with torch.no_grad():
        for row in used:
            loaded(row[None])
    return {
        f"{name} {'x'.join(map(str, loaded.get_submodule(name).weight.shape))}": (
            loaded.get_submodule(name).weight.float(),
            sums[name] / used.numel(),
        )
        for name in names
    }


@torch.no_grad()
def measure(solver: Solver, weight: Tensor, second: Tensor) -> tuple[float, float]:
    """Seconds of the second run, and the relative output error."""
    for _ in range(2):
        synchronize(weight.device)
        start = time.perf_counter()
        values = solver(weight, second)
        synchronize(weight.device)
        seconds = time.perf_counter() - start
    lost = output_power(weight - values.float(), second) / output_power(weight, second)
    return seconds, lost.item()


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def solvers(args: argparse.Namespace, device: torch.device) -> dict[str, Solver]:
    """By title, in the order of the table."""
    found = {
        "hf-fp4, rounding": ours(MRGPTQConfig(format=args.format, method="rtn"), device),
        "hf-fp4, paper's recipe": ours(MRGPTQConfig.paper(args.format), device),
        "hf-fp4, defaults": ours(MRGPTQConfig(format=args.format), device),
    }
    if args.fp_quant:
        found["FP-Quant"] = fp_quant(args.fp_quant, args.format)
    if args.llm_compressor:
        try:
            title = f"llm-compressor {version('llmcompressor')}"
        except PackageNotFoundError as error:
            raise ValueError("--llm-compressor needs llmcompressor: pip install llmcompressor") from error
        found[title] = llm_compressor(args.format)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", default=LLAMA_8B, metavar="NxK", help="random matrices: outputs x inputs"
    )
    parser.add_argument("--model", help="instead, linears of this model ...")
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="... with these full names ...")
    parser.add_argument("--text", type=Path, help="... and their inputs on this text")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens that the moments are of")
    parser.add_argument("--format", default="nvfp4", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--fp-quant", type=Path, metavar="PATH", help="a checkout of FP-Quant")
    parser.add_argument("--llm-compressor", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    compared = solvers(args, device)
    where = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    )
    print(f"{where}, torch {torch.__version__}, {args.format}, {args.tokens} tokens\n", flush=True)
    print(f"| matrix | {' | '.join(compared)} |\n| --- |{' --- |' * len(compared)}", flush=True)
    if args.model:
        matrices = real_matrices(args.model, args.layers, args.text, args.tokens, device).items()
    else:
        matrices = ((shape, random_matrices(shape, args.tokens, device)) for shape in args.shapes)
    for title, (weight, second) in matrices:
        cells = (measure(solver, weight, second) for solver in compared.values())
        row = " | ".join(f"{seconds:.3f} s, {100 * error:.3f} %" for seconds, error in cells)
        print(f"| {title} | {row} |", flush=True)


if __name__ == "__main__":
    main()
