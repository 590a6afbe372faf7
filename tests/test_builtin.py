"""`dataset="builtin"`: the model writes its own calibration text."""

import numpy as np
import pytest
import torch
from model_zoo import VOCAB, tiny_model
from test_data import make_tokenizer, no_vocabulary
from transformers import AutoModel

from hf_fp4.calibration import builtin
from hf_fp4.calibration.data import calibration_batches

WORDS = 200
BOS = WORDS


def written(model, tokenizer=None, *, n=6, length=20, seed=0, **changes):
    sizes = {"num_samples": n, "sequence_length": length, "batch_size": 4, "seed": seed, "vocab_size": VOCAB}
    return calibration_batches("builtin", tokenizer, model=model, **(sizes | changes))


def rows(model, tokenizer=None, **changes):
    return torch.cat(written(model, tokenizer, **changes).batches)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "opt", "bloom"])
def test_the_model_writes_without_a_tokenizer(family):
    model = tiny_model(family)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    before = model.generation_config.to_dict()
    first, again, other = written(model), written(model), written(model, seed=1)
    assert [tuple(batch.shape) for batch in first.batches] == [(4, 20), (2, 20)]
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.description == (
        'dataset "builtin" (text that the model wrote itself): 6 sequences of 20 tokens, seed 0'
    )
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.generation_config.to_dict() == before


def test_a_dataset_is_what_write_text_gives(model):
    text = builtin.write_text(model, None, 6, 20, 0, VOCAB)
    assert text.dtype == torch.int64 and text.device.type == "cpu"
    assert torch.equal(rows(model, max_length=128), text)
    assert torch.equal(rows(model, no_vocabulary()), text)  # a made-up tokenizer is none


def test_generation_settings_and_mode_of_the_model_are_ignored_and_kept(model):
    expected = written(model).fingerprint
    model.generation_config.eos_token_id = list(range(VOCAB))  # would stop at once
    model.generation_config.repetition_penalty = 5.0
    model.train()
    try:
        assert written(model).fingerprint == expected
        assert model.training and model.generation_config.repetition_penalty == 5.0
    finally:
        model.eval()
        model.generation_config = type(model.generation_config)()


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_piece_starts_with_the_prefix_and_a_random_word(adds_bos, model):
    result = rows(model, make_tokenizer(words=WORDS, adds_bos=adds_bos), n=64, length=12)
    if adds_bos:
        assert (result[:, 0] == BOS).all()
    start = result[:, int(adds_bos)]
    assert (start < WORDS).all() and len(start.unique()) > 40  # of 64 uniform draws from 200, about 55 differ


def test_without_a_tokenizer_a_piece_starts_with_the_bos_of_the_config(model, monkeypatch):
    monkeypatch.setattr(model.config, "bos_token_id", 7)
    result = rows(model, n=32)
    assert (result[:, 0] == 7).all() and len(result[:, 1].unique()) > 20


@pytest.mark.parametrize("length", [1, 2])
def test_there_may_be_nothing_to_write(length, model):
    result = rows(model, make_tokenizer(words=WORDS, adds_bos=True), length=length)
    assert result.shape == (6, length) and (result[:, 0] == BOS).all()


def test_pieces_are_packed_and_only_a_row_begins_with_bos(model, monkeypatch):
    monkeypatch.setattr(builtin, "_PIECE_TOKENS", 16)
    starts, real = [], builtin._generate

    def generate(model, some, sampler):
        starts.append(some)
        return real(model, some, sampler)

    monkeypatch.setattr(builtin, "_generate", generate)
    result = rows(model, make_tokenizer(words=WORDS, adds_bos=True), n=5, length=50)
    assert result.shape == (5, 50)
    assert (result[:, 0] == BOS).all()
    assert (result < WORDS + 2).all()  # ids that the tokenizer does not have are never drawn
    words = torch.cat(starts)[:, 1].view(5, 4)  # four pieces of 13 tokens
    assert torch.equal(result[:, [1, 13, 26, 39]], words)


def test_what_a_piece_depends_on(model, monkeypatch):
    """Not on how many are sampled at once: the uniform numbers are given."""
    together = rows(model, n=7, length=12)
    monkeypatch.setattr(builtin, "_PIECES_AT_ONCE", 2)
    assert torch.equal(rows(model, n=7, length=12), together)


class Progress:
    def update(self, count):
        pass


def test_tokens_are_drawn_from_the_models_distribution():
    logits = torch.tensor([1.0, -1.0, 2.0, 0.5, 9.0, 7.0])
    banned = torch.tensor([False, False, False, False, True])  # 4 is banned, 5 beyond the vocabulary
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5).div(n)
    sampler = builtin._InverseCDF(uniform, banned, Progress())
    scores = sampler(torch.zeros(n, 1, dtype=torch.int64), logits.expand(n, -1))
    assert ((scores == 0).sum(-1) == 1).all() and ((scores == -torch.inf).sum(-1) == 5).all()
    drawn = np.bincount(scores.argmax(-1).numpy(), minlength=6) / n
    expected = np.exp(logits.double().numpy()[:4])
    np.testing.assert_allclose(drawn, [*(expected / expected.sum()), 0, 0], atol=1e-4)


def test_out_of_memory_halves_the_pieces(model, monkeypatch):
    expected = written(model).fingerprint
    real, sizes = builtin._generate, []

    def generate(model, starts, sampler):
        sizes.append(len(starts))
        if len(starts) > 2:
            raise torch.OutOfMemoryError("no room")
        return real(model, starts, sampler)

    monkeypatch.setattr(builtin, "_PIECES_AT_ONCE", 8)
    monkeypatch.setattr(builtin, "_generate", generate)
    assert written(model).fingerprint == expected
    assert sizes == [6, 4, 2, 2, 2]


def test_out_of_memory_for_a_single_piece(model, monkeypatch):
    def generate(model, starts, sampler):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(builtin, "_generate", generate)
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        written(model)


def test_image_placeholders_are_never_drawn(model):
    model.config.image_token_id = 17
    try:
        banned = builtin._banned(model, None, VOCAB)
    finally:
        del model.config.image_token_id
    assert banned.nonzero().flatten().tolist() == [17]


@pytest.mark.parametrize("tokenizer", [None, make_tokenizer(words=WORDS)], ids=["bare", "tokenizer"])
def test_a_model_that_cannot_generate(tokenizer, model):
    encoder = AutoModel.from_config(model.config)
    with pytest.raises(ValueError, match="takes a causal LM, got LlamaModel; pass a dataset instead"):
        written(encoder, tokenizer)


def test_errors(model):
    with pytest.raises(ValueError, match='dataset="builtin" is text that the model writes, got model=None'):
        written(None)
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 256\), .* tokenizer that belongs"):
        written(model, make_tokenizer(words=5000, adds_bos=True))
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    with pytest.raises(RuntimeError, match="the model's logits must be finite to write calibration text"):
        written(broken)
