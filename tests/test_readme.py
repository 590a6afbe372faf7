"""Every Python and hf-fp4 block of the README runs, in order, on a tiny model that stands where the README's model would.

All but the one that pushes: it needs a Hub, and runs in test_hub_roundtrip.py.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import shlex
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
from model_zoo import save_with_tokenizer

import hf_fp4
from hf_fp4 import MRGPTQConfig
from hf_fp4.cli import _field_docs, main

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
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
    local = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    assert local
    for target in local:
        assert (ROOT / target).exists(), target


def table(section: str) -> list[list[str]]:
    """The rows of the table in a section, each a list of cells."""
    text = README.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 2 and len({len(row) for row in rows}) == 1, section
    return [[cell.strip() for cell in row] for row in rows[2:]]


def messages(source: str) -> list[str]:
    """Strings of a source file; what an f-string fills in is shown as NUL."""
    found, tree = [], ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else "\0" for part in node.values]
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def says(message: str, quoted: str) -> bool:
    """Whether a message has ``quoted`` in it, where ``...`` is anything, or begins with it when words are filled in."""
    if re.search(".*".join(map(re.escape, re.split(r"\s*\.\.\.\s*", quoted))), message):
        return True
    parts = message.split("\0")
    beginnings = [parts, *([*parts[:n], ""] for n in range(1, len(parts)))]
    return any(
        len("".join(some)) > 20 and re.fullmatch(r"\w+".join(map(re.escape, some)), quoted)
        for some in beginnings
    )


def test_says_finds_quotes():
    assert says("got \0 rotated linears: \0", "got ... rotated linears")
    assert says("runs everything on the \0 backend", "runs everything on the reference backend")
    assert says("this method is not known, got \0 - known: \0", "this method is not known, got mine")
    assert not says("got \0 rotated linears: \0", "got ... turned linears")
    assert not says("\0: \0", "anything: at all")


def test_troubleshooting_quotes_what_is_said():
    transformers = importlib.util.find_spec("transformers.quantizers.auto").origin
    files = [*(ROOT / "hf_fp4").rglob("*.py"), Path(transformers)]
    known = [message for file in files for message in messages(file.read_text(encoding="utf-8"))]
    for symptom, *_ in table("When something goes wrong"):
        quotes = re.findall(r"`([^`]+)`", symptom)
        assert quotes, f"no message in {symptom!r}"
        for quoted in quotes:
            assert any(says(message, quoted) for message in known), f"nothing says {quoted!r}"


def test_examples_are_listed():
    section = README.partition("\n## Examples\n")[2].partition("\n## ")[0]
    listed = re.findall(r"\]\((examples/\w+\.py)\)", section)
    assert sorted(listed) == sorted(f"examples/{path.name}" for path in (ROOT / "examples").glob("*.py"))
    for script, _, command in table("Examples"):
        python, path, *arguments = shlex.split(command.strip("`"))
        assert python == "python" and f"({path})" in script
        source = (ROOT / path).read_text(encoding="utf-8")
        for flag in (argument for argument in arguments if argument.startswith("--")):
            assert f'"{flag}"' in source, f"{path} has no {flag}"


def described(documented: object) -> set[str]:
    """Names in the Args of a docstring that have a text."""
    return {name for name, text in _field_docs(documented.__doc__).items() if name and text}


def test_every_config_field_is_described():
    assert described(MRGPTQConfig) == {field.name for field in fields(MRGPTQConfig) if field.init}


@pytest.mark.parametrize("name", [n for n in hf_fp4.__all__ if inspect.isfunction(getattr(hf_fp4, n))])
def test_every_argument_is_described(name):
    function = getattr(hf_fp4, name)
    assert described(function) == set(inspect.signature(function).parameters)
