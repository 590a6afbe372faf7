"""A run with a work_dir: killed anywhere, it resumes and ends in the same bytes; it never takes another run's blocks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_zoo import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM

from hf_fp4 import MRGPTQConfig
from hf_fp4.calibration import driver
from hf_fp4.calibration.checkpoint import WorkDir, weights_fingerprint

RUN = """
import os, sys
sys.path.insert(0, {tests!r})
import torch
from model_zoo import tiny_tokens
from transformers import AutoModelForCausalLM
import hf_fp4
import hf_fp4.calibration.checkpoint as checkpoint
from hf_fp4 import MRGPTQConfig

{sabotage}
config = MRGPTQConfig(dataset=list(tiny_tokens(4, 16)), num_samples=4, sequence_length=16, batch_size=2, work_dir={work!r})
AutoModelForCausalLM.from_pretrained({source!r}, quantization_config=config).save_pretrained({out!r})
"""
# Dies before the file of the second block is written, in the middle of writing it, and right after it got its name.
SABOTAGE = {
    "before": """
save = checkpoint.WorkDir.save
checkpoint.WorkDir.save = lambda self, block, *rest: os._exit(9) if block == 1 else save(self, block, *rest)
""",
    "within": """
def torn(tensors, path, metadata, write=checkpoint.save_file):
    write(tensors, path, metadata)
    if "00001" in str(path):
        os.truncate(path, os.path.getsize(path) // 2)
        os._exit(9)
checkpoint.save_file = torn
""",
    "after": """
replace = os.replace
def replaced(source, target):
    replace(source, target)
    if "00001" in str(target):
        os._exit(9)
checkpoint.os.replace = replaced
""",
}


def run(source: Path, work: Path | None, out: Path, sabotage: str = "") -> int:
    """The exit code of a new process that quantizes."""
    code = RUN.format(
        tests=str(Path(__file__).parent),
        sabotage=sabotage,
        work=work and str(work),
        source=str(source),
        out=str(out),
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


def saved_bytes(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.glob("*.safetensors"))}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model("llama-144").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def unbroken(source, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    assert run(source, None, out) == 0
    return out


@pytest.mark.parametrize("moment", SABOTAGE)
def test_a_killed_run_resumes_to_the_same_bytes(moment, source, unbroken, tmp_path):
    work, out = tmp_path / "work", tmp_path / "out"
    assert run(source, work, out, SABOTAGE[moment]) == 9
    assert not out.exists()
    finished = sorted(file.name for file in work.glob("*.safetensors"))
    assert finished == [f"block-{i:05d}.safetensors" for i in range(2 if moment == "after" else 1)]
    assert run(source, work, out) == 0
    assert saved_bytes(out) == saved_bytes(unbroken)
    assert (out / "config.json").read_bytes() == (unbroken / "config.json").read_bytes()


def config(work: Path, **changes) -> MRGPTQConfig:
    sizes = {"num_samples": 4, "sequence_length": 16, "batch_size": 2}
    return MRGPTQConfig(**{"dataset": list(tiny_tokens(4, 16)), "work_dir": work, **sizes, **changes})


def quantize(source: Path, config: MRGPTQConfig):
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


def test_finished_blocks_are_not_solved_again(source, tmp_path, monkeypatch):
    first = quantize(source, config(tmp_path))

    def solve(self):
        raise AssertionError("a finished block was solved again")

    monkeypatch.setattr(driver._Group, "solve", solve)
    again = quantize(source, config(tmp_path))
    tokens = tiny_tokens(2, 16, seed=3)
    assert torch.equal(first(tokens).logits, again(tokens).logits)
    assert first.hf_quantizer.report == again.hf_quantizer.report


def test_an_interrupt_leaves_what_is_finished(source, tmp_path, monkeypatch):
    real, calls = driver._Group.solve, []

    def solve(self):
        calls.append(self)
        if self.prefix.endswith(".1"):
            raise KeyboardInterrupt
        return real(self)

    monkeypatch.setattr(driver._Group, "solve", solve)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, config(tmp_path))
    assert [file.name for file in tmp_path.glob("block-*")] == ["block-00000.safetensors"]
    monkeypatch.setattr(driver._Group, "solve", real)
    assert quantize(source, config(tmp_path)).config.quantization_config.modules


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dataset": list(tiny_tokens(4, 16, seed=1))}, "dataset"),
        ({"error_correction": 0.0}, "config"),
        ({"batch_size": 4}, "config"),
        ({"format": "mxfp4"}, "config"),
    ],
)
def test_refuses_the_blocks_of_another_run(changes, what, source, tmp_path):
    quantize(source, config(tmp_path))
    with pytest.raises(ValueError, match=f"work_dir .* belongs to another run: {what} differ; give this run"):
        quantize(source, config(tmp_path, **changes))


def test_refuses_the_blocks_of_another_model(source, tmp_path):
    quantize(source, config(tmp_path / "work"))
    other = tiny_model("llama-144")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5  # one weight of one layer
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="belongs to another run: model differ"):
        quantize(tmp_path / "other", config(tmp_path / "work"))


def test_a_block_file_with_bad_scales_is_refused(source, tmp_path):
    quantize(source, config(tmp_path))
    identity = json.loads((tmp_path / "manifest.json").read_text())
    work = WorkDir(tmp_path, identity)
    tensors, metadata = work.load(0)
    name = next(key for key in tensors if key.endswith("weight_scale"))
    tensors[name] = torch.zeros_like(tensors[name].view(torch.uint8)).view(tensors[name].dtype)
    work.save(0, tensors, metadata)
    with pytest.raises(ValueError, match=r"model\.layers\.0\..*weight_scale holds .* zero"):
        quantize(source, config(tmp_path))


def test_the_fingerprint_sees_every_byte_and_name():
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    base = weights_fingerprint([("a", weight)])
    changed = weight.clone()
    changed[57, 31] += 1e-6
    assert weights_fingerprint([("a", weight.clone())]) == base
    assert len({base, weights_fingerprint([("a", changed)]), weights_fingerprint([("b", weight)])}) == 3
    assert weights_fingerprint([("a", weight.view(50, 200))]) != base
