"""Checkpoint directories: reading the tensors of one without loading it, and writing one so that nothing is half written."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

logger = logging.get_logger(__name__)

_MODEL_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")
"""Files that a model is loaded from; adapters, and weights saved as a variant, have other names."""

_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COPIED = (".json", ".jinja", ".model", ".py", ".tiktoken", ".txt", ".vocab", ".bpe")
"""Endings of the files beside the weights that belong to the model: tokenizer, templates, generation, its own code."""

_COPIED_NAMES = re.compile(r"(LICENSE|NOTICE|USE_POLICY)(\..*)?")
_COPIED_FOLDERS = ("additional_chat_templates", "chat_templates")
_BROKEN = "the checkpoint is damaged or incomplete: download it again"
_MIXED_UP = "files of two checkpoints are mixed up: download or save it again"


# --- writing


@contextmanager
def staged(directory: str | os.PathLike) -> Iterator[Path]:
    """A new directory inside ``directory`` whose files take their places there when the block ends without an error.

    When anything fails, a full disk for one, the files that were there before are untouched, and a directory that did not
    exist is gone again.
    """
    target = Path(directory)
    if target.is_file():
        raise ValueError(f"{target} is a file; save into a directory")
    existed = target.exists()
    try:
        with _directory_inside(target) as staging:
            yield Path(staging)
            with _locked(target):
                _publish(Path(staging), target)
    finally:
        if not existed:
            with suppress(OSError):  # it is not empty
                target.rmdir()


def _directory_inside(target: Path) -> tempfile.TemporaryDirectory:
    while True:
        target.mkdir(parents=True, exist_ok=True)
        # Another process may take the empty directory away: of those that save together only one has files to save.
        with suppress(FileNotFoundError):
            return tempfile.TemporaryDirectory(dir=target, prefix=".saving-")


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Wait until no other process publishes there: each moves file by file, and two at once would mix their shards."""
    if os.name != "posix":  # a directory cannot be opened
        yield
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning(
                f"{directory} cannot be locked ({error}); let no other process save there at the same time"
            )
        yield
    finally:
        os.close(descriptor)


def _publish(staging: Path, target: Path) -> None:
    """Move finished files into ``target``, weights first and config.json last; drop the weights of an earlier save.

    While weights are moved there is no config.json: who loads then is refused, rather than given a mix of two models.
    """
    files = sorted(
        staging.iterdir(), key=lambda f: (f.name == "config.json", f.suffix != ".safetensors", f.name)
    )
    names = {file.name for file in files}
    has_weights = any(_MODEL_WEIGHTS.fullmatch(name) for name in names)
    if has_weights and "config.json" in names:
        (target / "config.json").unlink(missing_ok=True)
    for file in files:
        if file.name == "config.json" and has_weights:
            for old in target.iterdir():
                if _MODEL_WEIGHTS.fullmatch(old.name) and old.name not in names:
                    old.unlink()
        if file.is_dir():
            shutil.copytree(file, target / file.name, dirs_exist_ok=True)
        else:
            os.replace(file, target / file.name)


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write JSON as `save_pretrained` does."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# --- reading


def _open(file: Path) -> Any:
    if not file.is_file():
        raise ValueError(f"{file} is not there; {_BROKEN}")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}); {_BROKEN}") from error


def stored_names(files: Iterable[str | os.PathLike]) -> list[tuple[str, Path]]:
    """Name and file of every tensor; only headers are read.

    Raises ValueError: a file is missing, truncated or not safetensors.
    """
    return [(name, Path(file)) for file in files for name in _open(Path(file)).keys()]  # noqa: SIM118


