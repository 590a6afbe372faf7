"""Calibration data: anything a user may call a dataset -> batches of token ids of one fixed length.

The way through: `_open` turns the argument into a `_Source` of records (texts, chats or token ids),
`_text_windows` or `_token_windows` cuts them into candidate sequences, `_choose` picks `num_samples` of them
by seed, `_package` checks and batches the result. For `"builtin"`, builtin.py lets the model write.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .builtin import check_ids, sequence_prefix, write_text

__all__ = [
    "CalibrationData",
    "calibration_batches",
    "describe_missing",
    "has_vocabulary",
    "sequence_prefix",
    "tokenize",
]

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
            - `"builtin"`: text that the model writes itself, see `write_text` in builtin.py.
        tokenizer: a transformers tokenizer; may be None for token ids.
        vocab_size: of the model; every id must be below it.
        max_length: the model's max_position_embeddings, if it has one.
        model: the causal LM in memory; needed only by `"builtin"`.

    Raises:
        ValueError: a bad size, an unknown kind of dataset, an empty or too short one, no tokenizer for text,
            ids that the model does not have, columns that leave open which one is the text; "builtin" with
            no model or one that cannot generate.
        RuntimeError: a Hub dataset that cannot be read; "builtin" with a model whose logits are not finite.
    """
    request = _Request(num_samples, sequence_length, batch_size, seed, vocab_size)
    if max_length is not None and sequence_length > max_length:
        raise ValueError(
            f"sequence_length must be at most the model's max_position_embeddings, {max_length}, got "
            f"{sequence_length}; lower sequence_length"
        )
    if isinstance(dataset, str) and dataset == BUILTIN:
        known = tokenizer if has_vocabulary(tokenizer) else None
        rows = write_text(model, known, num_samples, sequence_length, seed, vocab_size)
        return _package(rows, f'dataset "{BUILTIN}" (text that the model wrote itself)', request)
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


# --- what a tokenizer puts around text --------------------------------------------------------------------


def has_vocabulary(tokenizer: Any) -> bool:
    """False for None, and for the special tokens that transformers returns for a model without tokenizer."""
    return tokenizer is not None and len(tokenizer) > len(set(tokenizer.all_special_ids))


def describe_missing(tokenizer: Any) -> str:
    """For the error about a tokenizer that is None or has no vocabulary."""
    if tokenizer is None:
        return "tokenizer=None"
    return f"one of {len(tokenizer)} special tokens only (is the model without tokenizer files?)"


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
    check_ids(rows, request.vocab_size)
    digest = hashlib.sha256(repr(list(rows.shape)).encode())
    digest.update(rows.contiguous().numpy().astype("<i8").tobytes())
    description = f"{source}: {rows.shape[0]} sequences of {rows.shape[1]} tokens, seed {request.seed}"
    return CalibrationData(list(rows.split(request.batch_size)), digest.hexdigest(), description)
