"""Finished blocks on disk, so that a killed run resumes. A block is either there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config import MRGPTQConfig
from ..version import __version__

MANIFEST = "manifest.json"

_SUMMED_AT_ONCE = 1 << 20
"""On a CPU torch makes 8 bytes of each value before it adds them up."""


class WorkDir:
    """A directory of finished blocks that belongs to one model, config, set of calibration tokens and version of this package.

    Args:
        path: created when missing.
        identity: what the blocks depend on, JSON values by name.

    Raises:
        ValueError: the directory holds blocks of something else; the message says which part differs.
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, object]):
        identity = {**identity, "version of hf_fp4": __version__}
        self._path = Path(path)
        self._path.mkdir(parents=True, exist_ok=True)
        manifest = self._path / MANIFEST
        if manifest.exists():
            found = _read_manifest(manifest)
            differing = sorted(k for k in found.keys() | identity.keys() if found.get(k) != identity.get(k))
            if differing:
                raise ValueError(
                    f"work_dir {self._path} belongs to another run: {', '.join(differing)} differ; "
                    "give this run a directory of its own, or delete that one to start over"
                )
        else:
            _write_atomically(manifest, json.dumps(identity, indent=1).encode())

    def load(self, block: int) -> tuple[dict[str, torch.Tensor], dict] | None:
        """``(tensors, metadata)`` of a finished block, or None when it is not finished."""
        file = self._file(block)
        if not file.exists():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                tensors = {key: opened.get_tensor(key) for key in list(opened.keys())}
                return tensors, json.loads(opened.metadata()["block"])
        except SafetensorError as error:
            raise ValueError(
                f"the finished block {file} is damaged ({error}); delete it, and it is quantized again"
            ) from error

    def save(self, block: int, tensors: dict[str, torch.Tensor], metadata: dict) -> None:
        """Write a finished block; it appears under its name only when all of it is on disk."""
        partial = self._file(block).with_suffix(".partial")
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()}, partial, {"block": json.dumps(metadata)}
        )
        _publish(partial, self._file(block))

    def _file(self, block: int) -> Path:
        return self._path / f"block-{block:05d}.safetensors"


def recipe(config: MRGPTQConfig) -> dict[str, object]:
    """What of a config decides about the bytes of a block, beside the data, as JSON values."""
    fields = {k: v for k, v in config.to_dict().items() if k not in ("dataset", "modules", "calibration")}
    return {**fields, "batch_size": config.batch_size}  # sums are rounded in its order


def weights_fingerprint(named_parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    """A digest of names, shapes, dtypes and of every byte's sum, read once at memory speed."""
    digest = hashlib.sha256()
    for name, parameter in named_parameters:
        flat = parameter.detach().contiguous().view(-1)
        as_integers = flat.view(
            {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        )
        total = torch.stack([part.sum() for part in as_integers.split(_SUMMED_AT_ONCE)]).sum().item()
        position = as_integers[:: max(1, len(as_integers) // 64)][:64].tolist()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total} {position}".encode())
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, object]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}); delete the directory, and give the run a new one"
        ) from error


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    _publish(partial, path)


def _publish(partial: Path, path: Path) -> None:
    """Give a finished file its name, once its content is on the disk and not only in the system's cache."""
    with open(partial, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(partial, path)
