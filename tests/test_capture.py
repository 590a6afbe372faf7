"""Finding decoder blocks, recording what enters them, running them one at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from model_zoo import FAMILIES, OTHERS, linear_names, skeleton, tiny_config, tiny_model, tiny_tokens
from torch import nn

from hf_fp4.calibration.capture import (
    BlockCall,
    Outlet,
    block_device,
    capture_block_inputs,
    find_blocks,
    probe,
    redirect,
    require_finite,
    run_block,
)

LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]
GROUPS = {
    **dict.fromkeys(FAMILIES, LLAMA_GROUPS),
    "phi3": [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]],
    "gpt_neox": [
        ["attention.query_key_value"],
        ["attention.dense"],
        ["mlp.dense_h_to_4h"],
        ["mlp.dense_4h_to_h"],
    ],
    "opt": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.out_proj"],
        ["fc1"],
        ["fc2"],
    ],
    "bloom": [
        ["self_attention.query_key_value"],
        ["self_attention.dense"],
        ["mlp.dense_h_to_4h"],
        ["mlp.dense_4h_to_h"],
    ],
    # Parallel residual with one layer norm: the MLP reads what q, k and v read, though it is called after o_proj.
    "cohere": [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"],
        ["self_attn.o_proj"],
        ["mlp.down_proj"],
    ],
    "modernbert_decoder": [
        ["attn.q_proj", "attn.k_proj", "attn.v_proj"],
        ["attn.Wo"],
        ["mlp.Wi"],
        ["mlp.Wo"],
    ],
    # Every linear reads a mixture of its own.
    "rwkv": [
        ["attention.key"],
        ["attention.value"],
        ["attention.receptance"],
        ["attention.output"],
        ["feed_forward.key"],
        ["feed_forward.value"],
        ["feed_forward.receptance"],
    ],
    "mixtral": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]],
    "bert": [
        ["attention.self.query", "attention.self.key", "attention.self.value"],
        ["attention.output.dense"],
        ["intermediate.dense"],
        ["output.dense"],
    ],
    "llava": LLAMA_GROUPS,
}
LIST_NAMES = {
    "gpt_neox": "gpt_neox.layers",
    "opt": "model.decoder.layers",
    "bloom": "transformer.h",
    "rwkv": "rwkv.blocks",
    "bert": "bert.encoder.layer",
    "llava": "model.language_model.layers",
}


def planned(family: str, dtype: torch.dtype = torch.float32):
    model = tiny_model(family, dtype)
    blocks = find_blocks(model)
    return model, blocks, probe(model, blocks, tiny_tokens())


def outputs_of(model: nn.Module, module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """What `module` returns inside a full forward of the model, from a hook that shares no code with the package."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


def inputs_of(model: nn.Module, module: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


def changed_modules(model: nn.Module) -> list[str]:
    """Names of modules that carry a forward or a hook of their own."""
    return [
        name
        for name, module in model.named_modules()
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks
    ]


@pytest.mark.parametrize("family", GROUPS)
def test_groups_are_the_linears_that_share_an_input(family):
    model, blocks, plans = planned(family)
    assert blocks.name == LIST_NAMES.get(family, "model.layers")
    assert [model.get_submodule(name) for name in blocks.names] == blocks.modules
    assert len(blocks.modules) == len(plans) >= 2
    for plan in plans:
        assert plan.groups == GROUPS[family]
        assert plan.skipped == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", GROUPS)
def test_blocks_one_by_one_equal_the_whole_model(family, dtype):
    model, blocks, plans = planned(family, dtype)
    batches = [tiny_tokens(seed=1), tiny_tokens(batch=1, length=17, seed=2), tiny_tokens(seed=3)]
    for ids, inputs in zip(batches, capture_block_inputs(model, blocks, plans, batches), strict=True):
        hidden = inputs.hidden
        for block, call in zip(blocks.modules, inputs.calls, strict=True):
            before, hidden = hidden, run_block(block, hidden, call)
            assert not torch.equal(hidden, before)
        assert hidden.dtype == dtype
        assert torch.equal(hidden, outputs_of(model, blocks.modules[-1], ids))
    assert changed_modules(model) == []


def test_tuple_outputs_are_detected():
    assert [plan.output_length for plan in planned("bloom")[2]] == [2, 2]
    assert [plan.output_length for plan in planned("rwkv")[2]] == [3, 3]
    assert all(plan.output_is_tuple for plan in planned("bloom")[2])
    assert not any(plan.output_is_tuple for plan in planned("llama")[2])


def test_hidden_states_as_a_keyword():
    model = tiny_model("llama")
    blocks = find_blocks(model)
    for block in blocks.modules:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: ((), {**kwargs, "hidden_states": args[0]}), with_kwargs=True
        )
    ids = tiny_tokens(seed=1)
    plans = probe(model, blocks, ids)
    inputs = next(capture_block_inputs(model, blocks, plans, [ids]))
    assert inputs.calls[0].hidden_name == "hidden_states"
    expected = outputs_of(model, blocks.modules[-1], ids)
    for block in blocks.modules:
        block._forward_pre_hooks.clear()
        block._forward_pre_hooks_with_kwargs.clear()
    hidden = inputs.hidden
    for block, call in zip(blocks.modules, inputs.calls, strict=True):
        hidden = run_block(block, hidden, call)
    assert torch.equal(hidden, expected)


