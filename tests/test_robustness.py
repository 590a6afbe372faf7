"""Damaged and mixed-up checkpoints, configs from elsewhere, two savers at once, read-only disks, no network.

What is refused names the file or the tensor. Not noticed, as there are no checksums: other bytes inside the data of a
tensor, unless they make a scale invalid, and a shard of another model whose tensors have the same names, types and shapes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_zoo import save_with_tokenizer, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

import hf_fp4
from hf_fp4 import FP4Linear, MRGPTQConfig, checkpoint_files, export_compressed_tensors
from hf_fp4.checkpoint_files import staged

TOKENS = tiny_tokens(2, 16, seed=3)
INDEX = "model.safetensors.index.json"
NORM, EMBEDDINGS = "model.norm.weight", "model.embed_tokens.weight"
LAYER = "model.layers.1.mlp.up_proj"


def quantize(source: Path, **fields):
    sizes = {"num_samples": 4, "sequence_length": 16, "batch_size": 2}
    config = MRGPTQConfig(**{"dataset": list(tiny_tokens(4, 16)), **sizes, **fields})
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model, not rotated, and the same one rounded in another format."""
    source = tmp_path_factory.mktemp("source")
    tiny_model("qwen2").save_pretrained(source)
    return {
        "nvfp4": quantize(source, hadamard_group_size=None),
        "mxfp4": quantize(source, format="mxfp4", method="rtn"),
    }


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory):
    """Where both are saved in shards, the tensors of which are the same up to their format."""
    root = tmp_path_factory.mktemp("saved")
    for name, model in models.items():
        model.save_pretrained(root / name, max_shard_size="20KB")
    return root


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    """A copy of the nvfp4 checkpoint."""
    return Path(shutil.copytree(saved / "nvfp4", tmp_path / "checkpoint"))


def load(directory: Path):
    return AutoModelForCausalLM.from_pretrained(directory)


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.safetensors"))


def holder(directory: Path, tensor: str) -> Path:
    return directory / json.loads((directory / INDEX).read_text())["weight_map"][tensor]


def edit_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def remove(directory: Path, tensor: str) -> None:
    """From its shard and from the index, as if it had never been saved."""
    edit_tensors(holder(directory, tensor), lambda tensors: tensors.pop(tensor))
    edit_json(directory / INDEX, lambda index: index["weight_map"].pop(tensor))


def add(directory: Path, tensor: str, *, listed: bool) -> None:
    file = shards(directory)[1]
    edit_tensors(file, lambda tensors: tensors.update({tensor: torch.ones(1)}))
    if listed:
        edit_json(directory / INDEX, lambda index: index["weight_map"].update({tensor: file.name}))


# --- shards


def test_the_undamaged_copy_loads(checkpoint, models):
    assert len(shards(checkpoint)) >= 4
    assert torch.equal(logits(load(checkpoint)), logits(models["nvfp4"]))


def flip(position: int):
    def change(file: Path) -> None:
        data = bytearray(file.read_bytes())
        data[position] ^= 0xFF
        file.write_bytes(data)

    return change


UNREADABLE = {
    "half": lambda file: os.truncate(file, file.stat().st_size // 2),
    "one-byte-less": lambda file: os.truncate(file, file.stat().st_size - 1),
    "in-the-header": lambda file: os.truncate(file, 10),
    "empty": lambda file: os.truncate(file, 0),
    "length-of-header": flip(2),
    "json-of-header": flip(20),
    "a-web-page": lambda file: file.write_text("<html>404</html>"),
}


@pytest.mark.parametrize("which", [0, 2, -1])
@pytest.mark.parametrize("damage", UNREADABLE)
def test_an_unreadable_shard_is_named(damage, which, checkpoint):
    file = shards(checkpoint)[which]
    UNREADABLE[damage](file)
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read \(.*\); .*download it again"):
        load(checkpoint)


@pytest.mark.parametrize("damage", ["half", "json-of-header"])
def test_an_unreadable_shard_of_an_original_is_named(damage, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path, max_shard_size="40KB")
    file = shards(tmp_path)[1]
    UNREADABLE[damage](file)
    with pytest.raises(ValueError, match=rf"{file.name} cannot be read \(.*\); .*download it again"):
        quantize(tmp_path, method="rtn")


def test_a_missing_shard_is_named(checkpoint):
    file = shards(checkpoint)[1]
    file.unlink()
    with pytest.raises(ValueError, match=f"{file.name} is not there; .*download it again"):
        load(checkpoint)


def test_an_index_that_names_a_missing_shard(checkpoint):
    ghost = "model-00009-of-00009.safetensors"
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].update({NORM: ghost}))
    with pytest.raises(ValueError, match=f"{ghost} is not there; .*download it again"):
        load(checkpoint)


