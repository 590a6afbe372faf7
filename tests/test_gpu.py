"""Models on a GPU with the kernels of kernel_hub, as a user runs them.

    make -C kernel_hub && python -m pytest tests/test_gpu.py

takes the kernels that were built there, unless ``LOCAL_KERNELS`` names others.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from model_zoo import tiny_tokens
from test_team import alone, require_equal_reports, run_together
from tolerances import FLOOR, relative_error
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_fp4 import MRGPTQConfig
from hf_fp4.backends import KernelSource, hub, select
from hf_fp4.layers.experts import experts_in
from hf_fp4.layers.linear import FP4Linear

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
BUILD = Path(__file__).parents[1] / "kernel_hub" / "build"
SOURCE = KernelSource()
FORMATS = ("nvfp4", "mxfp4")


@pytest.fixture(scope="module", autouse=True)
def kernels():
    """The kernels under test; a GPU that would run the reference fails."""
    with pytest.MonkeyPatch.context() as patch:
        if "LOCAL_KERNELS" not in os.environ:
            if not BUILD.is_dir():
                pytest.skip("no kernels: run make -C kernel_hub, or set LOCAL_KERNELS")
            patch.setenv("LOCAL_KERNELS", f"{SOURCE.repo}={BUILD}")
        hub._select.cache_clear()
        found = select(SOURCE, torch.device("cuda"))
        assert found.module is not None, found.turned_down
        yield found


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def quantize(original: Path, device: str | dict[str, int] = "cuda", **fields) -> LlamaForCausalLM:
    data = {"dataset": list(tiny_tokens(16, 64, seed=1)), "num_samples": 16, "sequence_length": 64}
    return AutoModelForCausalLM.from_pretrained(
        original, dtype=torch.bfloat16, device_map=device, quantization_config=MRGPTQConfig(**data, **fields)
    )


@pytest.fixture(scope="module", params=FORMATS)
def model(request, original) -> LlamaForCausalLM:
    return quantize(original, format=request.param)


@pytest.fixture(scope="module", params=FORMATS)
def weight_only_model(request, original) -> LlamaForCausalLM:
    """Of whose activations no code can differ: what differs is the rounding of bfloat16."""
    return quantize(original, format=request.param, activations="bf16")


def layers_of(model: torch.nn.Module) -> list[FP4Linear]:
    return [module for module in model.modules() if isinstance(module, FP4Linear)]


def on_the_reference(model: torch.nn.Module) -> torch.nn.Module:
    other = copy.deepcopy(model)
    for layer in layers_of(other):
        layer.use_kernels(None)
    return other


@pytest.fixture(scope="module")
def original_of_experts(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=16, num_experts_per_tok=4, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("activations", ["fp4", "bf16"])
@pytest.mark.parametrize("format", FORMATS)
def test_experts_run_as_one_and_are_close_to_the_reference(format, activations, original_of_experts):
    model = quantize(original_of_experts, format=format, activations=activations)
    for experts in experts_in(model).values():
        for tokens in (1, 16, 700):
            x = torch.randn(tokens, 256, dtype=torch.bfloat16, device="cuda")
            index = torch.rand(tokens, 16, device="cuda").topk(4).indices
            arguments = (x, index, torch.rand(tokens, 4, device="cuda", dtype=torch.bfloat16))
            with torch.no_grad():
                y = experts(*arguments)
                experts.use_kernels(None)
                expected = experts(*arguments)
            experts.use_kernels(SOURCE)
            assert experts.gate_up._stacked is not None and experts.down._stacked is not None
            # Rounding in bfloat16 between gate, up and down may move a code of the activations.
            assert relative_error(y, expected) < (0.03 if activations == "fp4" else 4 * FLOOR[torch.bfloat16])


def test_experts_in_a_cuda_graph_take_any_routing(original_of_experts):
    experts = experts_in(quantize(original_of_experts, method="rtn"))["model.layers.0.mlp.experts"]
    x = torch.randn(16, 256, dtype=torch.bfloat16, device="cuda")
    weights = torch.rand(16, 4, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(16, 16, device="cuda").topk(4).indices
    with torch.no_grad():
        experts(x, index, weights)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = experts(x, index, weights)
        for _ in range(3):
            index.copy_(torch.rand(16, 16, device="cuda").topk(4).indices)
            graph.replay()
            assert torch.equal(y, experts(x, index, weights))


@pytest.mark.parametrize("tokens", [1, 7, 40, 300, 700])
def test_every_layer_is_close_to_the_reference(model, kernels, tokens):
    for layer in layers_of(model)[:7]:
        assert layer.kernels is kernels
        x = torch.randn(1, tokens, layer.in_features, dtype=torch.bfloat16, device="cuda")
        x[..., 3] *= 20
        with torch.no_grad():
            expected = on_the_reference(layer)(x)
            assert relative_error(layer(x), expected) < 2 * FLOOR[torch.bfloat16]


def test_the_logits_are_close_to_the_reference(model, kernels):
    ids, other = tiny_tokens(2, 64).cuda(), on_the_reference(model)
    assert all(layer.kernels is kernels for layer in layers_of(model))
    assert all(layer.kernels.module is None for layer in layers_of(other))
    with torch.no_grad():
        error = relative_error(model(ids).logits, other(ids).logits)
    assert error < 0.03, "codes near a rounding boundary may differ, and nothing else"


@pytest.mark.parametrize("make", [MRGPTQConfig, MRGPTQConfig.paper], ids=["default", "paper"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_gpu_solves_as_well_as_a_cpu(original, format, make):
    data = {"dataset": list(tiny_tokens(16, 64, seed=1)), "num_samples": 16, "sequence_length": 64}
    errors = {}
    for device in ("cuda", "cpu"):
        config = make(format=format, **data)
        model = AutoModelForCausalLM.from_pretrained(
            original, dtype=torch.float32, device_map=device, quantization_config=config
        )
        errors[device] = [row.error for row in model.hf_quantizer.report]
    assert sum(errors["cuda"]) == pytest.approx(sum(errors["cpu"]), rel=0.02)


def test_two_runs_give_the_same_bytes(original, tmp_path):
    for name in ("a", "b"):
        quantize(original).save_pretrained(tmp_path / name)
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.parametrize("format", FORMATS)
def test_a_saved_model_is_the_same_on_gpu_and_cpu(original, tmp_path, format):
    model = quantize(original, format=format)
    model.save_pretrained(tmp_path / "gpu")
    AutoModelForCausalLM.from_pretrained(tmp_path / "gpu", device_map="cpu").save_pretrained(tmp_path / "cpu")
    assert (tmp_path / "gpu" / "model.safetensors").read_bytes() == (
        tmp_path / "cpu" / "model.safetensors"
    ).read_bytes()
    ids = tiny_tokens().cuda()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "gpu", device_map="auto")
    moved = AutoModelForCausalLM.from_pretrained(tmp_path / "gpu").cuda()
    with torch.no_grad():
        expected = model(ids).logits
        assert torch.equal(again(ids).logits, expected) and torch.equal(moved(ids).logits, expected)
    assert {layer.kernels.module is None for layer in layers_of(moved)} == {False}


def compiled_logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            logits = compiled(ids, use_cache=False).logits.clone()
    return logits


def test_compiled_without_graph_breaks(model, original):
    """The compiler rounds elsewhere, so that codes of activations differ; the result must be as near the original model's."""
    ids = tiny_tokens(1, 48).cuda()
    unquantized = AutoModelForCausalLM.from_pretrained(original, dtype=torch.bfloat16, device_map="cuda")
    with torch.no_grad():
        expected, exact = model(ids, use_cache=False).logits, unquantized(ids, use_cache=False).logits
    compiled, eager = (relative_error(logits, exact) for logits in (compiled_logits(model, ids), expected))
    assert compiled < 1.2 * eager


