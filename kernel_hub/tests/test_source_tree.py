"""The source tree as kernel-builder takes it, and what only reading can compare: schemas, fakes, C++ functions, the card.

Nothing here needs a build or a GPU.
"""

import ast
import re
import sys

import pytest
import torch
from conftest import ROOT

tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")

CONFIG = tomllib.loads((ROOT / "build.toml").read_text())
PACKAGE = ROOT / "torch-ext" / CONFIG["general"]["name"].replace("-", "_")
MODULES = {path.name: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}
BINDINGS = {path.name: path.read_text() for path in sorted((ROOT / "torch-ext").glob("torch_binding*.cpp"))}
HEADERS = {path.name: path.read_text() for path in sorted((ROOT / "torch-ext").glob("torch_binding*.h"))}
CPP_TYPES = {
    "const Tensor&": "Tensor",
    "const std::vector<Tensor>&": "List[Tensor]",
    "const std::vector<std::optional<Tensor>>&": "List[Optional[Tensor]]",
    "const std::optional<Tensor>&": "Optional[Tensor]",
    "int64_t": "int",
    "bool": "bool",
}
# Those that kernel-builder's check of op registrations looks for.
REGISTRATIONS = {"custom_op", "triton_op", "register_kernel", "register_fake", "register_vmap"}


def name_of(node):
    """The last name of a dotted one."""
    return getattr(node, "attr", None) or getattr(node, "id", None)


def functions():
    for file, tree in MODULES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield file, node


def arguments_of(function):
    assert not (function.args.kwonlyargs or function.args.vararg or function.args.kwarg)
    return [argument.arg for argument in function.args.args]


def prefixed_name(call):
    """``name`` of ``decorator(add_op_namespace_prefix("name"), ...)``, or None."""
    first = call.args[0] if call.args else None
    if isinstance(first, ast.Call) and name_of(first.func) == "add_op_namespace_prefix":
        return first.args[0].value
    return None


def schemas():
    """Each compiled op's schema, as torch reads it."""
    found = {}
    text = "".join(BINDINGS.values())
    for literals in re.findall(r'ops\.def\(((?:\s*"[^"]*")+)\s*\)', text):
        schema = torch._C.parse_schema("fp4::" + "".join(re.findall(r'"([^"]*)"', literals)))
        found[schema.name.removeprefix("fp4::")] = schema
    assert len(found) == text.count("ops.def(")
    return found


SCHEMAS = schemas()


def cpp_functions(text):
    """(name, result, [(type, name)]) of every function of an op that ``text`` declares or defines."""
    pattern = r"^(std::tuple<[^>]*>|std::vector<Tensor>|std::string|Tensor|void) (\w+)\(([^)]*)\)"
    for result, name, parameters in re.findall(pattern, text, re.MULTILINE):
        if name in SCHEMAS:
            pairs = [" ".join(p.split()).rpartition(" ")[::2] for p in parameters.split(",") if p]
            yield name, result, pairs


def test_kernel_builder_takes_build_toml(tmp_path):
    """Its own parser does, which knows every field of the edition and refuses others."""
    rust = pytest.importorskip(
        "kernels._rust", reason="needs kernels, the loader, which has kernel-builder's parser"
    )
    build = rust.Build.open(ROOT)
    assert build.general.backends == [rust.Backend.CPU, rust.Backend.CUDA]
    text = (ROOT / "build.toml").read_text()
    (tmp_path / "build.toml").write_text(text.replace("cuda-capabilities", "cuda_capabilities"))
    with pytest.raises(ValueError, match="cuda_capabilities"):
        rust.Build.open(tmp_path)


def test_build_toml_fields():
    general, torch_ = CONFIG["general"], CONFIG["torch"]
    assert general["edition"] == 5
    assert (general["name"], general["version"]) == ("hf-fp4-kernels", 1)
    assert general["license"] == "Apache-2.0"
    assert general["hub"]["repo-id"].endswith("/" + general["name"])
    assert torch_["stable-abi"] == {"cpu": "2.11", "cuda": "2.11"}
    for kernel in CONFIG["kernel"].values():
        assert kernel["depends"] == ["torch"]
        if kernel["backend"] == "cpu":
            continue
        assert kernel["backend"] == "cuda"
        assert all(re.fullmatch(r"\d+\.\d[af]?", arch) for arch in kernel["cuda-capabilities"])


def test_hf_fp4_asks_for_this_kernel():
    hub = pytest.importorskip("hf_fp4.backends.hub", reason="needs hf_fp4")
    source = hub.KernelSource()
    assert (source.repo, source.version) == (
        CONFIG["general"]["hub"]["repo-id"],
        CONFIG["general"]["version"],
    )


def test_every_source_file_is_listed_once():
    listed = [s for kernel in CONFIG["kernel"].values() for s in kernel["src"]] + CONFIG["torch"]["src"]
    files = [p for name in ("fp4_cpu", "fp4_cuda") for p in (ROOT / name).rglob("*") if p.is_file()]
    files += [p for p in (ROOT / "torch-ext").glob("*") if p.is_file()]
    assert sorted(listed) == sorted(str(p.relative_to(ROOT)) for p in files)


