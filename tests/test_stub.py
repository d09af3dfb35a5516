"""gradloc/_C.pyi says what the compiled module has: names, arguments in order, and their kinds.

Signatures of the module are read from the docstrings that pybind11 writes.
"""

import ast
import inspect
import re
from pathlib import Path

import pytest

from gradloc import _C, ops

STUB = ast.parse((Path(ops.__file__).parent / "_C.pyi").read_text(encoding="utf-8"))


# What a build without CUDA lacks. The emulator's module has it on any machine.
CUDA_CLASSES = {"CudaNormWork", "CudaAdamWWork"}
CUDA_FUNCTIONS = {"kernel_problem", "write_groups", "write_gradients"}
CUDA_CONSTANTS = {"MAX_INLINE_TENSORS", "MAX_INLINE_GROUPS", "GROUP_BYTES"}
LACKING = CUDA_CLASSES | CUDA_FUNCTIONS | CUDA_CONSTANTS if not ops.DEVICE_CORES else set()


def stub_functions() -> dict[str, ast.FunctionDef]:
    """Qualified name -> function of the stub."""
    found = {}
    for node in STUB.body:
        if getattr(node, "name", None) in LACKING:
            continue
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            members = [
                item
                for item in node.body
                if isinstance(item, ast.FunctionDef) and not item.decorator_list
            ]
            found |= {f"{node.name}.{item.name}": item for item in members}
    return found


def module_functions() -> dict[str, str]:
    """Qualified name -> docstring of a function of the module."""
    found = {}
    for name, value in vars(_C).items():
        if inspect.isclass(value):
            for key, member in vars(value).items():
                if key == "__init__" or (callable(member) and not key.startswith("_")):
                    found[f"{name}.{key}"] = member.__doc__
        elif callable(value):
            found[name] = value.__doc__
    return found


def arguments_of(docstring: str) -> list[tuple[str, str]]:
    """(name, type) of each argument in the first line, `f(a: T[U, V], b: W) -> R`."""
    inside = re.match(r"\w+\((.*)\) -> ", docstring.splitlines()[0]).group(1)
    parts, depth, last = [], 0, 0
    for i, letter in enumerate(inside + ","):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(inside[last:i].strip())
            last = i + 1
    return [tuple(map(str.strip, part.split(":", 1))) for part in parts if part]


def kind(annotation: str) -> str:
    """The type without the spelling that differs between pybind11 versions."""
    text = annotation.replace("collections.abc.", "").replace("typing.", "")
    text = text.replace("gradloc._C.", "").replace("SupportsBool", "bool")
    text = re.sub(r"Supports(Int|Float|Index)( \| Supports\w+)*", lambda m: m[1].lower(), text)
    text = re.sub(r"Optional\[(\w+)\]", r"\1 | None", text)
    text = text.replace("index", "int").replace("list[", "Sequence[").replace("tuple[", "Tuple[")
    return text.replace("Tuple", "tuple").replace(" ", "")


def test_the_same_names():
    assert stub_functions().keys() == module_functions().keys()
    classes = {node.name for node in STUB.body if isinstance(node, ast.ClassDef)} - LACKING
    assert classes == {name for name, value in vars(_C).items() if inspect.isclass(value)}
    constants = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)} - LACKING
    public = {k for k, v in vars(_C).items() if not callable(v) and not k.startswith("_")}
    assert constants == public == {"CHUNK_ELEMENTS"} | (CUDA_CONSTANTS - LACKING)
    assert type(_C.CHUNK_ELEMENTS) is int


@pytest.mark.parametrize("name", stub_functions())
def test_the_same_arguments(name):
    stub = stub_functions()[name]
    assert [*stub.args.kwonlyargs, *stub.args.posonlyargs, *stub.args.defaults] == []
    expected = [(arg.arg, arg.annotation) for arg in stub.args.args]
    found = arguments_of(module_functions()[name])
    assert [argument for argument, _ in found] == [argument for argument, _ in expected]
    for (argument, annotation), (_, wanted) in zip(found, expected, strict=True):
        if wanted is not None:  # self has none
            assert kind(annotation) == kind(ast.unparse(wanted)), argument


def test_the_reader_of_docstrings():
    line = "f(self: m.C, a: list[tuple[int, float]], b: typing.SupportsInt) -> None"
    assert arguments_of(line) == [
        ("self", "m.C"),
        ("a", "list[tuple[int, float]]"),
        ("b", "typing.SupportsInt"),
    ]
    assert kind("Optional[int]") == kind("typing.SupportsInt | None") == "int|None"
    assert kind("collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]") == (
        "Sequence[int]"
    )
