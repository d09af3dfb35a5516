"""README.md is true: its Python runs, its commands parse, its file map names every file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradloc.cli import build_parser

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAPPED = (
    "csrc/**/*",
    "gradloc/**/*.py",
    "bench/*.py",
    "examples/*",
    "docs/*.md",
    "docs/decisions/*.md",
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_python_runs_as_it_stands(tmp_path: Path) -> None:
    code = "\n".join(blocks("python"))
    # The last block defines a policy; use it as the text says one can.
    code += "\nassert len(attention_only(profile).active) == 4\n"
    code += "model(**reference[0]).loss.backward()\noptimizer.step()\n"
    code += "print(layers, profile.table(), plan, sep='\\n')\nprofile.plot('profile.png')\n"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    assert "transformer.h.0.attn" in ran.stdout
    assert "LayerPlan(" in ran.stdout


def test_its_example_has_ten_lines() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line]
    assert len([line for line in lines if not line.startswith(("from ", "import "))]) == 10


@pytest.mark.parametrize(
    "line",
    [line for block in blocks("sh") for line in block.splitlines() if line.startswith("gradloc ")],
)
def test_its_commands_parse(line: str) -> None:
    arguments = line.split("#")[0].split()[1:]
    build_parser().parse_args(arguments)


def test_its_make_targets_exist() -> None:
    targets = re.findall(r"^make (\w+)", "\n".join(blocks("sh")), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_file_map_names_every_file() -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for pattern in MAPPED
        for path in ROOT.glob(pattern)
        if path.is_file() and path.suffix != ".pyc" and path.name != "__init__.py"
    }
    section = README.split("## Files", 1)[1]
    named = set(re.findall(r"^\| `([^`]+)` \|", section, flags=re.MULTILINE))
    assert sorted(files - named) == [], "missing in README's file map"
    assert sorted(name for name in named if not (ROOT / name).exists()) == [], "mapped but gone"


def test_local_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
