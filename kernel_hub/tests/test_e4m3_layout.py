"""Without a GPU: weights as expanded for wgmma's operand A and tokens as laid out for operand B agree on the order of k."""

import re
import subprocess
from pathlib import Path

import pytest
from build_tool import build_tool

SOURCES = Path(__file__).resolve().parent.parent / "fp4_cuda"


def test_a_and_b_agree_on_k(tmp_path):
    tool = build_tool()
    nvcc = tool.find_nvcc()
    if nvcc is None:
        pytest.skip("needs nvcc, for CUDA's headers")
    # The one instruction on the way that C++ does not have. Selectors without bit 3 mean the same to __byte_perm.
    text = (SOURCES / "expand_fp4.cuh").read_text()
    instruction = (
        r'asm\("prmt\.b32 %0, %1, %2, %3;" : "=r"\(r\) : "r"\(table\.x\), "r"\(table\.y\), "r"\(select\)\);'
    )
    text, found = re.subn(
        instruction, "if (select & 0x8888) abort();\n  r = __byte_perm(table.x, table.y, select);", text
    )
    assert found == 1
    (tmp_path / "expand_fp4.cuh").write_text(text)
    program = tmp_path / "e4m3_layout"
    source = Path(__file__).with_name("e4m3_layout.cpp")
    subprocess.run(
        [nvcc, "-std=c++17", "-O1", "-I", tmp_path, "-I", SOURCES, "-o", program, source],
        check=True,
        capture_output=True,
    )
    result = subprocess.run([program], check=True, capture_output=True, text=True)
    assert result.stdout.split() == ["0"] * 4
