"""`hf-fp4 quantize --streaming`: the same files as without it, a few blocks in memory, resumed when killed, never half a result."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from model_zoo import FAMILIES, save_with_tokenizer, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_fp4
from hf_fp4 import MRGPTQConfig, cli
from hf_fp4.calibration import checkpoint, driver
from hf_fp4.calibration.checkpoint import WorkDir
from hf_fp4.calibration.group import Group
from hf_fp4.quantizer import _QuantizeOnLoad

TEXT = Path(__file__).read_text() * 4
CALIBRATION = ["--num-samples", "4", "--sequence-length", "16", "--batch-size", "2"]
METHODS = {
    "mr-gptq": CALIBRATION,
    "rtn": ["--method", "rtn"],
    "rtn-hessian": ["--method", "rtn", "--scale-rule", "hessian"],
}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return str(file)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny bf16 Llama with tied embeddings and a tokenizer, in several shards."""
    directory = tmp_path_factory.mktemp("source")
    save_with_tokenizer(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="60KB")
    assert len(list(directory.glob("model-*.safetensors"))) > 2
    return directory


def arguments(source: Path, out: Path, text: str, method: str = "mr-gptq", *options: str) -> list[str]:
    data = ["--dataset", text] if method != "rtn" else []
    chosen = [*METHODS[method], *data, *(CALIBRATION if method == "rtn-hessian" else [])]
    return ["quantize", str(source), str(out), "--max-shard-size", "40KB", *chosen, *map(str, options)]


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture(scope="module")
def ordinary(source, text, tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """What each method writes without --streaming."""
    found = {}
    for method in METHODS:
        out = tmp_path_factory.mktemp("ordinary") / method
        assert cli.main(arguments(source, out, text, method, "--device-map", "cpu")) == 0
        found[method] = files(out)
    return found


# --- the same files


@pytest.mark.parametrize("method", METHODS)
def test_the_same_files(method, source, text, ordinary, tmp_path):
    assert cli.main(arguments(source, tmp_path / "out", text, method, "--streaming")) == 0
    assert files(tmp_path / "out") == ordinary[method]
    assert len([name for name in ordinary[method] if name.startswith("model-")]) > 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"


@pytest.mark.parametrize(
    ("family", "method"), [*itertools.product(FAMILIES, ["mr-gptq", "rtn"]), ("mixtral", "rtn")]
)
def test_every_family(family, method, tmp_path):
    """Biases, layers that stay, tied embeddings; mixtral's weights are converted while they are read."""
    tiny_model(family, torch.bfloat16).save_pretrained(tmp_path / "source", max_shard_size="60KB")

    def quantize(name: str, **load) -> dict[str, bytes]:
        config = MRGPTQConfig(
            method=method,
            dataset=list(tiny_tokens(2, 16)),
            num_samples=2,
            sequence_length=16,
            work_dir=load.pop("work_dir", None),
        )
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config, **load)
        model.save_pretrained(tmp_path / name, max_shard_size="40KB")
        return files(tmp_path / name)

    streams = {"device_map": "cpu"}
    if method == "mr-gptq":
        streams = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "converted")}
    assert quantize("streamed", work_dir=tmp_path / "blocks", **streams) == quantize("ordinary")


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_another_dtype_than_the_files(method, source, text, tmp_path):
    options = ["--dtype", "float32"]
    assert cli.main(arguments(source, tmp_path / "a", text, method, "--streaming", *options)) == 0
    assert cli.main(arguments(source, tmp_path / "b", text, method, "--device-map", "cpu", *options)) == 0
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_what_is_returned_is_an_ordinary_model(source, tmp_path):
    config = MRGPTQConfig(dataset=list(tiny_tokens(2, 16)), num_samples=2, sequence_length=16)
    load = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)}
    streamed = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **load)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config)
    assert not hasattr(streamed, "hf_device_map")
    assert not any(hasattr(module, "_hf_hook") for module in streamed.modules())
    assert streamed.lm_head.weight is streamed.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(streamed(tiny_tokens()).logits, model(tiny_tokens()).logits)
    streamed.to(torch.float32)


