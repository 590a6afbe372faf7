"""How fast a model of a given shape reads and writes in FP4, next to bf16, with random weights: no download, a minute or two.

    python examples/model_speed.py                                  # Llama-3.1-8B's shape writes 129 tokens, compiled
    python examples/model_speed.py --format mxfp4 --prompt-tokens 4096 --new-tokens 2 --not-compiled    # and reads a long prompt
    python examples/model_speed.py --shape Qwen/Qwen3-8B --layers 4

What is timed is what `hf-fp4 bench QUANTIZED --reference ORIGINAL --compile` times. Weights are rounded to nearest behind a Hadamard
rotation of the format's group size.
"""

from __future__ import annotations

import argparse

import torch
from quantize_speed import add_model_arguments, random_model, shape_of
from torch import nn
from transformers import PreTrainedModel

from hf_fp4 import MRGPTQConfig
from hf_fp4.bench import BenchSettings, bench
from hf_fp4.calibration.group import new_layer
from hf_fp4.gptq import round_weight
from hf_fp4.layers.experts import use_kernels
from hf_fp4.layers.linear import FP4Linear
from hf_fp4.layers.replace import replace_linears, select_linears
from hf_fp4.report import table
from hf_fp4.rotation import rotate
from hf_fp4.scales import input_global_scale, weight_global_scale, weight_scales

_LARGEST_INPUT = 8.0  # in place of a calibration


def to_fp4(model: PreTrainedModel, config: MRGPTQConfig) -> PreTrainedModel:
    """Rounds every linear that a quantization would convert."""
    fmt = config.fp4_format
    size, static = fmt.group_size, config.static_input_scale

    def rounded(name: str, linear: nn.Linear) -> FP4Linear:
        weight = rotate(linear.weight.detach().float(), size)
        divisor = weight_global_scale(weight.abs().amax().view(1)) if fmt.has_global_scale else None
        scales = weight_scales(weight, fmt, "absmax", divisor)
        layer = new_layer(linear, config, size, static_input_scale=static)
        largest = torch.full((1,), _LARGEST_INPUT, device=weight.device)
        layer.set_weight(
            round_weight(weight, scales, fmt, divisor),
            linear.bias,
            input_global_scale(largest) if static else None,
        )
        return layer

    replace_linears(model, rounded, select_linears(model, fmt).selected)
    use_kernels(model, config.kernel_source)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_arguments(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=129)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--not-compiled", action="store_true", help="decode without torch.compile")
    args = parser.parse_args()
    shape = shape_of(args.shape, args.layers)
    config = MRGPTQConfig(format=args.format, activations=args.activations)

    def load(name: str) -> PreTrainedModel:
        model = random_model(shape, args.device)
        return model if name == "bf16" else to_fp4(model, config)

    settings = BenchSettings(
        args.batch, args.prompt_tokens, args.new_tokens, not args.not_compiled, args.repeats
    )
    result = bench(load, f"{args.format} {args.activations}", "bf16", settings)
    print("\n".join([*table(result.rows()), "", *result.notes()]))


if __name__ == "__main__":
    main()
