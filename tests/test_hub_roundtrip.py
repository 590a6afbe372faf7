"""`push_to_hub` and back over HTTP: the real clients, in processes of their own, against `hub_server` on loopback.

One process pushes, another one loads with an empty cache; each writes what it saw into a file. The processes refuse to
connect to anything but loopback.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hub_server
import pytest
import torch
import yaml
from model_zoo import save_with_tokenizer
from safetensors.torch import load

import hf_fp4

PREAMBLE = """
import json, os, sys, time, urllib.request
from pathlib import Path

def only_loopback(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple) and arguments[1][0] != "127.0.0.1":
        raise SystemExit(f"connects to {arguments[1]}")

sys.addaudithook(only_loopback)
time.sleep = lambda seconds: None  # the clients wait before they try again

import torch
import hf_fp4
from hf_fp4 import MRGPTQConfig
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

work, seen = Path(sys.argv[1]), {}
TOKENS = torch.arange(40).view(2, 20) + 5

def faults(**what):
    request = urllib.request.Request(constants.ENDPOINT + "/_faults", json.dumps(what).encode(), method="POST")
    urllib.request.urlopen(request).read()

def error_of(function, *arguments, **keywords):
    try:
        function(*arguments, **keywords)
    except Exception as error:
        chain = []
        while error is not None:
            chain.append(f"{type(error).__name__}: {error}")
            error = error.__cause__ or error.__context__
        return "; ".join(chain)

def quantize(**fields):
    return AutoModelForCausalLM.from_pretrained("org/base", quantization_config=MRGPTQConfig(method="rtn", **fields))

@torch.no_grad()
def logits(model):
    return model(TOKENS).logits
"""

PUSH = """
model = quantize()
torch.save(logits(model), work / "logits.pt")
AutoTokenizer.from_pretrained("org/base").push_to_hub("me/model")
model.push_to_hub("me/model")
model.push_to_hub("me/carded")
model.push_to_hub("me/carded", revision="dev")
model.push_to_hub("me/private", private=True)
model.push_to_hub("me/sharded", revision="dev", max_shard_size="40KB")
model.save_pretrained(work / "saved", push_to_hub=True, repo_id="me/saved")
seen["other"] = error_of(model.push_to_hub, "you/model")

def commit():
    return HfApi().model_info("me/broken").sha

other = quantize(format="mxfp4")
torch.save(logits(other), work / "other.pt")
model.push_to_hub("me/broken")
seen["commits"] = [commit()]
faults(drop_uploads=True)
seen["dropped"] = error_of(other.push_to_hub, "me/broken")
seen["commits"].append(commit())
faults(refuse_commits=True)
seen["refused"] = error_of(other.push_to_hub, "me/broken")
seen["commits"].append(commit())
faults()
other.push_to_hub("me/broken")
seen["commits"].append(commit())
model.save_pretrained(work / "Qwen3-8B-NVFP4")
AutoTokenizer.from_pretrained("org/base").save_pretrained(work / "Qwen3-8B-NVFP4")
os.chdir(work)
exec((work / "readme.py").read_text(), {})

plain = quantize().dequantize()
plain.push_to_hub("me/plain")
"""

LOAD = """
expected, other = (torch.load(work / name) for name in ("logits.pt", "other.pt"))

def load(name, **keywords):
    return AutoModelForCausalLM.from_pretrained(name, **keywords)

def equal(model, logits_of=expected):
    return torch.equal(logits(model), logits_of)

model = load("me/model")
seen["model"] = equal(model)
seen["tokenizer"] = AutoTokenizer.from_pretrained("me/model")("abc")["input_ids"]
seen["pinned"] = equal(load("me/broken", revision=json.loads((work / "push.json").read_text())["commits"][0]))
seen["no token"] = error_of(load, "me/private")
seen["another's token"] = error_of(load, "me/private", token="hf_you")
seen["private"] = equal(load("me/private", token="hf_me"))
seen["sharded"] = equal(load("me/sharded", revision="dev"))
seen["no revision"] = error_of(load, "me/sharded", revision="absent")

# A reloaded model, pushed to another repository; its own card is only on the Hub.
model.push_to_hub("me/copy", token="hf_me")

constants.DOWNLOAD_CHUNK_SIZE = 4096  # so that a tiny file comes in pieces, as a large one does
import huggingface_hub.file_download
faults(cuts=[20000])
seen["resumed at once"] = equal(load("me/broken", cache_dir=work / "a"), other)
faults(cuts=[20000] + 100 * [0])
seen["gave up"] = error_of(load, "me/broken", cache_dir=work / "b")
faults()
seen["resumed later"] = equal(load("me/broken", cache_dir=work / "b"), other)
faults(cuts=100 * [20000], hide_cuts=True)
seen["short"] = error_of(load, "me/broken", cache_dir=work / "c")
faults()
seen["after short"] = equal(load("me/broken", cache_dir=work / "c", force_download=True), other)