def _places(stored: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """The file of every tensor; ValueError when a tensor is in two."""
    where: dict[str, Path] = {}
    for name, file in stored:
        if name in where:
            raise ValueError(f"{name} is in {where[name]} and in {file.name}; {_MIXED_UP}")
        where[name] = file
    return where


def check_shards(stored: Iterable[tuple[str, Path]]) -> None:
    """Refuse the files of one checkpoint if a tensor is in two of them, or if their index says otherwise than they do."""
    where = _places(stored)
    found = {name: file.name for name, file in where.items()}
    for directory in {file.parent for file in where.values()}:
        for index in directory.glob("*.safetensors.index*.json"):
            listed = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
            if set(listed.values()) != set(found.values()):
                continue  # of a variant that is not loaded
            wrong = sorted(n for n in listed.keys() | found.keys() if listed.get(n) != found.get(n))
            if wrong:
                name = wrong[0]
                raise ValueError(
                    f"{index} says that {name} (and {len(wrong) - 1} more) is in {listed.get(name, 'no file')}, it is in "
                    f"{found.get(name, 'no file')}; {_MIXED_UP}"
                )


@dataclass(frozen=True)
class Stored:
    """Where a tensor is and what it looks like; ``dtype`` as safetensors names it ("U8", "BF16", ...)."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class Checkpoint:
    """A directory with config.json and safetensors weights. Headers are read at once, tensors when they are asked for.

    Raises ValueError: no config.json, no safetensors, or an index that does not fit them.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.config: dict[str, Any] = self.json("config.json")
        if not self.config:
            raise ValueError(f"expected a checkpoint, got {directory} which has no config.json")
        self._files: dict[str, Any] = {}
        headers = [pair for file in self.weight_files for pair in self._header(file)]
        _places((name, directory / stored.file) for name, stored in headers)
        self.tensors: dict[str, Stored] = dict(headers)
        absent = sorted(self._index.get("weight_map", {}).keys() - self.tensors.keys())
        if absent:
            raise ValueError(
                f"{_INDEX} of {directory} lists {absent[0]} (and {len(absent) - 1} more) that no file has; {_BROKEN}"
            )

    @classmethod
    def open(cls, directory_or_hub_id: str | os.PathLike, revision: str | None = None) -> Checkpoint:
        """The checkpoint in a local directory, or in a repository on the Hub, which is downloaded to its cache."""
        if Path(directory_or_hub_id).is_dir():
            return cls(Path(directory_or_hub_id))
        wanted = [f"*{ending}" for ending in (".safetensors", *_COPIED)]
        wanted += ["LICENSE*", "NOTICE*", "USE_POLICY*"]
        try:
            return cls(
                Path(snapshot_download(str(directory_or_hub_id), revision=revision, allow_patterns=wanted))
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"expected a directory or a repository on the Hub, got {str(directory_or_hub_id)!r}: {error}"
            ) from error

    def json(self, name: str) -> dict[str, Any]:
        """A JSON file of the directory; empty when there is none."""
        file = self.directory / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    @cached_property
    def _index(self) -> dict[str, Any]:
        return self.json(_INDEX)

    @cached_property
    def weight_files(self) -> list[str]:
        """Names of the weight files, sorted."""
        names = sorted(set(self._index.get("weight_map", {}).values())) or ["model.safetensors"]
        absent = [n for n in names if Path(n).name != n or not (self.directory / n).is_file()]
        if not absent:
            return names
        if self._index:
            raise ValueError(f"{_INDEX} of {self.directory} names {absent[0]}, which is not there; {_BROKEN}")
        pickles = sorted(f.name for f in self.directory.iterdir() if f.suffix in _PICKLES)
        if pickles:
            raise ValueError(
                f"hf-fp4 reads safetensors only, got {pickles[0]}, which can run code when it is read; load the model once "
                "with the tool that wrote it and save it as safetensors"
            )
        raise ValueError(
            f"expected model.safetensors or {_INDEX} in {self.directory}, got neither; {_BROKEN}"
        )

    def _header(self, file: str) -> Iterator[tuple[str, Stored]]:
        opened = self._files[file] = _open(self.directory / file)
        for name in list(opened.keys()):  # it is no dictionary
            part = opened.get_slice(name)
            yield name, Stored(file, part.get_dtype(), tuple(part.get_shape()))

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor."""
        return self._files[self.tensors[name].file].get_tensor(name)

    # --- a copy with other tensors and another config

    def rewrite(
        self,
        staging: Path,
        convert: Callable[[str], dict[str, torch.Tensor]],
        config: dict[str, Any],
        without: tuple[str, ...],
        progress: str,
    ) -> None:
        """Write the checkpoint anew into ``staging``, one weight file at a time, and copy what belongs to the model.

        Args:
            staging: an empty directory.
            convert: name of a tensor -> what is written for it, by name. Names come sorted, so those of a module together.
            config: the new config.json.
            without: names of files that are not copied.
            progress: title of the progress bar.
        """
        weight_map: dict[str, str] = {}
        total = 0
        count = len(self.weight_files)
        with logging.tqdm(total=len(self.tensors), desc=progress, unit="tensor") as bar:
            for number, file in enumerate(self.weight_files, 1):
                new = f"model-{number:05d}-of-{count:05d}.safetensors" if self._index else "model.safetensors"
                tensors: dict[str, torch.Tensor] = {}
                for name in sorted(name for name, stored in self.tensors.items() if stored.file == file):
                    tensors.update(convert(name))
                    bar.update()
                save_file(tensors, staging / new, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(tensors, new))
                total += sum(tensor.nbytes for tensor in tensors.values())
        if self._index:
            metadata = {**self._index.get("metadata", {}), "total_size": total}
            write_json(staging / _INDEX, {"metadata": metadata, "weight_map": weight_map})
        self._copy_others(staging, without)
        write_json(staging / "config.json", config)

    def _copy_others(self, staging: Path, without: tuple[str, ...]) -> None:
        left_out = ("config.json", "adapter_config.json", *without)  # adapters' weights are not copied either
        for file in self.directory.iterdir():
            if file.is_dir() and file.name in _COPIED_FOLDERS:
                shutil.copytree(file, staging / file.name)
            belongs = file.suffix in _COPIED or _COPIED_NAMES.fullmatch(file.name)
            index = file.name.endswith(".index.json")
            if file.is_file() and belongs and not index and file.name not in left_out:
                shutil.copyfile(file, staging / file.name)
