"""tools/build.py as a module."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parent.parent / "tools" / "build.py"


@functools.cache
def build_tool() -> ModuleType:
    if sys.version_info < (3, 11):
        pytest.skip("tools/build.py needs Python 3.11")
    spec = importlib.util.spec_from_file_location("hf_fp4_build_tool", PATH)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
