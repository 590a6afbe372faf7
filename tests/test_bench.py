"""`hf-fp4 bench`: that it times what it says, told by a clock that only the model's forward passes move; and refusals."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from model_zoo import tiny_model
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_fp4 import bench as benchmark
from hf_fp4 import cli
from hf_fp4.bench import BenchResult, BenchSettings, Measurement, Rate, bench, measure

pytestmark = pytest.mark.once

SMALL = BenchSettings(batch=2, prompt_tokens=8, new_tokens=5, repeats=3)
FLAGS = ["--batch", "2", "--prompt-tokens", "8", "--new-tokens", "4", "--repeats", "2", "--device-map", "cpu"]


class Timeline:
    """A clock, and the forward passes that moved it: a call of n tokens takes ``seconds(n, calls so far)``."""

    def __init__(self, monkeypatch, model, seconds):
        self.now, self.calls, self.reads = 0.0, [], []
        monkeypatch.setattr(benchmark.time, "perf_counter", lambda: self.now)

        def called(module, args, kwargs):
            ids = kwargs["input_ids"]
            self.now += seconds(ids.shape[1], len(self.calls))
            self.calls.append((tuple(ids.shape), kwargs.get("logits_to_keep"), ids.clone()))

        model.register_forward_pre_hook(called, with_kwargs=True)


# --- what is timed


def test_prefill_and_decode_are_apart(monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    timeline = Timeline(monkeypatch, model, lambda tokens, _: 4.0 if tokens > 1 else 0.5)
    result = measure(model, "tiny", SMALL, progress=False)
    assert result.prefill == Rate(2 * 8 / 4, 2 * 8 / 4, 2 * 8 / 4)
    assert result.decode == Rate(2 / 0.5, 2 / 0.5, 2 / 0.5), "the prompt is not part of decoding"
    assert result.name == "tiny" and result.peak_bytes is None and result.linears == {}

    one_run = [
        (2, 8),
        (2, 8),
        *[(2, 1)] * 4,
    ]  # prefill; then generate, whose first token comes with the prompt
    assert [shape for shape, _, _ in timeline.calls] == one_run * 4, "one warm-up and three repeats"
    assert {keep for _, keep, _ in timeline.calls} == {1}


def test_tokens_are_random_and_every_run_has_the_same(monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    timeline = Timeline(monkeypatch, model, lambda tokens, _: 1.0)
    measure(model, "tiny", SMALL, progress=False)
    prompts = [ids for (_, length), _, ids in timeline.calls if length > 1]
    assert len(prompts[0].unique()) > 10
    assert all(torch.equal(prompt, prompts[0]) for prompt in prompts)
    steps = [ids for (_, length), _, ids in timeline.calls if length == 1]
    assert all(torch.equal(a, b) for a, b in zip(steps, steps[4:], strict=False)), "the cache starts empty"


def test_warm_up_is_not_counted(monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    Timeline(monkeypatch, model, lambda tokens, calls: 1000.0 if calls < 6 else 1.0)
    result = measure(model, "tiny", SMALL, progress=False)
    assert result.prefill.low == 16 and result.decode.low == 2


def test_spread_is_shown(monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    speeds = [9.0, 1.0, 2.0, 4.0]  # of the four runs, six forward passes each
    Timeline(monkeypatch, model, lambda tokens, calls: speeds[calls // 6])
    result = measure(model, "tiny", SMALL, progress=False)
    assert result.prefill == Rate(8.0, 4.0, 16.0)
    assert str(result.decode) == "1 (0.5 to 2)"


def test_a_cpu_is_not_synchronised_and_a_gpu_is(monkeypatch):
    run = benchmark._Run(tiny_model("llama"), "tiny", SMALL)
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    run._now()
    assert waited == []
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    run.devices = [torch.device("cpu"), *gpus]
    run._now()
    assert waited == gpus


@pytest.mark.parametrize("family", ["gemma3", "gpt2", "qwen3"])
def test_other_families(family):
    result = measure(tiny_model(family), family, BenchSettings(1, 20, 3, repeats=1), progress=False)
    assert result.decode.median > 0 and result.prefill.median > 0


def test_bytes():
    tied, untied = (tiny_model(family, torch.bfloat16) for family in ("llama", "qwen3"))
    settings = BenchSettings(1, 4, 3, repeats=1)
    for model, looked_up in ((tied, 0), (untied, 256 * 80 * 2)):
        result = measure(model, "tiny", settings, progress=False)
        stored = sum(p.numel() * 2 for p in model.parameters()) + sum(b.numel() * 2 for b in model.buffers())
        assert result.weight_bytes == stored
        steps_per_second = result.decode.median
        assert result.read_per_second == pytest.approx((stored - looked_up) * steps_per_second)


# --- compiling


@pytest.fixture
def compile_without_a_compiler(monkeypatch):
    """Traces as inductor's modes would be, and runs the graph as it is."""
    monkeypatch.setattr(benchmark, "_COMPILE", {"fullgraph": True, "mode": None, "backend": "eager"})
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def test_the_decoding_step_is_compiled_once(rtn, compile_without_a_compiler):
    settings = BenchSettings(1, 8, 4, compile=True, repeats=2)
    args = cli.build_parser().parse_args(["bench", str(rtn), "--device-map", "cpu"])
    model = cli._load_model(args, str(rtn))
    result = measure(model, "rtn", settings, progress=False)
    assert counters["stats"]["unique_graphs"] == 1
    assert result.linears == {"reference": 14}


