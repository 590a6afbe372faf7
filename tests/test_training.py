"""Training on a quantized model: autocast, LoRA through PEFT, `Trainer`, gradient checkpointing."""

from __future__ import annotations

import copy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_kernels
import peft
import pytest
import torch
from model_zoo import tiny_model, tiny_tokens
from packaging import version
from peft import (
    AdaLoraConfig,
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
    prepare_model_for_kbit_training,
)
from test_kernel_layers import Attention
from test_linear import KINDS, Case, Made
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

import hf_fp4
from hf_fp4 import FP4Linear, MRGPTQConfig, quantizer
from hf_fp4.backends import KernelSource
from hf_fp4.layers import linear as linear_module
from hf_fp4.layers.linear import use_kernels
from hf_fp4.layers.lora import refuse_merging

TOKENS = tiny_tokens(2, 16, seed=3)
DATA = [{"input_ids": row, "labels": row} for row in tiny_tokens(8, 16, seed=1)]
ATTENTION = ["q_proj", "v_proj"]
IDS = {"ids": str}

# What transformers 5.23 calls activation checkpointing has only this name in PEFT 0.21 and transformers 5.17.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.\w*gradient_checkpointing\w*. is deprecated:FutureWarning"),
    # PyTorch's own, when it compiles a torch.autograd.Function.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A quantized bf16 model with biases in its linears."""
    directory = tmp_path_factory.mktemp("training")
    tiny_model("opt", torch.bfloat16).save_pretrained(directory / "original")
    model = AutoModelForCausalLM.from_pretrained(
        directory / "original", quantization_config=MRGPTQConfig(method="rtn")
    )
    model.save_pretrained(directory / "quantized")
    return directory / "quantized"


@pytest.fixture
def model(checkpoint) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint)


def packed(model: nn.Module) -> list[torch.Tensor]:
    """A copy of the codes and scales of every FP4 layer."""
    layers = [module for module in model.modules() if isinstance(module, FP4Linear)]
    states = [layer.state_dict() for layer in layers]
    tensors = [state[name] for state in states for name in state if name != "bias"]
    assert len(tensors) == 3 * len(layers) > 0
    return [tensor.detach().clone().view(torch.uint8) for tensor in tensors]


def unchanged(before: list[torch.Tensor], model: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, packed(model), strict=True))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(input_ids=TOKENS).logits


def lora(model: PreTrainedModel, **fields) -> PeftModel:
    return get_peft_model(
        model, LoraConfig(**{"r": 4, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **fields})
    )


def train(model: nn.Module, directory: Path, **arguments) -> list[float]:
    """Losses of a run of `Trainer` over the same eight rows."""
    fields = {
        "max_steps": 20,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **arguments,
    }
    trainer = Trainer(
        model=model, args=TrainingArguments(output_dir=str(directory), **fields), train_dataset=DATA
    )
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


# --- autocast


def on_fake_kernels(layer: FP4Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, "select", lambda source, device: fake_kernels.found())
    assert layer.use_kernels(KernelSource("me/kernels", 3)).backend == "fake"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
@pytest.mark.parametrize("case", [KINDS[0], KINDS[3], KINDS[7]], **IDS)
def test_autocast(case: Case, kernels, compiled, monkeypatch):
    """As `nn.Linear` does: computed in bfloat16 whatever comes in, and gradients in the dtype of what came."""
    layer = Made(replace(case, out_features=48), bias=True).layer
    layer.bias.requires_grad_()
    x, gradient = torch.randn(5, layer.in_features), torch.randn(5, 48, dtype=torch.bfloat16)
    reference = x.bfloat16().requires_grad_()
    expected = layer(reference)
    expected_gradients = torch.autograd.grad(expected, (reference, layer.bias), gradient)
    if kernels:
        on_fake_kernels(layer, monkeypatch)
        fake_kernels.prepared.clear()
    torch.compiler.reset()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(x.requires_grad_())
        with torch.no_grad():
            assert torch.equal(run(x), expected)
    assert actual.dtype == torch.bfloat16 and torch.equal(actual, expected)
    gradients = torch.autograd.grad(actual, (x, layer.bias), gradient)
    assert [g.dtype for g in gradients] == [torch.float32, layer.bias.dtype]
    for g, wanted in zip(gradients, expected_gradients, strict=True):
        assert torch.equal(g, wanted.to(g.dtype))
    assert len(fake_kernels.prepared) >= 2 * kernels, "the kernels did not run"
    with torch.no_grad():
        assert layer(x).dtype == torch.float32, "autocast ended"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("gradients", [False, True], ids=["inference", "gradients"])
