"""Compiles CUDA sources for the emulator and loads the result, with no CUDA compiler.

What is compiled is kept in `build/emulator/` and made again when a source, a flag or the compiler
changes; parts that did not change are kept one by one, so that a changed copy of one kernel costs
the compilation of that kernel. Nothing here runs a kernel.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent
EMULATOR = TESTS / "emulator"
CSRC = TESTS.parent / "csrc"
FOLDER = TESTS.parent / "build" / "emulator"
RUNTIME = ("block.cpp", "diagnosis.cpp", "error_names.cpp", "fibers.cpp", "launch.cpp")

# No fused multiply-add and no clever aliasing: the CPU core's bits, and casts between vectors and
# their elements as CUDA allows them. -O1, because more costs the compiler more than it saves.
FLAGS = (
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-strict-aliasing"),
    "-fno-gnu-unique",  # or two modules in one process would share their `__shared__` variables
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
)
SANITIZE = (
    *("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"),
    "-fno-omit-frame-pointer",
    "-fsanitize-sections=emulated_shared_*",  # `__shared__` variables get gaps between them too
)
LINK = ("-shared", "-Wl,-Bsymbolic", f"-Wl,-T,{EMULATOR / 'shared_memory.ld'}", "-ldl")


@dataclass(frozen=True)
class Source:
    """A file to compile: `path` as the compiler is given it, relative to `folder`."""

    folder: Path
    path: str
    flags: Sequence[str] = field(default=())


def compiler() -> list[str]:
    """The C++ compiler; CXX may name another, and may have arguments."""
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def compiler_version(command: tuple[str, ...]) -> str:
    return subprocess.run(
        [*command, "--version"], check=True, capture_output=True, text=True
    ).stdout


def pybind11_include() -> Path:
    """The headers of pybind11, or those that torch brings."""
    try:
        import pybind11

        return Path(pybind11.get_include())
    except ImportError:
        torch = importlib.util.find_spec("torch")
        assert torch is not None, "neither pybind11 nor torch is installed"
        assert torch.origin is not None
        return Path(torch.origin).parent / "include"


def build(sanitize: bool = False, csrc: Path = CSRC) -> Path:
    """Compile the module `gradloc_emulated` from a folder that is, or is a copy of, csrc/.

    Returns:
        The path of the module, for `load`.
    """
    python = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11_include())]
    bindings = [
        Source(csrc.parent, path, [*python, f"-I{csrc.name}"])
        for path in (f"{csrc.name}/cuda_bindings.cpp", str(EMULATOR / "module.cpp"))
    ]
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return _build([*bindings, *_kernels(csrc)], f"gradloc_emulated{suffix}", sanitize, [csrc])


def build_samples(sanitize: bool = False, defines: Sequence[str] = ()) -> Path:
    """Compile the emulator with its own small kernels, as a library for ctypes."""
    samples = [Source(EMULATOR, "sample_kernels.cu")]
    return _build(samples, "samples.so", sanitize, defines=defines)


def build_kernels(sanitize: bool = False, csrc: Path = CSRC) -> Path:
    """Compile the core's kernels as a library for ctypes (emulator/kernel_library.py)."""
    sources = _kernels(csrc)
    sources.append(Source(csrc.parent, str(EMULATOR / "kernel_driver.cpp"), (f"-I{csrc.name}",)))
    return _build(sources, "kernels.so", sanitize, [csrc])


def _kernels(csrc: Path) -> list[Source]:
    paths = sorted(p for p in (csrc / "cuda").iterdir() if p.suffix in {".cu", ".cpp"})
    return [Source(csrc.parent, str(path.relative_to(csrc.parent))) for path in paths]


def load(path: Path) -> ModuleType:
    """Import a module that `build` made. Several can live in one process."""
    spec = importlib.util.spec_from_file_location("gradloc_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_sanitized(script: Path, *args: object) -> "subprocess.CompletedProcess[str]":
    """Run a Python script in which modules built with `sanitize` can be imported.

    AddressSanitizer must come before everything else in a process, hence a process of its own.
    Python's small objects come from malloc there, so that an access beyond one is seen. The caller
    looks at `returncode` and `stderr`.
    """
    found = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], check=True, capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = {
        **os.environ,
        # Without libstdc++ AddressSanitizer finds no exceptions to watch, and stops at the first.
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps what it has until it ends
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, str(script), *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def _build(
    sources: Sequence[Source],
    name: str,
    sanitize: bool,
    folders: Sequence[Path] = (),
    defines: Sequence[str] = (),
) -> Path:
    """Compile the sources with the emulator; nothing is done if nothing in the folders changed."""
    flags = [*FLAGS, *(SANITIZE if sanitize else ()), *(f"-D{define}" for define in defines)]
    flags += [f"-I{EMULATOR}", f"-I{EMULATOR / 'include'}"]
    sources = [*sources, *(Source(EMULATOR, path) for path in RUNTIME)]
    version = compiler_version(tuple(compiler()))
    key = hashlib.sha256(repr((version, flags, LINK, name, [s.flags for s in sources])).encode())
    for folder in (EMULATOR, *folders):
        for path in sorted(folder.rglob("*")):
            if path.suffix in {".cu", ".cuh", ".cpp", ".h", ".ld"}:
                key.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
                key.update(path.read_bytes())
    output = FOLDER / key.hexdigest()[:16] / name
    if output.exists():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    (FOLDER / "objects").mkdir(exist_ok=True)
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be building the same; let it finish
        if not output.exists():
            with ThreadPoolExecutor(2) as pool:
                objects = list(pool.map(lambda source: _compile(source, flags, version), sources))
            sanitizers = [flag for flag in flags if flag.startswith("-fsanitize=")]
            _run([*compiler(), *map(str, objects), *sanitizers, *LINK], output)
    return output


def _compile(source: Source, flags: Sequence[str], version: str) -> Path:
    """The object file of a source, made anew only if what the compiler sees of it changed."""
    command = [*compiler(), *flags, *source.flags]
    if source.path.endswith(".cu"):  # as nvcc does
        command += ["-x", "c++", "-include", "cuda_runtime.h"]
    seen = subprocess.run(
        [*command, "-E", "-fno-working-directory", source.path],
        cwd=source.folder,
        capture_output=True,
    )
    key = hashlib.sha256(repr((version, command)).encode() + seen.stdout)
    output = FOLDER / "objects" / f"{Path(source.path).stem}-{key.hexdigest()[:24]}.o"
    if seen.returncode != 0 or not output.exists():
        _run([*command, "-c", source.path], output, source.folder)
    return output


def _run(command: Sequence[str], output: Path, folder: Path | None = None) -> None:
    """Run a compiler so that `output` appears whole or not at all; its complaints are the error."""
    temporary = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run(
        [*command, "-o", str(temporary)], cwd=folder, capture_output=True, text=True
    )
    if done.returncode != 0:
        temporary.unlink(missing_ok=True)
        raise RuntimeError(f"{shlex.join(command)}\n{done.stderr[-6000:]}")
    temporary.replace(output)
