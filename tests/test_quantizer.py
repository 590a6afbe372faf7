"""From `from_pretrained` to a model that generates: every family, both formats, weights only and with activations."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_zoo import FAMILIES, linear_names, skeleton, tiny_model, tiny_tokens
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTForCausalLM,
    PreTrainedModel,
)

import hf_fp4
from hf_fp4 import FP4Linear, MRGPTQConfig
from hf_fp4.calibration import driver, forwards
from hf_fp4.calibration.capture import Outlet
from hf_fp4.calibration.group import Group
from hf_fp4.formats import FP4Format
from hf_fp4.gptq import round_weight
from hf_fp4.rotation import rotate
from hf_fp4.scales import FUSED_LINEARS, weight_global_scale, weight_scales

TOKENS = tiny_tokens(8, 32)
UNSEEN = tiny_tokens(4, 32, seed=5)
SIZES = {"num_samples": 8, "sequence_length": 32, "batch_size": 4}
FORMATS = ["nvfp4", "mxfp4"]
GROUP = {"nvfp4": 16, "mxfp4": 32}
PRECISIONS = ["fp4", "bf16"]
UNROTATED = {"hadamard_group_size": None}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory):
    """Path of a family's saved model, which is written at the first use."""
    root = tmp_path_factory.mktemp("zoo")

    def path(family: str, dtype: torch.dtype = torch.float32) -> Path:
        directory = root / f"{family}-{str(dtype).removeprefix('torch.')}"
        if not directory.exists():
            model = tiny_model(family, dtype)
            if model.can_generate():
                model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=2)
            model.save_pretrained(directory)
        return directory

    return path


@pytest.fixture(scope="module")
def correlated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral whose hidden states lie near a subspace, as those of a trained model do; the zoo's are white noise."""
    directory = tmp_path_factory.mktemp("correlated")
    model = tiny_model("mistral")
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    basis, _ = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))
    spectrum = torch.logspace(0, -2, hidden)
    with torch.no_grad():
        embeddings = torch.randn(model.config.vocab_size, hidden, generator=generator)
        model.model.embed_tokens.weight.copy_(embeddings * spectrum @ basis)
        for layer in model.model.layers:
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.copy_(basis.T @ (spectrum[:, None] * basis @ last.weight))
    model.save_pretrained(directory)
    return directory


def quantize(
    source: Path, auto_class: type = AutoModelForCausalLM, dtype: str | torch.dtype = "auto", **fields
) -> PreTrainedModel:
    config = MRGPTQConfig(**{"dataset": list(TOKENS), **SIZES, **fields})
    return auto_class.from_pretrained(source, quantization_config=config, dtype=dtype)


def original(source: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(source)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: torch.Tensor = UNSEEN) -> torch.Tensor:
    return model(tokens).logits


def distance(model: PreTrainedModel, reference: PreTrainedModel, tokens: torch.Tensor = UNSEEN) -> float:
    """Relative error of the logits, in the Frobenius norm."""
    expected = logits(reference, tokens).float()
    return ((logits(model, tokens).float() - expected).norm() / expected.norm()).item()


def fp4_linears(model: nn.Module) -> dict[str, FP4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Linear)}


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    """Every tensor of the model as bytes."""
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in model.state_dict().items()
    }


@contextmanager
def recorded_inputs(modules: dict[str, nn.Module]):
    """The inputs of modules, by name, in the order of their calls."""
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in modules}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].clone()))
        for name, module in modules.items()
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


# --- every family, both formats, W4A4 and W4A16


