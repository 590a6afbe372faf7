"""Export to compressed-tensors and import of other tools' layouts, against the stock loader and against the specifications."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import spec
import torch
import transformers
from model_zoo import save_with_tokenizer, tiny_model, tiny_tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fp4 import (
    FP4Linear,
    MRGPTQConfig,
    checkpoint_files,
    export_compressed_tensors,
    import_compressed_tensors,
)
from hf_fp4.cli import main

TOKENS = tiny_tokens(2, 16, seed=3)
SMALL_SHARDS = "20KB"
ABSMAX = {"activation_scale_rule": "absmax"}

VARIANTS = {
    "nvfp4": ("qwen2", ABSMAX),
    "mxfp4": ("qwen2", {"format": "mxfp4", **ABSMAX}),
    "nvfp4-w4a16": ("opt", {"activations": "bf16"}),
    "mxfp4-w4a16": ("qwen2", {"format": "mxfp4", "activations": "bf16"}),
    # in_features of 144 are no multiple of 32: only down_proj converts.
    "mxfp4-few": ("llama-144", {"format": "mxfp4", "activations": "bf16"}),
    "nvfp4-sharded": ("llama", ABSMAX),
    "nvfp4-float32": ("qwen3", {"activations": "bf16"}),
}
"""Family and fields. Biases: qwen2, opt; tied embeddings: qwen2, opt, llama."""


def quantize(source: Path, **fields):
    defaults = {"dataset": list(tiny_tokens(4, 16)), "num_samples": 4, "sequence_length": 16, "batch_size": 2}
    config = MRGPTQConfig(**{**defaults, "hadamard_group_size": None, **fields})
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """Path of a family's unquantized model in a dtype."""
    root = tmp_path_factory.mktemp("originals")

    def path(family: str, dtype: torch.dtype = torch.bfloat16) -> Path:
        directory = root / f"{family}-{dtype}"
        if not directory.exists():
            model = tiny_model(family, dtype)
            with (
                torch.no_grad()
            ):  # what a block adds is small, as in real models: differences do not grow from block to block
                for name, parameter in model.named_parameters():
                    if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight")):
                        parameter.mul_(0.25)
            model.save_pretrained(directory)
        return directory

    return path


def save_variant(name: str, originals, directory: Path):
    family, fields = VARIANTS[name]
    dtype = torch.float32 if "float32" in name else torch.bfloat16
    model = quantize(originals(family, dtype), **fields)
    model.save_pretrained(directory, max_shard_size=SMALL_SHARDS if "sharded" in name else "5GB")
    return model


@pytest.fixture(scope="module")
def exports(originals, tmp_path_factory):
    """Every variant: the model, where it is saved and where it is exported."""
    root = tmp_path_factory.mktemp("exports")
    found = {}
    for name in VARIANTS:
        model = save_variant(name, originals, root / "ours" / name)
        export_compressed_tensors(root / "ours" / name, root / "theirs" / name)
        found[name] = (model, root / "ours" / name, root / "theirs" / name)
    return found


def read_json(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        key: value
        for file in sorted(directory.glob("*.safetensors"))
        for key, value in load_file(file).items()
    }


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())


def array(tensor: torch.Tensor) -> np.ndarray:
    """Bytes of uint8 and E4M3, numbers of anything else, in float64."""
    if tensor.dtype in (torch.uint8, torch.float8_e4m3fn):
        return tensor.view(torch.uint8).numpy()
    return tensor.double().numpy()


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**read_json(file), **changes}), encoding="utf-8")


