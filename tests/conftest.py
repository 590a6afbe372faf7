"""What holds for every test: uninitialised memory is poisoned, seeds are fixed, nothing reaches the network."""

from __future__ import annotations

import functools
import os
import random
import sys
from pathlib import Path

# Before torch and huggingface_hub are imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile(
    "hf_fp4", deadline=None, derandomize=True, max_examples=100, database=None
)
hypothesis.settings.load_profile("hf_fp4")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and torch.cuda.is_available() is False")


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory():
    """`torch.empty`, `torch.empty_like` and `Tensor.new_empty` give NaN (0xFF bytes) to code of hf_fp4."""
    with torch.device("meta"):
        torch.empty(
            0
        )  # torch.device contexts remember, at first use, which functions they redirect: the real ones
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoned(torch.empty))
        patch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a byte-level tokenizer, saved as a user would have it."""
    from model_zoo import save_with_tokenizer

    directory = tmp_path_factory.mktemp("original")
    save_with_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def rtn(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `hf-fp4 quantize --method rtn` makes of it."""
    from hf_fp4 import cli

    out = tmp_path_factory.mktemp("rtn") / "out"
    assert cli.main(["quantize", str(original), str(out), "--method", "rtn", "--device-map", "cpu"]) == 0
    return out


def _poisoned(allocate):
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] == "hf_fp4" and tensor.dtype != torch.bool:
            with torch.no_grad():
                tensor.fill_(
                    float("nan") if tensor.is_floating_point() else 255 if tensor.dtype == torch.uint8 else -1
                )
        return tensor

    return wrapper