def test_an_index_that_names_a_missing_tensor(checkpoint):
    file = shards(checkpoint)[0].name
    edit_json(checkpoint / INDEX, lambda index: index["weight_map"].update({"model.gone": file}))
    with pytest.raises(
        ValueError, match=rf"{INDEX} says that model\.gone \(and 0 more\) is in {file}, it is in no"
    ):
        load(checkpoint)


def test_swapped_shards(checkpoint):
    """transformers would load it as it should be, but read the wrong file for a layer that it offloads to disk."""
    first, second = shards(checkpoint)[:2]
    first.rename(checkpoint / "aside")
    second.rename(first)
    (checkpoint / "aside").rename(second)
    with pytest.raises(
        ValueError, match=rf"says that .* is in {first.name}, it is in {second.name}; .*mixed up"
    ):
        load(checkpoint)


def test_a_shard_in_the_place_of_another(checkpoint):
    first, second = shards(checkpoint)[:2]
    shutil.copyfile(first, second)
    with pytest.raises(ValueError, match=rf"is in .*{first.name} and in {second.name}; .*mixed up"):
        load(checkpoint)


def test_a_tensor_in_two_shards(checkpoint):
    """The index and all other tensors are as they should be."""
    first, second = shards(checkpoint)[:2]
    name = next(iter(load_file(first)))
    edit_tensors(second, lambda tensors: tensors.update({name: load_file(first)[name] + 1}))
    message = rf"{name} is in .*{first.name} and in {second.name}; .*mixed up"
    with pytest.raises(ValueError, match=message):
        load(checkpoint)
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(checkpoint, checkpoint.parent / "exported")


def test_a_shard_of_another_model(checkpoint, tmp_path):
    tiny_model("opt").save_pretrained(tmp_path / "opt")
    quantize(tmp_path / "opt", method="rtn").save_pretrained(tmp_path / "other", max_shard_size="20KB")
    file = shards(checkpoint)[1]
    shutil.copyfile(shards(tmp_path / "other")[1], file)
    with pytest.raises(
        ValueError, match=rf"{INDEX} says that .* it is in .*; files of two checkpoints are mixed up"
    ):
        load(checkpoint)


def test_a_layer_of_another_format(checkpoint, saved, caplog):
    """Although the index agrees; transformers puts the name into a report that it logs."""
    for leaf in ("weight_global_scale", "input_global_scale"):
        remove(checkpoint, f"{LAYER}.{leaf}")
    for leaf in ("weight", "weight_scale"):
        name = f"{LAYER}.{leaf}"
        theirs = load_file(holder(saved / "mxfp4", name))[name]
        edit_tensors(holder(checkpoint, name), lambda tensors, new={name: theirs}: tensors.update(new))
    logging.enable_propagation()
    try:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            load(checkpoint)
    finally:
        logging.disable_propagation()
    assert f"{LAYER}.weight" in str(caught.value) + caplog.text


@pytest.mark.parametrize(
    "changed", [{"activations": "bf16"}, {"calibration": None}, {"format": "mxfp4"}], ids=str
)
def test_a_config_that_says_otherwise_than_the_tensors(changed, checkpoint):
    """With `activations` changed it would load, and compute something else."""
    changed = {"activation_scale_rule": None, **changed}
    edit_json(checkpoint / "config.json", lambda config: config["quantization_config"].update(changed))
    with pytest.raises(
        ValueError, match=r"got model\..*_global_scale in .*safetensors; .*config.json was changed"
    ):
        load(checkpoint)


@pytest.mark.parametrize("tensor", [NORM, EMBEDDINGS, "model.layers.0.self_attn.q_proj.bias"])
def test_a_tensor_that_was_never_saved(tensor, checkpoint):
    """transformers would draw random numbers for it."""
    remove(checkpoint, tensor)
    with pytest.raises(
        ValueError, match=rf"the checkpoint has no tensor {tensor}\b.*download or quantize it again"
    ):
        load(checkpoint)