def test_gemma3_layers_keep_their_own_mask_and_positions():
    model, blocks, plans = planned("gemma3")
    calls = next(capture_block_inputs(model, blocks, plans, [tiny_tokens()])).calls
    local, full, local_again = (call.kwargs["attention_mask"] for call in calls)
    assert local is not None and local is local_again
    assert full is None or not torch.equal(local, full)
    local, full, local_again = (call.kwargs["position_embeddings"][0] for call in calls)
    assert local is local_again
    assert not torch.equal(local, full)


def test_equal_arguments_are_stored_once():
    model, blocks, plans = planned("mistral")
    batches = [tiny_tokens(seed=seed) for seed in range(4)]
    shorter = tiny_tokens(length=12)
    captured = list(capture_block_inputs(model, blocks, plans, [*batches, shorter]))
    masks = {id(call.kwargs["attention_mask"]) for inputs in captured[:4] for call in inputs.calls}
    cosines = {id(call.kwargs["position_embeddings"][0]) for inputs in captured[:4] for call in inputs.calls}
    assert len(masks) == len(cosines) == 1
    assert captured[4].calls[0].kwargs["attention_mask"].shape[-1] == 12
    assert captured[4].calls[0].kwargs["position_embeddings"][0].shape[1] == 12


def test_arguments_that_differ_between_batches_are_not_merged():
    def argument(ids):
        value = torch.zeros(1000)
        value[1] = ids[0, 0]  # elsewhere they are equal
        return value

    model = tiny_model("llama")
    blocks = find_blocks(model)
    current = [tiny_tokens()]
    for block in blocks.modules:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, {**kwargs, "extra": argument(current[0])}), with_kwargs=True
        )
    plans = probe(model, blocks, current[0])
    batches = [tiny_tokens(seed=seed) for seed in (1, 2, 1)]

    def feed():
        for current[0] in batches:
            yield current[0]

    captured = list(capture_block_inputs(model, blocks, plans, feed()))
    for inputs, ids in zip(captured, batches, strict=True):
        assert all(torch.equal(call.kwargs["extra"], argument(ids)) for call in inputs.calls)
    assert len({id(call.kwargs["extra"]) for inputs in captured for call in inputs.calls}) == 2


def test_capture_computes_no_block_and_no_head():
    model, blocks, plans = planned("qwen2")
    called = []
    for name in linear_names(model):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    inputs = next(capture_block_inputs(model, blocks, plans, [tiny_tokens()]))
    assert called == []
    run_block(blocks.modules[0], inputs.hidden, inputs.calls[0])
    assert called == [f"model.layers.0.{name}" for group in LLAMA_GROUPS for name in group]


def test_model_can_be_used_between_batches():
    model, blocks, plans = planned("llama")
    ids = tiny_tokens()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    for _ in capture_block_inputs(model, blocks, plans, [ids, ids]):
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, expected)


def test_results_can_be_used_with_autograd():
    model, blocks, plans = planned("llama")
    inputs = next(capture_block_inputs(model, blocks, plans, [tiny_tokens()]))
    hidden = run_block(blocks.modules[0], inputs.hidden, inputs.calls[0])
    assert not hidden.requires_grad
    weight = torch.ones(hidden.shape[-1], requires_grad=True)
    (hidden * weight).sum().backward()
    assert torch.isfinite(weight.grad).all()


