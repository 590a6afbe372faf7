"""How good is a quantized model: perplexity, and how far its predictions are from the original model's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .calibration.data import describe_missing, has_vocabulary, sequence_prefix, tokenize

# Positions are compared in chunks of about this many logits: 64 MiB in float32, whatever the vocabulary.
_CHUNK_LOGITS = 1 << 24


@dataclass(frozen=True)
class EvaluationResult:
    """Means over all predicted tokens; the last three are None without a reference model.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the text, in nats.
        num_tokens: how many predictions were scored (every token of a window but its first).
        sequence_length: tokens in a window.
        reference_perplexity: the reference model's on the same tokens.
        kl_divergence: mean KL(reference || model) of the next-token distributions, nats per token.
        top1_agreement: share of positions where both models find the same token most likely, 0 to 1.
    """

    perplexity: float
    num_tokens: int
    sequence_length: int
    reference_perplexity: float | None = None
    kl_divergence: float | None = None
    top1_agreement: float | None = None

    def to_dict(self) -> dict[str, float | int | None]:
        """The fields by name, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"perplexity            {self.perplexity:.4f}"]
        if self.kl_divergence is not None:
            lines += [
                f"reference perplexity  {self.reference_perplexity:.4f}",
                f"KL divergence         {self.kl_divergence:.4f} nats per token",
                f"top-1 agreement       {100 * self.top1_agreement:.2f} %",  # type: ignore[operator]
            ]
        return "\n".join([*lines, f"over {self.num_tokens} tokens in windows of {self.sequence_length}"])


def evaluate(
    model: Any,
    text: Any,
    tokenizer: Any = None,
    *,
    reference: Any = None,
    sequence_length: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 4,
    progress: bool = True,
) -> EvaluationResult:
    """Scores a causal LM on a text, and against a reference model, usually the unquantized one.

    The text is cut into windows that do not overlap; each begins with BOS if the tokenizer begins a text with
    it. Tokens after the last full window are left out; a text that fills no window is one shorter window.

    Args:
        model: a transformers causal LM, on any device or devices.
        text: a string, a list of strings (documents, joined by the tokenizer's EOS), the path of a .txt file,
            or int64 token ids [n], or [windows, sequence_length] to be used as they are.
        tokenizer: needed for everything but token ids.
        reference: a causal LM with the same vocabulary; it may be on another device.
        sequence_length: tokens in a window, at least 2.
        max_tokens: use at most this many tokens, from the beginning of the text.
        batch_size: windows in a forward pass.
        progress: show a progress bar.

    Raises:
        ValueError: no text, no tokenizer for it, a size that does not fit, different vocabularies.
        RuntimeError: a model's logits are not finite; the message names the model.
    """
    _check_sizes(sequence_length, max_tokens, batch_size)
    windows = _windows(text, tokenizer, sequence_length, max_tokens)
    models = [m for m in (model, reference) if m is not None]
    for each in models:
        _check_windows(windows, each)
    modes = [m.training for m in models]
    totals = _Totals()
    try:
        for each in models:
            each.eval()
        with (
            torch.no_grad(),
            logging.tqdm(total=len(windows), desc="Evaluating", disable=not progress) as bar,
        ):
            for ids in windows.split(batch_size):
                _score_batch(totals, ids, model, reference)
                bar.update(len(ids))
    finally:
        for each, training in zip(models, modes, strict=True):
            each.train(training)
    return totals.result(windows.shape[1], with_reference=reference is not None)


