"""examples/accuracy.py on a tiny model, and the text clean-up of examples/texts.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from model_zoo import save_with_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["example"])


def test_the_table(examples, tmp_path, monkeypatch, capsys):
    import accuracy

    save_with_tokenizer(tmp_path / "model", max_position_embeddings=512)
    for name in ("calibration", "one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"The {name} cat sat on the mat and looked at the moon. " * 60)
    arguments = [
        str(tmp_path / "model"),
        "--calibration",
        str(tmp_path / "calibration.txt"),
        "--activations",
        "fp4",
    ]
    arguments += [
        "--text",
        str(tmp_path / "one.txt"),
        str(tmp_path / "two.txt"),
        "--out",
        str(tmp_path / "out"),
    ]
    arguments += ["--num-samples", "4", "--sequence-length", "32", "--max-tokens", "1024", "--device", "cpu"]
    accuracy.main([*arguments, "--seeds", "0", "--recipes", "rtn", "paper"])
    accuracy.main([*arguments, "--seeds", "0", "1", "--recipes", "rtn", "paper"])

    results = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    keys = [(run["format"], run["recipe"], run["seed"]) for run in results]
    assert sorted(keys) == sorted(
        [(f, *rest) for f in ("nvfp4", "mxfp4") for rest in (("rtn", 0), ("paper", 0), ("paper", 1))]
    )
    divergences = [scores["kl_divergence"] for run in results for scores in run["texts"].values()]
    assert len(divergences) == 12 and min(divergences) > 0
    table = (tmp_path / "out" / "accuracy.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith(("| nvfp4", "| mxfp4"))]
    assert [row.split(" | ")[:3] for row in rows] == [
        ["| nvfp4", "W4A4", "rtn"],
        ["| nvfp4", "W4A4", "paper"],
        ["| mxfp4", "W4A4", "rtn"],
        ["| mxfp4", "W4A4", "paper"],
    ]
    assert "±" not in rows[0] and "±" in rows[1]
    first, second = (
        run["texts"]["one"]["kl_divergence"]
        for run in results
        if run["format"] == "nvfp4" and run["recipe"] == "paper"
    )
    assert f"{(first + second) / 2:.4f}" in rows[1]
    assert (tmp_path / "out" / "accuracy.png").exists() or "pip install matplotlib" in capsys.readouterr().out


def test_the_text_is_taken_from_all_over(examples):
    import accuracy

    text = "".join(chr(97 + i // 1000) * 1 for i in range(26_000))
    taken = accuracy.spread(text, 2600, places=26)
    assert set(taken) >= set(text) and len(taken) < 2700
    assert accuracy.spread("short", 100) == "short"


def test_wiki_markup_becomes_text(examples):
    import texts

    source = (
        "{{Infobox|a={{b}}}}'''Albedo''' is a [[ratio|measure]] of [[light]].<ref name=x>Book</ref>\n"
        "== History ==\n* first [http://example.org a page]\n[[File:x.jpg|thumb|A [[link]] here]]{| table |}\n"
    )
    assert texts.strip_markup(source) == "Albedo is a measure of light.\n History \nfirst a page"
    dump = f"<text bytes='1'>{'word ' * 500}</text><text>#REDIRECT [[x]]</text><text>stub</text>"
    assert texts.encyclopedia_articles(dump) == [("word " * 500).strip()]