def test_layers_on_one_input_share_its_preparation_under_autocast(gradients, compiled, monkeypatch):
    found = fake_kernels.found()
    monkeypatch.setattr(linear_module, "select", lambda source, device: found)
    block = Attention()
    x = torch.randn(5, block.q_proj.in_features)
    expected = block(x.bfloat16())
    use_kernels(block, KernelSource("me/kernels", 3))
    torch.compiler.reset()
    run = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
    x.requires_grad_(gradients)
    with torch.autocast("cpu", torch.bfloat16):
        run(x)
        fake_kernels.prepared.clear()
        assert torch.equal(run(x), expected)
    assert len(fake_kernels.prepared) == 2, "q, k and v, then o"
    assert block.q_proj._shared._held is None, "an input is kept after its last use"


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], **IDS)
def test_autocast_agrees_with_a_linear(shape):
    made = Made(KINDS[0], bias=True, shape=shape)
    linear = nn.Linear(made.case.in_features, made.case.out_features)
    with torch.no_grad():
        linear.weight.copy_(made.layer.dequantize(torch.float32))
        linear.bias.copy_(made.bias)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            actual, expected = made.layer(made.x.to(dtype)), linear(made.x.to(dtype))
        assert actual.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


# --- LoRA


@pytest.mark.parametrize(
    ("targets", "count"), [(ATTENTION, 4), ("all-linear", 12), (r".*layers\.0\.fc\d", 2)], ids=str
)
def test_lora_trains_only_the_adapter(targets, count, model, tmp_path):
    before, plain = packed(model), logits(model)
    adapted = lora(model, target_modules=targets)
    adapters = [m for m in adapted.modules() if isinstance(getattr(m, "base_layer", None), FP4Linear)]
    assert len(adapters) == count
    assert torch.equal(logits(adapted), plain), "a new adapter changes nothing"
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 2 * count and all("lora_" in name for name in trainable)
    losses = train(adapted, tmp_path)
    assert losses[-1] < 0.9 * losses[0]
    assert unchanged(before, model)
    assert not torch.equal(logits(adapted), plain)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), plain)


def test_every_adapter_weight_gets_a_gradient(model):
    """Those below the last layer get it only through FP4 layers."""
    adapted = lora(model, target_modules="all-linear", init_lora_weights=False)
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
        else:
            assert parameter.grad is None, name


def test_an_adapter_is_saved_and_loaded(model, checkpoint, tmp_path):
    adapted = lora(model)
    train(adapted, tmp_path / "run")
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert torch.equal(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")), expected)
    # transformers' own way.
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    base.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(base), expected)


@pytest.mark.skipif(
    version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION),
    reason=f"this transformers' own adapters need peft {MIN_PEFT_VERSION}",
)
def test_transformers_add_adapter(model, checkpoint, tmp_path):
    before = packed(model)
    model.add_adapter(LoraConfig(r=4, target_modules=ATTENTION))
    losses = train(model, tmp_path / "run")
    assert losses[-1] < 0.8 * losses[0] and unchanged(before, model)
    model.save_pretrained(tmp_path / "adapter")
    again = AutoModelForCausalLM.from_pretrained(checkpoint)
    again.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


def half_quantized(checkpoint: Path) -> PreTrainedModel:
    """The first block as it was, the second in FP4."""
    config = MRGPTQConfig(method="rtn", modules_to_not_convert=["model.decoder.layers.0"])
    return AutoModelForCausalLM.from_pretrained(
        checkpoint.parent / "original", dtype=torch.float32, quantization_config=config
    )


@pytest.mark.parametrize("safe", [False, True])
def test_merging_into_packed_weights_is_refused(safe, checkpoint):
    model = half_quantized(checkpoint)
    adapted = lora(model, init_lora_weights=False)
    expected, before = logits(adapted), packed(model)
    message = r"unquantized layers to merge an adapter into, got FP4 .* in model\.decoder\.layers\.1.*dequantize\(\)"
    for merge in (adapted.merge_and_unload, adapted.merge_adapter):
        with pytest.raises(ValueError, match=message):
            merge(safe_merge=safe)
    assert torch.equal(logits(adapted), expected) and unchanged(before, model), "a refusal changes nothing"


def test_an_adapter_is_merged_after_dequantizing(checkpoint, tmp_path):
    original = checkpoint.parent / "original"
    config = MRGPTQConfig(method="rtn", activations="bf16")
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32, quantization_config=config)
    adapted = lora(model, init_lora_weights=False)
    expected = logits(adapted)
    adapted.dequantize()
    torch.testing.assert_close(logits(adapted), expected, rtol=1e-3, atol=1e-3)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-3)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(merged))


