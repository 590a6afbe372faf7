"""What can be checked of a built variant without a GPU: the loader's own validation, digests, and facts about the SASS."""

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest
from conftest import variant_paths

PATHS = variant_paths()


@pytest.fixture(params=["cuda", "triton"])
def variant(request):
    if request.param not in PATHS:
        pytest.skip(f"no {request.param} variant built; run make in kernel_hub")
    return PATHS[request.param]


def test_loader_takes_the_metadata(variant):
    kernels = pytest.importorskip("kernels")
    from kernels._rust import Metadata
    from kernels.validate import default_metadata_validators

    assert kernels is not None
    metadata = Metadata.read_from_file(variant / "metadata.json")
    assert metadata.name.python_name == "hf_fp4_kernels" and metadata.version == 1
    for validator in default_metadata_validators():
        validator.validate_metadata(metadata=metadata, variant=variant.name)


@pytest.mark.parametrize("torch_version, preferred", [("2.10", "triton"), ("2.11", "cuda"), ("2.13", "cuda")])
def test_loader_prefers_the_compiled_variant(torch_version, preferred):
    pytest.importorskip("kernels")
    from kernels.backends import CUDA
    from kernels.variants import _resolve_variant_for_system, parse_variant
    from packaging.version import Version

    if len(PATHS) < 2:
        pytest.skip("both variants must be built")
    variants, _ = _resolve_variant_for_system(
        [parse_variant(p.name) for p in PATHS.values()], CUDA(Version("13.0")), "x86_64", "linux",
        Version(torch_version), True, None,
    )  # fmt: skip
    assert variants[0].variant_str == PATHS[preferred].name


def test_digests_cover_every_file(variant):
    digest = json.loads((variant / "metadata.json").read_text())["digest"]["files"]
    files = {
        str(p.relative_to(variant))
        for p in variant.rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert set(digest) == files - {"metadata.json"}
    for name, value in digest.items():
        assert base64.b64encode(hashlib.sha256((variant / name).read_bytes()).digest()).decode() == value


@pytest.fixture(scope="module")
def sass():
    if "cuda" not in PATHS:
        pytest.skip("no compiled variant built; run make in kernel_hub")
    if shutil.which("cuobjdump") is None:
        pytest.skip("needs cuobjdump")
    library = next(PATHS["cuda"].glob("*.abi3.so"))
    return subprocess.run(
        ["cuobjdump", "--dump-sass", str(library)], capture_output=True, text=True, check=True
    ).stdout


def functions(sass: str) -> dict[str, str]:
    parts = re.split(r"Function : (\S+)", sass)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_tensor_core_instructions(sass):
    """Many tokens through HGMMA with tiles by bulk copies, a few through HMMA."""
    found = functions(sass)
    gemm = {name: body for name, body in found.items() if "gemm_w4_kernel" in name}
    assert gemm and all("UBLKCP" in body and "HGMMA" in body for body in gemm.values())
    assert all("HMMA" in body for name, body in found.items() if "gemv_w4_kernel" in name)


def test_gemv_streams_weights_16_bytes_at_a_time(sass):
    for name, body in functions(sass).items():
        if "gemv_w4_kernel" in name:
            assert re.search(
                r"LDG\.E\.128\.CONSTANT|LDG\.E\.NA\.(LTC128B\.)?128\.CONSTANT|LDG\.E\.NA.*128", body
            ), name
            assert not re.search(r"\b(LDL|STL)\b", body), f"{name} uses local memory"