# Families meet both formats and both kinds of activations; one of them meets all four together.
@pytest.mark.parametrize(
    ("family", "format", "activations"),
    [(family, *kind) for family in FAMILIES for kind in (("nvfp4", "fp4"), ("mxfp4", "bf16"))]
    + [("llama", "nvfp4", "bf16"), ("llama", "mxfp4", "fp4")],
)
def test_calibrated(family, format, activations, zoo, caplog):
    source = zoo(family)
    model = quantize(source, format=format, activations=activations)
    quantizer = model.hf_quantizer

    linears = {name: skeleton(family).get_submodule(name) for name in linear_names(skeleton(family))}
    fitting = [n for n, m in linears.items() if m.in_features % GROUP[format] == 0 and n != "lm_head"]
    assert sorted(fp4_linears(model)) == sorted(fitting)
    assert all(layer.format.value == format for layer in fp4_linears(model).values())

    assert set(quantizer.skipped) == set(linears) - set(fitting)
    assert quantizer.skipped.pop("lm_head") == "output embeddings are never converted"
    for name, reason in quantizer.skipped.items():
        assert reason == (
            f"in_features must be a multiple of {GROUP[format]} for {format}, got {linears[name].in_features}"
        )
        assert type(model.get_submodule(name)) is nn.Linear

    assert sorted(row.name for row in quantizer.report) == sorted(fitting)
    for row in quantizer.report:
        assert 0 < row.error < 0.1
        assert row.seconds > 0
        assert fp4_linears(model)[row.name].hadamard_size == row.hadamard_size
    config = model.config.quantization_config
    assert config.modules == {row.name: row.hadamard_size for row in quantizer.report}
    assert config.calibration["tokens"] == TOKENS.numel()

    for layer in fp4_linears(model).values():
        static = format == "nvfp4" and activations == "fp4"
        assert (layer.input_global_scale is not None) == static
        assert (layer.activation_scale_rule is None) == (activations == "bf16")
    assert 0.001 < distance(model, original(source)) < (0.6 if activations == "fp4" else 0.4)
    assert not model.training
    output = model.generate(UNSEEN[:2, :4], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert output.shape == (2, 8)


def test_the_zoo_is_covered():
    assert {"llama", "qwen3", "mistral", "gemma3", "phi3", "gpt_neox", "opt"} <= set(FAMILIES)


def test_what_is_skipped_is_said_once(zoo, monkeypatch):
    said = []
    monkeypatch.setattr("hf_fp4.quantizer.logger.warning", said.append)
    quantize(zoo("llama-200"))
    reasons = (
        "in_features must be a multiple of 16 for nvfp4, got 200: model.layers.*.mlp.down_proj (x2)",
        "output embeddings are never converted: lm_head",
    )
    assert said == [f"not converted to FP4: {'; '.join(reasons)}"]


def test_embeddings_norms_heads_and_biases_are_the_originals(zoo):
    equalized = set()
    for family in ("opt", "llama", "gpt_neox"):
        source = zoo(family)
        before = dict(original(source).named_parameters())
        model = quantize(source)
        after = dict(model.named_parameters())
        kept = {name for name in before if name.removesuffix(".weight") not in fp4_linears(model)}
        assert kept == set(after)
        changed = {name for name in kept if not torch.equal(after[name], before[name])}
        assert all("norm" in name for name in changed), "only norms are equalized"
        equalized |= changed
        after = dict(quantize(source, equalize=False).named_parameters())
        assert all(torch.equal(after[name], before[name]) for name in kept)
    assert any(name.endswith("dense_h_to_4h.bias") for name in kept)
    assert equalized, "the channels of some input are uneven enough"


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "opt"])
def test_tied_embeddings_stay_tied(family, zoo):
    model = quantize(zoo(family))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_models_dtype_is_kept(format, dtype, zoo):
    source = zoo("opt", dtype)
    model = quantize(source, format=format)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).dtype == dtype
    assert distance(model, original(source)) < 0.6
    assert quantize(zoo("opt"), format=format, dtype=dtype).dtype == dtype


# --- better than rounding