def edit_tensors(directory: Path, **changes) -> None:
    """Set tensors of model.safetensors; None removes one."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    save_file(tensors, file, metadata={"format": "pt"})


# --- what is written


@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_name_of_the_weight_changes(name, exports):
    model, ours, theirs = exports[name]
    linears = {n for n, module in model.named_modules() if isinstance(module, FP4Linear)}
    before, after = tensors_of(ours), tensors_of(theirs)
    assert linears
    renamed = {f"{n}.weight": f"{n}.weight_packed" for n in linears}
    assert after.keys() == {renamed.get(key, key) for key in before}
    for key, tensor in before.items():
        new = after[renamed.get(key, key)]
        assert (new.dtype, new.shape, raw(new)) == (tensor.dtype, tensor.shape, raw(tensor))


def weights_and_inputs(group_size: int, strategy: str, scale_dtype: str, dynamic) -> tuple[dict, dict]:
    common = {"num_bits": 4, "type": "float", "symmetric": True, "group_size": group_size}
    common |= {"strategy": strategy, "scale_dtype": scale_dtype}
    return {**common, "dynamic": False}, {**common, "dynamic": dynamic}


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvfp4-w4a16", "mxfp4-w4a16"])
def test_golden_config(name, exports):
    _, ours, theirs = exports[name]
    format = name[:5]
    layout = f"{format}-pack-quantized"
    if format == "nvfp4":
        weights, inputs = weights_and_inputs(16, "tensor_group", "torch.float8_e4m3fn", "local")
    else:
        weights, inputs = weights_and_inputs(32, "group", "torch.uint8", True)
    before, after = (read_json(directory / "config.json") for directory in (ours, theirs))
    assert after["quantization_config"] == {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None if "w4a16" in name else inputs,
                "output_activations": None,
                "format": layout,
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    del before["quantization_config"], after["quantization_config"]
    assert before == after


def test_golden_bytes(tmp_path):
    """A linear whose bytes are written here by hand."""
    tiny_model("qwen2", torch.bfloat16).save_pretrained(tmp_path / "ours")
    name = "model.layers.0.self_attn.q_proj"
    packed = torch.arange(64 * 32, dtype=torch.int64).to(torch.uint8).view(64, 32)
    scales = torch.arange(256).remainder(126).add(1).to(torch.uint8).view(64, 4).view(torch.float8_e4m3fn)
    new = {"weight": packed, "weight_scale": scales, "weight_global_scale": torch.tensor([48.0])}
    new["input_global_scale"] = torch.tensor([2.5])
    edit_tensors(tmp_path / "ours", **{f"{name}.{key}": value for key, value in new.items()})
    config = MRGPTQConfig(hadamard_group_size=None, modules={name: None}, calibration={})
    edit_json(tmp_path / "ours" / "config.json", quantization_config=config.to_dict())
    export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    stored = {k: v for k, v in tensors_of(tmp_path / "theirs").items() if k.startswith(name)}
    assert {key.removeprefix(f"{name}.") for key in stored} == {
        "weight_packed",
        "weight_scale",
        "weight_global_scale",
        "input_global_scale",
        "bias",
    }
    assert raw(stored[f"{name}.weight_packed"]) == bytes(i % 256 for i in range(64 * 32))
    assert raw(stored[f"{name}.weight_scale"]) == bytes(i % 126 + 1 for i in range(256))
    assert raw(stored[f"{name}.weight_global_scale"]) == bytes.fromhex("00004042")
    assert raw(stored[f"{name}.input_global_scale"]) == bytes.fromhex("00002040")
    ignored = read_json(tmp_path / "theirs" / "config.json")["quantization_config"]["ignore"]
    assert "lm_head" in ignored and name not in ignored and len(ignored) == 14


def test_what_is_not_quantized_is_ignored(exports, originals, tmp_path):
    _, _, theirs = exports["mxfp4-few"]
    ignored = read_json(theirs / "config.json")["quantization_config"]["ignore"]
    kept = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    assert ignored == sorted(
        ["lm_head", *(f"model.layers.{i}.{name}" for i in range(2) for name in (*kept, "mlp.up_proj"))]
    )
    # Routers are no nn.Linear in transformers; vLLM makes its linears of them.
    fields = {"activations": "bf16", "modules_to_not_convert": ["model.layers.1.mlp.experts"]}
    quantize(originals("qwen2_moe"), **fields).save_pretrained(tmp_path / "ours")
    export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    ignored = read_json(tmp_path / "theirs" / "config.json")["quantization_config"]["ignore"]
    assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.experts.3.up_proj"} <= set(ignored)
    assert not {"model.embed_tokens", "model.layers.0.mlp.experts.3.up_proj"} & set(ignored)


def test_the_dtype_is_bfloat16(exports):
    _, ours, theirs = exports["nvfp4-float32"]
    assert read_json(ours / "config.json")["dtype"] == "float32"
    assert read_json(theirs / "config.json")["dtype"] == "bfloat16"


def test_files_of_the_model_come_along(tmp_path):
    source, ours, theirs = tmp_path / "source", tmp_path / "ours", tmp_path / "theirs"
    save_with_tokenizer(source)
    quantize(source, method="rtn", activations="bf16").save_pretrained(ours)
    AutoTokenizer.from_pretrained(source).save_pretrained(ours)
    (ours / "additional_chat_templates").mkdir()
    for name in (
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "training_args.bin",
        "notes.safetensors",
        "x.index.json",
    ):
        (ours / name).write_text(name)
    (ours / "additional_chat_templates" / "tools.jinja").write_text("tools")
    before = {file: file.read_bytes() for file in ours.rglob("*") if file.is_file()}
    assert export_compressed_tensors(ours, theirs) == theirs
    assert {file: file.read_bytes() for file in ours.rglob("*") if file.is_file()} == before
    kept = {
        "chat_template.jinja",
        "LICENSE",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    written = {file.name for file in theirs.iterdir()}
    assert written == kept | {
        "config.json",
        "model.safetensors",
        "mr_gptq_config.json",
        "additional_chat_templates",
    }
    for name in kept:
        assert (theirs / name).read_bytes() == (ours / name).read_bytes()
    assert (theirs / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    assert AutoTokenizer.from_pretrained(theirs)("abc") == AutoTokenizer.from_pretrained(source)("abc")


@pytest.mark.parametrize("name", VARIANTS)
def test_export_and_import_give_the_same_files(name, exports, tmp_path):
    _, ours, theirs = exports[name]
    assert (len(list(theirs.glob("*.safetensors"))) > 1) == ("sharded" in name)
    import_compressed_tensors(theirs, tmp_path / "back")
    expected = contents(ours)
    expected.pop("README.md", None)  # a model card says how to load the checkpoint that it is in
    assert contents(tmp_path / "back") == expected


# --- the stock loader

STOCK = """
import sys
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
tokens = torch.load(root / "tokens.pt")
for directory in sorted((root / "theirs").iterdir()):
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    record = {}
    def remember(name):
        def hook(module, args, output):
            record[name] = (args[0], output, module.weight.detach())
        return hook
    with torch.no_grad():
        model(tokens)  # the first pass unpacks the weights
        for name, module in model.named_modules():
            if hasattr(module, "quantization_scheme"):
                module.register_forward_hook(remember(name))
        logits = model(tokens).logits
    torch.save({"logits": logits, "layers": record}, root / f"{directory.name}.pt")
    print("loaded", directory.name)
