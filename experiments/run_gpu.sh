#!/usr/bin/env bash
# The comparisons that want a GPU: a GPT-2-small-sized model on the large temporal world, and
# SmolLM2-135M. Each part has a time limit and is resumed by the same command. Installs nothing.
set -uo pipefail

usage() {
  cat <<'TEXT'
usage: experiments/run_gpu.sh OUT_DIR [--model PATH] [--data PATH] [--limit PART=SECONDS] [--rehearse]

  --model, --data  SmolLM2-135M (a folder or .gguf) and the folder with wikitext2/, templama/, ecbd/;
                   without them the part `real` is left out
  --limit          another time limit for a part (repeatable); parts: toy, real, report
  --rehearse       the same with a tiny model, on any machine: shows that everything runs

PYTHON names the interpreter (default: python3), in which gradloc is installed.
TEXT
}

declare -A limit=([toy]=300 [real]=220 [report]=40)
out="" model="" data="" rehearse=""
while [ $# -gt 0 ]; do
  case "$1" in
    --model) model=${2:?--model needs a path} && shift ;;
    --data) data=${2:?--data needs a path} && shift ;;
    --limit)
      [[ "${2:-}" =~ ^([a-z]+)=([0-9]+)$ && -n "${limit[${BASH_REMATCH[1]}]:-}" ]] || {
        echo "--limit ${2:-}: give PART=SECONDS, PART one of ${!limit[*]}" >&2 && exit 2
      }
      limit[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]} && shift
      ;;
    --rehearse) rehearse=yes ;;
    -h | --help) usage && exit 0 ;;
    -*) usage >&2 && exit 2 ;;
    *) [ -z "$out" ] || { usage >&2 && exit 2; } && out=$1 ;;
  esac
  shift
done
[ -n "$out" ] || { usage >&2 && exit 2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$(command -v "${PYTHON:-python3}") || { echo "PYTHON=${PYTHON:-python3}: no such interpreter" >&2 && exit 2; }
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
toy=$here/gpu-toy.yaml
[ -z "$rehearse" ] || toy=$here/gpu-rehearsal.yaml

# A part that runs out of time is no failure: what it finished is kept, the next call goes on.
part() {
  local name=$1 status
  shift
  printf '\n== %s (at most %s s)\n' "$name" "${limit[$name]}"
  timeout --signal=INT --kill-after=20 "${limit[$name]}" "$@"
  status=$?
  case $status in
    0) echo "$name: finished" ;;
    124 | 130 | 137) echo "$name: time is up; the same command goes on" ;;
    *) echo "$name: failed with status $status" && failed=1 ;;
  esac
}

failed=0
part toy "$python" -m gradloc.cli compare "$toy" --output "$out/toy"
if [ -n "$model" ] && [ -n "$data" ]; then
  part real "$python" -m gradloc.cli compare "$here/real.yaml" --output "$out/real" --model "$model" --data "$data"
else
  printf '\n== real: left out, no --model and --data\n'
fi
for run in toy real; do
  [ ! -s "$out/$run/results.jsonl" ] || part report "$python" -m gradloc.cli report "$out/$run"
done
exit $failed