@pytest.mark.parametrize("activations", PRECISIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_mr_gptq_is_better_than_rounding(format, activations, correlated):
    fields = {"format": format, "activations": activations, "num_samples": 32, "dataset": tiny_tokens(64, 32)}
    reference = original(correlated)
    solved = distance(quantize(correlated, **fields), reference)
    rounded = distance(quantize(correlated, method="rtn", scale_rule="absmax", **fields), reference)
    assert solved < (0.9 if activations == "fp4" else 0.7) * rounded


@pytest.mark.parametrize("format", FORMATS)
def test_the_solver_alone_is_better_than_rounding(format, correlated):
    fields = {"num_samples": 32, "dataset": tiny_tokens(64, 32), "error_correction": 0.0, **UNROTATED}
    fields |= {"format": format, "activations": "bf16", "scale_rule": "hessian", "descent_passes": 0}
    reference = original(correlated)
    solved = distance(quantize(correlated, **fields), reference)
    rounded = distance(quantize(correlated, method="rtn", **fields), reference)
    assert solved < 0.8 * rounded


@pytest.mark.parametrize(
    "fields",
    [{"scale_rule": "mse"}, {"act_order": False}, {"error_correction": 0.0}, {"descent_passes": 0}],
)
def test_each_part_of_the_method_changes_the_result(fields, correlated):
    assert state_bytes(quantize(correlated)) != state_bytes(quantize(correlated, **fields))


# --- the calibration sees what the quantized model computes


class Spy:
    """What every group was given to observe, and the outputs of every block on the quantized stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.quantized: dict[str, list[torch.Tensor]] = {}
        self.original: dict[str, list[torch.Tensor | None]] = {}
        observe = Group.observe

        def spied(group, x, original, tokens):
            for name in group.names:
                self.quantized.setdefault(f"{group.prefix}.{name}", []).append(x.clone())
                self.original.setdefault(f"{group.prefix}.{name}", []).append(original)
            return observe(group, x, original, tokens)

        monkeypatch.setattr(Group, "observe", spied)


@pytest.mark.parametrize(("format", "activations"), [("nvfp4", "fp4"), ("mxfp4", "fp4"), ("nvfp4", "bf16")])
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("opt", torch.bfloat16), ("phi3", torch.float16), ("gemma3", torch.bfloat16)],
)
def test_the_simulated_model_is_the_real_one_bit_for_bit(
    family, dtype, format, activations, zoo, monkeypatch
):
    """Also that the method is sequential: o_proj is calibrated on what the quantized q, k and v give, and so on.

    Equalized inputs of the original stream are those of the original model times powers of two, so that is left out here.
    """
    spy = Spy(monkeypatch)
    batches = []
    real = driver.quantize_model
    monkeypatch.setattr(
        "hf_fp4.quantizer.quantize_model", lambda *args: batches.extend(args[2].batches) or real(*args)
    )
    model = quantize(zoo(family, dtype), format=format, activations=activations, equalize=False)
    assert [len(batch) for batch in batches] == [4, 4]
    for seen, network in ((spy.quantized, model), (spy.original, original(zoo(family, dtype)))):
        modules = {name: network.get_submodule(name) for name in fp4_linears(model)}
        with recorded_inputs(modules) as inputs, torch.no_grad():
            for batch in batches:
                network(batch, use_cache=False)
        assert inputs.keys() == seen.keys()
        for name, expected in inputs.items():
            for x, y in zip(seen[name], expected, strict=True):
                assert torch.equal(x, y), name


@pytest.mark.parametrize("family", ["opt", "llama", "gemma3"])
def test_the_simulated_equalized_model_is_the_real_one_bit_for_bit(family, zoo, monkeypatch):
    spy, batches, run = Spy(monkeypatch), [], driver.quantize_model
    monkeypatch.setattr(
        "hf_fp4.quantizer.quantize_model", lambda *args: batches.extend(args[2].batches) or run(*args)
    )
    model = quantize(zoo(family, torch.bfloat16))
    with recorded_inputs({n: model.get_submodule(n) for n in fp4_linears(model)}) as inputs, torch.no_grad():
        for batch in batches:
            model(batch, use_cache=False)
    for name, expected in inputs.items():
        assert all(torch.equal(x, y) for x, y in zip(spy.quantized[name], expected, strict=True)), name


def test_within_a_block_later_inputs_depend_on_earlier_quantization(zoo, monkeypatch):
    spies = []
    for fields in ({}, {"modules_to_not_convert": ["layers.0.self_attn.v_proj"]}):
        with monkeypatch.context() as patch:
            spies.append(Spy(patch))
            quantize(zoo("llama"), **fields, **UNROTATED)
    first, second = (spy.quantized for spy in spies)
    prefix = "model.layers.0"
    assert torch.equal(first[f"{prefix}.self_attn.q_proj"][0], second[f"{prefix}.self_attn.q_proj"][0])
    for name in ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        assert not torch.equal(first[f"{prefix}.{name}"][0], second[f"{prefix}.{name}"][0])


@pytest.mark.parametrize(("fields", "streams"), [({"error_correction": 0.0}, 1), ({}, 2)])
def test_the_original_stream_runs_only_for_the_correction(fields, streams, zoo, monkeypatch):
    spy = Spy(monkeypatch)
    quantize(zoo("qwen2"), **fields)
    assert all((x is None) == (streams == 1) for seen in spy.original.values() for x in seen)


def test_each_block_runs_once_per_batch_and_stream(zoo, monkeypatch):
    calls, call_block = [], forwards.call_block

    def counted(block, *args):
        calls.append(block)
        return call_block(block, *args)

    monkeypatch.setattr(forwards, "call_block", counted)
    blocks = original(zoo("llama")).config.num_hidden_layers
    quantize(zoo("llama"))
    assert len(calls) == blocks * 2 * 2
    assert len(set(calls)) == blocks


@pytest.mark.parametrize(("streams", "waits_on"), [(5, "cuda:0"), (11, "cpu")])
def test_a_stream_that_would_fill_the_gpu_waits_in_cpu_memory(streams, waits_on, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90, 200))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    hidden = [SimpleNamespace(device=torch.device("cuda:0"), nbytes=1) for _ in range(streams)]
    assert driver._resting_device(hidden, torch.device("cuda:0")) == torch.device(waits_on)
    assert driver._resting_device(hidden, torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_inputs_that_do_not_fit_are_computed_again(name, zoo, monkeypatch):
    """Only one batch's input of a group is alive then, and the result has the same bytes."""
    expected = quantize(zoo(name)).state_dict()
    seen, alive = [], []
    observe = Group.observe

    def watched(self, x, original, tokens):
        seen.append(weakref.ref(x))
        alive.append(sum(each() is not None for each in seen))
        observe(self, x, original, tokens)

    monkeypatch.setattr(Group, "observe", watched)
    monkeypatch.setattr(driver, "_fits", lambda size, device: False)
    again = quantize(zoo(name)).state_dict()
    assert set(alive) == {1}
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[key], again[key]) for key in expected)


