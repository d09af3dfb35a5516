#!/usr/bin/env bash
# The one command of a GPU visit: builds against what the machine has, runs the tests marked `cuda`,
# compute-sanitizer and the benchmarks, and writes what came out. docs/gpu-visit.md explains it.
# Installs nothing, needs no network, changes nothing in the clone.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: bench/run_cuda.sh OUT_DIR [--rehearse] [--installed-core] [--limit PART=SECONDS]

  --rehearse        on a machine with no GPU: everything as far as it goes there
  --installed-core  take the compiled module of the installed gradloc instead of building one
  --limit           another time limit for a part (repeatable); parts: machine, build, tests,
                    sanitizer, benchmarks, report

PYTHON names the interpreter (default: python3), which must have torch. GRADLOC_WHEELS may name a
folder of wheels that it lacks, such as pytest.
TEXT
}

# Seconds for each part; together with what stopping takes under 9 minutes. What a part leaves over is
# the following ones'.
declare -A limit=([machine]=30 [build]=110 [tests]=140 [sanitizer]=70 [benchmarks]=145 [report]=15)
declare -A log=([machine]=machine.txt [build]=build.log [tests]=tests.log [sanitizer]=sanitizer.log
  [benchmarks]=all.log [report]=all.log)

rehearse="" installed="" out="" custom=""
while [ $# -gt 0 ]; do
  case "$1" in
    --rehearse) rehearse=yes ;;
    --installed-core) installed=yes ;;
    --limit)
      [[ "${2:-}" =~ ^([a-z]+)=([0-9.]+)$ && -n "${limit[${BASH_REMATCH[1]}]:-}" ]] || {
        echo "--limit ${2:-}: give PART=SECONDS, PART one of ${!limit[*]}" >&2 && exit 2
      }
      limit[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
      custom="$custom ${BASH_REMATCH[1]}"
      shift
      ;;
    -h | --help) usage && exit 0 ;;
    -*) usage >&2 && exit 2 ;;
    *)
      [ -z "$out" ] || { usage >&2 && exit 2; }
      out=$1
      ;;
  esac
  shift
done
[ -n "$out" ] || { usage >&2 && exit 2; }

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${PYTHON:-python3}") || {
  echo "PYTHON=${PYTHON:-python3}: no such interpreter; set PYTHON to one that has torch" >&2
  exit 2
}
# Two cores take longer to compile than the many of a machine with a GPU.
[[ -z "$rehearse" || " $custom " == *" build "* ]] || limit[build]=240
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
rm -f "$out"/{status.json,machine.txt,all.log,results.json,report.md,tests.log,sanitizer.log,build.log}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stage=$work/stage
# The interpreter's own scripts first (cmake, ninja); a toolkit that is not on PATH last.
PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
own_path=${PYTHONPATH:-}
export PATH own_path PYTHONPATH=$stage${own_path:+:$own_path}
export PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export root out work stage python rehearse installed GRADLOC_WHEELS=${GRADLOC_WHEELS:-}

part_machine() {
  "$python" "$root/bench/cuda_machine.py" ${rehearse:+--rehearse}
}

# A copy of the package with the compiled module in it, found through PYTHONPATH: the clone stays as
# it is, and an installed gradloc is not used.
part_build() {
  set -e
  mkdir -p "$stage"
  (cd "$root" && find gradloc -name '*.py' -o -name '*.pyi' | tar -cf - -T -) | tar -xf - -C "$stage"
  # An editable install puts a finder of its own before PYTHONPATH.
  cat >"$stage/sitecustomize.py" <<'PY'
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__name__.startswith("ScikitBuild")]
PY
  if [ -n "$GRADLOC_WHEELS" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$stage" \
      "$GRADLOC_WHEELS"/*.whl
  fi
  if [ -n "$installed" ]; then
    cp "$(cd "$work" && PYTHONPATH=$own_path "$python" -c \
      'import torch; from gradloc import _C; print(_C.__file__)')" "$stage/gradloc/"
  else
    compile
  fi
  cd "$work"
  "$python" - <<'PY'
import os
from gradloc import ops
info, home = ops.build_info(), os.environ["stage"]
assert ops.__file__.startswith(home) and ops._C.__file__.startswith(home), ops._C.__file__
print("built:", info)
if not os.environ["rehearse"]:
    assert info["cuda_status"] == "ok", info["cuda_status"]
PY
  touch "$work/built"
}

# Without it another installed module would be tested, or plain torch. 75 stands for "left out".
needs_build() {
  [ -e "$work/built" ] || { echo "left out, as the build failed" && return 75; }
}