@pytest.mark.parametrize("gpu", [True, False])
def test_blocks_on_the_disk_are_calibrated_on_the_gpu(gpu, source, tmp_path, monkeypatch):
    load = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)}
    model = AutoModelForCausalLM.from_pretrained(source, **load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found = driver._calibration_device(MRGPTQConfig(), list(model.model.layers))
    assert found == (torch.device("cuda") if gpu else None)


def test_a_visit_elsewhere_leaves_the_files_pages_where_they_were(source, tmp_path):
    """What stays unquantized is not copied back from the other device, since it would then take memory."""
    load = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)}
    block = AutoModelForCausalLM.from_pretrained(source, **load).model.layers[0]
    with driver._moved(block, torch.device("meta")):
        assert all(parameter.is_meta for parameter in block.parameters())
    stored = AutoModelForCausalLM.from_pretrained(source).model.layers[0].state_dict()
    assert all(torch.equal(tensor, stored[name]) for name, tensor in block.state_dict().items())


def test_weights_that_are_not_finite_are_refused_before_the_work(source, text, tmp_path, capsys, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(Group, "solve", lambda group: pytest.fail("something was solved"))
    options = ["--tokenizer", str(source), "--streaming"]
    assert cli.main(arguments(tmp_path / "source", tmp_path / "out", text, "mr-gptq", *options)) == 2
    assert "finite values in the weight of model.layers.1.mlp.up_proj, got 1 NaN" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_it_places_the_model_itself(source, text, tmp_path, capsys):
    assert (
        cli.main(arguments(source, tmp_path / "out", text, "rtn", "--streaming", "--device-map", "cpu")) == 2
    )
    assert "--streaming places the model itself, got --device-map cpu; leave one of them out" in (
        capsys.readouterr().err
    )


# --- runs that break off


def break_at(patch: pytest.MonkeyPatch, owner, name: str, nth: int, error: BaseException) -> None:
    """The n-th call raises ``error``."""
    function, calls = getattr(owner, name), []

    def broken(*args, **kwargs):
        calls.append(None)
        if len(calls) == nth:
            raise error
        return function(*args, **kwargs)

    patch.setattr(owner, name, broken)


@pytest.mark.once
@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 2)],
    ids=["interrupt", "full disk"],
)
@pytest.mark.parametrize(
    ("method", "owner", "name", "nth", "finished"),
    [
        ("mr-gptq", Group, "solve", 6, 1),
        ("mr-gptq", WorkDir, "save", 2, 1),
        ("mr-gptq", checkpoint.os, "replace", 2, 0),
        ("mr-gptq", driver._Block, "replace", 1, 1),
        ("rtn", _QuantizeOnLoad, "_quantize", 5, 4),
        ("rtn", WorkDir, "save", 4, 3),
    ],
)
def test_a_failed_run_leaves_the_old_files_and_resumes(
    method, owner, name, nth, finished, error, code, source, text, ordinary, tmp_path, monkeypatch, capsys
):
    out, work = tmp_path / "out", tmp_path / "work"
    assert cli.main(arguments(source, out, text, "rtn", "--format", "mxfp4")) == 0
    before = files(out)
    command = arguments(source, out, text, method, "--streaming", "--overwrite", "--work-dir", work)
    with monkeypatch.context() as patch:
        break_at(patch, owner, name, nth, error)
        assert cli.main(command) == code
    assert ("the same --work-dir resumes" if code == 130 else "No space left") in capsys.readouterr().err
    assert files(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "work"]
    times = {file: file.stat().st_mtime_ns for file in work.glob("block-*.safetensors")}
    if method == "mr-gptq" or code == 130:
        assert len(times) == finished
    assert cli.main(command) == 0
    (out / "README.md").unlink()  # it keeps what the card of the old files said
    assert files(out) == {name: content for name, content in ordinary[method].items() if name != "README.md"}
    assert {file: file.stat().st_mtime_ns for file in times} == times, "they were not made again"