@pytest.mark.parametrize("fields", [{}, {"activations": "bf16"}], ids=["w4a4", "w4a16"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "olmoe"])
def test_what_led_to_a_known_input_is_not_computed_again(name, fields, zoo, monkeypatch):
    """Forwards do not wait, but the input of the attention's last linear is kept: the same bytes, of as many attentions."""
    attend, calls = nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: (calls.append(None), attend(*a, **k))[1],
    )
    expected = quantize(zoo(name), **fields).state_dict()
    waiting = len(calls)
    monkeypatch.setattr(driver, "_HELD", 1 << 40)
    monkeypatch.setattr(driver, "_fits", lambda size, device: size < 1 << 40)
    again = quantize(zoo(name), **fields).state_dict()
    assert waiting and len(calls) == 2 * waiting
    assert expected.keys() == again.keys()
    assert all(torch.equal(expected[key], again[key]) for key in expected)
    monkeypatch.setattr(driver, "_fits", lambda size, device: False)
    quantize(zoo(name), **fields)
    assert len(calls) > 4 * waiting


def test_no_more_is_kept_than_is_allowed(zoo, monkeypatch):
    """Of two batches one, and of the other the attention runs again."""
    attend, calls = nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(
        nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: (calls.append(None), attend(*a, **k))[1],
    )
    monkeypatch.setattr(driver, "_HELD", 1 << 40)
    monkeypatch.setattr(driver, "_fits", lambda size, device: size < 1 << 40)
    sizes = []
    real = driver._Block._keep
    monkeypatch.setattr(driver._Block, "_keep", lambda self, *a: (sizes.append(real(self, *a)), sizes[-1])[1])
    first = quantize(zoo("llama")).state_dict()
    all_kept, size = len(calls), max(sizes)
    assert sizes.count(size) > 2
    calls.clear(), sizes.clear()
    monkeypatch.setattr(driver, "_MOST_KNOWN", 2 * size - 1)
    second = quantize(zoo("llama")).state_dict()
    assert sizes.count(size) == 2 and len(calls) > all_kept  # one for each block
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_linears_of_a_part_that_is_asked_for_later_too_are_no_last_outlets():
    outlets = {"attn.out": Outlet("attn", None), "mlp.down": Outlet("mlp", None)}
    assert driver._last_outlets([["attn.q"], ["attn.out"], ["mlp.up"], ["mlp.down"]], outlets) == outlets
    groups = [["attn.out"], ["attn.gate"], ["mlp.up", "mlp.down"]]
    assert driver._last_outlets(groups, outlets) == {}


