"""Arrows that point one way: who may include, import and call what. A grep holds them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gradloc"
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".cpp", ".cu", ".cuh"})
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("transformers", "peft", "datasets", "matplotlib", "rich")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def includes(text: str) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', text, flags=re.MULTILINE)


def imports(tree: ast.AST) -> set[str]:
    """Full names of the modules that a file imports anywhere."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports_at_import(tree: ast.Module) -> set[str]:
    """The same for what runs when the file is imported: functions and TYPE_CHECKING left out."""
    found, waiting = set(), list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= imports(node)
        waiting += list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_the_core_knows_no_framework(path):
    names = includes(path.read_text(encoding="utf-8"))
    framework = [n for n in names if re.match(r"((torch|ATen|c10|pybind11|numpy)/|Python\.h)", n)]
    if re.search(r"bindings\.(cpp|h)$", path.name):
        assert {n.split("/")[0] for n in framework} <= {"pybind11"}
    else:
        assert framework == []


def test_the_core_is_found():
    assert {"csrc/bindings.cpp", "csrc/adamw.h", "csrc/cpu/norms.cpp"} <= set(map(name_of, SOURCES))
    assert includes('#include <torch/extension.h>\n  # include "work.h"') == [
        "torch/extension.h",
        "work.h",
    ]


def test_only_ops_and_watch_call_the_compiled_module():
    callers = {
        name_of(path)
        for path in MODULES
        if any(re.search(r"(^|\.)_C$", n) for n in imports(ast.parse(path.read_text("utf-8"))))
    }
    assert callers == {"gradloc/ops.py", "gradloc/watch.py"}


# The lower side of STYLE's arrows; what is above must not be imported, not even inside a function.
CORE = ["ops", "reference", "backends", "grad_norms", "files", "plan", "layers", "sharding"]
CORE += ["memory", "export", "name_patterns", "distributed"]
CORE += [path.stem for path in sorted(PACKAGE.glob("optim*.py"))]
ABOVE = ("trace", "profile", "policies", "probes", "training", "cli", "demo", "models", "evaluate")


@pytest.mark.parametrize("module", CORE)
def test_nothing_below_knows_what_is_above(module):
    found = imports(ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8")))
    ours = {n.split(".")[1] for n in found if n.startswith("gradloc.")}
    assert not {n for n in ours if n.split("_")[0] in ABOVE}, ours
    assert not {n for n in found if n.split(".")[0] in HEAVY}


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, gradloc; print([m for m in sys.argv[1:] if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *HEAVY],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n"


# Subclasses of transformers' Trainer and callbacks, and what draws in a terminal.
MADE_FOR_HEAVY = {"training", "cli", "demo", "compare/run_watch.py"}
LIGHT = [
    path
    for path in MODULES
    if not MADE_FOR_HEAVY & {path.relative_to(PACKAGE).parts[0], str(path.relative_to(PACKAGE))}
]


@pytest.mark.parametrize("path", LIGHT, ids=name_of)
def test_heavy_imports_stand_in_functions(path):
    """So that importing any of these files, not only the package, pays for none of them."""
    found = {n.split(".")[0] for n in imports_at_import(ast.parse(path.read_text("utf-8")))}
    assert not found & set(HEAVY)


def test_the_reader_of_imports():
    text = "import a\nif TYPE_CHECKING:\n import b\ndef f():\n import c\nclass D:\n from e import f"
    assert imports_at_import(ast.parse(text)) == {"a", "e.f"}
    assert imports(ast.parse(text)) == {"a", "b", "c", "e.f"}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc/self/maps")
def test_one_openmp_runtime_in_the_process():
    """Two would each spin their threads on the same cores (docs/decisions/0001)."""
    code = (
        "import gradloc.ops, torch; gradloc.ops.NativeNorms([9], [0], 1).norm_sq([torch.ones(9)]);"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line})"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(ast.literal_eval(ran.stdout.strip().replace("set()", "()"))) <= 1, ran.stdout
