"""The command line: through `main` for speed, and once as the program that a user starts."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from hf_fp4 import MRGPTQConfig, cli

TEXT = (Path(__file__).parents[1] / "examples" / "held_out.txt").read_text(encoding="utf-8")
SMALL = ["--num-samples", "4", "--sequence-length", "32", "--device-map", "cpu"]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


# --- quantize


def test_quantize_with_calibration(original, text_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["quantize", str(original), str(out), "--dataset", str(text_file), *SMALL]) == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("model.layers.*.mlp.down_proj"))
    assert row.split()[1] == "2"
    assert row.count("%") == 3, "mean error of rounding, mean and worst of the solve"
    assert "not converted: output embeddings are never converted: lm_head" in printed
    assert " MB, was " in printed

    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert type(loaded.model.layers[0].mlp.up_proj).__name__ == "FP4Linear"
    assert loaded.config.quantization_config.format == "nvfp4"
    assert AutoTokenizer.from_pretrained(out)("abc")["input_ids"]


def test_command_and_python_give_the_same_bytes(original, text_file, tmp_path):
    flags = ["--format", "mxfp4", "--hadamard-group-size", "16", "--seed", "3", "--no-act-order"]
    assert (
        cli.main(
            ["quantize", str(original), str(tmp_path / "a"), "--dataset", str(text_file), *flags, *SMALL]
        )
        == 0
    )
    config = MRGPTQConfig(
        format="mxfp4",
        hadamard_group_size=16,
        seed=3,
        act_order=False,
        dataset=str(text_file),
        num_samples=4,
        sequence_length=32,
    )
    AutoModelForCausalLM.from_pretrained(original, quantization_config=config).save_pretrained(tmp_path / "b")
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in "ab")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key].view(torch.uint8), theirs[key].view(torch.uint8)) for key in ours)


def test_every_field_that_is_given_arrives(original, text_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        cli,
        "_load_model",
        lambda args, name, quantization_config, device_map: seen.append(quantization_config) or 1 / 0,
    )
    values = {
        "format": "nvfp4",
        "activations": "bf16",
        "method": "mr-gptq",
        "hadamard_group_size": None,
        "scale_rule": "absmax",
        "activation_scale_rule": "absmax",
        "act_order": False,
        "equalize": False,
        "descent_passes": 2,
        "error_correction": 0.5,
        "damp_percent": 0.02,
        "dataset": str(text_file),
        "num_samples": 3,
        "sequence_length": 31,
        "batch_size": 2,
        "calibration_device": "cpu",
        "seed": 5,
        "modules_to_not_convert": ["k_proj", "v_proj"],
        "allow_unconverted": True,
        "work_dir": str(tmp_path / "work"),
        "kernel_repo": "you/yours",
        "kernel_version": 2,
        "trust_kernel_repo": True,
    }
    flags = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(flag if value else f"--no-{flag[2:]}")
        else:
            flags += [
                part for item in (value if isinstance(value, list) else [value]) for part in (flag, str(item))
            ]
    with pytest.raises(ZeroDivisionError):
        cli.main(["quantize", str(original), str(tmp_path / "out"), "--tokenizer", str(original), *flags])
    assert {name: getattr(seen[0], name) for name in values} == values
    assert seen[0].tokenizer("a")["input_ids"]
    not_flags = {"modules", "calibration", "quant_method", "tokenizer"}
    assert {field.name for field in fields(MRGPTQConfig)} - not_flags == values.keys(), (
        "a new field needs a flag"
    )


def test_paper_is_the_papers_recipe_with_what_else_is_given(original, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        cli,
        "_load_model",
        lambda args, name, quantization_config, device_map: seen.append(quantization_config) or 1 / 0,
    )
    with pytest.raises(ZeroDivisionError):
        cli.main(
            ["quantize", str(original), str(tmp_path / "out"), "--paper", "--format", "mxfp4", "--seed", "7"]
        )
    expected = MRGPTQConfig.paper("mxfp4", seed=7)
    skip = {"tokenizer"}
    assert {f.name: getattr(seen[0], f.name) for f in fields(expected) if f.name not in skip} == {
        f.name: getattr(expected, f.name) for f in fields(expected) if f.name not in skip
    }


def test_data_free_run_has_no_errors_to_show(rtn, original, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["quantize", str(original), str(out), "--method", "rtn", "--layers", "--device-map", "cpu"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if line.startswith("module"))
    assert header.split() == ["module", "Hadamard"]
    assert "model.layers.1.self_attn.q_proj" in printed
    assert (out / "model.safetensors").read_bytes() == (rtn / "model.safetensors").read_bytes()


# --- evaluate


def test_evaluate_against_itself_and_the_original(original, rtn, text_file, capsys):
    common = [
        "--text",
        str(text_file),
        "--sequence-length",
        "64",
        "--max-tokens",
        "640",
        "--device-map",
        "cpu",
    ]
    assert cli.main(["evaluate", str(original), "--reference", str(original), "--json", *common]) == 0
    same = json.loads(capsys.readouterr().out)
    assert same["kl_divergence"] == 0 and same["top1_agreement"] == 1
    assert same["perplexity"] == same["reference_perplexity"]

    assert cli.main(["evaluate", str(rtn), "--reference", str(original), "--json", *common]) == 0
    quantized = json.loads(capsys.readouterr().out)
    assert quantized["kl_divergence"] > 0
    assert quantized["reference_perplexity"] == pytest.approx(same["perplexity"])

    assert cli.main(["evaluate", str(rtn), *common]) == 0
    alone = capsys.readouterr().out
    assert f"{quantized['perplexity']:.4f}" in alone and "KL" not in alone


# --- refusals: one line on stderr, exit code 2


def refusal(capsys: pytest.CaptureFixture, *command: object) -> str:
    assert cli.main([str(part) for part in command]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("hf-fp4: error: ")]
    assert len(lines) == 1 and captured.err.rstrip().endswith(lines[0]), captured.err
    assert "Traceback" not in captured.err
    return lines[0]


def test_refuses_an_unknown_value_with_the_ones_it_knows(original, tmp_path, capsys):
    message = refusal(capsys, "quantize", original, tmp_path / "out", "--format", "fp5")
    assert "format must be one of 'nvfp4', 'mxfp4', got 'fp5'" in message
    assert not (tmp_path / "out").exists()


def test_refuses_a_model_that_is_not_there(tmp_path, capsys):
    message = refusal(capsys, "quantize", tmp_path / "nothing", tmp_path / "out", "--method", "rtn")
    assert "nothing" in message
    assert not (tmp_path / "out").exists()


def test_refuses_a_directory_with_files_unless_told(original, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    command = ["quantize", original, tmp_path / "out", "--method", "rtn", "--device-map", "cpu"]
    assert "pass --overwrite" in refusal(capsys, *command)
    assert cli.main([*map(str, command), "--overwrite"]) == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_refuses_to_replace_the_original(original, capsys):
    before = (original / "model.safetensors").read_bytes()
    message = refusal(capsys, "quantize", original, original, "--method", "rtn", "--overwrite")
    assert "OUT must not be MODEL itself" in message
    assert (original / "model.safetensors").read_bytes() == before


def test_refuses_a_model_that_is_quantized_already(rtn, tmp_path, capsys):
    message = refusal(capsys, "quantize", rtn, tmp_path / "out", "--method", "rtn")
    assert "MODEL must not be quantized" in message and "(mr_gptq)" in message


def test_refuses_a_missing_text(original, tmp_path, capsys):
    message = refusal(capsys, "evaluate", original, "--text", tmp_path / "no.txt", "--device-map", "cpu")
    assert "no.txt" in message


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("rtn", "model.safetensors cannot be read"),
        ("original", "a weight file is damaged or incomplete, download"),  # transformers does not say which
    ],
)
def test_refuses_a_damaged_checkpoint(model, message, request, text_file, tmp_path, capsys):
    source = request.getfixturevalue(model)
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:1000])
    refused = refusal(capsys, "evaluate", tmp_path, "--text", text_file, "--device-map", "cpu")
    assert message in refused and "damaged or incomplete" in refused


@pytest.mark.parametrize("dtype", ["int8", "bflat16", "load"])
def test_refuses_what_is_no_dtype(original, text_file, capsys, dtype):
    message = refusal(capsys, "evaluate", original, "--text", text_file, "--dtype", dtype)
    assert "--dtype must be auto, bfloat16, float16 or float32" in message


def test_debug_shows_the_traceback(original, tmp_path, capsys):
    assert cli.main(["quantize", str(original), str(tmp_path / "out"), "--format", "fp5", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("hf-fp4: error: format must be")


def test_a_bug_is_not_taken_for_a_refusal(original, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "_quantize", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        cli.main(["quantize", str(original), str(tmp_path / "out")])


def test_interrupt_says_how_to_go_on(original, tmp_path, monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_quantize", interrupted)
    assert cli.main(["quantize", str(original), str(tmp_path / "out"), "--work-dir", str(tmp_path)]) == 130
    assert "the same command with the same --work-dir resumes" in capsys.readouterr().err


# --- help


def test_help_as_a_program():
    run = subprocess.run(
        [sys.executable, "-m", "hf_fp4.cli", "--help"], check=True, capture_output=True, text=True
    )
    assert "quantize" in run.stdout and "evaluate" in run.stdout
    assert "hf-fp4 quantize Qwen/Qwen3-8B Qwen3-8B-NVFP4" in run.stdout


@pytest.mark.parametrize("command", ["quantize", "evaluate", "bench", "doctor", "export", "import"])
def test_help_explains_every_flag(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    printed = capsys.readouterr().out
    assert "`" not in printed, "markup of a docstring"
    assert max(map(len, printed.splitlines())) <= 110
    subparsers = next(a for a in cli.build_parser()._actions if isinstance(a.choices, dict))
    for action in subparsers.choices[command]._actions:
        assert action.help, action.dest
        assert all(option in printed for option in action.option_strings)


def test_no_arguments_is_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main([])
    assert "usage: hf-fp4" in capsys.readouterr().err