def test_blocks_visit_the_calibration_device(zoo, monkeypatch):
    """One at a time, and each comes back; here the device is another name of the CPU."""
    expected = quantize(zoo("llama")).state_dict()
    moves, to = [], torch.nn.Module.to

    def noted(module, device):
        moves.append((module, torch.device(device)))
        return to(module, device)

    monkeypatch.setattr(torch.nn.Module, "to", noted)
    model = quantize(zoo("llama"), calibration_device="cpu:0")
    blocks = list(model.model.layers)
    places = (torch.device("cpu:0"), torch.device("cpu"))
    assert moves == [(block, place) for block in blocks for place in places]
    assert "calibration_device" not in model.config.quantization_config.to_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8)), name


def test_a_failing_block_comes_back_from_the_calibration_device(zoo, monkeypatch):
    homes = []

    class Lost(RuntimeError):
        pass

    def fail(group):
        raise Lost

    monkeypatch.setattr(Group, "solve", fail)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: homes.append(torch.device(device)))
    with pytest.raises(Lost):
        quantize(zoo("llama"), calibration_device="cpu:0")
    assert homes == [torch.device("cpu:0"), torch.device("cpu")]


@pytest.mark.parametrize(
    ("gpu", "places", "expected"),
    [(True, ("cpu", "cpu"), "cuda"), (True, ("cpu", "meta"), None), (False, ("cpu", "cpu"), None)],
)
def test_a_model_in_cpu_memory_is_calibrated_on_the_gpu(gpu, places, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    blocks = [torch.nn.Linear(2, 2, device=place) for place in places]
    found = driver._calibration_device(MRGPTQConfig(), blocks)
    assert found == (None if expected is None else torch.device(expected))
    assert driver._calibration_device(MRGPTQConfig(calibration_device="cuda:1"), blocks) == torch.device(
        "cuda:1"
    )


def test_a_spread_model_has_its_calibration_devices():
    block = torch.nn.Linear(2, 2)
    block._hf_hook = object()
    with (
        pytest.raises(ValueError, match="calibration_device is for models that device_map does not spread"),
        driver._moved(block, torch.device("cpu:0")),
    ):
        pytest.fail("the block was moved")


@pytest.mark.parametrize("size", [None, 32])
def test_the_reported_error_is_that_of_the_outputs(size, zoo, monkeypatch):
    """With weights only and no correction it is ||X (Q - W)^T||^2 / ||X W^T||^2 on the inputs of the solve."""
    spy = Spy(monkeypatch)
    model = quantize(zoo("llama-200"), activations="bf16", error_correction=0.0, hadamard_group_size=size)
    before = original(zoo("llama-200"))
    errors = {row.name: row.error for row in model.hf_quantizer.report}
    shared = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}
    for name in (
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.self_attn.o_proj",
    ):
        parent, child = name.rsplit(".", 1)
        x = torch.cat(spy.quantized[name]).flatten(0, 1).double()
        changed = wanted = 0.0
        for partner in shared.get(child, (child,)):
            weight = before.get_submodule(f"{parent}.{partner}").weight.double()
            stored = model.get_submodule(f"{parent}.{partner}").dequantize(torch.float32).double()
            changed += (x @ (stored - weight).T).square().sum().item()
            wanted += (x @ weight.T).square().sum().item()
        assert errors[name] == pytest.approx(changed / wanted, rel=1e-3)


# --- scales


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
def test_fused_linears_share_their_global_scales(family, method, zoo):
    layers = fp4_linears(quantize(zoo(family), method=method))
    groups: dict[tuple, list[FP4Linear]] = {}
    for name, layer in layers.items():
        parent, _, child = name.rpartition(".")
        partners = next((group for group in FUSED_LINEARS if child in group), (child,))
        groups.setdefault((parent, partners), []).append(layer)
    blocks = skeleton(family).config.num_hidden_layers
    fused_already = family in ("phi3", "gpt_neox")
    assert sum(len(group) == 3 for group in groups.values()) == (0 if fused_already else blocks)
    for group in groups.values():
        assert len({layer.weight_global_scale.item() for layer in group}) == 1
        if method == "mr-gptq":
            assert len({layer.input_global_scale.item() for layer in group}) == 1
    assert len({layer.weight_global_scale.data_ptr() for layer in layers.values()}) == len(layers)


