"""A run with a work_dir: killed anywhere, it resumes and ends in the same bytes; it never takes another run's blocks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_zoo import tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_fp4
from hf_fp4 import MRGPTQConfig
from hf_fp4.calibration import checkpoint
from hf_fp4.calibration.checkpoint import WorkDir, weights_fingerprint
from hf_fp4.calibration.group import Group

pytestmark = pytest.mark.once

FAMILY = "llama-200"
TOKENS = list(tiny_tokens(2, 16))
SIZES = {"num_samples": 2, "sequence_length": 16, "batch_size": 1}
BLOCKS = ["block-00000.safetensors", "block-00001.safetensors"]


def config(work: Path | None, **changes) -> MRGPTQConfig:
    return MRGPTQConfig(**{"dataset": TOKENS, "work_dir": work, **SIZES, **changes})


def quantize(source: Path, work: Path | None = None, **changes) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config(work, **changes))


def state(model: PreTrainedModel) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model(FAMILY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def unbroken(source) -> PreTrainedModel:
    return quantize(source)


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory) -> Path:
    """The work_dir of a finished run; not to be written to."""
    work = tmp_path_factory.mktemp("finished") / "work"
    quantize(source, work)
    return work


@pytest.fixture
def solved(monkeypatch) -> list[str]:
    """Titles of the groups that are solved."""
    titles: list[str] = []
    solve = Group.solve
    monkeypatch.setattr(Group, "solve", lambda g: titles.append(g._title) or solve(g))
    return titles


# --- killed

KILLED = """
import os, signal, sys
from pathlib import Path
from transformers import AutoModelForCausalLM
from hf_fp4 import MRGPTQConfig
from hf_fp4.calibration import checkpoint, driver
from hf_fp4.calibration.group import Group

source, works, tokens, sizes = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]), eval(sys.argv[4])
countdown = [0]