compile() {
  local options=(-DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$python" -DGRADLOC_CUDA=ON)
  local architecture
  architecture=$("$python" -c 'import torch
print("%d%d" % torch.cuda.get_device_capability() if torch.cuda.is_available() else 90)')
  options+=(-DCMAKE_CUDA_ARCHITECTURES="$architecture")
  if ! command -v nvcc && [ -z "${CUDACXX:-}" ]; then
    echo "no nvcc on PATH: set CUDACXX or CUDA_HOME"
    [ -n "$rehearse" ] || return 1
    options+=(-DGRADLOC_CUDA=OFF)
  fi
  if "$python" -m pybind11 --cmakedir; then
    options+=(-Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)")
  else
    echo "no pybind11 installed: torch's copy of its headers"
    options+=(-Dpybind11_DIR="$root/bench/pybind11_from_torch")
    options+=(-DGRADLOC_PYBIND11_INCLUDE="$("$python" -c \
      'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')")
  fi
  if command -v ninja; then options+=(-G Ninja); fi
  cmake -S "$root" -B "$work/build" "${options[@]}"
  cmake --build "$work/build" --parallel "$(nproc)"
  cp "$work"/build/_C*.so "$stage/gradloc/"
}

# The files that may have tests marked `cuda`: by the mark, by the fixture `device` (it has the mark for its
# GPU), and torch's optimizer tests. No others, as those import what is not installed here, and a file
# that can't be imported fails this part. That none is missed is checked in tests/test_run_cuda.py. Those
# that nothing but a GPU can check come first, so that a time limit costs the least.
test_files() {
  cd "$root/tests" || return
  {
    printf '%s\n' test_cuda_device.py test_cuda_graphs.py
    grep -rlE 'mark\.cuda\b|def test_\w*\(.*\bdevice\b|from torch_suite import' --include 'test_*.py' | sort
  } | awk '!seen[$0]++'
}

part_tests() { # seconds after which it ends by itself
  needs_build || return
  local files
  mapfile -t files < <(test_files)
  printf 'file: %s\n' "${files[@]}"
  "$python" -c 'import pytest' || {
    echo "pytest is not installed: put its wheels in a folder and name it in GRADLOC_WHEELS"
    return 1
  }
  if [ -z "$rehearse" ]; then
    "$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || return 1
  fi
  # Not in the clone, so that the staged package is imported; no plugins that happen to be there.
  # Interrupted, pytest still tells of what failed until then; -v names the test that was under way.
  local how=(-v --tb short --durations 15)
  [ -z "$rehearse" ] || how=(--collect-only -q)
  cd "$work" && PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 timeout --foreground --signal INT --kill-after 5 "$1" \
    "$python" -m pytest --rootdir "$root" -c "$root/pyproject.toml" -p no:cacheprovider \
    --continue-on-collection-errors -m cuda "${how[@]}" "${files[@]/#/$root/tests/}"
}

# Both tools at once, each on a process of its own. No caching of memory: every tensor its own
# allocation, past whose end memcheck sees.
part_sanitizer() {
  needs_build || return
  local run=("$python" "$root/bench/cuda_short_run.py")
  cd "$work" || return 1
  if [ -n "$rehearse" ]; then
    "${run[@]}" --device cpu
    return
  fi
  command -v compute-sanitizer || {
    echo "compute-sanitizer is not on PATH: set CUDA_HOME to a toolkit that has it"
    return 1
  }
  local tool pids=() failed=0
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --report-api-errors no "${run[@]}" >"$work/$tool.log" 2>&1 &
    pids+=($!)
  done
  # Their output comes out even when the time limit ends this.
  trap 'cat "$work/memcheck.log" "$work/racecheck.log"' EXIT
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  grep -q 'ERROR SUMMARY: 0 errors' "$work/memcheck.log" || failed=1
  grep -q 'RACECHECK SUMMARY: 0 hazards' "$work/racecheck.log" || failed=1
  return $failed
}

part_benchmarks() {
  needs_build && cd "$work" && "$python" "$root/bench/cuda_kernels.py" --json "$out/results.json" \
    --seconds "$1" ${rehearse:+--rehearse}
}

part_report() {
  "$python" "$root/bench/cuda_report.py" "$out"
}
export -f part_machine part_build compile needs_build test_files part_tests part_sanitizer part_benchmarks
export -f part_report

statuses=() all_passed=yes
write_status() {
  local rehearsal=false between="" one
  [ -z "$rehearse" ] || rehearsal=true
  {
    printf '{"rehearsal": %s, "seconds": %s, "parts": [' "$rehearsal" "$SECONDS"
    for one in "${statuses[@]}"; do
      printf '%s\n  %s' "$between" "$one"
      between=,
    done
    printf '\n]}\n'
  } >"$work/status.json"
  mv "$work/status.json" "$out/status.json"
}

run_part() { # name, arguments of its function
  local name=$1 begin=$SECONDS code verdict
  shift
  printf '\n== %s (limit %s s)\n' "$name" "${limit[$name]}" | tee -a "$out/all.log"
  local also=$work/log
  [ "${log[$name]}" = all.log ] || also=$out/${log[$name]}
  timeout --kill-after=5 "${limit[$name]}" bash -uo pipefail -c "part_$name \"\$@\"" bash "$@" 2>&1 |
    tee "$also" | tee -a "$out/all.log"
  code=${PIPESTATUS[0]}
  case $code in
    0) verdict=passed ;;
    75) verdict="left out" ;;
    124 | 137) verdict="timed out" ;;
    *) verdict=failed ;;
  esac
  [ "$code" = 0 ] || all_passed=""
  printf '%s: %s after %s s\n' "$name" "$verdict" $((SECONDS - begin)) | tee -a "$out/all.log"
  statuses+=("$(printf '{"name": "%s", "status": "%s", "exit": %s, "seconds": %s, "limit_s": %s, "log": "%s"}' \
    "$name" "$verdict" "$code" $((SECONDS - begin)) "${limit[$name]}" "${log[$name]}")")
  write_status
}

planned=0 # seconds until the end of a part, if every part took its limit
for name in machine build tests sanitizer benchmarks report; do
  planned=$(awk "BEGIN {print $planned + ${limit[$name]}}")
  if [[ " $custom " != *" $name "* && $name != report ]]; then
    limit[$name]=$(awk "BEGIN {left = int($planned - $SECONDS); print (left > 1 ? left : 1)}")
  fi
  set --
  # These two stop by themselves before their limit, so that what they have comes out.
  case $name in
    tests) set -- "$(awk "BEGIN {s = ${limit[$name]}; print (s > 20 ? s - 8 : s * 0.6)}")" ;;
    benchmarks) set -- "$(awk "BEGIN {print int(${limit[$name]} * 0.85)}")" ;;
  esac
  run_part "$name" "$@"
done
[ -n "$all_passed" ]