def test_includes_are_found_or_generated():
    """By name from the file's own folder, as no include directories are configured."""
    for path in [
        *(ROOT / "fp4_cpu").iterdir(),
        *(ROOT / "fp4_cuda").iterdir(),
        *(ROOT / "torch-ext").glob("*.[ch]*"),
    ]:
        for name in re.findall(r'#include "([^"]+)"', path.read_text()):
            assert name == "registration.h" or (path.parent / name).is_file(), f"{path.name} includes {name}"


def test_layout_and_flake():
    """kernel-builder's layout check, and the outputs that its flake template asks for."""
    assert (PACKAGE / "__init__.py").is_file() and not (PACKAGE / PACKAGE.name).exists()
    assert (ROOT / "CARD.md").read_text().startswith("---\nlibrary_name: kernels\n")
    flake = (ROOT / "flake.nix").read_text()
    assert "kernel-builder.lib.genKernelFlakeOutputs" in flake
    assert 'kernel-builder.url = "github:huggingface/kernels"' in flake
    assert "inherit self;" in flake and "path = ./.;" in flake


def test_imports_are_relative_torch_or_standard():
    for file, tree in MODULES.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                assert top in {"torch", "triton"} or top in sys.stdlib_module_names, f"{file} imports {name}"


def test_ops_are_registered_in_the_generated_name_space():
    """kernel-builder's own check: the first argument of every registration is add_op_namespace_prefix(...)."""
    for file, function in functions():
        for decorator in function.decorator_list:
            if (
                isinstance(decorator, ast.Call)
                and decorator.args
                and name_of(decorator.func) in REGISTRATIONS
            ):
                assert prefixed_name(decorator), f"{file}:{decorator.lineno}"


def test_api_is_what_the_card_documents():
    init = MODULES["__init__.py"]
    (listed,) = (
        ast.literal_eval(node.value)
        for node in init.body
        if isinstance(node, ast.Assign) and name_of(node.targets[0]) == "__all__"
    )
    card = (ROOT / "CARD.md").read_text()
    section = card[card.index("\n## API\n") :]
    section = section[: section.index("\n## ", 1)]
    documented = [
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert sorted(listed) == listed, "__all__ is sorted"
    assert sorted(documented) == listed


def test_every_op_has_a_schema_a_kernel_and_a_fake():
    kernels = re.findall(r'ops\.impl\("(\w+)", TORCH_BOX\(&(\w+)\)\)', "".join(BINDINGS.values()))
    fakes = [
        name
        for _, function in functions()
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and name_of(decorator.func) == "register_fake"
        for name in [prefixed_name(decorator)]
    ]
    assert sorted(kernels) == sorted((name, name) for name in SCHEMAS)
    assert sorted(fakes) == sorted(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_fake_takes_the_arguments_of_the_schema(name):
    found = [
        (arguments_of(function), function)
        for _, function in functions()
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and prefixed_name(decorator) == name
    ]
    ((arguments, function),) = found
    assert arguments == [argument.name for argument in SCHEMAS[name].arguments]
    for node in ast.walk(function):
        if isinstance(node, ast.Return):
            returned = len(node.value.elts) if isinstance(node.value, ast.Tuple) else 1
            assert returned == len(SCHEMAS[name].returns)


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("texts", [HEADERS, BINDINGS], ids=["declared", "defined"])
def test_function_takes_the_arguments_of_the_schema(texts, name):
    """TORCH_BOX unpacks what a call passes by the C++ types, and nothing compares those with the schema."""
    schema = SCHEMAS[name]
    ((result, parameters),) = [
        (result, pairs)
        for text in texts.values()
        for found, result, pairs in cpp_functions(text)
        if found == name
    ]
    assert [CPP_TYPES[kind] for kind, _ in parameters] == [str(a.type) for a in schema.arguments]
    for (_, parameter), argument in zip(parameters, schema.arguments, strict=True):
        assert argument.name == parameter or argument.name.startswith(parameter + "_"), f"{name}: {parameter}"
    returned = result.count("Tensor") + result.count("std::string")
    assert returned == len(schema.returns)


def test_fakes_of_python_ops_take_the_arguments_of_the_op():
    ops, fakes = {}, {}
    for file, function in functions():
        for decorator in function.decorator_list:
            if isinstance(decorator, ast.Call) and name_of(decorator.func) == "custom_op":
                ops[file, function.name] = arguments_of(function)
            elif isinstance(decorator, ast.Attribute) and decorator.attr == "register_fake":
                fakes[file, decorator.value.id] = arguments_of(function)
    assert ops and fakes == ops


def test_calls_of_compiled_ops_pass_every_argument():
    """By position, as many as the schema has; calls that unpack a tuple are traced with a built variant instead."""
    seen = set()
    for file, tree in MODULES.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if getattr(node.func.value, "id", None) != "ops":
                continue
            name = node.func.attr
            assert name in SCHEMAS, f"{file}:{node.lineno} calls {name}, which has no schema"
            seen.add(name)
            if not any(isinstance(argument, ast.Starred) for argument in node.args):
                assert len(node.args) == len(SCHEMAS[name].arguments) and not node.keywords, (
                    f"{file}:{node.lineno}"
                )
    assert seen
