"""`gradloc doctor` where something does not work, and the lazy names that let it speak there."""

import os
import subprocess
import sys

import pytest
import torch

import gradloc
from gradloc import ops
from gradloc.cli import main


def doctor(capsys) -> dict[str, str]:
    assert main(["doctor"]) == 0
    lines = (line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    return {name: value.strip() for name, value in lines}


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_doctor_speaks_without_the_compiled_core():
    code = "import sys; sys.modules['gradloc._C'] = None; from gradloc.cli import main; "
    run = python(code + "sys.exit(main(['doctor']))")
    assert run.returncode == 0, run.stderr
    core = [line for line in run.stdout.splitlines() if line.startswith("compiled core ")]
    assert len(core) == 1, run.stdout
    assert "not usable: " in core[0]
    assert "install gradloc with pip" in core[0]


def test_names_are_imported_when_used():
    code = "import sys, gradloc; a = 'torch' in sys.modules; from gradloc import LocalizedAdamW; "
    code += "found = list(sys.modules); print(a, found.index('torch') < found.index('gradloc._C'))"
    run = python(code)
    assert run.stdout == "False True\n", run.stderr


def test_every_public_name_is_there():
    for name in gradloc.__all__:
        assert getattr(gradloc, name).__name__ == name
    assert set(gradloc.__all__) <= set(dir(gradloc))
    with pytest.raises(AttributeError, match="'gradloc' has no attribute 'LayerMop'"):
        gradloc.LayerMop  # noqa: B018
    with pytest.raises(ImportError):
        from gradloc import LayerMop  # noqa: F401


@pytest.fixture
def no_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_torch_without_cuda(no_device, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor(capsys)["CUDA devices"] == "none: torch was built without CUDA"


def test_what_cuda_says(no_device, monkeypatch, capsys):
    def fail():
        raise RuntimeError("Found no NVIDIA driver on your system.\nPlease check")

    monkeypatch.setattr(torch.cuda, "init", fail)
    shown = "none: torch (CUDA 12.6) finds none: Found no NVIDIA driver on your system."
    assert doctor(capsys)["CUDA devices"] == shown
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor(capsys)["CUDA devices"] == shown + " (CUDA_VISIBLE_DEVICES='')"


def test_no_device_and_no_error(no_device, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    shown = "none: torch (CUDA 12.6) finds none (CUDA_VISIBLE_DEVICES='7')"
    assert doctor(capsys)["CUDA devices"] == shown


@pytest.mark.parametrize(
    ("cuda", "status", "shown"),
    [
        (
            None,
            "built with GRADLOC_CUDA=OFF",
            "not compiled in, plain torch instead: built with GRADLOC_CUDA=OFF",
        ),
        (
            None,
            "no CUDA compiler was found",
            "not compiled in, plain torch instead: no CUDA compiler was found",
        ),
        (None, None, "not compiled in, plain torch instead"),
        ("12.6", "no CUDA device", "compiled with CUDA 12.6: no CUDA device"),
    ],
)
def test_the_reason_of_the_core_is_said_once(monkeypatch, capsys, cuda, status, shown):
    info = {**ops.build_info(), "cuda_compiled": cuda, "cuda_status": status}
    monkeypatch.setattr(ops, "build_info", lambda: info)
    assert doctor(capsys)["CUDA backend"] == shown
