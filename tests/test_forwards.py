"""Forwards that wait at each group of linears: what they hand over, what they compute afterwards, how they end."""

from __future__ import annotations

import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from model_zoo import linear_names, tiny_tokens
from test_capture import GROUPS, LLAMA_GROUPS, changed_modules, inputs_of, outputs_of, planned
from torch import nn

from hf_fp4.calibration.capture import BlockCall, Outlet, capture_block_inputs, run_block
from hf_fp4.calibration.forwards import Known, paused_forwards


@contextmanager
def pausing(block, groups):
    """`paused_forwards` in threads of its own, which end with it: one that does not would be waited for, for ever."""
    with ThreadPoolExecutor(2) as threads, paused_forwards(block, groups, threads) as start:
        yield start


def first_block(family: str, *seeds: int):
    """A model, its first block, the block's groups, and for each batch of tokens (ids, what enters the block)."""
    model, blocks, plans = planned(family)
    batches = [tiny_tokens(seed=seed) for seed in seeds or (0,)]
    inputs = capture_block_inputs(model, blocks, plans, batches)
    return model, blocks.modules[0], plans[0].groups, list(zip(batches, inputs, strict=True))


@pytest.mark.parametrize("family", GROUPS)
def test_every_group_gives_its_input_and_the_block_its_output(family):
    model, block, groups, batches = first_block(family, 0, 1)
    expected = [
        (
            [inputs_of(model, block.get_submodule(names[0]), ids) for names in groups],
            outputs_of(model, block, ids),
        )
        for ids, _ in batches
    ]
    with pausing(block, groups) as start:
        running = [start(inputs.hidden, inputs.calls[0], {}) for _, inputs in batches]
        for index in range(len(groups)):
            for forward, (seen, _) in zip(running, expected, strict=True):
                assert torch.equal(forward.input_of(index), seen[index])
        for forward, (_, output) in zip(running, expected, strict=True):
            assert torch.equal(forward.output(), output)
    assert changed_modules(model) == []


def test_nothing_after_the_group_has_run_and_nothing_runs_twice():
    _, block, groups, ((_, inputs),) = first_block("qwen3")
    called: list[str] = []
    with pausing(block, groups) as start:
        for name in linear_names(block):
            block.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
        forward = start(inputs.hidden, inputs.calls[0], {})
        for index in range(len(groups)):
            forward.input_of(index)
            assert called == [name for earlier in groups[:index] for name in earlier]
        forward.output()
    assert called == [name for names in groups for name in names]


def test_functions_given_while_it_waits_reach_what_follows():
    _, block, groups, ((_, inputs),) = first_block("llama")
    call, functions = inputs.calls[0], {}
    doubled = {"self_attn.v_proj": lambda x: nn.functional.linear(x, 2 * block.self_attn.v_proj.weight)}
    with pausing(block, groups) as start:
        plain = start(inputs.hidden, call, {}).input_of(1)
        forward = start(inputs.hidden, call, functions)
        forward.input_of(0)
        functions.update(doubled)
        assert torch.equal(forward.input_of(1), 2 * plain)
        output = forward.output()
    assert torch.equal(output, run_block(block, inputs.hidden, call, doubled))


def test_what_a_part_gives_is_computed_of_its_last_input_once():
    model, block, groups, ((ids, inputs),) = first_block("llama")
    expected, output = inputs_of(model, block.mlp.gate_proj, ids), outputs_of(model, block, ids)
    called: list[str] = []
    hook = block.self_attn.q_proj.register_forward_hook(lambda *_: called.append("q_proj"))

    def last(x):
        called.append("o_proj")
        return nn.functional.linear(x, block.self_attn.o_proj.weight)

    functions = {"self_attn.o_proj": last}
    outlets = {"self_attn.o_proj": Outlet("self_attn", 2)}
    with (
        ThreadPoolExecutor(2) as threads,
        paused_forwards(block, groups, threads, outlets) as start,
    ):
        first = start(inputs.hidden, inputs.calls[0], functions)
        known = {"self_attn.o_proj": Known(first.input_of(1))}
        first.abandon()
        assert called == ["q_proj"]
        for _ in range(2):
            again = start(inputs.hidden, inputs.calls[0], functions, known)
            assert torch.equal(again.input_of(2), expected)
            assert torch.equal(again.output(), output)
    assert called == ["q_proj", "o_proj"]
    hook.remove()
    assert changed_modules(model) == []