@pytest.mark.parametrize(
    "tensor", [EMBEDDINGS, f"{LAYER}.weight", "model.layers.0.self_attn.q_proj.bias", NORM]
)
def test_an_original_that_lacks_a_tensor_is_not_calibrated(tensor, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    edit_tensors(tmp_path / "model.safetensors", lambda tensors: tensors.pop(tensor))
    with pytest.raises(ValueError, match=rf"no weight for {tensor}\b.*download it again"):
        quantize(tmp_path)


def test_a_new_head_is_random_as_ever(checkpoint, tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    config = MRGPTQConfig(dataset=list(tiny_tokens(4, 16)), num_samples=4, sequence_length=16)
    calibrated = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, quantization_config=config
    )
    assert isinstance(calibrated.get_submodule(LAYER), FP4Linear)
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3)
    assert model.score.weight.shape[0] == 3
    assert isinstance(model.get_submodule(LAYER), FP4Linear)


def test_a_head_of_another_size_may_be_asked_for(checkpoint, tmp_path):
    three = tmp_path / "three"
    AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=3).save_pretrained(three)
    labels = {"id2label": {n: str(n) for n in range(5)}, "label2id": {str(n): n for n in range(5)}}
    edit_json(three / "config.json", lambda config: config.update(labels))
    again = AutoModelForSequenceClassification.from_pretrained(three, ignore_mismatched_sizes=True)
    assert again.config.num_labels == 5  # older transformers keep the smaller head of a quantized model


def test_an_extra_tensor_that_the_index_does_not_list(checkpoint):
    add(checkpoint, "model.extra", listed=False)
    with pytest.raises(
        ValueError, match=rf"model\.extra .* is in no file, it is in {shards(checkpoint)[1].name}"
    ):
        load(checkpoint)


def test_an_extra_tensor_of_a_quantized_layer(checkpoint):
    """A zero point, say, would change what the bytes mean."""
    add(checkpoint, f"{LAYER}.weight_zero_point", listed=True)
    message = f"has weight, .*, got {LAYER}.weight_zero_point in .*{shards(checkpoint)[1].name}; .*again"
    with pytest.raises(ValueError, match=message):
        load(checkpoint)


def test_an_extra_tensor_of_nothing_changes_nothing(checkpoint, models):
    """transformers reports it; a model without its head has many."""
    add(checkpoint, "model.extra", listed=True)
    assert torch.equal(logits(load(checkpoint)), logits(models["nvfp4"]))


# --- configs


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"quant_method": "mr_gptq_2"}, "ignore_mismatched_sizes"),
        ({"quant_method": None}, "has no `quant_method`"),
        ({"hf_fp4_version": "99.0"}, r"unknown fields \['hf_fp4_version'\].*pip install -U hf-fp4"),
        ({"format": "nvfp4.1"}, "format must be one of 'nvfp4', 'mxfp4', got 'nvfp4.1'"),
        ({"modules": ["a list"]}, "modules must be what a run wrote, a dictionary, got"),
        (
            {"modules": {LAYER: "learned"}},
            f"the Hadamard size of {LAYER} must be one of None, 16, .*'learned'",
        ),
        ({"modules": {LAYER: 256}}, f"the Hadamard size of {LAYER} must be one of None, 16, .* got 256"),
        ({"calibration": "v2"}, "calibration must be what a run wrote, a dictionary, got 'v2'"),
    ],
    ids=str,
)
def test_a_quantization_config_of_the_future_is_refused(change, error, checkpoint):
    edit_json(checkpoint / "config.json", lambda config: config["quantization_config"].update(change))
    with pytest.raises((ValueError, RuntimeError), match=error):
        load(checkpoint)


def test_a_newer_transformers_with_unknown_keys_of_its_own_loads(checkpoint, models):
    future = {"transformers_version": "99.0.0", "a_new_setting": {"deeply": ["nested"]}}
    edit_json(checkpoint / "config.json", lambda config: config.update(future))
    assert torch.equal(logits(load(checkpoint)), logits(models["nvfp4"]))


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "qwen2"'])
def test_a_broken_config_json_is_refused(text, checkpoint):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises((ValueError, OSError), match=r"config|model_type|Expecting"):
        load(checkpoint)


def test_another_method_is_not_read_as_ours():
    with pytest.raises(
        ValueError, match="expected quant_method 'mr_gptq' .*got 'gptq'; load .* with the tool"
    ):
        MRGPTQConfig.from_dict({**MRGPTQConfig().to_dict(), "quant_method": "gptq"})