def test_redirected_linears_change_what_the_block_gives():
    model, blocks, plans = planned("llama")
    ids = tiny_tokens()
    inputs = next(capture_block_inputs(model, blocks, plans, [ids]))
    block, call = blocks.modules[0], inputs.calls[0]
    redirects = {"self_attn.v_proj": lambda x: nn.functional.linear(x, 2 * block.self_attn.v_proj.weight)}
    y = run_block(block, inputs.hidden, call, redirects)
    with torch.no_grad():
        block.self_attn.v_proj.weight.mul_(2)
    assert torch.equal(y, outputs_of(model, block, ids))


def test_redirect_restores_after_an_exception():
    model, blocks, plans = planned("llama")
    inputs = next(capture_block_inputs(model, blocks, plans, [tiny_tokens()]))
    block, call = blocks.modules[0], inputs.calls[0]
    expected = run_block(block, inputs.hidden, call)

    def fail(x):
        raise RuntimeError("inside the block")

    with pytest.raises(RuntimeError, match="inside the block"):
        run_block(block, inputs.hidden, call, {"mlp.up_proj": fail})
    with (
        pytest.raises(AttributeError, match="no_such"),
        redirect(block, {"mlp.up_proj": fail, "no_such": fail}),
    ):
        pytest.fail("redirect accepted an unknown module")
    assert changed_modules(model) == []
    assert torch.equal(run_block(block, inputs.hidden, call), expected)


def test_redirect_puts_back_a_forward_that_was_set_before():
    linear = nn.Linear(4, 4)
    block = nn.ModuleDict({"linear": linear})
    x = torch.randn(2, 4)
    linear.forward = lambda x: x + 1  # as accelerate does
    with redirect(block, {"linear": lambda x: x + 2}):
        assert torch.equal(linear(x), x + 2)
        with redirect(block, {"linear": nn.Identity()}):
            assert torch.equal(linear(x), x)
        assert torch.equal(linear(x), x + 2)
    assert torch.equal(linear(x), x + 1)
    assert list(linear.children()) == []


def test_what_a_block_writes_into_a_dict_does_not_reach_its_next_call():
    class Block(nn.Module):
        def forward(self, hidden, state):
            state["calls"] = state.get("calls", 0) + 1
            return hidden + state["calls"], None

    call = BlockCall((), {"state": {}})
    hidden = torch.zeros(1)
    assert run_block(Block(), hidden, call).item() == 1
    assert run_block(Block(), hidden, call).item() == 1
    assert call.kwargs == {"state": {}}


def test_block_device():
    assert block_device(nn.Linear(1, 1, device="meta")).type == "meta"
    assert block_device(nn.Identity()).type == "cpu"


@pytest.mark.parametrize("family", ["llama", "gemma3", "llava"])
def test_blocks_are_found_on_a_skeleton(family):
    assert find_blocks(skeleton(family)).names == find_blocks(tiny_model(family)).names


def test_vision_towers_are_ignored_however_large():
    config = tiny_config("llava")
    config.vision_config.num_hidden_layers = 20
    config.vision_config.intermediate_size = 4096
    with torch.device("meta"):
        model = type(skeleton("llava"))(config)
    assert find_blocks(model).name == "model.language_model.layers"
    assert len(find_blocks(model).modules) == 2


def test_vision_towers_inside_the_decoder_are_ignored():
    model = skeleton("llava")
    model.model.language_model.tower = model.model.vision_tower
    del model.model.vision_tower
    for layer in model.model.language_model.tower.encoder.layers:
        layer.mlp.fc1 = nn.Linear(512, 512, device="meta")
    assert find_blocks(model).name == "model.language_model.layers"


def test_nested_lists_are_not_blocks():
    model = skeleton("llama")
    for layer in model.model.layers:
        layer.experts = nn.ModuleList(nn.Linear(512, 512, device="meta") for _ in range(8))
    assert find_blocks(model).name == "model.layers"


def test_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match=r'expected a decoder-only .* T5ForConditional.*; use method="rtn"'):
        find_blocks(skeleton("t5"))


def test_model_without_linears_in_lists_is_refused():
    with pytest.raises(ValueError, match=r"expected an nn.ModuleList of decoder blocks .* GPT2LMHeadModel"):
        find_blocks(skeleton("gpt2"))


def test_training_mode_is_refused():
    model = tiny_model("llama").train()
    with pytest.raises(ValueError, match=r"call model.eval\(\)"):
        probe(model, find_blocks(model), tiny_tokens())