def _check_sizes(sequence_length: int, max_tokens: int | None, batch_size: int) -> None:
    if sequence_length < 2:
        raise ValueError(
            f"sequence_length must be at least 2, to predict one token from one, got {sequence_length}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(f"max_tokens must be None or at least 2, got {max_tokens}")


def _windows(text: Any, tokenizer: Any, sequence_length: int, max_tokens: int | None) -> Tensor:
    """int64 [windows, T], T = `sequence_length` or, for one short window, less."""
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.dtype == torch.bool or text.dim() not in (1, 2):
            raise ValueError(
                f"token ids must be integers [n] or [windows, T], got {text.dtype} of {list(text.shape)}"
            )
        prefix, stream = [], text.to("cpu", torch.int64)
        if stream.dim() == 2:
            sequence_length = stream.shape[1]
            stream = stream.flatten()
    else:
        documents = _documents(text)
        if not has_vocabulary(tokenizer):
            missing = describe_missing(tokenizer)
            raise ValueError(f"text needs a tokenizer, got {missing}; pass the model's, or pass token ids")
        prefix, stream = sequence_prefix(tokenizer), tokenize(documents, tokenizer)
    stream = stream[:max_tokens]
    body = min(sequence_length - len(prefix), len(stream))
    if len(stream) == 0 or len(prefix) + body < 2:
        raise ValueError(
            f"text must hold at least 2 tokens to predict one, got {len(stream)}; pass more text"
        )
    count = len(stream) // body
    rows = stream[: count * body].view(count, body)
    return torch.cat((torch.tensor(prefix, dtype=torch.int64).expand(count, -1), rows), dim=1)


def _documents(text: Any) -> list[str]:
    is_file = isinstance(text, str) and text.lower().endswith(".txt") and "\n" not in text
    if isinstance(text, Path) or is_file:
        path = Path(text)
        if not path.is_file():
            raise ValueError(f"text names a file, but there is no file {str(path)!r}; check the path")
        try:
            return [path.read_text(encoding="utf-8")]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name!r} must be UTF-8 text: {error}; convert it") from error
    if isinstance(text, str):
        return [text]
    if isinstance(text, Sequence) and all(isinstance(document, str) for document in text):
        return list(text)
    raise ValueError(
        "text must be a string, a list of strings, the path of a .txt file or a tensor of token ids, got "
        f"{type(text).__name__}"
    )


def _check_windows(ids: Tensor, model: Any) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(
            f"sequence_length must be at most max_position_embeddings of {_name(model)}, {limit}, got "
            f"{ids.shape[1]}; lower sequence_length"
        )
    size = model.get_input_embeddings().weight.shape[0]
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"token ids must be in [0, {size}), the vocabulary of {_name(model)}, got "
            f"{low if low < 0 else high}; use the tokenizer that belongs to the model"
        )


class _Totals:
    """Sums over predicted tokens, in float64."""

    def __init__(self) -> None:
        self.tokens = 0
        self.loss = self.reference_loss = self.divergence = self.agreed = 0.0

    def result(self, sequence_length: int, *, with_reference: bool) -> EvaluationResult:
        perplexity = _exp(self.loss / self.tokens)
        if not with_reference:
            return EvaluationResult(perplexity, self.tokens, sequence_length)
        return EvaluationResult(
            perplexity,
            self.tokens,
            sequence_length,
            reference_perplexity=_exp(self.reference_loss / self.tokens),
            kl_divergence=self.divergence / self.tokens,
            top1_agreement=self.agreed / self.tokens,
        )


def _exp(mean_loss: float) -> float:
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def _score_batch(totals: _Totals, ids: Tensor, model: Any, reference: Any) -> None:
    """Adds the scores of int64 `ids` [B, T] to the totals; B * (T - 1) predictions."""
    logits = _logits(model, ids)
    original = None if reference is None else _logits(reference, ids)
    if original is not None and original.shape != logits.shape:
        raise ValueError(
            f"model and reference must have the same vocabulary, got {logits.shape[-1]} logits from "
            f"{_name(model)} and {original.shape[-1]} from {_name(reference)}"
        )
    targets = ids[:, 1:].flatten()
    chunk = max(1, _CHUNK_LOGITS // logits.shape[-1])
    for begin in range(0, len(targets), chunk):
        some = slice(begin, begin + chunk)
        log_p = _log_probabilities(logits[some], model)
        target = targets[some].to(log_p.device)
        totals.tokens += len(target)
        totals.loss += _negative_log_likelihood(log_p, target)
        if original is not None:
            log_q = _log_probabilities(original[some], reference).to(log_p.device)
            totals.reference_loss += _negative_log_likelihood(log_q, target)
            totals.divergence += (log_q.exp() * (log_q - log_p)).sum(-1).double().sum().item()
            totals.agreed += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()


def _logits(model: Any, ids: Tensor) -> Tensor:
    """[B * (T - 1), V] in the model's own dtype: what it says at each position but the last."""
    device = model.get_input_embeddings().weight.device
    logits: Tensor = model(input_ids=ids.to(device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def _log_probabilities(logits: Tensor, model: Any) -> Tensor:
    """float32 [n, V]."""
    log_p = logits.float().log_softmax(-1)
    if not bool(torch.isfinite(log_p).all()):
        raise RuntimeError(
            f"logits must be finite, got NaN or inf from {_name(model)}; check its weights and its dtype"
        )
    return log_p


def _negative_log_likelihood(log_p: Tensor, target: Tensor) -> float:
    return -log_p.gather(1, target.unsqueeze(1)).double().sum().item()


def _name(model: Any) -> str:
    path = getattr(model.config, "_name_or_path", "")
    return f"{type(model).__name__} ({path})" if path else type(model).__name__