def test_a_shared_scale_fits_the_largest_of_the_partners(tmp_path):
    model = tiny_model("llama-200")
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 64
    model.save_pretrained(tmp_path)
    for method in ("rtn", "mr-gptq"):
        layers = fp4_linears(quantize(tmp_path, method=method, error_correction=0.0, **UNROTATED))
        largest = model.model.layers[0].self_attn.k_proj.weight.abs().max().view(1)
        for name in "qkv":
            layer = layers[f"model.layers.0.self_attn.{name}_proj"]
            assert torch.equal(layer.weight_global_scale, weight_global_scale(largest))
        unscaled = layers["model.layers.1.self_attn.k_proj"].weight_global_scale
        assert unscaled / layer.weight_global_scale in (32, 64, 128)


@pytest.mark.parametrize("large", [0, 1])
def test_the_input_scale_leaves_headroom_over_everything_seen(large, zoo, monkeypatch):
    """Also when one of the two batches is eight times as large as the other."""
    seen: dict[str, list[torch.Tensor]] = {}
    observe = Group.observe

    def scaled(group, x, original, tokens):
        batches = seen.setdefault(f"{group.prefix}.{group.names[0]}", [])
        batches.append(x * 8 if len(batches) == large else x)
        return observe(group, batches[-1], original, tokens)

    monkeypatch.setattr(Group, "observe", scaled)
    layers = fp4_linears(quantize(zoo("llama"), hadamard_group_size=16))
    for name, batches in seen.items():
        assert len(batches) == 2
        largest = max(rotate(x, 16).abs().max().item() for x in batches)
        saturates_at = 448 * 6 / layers[name].input_global_scale.item()
        assert 2 * largest <= saturates_at <= 4 * largest * 1.001


# --- fields


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
@pytest.mark.parametrize("size", [None, 16, 32, "auto"])
def test_hadamard_sizes(size, method, zoo):
    source = zoo("llama-200")
    model = quantize(source, hadamard_group_size=size, method=method, modules_to_not_convert=["down_proj"])
    chosen = {layer.hadamard_size for layer in fp4_linears(model).values()}
    if size != "auto":
        assert chosen == {size}
    elif method == "rtn":
        assert chosen == {None}
    else:
        assert chosen <= {None, 16, 32, 64}
        groups = {}
        for name, hadamard_size in model.config.quantization_config.modules.items():
            kind = re.sub("(q|k|v)_proj", "qkv", name).replace("gate", "up")
            groups.setdefault(kind, set()).add(hadamard_size)
        assert all(len(sizes) == 1 for sizes in groups.values())
    assert distance(model, original(source)) < 0.7


def test_a_fixed_hadamard_size_must_divide_every_in_features(zoo):
    message = "hadamard_group_size must divide in_features, got 64 for the 80 of model.layers.0.self_attn.q_proj; use 16"
    for method in ("mr-gptq", "rtn"):
        with pytest.raises(ValueError, match=message):
            quantize(zoo("llama"), hadamard_group_size=64, method=method)


def test_auto_takes_the_largest_size_for_mxfp4_rounding(zoo):
    model = quantize(zoo("llama"), format="mxfp4", method="rtn")
    assert {layer.hadamard_size for layer in fp4_linears(model).values()} == {32}
    model = quantize(zoo("llama"), format="mxfp4", method="rtn", activations="bf16")
    assert {layer.hadamard_size for layer in fp4_linears(model).values()} == {None}


RULES = [
    *(("nvfp4", rule, None) for rule in ("absmax", "mse", "four_over_six", "hessian")),
    *(("mxfp4", rule, None) for rule in ("absmax", "mse", "hessian")),
    ("nvfp4", "auto", "absmax"),
    ("mxfp4", "auto", "absmax"),
]


