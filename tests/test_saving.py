"""Saving and reloading: the same logits in a new process, the same bytes when saved again, nothing lost when it fails."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from model_zoo import skeleton, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from hf_fp4 import FP4Linear, MRGPTQConfig

RELOAD = """
import sys, torch
{imports}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


def quantized(family: str = "llama", **changes):
    """A calibrated tiny model, as from_pretrained returns it."""
    sizes = {"num_samples": 4, "sequence_length": 16, "batch_size": 2, "dataset": list(tiny_tokens(4, 16))}
    return quantize(tiny_model(family), **{**sizes, **changes})


def quantize(model, **options):
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        return type(model).from_pretrained(directory, quantization_config=MRGPTQConfig(**options))


def weights(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir()) if file.suffix != ".json"}


def reload(directory: Path, tmp_path: Path, imports: str = "import hf_fp4") -> subprocess.CompletedProcess:
    torch.save(tiny_tokens(2, 16, seed=3), tmp_path / "tokens.pt")
    code = RELOAD.format(imports=imports)
    arguments = [
        str(directory),
        str(tmp_path / "tokens.pt"),
        str(tmp_path / "logits.pt"),
        str(tmp_path / "again"),
    ]
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("options", [{}, {"format": "mxfp4"}, {"activations": "bf16"}, {"method": "rtn"}])
def test_a_new_process_gives_the_same_logits_and_bytes(options, shard_size, tmp_path):
    model = quantized("qwen2", **options)
    out = tmp_path / "out"
    model.save_pretrained(out, max_shard_size=shard_size)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    done = reload(out, tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tiny_tokens(2, 16, seed=3)).logits)
    whole = tmp_path / "whole"
    model.save_pretrained(whole)
    assert weights(tmp_path / "again") == weights(whole)
    configs = [json.loads((d / "config.json").read_text()) for d in (tmp_path / "again", whole)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_without_hf_fp4_transformers_refuses_it(tmp_path):
    quantized().save_pretrained(tmp_path / "out")
    done = reload(tmp_path / "out", tmp_path, imports="")
    assert done.returncode != 0 and not (tmp_path / "logits.pt").exists()
    assert "Unknown quantization type, got mr_gptq" in done.stderr
    if transformers.__version__ >= "5.2":
        assert "mismatch" in done.stderr.lower()
    note = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["how_to_load"]
    assert "import hf_fp4" in note and "pip install hf-fp4" in note


def test_what_is_stored(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.0.self_attn."
    k = model.config.hidden_size
    for name in ("q_proj", "k_proj", "v_proj"):
        tensors = {
            key.removeprefix(f"{prefix}{name}."): t for key, t in stored.items() if f"{prefix}{name}." in key
        }
        rows = tensors["weight"].shape[0]
        assert {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()} == {
            "weight": (torch.uint8, (rows, k // 2)),
            "weight_scale": (torch.float8_e4m3fn, (rows, k // 16)),
            "weight_global_scale": (torch.float32, (1,)),
            "input_global_scale": (torch.float32, (1,)),
        }
        for shared in ("weight_global_scale", "input_global_scale"):
            assert torch.equal(tensors[shared], stored[f"{prefix}q_proj.{shared}"])
    linears = sum(isinstance(module, FP4Linear) for module in model.modules())
    assert len(model.config.quantization_config.modules) == linears == 14


def test_the_model_without_its_head_reloads(tmp_path):
    model = quantized()
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path)
    tokens = tiny_tokens(1, 12, seed=4)
    with torch.no_grad():
        assert torch.equal(bare(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_dequantize_gives_back_linears(tmp_path):
    model = quantized(activations="bf16")
    tokens = tiny_tokens(2, 16, seed=3)
    with torch.no_grad():
        expected = model(tokens).logits
        plain = model.dequantize()
        assert not any(isinstance(module, FP4Linear) for module in plain.modules())
        torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-3, atol=1e-3)
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


# --- a save that fails


def test_a_full_disk_leaves_the_old_files(tmp_path, monkeypatch):
    first, second = quantized(), quantized(activations="bf16")
    first.save_pretrained(tmp_path, max_shard_size="20KB")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(before) > 4

    import transformers.modeling_utils as modeling

    real, calls = modeling.safe_save_file, []

    def save(tensors, filename, **kwargs):
        calls.append(filename)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(tensors, filename, **kwargs)

    monkeypatch.setattr(modeling, "safe_save_file", save)
    with pytest.raises(OSError, match="No space left"):
        second.save_pretrained(tmp_path, max_shard_size="20KB")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_failed_first_save_leaves_no_directory(tmp_path, monkeypatch):
    import transformers.modeling_utils as modeling

    def save(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = quantized()
    monkeypatch.setattr(modeling, "safe_save_file", save)
    with pytest.raises(OSError, match="No space left"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_saving_again_removes_what_the_earlier_save_sharded(tmp_path):
    model = quantized()
    (tmp_path / "notes.txt").write_text("keep me")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    model.save_pretrained(tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert {name for name in names if "safetensors" in name} == {"model.safetensors"}
    assert {"notes.txt", "config.json"} <= names and not any(name.startswith(".") for name in names)


# --- a checkpoint that is damaged


def damaged(tmp_path: Path, change) -> Path:
    """A saved model whose file ``change`` edited as a dict."""
    quantized().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return tmp_path


NAME = "model.layers.1.mlp.gate_proj"


def with_scale(value: int):
    def change(tensors):
        tensors[f"{NAME}.weight_scale"].view(torch.uint8)[3, 2] = value

    return change


def with_tensor(key: str, value):
    def change(tensors):
        tensors[f"{NAME}.{key}"] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_scale(0), r"weight_scale holds 1 zero, negative or NaN scales, the first at \[3, 2\]"),
        (with_scale(0x7F), "weight_scale holds 1 zero, negative or NaN"),
        (with_scale(0x85), "weight_scale holds 1 zero, negative or NaN"),
        (
            with_tensor("weight_global_scale", torch.zeros(1)),
            "weight_global_scale must be a positive finite number",
        ),
        (
            with_tensor("input_global_scale", torch.tensor([torch.inf])),
            "input_global_scale must be a positive finite",
        ),
    ],
)
def test_a_bad_scale_is_refused(change, message, tmp_path):
    with pytest.raises(ValueError, match=f"{NAME}.{message}"):
        AutoModelForCausalLM.from_pretrained(damaged(tmp_path, change))


@pytest.mark.parametrize("key", ["weight", "weight_scale", "weight_global_scale", "input_global_scale"])
def test_a_missing_tensor_is_refused(key, tmp_path):
    def change(tensors):
        del tensors[f"{NAME}.{key}"]

    with pytest.raises(ValueError, match=f"the checkpoint has no tensor {NAME}.{key}; it is damaged"):
        AutoModelForCausalLM.from_pretrained(damaged(tmp_path, change))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", torch.zeros(8, 8, dtype=torch.uint8)),
        ("weight_scale", torch.ones(8, 3).to(torch.float8_e4m3fn)),
        ("weight_global_scale", torch.ones(2)),
    ],
)
def test_a_misshapen_tensor_is_refused(key, value, tmp_path):
    with pytest.raises((ValueError, RuntimeError)) as refusal:
        AutoModelForCausalLM.from_pretrained(damaged(tmp_path, with_tensor(key, value)))
    assert key in str(refusal.value) or "ignore_mismatched_sizes" in str(refusal.value)


def test_a_checkpoint_of_another_class_is_refused(tmp_path):
    quantized().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules"]["model.layers.7.mlp.up_proj"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"has no linear model\.layers\.7\.mlp\.up_proj \(and 0 more\)"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"reads safetensors only, got pytorch_model\.bin"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=MRGPTQConfig(method="rtn"))


def test_nothing_converts_twice():
    model = quantized()
    assert all(type(module) is not torch.nn.Linear or module is model.lm_head for module in model.modules())
    assert (
        skeleton("llama").config.tie_word_embeddings
        and model.lm_head.weight is model.model.embed_tokens.weight
    )