assert not [name for name in sys.modules if name.partition(".")[0] == "hf_fp4"]
print("without hf_fp4")
"""


@pytest.fixture(scope="module")
def stock(exports, tmp_path_factory):
    """Logits, and input, output and weight of every quantized linear, of a process that never imports hf_fp4."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    root = tmp_path_factory.mktemp("stock")
    torch.save(TOKENS, root / "tokens.pt")
    for name, (_, _, theirs) in exports.items():
        shutil.copytree(theirs, root / "theirs" / name)
    shutil.copytree(root / "theirs" / "nvfp4", root / "theirs" / "transformed")
    config = root / "theirs" / "transformed" / "config.json"
    apply = [{"targets": ["Linear"], "location": "input", "ignore": ["lm_head"]}]
    transform = {"config_groups": {"r": {"type": "hadamard", "head_dim": 16, "apply": apply}}}
    edit_json(
        config,
        quantization_config={**read_json(config)["quantization_config"], "transform_config": transform},
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", STOCK, str(root)],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "without hf_fp4"
    assert run.stdout.count("loaded") == len(VARIANTS) + 1
    return {name: torch.load(root / f"{name}.pt") for name in (*VARIANTS, "transformed")}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.fixture(scope="module")
def reloaded(exports):
    """Every variant as this package loads it, in bfloat16 as the stock loader has it."""
    return {
        name: AutoModelForCausalLM.from_pretrained(ours, dtype=torch.bfloat16)
        for name, (_, ours, _) in exports.items()
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_stock_weights_are_ours(name, stock, reloaded):
    layers = {n: m for n, m in reloaded[name].named_modules() if isinstance(m, FP4Linear)}
    assert stock[name]["layers"].keys() == layers.keys()
    for key, (_, _, weight) in stock[name]["layers"].items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, layers[key].dequantize(torch.bfloat16)), key


@torch.no_grad()
def test_stock_logits_of_weights_only(stock, reloaded):
    for name in VARIANTS:
        if "w4a16" in name or name in ("mxfp4-few", "nvfp4-float32"):
            assert distance(stock[name]["logits"], reloaded[name](TOKENS).logits) < 0.02, name


def stock_quantized(x: torch.Tensor, format: str, global_scale: float) -> np.ndarray:
    """Activations as compressed-tensors quantizes them, from bfloat16, written anew in float64.

    The scale of a block is its largest magnitude over 6 in bfloat16, then E4M3; for mxfp4 the exponent of the largest
    magnitude minus 2, or minus 1 from 1.75 times the power of two on.
    """
    blocks = x.double().numpy().reshape(*x.shape[:-1], -1, spec.GROUP[format])
    absmax = np.abs(blocks).max(-1, keepdims=True)
    if format == "mxfp4":
        mantissa, exponent = np.frexp(absmax)
        step = np.exp2(exponent - 1.0 - 2 + (mantissa * 2 >= 1.75))
    else:
        sixth = (torch.from_numpy(absmax).bfloat16() / 6).double().numpy()
        scale = spec.E4M3[spec.nearest_codes(sixth * global_scale, spec.E4M3[:127])]
        step = np.where(scale == 0, 0.125, scale) / global_scale
    return (spec.round_e2m1(blocks / step) * step).reshape(x.shape)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "nvfp4-sharded"])
def test_stock_linears_compute_what_the_bytes_stand_for(name, stock, exports):
    """Each linear alone, on the input it had: against float64 arithmetic on the exported bytes."""
    tensors = {key: array(value) for key, value in tensors_of(exports[name][2]).items()}
    format = name[:5]
    for key, (x, y, _) in stock[name]["layers"].items():
        part = {k.rpartition(".")[2]: v for k, v in tensors.items() if k.rpartition(".")[0] == key}
        scale = part.get("weight_global_scale", np.ones(1))[0]
        weight = spec.dequantize(format, part["weight_packed"], part["weight_scale"], scale)
        expected = stock_quantized(x, format, part.get("input_global_scale", np.ones(1))[0]) @ weight.T
        unquantized = x.double().numpy() @ weight.T
        bias = part.get("bias", 0.0)
        error = distance(y, torch.from_numpy(expected + bias))
        assert error < 0.01, key
        assert error < 0.2 * distance(y, torch.from_numpy(unquantized + bias)), key


# Where NVFP4 differs, it is since bfloat16 rounds the scale before E4M3 does; where MXFP4 does, it is the other exponent.
@pytest.mark.parametrize(
    ("name", "rule", "limit"),
    [("nvfp4", "absmax", 0.03), ("nvfp4-sharded", "absmax", 0.03), ("mxfp4", "mse", 0.12)],
)
@torch.no_grad()
def test_our_linears_are_close_to_the_stock_ones(name, rule, limit, stock, reloaded):
    ours, weight_only = [], []
    for key, (x, y, _) in stock[name]["layers"].items():
        layer = reloaded[name].get_submodule(key)
        before = layer.activation_scale_rule
        try:
            layer.activation_scale_rule = rule
            ours.append(distance(layer(x), y))
            layer.activation_scale_rule = None
            weight_only.append(distance(layer(x), y))
        finally:
            layer.activation_scale_rule = before
    assert max(ours) < limit
    assert np.mean(ours) < 0.5 * np.mean(weight_only)


@pytest.mark.parametrize("name", ["nvfp4", "nvfp4-sharded", "mxfp4"])
@torch.no_grad()
def test_stock_logits_are_ours_with_the_stock_scales_of_activations(name, stock, exports):
    model = AutoModelForCausalLM.from_pretrained(exports[name][1], dtype=torch.bfloat16)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FP4Linear)}
    divisors = {
        n: 1.0 if m.input_global_scale is None else m.input_global_scale.item() for n, m in layers.items()
    }
    ours = model(TOKENS).logits
    model.dequantize()

    def quantize_input(divisor: float):
        return lambda module, args: torch.from_numpy(stock_quantized(args[0], name[:5], divisor)).bfloat16()

    for key, divisor in divisors.items():
        model.get_submodule(key).register_forward_pre_hook(quantize_input(divisor))
    same = model(TOKENS).logits
    assert distance(same, stock[name]["logits"]) < 1e-3
    assert distance(ours, same) > 0.01, "the scales of activations make no difference here"


@pytest.mark.parametrize(
    ("name", "rule"), [("nvfp4", "absmax"), ("nvfp4-sharded", "absmax"), ("mxfp4", "mse")]
)
@torch.no_grad()
def test_stock_logits_with_quantized_activations(name, rule, stock, exports):
    """A code that rounds the other way moves all that follows, so the measure is what float32 changes in our own."""
    logits = []
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(exports[name][1], dtype=dtype)
        for layer in model.modules():
            if isinstance(layer, FP4Linear):
                layer.activation_scale_rule = rule
        logits.append(model(TOKENS).logits)
    assert distance(logits[0], stock[name]["logits"]) < 1.5 * distance(*logits)


