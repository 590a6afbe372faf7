"""README.md of a checkpoint: what it says, what of an older one survives, and what is never in it."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from huggingface_hub.errors import LocalEntryNotFoundError
from model_zoo import save_with_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import create_and_tag_model_card

from hf_fp4 import MRGPTQConfig, cli

ROOT = Path(__file__).parents[1]
TEXT = "The cat sat on the mat and looked at the moon. "
CARD_OF_BASE = """---
license: other
license_name: tiny-license
license_link: https://example.com/license
language:
- en
base_model: someone/tiny
---
# The original
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A tiny model whose card names a license, in a directory whose name is nobody's business."""
    directory = tmp_path_factory.mktemp("secret-project") / "original"
    save_with_tokenizer(directory)
    (directory / "README.md").write_text(CARD_OF_BASE)
    return directory


@pytest.fixture(scope="module")
def model(original, tmp_path_factory) -> PreTrainedModel:
    text = tmp_path_factory.mktemp("secret-data") / "text.txt"
    text.write_text(TEXT * 100)
    config = MRGPTQConfig(dataset=str(text), num_samples=4, sequence_length=32, damp_percent=0.05)
    return AutoModelForCausalLM.from_pretrained(original, quantization_config=config)


def rtn(source: Path, auto_class: type = AutoModelForCausalLM, **fields) -> PreTrainedModel:
    return auto_class.from_pretrained(source, quantization_config=MRGPTQConfig(method="rtn", **fields))


def read(directory: Path) -> tuple[dict, str]:
    """Metadata and text of the card in a directory."""
    content = (directory / "README.md").read_text(encoding="utf-8")
    _, metadata, text = content.split("---\n", 2)
    return yaml.safe_load(metadata), text


