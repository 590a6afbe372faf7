"""`from_pretrained` quantizes: every family, both formats, every option; and what calibration promises holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_zoo import FAMILIES, skeleton, tiny_model, tiny_tokens
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, LlamaConfig, LlamaForCausalLM

from hf_fp4 import FP4Linear, MRGPTQConfig
from hf_fp4.calibration import driver

SIZES = {"num_samples": 8, "sequence_length": 24, "batch_size": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directory of a tiny model, written once per family."""
    written = {}

    def directory(family: str) -> Path:
        if family not in written:
            written[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(written[family])
        return written[family]

    return directory


def quantize(source: Path, auto=AutoModelForCausalLM, **options):
    config = MRGPTQConfig(**{"dataset": list(tiny_tokens(8, 24)), **SIZES, **options})
    return auto.from_pretrained(source, quantization_config=config)


def fp4_layers(model) -> dict[str, FP4Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, FP4Linear)}


def state(model) -> dict[str, bytes]:
    return {
        key: value.contiguous().view(torch.uint8).numpy().tobytes()
        for key, value in model.state_dict().items()
    }


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, format, saved):
    original = tiny_model(family)
    model = quantize(saved(family), format=format)
    quantizer, layers = model.hf_quantizer, fp4_layers(model)
    group = 16 if format == "nvfp4" else 32
    linears = {name: m for name, m in original.named_modules() if type(m) is torch.nn.Linear}
    expected = {
        name
        for name, m in linears.items()
        if m.in_features % group == 0 and "lm_head" not in name and "embed" not in name
    }
    assert set(layers) == expected == {row.name for row in quantizer.report} and len(layers) > 0
    assert set(quantizer.skipped) == set(linears) - expected
    assert model.config.quantization_config.modules == {n: m.hadamard_size for n, m in layers.items()}
    assert all(row.error is not None and 0 < row.error < 0.1 for row in quantizer.report)
    for name, layer in layers.items():
        bias = linears[name].bias
        assert (layer.bias is None) == (bias is None) and (bias is None or torch.equal(layer.bias, bias))
    tokens = tiny_tokens(2, 20, seed=5)
    reference, got = logits(original, tokens), logits(model, tokens)
    assert (got - reference).norm() < 0.6 * reference.norm()
    assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (2, 23)


@pytest.mark.parametrize(
    "options",
    [
        {"activations": "bf16"},
        {"format": "mxfp4", "activations": "bf16", "hadamard_group_size": 16},
        {"error_correction": 0.0, "hadamard_group_size": None},
        {"act_order": False, "scale_rule": "absmax"},
        {"scale_rule": "four_over_six", "activation_scale_rule": "absmax"},
        {"scale_rule": "mse", "batch_size": 3},
        {"method": "rtn"},
        {"method": "rtn", "scale_rule": "hessian"},
    ],
)
def test_every_option_runs_and_matters(options, saved):
    base, model = (quantize(saved("llama-144"), **changes) for changes in ({}, options))
    assert state(base) != state(model)
    tokens = tiny_tokens(2, 20, seed=5)
    reference = logits(tiny_model("llama-144"), tokens)
    assert (logits(model, tokens) - reference).norm() < 0.7 * reference.norm()
    static = [layer.input_global_scale is not None for layer in fp4_layers(model).values()]
    calibrated = options.get("method") != "rtn" or "scale_rule" in options
    assert all(static) if calibrated and options.get("activations") != "bf16" else not any(static)


def test_the_paper_recipe(saved):
    model = quantize(saved("llama-144"))
    paper = AutoModelForCausalLM.from_pretrained(
        saved("llama-144"), quantization_config=MRGPTQConfig.paper(dataset=list(tiny_tokens(8, 24)), **SIZES)
    )
    assert {layer.hadamard_size for layer in fp4_layers(paper).values()} == {16}
    assert {layer.activation_scale_rule for layer in fp4_layers(paper).values()} == {"absmax"}
    assert state(paper) != state(model)


def test_the_solver_beats_rounding_on_the_calibration_text(saved):
    tokens = tiny_tokens(8, 24)
    reference = logits(tiny_model("llama-144"), tokens)
    plain = {"hadamard_group_size": None, "scale_rule": "mse", "activations": "bf16", "error_correction": 0.0}
    errors = {
        method: (logits(quantize(saved("llama-144"), method=method, **plain), tokens) - reference).norm()
        for method in ("rtn", "mr-gptq")
    }
    assert errors["mr-gptq"] < 0.9 * errors["rtn"]


def test_same_seed_same_bytes(saved):
    text = list(tiny_tokens(16, 24))
    runs = [quantize(saved("qwen3"), dataset=text, seed=seed) for seed in (0, 0, 1)]
    assert state(runs[0]) == state(runs[1]) != state(runs[2])
    fingerprints = [run.config.quantization_config.calibration["fingerprint"] for run in runs]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_the_callers_config_is_not_written_to(saved):
    config = MRGPTQConfig(dataset=list(tiny_tokens(8, 24)), **SIZES)
    AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=config)
    assert config.modules is None and config.calibration is None