def test_stock_loader_does_not_rotate(stock):
    """The reason for which rotated layers are refused: a transform_config changes nothing."""
    assert torch.equal(stock["transformed"]["logits"], stock["nvfp4"]["logits"])


# --- export: refusals


def test_rotated_layers_are_refused(originals, tmp_path, capsys):
    quantize(originals("qwen2"), method="rtn", activations="bf16", hadamard_group_size=16).save_pretrained(
        tmp_path / "ours"
    )
    message = (
        r"got 14 rotated linears: model.layers.0.mlp.down_proj, .* and 11 more. .*hadamard_group_size=None"
    )
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    assert main(["export", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 2
    assert "hf-fp4: error: expected a model without rotations" in capsys.readouterr().err


def test_w4a4_without_calibration_goes_out_as_weights_only(originals, tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    quantize(originals("qwen2"), method="rtn").save_pretrained(ours)
    with pytest.raises(ValueError, match=r'input_global_scale for nvfp4 W4A4.*activations="bf16"'):
        export_compressed_tensors(ours, theirs)
    assert main(["export", str(ours), str(theirs), "--activations", "bf16"]) == 0
    assert f"written: {theirs}" in capsys.readouterr().out
    group = read_json(theirs / "config.json")["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"] is None


def test_weights_only_drops_the_input_scales(exports, tmp_path):
    _, ours, _ = exports["nvfp4"]
    export_compressed_tensors(ours, tmp_path / "theirs", activations="bf16")
    gone = {key for key in tensors_of(ours) if key.endswith("input_global_scale")}
    assert len(gone) == 14
    assert len(tensors_of(ours)) - len(tensors_of(tmp_path / "theirs")) == 14
    import_compressed_tensors(tmp_path / "theirs", tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert model.model.layers[0].mlp.up_proj.activation_scale_rule is None


def test_activations_that_the_checkpoint_has_not(exports, tmp_path):
    with pytest.raises(ValueError, match="activations must be None, \"bf16\" or .*'bf16'.*, got 'fp4'"):
        export_compressed_tensors(exports["nvfp4-w4a16"][1], tmp_path / "theirs", activations="fp4")


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_only_checkpoints_of_this_package_are_exported(name, exports, originals, tmp_path):
    with pytest.raises(
        ValueError, match="expected a checkpoint that hf-fp4 quantized, got an unquantized one"
    ):
        export_compressed_tensors(originals("qwen2"), tmp_path / "out")
    with pytest.raises(ValueError, match="got one of quant_method 'compressed-tensors'"):
        export_compressed_tensors(exports[name][2], tmp_path / "out")
    with pytest.raises(ValueError, match="got one of hf-fp4; load .* as it is"):
        import_compressed_tensors(exports[name][1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{Q}.weight": None}, "config.json lists 14 quantized linears, the files have 13 .*q_proj"),
        ({f"{Q}.weight_scale": None}, f"no block scales for {Q}"),
        ({f"{Q}.weight_global_scale": None}, f"{Q}.weight_global_scale is missing"),
        ({f"{Q}.input_global_scale": None}, f"input_global_scale for nvfp4 W4A4, {Q}"),
        ({f"{Q}.input_global_scale": torch.zeros(1)}, f"{Q}.input_global_scale must be a positive"),
        (
            {f"{Q}.weight": torch.zeros(64, 16, dtype=torch.uint8)},
            rf"{Q}.weight must be uint8 \[64, 32\], got U8 \[64, 16\]",
        ),
        (
            {f"{Q}.weight_scale": torch.ones(64, 2).to(torch.float8_e4m3fn)},
            rf"{Q}.weight_scale must be .*\[64, 4\].*got .*\[64, 2\]",
        ),
    ],
    ids=["weight", "scale", "global", "input", "zero", "shape", "scale-shape"],
)
def test_a_damaged_checkpoint_is_not_exported(change, message, exports, tmp_path):
    shutil.copytree(exports["nvfp4"][1], tmp_path / "ours")
    edit_tensors(tmp_path / "ours", **change)
    with pytest.raises(ValueError, match=message):
        export_compressed_tensors(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_warns_of_what_vllm_fuses(exports, originals, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("hf_fp4.compressed_tensors.logger.warning", said.append)
    shutil.copytree(exports["nvfp4"][1], tmp_path / "different")
    edit_tensors(tmp_path / "different", **{f"{Q}.weight_global_scale": torch.tensor([3.0])})
    export_compressed_tensors(tmp_path / "different", tmp_path / "a")
    quantize(
        originals("qwen2"), method="rtn", activations="bf16", modules_to_not_convert=["k_proj"]
    ).save_pretrained(tmp_path / "partly")
    export_compressed_tensors(tmp_path / "partly", tmp_path / "b")
    export_compressed_tensors(exports["nvfp4"][1], tmp_path / "c")
    assert len(said) == 2
    assert "v_proj have different weight_global_scales; vLLM" in said[0]
    assert "only some of" in said[1] and "k_proj" in said[1]


# --- where it is written


def test_a_directory_with_other_files_is_kept(exports, tmp_path):
    _, ours, _ = exports["mxfp4"]
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has files in it that this command did not write; .*--overwrite"):
        export_compressed_tensors(ours, tmp_path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}
    export_compressed_tensors(ours, tmp_path, overwrite=True)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "model.safetensors").exists()


def test_an_earlier_result_is_replaced(exports, tmp_path):
    export_compressed_tensors(exports["nvfp4-sharded"][1], tmp_path / "out")
    export_compressed_tensors(exports["mxfp4"][1], tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").glob("*.safetensors*")} == {"model.safetensors"}
    with pytest.raises(ValueError, match="did not write"):
        import_compressed_tensors(exports["nvfp4"][2], tmp_path / "out")
    (tmp_path / "ct").mkdir()
    for file in exports["nvfp4"][2].iterdir():
        if file.name != "mr_gptq_config.json":
            shutil.copy(file, tmp_path / "ct")
    import_compressed_tensors(tmp_path / "ct", tmp_path / "in")
    import_compressed_tensors(tmp_path / "ct", tmp_path / "in")


def test_the_checkpoint_itself_is_no_target(exports):
    for function, directory in ((export_compressed_tensors, 1), (import_compressed_tensors, 2)):
        source = exports["mxfp4"][directory]
        before = contents(source)
        with pytest.raises(ValueError, match="must not be the checkpoint itself"):
            function(source, source, overwrite=True)
        assert contents(source) == before


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_changes_nothing(existing, exports, tmp_path, monkeypatch):
    target = tmp_path / "out"
    if existing:
        export_compressed_tensors(exports["mxfp4"][1], target)
    before = contents(target) if existing else None
    save, calls = checkpoint_files.save_file, []

    def failing(tensors, filename, **kwargs):
        save(tensors, filename, **kwargs)
        calls.append(filename)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(filename))

    monkeypatch.setattr(checkpoint_files, "save_file", failing)
    with pytest.raises(OSError, match="No space left on device"):
        export_compressed_tensors(exports["nvfp4-sharded"][1], target)
    assert len(calls) == 2
    assert (contents(target) if existing else None) == before
    assert target.exists() == existing


def test_one_weight_file_is_in_memory_at_a_time(exports, tmp_path, monkeypatch):
    seen = []
    save = checkpoint_files.save_file
    monkeypatch.setattr(
        checkpoint_files,
        "save_file",
        lambda tensors, *args, **kwargs: seen.append(set(tensors)) or save(tensors, *args, **kwargs),
    )
    _, ours, _ = exports["nvfp4-sharded"]
    export_compressed_tensors(ours, tmp_path / "out")
    index = read_json(ours / "model.safetensors.index.json")["weight_map"]
    assert [len(names) for names in seen] == [
        list(index.values()).count(f) for f in sorted(set(index.values()))
    ]


# --- import: checkpoints as other tools write them, made here from their specifications


def foreign(directory: Path, write_linear, family: str = "qwen2", seed: int = 0) -> dict[str, np.ndarray]:
    """Save a model whose linears ``write_linear(rng, rows, columns) -> (tensors, float64 weight)`` made; their weights."""
    model = tiny_model(family, torch.bfloat16)
    model.save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    rng, weights = np.random.default_rng(seed), {}
    for key in sorted(tensors):
        module, _, leaf = key.rpartition(".")
        if leaf == "weight" and module.endswith("_proj"):
            made, weights[module] = write_linear(rng, *tensors.pop(key).shape)
            tensors |= {f"{module}.{name}": torch.from_numpy(np.array(value)) for name, value in made.items()}
    save_file(
        {
            k.removesuffix("#e4m3"): v.view(torch.float8_e4m3fn) if k.endswith("#e4m3") else v
            for k, v in tensors.items()
        },
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    return weights


def nvfp4_codes(rng, rows, columns):
    packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    return packed, rng.integers(1, 0x7F, (rows, columns // 16), dtype=np.uint8)


def mxfp4_codes(rng, rows, columns):
    packed = rng.integers(0, 256, (rows, columns // 2), dtype=np.uint8)
    return packed, rng.integers(116, 124, (rows, columns // 32), dtype=np.uint8)


def llm_compressor_config(format: str, activations: str) -> dict:
    """As llm-compressor writes it, with all that a loader may ignore."""
    nvfp4 = format == "nvfp4"
    args = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 16 if nvfp4 else 32,
        "num_bits": 4,
        "observer": "static_minmax",
        "observer_kwargs": {},
        "scale_dtype": "torch.float8_e4m3fn" if nvfp4 else "torch.uint8",
        "strategy": "tensor_group" if nvfp4 else "group",
        "symmetric": True,
        "type": "float",
        "zp_dtype": None,
    }
    inputs = {**args, "dynamic": "local" if nvfp4 else True}
    group = {"format": f"{format}-pack-quantized", "output_activations": None, "targets": ["Linear"]}
    group |= {"weights": args, "input_activations": inputs if activations == "fp4" else None}
    return {
        "config_groups": {"group_0": group},
        "format": f"{format}-pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float", "symmetric": True},
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.14.0",
    }


def write_llm_compressor(directory: Path, format: str, activations: str) -> dict[str, np.ndarray]:
    def linear(rng, rows, columns):
        if format == "mxfp4":
            packed, scales = mxfp4_codes(rng, rows, columns)
            return {"weight_packed": packed, "weight_scale": scales}, spec.dequantize(format, packed, scales)
        packed, scales = nvfp4_codes(rng, rows, columns)
        divisor = np.float32(rng.uniform(1e4, 1e5))
        made = {
            "weight_packed": packed,
            "weight_scale#e4m3": scales,
            "weight_global_scale": divisor.reshape(1),
        }
        if activations == "fp4":
            made["input_global_scale"] = np.float32([300.0])
        return made, spec.dequantize(format, packed, scales, float(divisor))

    weights = foreign(directory, linear)
    edit_tensors(directory, **{"model.layers.0.self_attn.k_scale": torch.ones(1)})
    edit_json(directory / "config.json", quantization_config=llm_compressor_config(format, activations))
    return weights


def write_modelopt(
    directory: Path, algorithm: str = "NVFP4", *, own_file: bool = False
) -> dict[str, np.ndarray]:
    """w = e2m1 * weight_scale * weight_scale_2; scales of whole tensors have no dimension."""

    def linear(rng, rows, columns):
        packed, scales = nvfp4_codes(rng, rows, columns)
        multiplier = np.float32(rng.uniform(1e-5, 1e-4))
        made = {"weight": packed, "weight_scale#e4m3": scales, "weight_scale_2": multiplier}
        if algorithm == "NVFP4":
            made["input_scale"] = np.float32(0.003)
        return made, spec.dequantize("nvfp4", packed, scales) * float(multiplier)

    weights = foreign(directory, linear)
    edit_tensors(directory, **{"model.layers.0.self_attn.k_proj.k_scale": torch.ones(())})
    if own_file:
        details = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "group_size": 16}
        quantization = {
            "producer": {"name": "modelopt"},
            "quantization": {**details, "exclude_modules": ["lm_head"]},
        }
        (directory / "hf_quant_config.json").write_text(json.dumps(quantization))
    else:
        config = {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": ["lm_head"]}
        edit_json(directory / "config.json", quantization_config=config)
    return weights


def write_fp_quant(
    directory: Path, format: str, *, factor: float = 3.0, padded: bool = False, size: int = 32, matrix=None
) -> dict[str, np.ndarray]:
    """w = e2m1 * scales / weight_global_scale, rotated; scales are uint8 and may be padded to 128 rows and 4 columns."""
    rotated, matrix = (size, spec.hadamard(size)) if matrix is None else (None, matrix)

    def linear(rng, rows, columns):
        packed, scales = (nvfp4_codes if format == "nvfp4" else mxfp4_codes)(rng, rows, columns)
        if format == "mxfp4":
            packed[0, :16], scales[0, 0] = 0x80, 3  # a block of zeros, whose scale may be anything
        divisor = np.float32(rng.uniform(1e4, 1e5) if format == "nvfp4" else factor)
        weight = spec.dequantize(format, packed, scales, float(divisor))
        if padded:
            room = ((0, -rows % 128), (0, -scales.shape[1] % 4))
            scales = np.pad(scales, room, constant_values=0xFF)
        made = {
            "qweight": packed,
            "scales": scales,
            "weight_global_scale": divisor.reshape(1),
            "act_global_scale": np.float32([250.0 if format == "nvfp4" else factor]),
            "forward_hadamard_matrix": matrix.astype(np.float32),
            "backward_hadamard_matrix": matrix.astype(np.float32),
            "dqweight": np.zeros(0, np.float32),
        }
        return made, spec.rotate(weight, rotated)

    weights = foreign(directory, linear)
    tensors = load_file(directory / "model.safetensors")
    halves = {k: v.bfloat16() for k, v in tensors.items() if k.endswith("_hadamard_matrix")}
    edit_tensors(directory, **halves)
    config = {"quant_method": "fp_quant", "forward_dtype": format, "forward_method": "abs_max"}
    config |= {"hadamard_group_size": size, "pseudoquantization": False, "store_master_weights": False}
    edit_json(directory / "config.json", quantization_config=config)
    return weights


def imported(directory: Path, out: Path, weights: dict[str, np.ndarray], **kwargs):
    """The imported model, after its weights were compared with what the layout stands for."""
    before = contents(directory)
    assert import_compressed_tensors(directory, out, **kwargs) == out
    assert contents(directory) == before
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, FP4Linear)}
    assert layers.keys() == weights.keys()
    for name, layer in layers.items():
        ours = layer.dequantize(torch.float32).double().numpy()
        rounding = (
            1e-6 * np.abs(weights[name]).max() if layer.hadamard_size else 0.0
        )  # a rotation adds in float32
        np.testing.assert_allclose(ours, weights[name], rtol=1e-6, atol=rounding)
        assert layer.bias is None or torch.equal(
            layer.bias, load_file(directory / "model.safetensors")[f"{name}.bias"]
        )
    with torch.no_grad():
        assert model(TOKENS).logits.isfinite().all()
    return model, layers


@pytest.mark.parametrize("activations", ["fp4", "bf16"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp4"])
def test_llm_compressor(format, activations, tmp_path):
    weights = write_llm_compressor(tmp_path / "in", format, activations)
    model, layers = imported(tmp_path / "in", tmp_path / "out", weights)
    stored = tensors_of(tmp_path / "in")
    for key, tensor in tensors_of(tmp_path / "out").items():
        module, _, leaf = key.rpartition(".")
        origin = f"{module}.weight_packed" if leaf == "weight" and module in layers else key
        assert raw(tensor) == raw(stored[origin])
    config = model.config.quantization_config
    assert (config.format, config.activations, config.hadamard_group_size) == (format, activations, None)
    assert config.activation_scale_rule == ("absmax" if format == "nvfp4" else "mse")
    for layer in layers.values():
        assert (layer.input_global_scale is not None) == (format == "nvfp4" and activations == "fp4")


def test_the_activation_rule_can_be_chosen(tmp_path, capsys):
    write_llm_compressor(tmp_path / "in", "nvfp4", "fp4")
    command = [
        "import",
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        "--activation-scale-rule",
        "four_over_six",
    ]
    assert main(command) == 0
    assert f"written: {tmp_path / 'out'}" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[1].mlp.down_proj.activation_scale_rule == "four_over_six"
    assert main(["import", *command[1:-1], "fp5", "--overwrite"]) == 2
    assert "activation_scale_rule for nvfp4 must be one of" in capsys.readouterr().err


def test_an_imported_checkpoint_is_exported_again(tmp_path):
    weights = write_llm_compressor(tmp_path / "in", "nvfp4", "fp4")
    imported(tmp_path / "in", tmp_path / "out", weights)
    export_compressed_tensors(tmp_path / "out", tmp_path / "again")
    before, after = tensors_of(tmp_path / "in"), tensors_of(tmp_path / "again")
    del before["model.layers.0.self_attn.k_scale"]
    assert {k: raw(v) for k, v in before.items()} == {k: raw(v) for k, v in after.items()}


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4"])
def test_modelopt(algorithm, own_file, tmp_path):
    weights = write_modelopt(tmp_path / "in", algorithm, own_file=own_file)
    model, layers = imported(tmp_path / "in", tmp_path / "out", weights)
    assert model.config.quantization_config.activations == ("fp4" if algorithm == "NVFP4" else "bf16")
    for layer in layers.values():
        if algorithm == "NVFP4":
            assert layer.input_global_scale.item() == pytest.approx(1 / 0.003, rel=1e-6)
        else:
            assert layer.input_global_scale is None
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize("padded", [False, True])
def test_fp_quant_nvfp4(padded, tmp_path):
    weights = write_fp_quant(tmp_path / "in", "nvfp4", padded=padded, size=16)
    _, layers = imported(tmp_path / "in", tmp_path / "out", weights)
    for layer in layers.values():
        assert layer.hadamard_size == 16 and layer.input_global_scale.item() == 250.0


@pytest.mark.parametrize("padded", [False, True])
def test_fp_quant_mxfp4_with_its_factor_of_three(padded, tmp_path):
    weights = write_fp_quant(tmp_path / "in", "mxfp4", padded=padded)
    model, layers = imported(tmp_path / "in", tmp_path / "out", weights)
    assert model.config.quantization_config.format == "nvfp4"
    for layer in layers.values():
        assert layer.hadamard_size == 32 and layer.input_global_scale is None
        assert (layer.weight_scale.shape[1], layer.in_features % 16) == (layer.in_features // 16, 0)


def test_fp_quant_mxfp4_with_a_power_of_two(tmp_path):
    weights = write_fp_quant(tmp_path / "in", "mxfp4", factor=0.5)
    model, _ = imported(tmp_path / "in", tmp_path / "out", weights)
    assert model.config.quantization_config.format == "mxfp4"


def test_fp_quant_without_rotation(tmp_path):
    weights = write_fp_quant(tmp_path / "in", "nvfp4", matrix=np.eye(32))
    _, layers = imported(tmp_path / "in", tmp_path / "out", weights)
    assert {layer.hadamard_size for layer in layers.values()} == {None}


def test_block_scales_of_zero_mean_zeros(tmp_path):
    """Our loader refuses them, since nothing here writes them; other tools do for blocks of zeros."""
    weights = write_llm_compressor(tmp_path / "in", "nvfp4", "fp4")
    scale = load_file(tmp_path / "in" / "model.safetensors")[f"{Q}.weight_scale"]
    scale.view(torch.uint8)[3, 1] = 0
    edit_tensors(tmp_path / "in", **{f"{Q}.weight_scale": scale})
    weights[Q][3, 16:32] = 0
    imported(tmp_path / "in", tmp_path / "out", weights)


# --- import: refusals


def config_with(**changes):
    return lambda directory: edit_json(
        directory / "config.json",
        quantization_config={**read_json(directory / "config.json")["quantization_config"], **changes},
    )


def group_with(part: str, **changes):
    def change(directory: Path) -> None:
        config = read_json(directory / "config.json")["quantization_config"]
        config["config_groups"]["group_0"][part].update(changes)
        edit_json(directory / "config.json", quantization_config=config)

    return change


def tensors_with(**changes):
    return lambda directory: edit_tensors(directory, **changes)


def as_pickle(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def truncate(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 1000)


def with_index(file: str, name: str):
    def change(directory: Path) -> None:
        index = {"metadata": {}, "weight_map": {name: file}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))

    return change


def second_scheme(directory: Path) -> None:
    config = read_json(directory / "config.json")["quantization_config"]
    group = {**config["config_groups"]["group_0"], "input_activations": None}
    config["config_groups"]["group_1"] = group
    edit_json(directory / "config.json", quantization_config=config)


def without(name: str):
    return lambda directory: (directory / name).unlink()


PACKED = torch.zeros(64, 32, dtype=torch.uint8)
NAN_SCALE = torch.full((64, 4), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
ROTATION = {"config_groups": {"r": {"type": "hadamard", "apply": []}}}

BROKEN_LLM_COMPRESSOR = {
    "no-weight": (tensors_with(**{f"{Q}.weight_packed": None}), f"{Q} has .* and no weight_packed"),
    "no-scale": (tensors_with(**{f"{Q}.weight_scale": None}), f"no tensor {Q}.weight_scale"),
    "no-global": (tensors_with(**{f"{Q}.weight_global_scale": None}), f"no tensor {Q}.weight_global_scale"),
    "no-input": (tensors_with(**{f"{Q}.input_global_scale": None}), f"no tensor {Q}.input_global_scale"),
    "shape": (
        tensors_with(**{f"{Q}.weight_packed": PACKED[:32]}),
        rf"{Q}.weight_packed must be uint8 \[64, 32\], got U8 \[32, 32\]",
    ),
    "dtype": (tensors_with(**{f"{Q}.weight_packed": PACKED.float()}), r"must be uint8 .*, got F32"),
    "scale-shape": (
        tensors_with(**{f"{Q}.weight_scale": torch.ones(64, 2).to(torch.float8_e4m3fn)}),
        rf"{Q}.weight_scale must be .*\[64, 4\]",
    ),
    "nan": (
        tensors_with(**{f"{Q}.weight_scale": NAN_SCALE}),
        f"{Q}.weight_scale holds 256 zero, negative or NaN",
    ),
    "zero-point": (
        tensors_with(**{f"{Q}.weight_zero_point": PACKED}),
        f"got {Q}.weight_zero_point, which hf-fp4 does not run",
    ),
    "stranger": (
        tensors_with(**{"model.layers.0.mlp.experts.0.up_proj.weight_packed": PACKED}),
        r"Qwen2ForCausalLM has no linear model.layers.0.mlp.experts.0.up_proj \(and 0 more\)",
    ),
    "format": (
        config_with(format="int-quantized", config_groups={"group_0": {"targets": ["Linear"]}}),
        "got 'int-q",
    ),
    "no-groups": (config_with(config_groups={}), "expected one scheme .*got none"),
    "two-schemes": (second_scheme, "expected one scheme .*'bf16'.*'fp4'"),
    "bits": (
        group_with("input_activations", num_bits=8),
        "for the input_activations of nvfp4.*'num_bits': 8",
    ),
    "group-size": (group_with("weights", group_size=128), "for the weights of nvfp4.*'group_size': 128"),
    "asymmetric": (group_with("weights", symmetric=False), "expected symmetric weights"),
    "transform": (config_with(transform_config=ROTATION), "the checkpoint has a transform_config"),
    "sparse": (config_with(sparsity_config={"format": "sparse-24-bitmask"}), "the checkpoint is sparse"),
    "method": (config_with(quant_method="gptq"), "expected quant_method compressed-tensors.*got 'gptq'"),
    "pickle": (as_pickle, "safetensors only, got pytorch_model.bin, which can run code"),
    "truncated": (truncate, "model.safetensors cannot be read"),
    "no-weights": (without("model.safetensors"), "expected model.safetensors or .*got neither"),
    "no-config": (without("config.json"), "has no config.json"),
    "index-file": (
        with_index("model-00001-of-00002.safetensors", "x"),
        "names model-00001.* which is not there",
    ),
    "index-path": (with_index("../model.safetensors", "x"), "names ../model.safetensors, which is not there"),
    "index-name": (with_index("model.safetensors", "x.y"), r"lists x.y \(and 0 more\) that no file has"),
}


@pytest.mark.parametrize("case", BROKEN_LLM_COMPRESSOR)
def test_broken_llm_compressor(case, tmp_path):
    change, message = BROKEN_LLM_COMPRESSOR[case]
    write_llm_compressor(tmp_path / "in", "nvfp4", "fp4")
    change(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        import_compressed_tensors(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


BROKEN_MODELOPT = {
    "no-weight": (tensors_with(**{f"{Q}.weight": None}), f"no tensor {Q}.weight;"),
    "no-global": (tensors_with(**{f"{Q}.weight_scale_2": None}), f"{Q} has .* and no weight_scale_2"),
    "algorithm": (config_with(quant_algo="FP8"), "expected quant_algo NVFP4 or W4A16_NVFP4 .*got 'FP8'"),
    "group-size": (config_with(group_size=32), "expected group_size 16 for NVFP4, got 32"),
    "no-input": (tensors_with(**{f"{Q}.input_scale": None}), f"no tensor {Q}.input_scale"),
    "zero": (
        tensors_with(**{f"{Q}.weight_scale_2": torch.zeros(())}),
        f"{Q}.weight_scale_2 must be one positive",
    ),
    "many": (
        tensors_with(**{f"{Q}.weight_scale_2": torch.ones(2)}),
        f"{Q}.weight_scale_2 must be one positive",
    ),
    "smoothing": (
        tensors_with(**{f"{Q}.pre_quant_scale": torch.ones(64)}),
        f"got {Q}.pre_quant_scale, which hf-fp4",
    ),
}


@pytest.mark.parametrize("case", BROKEN_MODELOPT)
def test_broken_modelopt(case, tmp_path):
    change, message = BROKEN_MODELOPT[case]
    write_modelopt(tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        import_compressed_tensors(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def wide_scales(directory: Path) -> None:
    scales = load_file(directory / "model.safetensors")[f"{Q}.scales"]
    scales[1, 0] = 100  # 23 octaves below the largest of the writer
    edit_tensors(directory, **{f"{Q}.scales": scales})


BROKEN_FP_QUANT = {
    "no-weight": (tensors_with(**{f"{Q}.qweight": None}), f"{Q} has .* and no qweight"),
    "dtype": (config_with(forward_dtype="int4"), "expected forward_dtype nvfp4 or mxfp4 .*got 'int4'"),
    "pseudo": (config_with(pseudoquantization=True), "weights that are not packed"),
    "no-scales": (tensors_with(**{f"{Q}.scales": None}), f"no tensor {Q}.scales"),
    "scales-shape": (
        tensors_with(**{f"{Q}.scales": PACKED[:63, :2].contiguous()}),
        rf"{Q}.scales must be uint8 \[64, 2\]",
    ),
    "matrix": (
        tensors_with(**{f"{Q}.forward_hadamard_matrix": torch.eye(32).roll(1, 0)}),
        f"{Q}.forward_hadamard_matrix must be a normalized Sylvester",
    ),
    "no-matrix": (tensors_with(**{f"{Q}.forward_hadamard_matrix": None}), f"no tensor {Q}.forward_hadamard"),
    "no-factor": (tensors_with(**{f"{Q}.weight_global_scale": None}), f"no tensor {Q}.weight_global_scale"),
    "unpacked": (tensors_with(**{f"{Q}.dqweight": torch.ones(64, 64)}), "both packed and unpacked weights"),
    "wide": (wide_scales, f"block scales of {Q} .* span 23 powers of two, more than the 17"),
}


@pytest.mark.parametrize("case", BROKEN_FP_QUANT)
def test_broken_fp_quant(case, tmp_path):
    change, message = BROKEN_FP_QUANT[case]
    write_fp_quant(tmp_path / "in", "mxfp4")
    change(tmp_path / "in")
    with pytest.raises(ValueError, match=message):
        import_compressed_tensors(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_that_was_changed_is_not_restored(exports, tmp_path):
    shutil.copytree(exports["nvfp4"][2], tmp_path / "in")
    config = read_json(tmp_path / "in" / "config.json")["quantization_config"]
    config["config_groups"]["group_0"]["input_activations"] = None
    edit_json(tmp_path / "in" / "config.json", quantization_config=config)
    with pytest.raises(ValueError, match="mr_gptq_config.json does not fit the checkpoint"):
        import_compressed_tensors(tmp_path / "in", tmp_path / "out")


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="expected a directory or a repository on the Hub, got 'me/nothing'"):
        import_compressed_tensors("me/nothing", tmp_path / "out")


def test_a_model_whose_code_is_elsewhere(tmp_path):
    """Without its class nothing is known of its linears; names in the files must do."""
    weights = write_llm_compressor(tmp_path / "in", "mxfp4", "bf16")
    edit_json(tmp_path / "in" / "config.json", architectures=["SomebodysForCausalLM"])
    assert not hasattr(transformers, "SomebodysForCausalLM")
    imported(tmp_path / "in", tmp_path / "out", weights)
    export_compressed_tensors(tmp_path / "out", tmp_path / "again")
    ignored = read_json(tmp_path / "again" / "config.json")["quantization_config"]["ignore"]
    assert ignored == ["lm_head", "model.embed_tokens"]