def test_nothing_is_compiled_unless_told(compile_without_a_compiler):
    model = tiny_model("llama")
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True  # `generate` compiles here by itself, as it does on a GPU
    model.generation_config.compile_config = config
    measure(model, "tiny", BenchSettings(1, 8, 4, repeats=1), progress=False)
    assert counters["stats"]["unique_graphs"] == 0


def test_a_graph_break_is_an_error(compile_without_a_compiler):
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda *args: torch._dynamo.graph_break())
    with pytest.raises(RuntimeError, match="graph_break"):
        measure(model, "tiny", BenchSettings(1, 8, 4, compile=True, repeats=1), progress=False)


def test_refuses_to_time_a_step_that_is_not_compiled(monkeypatch, compile_without_a_compiler):
    model = tiny_model("llama")
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *args: False)
    with pytest.raises(RuntimeError, match="does not compile LlamaForCausalLM; leave out --compile"):
        measure(model, "tiny", BenchSettings(1, 8, 4, compile=True, repeats=1), progress=False)


# --- two models


def test_one_model_at_a_time(monkeypatch):
    monkeypatch.setattr("hf_fp4.doctor.__version__", "1.2.3")
    alive, devices = [], []

    def load(name):
        assert all(model() is None for model in alive), "the first is still in memory"
        model = tiny_model("llama", torch.bfloat16)
        alive.append(weakref.ref(model))
        devices.append(name)
        return model

    result = bench(load, "a", "b", SMALL, progress=False)
    assert devices == ["a", "b"] == [m.name for m in result.models]
    assert result.versions["hf-fp4"] == "1.2.3" and result.dtype == "bfloat16"


def _measurement(name, prefill, decode, weights, peak):
    return Measurement(name, *(Rate(r, r, r) for r in (prefill, decode)), weights, 1e9, peak, {})


def test_ratio():
    models = [
        _measurement("fp4", 300.0, 40.0, 3 * 10**9, 4 * 10**9),
        _measurement("bf16", 200.0, 10.0, 6 * 10**9, 8 * 10**9),
    ]
    result = BenchResult(SMALL, models, "bfloat16", ["H100"])
    assert result.ratio() == {"prefill": 1.5, "decode": 4.0, "peak_bytes": 0.5, "weight_bytes": 0.5}
    header, *_, ratio = result.rows()
    assert ratio == ("ratio", "1.50", "4.00", "0.50", "0.50", "")
    assert {len(row) for row in result.rows()} == {len(header)}
    alone = BenchResult(SMALL, models[:1], "bfloat16", ["H100"])
    assert len(alone.rows()) == 2 and alone.to_dict()["ratio"] is None