from hf_fp4.backends import hub
def source(**keywords):
    return MRGPTQConfig(**keywords).kernel_source
seen["untrusted"] = hub.describe(hub._select(source(kernel_repo="me/kernels"), torch.device("cuda", 0)), source(kernel_repo="me/kernels"))
kernels = hub._load(source(kernel_repo="me/kernels", trust_kernel_repo=True), "cuda")
seen["trusted by us"] = [kernels.backend_of(0), "me--kernels" in kernels.__file__]
seen["trusted publisher"] = hub._load(source(kernel_repo="trusted/kernels", kernel_version=2), "cuda").backend_of(0)
seen["no version"] = error_of(hub._load, source(kernel_repo="trusted/kernels", kernel_version=7), "cuda")
"""

BASE_CARD = b"---\nlicense: apache-2.0\nlanguage: [en]\n---\n# Base\n"
OWN_CARDS = {
    branch: f"---\nlicense: mit\ntags: [jokes]\n---\n# Mine on {branch}\n".encode()
    for branch in ("main", "dev")
}


def kernel_package(backend: str) -> dict[str, bytes]:
    """The smallest package of kernels for a PyTorch without a GPU."""
    metadata = {
        "name": "kernels",
        "id": "_kernels_cpu",
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cpu"},
    }
    return {
        "build/torch-cpu/__init__.py": f"def backend_of(index):\n    return {backend!r}\n".encode(),
        "build/torch-cpu/metadata.json": json.dumps(metadata).encode(),
    }


def readme_block() -> str:
    """The README's block that pushes."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "\nmodel.push_to_hub(" in b)
    return block


