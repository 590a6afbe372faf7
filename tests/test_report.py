"""What a run did to every layer, on paper: table, JSON, plot."""

import importlib.util
import json

import pytest

from hf_fp4 import cli, report
from hf_fp4.calibration.driver import LayerReport

pytestmark = pytest.mark.once

ROWS = [
    LayerReport(f"model.layers.{block}.mlp.{name}", size, rounded, error, 0.5)
    for block, rounded, error in ((0, 0.02, 0.01), (1, 0.04, 0.03))
    for name, size in (("up_proj", 32), ("down_proj", None))
]
UNMEASURED = [LayerReport("model.layers.0.mlp.up_proj", None, None, None, 0.0)]
SKIPPED = {"lm_head": "output embeddings are never converted"}


def test_the_table_of_kinds():
    lines = report.describe(ROWS, SKIPPED, every_layer=False).splitlines()
    assert lines[1].split() == ["module", "layers", "Hadamard", "rounded", "error", "worst"]
    assert lines[2].split() == ["model.layers.*.mlp.up_proj", "2", "32", "3.00%", "2.00%", "3.00%", "in", "1"]
    assert lines[3].split()[2] == "none"
    assert "lm_head" in lines[-1]


def test_the_table_of_layers():
    lines = report.describe(ROWS, {}, every_layer=True).splitlines()
    assert lines[4].split() == ["model.layers.1.mlp.up_proj", "32", "4.00%", "3.00%"]


def test_without_data_there_are_no_errors():
    text = report.describe(UNMEASURED, {}, every_layer=False)
    assert "error" not in text and "%" not in text


def test_json_holds_everything_and_a_plot_goes_with_it(tmp_path):
    files = report.write(tmp_path / "run.json", ROWS, SKIPPED)
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["layers"][2] == {
        "name": "model.layers.1.mlp.up_proj",
        "hadamard_size": 32,
        "rounded_error": 0.04,
        "error": 0.03,
        "seconds": 0.5,
        "tokens": None,
        "own_share": None,
    }
    assert len(content["layers"]) == 4 and content["skipped"] == SKIPPED
    plotted = importlib.util.find_spec("matplotlib") is not None
    assert [file.name for file in files] == ["run.json", "run.png"][: 1 + plotted]
    assert all(file.stat().st_size > 100 for file in files)


def test_no_plot_without_errors(tmp_path):
    assert report.write(tmp_path / "run.json", UNMEASURED, {}) == [tmp_path / "run.json"]


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    def missing(rows, file):
        raise ImportError

    monkeypatch.setattr(report, "_plot", missing)
    assert report.write(tmp_path / "run.json", ROWS, {}) == [tmp_path / "run.json"]


@pytest.mark.parametrize("line", [["--report", "missing/run.json"]])
def test_a_report_that_cannot_be_written_is_refused_before_the_work(line, tmp_path, capsys):
    assert cli.main(["quantize", "no-such-model", str(tmp_path / "out"), *line]) == 2
    assert "--report must be in a directory that exists, got missing/run.json" in capsys.readouterr().err