KILLED = """
import os, signal, sys
from hf_fp4 import cli
from hf_fp4.calibration import checkpoint

replace, calls = os.replace, []


def killed(*args):
    calls.append(None)
    if len(calls) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)


checkpoint.os.replace = killed
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.once
@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_a_killed_run_resumes(method, source, text, ordinary, tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    command = arguments(source, out, text, method, "--streaming", "--work-dir", work)
    run = subprocess.run(
        [sys.executable, "-c", KILLED, "3", *command],
        env={**os.environ, "PYTHONPATH": str(Path(hf_fp4.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == -9, run.stderr
    assert not out.exists()
    assert [file.suffix for file in sorted(work.glob("block-*"), key=lambda file: file.suffix)] == [
        ".partial",
        ".safetensors",
    ]
    assert cli.main(command) == 0
    assert files(out) == ordinary[method]


def test_the_blocks_of_an_ordinary_run_are_taken_over(source, text, ordinary, tmp_path, monkeypatch):
    work = ["--work-dir", str(tmp_path / "work")]
    assert cli.main(arguments(source, tmp_path / "a", text, "mr-gptq", *work, "--device-map", "cpu")) == 0
    monkeypatch.setattr(Group, "solve", lambda group: pytest.fail("something was solved"))
    assert cli.main(arguments(source, tmp_path / "b", text, "mr-gptq", *work, "--streaming")) == 0
    assert files(tmp_path / "b") == ordinary["mr-gptq"]


def test_rounding_takes_no_other_weights_from_a_work_dir(source, text, tmp_path, capsys):
    work = ["--work-dir", str(tmp_path / "work")]
    assert cli.main(arguments(source, tmp_path / "a", text, "rtn", *work)) == 0
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5
    model.save_pretrained(tmp_path / "source")
    assert cli.main(arguments(tmp_path / "source", tmp_path / "b", text, "rtn", *work)) == 2
    assert (
        "belongs to another run: the weights of model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj differ"
    ) in capsys.readouterr().err
    assert cli.main(arguments(source, tmp_path / "b", text, "rtn", "--format", "mxfp4", *work)) == 2
    assert "belongs to another run: config differ" in capsys.readouterr().err


# --- memory


@pytest.mark.parametrize("streams", [False, True])
def test_nothing_of_a_finished_block_stays(streams, source, tmp_path, monkeypatch):
    """Not even until Python looks for circles of references."""
    made: list[weakref.ref] = []
    alive: list[int] = []
    make, moved = Group.__init__, driver._moved

    def counted(group, *args):
        make(group, *args)
        made.extend(map(weakref.ref, (group, *group._linears.values())))

    def at_the_start(*args):
        alive.append(sum(thing() is not None for thing in made))
        return moved(*args)

    monkeypatch.setattr(Group, "__init__", counted)
    monkeypatch.setattr(driver, "_moved", at_the_start)
    config = MRGPTQConfig(dataset=list(tiny_tokens(4, 16)), num_samples=4, sequence_length=16, batch_size=2)
    load = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path)} if streams else {}
    gc.collect()
    gc.disable()
    try:
        AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **load)
    finally:
        gc.enable()
    assert len(made) == 2 * (4 + 7) and alive == [0, 0]


PEAK = """
import sys
from hf_fp4 import cli
from peak_memory import peak_while


def quantize(source, out):
    # In another dtype than the file's, whose pages would not count.
    command = ["quantize", source, out, "--streaming", "--dtype", "float16", "--overwrite", *sys.argv[4:]]
    assert cli.main(command) == 0


short, long, out = sys.argv[1:4]
quantize(short, out)  # what is imported or cached once
for source in (short, long):
    print("peak", peak_while(lambda: quantize(source, out)), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc/self/status")
def test_memory_does_not_grow_with_the_model(method, source, text, tmp_path):
    """That the measure sees a model in memory is shown where rounding on load is measured, in test_quantizer.py."""
    sizes = {}
    for layers in (4, 24):
        config = LlamaConfig(
            vocab_size=258,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=8,
        )
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(tmp_path / str(layers), max_shard_size="30MB")
        sizes[layers] = sum(parameter.nbytes for parameter in model.parameters())
        del model
    # Nothing that takes long and holds no more than a linear's own.
    options = ["--tokenizer", str(source), "--scale-rule", "absmax", *METHODS[method]]
    if method == "mr-gptq":
        options += ["--dataset", text, "--descent-passes", "0", "--hadamard-group-size", "none"]
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "4", tmp_path / "24", tmp_path / "out", *options],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(hf_fp4.__file__).parents[1]), str(Path(__file__).parent)]
            ),
            # What is freed is given back at once: threads' arenas keep more, the more often there was something to keep.
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    short, long = (int(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("peak"))
    print(f"{sizes[4] / 1e6:.0f} MB: {short / 1e6:.0f} MB; {sizes[24] / 1e6:.0f} MB: {long / 1e6:.0f} MB")
    assert long - short < 0.15 * (sizes[24] - sizes[4])  # packed, they are 0.28 of it


def test_experts_in_one_tensor_are_refused(tmp_path):
    """Their calibration takes them apart, which is done in memory."""
    tiny_model("mixtral", torch.bfloat16).save_pretrained(tmp_path / "source")
    data = {"dataset": list(tiny_tokens(2, 16)), "num_samples": 2, "sequence_length": 16}
    config = MRGPTQConfig(**data, work_dir=tmp_path / "blocks")
    streams = {"device_map": {"": "disk"}, "offload_folder": str(tmp_path / "converted")}
    with pytest.raises(ValueError, match="holds all its experts in one tensor"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "source", quantization_config=config, **streams)