@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
@pytest.mark.parametrize(("format", "rule", "activation_rule"), RULES)
def test_scale_rules(format, rule, activation_rule, method, zoo):
    source = zoo("qwen2")
    fields = {"format": format, "method": method, **UNROTATED}
    model = quantize(source, scale_rule=rule, activation_scale_rule=activation_rule, **fields)
    expected = activation_rule or "mse"
    assert {layer.activation_scale_rule for layer in fp4_linears(model).values()} == {expected}
    assert distance(model, original(source)) < 0.7
    if rule != ("mse" if method == "rtn" else "hessian") and activation_rule is None:
        default = quantize(source, **fields)
        assert state_bytes(model) != state_bytes(default)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_error_correction(share, correlated):
    model = quantize(correlated, error_correction=share)
    assert distance(model, original(correlated)) < 0.6


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "batches"), [(5, 2, [2, 2, 1]), (3, 8, [3]), (1, 1, [1])]
)
def test_batches_of_uneven_size(num_samples, batch_size, batches, zoo, monkeypatch):
    spy = Spy(monkeypatch)
    model = quantize(zoo("mistral"), num_samples=num_samples, batch_size=batch_size)
    for seen in spy.quantized.values():
        assert [len(x) for x in seen] == batches
    assert model.config.quantization_config.calibration["tokens"] == num_samples * 32