def run_client(hub: hub_server.Hub, work: Path, name: str, code: str, token: str | None) -> dict:
    """Run a script in a process that knows this Hub only; what it saw."""
    code = f"{PREAMBLE}\n{code}\n(work / '{name}.json').write_text(json.dumps(seen))"
    environment = {
        **hub.environment(work / f"home-{name}", token),
        "PYTHONPATH": str(Path(hf_fp4.__file__).parents[1]),
    }
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(work)]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads((work / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def roundtrip(tmp_path_factory):
    """The Hub after everything was pushed and loaded, and what both processes saw."""
    work = tmp_path_factory.mktemp("roundtrip")
    (work / "blobs").mkdir()
    save_with_tokenizer(work / "base")
    (work / "readme.py").write_text(readme_block().replace('"you/', '"me/'))
    with hub_server.running(work / "blobs") as hub:
        files = {file.name: file.read_bytes() for file in (work / "base").iterdir()}
        hub.publish("models", "org/base", {**files, "README.md": BASE_CARD})
        for branch, card in OWN_CARDS.items():
            hub.publish("models", "me/carded", {"README.md": card, "notes.txt": b"mine"}, branch)
        hub.publish("kernels", "me/kernels", kernel_package("triton"), "v1")
        hub.publish("kernels", "trusted/kernels", kernel_package("cuda"), "v2")
        pushed = run_client(hub, work, "push", PUSH, token="hf_me")
        begin = len(hub.requests)
        loaded = run_client(hub, work, "load", LOAD, token=None)
        yield SimpleNamespace(hub=hub, work=work, pushed=pushed, loaded=loaded, loads=hub.requests[begin:])


def card(hub: hub_server.Hub, name: str, branch: str = "main") -> tuple[dict, str]:
    _, metadata, text = hub.files(name, branch)["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


# --- pushed


def test_a_pushed_model_is_whole(roundtrip):
    files = roundtrip.hub.files("me/model")
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert json.loads(files["config.json"])["quantization_config"]["quant_method"] == "mr_gptq"
    assert load(files["model.safetensors"])["model.layers.0.mlp.up_proj.weight"].dtype == torch.uint8
    assert not any("/" in name or name.startswith(".") for name in files)


def test_its_card_is_ours_with_the_license_of_the_base(roundtrip):
    """Although the tokenizer came first, with the form that transformers makes."""
    metadata, text = card(roundtrip.hub, "me/model")
    assert metadata["base_model"] == "org/base" and metadata["base_model_relation"] == "quantized"
    assert metadata["license"] == "apache-2.0" and metadata["language"] == ["en"]
    assert 'from_pretrained("me/model"' in text and "More Information Needed" not in text
    assert str(roundtrip.work) not in text


@pytest.mark.parametrize("branch", ["main", "dev"])
def test_a_card_that_was_there_survives(branch, roundtrip):
    metadata, text = card(roundtrip.hub, "me/carded", branch)
    assert text.startswith(f"# Mine on {branch}\n") and 'from_pretrained("me/carded"' in text
    assert metadata["tags"][0] == "jokes" and metadata["base_model"] == "org/base"
    assert metadata["license"] == "apache-2.0"
    assert roundtrip.hub.files("me/carded", branch)["notes.txt"] == b"mine"


def test_private_and_revision_and_shards(roundtrip):
    repos = roundtrip.hub.repos
    assert repos["models", "me/private"].private and not repos["models", "me/model"].private
    assert not roundtrip.hub.files("me/sharded")
    sharded = roundtrip.hub.files("me/sharded", "dev")
    index = json.loads(sharded["model.safetensors.index.json"])
    assert len(set(index["weight_map"].values())) > 1 and set(index["weight_map"].values()) <= sharded.keys()


def test_saved_and_pushed_at_once(roundtrip):
    files, saved = roundtrip.hub.files("me/saved"), roundtrip.work / "saved"
    assert {file.name for file in saved.iterdir()} == files.keys()
    assert files["model.safetensors"] == (saved / "model.safetensors").read_bytes()
    assert 'from_pretrained("me/saved"' in card(roundtrip.hub, "me/saved")[1]
    assert "base_model: org/base" in (saved / "README.md").read_text()


def test_the_readme_pushes_a_private_model(roundtrip):
    files = roundtrip.hub.files("me/Qwen3-8B-NVFP4")
    assert files["model.safetensors"] == roundtrip.hub.files("me/model")["model.safetensors"]
    assert "tokenizer.json" in files and roundtrip.hub.repos["models", "me/Qwen3-8B-NVFP4"].private
    assert card(roundtrip.hub, "me/Qwen3-8B-NVFP4")[0]["base_model"] == "org/base", (
        "as the card of the directory says"
    )


def test_a_dequantized_model_brings_no_card_of_ours(roundtrip):
    metadata, text = card(roundtrip.hub, "me/plain")
    assert "hf-fp4" not in text and "base_model" not in metadata
    assert "quantization_config" not in json.loads(roundtrip.hub.files("me/plain")["config.json"])


def test_a_push_that_fails_changes_nothing(roundtrip):
    seen = roundtrip.pushed
    assert "403" in seen["other"] and ("models", "you/model") not in roundtrip.hub.repos
    assert "Error while uploading 'model.safetensors' to the Hub" in seen["dropped"]
    assert "403" in seen["refused"] and "takes no commits now" in seen["refused"]
    first, *failed, last = seen["commits"]
    assert failed == [first, first] and last != first
    assert roundtrip.hub.files("me/broken") != roundtrip.hub.files("me/model")


# --- loaded


def test_the_loaded_model_is_the_pushed_one(roundtrip):
    for name in ("model", "pinned", "private", "sharded"):
        assert roundtrip.loaded[name] is True, name
    assert roundtrip.loaded["tokenizer"]


def test_a_private_repository_needs_its_owners_token(roundtrip):
    for name in ("no token", "another's token"):
        assert (
            "OSError: me/private is not a local folder and is not a valid model identifier"
            in roundtrip.loaded[name]
        )
    assert "absent is not a valid git identifier" in roundtrip.loaded["no revision"]


def test_a_download_that_was_cut_goes_on_where_it_ended(roundtrip):
    assert roundtrip.loaded["resumed at once"] is True and roundtrip.loaded["resumed later"] is True
    ranges = [range for _, path, range in roundtrip.loads if path.endswith("model.safetensors") and range]
    assert len(ranges) >= 2 and all(
        0 < int(range.removeprefix("bytes=").strip("-")) <= 20000 for range in ranges
    )
    assert "peer closed connection" in roundtrip.loaded["gave up"]


def test_a_short_file_is_refused(roundtrip):
    assert "Consistency check failed" in roundtrip.loaded["short"]
    assert roundtrip.loaded["after short"] is True


def test_a_copy_of_a_repository_keeps_what_its_card_says(roundtrip):
    metadata, text = card(roundtrip.hub, "me/copy")
    original, _ = card(roundtrip.hub, "me/model")
    assert metadata == original and 'from_pretrained("me/copy"' in text
    assert (
        roundtrip.hub.files("me/copy")["model.safetensors"]
        == roundtrip.hub.files("me/model")["model.safetensors"]
    )


# --- kernels


def test_kernels_come_from_the_repository_that_is_trusted(roundtrip):
    seen = roundtrip.loaded
    assert "FP4 linears run on the reference backend, kernels of me/kernels (version 1)" in seen["untrusted"]
    assert "'me/kernels' is not from a trusted publisher" in seen["untrusted"]
    assert seen["trusted by us"] == ["triton", True]
    assert seen["trusted publisher"] == "cuda"
    assert "Version 7 not found, available versions: 2" in seen["no version"]


def test_the_clients_ask_for_nothing_that_this_hub_does_not_know(roundtrip):
    assert not [path for path in roundtrip.hub.unknown if path != "/api/agent-harnesses"]