@pytest.mark.parametrize("quantized", [False, True])
def test_merging_elsewhere_is_peft_s(quantized, checkpoint):
    """An adapter of unquantized layers, beside FP4 layers or in another model, is merged as ever."""
    model = half_quantized(checkpoint) if quantized else tiny_model("opt")
    adapted = lora(model, target_modules=r".*layers\.0.*(q|v)_proj", init_lora_weights=False)
    expected = logits(adapted)
    torch.testing.assert_close(logits(adapted.merge_and_unload()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=ATTENTION, use_rslora=True, lora_bias=True),
        AdaLoraConfig(init_r=4, target_modules=ATTENTION, total_step=10),
        IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"]),
        VeraConfig(r=4, target_modules=ATTENTION),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_adapters(config, model):
    expected, before = logits(model), packed(model)
    adapted = get_peft_model(model, config)
    assert torch.equal(logits(adapted), expected)
    adapted(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert len(gradients) >= 4 and all(gradient is not None for gradient in gradients)
    assert unchanged(before, model)
    with pytest.raises(ValueError, match="unquantized layers to merge an adapter into"):
        adapted.merge_and_unload()


@pytest.mark.parametrize(
    "fields", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_needs_the_weight_itself_fails_at_once(fields, model):
    before = packed(model)
    with pytest.raises((RuntimeError, TypeError)):
        lora(model, **fields)
    assert unchanged(before, model)


def test_unloading_gives_the_model_back(model):
    expected = logits(model)
    again = lora(copy.deepcopy(model), init_lora_weights=False).unload()
    assert torch.equal(logits(again), expected)


def test_importing_hf_fp4_imports_no_peft():
    script = "import sys, hf_fp4; print('peft' in sys.modules)"
    root = Path(hf_fp4.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_without_peft_models_load(checkpoint, monkeypatch):
    for name in ("peft", "peft.tuners", "peft.tuners.tuners_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(quantizer, "refuse_merging", refuse_merging.__wrapped__)  # which has not run yet
    assert logits(AutoModelForCausalLM.from_pretrained(checkpoint)).isfinite().all()


# --- Trainer


def test_evaluate_and_predict(model, tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, eval_dataset=DATA)
    rows = torch.stack([row["input_ids"] for row in DATA])
    with torch.no_grad():
        expected = model(input_ids=rows, labels=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-2)
    predicted = trainer.predict(DATA)
    assert torch.equal(torch.from_numpy(predicted.predictions), expected.logits.float())
    assert predicted.metrics["test_loss"] == pytest.approx(expected.loss.item(), rel=1e-2)


def test_training_what_is_not_quantized(model, tmp_path):
    """Embeddings, norms and biases train; codes and scales are no parameters."""
    before = packed(model)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses = train(model, tmp_path, learning_rate=0.005)
    assert losses[-1] < 0.8 * losses[0] and unchanged(before, model)
    changed = {n for n, parameter in model.named_parameters() if not torch.equal(parameter, parameters[n])}
    assert changed == set(parameters)
    model.save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "trained")), logits(model))


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_lora_with_the_trainer_s_options(arguments, model, tmp_path):
    before = packed(model)
    losses = train(lora(model), tmp_path, **arguments)
    assert losses[-1] < 0.8 * losses[0] and unchanged(before, model)


def test_the_recipe_for_4_bit_models(model, tmp_path):
    """`prepare_model_for_kbit_training` casts norms to float32, and bf16=True brings FP4 layers back to bfloat16."""
    before = packed(model)
    adapted = lora(prepare_model_for_kbit_training(model))
    seen = set()
    layer = next(module for module in model.modules() if isinstance(module, FP4Linear))
    layer.register_forward_hook(lambda layer, inputs, output: seen.add((inputs[0].dtype, output.dtype)))
    losses = train(adapted, tmp_path, bf16=True)
    assert losses[-1] < 0.8 * losses[0]
    assert seen == {(torch.float32, torch.bfloat16)}
    assert unchanged(before, model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kernels", [False, True], ids=["reference", "kernels"])
def test_gradient_checkpointing_changes_no_gradient(kernels, reentrant, checkpoint, monkeypatch):
    if kernels:
        monkeypatch.setattr(linear_module, "select", lambda source, device: fake_kernels.found())
    gradients = []
    for checkpointing in (False, True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint)
        torch.manual_seed(0)
        adapted = lora(model, target_modules="all-linear", init_lora_weights=False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        fake_kernels.prepared.clear()
        adapted.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        assert bool(fake_kernels.prepared) == kernels
        gradients.append({n: p.grad for n, p in adapted.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 24
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name
