"""Loads an export with vLLM on a CPU: what became of its tensors, and what it computes; see test_vllm.py.

vLLM has FP4 kernels for GPUs only, none for its CPU platform. They are stood in for: W4A4 nvfp4 by vLLM's own emulation, which
it keeps to GPUs, and weights only by the two classes here. Everything before them is vLLM's: the config, the choice of a scheme,
the fusing of layers, loading, what is made of the global scales, and the rest of the model.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels import linear as kernels
from vllm.model_executor.kernels.linear.mxfp4.base import MxFp4LinearKernel
from vllm.model_executor.kernels.linear.nvfp4.base import NvFp4LinearKernel
from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import (
    break_fp4_bytes,
    dequantize_to_dtype,
)
from vllm.platforms.interface import PlatformEnum


class Everywhere:
    """A kernel that is never refused and leaves the weights as they were loaded."""

    @classmethod
    def is_supported(cls, compute_capability=None):
        return True, None

    @classmethod
    def can_implement(cls, config):
        return True, None

    def process_weights_after_loading(self, layer):
        pass


class NvFp4Weights(Everywhere, NvFp4LinearKernel):
    """W4A16 nvfp4, with the weight unpacked by vLLM."""

    def apply_weights(self, layer, x, bias=None):
        scales = (layer.weight_scale, layer.weight_global_scale)
        return F.linear(x, dequantize_to_dtype(layer.weight, *scales, x.dtype, swizzle=False), bias)


class MxFp4Weights(Everywhere, MxFp4LinearKernel):
    """W4A16 mxfp4; a scale is a power of two."""

    def apply_weights(self, layer, x, bias=None):
        codes = break_fp4_bytes(layer.weight, torch.float32).unflatten(-1, (-1, 32))
        weight = codes * torch.exp2(layer.weight_scale.float() - 127)[..., None]
        return F.linear(x, weight.flatten(-2).to(x.dtype), bias)


def loaded(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Tensors of every FP4 layer, by name."""
    return {
        f"{name}.{key}": tensor.detach().clone().view(-1) if tensor.dim() == 0 else tensor.detach().clone()
        for name, layer in model.named_modules()
        if isinstance(
            getattr(getattr(layer, "scheme", None), "kernel", None), (Everywhere, NvFp4LinearKernel)
        )
        for key, tensor in layer.named_parameters(recurse=False)
    }


def main() -> None:
    """Arguments: the export, a file for the tensors, prompts as JSON lists of token ids. Prints a line of JSON."""
    directory, tensors, prompts = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    kernels._POSSIBLE_NVFP4_KERNELS[PlatformEnum.CPU] = [kernels.EmulationNvFp4LinearKernel]
    kernels._POSSIBLE_MXFP4_KERNELS[PlatformEnum.CPU] = [MxFp4Weights]
    kernels.MarlinNvFp4LinearKernel = NvFp4Weights  # to which vLLM resorts for weights only
    llm = LLM(
        directory,
        max_model_len=64,
        max_num_seqs=len(prompts),
        enforce_eager=True,
        skip_tokenizer_init=True,
        dtype="bfloat16",
    )
    save_file(llm.apply_model(loaded)[0], tensors)
    answers = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0, detokenize=False, ignore_eos=True),
    )
    found = [
        {
            "greedy": list(answer.outputs[0].token_ids),
            "prompt": [
                row[token].logprob
                for token, row in zip(answer.prompt_token_ids, answer.prompt_logprobs, strict=True)
                if row
            ],
        }
        for answer in answers
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