NUMBERS = (
    st.integers() | st.floats(allow_nan=False) | st.sampled_from([10**400, -(10**400), 2**63, float("inf")])
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
LIKELY = {
    "format": ["nvfp4", "mxfp4"],
    "activations": ["fp4", "bf16"],
    "method": ["mr-gptq", "rtn"],
    "hadamard_group_size": [None, "auto", 16, 128, 128.0, True],
    "scale_rule": ["auto", "mse", "four_over_six"],
    "activation_scale_rule": [None, "absmax", "mse", "four_over_six"],
    "act_order": [True, False, 1],
    "equalize": [None, True, False, 0],
    "descent_passes": [0, 3, 3.0],
    "error_correction": [0, 0.5, 1, 1.5],
    "damp_percent": [0.1, 1, "0.1"],
    "dataset": ["builtin", "name:config", "", "\0", "\ud800", ["text"]],
    "num_samples": [1, 128, True],
    "sequence_length": [1, 2048],
    "batch_size": [1, 8],
    "seed": [0, -1],
    "calibration_device": [None, "cpu", "cuda:0", "cuda:99999999999999999999", "\0", "\ud800", "a:b:c"],
    "modules_to_not_convert": [None, [], ["lm_head"], "lm_head"],
    "work_dir": [None, "blocks"],
    "tokenizer": [None, "gpt2"],
    "modules": [None, {}, {"a": 16, "b": None}, {"a": "16"}, {"a": True}, {"a": []}],
    "calibration": [None, {}, {"dataset": "text", "tokens": 3}, {"dataset": {}}],
    "kernel_repo": ["me/kernels"],
    "quant_method": ["mr_gptq", "gptq"],
    "how_to_load": ["by hand"],
}
"""Values of each field, good ones and near misses."""

ANY_CONFIG = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) | JSON for name, values in LIKELY.items()}
)
LIKELY_CONFIG = st.fixed_dictionaries(
    {},
    optional={n: st.sampled_from(v) for n, v in LIKELY.items() if n not in ("kernel_repo", "quant_method")},
)


def valid_or_refused(written: dict) -> MRGPTQConfig | None:
    """A config that survives JSON, or None for one that was refused with a message."""
    before = repr(written)
    try:
        config = MRGPTQConfig.from_dict(written)
    except ValueError as error:
        assert len(str(error)) > 20
        return None
    finally:
        assert repr(written) == before
    once = config.to_dict()
    again = MRGPTQConfig.from_dict(json.loads(json.dumps(once)))
    assert again.to_dict() == once
    assert once["quant_method"] == "mr_gptq"
    of_the_format = {"activation_scale_rule", "descent_passes", "equalize"}  # what None becomes depends on it
    for name in set(once) & set(written) - {"dataset", "how_to_load"}:
        assert once[name] == written[name] or (name in of_the_format and written[name] is None)
    return config


@given(ANY_CONFIG)
def test_any_json_in_a_field_is_a_config_or_refused(written):
    valid_or_refused(written)


@given(LIKELY_CONFIG)
def test_near_misses_are_a_config_or_refused(written):
    valid_or_refused(written)


@given(st.sampled_from(sorted(LIKELY)), JSON)
def test_any_json_in_one_field_is_a_config_or_refused(name, value):
    valid_or_refused({name: value})


@given(st.dictionaries(st.text(max_size=12), JSON, min_size=1, max_size=4))
def test_unknown_keys_are_refused(written):
    config = valid_or_refused(written)
    assert config is None or written.keys() <= LIKELY.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in LIKELY.items() for v in values], ids=repr
)
def test_each_likely_value(name, value):
    valid_or_refused({name: value})


# --- two savers


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_two_threads_publish_in_one_directory(tmp_path, monkeypatch):
    """Two models with the same names of shards and more; each round one of them is there, whole."""
    replace = os.replace

    def slow(*paths):
        time.sleep(0.001)
        replace(*paths)

    monkeypatch.setattr(checkpoint_files.os, "replace", slow)
    files = {
        "a": [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)] + [INDEX, "config.json"],
        "b": [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
        + ["model.safetensors", "config.json"],
    }
    barrier, seen = threading.Barrier(2), []

    def save(which: str) -> None:
        for turn in range(15):
            with staged(tmp_path) as staging:
                for name in files[which]:
                    (staging / name).write_text(f"{which}{turn}")
                barrier.wait(10)
            barrier.wait(10)
            if which == "a":
                seen.append({file.name: file.read_text()[0] for file in tmp_path.iterdir()})
            barrier.wait(10)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(save, files)) == [None, None] and len(seen) == 15
    wholes = [dict.fromkeys(names, which) for which, names in files.items()]
    assert all(found in wholes for found in seen)