def test_command_against_the_original(original, rtn, tmp_path, capsys):
    file = tmp_path / "result.json"
    command = ["bench", str(rtn), "--reference", str(original), "--json", str(file), *FLAGS]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    table = [line.split()[0] for line in lines if line][:4]
    assert table == ["model", str(rtn), str(original), "ratio"]
    assert any(line.startswith("bfloat16, batch 2, 8 prompt tokens, 4 new") for line in lines)
    assert f"FP4 linears of {rtn}: 14 on reference" in lines
    assert torch.__version__ in captured.out
    assert lines[-1].startswith("hf-fp4 bench ") and "--repeats 2" in lines[-1]
    assert "Timing" in captured.err, "a progress bar"

    result = json.loads(file.read_text())
    assert [m["name"] for m in result["models"]] == [str(rtn), str(original)]
    assert result["ratio"]["weight_bytes"] < 0.5
    assert result["settings"] == {
        "batch": 2,
        "prompt_tokens": 8,
        "new_tokens": 4,
        "compile": False,
        "repeats": 2,
    }
    assert result["command"] == lines[-1]


def test_command_alone_in_another_dtype(original, capsys):
    assert cli.main(["bench", str(original), "--dtype", "float32", *FLAGS]) == 0
    printed = capsys.readouterr().out
    assert "\nratio" not in printed and "float32, batch 2" in printed


# --- refusals


@pytest.mark.parametrize(
    ("name", "value"), [("batch", 0), ("prompt_tokens", 0), ("new_tokens", 1), ("repeats", 0)]
)
def test_refuses_sizes(name, value):
    with pytest.raises(ValueError, match=f"{name} must be at least {value + 1}, got {value}"):
        BenchSettings(**{name: value})


def test_refuses_more_tokens_than_the_model_takes():
    with pytest.raises(ValueError, match="max_position_embeddings of tiny, 128, got 129"):
        measure(tiny_model("llama"), "tiny", BenchSettings(1, 125, 4), progress=False)


def test_refuses_offloaded_weights():
    model = tiny_model("llama")
    model.hf_device_map = {"model": 0, "lm_head": "cpu"}
    with pytest.raises(ValueError, match="got device_map .*'0', 'cpu'"):
        measure(model, "tiny", SMALL, progress=False)


def test_refuses_a_model_without_a_static_cache():
    with pytest.raises(ValueError, match="RwkvForCausalLM, which does not"):
        measure(tiny_model("rwkv"), "tiny", SMALL, progress=False)


def test_refuses_to_time_a_broken_model():
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="logits must be finite, got NaN or inf from tiny"):
        measure(model, "tiny", SMALL, progress=False)


def test_refuses_a_decoding_step_that_is_broken():
    model = tiny_model("llama")
    model.model.norm.register_forward_hook(lambda _, __, y: y * float("nan") if y.shape[1] == 1 else y)
    with pytest.raises(RuntimeError, match="logits must be finite, got NaN or inf from tiny"):
        measure(model, "tiny", SMALL, progress=False)


def test_refuses_a_generation_that_ends_early():
    model = tiny_model("llama")
    model.generation_config.max_time = 0.0
    with pytest.raises(RuntimeError, match="must generate 5 tokens, got 1 "):
        measure(model, "tiny", SMALL, progress=False)


def test_refuses_a_json_file_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_load_model", lambda *args: 1 / 0)
    assert cli.main(["bench", "model", "--json", str(tmp_path / "no" / "result.json")]) == 2
    assert "--json must be in a directory that exists" in capsys.readouterr().err
