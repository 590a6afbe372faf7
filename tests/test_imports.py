"""The package reads from top to bottom, each file imports only from those above it; and all of it is documented."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_fp4

pytestmark = pytest.mark.once

ROOT = Path(hf_fp4.__file__).parent

ORDER = (
    "version",
    "formats",
    "rotation",
    "scales",
    "ops",
    "backends",
    "hessian",
    "gptq",
    "layers",
    "config",
    "calibration",
    "checkpoint_files",
    "other_layouts",
    "model_card",
    "quantizer",
    "compressed_tensors",
    "evaluate",
    "doctor",
    "bench",
    "report",
    "cli",
)
"""Files and folders of the package in the order of the data flow."""

FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
MODULES = [".".join(("hf_fp4", *file.with_suffix("").parts)).removesuffix(".__init__") for file in FILES]


def is_module(parts):
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imports_of(source, package):
    """Modules of hf_fp4 that a file of the folder ``package`` imports anywhere, as paths: ("layers", "linear").

    The empty path is the package itself, when a name is taken from its ``__init__``.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {tuple(name[1:]) for name in names if name[0] == "hf_fp4"}
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                base = (*package[: len(package) - node.level + 1], *module)
            elif module[0] == "hf_fp4":
                base = tuple(module[1:])
            else:
                continue
            for alias in node.names:
                found.add((*base, alias.name) if is_module((*base, alias.name)) else base)
    return found


def test_imports_are_found():
    source = "import torch, hf_fp4.ops\nfrom . import formats\nfrom .layers.linear import FP4Linear\n"
    assert imports_of(source, ()) == {("ops",), ("formats",), ("layers", "linear")}
    source = "from .. import ops\nfrom ..formats import pack\nfrom . import replace\ndef f():\n    from hf_fp4 import cli\n"
    assert imports_of(source, ("layers",)) == {("ops",), ("formats",), ("layers", "replace"), ("cli",)}
    assert imports_of("from hf_fp4 import __version__\nfrom ...x import y", ("layers",)) == {()} | {("x",)}


@pytest.mark.parametrize("file", [file for file in FILES if file != Path("__init__.py")], ids=str)
def test_a_file_imports_only_from_above(file):
    own = file.parts[0].removesuffix(".py")
    if file == Path("__main__.py"):
        own = "cli"
    assert own in ORDER, f"{own} has no place in the order of the package; give it one"
    for imported in imports_of((ROOT / file).read_text(), file.parent.parts):
        assert imported, f"{file} imports from hf_fp4/__init__.py, which is below it"
        assert ORDER.index(imported[0]) <= ORDER.index(own), f"{file} imports {'.'.join(imported)} from below"


@pytest.mark.parametrize("folder", [name for name in ORDER if (ROOT / name).is_dir()])
def test_a_folder_has_no_import_cycle(folder):
    graph = {
        path.stem: {i[1] for i in imports_of(path.read_text(), (folder,)) if len(i) > 1 and i[0] == folder}
        for path in (ROOT / folder).glob("*.py")
        if path.stem != "__init__"
    }
    while graph:
        free = [name for name, imported in graph.items() if not imported & graph.keys()]
        assert free, f"files of {folder} import each other in a circle: {graph}"
        for name in free:
            del graph[name]


def test_importing_does_no_cuda_work():
    """Runs without a GPU as well: whatever would initialise CUDA fails, and so would the import."""
    script = (
        "import torch\n"
        "def refuse(*args): raise SystemExit('importing hf_fp4 initialises CUDA')\n"
        "torch.cuda._lazy_init = torch.cuda.init = refuse\n"
        f"import {', '.join(name for name in MODULES if not name.endswith('__main__'))}\n"
        "assert not torch.cuda.is_initialized()\n"
        "print('imported')"
    )
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT.parent)
    assert result.returncode == 0 and result.stdout.strip() == "imported", result.stderr


def public_members(owner, module):
    """Public classes and functions that are written in ``module``."""
    for name, value in vars(owner).items():
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)  # properties, class methods
        written_here = inspect.isclass(value) or inspect.isfunction(value)
        if written_here and not name.startswith("_") and value.__module__ == module.__name__:
            yield name, value


def inherits(cls, name):
    return any(hasattr(base, name) and not base.__module__.startswith("hf_fp4") for base in cls.__mro__)


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_everything_public_is_documented(name):
    module = importlib.import_module(name)
    undocumented = [] if module.__doc__ else [name]
    for member, value in public_members(module, module):
        if not value.__doc__ or value.__doc__.startswith(f"{member}("):  # what a dataclass gets by itself
            undocumented.append(member)
        if inspect.isclass(value):
            for method, function in public_members(value, module):
                if not function.__doc__ and not inherits(value, method):
                    undocumented.append(f"{member}.{method}")
    assert not undocumented


def test_public_names():
    assert hf_fp4.__all__ == sorted(hf_fp4.__all__)
    for name in hf_fp4.__all__:
        assert getattr(hf_fp4, name).__doc__