SAVE_AND_STOP = """
import os, sys, time
from pathlib import Path
from transformers import AutoModelForCausalLM
from hf_fp4 import checkpoint_files

source, target, signals = map(Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(source)
replace, moved = os.replace, []

def stopping(*paths):
    replace(*paths)
    moved.append(paths)
    if len(moved) == 2:  # in the middle of publishing
        (signals / "stopped").touch()
        while not (signals / "go").exists():
            time.sleep(0.01)

checkpoint_files.os.replace = stopping
model.save_pretrained(target, max_shard_size="20KB")
"""


def test_another_process_that_saves_nothing(tmp_path, monkeypatch):
    """Of processes that save together only the first has files; the others take away a directory that they find empty."""
    target, make = tmp_path / "saved", tempfile.mkdtemp

    def taken_away_once(*args, **kwargs):
        monkeypatch.setattr(tempfile, "mkdtemp", make)
        target.rmdir()
        return make(*args, **kwargs)

    monkeypatch.setattr(tempfile, "mkdtemp", taken_away_once)
    with ExitStack() as other:
        other.enter_context(staged(target))
        with staged(target) as mine:
            other.close()
            (mine / "config.json").write_text("{}")
    assert [file.name for file in target.iterdir()] == ["config.json"]


def test_two_processes_save_in_one_directory(models, saved, tmp_path):
    target, signals = tmp_path / "target", tmp_path / "signals"
    signals.mkdir()
    arguments = [sys.executable, "-c", SAVE_AND_STOP, *map(str, (saved / "mxfp4", target, signals))]
    other = subprocess.Popen(arguments, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        while not (signals / "stopped").exists():
            assert other.poll() is None, other.communicate()[1]
            time.sleep(0.01)
        ours = threading.Thread(
            target=models["nvfp4"].save_pretrained, args=(target,), kwargs={"max_shard_size": "20KB"}
        )
        halfway = files_of(target)
        with pytest.raises(ValueError, match=r"in its config\.json"):  # who loads now gets no mix
            load(target)
        ours.start()
        ours.join(1.0)
        assert ours.is_alive() and files_of(target) == halfway, "it did not wait for the other process"
    finally:
        (signals / "go").touch()
        _, errors = other.communicate(timeout=60)
    ours.join(60)
    assert other.returncode == 0, errors
    assert contents(target).keys() == contents(saved / "nvfp4").keys()
    assert all(file.read_bytes() == (target / file.name).read_bytes() for file in shards(saved / "nvfp4"))
    assert torch.equal(logits(load(target)), logits(models["nvfp4"]))


def files_of(directory: Path) -> dict[str, bytes]:
    """Without the directories in which saves are prepared."""
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(hf_fp4.__file__).parents[1]), **variables}


# --- disks


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS), "target")


def test_a_read_only_target(models, saved, checkpoint, tmp_path, monkeypatch):
    before = contents(checkpoint)
    monkeypatch.setattr(checkpoint_files.tempfile, "mkdtemp", read_only)
    for target in (checkpoint, tmp_path / "new"):
        with pytest.raises(OSError, match="Read-only file system"):
            models["mxfp4"].save_pretrained(target)
        with pytest.raises(OSError, match="Read-only file system"):
            export_compressed_tensors(saved / "nvfp4", target, overwrite=True)
    assert contents(checkpoint) == before
    assert not (tmp_path / "new").exists()


def test_a_target_below_a_file(models, tmp_path):
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(ValueError, match="file is a file; save into a directory"):
        models["nvfp4"].save_pretrained(tmp_path / "file")
    with pytest.raises(OSError, match="Not a directory.*model"):
        models["nvfp4"].save_pretrained(tmp_path / "file" / "model")
    assert (tmp_path / "file").read_text() == "keep me"