def test_kernels_gate_with_the_same_bits(model):
    ids = tiny_tokens(2, 48).cuda()
    model, mlps = copy.deepcopy(model), [layer.mlp for layer in model.model.layers]
    assert all("forward" in mlp.__dict__ for mlp in mlps)
    with torch.no_grad():
        gated = model(ids).logits
        for layer in model.model.layers:
            del layer.mlp.forward
        assert torch.equal(model(ids).logits, gated)


def test_compiled_weight_only_model(weight_only_model):
    ids = tiny_tokens(1, 48).cuda()
    with torch.no_grad():
        expected = weight_only_model(ids, use_cache=False).logits
    assert relative_error(compiled_logits(weight_only_model, ids), expected) < 0.03


GENERATE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}


def test_generate_with_a_static_cache(model):
    """On a GPU, transformers compiles the decoding step for a static cache; the first token comes before it."""
    ids = tiny_tokens(2, 20).cuda()
    torch._dynamo.reset()
    static = model.generate(ids, cache_implementation="static", **GENERATE)
    assert static.shape == (2, 32)
    assert torch.equal(static, model.generate(ids, cache_implementation="static", **GENERATE))
    assert torch.equal(static[:, :21], model.generate(ids, **GENERATE)[:, :21])


def test_a_compiled_step_decodes_as_an_eager_one(weight_only_model):
    ids = tiny_tokens(2, 20).cuda()
    torch._dynamo.reset()
    static = weight_only_model.generate(ids, cache_implementation="static", **GENERATE)
    assert torch.equal(static[:, :22], weight_only_model.generate(ids, **GENERATE)[:, :22])