def test_meta_and_offloaded_weights_are_refused():
    model = skeleton("llama").eval()
    with pytest.raises(ValueError, match=r"got model.layers.0.self_attn.q_proj.weight on the meta device"):
        probe(model, find_blocks(model), tiny_tokens())
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    accelerate.cpu_offload(model.model.layers[1], execution_device=torch.device("cuda:0"))
    with pytest.raises(
        ValueError, match=r'model.layers.1.*offloaded .* device_map=None, "cpu".*method="rtn"'
    ):
        probe(model, find_blocks(model), tiny_tokens())
    with pytest.raises(ValueError, match=r"model.layers.1.*offloaded"):
        next(capture_block_inputs(model, find_blocks(model), [], [tiny_tokens()]))


def test_models_dispatched_by_accelerate_work():
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    expected = outputs_of(model, model.model.layers[-1], tiny_tokens())
    for layer in model.model.layers:
        accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(torch.device("cpu")))
    wrapped = [layer.__dict__["forward"] for layer in model.model.layers]
    blocks = find_blocks(model)
    plans = probe(model, blocks, tiny_tokens())
    inputs = next(capture_block_inputs(model, blocks, plans, [tiny_tokens()]))
    hidden = inputs.hidden
    for block, call in zip(blocks.modules, inputs.calls, strict=True):
        hidden = run_block(block, hidden, call)
    assert torch.equal(hidden, expected)
    assert [layer.__dict__["forward"] for layer in model.model.layers] == wrapped


def test_block_called_twice_is_refused():
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(ValueError, match=r"each block of model.layers to be called once and in order"):
        probe(model, find_blocks(model), tiny_tokens())
    assert changed_modules(model) == []


def test_computation_between_blocks_is_refused():
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (2 * args[0],))
    with pytest.raises(ValueError, match=r"output of model.layers.0 to be the input of model.layers.1"):
        probe(model, find_blocks(model), tiny_tokens())


def test_copies_between_blocks_are_accepted():
    model = tiny_model("llama")
    model.model.layers[1].register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    assert len(probe(model, find_blocks(model), tiny_tokens())) == 2


@pytest.mark.parametrize("positional", [False, True])
def test_state_shared_between_blocks_is_refused(positional):
    model = tiny_model("llama")
    masks = []
    first, second = model.model.layers

    def use_state(block, args, kwargs):
        if positional:
            del kwargs["attention_mask"]
            return (*args, masks[-1]), kwargs
        return args, {**kwargs, "attention_mask": masks[-1]}

    first.register_forward_hook(lambda _, args, output: masks.append(output.mean().expand(1, 1, 24, 24)))
    second.register_forward_pre_hook(use_state, with_kwargs=True)
    with pytest.raises(
        ValueError, match=r"model.layers.1: expected arguments that do not depend on .*shared state"
    ):
        probe(model, find_blocks(model), tiny_tokens())
    assert "forward" not in first.__dict__


def test_cache_is_refused():
    model = tiny_model("llama")
    model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, "past_key_values": object()}), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"model.layers.0: expected no cache, got past_key_values"):
        probe(model, find_blocks(model), tiny_tokens())


def probe_with_mlp(forward):
    """The plan of block 0 of a Llama whose MLP computes `forward(mlp, x)`."""
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: forward(mlp, x)
    return probe(model, find_blocks(model), tiny_tokens())[0]


def test_linear_called_twice_is_skipped():
    plan = probe_with_mlp(lambda mlp, x: mlp.down_proj(mlp.gate_proj(x) * mlp.gate_proj(-x)))
    assert plan.groups == [*LLAMA_GROUPS[:2], ["mlp.down_proj"]]
    assert plan.skipped["mlp.gate_proj"] == "it is called 2 times in one forward"
    assert plan.skipped["mlp.up_proj"].startswith("it is not called in the probe")


OUTLETS = {
    "llama": {"self_attn.o_proj": Outlet("self_attn", 2), "mlp.down_proj": Outlet("mlp", None)},
    "gpt_neox": {"attention.dense": Outlet("attention", 2), "mlp.dense_4h_to_h": Outlet("mlp", None)},
    "opt": {"self_attn.out_proj": Outlet("self_attn", 2)},
    "olmoe": {"self_attn.o_proj": Outlet("self_attn", 2)},
}


@pytest.mark.parametrize("family", OUTLETS)
def test_parts_that_return_what_their_last_linear_gives(family):
    _, _, plans = planned(family)
    assert all(plan.outlets == OUTLETS[family] for plan in plans)