def event():
    countdown[0] -= 1
    if countdown[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def around(owner, name):
    function = getattr(owner, name)

    def wrapped(*args, **kwargs):
        event()
        result = function(*args, **kwargs)
        event()
        return result

    setattr(owner, name, wrapped)


def torn(tensors, path, metadata, write=checkpoint.save_file):
    write(tensors, path, metadata)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    event()
    path.write_bytes(whole)
    event()


around(Group, "solve")
around(driver._Block, "replace")
around(checkpoint.os, "replace")
checkpoint.save_file = torn

for moment in range(1, 1000):
    child = os.fork()
    if child == 0:
        countdown[0] = moment
        config = MRGPTQConfig(dataset=tokens, work_dir=works / str(moment), **sizes)
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) == 0:
        break  # it came to its end before the moment
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
"""


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory) -> list[Path]:
    """The work_dirs of runs that were killed, each a step later than the one before, and of one that was not."""
    works = tmp_path_factory.mktemp("killed")
    arguments = [source, works, [tokens.tolist() for tokens in TOKENS], SIZES]
    run = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(hf_fp4.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return sorted(works.iterdir(), key=lambda work: int(work.name))


def names(work: Path) -> list[str]:
    return sorted(file.name for file in work.iterdir())


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(killed, source, unbroken, solved, tmp_path):
    expected = state(unbroken)
    seen = set()
    for original in killed:
        work = shutil.copytree(original, tmp_path / original.name)
        found = names(work)
        if tuple(found) in seen:
            continue  # nothing that a resumed run could see differs
        seen.add(tuple(found))
        solved.clear()
        again = quantize(source, work)
        assert state(again) == expected, f"killed at {work.name}, with {found}"
        for index, block in enumerate(BLOCKS):  # finished ones are taken over, others are not
            assert any(f"layers.{index}." in title for title in solved) == (block not in found)
        assert [row.error for row in again.hf_quantizer.report] == [
            row.error for row in unbroken.hf_quantizer.report
        ]
        assert again.config.quantization_config.to_dict() == unbroken.config.quantization_config.to_dict()
        assert [name for name in names(work) if "block" in name] == BLOCKS
    partial = [[name for name in found if name.endswith(".partial")] for found in seen]
    assert ["manifest.partial"] in partial
    assert ["block-00000.partial"] in partial and ["block-00001.partial"] in partial


def test_a_block_appears_when_it_is_whole(killed):
    stages = [[name for name in names(work) if name in BLOCKS] for work in killed]
    assert stages == sorted(stages) and stages[-1] == BLOCKS
    assert {len(stage) for stage in stages} == {0, 1, 2}
    for work in killed:
        for block in range(2):
            if (work / BLOCKS[block]).exists():
                tensors, metadata = WorkDir(work, json.loads((work / "manifest.json").read_text())).load(
                    block
                )
                assert len(metadata["reports"]) == 6
                assert {name.rpartition(".")[2] for name in tensors} >= {"weight", "weight_scale"}


def test_an_interrupt_leaves_what_is_finished(source, unbroken, solved, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:

        def interrupted(group):
            if ".1." in group.prefix + ".":
                raise KeyboardInterrupt
            return solve(group)

        solve = Group.solve
        patch.setattr(Group, "solve", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, tmp_path)
    assert names(tmp_path) == [BLOCKS[0], "manifest.json"]
    solved.clear()
    assert state(quantize(source, tmp_path)) == state(unbroken)
    assert all("layers.1." in title for title in solved)


def test_a_full_disk_leaves_what_is_finished(source, unbroken, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        if "00001" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    save = checkpoint.save_file
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(OSError, match="No space left"):
            quantize(source, tmp_path)
    assert names(tmp_path) == [BLOCKS[0], "block-00001.partial", "manifest.json"]
    assert state(quantize(source, tmp_path)) == state(unbroken)


def test_a_finished_run_is_taken_over_whole(source, unbroken, finished, solved):
    before = {name: (finished / name).stat().st_mtime_ns for name in names(finished)}
    again = quantize(source, finished)
    assert solved == []
    assert state(again) == state(unbroken)
    assert {name: (finished / name).stat().st_mtime_ns for name in names(finished)} == before


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("opt", {"format": "mxfp4"}),
        ("opt", {"activations": "bf16", "hadamard_group_size": 16}),
        ("llama", {"modules_to_not_convert": ("model.layers.0",)}),
        ("phi3", {"method": "rtn", "scale_rule": "hessian"}),
    ],
)
def test_other_models_and_fields_resume(family, changes, solved, tmp_path):
    """With biases, without input scales, with a block in which nothing converts, with a tuple, which JSON has not."""
    tiny_model(family).save_pretrained(tmp_path / "model")
    first = quantize(tmp_path / "model", tmp_path / "work", **changes)
    solved.clear()
    again = quantize(tmp_path / "model", tmp_path / "work", **changes)
    assert solved == []
    assert state(again) == state(first)
    (tmp_path / "work" / BLOCKS[1]).unlink()
    assert state(quantize(tmp_path / "model", tmp_path / "work", **changes)) == state(first)
    assert solved


def test_a_work_dir_changes_nothing(source, unbroken, tmp_path):
    work = tmp_path / "not" / "yet" / "there"
    assert state(quantize(source, work)) == state(unbroken)
    assert names(work) == [*BLOCKS, "manifest.json"]
    assert state(quantize(source, str(work))) == state(unbroken)


# --- another run's


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"dataset": list(tiny_tokens(2, 16, seed=1))}, "dataset"),
        ({"dataset": list(tiny_tokens(8, 16)), "seed": 1}, "config, dataset"),
        ({"sequence_length": 8}, "config, dataset"),
        ({"format": "mxfp4"}, "config"),
        ({"error_correction": 0.0}, "config"),
        ({"hadamard_group_size": 16}, "config"),
        ({"batch_size": 2}, "config"),
        ({"modules_to_not_convert": ["down_proj"]}, "config"),
    ],
)
def test_the_blocks_of_another_run_are_refused(changes, what, source, finished):
    message = (
        f"work_dir {finished} belongs to another run: {what} differ; give this run a directory of its own"
    )
    with pytest.raises(ValueError, match=message):
        quantize(source, finished, **changes)


def test_the_blocks_of_another_version_are_refused(source, finished, monkeypatch):
    monkeypatch.setattr("hf_fp4.calibration.checkpoint.__version__", "0.0.9")
    with pytest.raises(ValueError, match="belongs to another run: version of hf_fp4 differ"):
        quantize(source, finished)


@pytest.mark.parametrize("change", ["one weight", "dtype", "another model"])
def test_the_blocks_of_another_model_are_refused(change, finished, tmp_path):
    other = tiny_model("llama" if change == "another model" else FAMILY)
    if change == "one weight":
        with torch.no_grad():
            other.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    other.to(torch.bfloat16 if change == "dtype" else torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belongs to another run: model differ"):
        quantize(tmp_path, finished)


def test_the_same_tokens_from_elsewhere_are_the_same_dataset(source, finished, solved):
    quantize(source, finished, dataset=torch.stack(TOKENS))
    assert solved == []


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def test_a_damaged_block_is_refused(source, copied):
    file = copied / BLOCKS[1]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"the finished block {file} is damaged .*; delete it, and it is"):
        quantize(source, copied)


def test_a_damaged_manifest_is_refused(source, copied):
    (copied / "manifest.json").write_text('{"model": ')
    with pytest.raises(ValueError, match=r"manifest.json is damaged .*; delete the directory"):
        quantize(source, copied)


def test_a_block_with_bad_scales_is_refused(source, copied):
    work = WorkDir(copied, json.loads((copied / "manifest.json").read_text()))
    tensors, metadata = work.load(0)
    name = "self_attn.o_proj.weight_scale"
    tensors[name] = torch.zeros_like(tensors[name].view(torch.uint8)).view(tensors[name].dtype)
    work.save(0, tensors, metadata)
    with pytest.raises(ValueError, match=rf"model\.layers\.0\.{name} holds .* zero, negative or NaN"):
        quantize(source, copied)


def test_the_fingerprint_sees_every_byte_and_name():
    weight = torch.randn(100, 100, generator=torch.Generator().manual_seed(0))
    base = weights_fingerprint([("a", weight)])
    changed = weight.clone()
    changed[57, 31] = torch.nextafter(changed[57, 31], torch.tensor(9.0))
    assert weights_fingerprint([("a", weight.clone())]) == base
    others = [
        [("a", changed)],
        [("b", weight)],
        [("a", weight.view(50, 200))],
        [("a", weight), ("b", weight)],
    ]
    assert len({base, *map(weights_fingerprint, others)}) == 5
    assert weights_fingerprint([("a", weight.bfloat16())]) != weights_fingerprint([("a", weight.half())])
