"""Every Triton kernel compiles for every generation of GPUs that the package names; nothing is run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

SHARED_MEMORY = 99 * 1024  # the least that a block may have on one of them


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_compiles(arch, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, Path(__file__).with_name("triton_compile.py"), str(arch)],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shared = json.loads(result.stdout)
    assert len(shared) == 36
    assert max(shared.values()) <= SHARED_MEMORY
