"""Calibration data: anything a user may call a dataset -> batches of token ids of one fixed length.

The way through: `_open` turns the argument into a `_Source` of records (texts, chats or token ids),
`_text_windows` or `_token_windows` cuts them into candidate sequences, `_choose` picks `num_samples` of them
by seed, `_package` checks and batches the result. `builtin_batches` needs no dataset: the model writes it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import itertools
import json
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor
from transformers.utils import logging

logger = logging.get_logger(__name__)

BUILTIN = "builtin"

_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
# A long local text is read at places all over it, until there is this many times the need to choose from...
_OVERSAMPLE = 8
_MIN_PLACES = 16  # ... and at as many places at least
# Tokenizers may slow down quadratically on one huge string, so long texts are cut, after a line if possible.
_FRAGMENT_CHARS = 1 << 12
_CHARS_PER_TOKEN = 4  # English; only decides how much is read at one place
_SHUFFLE_BUFFER = 1024

_KIND = Literal["text", "chat", "tokens"]


@dataclass(frozen=True)
class CalibrationData:
    """Token batches with what identifies them.

    Attributes:
        batches: int64 [B, T] token ids on the CPU, B = `batch_size` or, in the last batch, fewer.
        fingerprint: sha256, in hex, of the shape [num_samples, T] and the ids; the batch size does not enter.
        description: one line for the checkpoint's config and the model card, without local paths.
    """

    batches: list[Tensor]
    fingerprint: str
    description: str


@dataclass(frozen=True)
class _Request:
    """What the caller wants, and what the model can take."""

    num_samples: int
    sequence_length: int
    batch_size: int
    seed: int
    vocab_size: int

    def __post_init__(self) -> None:
        for name in ("num_samples", "sequence_length", "batch_size", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True)
class _Source:
    """Records of one kind: a text, a list of chat messages, or token ids. A stream is read in order, once."""

    records: Sequence[Any] | Iterator[Any]
    kind: _KIND
    description: str


class _Fragment(str):
    """A text that the next record continues, or that brings its own special tokens: no separator follows."""


def calibration_batches(
    dataset: Any,
    tokenizer: Any,
    *,
    num_samples: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
    max_length: int | None = None,
    model: Any = None,
) -> CalibrationData:
    """Makes `num_samples` sequences of exactly `sequence_length` tokens out of `dataset`.

    Texts are tokenized, joined with the tokenizer's EOS after each document and cut into sequences without
    overlap; a sequence begins with BOS if the tokenizer begins a text with it. Where there is more text than
    needed, `seed` picks sequences from all over it. The same arguments give the same ids.

    Args:
        dataset: one of
            - a Hub dataset, `"name"` or `"name:config"` ; its split `train` is streamed;
            - a `datasets.Dataset` or `IterableDataset`, or a list of rows, with a column `input_ids` (token
              ids; an `attention_mask` beside it takes out padding), `text`, `messages` (chats, for the
              tokenizer's template), or else a single column of strings;
            - a list of strings, each a document;
            - token ids: a list of 1-D integer tensors or lists, or one tensor [T] or [n, T]. They are taken
              as they are, without BOS or EOS; items of `sequence_length` or more are cut from their start,
              shorter ones are joined;
            - a local file: .txt (one document), .jsonl (a string or a row on each line) or .parquet;
            - `"builtin"`, see `builtin_batches`.
        tokenizer: a transformers tokenizer; may be None for token ids.
        vocab_size: of the model; every id must be below it.
        max_length: the model's max_position_embeddings, if it has one.
        model: the causal LM in memory; needed only by `"builtin"`.

    Raises:
        ValueError: a bad size, an unknown kind of dataset, an empty or too short one, no tokenizer for text,
            ids that the model does not have, columns that leave open which one is the text.
        RuntimeError: a Hub dataset that cannot be read.
    """
    request = _Request(num_samples, sequence_length, batch_size, seed, vocab_size)
    if max_length is not None and sequence_length > max_length:
        raise ValueError(
            f"sequence_length must be at most the model's max_position_embeddings, {max_length}, got "
            f"{sequence_length}; lower sequence_length"
        )
    if isinstance(dataset, str) and dataset == BUILTIN:
        return _builtin(model, tokenizer, request, _SAMPLED)
    source = _open(dataset, seed)
    if source.kind == "tokens":
        candidates = _token_windows(source, request)
    else:
        if not has_vocabulary(tokenizer):
            raise ValueError(
                f"{source.description} needs a tokenizer, got {describe_missing(tokenizer)}; pass "
                "tokenizer=..., or token ids (a list of integer tensors, or a dataset with column input_ids)"
            )
        candidates = _text_windows(source, tokenizer, request)
    return _package(_choose(candidates, request), source.description, request)


def builtin_batches(
    model: Any,
    tokenizer: Any = None,
    *,
    num_samples: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    vocab_size: int,
) -> CalibrationData:
    """`dataset="builtin"`: calibration data that needs no dataset and no network.

    The model writes it: pieces of at most 512 tokens, sampled from its own distribution (the idea of LLM-QAT,
    arXiv 2305.17888) and packed to `sequence_length`. Without a tokenizer they begin with random tokens. A
    model that cannot generate is calibrated on the Python library's documentation instead, which is
    narrower; a warning and the description say so.

    Raises:
        ValueError: no model, or one that cannot generate and no tokenizer to read the documentation with.
        RuntimeError: the model's logits are not finite.
    """
    request = _Request(num_samples, sequence_length, batch_size, seed, vocab_size)
    return _builtin(model, tokenizer, request, _SAMPLED)


# --- what a tokenizer puts around text --------------------------------------------------------------------


def has_vocabulary(tokenizer: Any) -> bool:
    """False for None, and for the special tokens that transformers returns for a model without tokenizer."""
    return tokenizer is not None and len(tokenizer) > len(set(tokenizer.all_special_ids))


def describe_missing(tokenizer: Any) -> str:
    """For the error about a tokenizer that is None or has no vocabulary."""
    if tokenizer is None:
        return "tokenizer=None"
    return f"one of {len(tokenizer)} special tokens only (is the model without tokenizer files?)"


def sequence_prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text: `[BOS]`, nothing, or more (GLM puts two)."""
    whole = list(tokenizer("a")["input_ids"])
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    if not bare:
        return whole[:1] if whole and whole[0] == tokenizer.bos_token_id else []
    starts = [i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare]
    return whole[: starts[0]] if starts else []


def tokenize(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Tokenizes documents and joins them: int64 [n]. The tokenizer's EOS, if it has one, follows each.

    BOS is not added here: it belongs to the start of a sequence, and in its middle it would be an outlier
    that the model does not meet.
    """
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    fragments = [fragment for text in texts if text.strip() for fragment in _fragments(text)]
    if not fragments:
        return torch.empty(0, dtype=torch.int64)
    # verbose=False: no warning that a document is longer than the model, it gets cut.
    encoded = tokenizer(fragments, add_special_tokens=False, verbose=False)["input_ids"]
    ids: list[int] = []
    for fragment, tokens in zip(fragments, encoded, strict=True):
        ids.extend(tokens)
        ids.extend([] if isinstance(fragment, _Fragment) else eos)
    return torch.tensor(ids, dtype=torch.int64)


def _fragments(text: str) -> list[str]:
    """Cuts a document after line ends, or after spaces, into at most `_FRAGMENT_CHARS` each."""
    continues = isinstance(text, _Fragment)
    pieces: list[str] = []
    start = 0
    while len(text) - start > _FRAGMENT_CHARS:
        window = text[start : start + _FRAGMENT_CHARS]
        cut = window.rfind("\n") + 1 or window.rfind(" ") or 0
        # A space belongs to the word after it in most vocabularies, a line end to the line before it.
        pieces.append(_Fragment(window[: cut or _FRAGMENT_CHARS]))
        start += len(pieces[-1])
    last = text[start:]
    return [*pieces, _Fragment(last) if continues else last]


# --- the kinds of dataset ---------------------------------------------------------------------------------


def _open(dataset: Any, seed: int) -> _Source:
    if isinstance(dataset, Path) or (isinstance(dataset, str) and _is_local(dataset)):
        return _open_file(Path(dataset))
    if isinstance(dataset, str):
        return _open_hub(dataset, seed)
    if hasattr(dataset, "keys"):
        raise ValueError(
            f"a dataset must be one split or a list, got a mapping with keys {sorted(map(str, dataset))}; "
            'pass what is under one of them, for instance dataset["train"]'
        )
    if isinstance(dataset, Tensor):
        return _open_list(list(dataset) if dataset.dim() == 2 else [dataset])
    if hasattr(dataset, "column_names") and hasattr(dataset, "__iter__"):
        return _open_dataset(dataset, seed)
    if isinstance(dataset, Sequence):
        return _open_list(dataset)
    raise ValueError(
        "dataset must be a Hub dataset's name, a datasets.Dataset, a list of strings or of token ids, a "
        f'local .txt/.jsonl/.parquet file or "{BUILTIN}", got {type(dataset).__name__}'
    )


def _is_local(name: str) -> bool:
    return name.lower().endswith(_FILE_SUFFIXES) or (
        "\n" not in name and len(name) < 4096 and Path(name).is_file()
    )


def _open_file(path: Path) -> _Source:
    if not path.is_file():
        raise ValueError(f"dataset names a local file, but there is no file {str(path)!r}; check the path")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        import datasets
        from pyarrow import parquet

        rows = datasets.Dataset(parquet.read_table(path))
        return _of_rows(rows, rows.column_names, f"the file {path.name}")
    if suffix not in _FILE_SUFFIXES:
        raise ValueError(f"a dataset file must be one of {', '.join(_FILE_SUFFIXES)}, got {path.name!r}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"dataset file {path.name!r} must be UTF-8 text: {error}; convert it") from error
    if suffix == ".txt":
        return _Source(_fragments(text), "text", f"the file {path.name}")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return _open_list(
        _Lazy(lines, lambda numbered: _parse_line(path.name, *numbered)), f"the file {path.name}"
    )


def _parse_line(name: str, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} of {name!r} must be JSON (one value a line): {error}") from error


def _open_list(items: Sequence[Any], description: str | None = None) -> _Source:
    if not len(items):
        raise ValueError(f"the dataset is empty: {description or 'a list of no items'}; pass some text")
    first = items[0]
    if isinstance(first, Mapping):
        return _of_rows(items, list(first), description or f"a list of {len(items)} rows")
    if not isinstance(first, str):
        items = [items] if isinstance(first, int) else items
        return _Source(items, "tokens", description or f"a list of {len(items)} token sequences")
    description = description or f"a list of {len(items)} texts"
    if isinstance(items, list):  # in memory: long texts are cut now, so that each is sampled all over
        items = [piece for text in items for piece in (_fragments(text) if isinstance(text, str) else [text])]
    return _Source(items, "text", description)


def _open_dataset(dataset: Any, seed: int) -> _Source:
    if hasattr(dataset, "__len__"):
        description = f"a dataset of {len(dataset)} rows"
        if not len(dataset):
            raise ValueError("the dataset is empty: it has 0 rows; pass some text")
        return _of_rows(dataset, dataset.column_names, description)
    shuffled = dataset.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    return _of_stream(iter(shuffled), "a streamed dataset")


def _open_hub(name: str, seed: int) -> _Source:
    if not _HUB_NAME.fullmatch(name):
        shown = name if len(name) <= 60 else name[:60] + "..."
        raise ValueError(
            f"dataset must be a Hub dataset's name (or name:config), a local {'/'.join(_FILE_SUFFIXES)} file "
            f'or "{BUILTIN}", got the string {shown!r}; to calibrate on a text itself pass a list of strings'
        )
    return _of_stream(_hub_rows(name, seed), f"the Hub dataset {name}")


def _hub_rows(name: str, seed: int) -> Iterator[Any]:
    """Streams the split `train` in shuffled order: nothing but what is read is downloaded."""
    import datasets

    repo, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(repo, config or None, split="train", streaming=True)
        yield from stream.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    except Exception as error:  # no common base: the Hub's HTTP client has its own, and changed it once
        raise RuntimeError(
            f"the calibration dataset {name!r} cannot be read from the Hugging Face Hub "
            f"({type(error).__name__}: {error}). Three ways out: (1) check the name and the config, and "
            "connect to the network, or download the dataset into the local cache beforehand; (2) pass text "
            "of your own: a list of strings, a datasets.Dataset, or a local .txt/.jsonl/.parquet file; "
            f'(3) pass dataset="{BUILTIN}", which needs no network'
        ) from error


def _of_stream(rows: Iterator[Any], description: str) -> _Source:
    first = next(rows, None)
    if first is None:
        raise ValueError(f"the dataset is empty: {description}; pass some text")
    column, kind = _column(list(first), first, description)
    pick = _picker(column, kind)

    def records() -> Iterator[Any]:
        yield pick(first)
        yield from map(pick, rows)

    return _Source(records(), kind, description)


def _of_rows(rows: Sequence[Any], columns: list[str], description: str) -> _Source:
    if not len(rows):
        raise ValueError(f"the dataset is empty: {description}; pass some text")
    column, kind = _column(columns, rows[0], description)
    if hasattr(rows, "select_columns"):  # do not decode images and the like
        rows = rows.select_columns([name for name in (column, "attention_mask") if name in columns])
    return _Source(_Lazy(rows, _picker(column, kind)), kind, description)


def _column(columns: list[str], row: Mapping[str, Any], description: str) -> tuple[str, _KIND]:
    """Which column to read: input_ids, text, messages, else the only one that holds strings."""
    kinds: dict[str, _KIND] = {"input_ids": "tokens", "text": "text", "messages": "chat"}
    for name, kind in kinds.items():
        if name in columns:
            return name, kind
    strings = [name for name in columns if isinstance(row[name], str)]
    if len(strings) == 1:
        return strings[0], "text"
    raise ValueError(
        f"{description} must have a column input_ids, text or messages, or a single column of strings, got "
        f"the columns {columns} ({len(strings)} of them strings); rename one, for instance "
        'dataset.rename_column("content", "text")'
    )


def _picker(column: str, kind: _KIND) -> Callable[[Any], Any]:
    def pick(row: Any) -> Any:
        if not hasattr(row, "get"):
            raise ValueError(
                f"every row must have the column {column!r}, got a {type(row).__name__} among them"
            )
        value = row.get(column)
        if kind == "text":
            return "" if value is None else value
        if kind == "chat" or row.get("attention_mask") is None:
            return value
        return _token_ids(value)[torch.as_tensor(row["attention_mask"]).bool()]

    return pick


class _Lazy(Sequence[Any]):
    """A sequence whose items are made when they are read."""

    def __init__(self, items: Sequence[Any], make: Callable[[Any], Any]) -> None:
        self._items = items
        self._make = make

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return self._make(self._items[index])


# --- records -> sequences ---------------------------------------------------------------------------------


def _text_windows(source: _Source, tokenizer: Any, request: _Request) -> Tensor:
    """int64 [candidates, sequence_length], cut without overlap from the joined text."""
    prefix = torch.tensor(sequence_prefix(tokenizer), dtype=torch.int64)
    window = request.sequence_length - len(prefix)
    if window < 1:
        raise ValueError(
            f"sequence_length must be more than the {len(prefix)} tokens that the tokenizer begins with, got "
            f"{request.sequence_length}"
        )
    needed = request.num_samples * window
    if isinstance(source.records, Sequence):
        stream = _read_spread(source.records, tokenizer, needed, window, request)
    else:
        stream = _read_stream(source.records, tokenizer, needed)
    count = _checked_count(len(stream) // window, len(stream), source, request)
    slack = len(stream) - count * window
    phase = int(torch.randint(slack + 1, (), generator=request.generator()))
    body = stream[phase : phase + count * window].view(count, window)
    return torch.cat((prefix.expand(count, -1), body), dim=1)


def _read_spread(
    records: Sequence[Any], tokenizer: Any, needed: int, window: int, request: _Request
) -> Tensor:
    """Tokenizes blocks of neighbouring records in seeded order until `_OVERSAMPLE` times the need is there.

    Neighbours stay together (lines of an article make sense in their order), and the blocks are put back in
    the order of the text; a text that is not much longer than needed is simply read whole.
    """
    total = len(records)
    probes = [records[i] for i in range(0, total, max(1, total // 64))]
    mean_chars = sum(len(_as_text(probe, tokenizer)) for probe in probes) / len(probes)
    block = max(1, round(_OVERSAMPLE * window * _CHARS_PER_TOKEN / max(mean_chars, 1.0)))
    starts = torch.arange(0, total, block)
    tokens: dict[int, Tensor] = {}
    found = 0
    for i in torch.randperm(len(starts), generator=request.generator()).tolist():
        start = int(starts[i])
        texts = [_as_text(record, tokenizer) for record in records[start : start + block]]
        tokens[start] = tokenize(texts, tokenizer)
        found += len(tokens[start])
        if found >= _OVERSAMPLE * needed and len(tokens) >= _MIN_PLACES:
            break
    return torch.cat([tokens[start] for start in sorted(tokens)])


def _read_stream(records: Iterable[Any], tokenizer: Any, needed: int) -> Tensor:
    parts: list[Tensor] = []
    found = 0
    for record in records:
        parts.append(tokenize([_as_text(record, tokenizer)], tokenizer))
        found += len(parts[-1])
        if found >= needed:
            break
    return torch.cat(parts)


def _as_text(record: Any, tokenizer: Any) -> str:
    if isinstance(record, str):
        return record
    is_chat = isinstance(record, Sequence) and all(isinstance(message, Mapping) for message in record)
    if not is_chat:
        raise ValueError(
            f"calibration text must be strings or lists of messages, got a {type(record).__name__}"
        )
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the dataset holds chats (a column messages), which need a chat template, got a tokenizer "
            "without one; set tokenizer.chat_template or pass plain text"
        )
    text = tokenizer.apply_chat_template(record, tokenize=False)
    adds_bos = tokenizer.bos_token_id in sequence_prefix(tokenizer)
    return _Fragment(text.removeprefix(tokenizer.bos_token) if adds_bos else text)


def _token_windows(source: _Source, request: _Request) -> Tensor:
    """int64 [candidates, sequence_length]: long items are cut from their start, short ones are joined."""
    length = request.sequence_length
    records: Iterable[Any] = source.records
    if isinstance(source.records, Sequence):
        order = torch.randperm(len(source.records), generator=request.generator()).tolist()
        records = map(source.records.__getitem__, order)
    windows: list[Tensor] = []
    rest: list[Tensor] = []
    whole = short = 0
    for record in records:
        ids = _token_ids(record)
        rows = len(ids) // length
        if rows:
            windows.append(ids[: rows * length].view(rows, length))
        else:
            rest.append(ids)
            short += len(ids)
        whole += rows
        if whole + short // length >= _OVERSAMPLE * request.num_samples:
            break
    _checked_count(whole + short // length, whole * length + short, source, request)
    windows.append(
        torch.cat([*rest, torch.empty(0, dtype=torch.int64)])[: short // length * length].view(-1, length)
    )
    return torch.cat(windows)


def _token_ids(record: Any) -> Tensor:
    try:
        ids = torch.as_tensor(record)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"token ids must be 1-D integers, got {type(record).__name__}: {error}") from error
    if ids.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    if ids.dim() == 2 and ids.shape[0] == 1:  # what tokenizer(text, return_tensors="pt") gives
        ids = ids[0]
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"token ids must be 1-D integers, got {ids.dtype} of shape {list(ids.shape)}")
    return ids.to(device="cpu", dtype=torch.int64)


def _checked_count(found: int, tokens: int, source: _Source, request: _Request) -> int:
    if not tokens:
        raise ValueError(f"the dataset is empty: {source.description} holds no text; pass some")
    if found < request.num_samples:
        way_out = f"lower num_samples to {found}, " if found else ""
        raise ValueError(
            f"num_samples={request.num_samples} sequences of sequence_length={request.sequence_length} "
            f"tokens are needed, but {source.description} gives only {found} ({tokens} tokens); {way_out}"
            "lower sequence_length, or bring more text"
        )
    return found


def _choose(candidates: Tensor, request: _Request) -> Tensor:
    return candidates[torch.randperm(len(candidates), generator=request.generator())[: request.num_samples]]


def _package(rows: Tensor, source: str, request: _Request) -> CalibrationData:
    _check_ids(rows, request)
    digest = hashlib.sha256(repr(list(rows.shape)).encode())
    digest.update(rows.contiguous().numpy().astype("<i8").tobytes())
    description = f"{source}: {rows.shape[0]} sequences of {rows.shape[1]} tokens, seed {request.seed}"
    return CalibrationData(list(rows.split(request.batch_size)), digest.hexdigest(), description)


def _check_ids(ids: Tensor, request: _Request) -> None:
    for extreme in (int(ids.min()), int(ids.max())):
        if not 0 <= extreme < request.vocab_size:
            raise ValueError(
                f"token ids must be in [0, {request.vocab_size}), the model's vocabulary, got {extreme}; use "
                "the tokenizer that belongs to the model"
            )


# --- "builtin" --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sampling:
    """How the model writes its own calibration text.

    Attributes:
        start: what a piece begins with after the tokenizer's prefix. `"random"`: a random token;
            `"document"`: nothing, or BOS or EOS where there is no prefix, so that the model chooses the
            subject (a chat, for many chat models); `"opening"`: one of `_OPENINGS`; `"mixed"`: these in turn.
        temperature, top_k: of the sampling; top_k 0 is no limit.
        max_tokens: of one piece. Attention to a long past costs more and adds little to second moments.
        pieces: how many are sampled at once. Fixed, since it can change roundings and with them the text.
    """

    start: Literal["random", "document", "opening", "mixed"] = "mixed"
    temperature: float = 1.0
    top_k: int = 0
    max_tokens: int = 512
    pieces: int = 64


_SAMPLED = _Sampling()
_OPENINGS = (
    "The history of the city begins / In the early twentieth century, many / "
    "The species is found in forests / She was born in a small / According to a report published on / "
    "The government announced on Tuesday that / Police said that the two men / "
    "The team won the championship after / Shares of the company fell by / "
    "Researchers at the university have found / The experiment shows that the energy / "
    "In mathematics, a group is defined / Let x be a real number / To solve the equation, we first / "
    "The function returns a list of / import numpy as np / def main(argc, argv): / "
    "#include <stdio.h> int main / SELECT name, count(*) FROM orders / <!DOCTYPE html><html><head> / "
    '{"id": 1, "name": " / Preheat the oven to 180 degrees / To install the software, open the / '
    "Step 1: Remove the cover from / Once upon a time, there was / He looked at her and said / "
    '"I don\'t know what you mean," / The old house stood at the / It was a cold morning when / '
    "Dear Sir or Madam, I am / Thank you for your letter of / I bought this product last month / "
    "This film is one of the / The patient was admitted to hospital / "
    "Symptoms of the disease include fever / The court held that the defendant / "
    "Under the terms of this agreement / The best way to learn a / Question: What is the capital of / "
    "Q: How do I change the / User: Can you explain to me / Here are five tips for better / "
    "In this lesson, students will learn / The purpose of this study was / "
    "The climate of the region is / During the war, the army was / The river flows through the valley / "
    "The album was released in 1998 / The president of the United States / In the second half of the / "
    "Many people believe that the world / The theory of evolution explains how / "
    "| Year | Name | Result | / The price of oil rose to / Children should be encouraged to read / "
    "On the other hand, it is / La ville est située dans le / Die Geschichte der Stadt beginnt im / "
    "El gobierno anunció que la empresa / В начале двадцатого века в городе / "
    "这座城市的历史可以追溯到 / "
    "この町の歴史は古く、多くの"
)


def _builtin(model: Any, tokenizer: Any, request: _Request, plan: _Sampling) -> CalibrationData:
    if model is None:
        raise ValueError(f'dataset="{BUILTIN}" is text that the model writes, got model=None; pass the model')
    tokenizer = tokenizer if has_vocabulary(tokenizer) else None
    if model.can_generate() and not model.config.is_encoder_decoder:
        rows = _SelfWriter(model, tokenizer, request, plan).rows()
        return _package(rows, f'dataset "{BUILTIN}" (text that the model wrote itself)', request)
    if tokenizer is None:
        raise ValueError(
            f'dataset="{BUILTIN}" needs a causal LM or a tokenizer, got {type(model).__name__}, which cannot '
            "generate, and no tokenizer; pass tokenizer=..."
        )
    logger.warning(
        f'{type(model).__name__} cannot generate text, so dataset="{BUILTIN}" is the documentation of the '
        "Python library, narrow text that costs accuracy; pass text of the kind that the model will see"
    )
    return _library_batches(tokenizer, request)


def _library_batches(tokenizer: Any, request: _Request) -> CalibrationData:
    source = _Source(_library_texts(), "text", f'dataset "{BUILTIN}" (documentation of the Python library)')
    candidates = _text_windows(source, tokenizer, request)
    return _package(_choose(candidates, request), source.description, request)


def _library_texts() -> list[str]:
    """The language reference that `help()` shows, and the library's docstrings, read without importing."""
    topics = importlib.import_module("pydoc_data.topics").topics
    texts = [topics[name] for name in sorted(topics)]
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        nodes = [n for n in ast.walk(module) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
        texts.append("\n\n".join(filter(None, map(ast.get_docstring, nodes))))
    return [fragment for text in texts if text for fragment in _fragments(text)]


@dataclass(frozen=True)
class _SelfWriter:
    model: Any
    tokenizer: Any
    request: _Request
    plan: _Sampling

    def rows(self) -> Tensor:
        """int64 [num_samples, sequence_length]: equal pieces; only the first of a row keeps the prefix."""
        samples, total = self.request.num_samples, self.request.sequence_length
        per_row = -(-total // self.plan.max_tokens)
        length = -(-total // per_row)
        prefix = self._prefix()
        rng = self.request.generator()
        starts = self._starts(prefix, samples * per_row, rng)
        pieces = self._write(starts, length + (len(prefix) if per_row > 1 else 0), rng)
        pieces = pieces.view(samples, per_row, -1)
        first, later = pieces[:, 0, :length], pieces[:, 1:, len(prefix) : len(prefix) + length]
        return torch.cat((first, later.flatten(1)), dim=1)[:, :total].contiguous()

    def _prefix(self) -> list[int]:
        if self.tokenizer is not None:
            return sequence_prefix(self.tokenizer)
        bos = self.model.config.get_text_config().bos_token_id
        return [] if bos is None else [bos]

    def _starts(self, prefix: list[int], count: int, rng: torch.Generator) -> list[list[int]]:
        """The ids that each piece begins with: the prefix, and what `plan.start` says."""
        usable = ~self._banned()
        openings: list[list[int]] = []
        special = self.model.config.get_text_config() if self.tokenizer is None else self.tokenizer
        separator = special.eos_token_id if special.bos_token_id is None else special.bos_token_id
        if self.tokenizer is not None:
            usable[[i for i in self.tokenizer.all_special_ids if i < len(usable)]] = False
            openings = self.tokenizer(_OPENINGS.split(" / "), add_special_tokens=False)["input_ids"]
        words = usable.nonzero()
        separator = separator if isinstance(separator, list) else [] if separator is None else [separator]
        kinds: dict[str, list[list[int]]] = {
            "random": words[torch.randint(len(words), (count,), generator=rng)].tolist(),
            "document": [[]] if prefix else [[token] for token in separator[:1]],
            "opening": [openings[i] for i in torch.randperm(len(openings), generator=rng).tolist()],
        }
        wanted = list(kinds) if self.plan.start == "mixed" else [self.plan.start]
        cycles = [itertools.cycle(kinds[kind]) for kind in wanted if kinds[kind]]
        if not cycles:
            raise ValueError(f"pieces that start with {self.plan.start!r} need a tokenizer or special tokens")
        turns = itertools.islice(itertools.cycle(cycles), count)
        starts = [prefix + next(cycle) for cycle in turns]
        return [starts[i] for i in torch.randperm(count, generator=rng).tolist()]

    def _banned(self) -> Tensor:
        """bool [vocab_size]: ids without text, and placeholders that stand for images or sound."""
        banned = torch.zeros(self.request.vocab_size, dtype=torch.bool)
        if self.tokenizer is not None:
            banned[len(self.tokenizer) :] = True
        placeholder = re.compile(r"(image|video|vision|audio|speech).*_token_(id|index)$")
        for name, value in self.model.config.to_dict().items():
            if placeholder.search(name) and type(value) is int:
                banned[value : value + 1] = True
        return banned

    def _write(self, starts: list[list[int]], length: int, rng: torch.Generator) -> Tensor:
        """int64 [len(starts), length]: continues each start, `plan.pieces` at a time or as many as fit."""
        uniform = torch.rand(len(starts), length, generator=rng, dtype=torch.float64)
        forced = torch.full((len(starts), length), -1)
        for row, start in zip(forced, starts, strict=True):
            row[: len(start)] = torch.tensor(start[:length])
        _check_ids(forced.clamp(min=0), self.request)
        banned, size = self._banned(), self.plan.pieces
        pieces = torch.empty(0, length, dtype=torch.int64)
        with logging.tqdm(total=forced.numel(), desc="Writing calibration text", unit="token") as progress:
            while (done := len(pieces)) < len(starts):
                some = slice(done, done + size)
                sampler = _InverseCDF(uniform[some], forced[some], banned, self.plan, progress)
                try:
                    pieces = torch.cat((pieces, self._generate(forced[some, :1], length, sampler)))
                except torch.OutOfMemoryError:
                    if size == 1:
                        raise
                    size //= 2
        return pieces

    def _generate(self, heads: Tensor, length: int, sampler: _InverseCDF) -> Tensor:
        """Continues int64 `heads` [n, 1] to [n, length], with none of the model's own generation settings.

        Generation does not stop at EOS: the model then begins something else, as in packed training text.
        """
        model = self.model
        if length == 1:
            return heads
        device = model.get_input_embeddings().weight.device
        kept, training = model.generation_config, model.training
        settings = GenerationConfig(do_sample=False, max_new_tokens=length - 1, use_cache=True)
        model.generation_config = GenerationConfig()
        model.eval()
        try:
            ids = model.generate(
                heads.to(device),
                attention_mask=torch.ones_like(heads, device=device),
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
    """

    def __init__(
        self, uniform: Tensor, forced: Tensor, banned: Tensor, plan: _Sampling, progress: Any
    ) -> None:
        self._uniform = uniform  # float64 [pieces, length], in [0, 1)
        self._forced = forced  # int64 [pieces, length], -1 where the model is free
        self._banned = banned  # bool [vocab_size]
        self._plan = plan
        self._progress = progress

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        position = input_ids.shape[1]
        logits = scores[:, : len(self._banned)].float()
        if not bool(torch.isfinite(logits).all()):
            raise RuntimeError(
                "the model's logits must be finite to write calibration text, got NaN or inf; check its "
                "weights and dtype, or pass a dataset instead"
            )
        logits = logits.masked_fill(self._banned[: logits.shape[1]].to(logits.device), -torch.inf)
        if self._plan.top_k:
            last = logits.topk(min(self._plan.top_k, logits.shape[1])).values[:, -1:]
            logits = logits.masked_fill(logits < last, -torch.inf)
        cdf = ((logits / self._plan.temperature).softmax(-1) * 2.0**40).to(torch.int64).cumsum(-1)
        drawn = self._uniform[:, position].to(cdf.device) * cdf[:, -1]
        token = torch.searchsorted(cdf, drawn.to(torch.int64).unsqueeze(1), right=True)
        forced = self._forced[:, position, None].to(token.device)
        self._progress.update(len(token))
        return torch.full_like(scores, -torch.inf).scatter(1, torch.where(forced < 0, token, forced), 0.0)