def row(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


# --- what it says


def test_a_calibrated_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    metadata, text = read(tmp_path)
    assert metadata == {
        "base_model": "someone/tiny",
        "license": "other",
        "license_name": "tiny-license",
        "license_link": "https://example.com/license",
        "language": ["en"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf-fp4", "fp4", "nvfp4", "w4a4", "mr-gptq"],
    }
    assert "damp_percent=0.05" in row(text, "recipe") and "error_correction" not in row(text, "recipe")
    assert "4 sequences of 32 tokens" in row(text, "calibration data")
    assert model.config.quantization_config.calibration["fingerprint"][:12] in row(text, "calibration data")
    assert row(text, "quantized").startswith("| quantized | 14 linear layers")
    assert "lm_head" in row(text, "not quantized")
    assert re.search(r"0\.1 MB; unquantized 0\.3 MB in bfloat16", row(text, "size of the weights"))
    assert "Not evaluated" in text and "`input_global_scale`" in text
    whole = (tmp_path / "README.md").read_text()
    assert "secret" not in whole and str(Path.home()) not in whole, "no paths"


def test_a_model_of_the_hub_is_the_base(original, tmp_path):
    quantized = rtn(original, format="mxfp4", activations="bf16", hadamard_group_size=None)
    for name in ("org/tiny", str(tmp_path / "hub" / "models--org--tiny" / "snapshots" / "0123abc")):
        quantized.hf_quantizer.loaded_from = name
        quantized.save_pretrained(tmp_path)
        metadata, text = read(tmp_path)
        assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/tiny", "quantized")
        assert metadata["tags"] == ["hf-fp4", "fp4", "mxfp4", "w4a16", "rtn"]
        assert "# tiny-MXFP4" in text and "https://huggingface.co/org/tiny" in text
    assert "hf-fp4 export path/to/this/model exported" in text and "No calibration data" in text
    assert "`weight_global_scale`" not in text and "`input_global_scale`" not in text


def test_what_vllm_can_do_with_it(original, model, tmp_path):
    model.save_pretrained(tmp_path)
    _, text = read(tmp_path)
    rotated = sum(size is not None for size in model.config.quantization_config.modules.values())
    assert rotated and f"{rotated} layers of this" in " ".join(text.split())
    rtn(original).save_pretrained(tmp_path)
    assert "hf-fp4 export --activations bf16 path/to/this/model exported" in read(tmp_path)[1]


def test_the_code_in_it_runs(model, original, tmp_path, monkeypatch, capsys):
    place = tmp_path / "path" / "to" / "this" / "model"
    model.save_pretrained(place)
    save_with_tokenizer(tmp_path / "again")
    for file in (tmp_path / "again").glob("tokenizer*"):
        file.rename(place / file.name)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", read(place)[1], re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  # running the card is the point
    assert "The capital of France is" in capsys.readouterr().out


def test_other_kinds_of_models(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    rtn(tmp_path / "bert", AutoModelForMaskedLM).save_pretrained(tmp_path / "out")
    metadata, text = read(tmp_path / "out")
    assert "pipeline_tag" not in metadata and "AutoModelForMaskedLM.from_pretrained" in text
    assert "generate(" not in text and "`bias`" in text and "from a local directory" in text


def test_a_dequantized_model_has_none(original, tmp_path):
    plain = rtn(original).dequantize()
    plain.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


# --- what survives

OWN_TEXT = "# My model\n\nIt tells jokes. | <b>\n"


def test_an_existing_card_keeps_its_text_and_metadata(model, original, tmp_path):
    own = {
        "title": "Jokes",
        "tags": ["jokes", "mxfp4"],
        "license": "mit",
        "pipeline_tag": "text2text-generation",
        "model-index": [
            {
                "name": "x",
                "results": [{"task": {"type": "t"}, "dataset": {"name": n, "type": "d"}, "metrics": []}],
            }
            for n in ("first", "second")
        ],
    }
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(own)}---\n{OWN_TEXT}")
    model.save_pretrained(tmp_path)
    metadata, text = read(tmp_path)
    assert text.startswith(OWN_TEXT) and text.count("hf-fp4: begin") == 1
    assert metadata["title"] == "Jokes" and metadata["model-index"] == own["model-index"]
    assert metadata["tags"] == ["jokes", "hf-fp4", "fp4", "nvfp4", "w4a4", "mr-gptq"]
    assert metadata["license"] == "other", "the license of the original model"
    assert metadata["pipeline_tag"] == "text2text-generation"

    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\n## Jokes\n")
    rtn(original).save_pretrained(tmp_path)
    metadata, text = read(tmp_path)
    assert text.startswith(OWN_TEXT) and text.endswith("<!-- hf-fp4: end -->\n\n## Jokes\n")
    assert "rounding to nearest" in text and "MR-GPTQ" not in text and metadata["tags"][-1] == "rtn"


def test_line_endings_survive(model, tmp_path):
    (tmp_path / "README.md").write_bytes(b"---\r\ntitle: x\r\n---\r\n# Mine\r\n")
    model.save_pretrained(tmp_path)
    content = (tmp_path / "README.md").read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 50 and b"# Mine\r\n" in content


@pytest.mark.parametrize(
    "content", [b"---\n- a\n- b\n---\n", b"---\na: [\n---\n", b"\xff\xfe"], ids=["list", "yaml", "utf8"]
)
def test_a_card_that_cannot_be_read_is_left_alone(content, model, tmp_path, caplog):
    (tmp_path / "README.md").write_bytes(content)
    logging.enable_propagation()
    try:
        model.save_pretrained(tmp_path)
    finally:
        logging.disable_propagation()
    assert (tmp_path / "README.md").read_bytes() == content
    assert (tmp_path / "model.safetensors").exists() and "the model card stays as it is" in caplog.text


def test_the_empty_form_of_transformers_is_no_card(model, tmp_path, monkeypatch):
    """The one that `push_to_hub` makes for a new repository; once someone fills it in, it is theirs."""

    def absent(*args, **kwargs):
        raise LocalEntryNotFoundError("no card")

    monkeypatch.setattr("transformers.utils.hub.ModelCard.load", absent)
    form = create_and_tag_model_card("me/model", ["mine"])
    form.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    metadata, text = read(tmp_path)
    assert "More Information Needed" not in text and metadata["tags"][0] == "mine"
    form.text = form.text.replace("[More Information Needed]", "Me", 1)
    form.save(tmp_path / "README.md")
    model.save_pretrained(tmp_path)
    assert "**Developed by:** Me" in read(tmp_path)[1]


# --- what was measured


@pytest.fixture
def evaluated(model, original, tmp_path):
    """A saved model with its tokenizer and a function that evaluates it into its card."""
    assert (
        cli.main(["quantize", str(original), str(tmp_path / "q"), "--method", "rtn", "--device-map", "cpu"])
        == 0
    )

    def evaluate(text: str, *flags: str) -> int:
        (tmp_path / text).write_text(TEXT * 40)
        arguments = [
            "--text",
            str(tmp_path / text),
            "--sequence-length",
            "32",
            "--device-map",
            "cpu",
            "--card",
        ]
        return cli.main(["evaluate", str(tmp_path / "q"), *arguments, *flags])

    return tmp_path / "q", evaluate


def test_evaluate_writes_into_the_card(evaluated, original, tmp_path):
    saved, evaluate = evaluated
    before = {f.name: f.read_bytes() for f in saved.iterdir() if f.name != "README.md"}
    assert evaluate("news.txt", "--reference", str(original)) == 0
    assert evaluate("a|b.txt") == 0
    assert evaluate("news.txt", "--reference", str(original), "--max-tokens", "640") == 0
    metadata, text = read(saved)
    (entry,) = metadata["model-index"]
    second, first = entry["results"]
    assert entry["name"] == "tiny-NVFP4"
    assert first["dataset"]["name"] == "news.txt" and first["dataset"]["args"]["window"] == 32
    found = {metric["type"]: metric["value"] for metric in first["metrics"]}
    assert set(found) == {"kl_divergence", "top1_agreement", "perplexity", "reference_perplexity"}
    assert 0 < found["kl_divergence"] < 1 and [m["type"] for m in second["metrics"]] == ["perplexity"]
    assert "Not evaluated" not in text and "a\\|b.txt" in text
    assert f"| {found['kl_divergence']:.4f} |" in row(text, "news.txt")
    assert {f.name: f.read_bytes() for f in saved.iterdir() if f.name != "README.md"} == before

    again = AutoModelForCausalLM.from_pretrained(saved)
    again.save_pretrained(tmp_path / "copy")
    assert read(tmp_path / "copy") == (metadata, text), "what was measured belongs to these weights"
    rtn(original, format="mxfp4").save_pretrained(saved)
    metadata, text = read(saved)
    assert "model-index" not in metadata and "Not evaluated" in text, "and to no others"


def test_evaluate_refuses_what_it_cannot_write_to(original, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT * 40)
    flags = ["--text", str(tmp_path / "text.txt"), "--device-map", "cpu", "--card"]
    for name in ("org/model", str(original)):
        assert cli.main(["evaluate", name, *flags]) == 2
        assert "--card writes into MODEL, a directory that hf-fp4 saved, got" in capsys.readouterr().err


# --- the template in an installed package

BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
RENDER = """
import sys
sys.path.insert(0, sys.argv[1])
import hf_fp4.model_card
template = hf_fp4.model_card._template()
assert str(template).startswith(sys.argv[1]), template
assert "hf-fp4 export" in template.read_text(encoding="utf-8")
"""


@pytest.mark.slow
def test_a_wheel_has_every_file_and_the_template(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    for file in (*ROOT.glob("hf_fp4/**/*.py"), *ROOT.glob("model_cards/*.md")):
        copy = project / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    subprocess.run([sys.executable, "-c", BUILD, str(tmp_path)], cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        archive.extractall(tmp_path / "installed")
    expected = [str(file.relative_to(ROOT)) for file in ROOT.glob("hf_fp4/**/*.py")]
    assert sorted(names) == sorted([*expected, "hf_fp4/model_cards/template.md"])
    run = [sys.executable, "-I", "-c", RENDER, str(tmp_path / "installed")]
    result = subprocess.run(run, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