@pytest.mark.parametrize("change", [lambda y: y + 0, lambda y: y.mul_(1)], ids=["another", "changed"])
def test_parts_that_return_another_tensor_are_no_outlets(change):
    plan = probe_with_mlp(lambda mlp, x: change(mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))))
    assert list(plan.outlets) == ["self_attn.o_proj"]


def test_parts_that_return_something_more_are_no_outlets():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # which returns the attention's weights
    plan = probe(model, find_blocks(model), tiny_tokens())[0]
    assert list(plan.outlets) == ["mlp.down_proj"]


def test_linear_whose_weight_is_read_directly_is_skipped():
    plan = probe_with_mlp(lambda mlp, x: mlp.down_proj(mlp.gate_proj(x) * (x @ mlp.up_proj.weight.T)))
    assert list(plan.skipped) == ["mlp.up_proj"]
    assert ["mlp.gate_proj"] in plan.groups


def test_expert_without_tokens_is_skipped():
    plan = probe_with_mlp(lambda mlp, x: mlp.down_proj(mlp.gate_proj(x)) + mlp.up_proj(x[:0]).sum())
    assert list(plan.skipped) == ["mlp.up_proj"]


def test_linear_shared_by_two_blocks_is_skipped_in_both():
    model = tiny_model("llama")
    first, second = model.model.layers
    second.mlp.up_proj = first.mlp.up_proj
    for plan in probe(model, find_blocks(model), tiny_tokens()):
        assert plan.skipped == {"mlp.up_proj": "it is shared between modules"}
        assert ["mlp.gate_proj"] in plan.groups


def test_linear_called_outside_its_block_is_skipped():
    model = tiny_model("llama")
    first, second = model.model.layers
    first.extra = nn.Linear(80, 80)
    second.register_forward_hook(lambda _, args, output: first.extra(output))
    assert probe(model, find_blocks(model), tiny_tokens())[0].skipped == {
        "extra": "it is called outside its block"
    }


def test_views_of_one_input_are_one_group():
    plan = probe_with_mlp(
        lambda mlp, x: mlp.down_proj(mlp.gate_proj(x) * mlp.up_proj(x.view(-1, 80)).view(2, 24, 160))
    )
    assert plan.groups == LLAMA_GROUPS


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.clone(),
        lambda x: x[:, 1:],
        lambda x: x.flip(1),
        lambda x: x.view(2, 24, 80).transpose(0, 1),
    ],
    ids=["in-place", "clone", "slice", "flip", "transpose"],
)
def test_other_inputs_are_other_groups(change):
    def forward(mlp, x):
        return mlp.down_proj(mlp.gate_proj(x)) + mlp.up_proj(change(x)).sum()

    assert ["mlp.gate_proj"] in probe_with_mlp(forward).groups
    assert ["mlp.up_proj"] in probe_with_mlp(forward).groups


def test_memory_that_is_freed_and_reused_does_not_join_groups():
    def forward(mlp, x):
        # Each product is dropped at once, so that the allocator is free to hand out the same address again.
        return mlp.down_proj(mlp.gate_proj(x * 2) * mlp.up_proj(x * 3))

    assert ["mlp.gate_proj"] in probe_with_mlp(forward).groups


def test_groups_survive_a_plan_that_is_copied():
    plan = planned("llama")[2][0]
    assert replace(plan, output_length=1).output_is_tuple


def test_non_finite_values_are_named():
    tensor = torch.tensor([1.0, float("nan"), float("inf"), float("-inf")])
    with pytest.raises(
        ValueError, match=r"finite values in the input of model.layers.3, got 1 NaN and 2 infinite of 4"
    ):
        require_finite(tensor, "the input of model.layers.3")
    require_finite(tensor[:1], "x")
    model, blocks, plans = planned("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"finite values in the input of model.layers.0"):
        next(capture_block_inputs(model, blocks, plans, [tiny_tokens()]))
    with pytest.raises(ValueError, match=r"finite values in the input of model.layers.0"):
        probe(model, blocks, tiny_tokens())


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_zoo_models_are_not_degenerate(family):
    model, again = tiny_model(family), tiny_model(family)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(parameter.abs().sum() > 0 for parameter in model.parameters())
    kwargs = {"decoder_input_ids": tiny_tokens(seed=1)} if family == "t5" else {}
    with torch.no_grad():
        logits = model(input_ids=tiny_tokens(), **kwargs).logits
    assert 0.3 < logits.std() < 5
    assert logits.std(dim=1).mean() > 0.3