def test_a_captured_layer_reads_its_new_input(model):
    layer = layers_of(model)[0]
    x = torch.randn(3, layer.in_features, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(2):
            x.normal_()
            graph.replay()
            assert torch.equal(y, layer(x))


def test_forward_does_not_wait_for_the_gpu_and_memory_does_not_grow(model):
    block = model.model.layers[0].mlp
    x = torch.randn(1, 33, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        block(x)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                block(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_allocated() == before


def test_streams_do_not_disturb_each_other(model):
    attention = model.model.layers[0].self_attn
    inputs = [torch.randn(64, 256, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    with torch.no_grad():
        expected = [(attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)) for x in inputs]
        torch.cuda.synchronize()
        streams, results = [torch.cuda.Stream() for _ in inputs], []
        for _ in range(10):
            for stream, x in zip(streams, inputs, strict=True):
                with torch.cuda.stream(stream):
                    results.append((attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)))
        torch.cuda.synchronize()
    for index, result in enumerate(results):
        for actual, wanted in zip(result, expected[index % 3], strict=True):
            assert torch.equal(actual, wanted)


def test_gradients_are_the_reference_s(model):
    layer = layers_of(model)[1]
    x = torch.randn(9, layer.in_features, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    gradient = torch.randn(9, layer.out_features, dtype=torch.bfloat16, device="cuda")
    (actual,) = torch.autograd.grad(layer(x), x, gradient)
    (expected,) = torch.autograd.grad(on_the_reference(layer)(x), x, gradient)
    assert torch.equal(actual, expected)


def test_moving_to_the_cpu_and_back(weight_only_model):
    other = copy.deepcopy(weight_only_model)
    ids = tiny_tokens().cuda()
    with torch.no_grad():
        expected = weight_only_model(ids).logits
        other.cpu()
        assert all(layer.kernels.backend in ("cpu", "reference") for layer in layers_of(other))
        assert relative_error(other(ids.cpu()).logits.cuda(), expected) < 0.03
        other.cuda()
        assert torch.equal(other(ids).logits, expected)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().view(torch.uint8)


OVER_TWO = {
    "model.embed_tokens": 0,
    "model.layers.0": 0,
    "model.layers.1": 1,
    "model.norm": 1,
    "model.rotary_emb": 0,
    "lm_head": 1,
}
needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@needs_two_gpus
@pytest.mark.parametrize("places", [{"": 1}, OVER_TWO], ids=["second", "over-two"])
@pytest.mark.parametrize("method", ["mr-gptq", "rtn"])
@pytest.mark.parametrize("format", FORMATS)
def test_another_gpu_than_the_current_one_makes_the_same(original, format, method, places, tmp_path):
    expected, model = (
        quantize(original, device, format=format, method=method) for device in ("cuda", places)
    )
    expected.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
    with torch.no_grad():
        wanted = expected(tiny_tokens().cuda()).logits.cpu()
        for other in (model, loaded):
            assert {layer.weight.device.index for layer in layers_of(other)} == set(places.values())
            for name, tensor in expected.state_dict().items():
                assert torch.equal(bytes_of(other.state_dict()[name]), bytes_of(tensor)), name
            assert torch.equal(other(tiny_tokens().to(other.device)).logits.cpu(), wanted)


@needs_two_gpus
@pytest.mark.parametrize("format", FORMATS)
def test_two_processes_make_what_one_makes(original, format, tmp_path):
    """Other codes, since moments are added up in another order, and as good ones.

    On random weights all rotations are as good: which one is chosen is by chance.
    """
    fields = {"format": format, "equalize": False, "hadamard_group_size": 32}
    run_together(2, original, tmp_path, on_gpus=True, **fields)
    files = [tmp_path / f"{rank}.safetensors" for rank in (0, 1)]
    assert files[0].read_bytes() == files[1].read_bytes()
    one = alone(original, torch.bfloat16, "cuda", **fields)
    require_equal_reports(tmp_path, one)
    two = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="cuda")
    unquantized = AutoModelForCausalLM.from_pretrained(original, device_map="cuda")
    ids = tiny_tokens().cuda()
    with torch.no_grad():
        wanted = unquantized(ids).logits
        errors = [relative_error(model(ids).logits, wanted) for model in (one, two)]
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