@pytest.mark.parametrize("nth", [2, 5])
def test_a_disk_that_fails_while_files_are_moved(nth, models, checkpoint, monkeypatch):
    """What is then in the directory is a mix; without its config.json, nobody loads it."""
    replace, moved = os.replace, []

    def failing(*paths):
        moved.append(paths)
        if len(moved) == nth:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(*paths)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files.os, "replace", failing)
        with pytest.raises(OSError, match="Input/output error"):
            models["mxfp4"].save_pretrained(checkpoint, max_shard_size="20KB")
    with pytest.raises((OSError, ValueError), match=r"in its config\.json"):
        load(checkpoint)
    models["mxfp4"].save_pretrained(checkpoint, max_shard_size="20KB")
    assert torch.equal(logits(load(checkpoint)), logits(models["mxfp4"]))


def test_a_directory_that_cannot_be_locked_says_so(models, tmp_path, monkeypatch, caplog):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", read_only)
    logging.enable_propagation()
    try:
        models["nvfp4"].save_pretrained(tmp_path)
    finally:
        logging.disable_propagation()
    assert "cannot be locked" in caplog.text and "let no other process save there" in caplog.text
    assert torch.equal(logits(load(tmp_path)), logits(models["nvfp4"]))


# --- no network, and a cache that is read-only

EVERY_STEP = """
import errno, json, os, sys, time
from pathlib import Path

work, attempts, writes = Path(sys.argv[1]), [], []
CACHE = os.environ["HF_HOME"]
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")

def within(path):
    return isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(CACHE)

def only_this_disk(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        if event != "socket.connect" or isinstance(arguments[1], tuple):
            attempts.append(event)
            raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
    written = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and within(arguments[0])
    if written or event in CHANGES and any(within(path) for path in arguments):
        writes.append(event)
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

sys.addaudithook(only_this_disk)
time.sleep = lambda seconds: None  # the clients wait before they try again

import torch
import hf_fp4
from hf_fp4 import MRGPTQConfig, evaluate, export_compressed_tensors, import_compressed_tensors
from hf_fp4 import cli
from transformers import AutoModelForCausalLM, AutoTokenizer

def quantize(**fields):
    sizes = {"num_samples": 2, "sequence_length": 16, "batch_size": 2, "hadamard_group_size": None}
    return AutoModelForCausalLM.from_pretrained("org/base", quantization_config=MRGPTQConfig(**sizes, **fields))

(work / "text.txt").write_text("some text of a local file. " * 40)
AutoModelForCausalLM.from_pretrained("org/base")
builtin = quantize(dataset="builtin")
assert builtin.config.quantization_config.calibration["tokens"] == 32
model = quantize(dataset=str(work / "text.txt"))
model.save_pretrained(work / "saved")
tokenizer = AutoTokenizer.from_pretrained("org/base")
tokenizer.save_pretrained(work / "saved")
tokens = torch.arange(20)[None] + 5
reloaded = AutoModelForCausalLM.from_pretrained(work / "saved")
export_compressed_tensors(work / "saved", work / "exported")
import_compressed_tensors(work / "exported", work / "imported")
again = AutoModelForCausalLM.from_pretrained(work / "imported")
with torch.no_grad():
    equal = [torch.equal(model(tokens).logits, other(tokens).logits) for other in (reloaded, again)]
score = evaluate(reloaded, str(work / "text.txt"), tokenizer, progress=False, sequence_length=16, max_tokens=64)
doctor = cli.main(["doctor"])
seen = {"attempts": attempts, "equal": equal, "tokens": score.num_tokens, "doctor": doctor, "cache": writes}
(work / "seen.json").write_text(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A Hub cache that holds one unquantized model with its tokenizer, org/base."""
    home = tmp_path_factory.mktemp("home")
    repository, commit = home / "hub" / "models--org--base", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    save_with_tokenizer(repository / "snapshots" / commit)
    return home


@pytest.mark.parametrize("offline", ["1", "0"])
def test_every_step_without_network_and_with_a_read_only_cache(offline, cache, tmp_path):
    """Told to be offline, nothing tries to connect; not told, everything works as well."""
    before = sorted(cache.rglob("*"))
    variables = {"HF_HOME": str(cache), "HF_HUB_OFFLINE": offline, "HF_DATASETS_OFFLINE": offline}
    env = environment(**variables)
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "TRANSFORMERS_CACHE"):
        env.pop(name, None)
    command = [sys.executable, "-c", EVERY_STEP, str(tmp_path)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["equal"] == [True, True] and seen["doctor"] == 0 and seen["tokens"] > 30
    assert bool(seen["attempts"]) == (offline == "0"), "only one of the two tries"
    assert sorted(cache.rglob("*")) == before