def test_modules_to_not_convert(zoo):
    model = quantize(zoo("llama"), modules_to_not_convert=["mlp.down_proj", "model.layers.1"])
    names = {"q_proj", "k_proj", "v_proj", "o_proj"}
    expected = {f"model.layers.0.self_attn.{name}" for name in names}
    expected |= {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"}
    assert set(fp4_linears(model)) == expected
    assert model.hf_quantizer.skipped["model.layers.1.self_attn.q_proj"] == (
        '"model.layers.1" is in modules_to_not_convert'
    )


def test_the_papers_recipe_runs(zoo):
    config = MRGPTQConfig.paper("nvfp4", dataset=TOKENS, **SIZES)
    model = AutoModelForCausalLM.from_pretrained(zoo("llama"), quantization_config=config)
    assert {layer.hadamard_size for layer in fp4_linears(model).values()} == {16}
    assert {layer.activation_scale_rule for layer in fp4_linears(model).values()} == {"absmax"}


def test_a_config_may_be_a_dict(zoo):
    fields = {"quant_method": "mr_gptq", "method": "rtn", "format": "mxfp4"}
    model = AutoModelForCausalLM.from_pretrained(zoo("phi3"), quantization_config=fields)
    assert len(fp4_linears(model)) == 8


def test_one_config_serves_several_models(zoo, tmp_path):
    config = MRGPTQConfig(dataset=TOKENS, **SIZES)
    # Not by AutoModelForCausalLM, which copies its arguments.
    first = LlamaForCausalLM.from_pretrained(zoo("llama"), quantization_config=config)
    second = OPTForCausalLM.from_pretrained(zoo("opt"), quantization_config=config)
    assert config.modules is None and config.calibration is None
    for model in (first, second):
        assert set(model.config.quantization_config.modules) == set(fp4_linears(model))
    first.save_pretrained(tmp_path)
    assert torch.equal(logits(original(tmp_path)), logits(first))


# --- seeds


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_seed_gives_the_same_bytes(format, zoo):
    fields = {"format": format, "num_samples": 4, "dataset": tiny_tokens(32, 32)}
    torch.manual_seed(1)
    first = quantize(zoo("gemma3"), **fields)
    torch.manual_seed(2)
    again = quantize(zoo("gemma3"), **fields)
    assert state_bytes(first) == state_bytes(again)
    assert first.config.quantization_config.calibration == again.config.quantization_config.calibration
    other = quantize(zoo("gemma3"), seed=1, **fields)
    assert state_bytes(first) != state_bytes(other)
    fingerprints = {m.config.quantization_config.calibration["fingerprint"] for m in (first, other)}
    assert len(fingerprints) == 2


def test_quantizing_leaves_the_random_state_alone(zoo):
    state = torch.get_rng_state()
    quantize(zoo("llama"))
    assert torch.equal(torch.get_rng_state(), state)


# --- rounding to nearest


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("format", FORMATS)
def test_rounding_on_load_is_rounding_afterwards(format, rule, size, zoo):
    source = zoo("llama-200", torch.bfloat16)
    fmt = FP4Format(format)
    fields = {"modules_to_not_convert": ["down_proj"], "dataset": "not/needed"}
    model = quantize(source, format=format, method="rtn", scale_rule=rule, hadamard_group_size=size, **fields)
    before = original(source)
    for name, layer in fp4_linears(model).items():
        parent, _, child = name.rpartition(".")
        partners = next((group for group in FUSED_LINEARS if child in group), (child,))
        weights = {p: rotate(before.get_submodule(f"{parent}.{p}").weight.detach(), size) for p in partners}
        global_scale = None
        if fmt.has_global_scale:
            global_scale = weight_global_scale(max(w.abs().max() for w in weights.values()).view(1))
        scale = weight_scales(weights[child], fmt, rule, global_scale)
        expected = round_weight(weights[child], scale, fmt, global_scale)
        assert torch.equal(layer.weight, expected.packed)
        assert torch.equal(layer.weight_scale.view(torch.uint8), expected.scale.view(torch.uint8))
        if global_scale is not None:
            assert torch.equal(layer.weight_global_scale, global_scale)
        assert layer.input_global_scale is None
    rows = model.hf_quantizer.report
    assert {row.name for row in rows} == set(fp4_linears(model))
    assert all(row.error is None for row in rows)
    assert model.config.quantization_config.calibration is None


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounding_without_data(family, format, zoo):
    source = zoo(family)
    for activations in PRECISIONS:
        model = quantize(source, format=format, activations=activations, method="rtn", dataset="not/needed")
        assert distance(model, original(source)) < (0.7 if activations == "fp4" else 0.5)
    assert model.generate(UNSEEN[:1, :4], max_new_tokens=2, min_new_tokens=2, do_sample=False).shape == (1, 6)


def test_rounding_with_data_has_static_input_scales(zoo):
    source = zoo("llama")
    model = quantize(source, method="rtn", scale_rule="hessian")
    assert all(layer.input_global_scale is not None for layer in fp4_linears(model).values())
    assert all(row.error > 0 for row in model.hf_quantizer.report)
    assert model.config.quantization_config.calibration is not None
    assert distance(model, original(source)) < 0.7


@pytest.mark.parametrize(
    ("family", "auto_class"), [("bert", AutoModelForMaskedLM), ("t5", AutoModelForSeq2SeqLM)]
)
def test_encoders_are_rounded(family, auto_class, zoo):
    source = zoo(family)
    model = quantize(source, auto_class, method="rtn", dataset="not/needed")
    extra = {"decoder_input_ids": UNSEEN[:, :5]} if family == "t5" else {}
    with torch.no_grad():
        expected = auto_class.from_pretrained(source)(UNSEEN, **extra).logits
        actual = model(UNSEEN, **extra).logits
    assert 0.001 < (actual - expected).norm() / expected.norm() < 0.6
    assert len(fp4_linears(model)) == {"bert": 12, "t5": 28}[family]


def test_a_model_without_its_head_is_quantized(zoo):
    model = quantize(zoo("llama"), AutoModel)
    whole = quantize(zoo("llama"))
    with torch.no_grad():
        assert torch.equal(model(UNSEEN).last_hidden_state, whole.model(UNSEEN).last_hidden_state)
    assert {f"model.{name}" for name in fp4_linears(model)} == set(fp4_linears(whole))


# --- memory

PEAK = """
import os, sys
import torch
from transformers import AutoModelForCausalLM
from hf_fp4 import MRGPTQConfig
from peak_memory import peak_while


def load(path, **arguments):
    # In another dtype than the file's, whose pages would not count.
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float16, **arguments)


large, tiny = sys.argv[1:]
config = MRGPTQConfig(method="rtn", activations="bf16", scale_rule="absmax")
load(tiny, quantization_config=config)  # what is imported or cached once
for work in (lambda: load(large, quantization_config=config), lambda: load(large)):
    child = os.fork()  # each from the same start: freed memory is not always given back
    if child == 0:
        print(peak_while(work), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc/self/status")
def test_rounding_on_load_never_holds_the_unquantized_model(zoo, tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 150e6
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), str(zoo("llama", torch.bfloat16))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(hf_fp4.__file__).parents[1]), str(Path(__file__).parent)]
            ),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    quantized, unquantized = map(int, run.stdout.split())
    assert unquantized > 0.9 * size  # the measure sees a model that is in memory
    assert quantized < 0.65 * size  # 0.28 of it is the FP4 model