def test_partners_share_their_global_scales(saved):
    for name, layer in fp4_layers(quantize(saved("llama"))).items():
        for first, others in {"q_proj": ("k_proj", "v_proj"), "gate_proj": ("up_proj",)}.items():
            if name.endswith(first):
                model_layers = fp4_layers(quantize(saved("llama")))
                for other in others:
                    partner = model_layers[name.replace(first, other)]
                    assert torch.equal(layer.weight_global_scale, partner.weight_global_scale)
                    assert torch.equal(layer.input_global_scale, partner.input_global_scale)
                    assert layer.hadamard_size == partner.hadamard_size


def test_calibration_computes_what_the_layers_will(saved, monkeypatch):
    """The quantized stream that enters block 1 is, bit for bit, what the finished model computes."""
    seen = {}
    advance = driver._Block.advance

    def record(self, batches):
        advance(self, batches)
        seen[self._index] = [batch.quantized.clone() for batch in batches]

    monkeypatch.setattr(driver._Block, "advance", record)
    model = quantize(saved("qwen2"))
    inputs = []
    model.model.layers[1].register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    data = driver_batches(model)
    for batch in data:
        logits(model, batch)
    assert len(inputs) == 2
    for got, expected in zip(inputs, seen[0], strict=True):
        assert torch.equal(got, expected)


def driver_batches(model) -> list[torch.Tensor]:
    """The batches that `quantize` calibrated on."""
    from hf_fp4.calibration.data import calibration_batches

    tokens = list(tiny_tokens(8, 24))
    return calibration_batches(tokens, None, seed=0, vocab_size=model.config.vocab_size, **SIZES).batches


def test_later_linears_see_the_quantized_earlier_ones(saved, monkeypatch):
    """Within a block: o_proj is calibrated on what quantized q/k/v make of the input."""
    moments = {}
    observe = driver._Group.observe

    def record(self, x, original):
        moments.setdefault(self._title, []).append(
            (x.clone(), None if original is None else original.clone())
        )
        observe(self, x, original)

    monkeypatch.setattr(driver._Group, "observe", record)
    quantize(saved("llama"))
    qkv, o = moments["model.layers.0.self_attn.q_proj (+2)"], moments["model.layers.0.self_attn.o_proj"]
    assert all(torch.equal(x, original) for x, original in qkv)  # nothing before them is quantized
    assert all(not torch.equal(x, original) for x, original in o)


# --- rounding while loading


@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_on_load_gives_the_bytes_of_rounding_afterwards(format, saved):
    from hf_fp4.gptq import round_weight
    from hf_fp4.rotation import rotate
    from hf_fp4.scales import fused_partners, weight_global_scale, weight_scales

    model = quantize(saved("llama-144"), method="rtn", format=format, hadamard_group_size=16)
    original = dict(tiny_model("llama-144").named_modules())
    for name, layer in fp4_layers(model).items():
        group = [rotate(original[n].weight.detach(), 16) for n in fused_partners(name)]
        scale = weight_global_scale(torch.stack([w.abs().amax() for w in group]).amax().view(1))
        scale = scale if format == "nvfp4" else None
        weight = rotate(original[name].weight.detach(), 16)
        expected = round_weight(
            weight, weight_scales(weight, layer.format, "mse", scale), layer.format, scale
        )
        assert torch.equal(layer.weight, expected.packed)
        assert torch.equal(layer.weight_scale.view(torch.uint8), expected.scale.view(torch.uint8))


def test_encoders_and_encoder_decoders_round(saved):
    model = quantize(saved("bert"), AutoModelForMaskedLM, method="rtn", dataset="builtin")
    assert len(fp4_layers(model)) >= 12
    assert torch.isfinite(logits(model, tiny_tokens(1, 12))).all()


PEAK = """
import sys, threading, time
import torch, transformers, hf_fp4
from transformers import AutoModelForCausalLM

def anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

torch.set_num_threads(1)
warm = torch.randn(64, 64) @ torch.randn(64, 64)
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
options = {"quantization_config": hf_fp4.MRGPTQConfig(method="rtn", activations="bf16")} if sys.argv[2] == "fp4" else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, **options)
for parameter in model.parameters():
    parameter.data = parameter.data.clone()  # mapped from the file until it is touched
done.set()
print((peak[0] if options else anonymous()) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
def test_the_unquantized_model_is_never_in_memory(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)

    def grown(kind: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), kind], capture_output=True, text=True, check=True
        )
        return int(done.stdout.split()[-1])

    assert size > 150e6
    assert grown("bf16") > 0.9 * size  # so the measure sees a model that is in memory
    assert grown("fp4") < 0.6 * size


def test_the_skipped_are_named_once_with_their_reason(saved, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    try:
        model = quantize(saved("llama-200"))
    finally:
        logging.disable_propagation()
    reason = "in_features must be a multiple of 16 for nvfp4, got 200"
    assert sum(reason in record.getMessage() for record in caplog.records) == 1
    assert reason in model.hf_quantizer.skipped["model.layers.0.mlp.down_proj"]
    assert type(model.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_a_skeleton_needs_no_weights_to_be_planned():
    from hf_fp4.formats import FP4Format
    from hf_fp4.layers.replace import select_linears

    assert len(select_linears(skeleton("llama"), FP4Format.NVFP4).selected) == 14
    assert json.dumps(MRGPTQConfig().to_dict())
