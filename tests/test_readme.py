"""Every Python and hf-fp4 block of the README runs, in order, on a tiny model that stands where the README's model would.

All but the one that pushes: it needs a Hub, and runs in test_hub_roundtrip.py.
"""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from model_zoo import save_with_tokenizer

from hf_fp4 import MRGPTQConfig
from hf_fp4.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(python|bash)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines() if "hf-fp4 " in line
]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A directory in which the README's names exist, with calibration that a tiny model can afford."""
    save_with_tokenizer(tmp_path / "Qwen" / "Qwen3-8B", max_position_embeddings=512)
    (tmp_path / "my_text.txt").write_text("The cat sat on the mat and looked at the moon. " * 200)
    monkeypatch.chdir(tmp_path)
    defaults = MRGPTQConfig.__init__.__defaults__
    small = tuple({128: 4, 2048: 32}.get(v, v) if type(v) is int else v for v in defaults)
    monkeypatch.setattr(MRGPTQConfig.__init__, "__defaults__", small)
    return tmp_path


def run_block(block: str) -> None:
    """Execute a block as a script of its own."""
    exec(compile(block, "README.md", "exec"), {})  # noqa: S102  # running the README is the point of this file


# Of PEFT 0.21 with transformers 5.23.
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_the_blocks_run(workplace, capsys):
    blocks = [block for kind, block in BLOCKS if kind == "python" and "\nmodel.push_to_hub(" not in block]
    assert len(blocks) >= 3 and len(COMMANDS) >= 2
    run_block(blocks[0])
    shutil.rmtree("Qwen3-8B-NVFP4")  # the commands say how to get the same, so they write to the same place
    for command in COMMANDS:
        assert main(shlex.split(command)[1:]) == 0
    for block in blocks[1:]:
        run_block(block)
    assert "KL divergence" in capsys.readouterr().out
    assert (workplace / "Qwen3-8B-NVFP4" / "model.safetensors").exists()


def test_links_point_to_files():
    root = Path(__file__).parents[1]
    local = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    assert local
    for target in local:
        assert (root / target).exists(), target