def test_a_block_may_write_to_what_a_known_linear_gives():
    known = Known(torch.ones(3))
    for _ in range(2):
        assert torch.equal(known.output(lambda x: 2 * x).add_(1), torch.full((3,), 3.0))


def test_a_group_that_is_not_called_has_no_tokens():
    _, block, groups, ((_, inputs),) = first_block("llama")
    block.expert = nn.Linear(48, 16)
    with pausing(block, [*groups[:2], ["expert"], *groups[2:]]) as start:
        forward = start(inputs.hidden, inputs.calls[0], {})
        assert forward.input_of(1).shape == (2, 24, block.self_attn.o_proj.in_features)
        assert forward.input_of(2).shape == (0, 48)
        assert forward.input_of(4).shape == (2, 24, 160)


def test_another_order_than_the_probes_is_refused():
    _, block, groups, ((_, inputs),) = first_block("llama")
    with pausing(block, [groups[0], groups[2], groups[1], groups[3]]) as start:
        forward = start(inputs.hidden, inputs.calls[0], {})
        assert forward.input_of(1).numel() == 0  # it is at o_proj, which was to come later
        with pytest.raises(ValueError, match="calls mlp.gate_proj after self_attn.o_proj"):
            forward.input_of(3)


@pytest.mark.parametrize("moment", range(4))
def test_an_error_in_the_block_reaches_the_caller_and_leaves_the_block_as_it_was(moment):
    model, block, groups, batches = first_block("llama", 0, 1)
    before = threading.active_count()

    def fail(x):
        raise RuntimeError("inside the block")

    expected = outputs_of(model, block, batches[0][0])
    with (
        pytest.raises(RuntimeError, match="inside the block"),
        pausing(block, groups) as start,
    ):
        for _, inputs in batches:
            forward = start(inputs.hidden, inputs.calls[0], {LLAMA_GROUPS[moment][0]: fail})
            forward.input_of(moment)
        forward.output()
    assert threading.active_count() == before
    assert changed_modules(model) == []
    assert torch.equal(outputs_of(model, block, batches[0][0]), expected)


def test_an_unknown_linear_leaves_the_block_as_it_was():
    model, block, groups, _ = first_block("llama")
    with pytest.raises(AttributeError, match="no_such"), pausing(block, [*groups, ["no_such"]]):
        pytest.fail("an unknown module was accepted")
    assert changed_modules(model) == []


def test_abandoned_forwards_end_and_release_their_activations():
    _, block, groups, ((_, inputs),) = first_block("llama")
    before = threading.active_count()
    gc.collect()
    gc.disable()
    try:
        with pausing(block, groups) as start:
            waiting = start(inputs.hidden, inputs.calls[0], {})
            references = [weakref.ref(waiting.input_of(3))]
            never_started = start(inputs.hidden, inputs.calls[0], {})
        assert threading.active_count() == before
        assert [reference() for reference in references] == [None]
        del waiting, never_started
        references.append(weakref.ref(inputs.hidden))
        del inputs
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


def test_a_block_that_catches_every_exception_is_still_abandoned():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, hidden):
            try:
                return self.linear(hidden)
            except Exception:  # noqa: BLE001
                return self.forward(hidden)

    before = threading.active_count()
    with pausing(block := Stubborn(), [["linear"]]) as start:
        assert start(torch.ones(1, 4), BlockCall((), {}), {}).input_of(0).shape == (1, 4)
    assert threading.active_count() == before
    assert "forward" not in block.linear.__dict__


def test_gradients_are_off_inside_and_on_outside():
    _, block, groups, ((_, inputs),) = first_block("llama")
    with pausing(block, groups) as start:
        output = start(inputs.hidden, inputs.calls[0], {}).output()
        assert torch.is_grad_enabled()
    assert not output.requires_grad


def test_the_same_threads_serve_every_block():
    """CUDA's libraries keep handles and plans per thread; new ones for each block took most of a run's time."""
    _, block, groups, batches = first_block("llama", 0, 1)
    seen = set()

    def note(x):
        seen.add(threading.get_ident())
        return block.get_submodule(groups[-1][0]).weight.new_zeros(*x.shape[:-1], block.hidden_size)

    with ThreadPoolExecutor(len(batches)) as threads:
        for _ in range(6):
            with paused_forwards(block, groups, threads) as start:
                running = [
                    start(inputs.hidden, inputs.calls[0], {groups[-1][0]: note}) for _, inputs in batches
                ]
                for forward in running:
                    forward.input_of(0)  # all of them wait at once
                for forward in running:
                    forward.output()
    assert len(seen) == len(batches)
