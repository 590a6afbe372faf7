"""Processes that calibrate one model together: shares, sums and choices; and two real ones against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_fp4 import MRGPTQConfig
from hf_fp4.calibration.team import Team

pytestmark = pytest.mark.once

RUN = """
import json, os, sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import hf_fp4
from hf_fp4 import MRGPTQConfig

original, out, fields = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
on_gpus = fields.pop("on_gpus", False)
if on_gpus:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo")
rank = os.environ["RANK"]
ids = torch.randint(4, 200, (12, 40), generator=torch.Generator().manual_seed(3))
if fields.pop("differ", False) and rank == "1":
    ids = ids.flip(0)
config = MRGPTQConfig(dataset=list(ids), num_samples=12, sequence_length=40, batch_size=2, **fields)
try:
    place = {"dtype": torch.bfloat16, "device_map": "cuda"} if on_gpus else {"dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(original, quantization_config=config, **place)
    save_file({k: v.clone() for k, v in model.state_dict().items()}, f"{out}/{rank}.safetensors")
    model.save_pretrained(f"{out}/model")  # which only the first process does
    report = [(row.name, row.hadamard_size, row.error) for row in model.hf_quantizer.report]
    json.dump(report, open(f"{out}/{rank}.json", "w"))
except ValueError as error:
    print(f"rank {rank}: {error}", flush=True)
dist.destroy_process_group()
"""


def run_together(processes: int, original: Path, out: Path, **fields) -> str:
    """What the processes print; their tensors and reports are in ``out`` by rank, and the model."""
    out.mkdir(exist_ok=True)
    script = out / "run.py"
    script.write_text(RUN)
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(script), str(original), str(out), json.dumps(fields)]
    run = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def alone(original: Path, dtype: torch.dtype = torch.float32, device: str | None = None, **fields):
    ids = torch.randint(4, 200, (12, 40), generator=torch.Generator().manual_seed(3))
    config = MRGPTQConfig(dataset=list(ids), num_samples=12, sequence_length=40, batch_size=2, **fields)
    return AutoModelForCausalLM.from_pretrained(
        original, dtype=dtype, device_map=device, quantization_config=config
    )


def require_equal_reports(out: Path, model) -> None:
    """Of both processes with each other's, and with that of ``model``, which one process made."""
    reports = [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]
    expected = [(row.name, row.hadamard_size, row.error) for row in model.hf_quantizer.report]
    for (name, size, error), (other, other_size, other_error) in zip(reports[0], expected, strict=True):
        assert (name, size) == (other, other_size) and error == pytest.approx(other_error, rel=0.05), name


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_two_processes_make_what_one_makes(original, tmp_path, format):
    """Up to the order in which second moments are added up; the work directory is the first process's.

    Not equalized: a channel whose factor rounds the other way in the second block moves all its codes.
    """
    fields = {"format": format, "equalize": False, "work_dir": str(tmp_path / "work")}
    run_together(2, original, tmp_path, **fields)
    files = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    model = alone(original, format=format, equalize=False)
    require_equal_reports(tmp_path, model)
    found, state = load_file(files[0]), model.state_dict()
    for name, tensor in state.items():
        same = (found[name].view(torch.uint8) == tensor.view(torch.uint8)).float().mean()
        assert same > 0.97, name
    assert len(list((tmp_path / "work").glob("block-*.safetensors"))) == model.config.num_hidden_layers
    again = alone(original, **fields)
    for name, tensor in again.state_dict().items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), "one process resumes it"


def test_two_processes_equalize_as_one_does(original, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    torch.manual_seed(0)
    norms = [f"model.layers.0.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
    for name in norms:
        model.get_parameter(name).data.copy_(torch.exp(torch.randn(model.config.hidden_size)))
    model.save_pretrained(tmp_path / "uneven")
    run_together(2, tmp_path / "uneven", tmp_path)
    files = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    found, quantized = load_file(files[0]), alone(tmp_path / "uneven")
    for name in norms:
        assert torch.equal(found[name], quantized.get_parameter(name))
        assert not torch.equal(found[name], model.get_parameter(name))


def test_processes_that_disagree_are_refused(original, tmp_path):
    printed = run_together(2, original, tmp_path, differ=True)
    for rank in (0, 1):
        assert f"rank {rank}: all processes must calibrate with the same calibration data" in printed


def test_one_process_is_a_team_of_its_own():
    team = Team()
    assert (team.size, team.rank) == (1, 0)
    team.require_same("anything", "data")
    tensor = torch.arange(6.0).view(3, 2)
    assert torch.equal(team.sum_(tensor.clone()), tensor) and torch.equal(team.max_(tensor.clone()), tensor)
    assert torch.equal(team.join_rows(tensor[team.rows(3)], 3), tensor) and team.rows(3) == slice(0, 3)
    assert team.share([1, 2, 3]) == [1, 2, 3]
    assert team.first_of([tensor], tensor.device) == [tensor] and team.first_of([], tensor.device) == []
    assert team.decide(True, lambda: "choice") == "choice"
    assert team.decide(False, lambda: pytest.fail("nobody is able")) is None


@pytest.mark.parametrize(("size", "count"), [(2, 5), (3, 7), (4, 3), (3, 9)])
def test_shares_are_disjoint_and_complete(size, count):
    teams = [Team() for _ in range(size)]
    for rank, team in enumerate(teams):
        team.size, team.rank = size, rank
    rows = [index for team in teams for index in range(count)[team.rows(count)]]
    assert rows == list(range(count))
    samples = [index for team in teams for index in range(count)[team.samples(count)]]
    assert set(samples) == set(range(count)) and len(samples) == max(size, count)
    if count >= size:
        assert sorted(batch for team in teams for batch in team.share(range(count))) == list(range(count))
    else:
        with pytest.raises(
            ValueError, match=f"each of {size} processes, got {count}; use a smaller batch_size"
        ):
            teams[0].share(range(count))
