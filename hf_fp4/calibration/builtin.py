"""`dataset="builtin"`: calibration text that the model writes itself, without dataset and network.

The idea is LLM-QAT's (arXiv 2305.17888): each piece starts with a random token and continues with what the
model samples from its own distribution, at temperature 1 and from the whole vocabulary. `_starts` makes the
beginnings, `_write` continues them with `_InverseCDF`, `write_text` packs the pieces into sequences.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.utils import logging

# Attention to a long past costs more and adds little to second moments, so a long sequence is several pieces.
_PIECE_TOKENS = 512
# Fixed, not chosen by free memory: how many are sampled at once can change roundings and with them the text.
_PIECES_AT_ONCE = 64
# Ids that stand for an image or a sound; they have no text, and a model may look for what they stand for.
_PLACEHOLDER = re.compile(r"(image|video|vision|audio|speech).*_token_(id|index)$")


def write_text(
    model: Any, tokenizer: Any, num_samples: int, sequence_length: int, seed: int, vocab_size: int
) -> Tensor:
    """Lets `model` write token ids: int64 [num_samples, sequence_length] on the CPU.

    A sequence is made of equal pieces of at most 512 tokens; only the first keeps the tokenizer's prefix.
    The same arguments give the same ids. No global random state is read or changed, and the model's
    generation settings are neither used nor changed.

    Args:
        model: a causal LM in memory.
        tokenizer: the model's; None if it has none, pieces then begin with the config's BOS, if any.
        vocab_size: of the model; every id is below it.

    Raises:
        ValueError: no model, or one that cannot generate; a tokenizer whose prefix the model does not have.
        RuntimeError: the model's logits are not finite.
    """
    if model is None:
        raise ValueError('dataset="builtin" is text that the model writes, got model=None; pass the model')
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise ValueError(
            'dataset="builtin" is text that the model writes, which takes a causal LM, got '
            f"{type(model).__name__}; pass a dataset instead: text of the kind that the model will see"
        )
    if tokenizer is not None:
        prefix = sequence_prefix(tokenizer)
    else:
        bos = model.config.get_text_config().bos_token_id
        prefix = [] if bos is None else [bos]
    banned = _banned(model, tokenizer, vocab_size)
    per_row = -(-sequence_length // _PIECE_TOKENS)
    length = -(-sequence_length // per_row)
    rng = torch.Generator().manual_seed(seed)
    starts = _starts(prefix, tokenizer, banned, num_samples * per_row, rng)
    pieces = _write(model, starts, length + (len(prefix) if per_row > 1 else 0), banned, rng)
    pieces = pieces.view(num_samples, per_row, -1)
    first, later = pieces[:, 0, :length], pieces[:, 1:, len(prefix) :]
    return torch.cat((first, later.flatten(1)), dim=1)[:, :sequence_length].contiguous()


def sequence_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text: `[BOS]`, nothing, or more (GLM puts two)."""
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not bare:
        return whole[:1] if whole and whole[0] == tokenizer.bos_token_id else []
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """Raises ValueError if an id is not one of the model's."""
    for extreme in (int(ids.min()), int(ids.max())):
        if not 0 <= extreme < vocab_size:
            raise ValueError(
                f"token ids must be in [0, {vocab_size}), the model's vocabulary, got {extreme}; use "
                "the tokenizer that belongs to the model"
            )


def _banned(model: Any, tokenizer: Any, vocab_size: int) -> Tensor:
    """bool [vocab_size]: what is never drawn, ids that the tokenizer does not have and placeholders."""
    banned = torch.zeros(vocab_size, dtype=torch.bool)
    if tokenizer is not None:
        banned[len(tokenizer) :] = True
    for name, value in model.config.to_dict().items():
        if _PLACEHOLDER.search(name) and type(value) is int:
            banned[value : value + 1] = True
    return banned


def _starts(prefix: list[int], tokenizer: Any, banned: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """int64 [count, len(prefix) + 1]: the prefix and a random token, which is not a special one."""
    usable = ~banned
    for special in [] if tokenizer is None else tokenizer.all_special_ids:
        usable[special : special + 1] = False
    words = usable.nonzero()
    drawn = words[torch.randint(len(words), (count,), generator=rng)]
    starts = torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(count, -1), drawn), dim=1)
    check_ids(starts, len(banned))
    return starts


def _write(model: Any, starts: Tensor, length: int, banned: Tensor, rng: torch.Generator) -> Tensor:
    """Continues int64 `starts` [n, s] to [n, length], `_PIECES_AT_ONCE` at a time or as many as fit."""
    starts, size = starts[:, :length], _PIECES_AT_ONCE
    missing = length - starts.shape[1]
    if not missing:
        return starts
    uniform = torch.rand(len(starts), missing, generator=rng, dtype=torch.float64)
    pieces = torch.empty(0, length, dtype=torch.int64)
    with logging.tqdm(total=uniform.numel(), desc="Writing calibration text", unit="token") as progress:
        while (done := len(pieces)) < len(starts):
            some = slice(done, done + size)
            sampler = _InverseCDF(uniform[some], banned, progress)
            try:
                pieces = torch.cat((pieces, _generate(model, starts[some], sampler)))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size //= 2
    return pieces


def _generate(model: Any, starts: Tensor, sampler: _InverseCDF) -> Tensor:
    """Continues int64 `starts` [n, s] by the sampler's tokens, without the model's own settings.

    Generation does not stop at EOS: the model then begins something else, as in packed training text.
    """
    device = model.get_input_embeddings().weight.device
    kept, training = model.generation_config, model.training
    settings = GenerationConfig(do_sample=False, max_new_tokens=sampler.uniform.shape[1], use_cache=True)
    model.generation_config = GenerationConfig()
    model.eval()
    try:
        ids = model.generate(
            starts.to(device),
            attention_mask=torch.ones_like(starts, device=device),
            generation_config=settings,
            logits_processor=[sampler],
        )
    finally:
        model.generation_config = kept
        model.train(training)
    return ids.to("cpu")


class _InverseCDF(LogitsProcessor):
    """Samples by inverting the cumulative distribution, then leaves only that token for greedy search.

    The uniform numbers are given, so no global random state is read or changed, and a piece does not depend
    on the pieces beside it. Probabilities are summed as integer multiples of 2^-40: exact in any order.

    Attributes:
        uniform: float64 [pieces, tokens to draw], in [0, 1).
    """

    def __init__(self, uniform: Tensor, banned: Tensor, progress: Any) -> None:
        self.uniform = uniform
        self._banned = banned  # bool [vocab_size]
        self._progress = progress
        self._columns = iter(uniform.unbind(1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = scores[:, : len(self._banned)].float()
        if not bool(torch.isfinite(logits).all()):
            raise RuntimeError(
                "the model's logits must be finite to write calibration text, got NaN or inf; check its "
                "weights and dtype, or pass a dataset instead"
            )
        logits = logits.masked_fill(self._banned[: logits.shape[1]].to(logits.device), -torch.inf)
        cdf = (logits.softmax(-1) * 2.0**40).to(torch.int64).cumsum(-1)
        drawn = next(self._columns).to(cdf.device) * cdf[:, -1]
        token = torch.searchsorted(cdf, drawn.to(torch.int64).unsqueeze(1), right=True)
        self._progress.update(len(token))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
