#!/usr/bin/env bash
# The commands of docs/real-model.md in one go: trace a real model, train the layers found, evaluate before and after.
#
#   examples/real_model.sh OUT_FOLDER DATA_FOLDER [MODEL]     about 7 minutes on 2 cores; MODEL: an id, a folder or a .gguf file
#   examples/real_model.sh --short OUT_FOLDER DATA_FOLDER     a small random GPT-2 in place of the model, a minute
#
# DATA_FOLDER holds templama/, ecbd/ and wikitext2/ as docs/real-model.md describes.
set -euo pipefail
short=""
if [ "${1:-}" = "--short" ]; then short=yes; shift; fi
if [ $# -lt 2 ]; then sed -n '2,7p' "$0"; exit 2; fi
out=$1 data=$2 model=${3:-}
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python}
if ! "$python" -c "import gradloc" 2>/dev/null; then
  if [ -x "$here/../.venv/bin/python" ]; then python="$here/../.venv/bin/python"; else
    echo "no gradloc in $python: install it (pip install .) or set PYTHON" >&2; exit 2; fi
fi
gradloc() { "$python" -m gradloc.cli "$@"; }
mkdir -p "$out"

# Ordinary text in two parts: one to compare with while tracing, one on which forgetting is measured.
lines=$(wc -l <"$data/wikitext2/valid.txt")
head -n $((lines / 2)) "$data/wikitext2/valid.txt" >"$out/reference.txt"
tail -n +$((lines / 2 + 1)) "$data/wikitext2/valid.txt" >"$out/heldout.txt"

if [ -n "$short" ]; then
  model="$out/small-gpt2"
  "$python" "$here/small_gpt2.py" "$model" --text "$out/reference.txt"
  probes=16 reference=2 steps=6 text=4
else
  [ -n "$model" ] || { echo "which model? give an id, a folder or a .gguf file" >&2; exit 2; }
  probes=96 reference=6 steps=60 text=40
fi
templama=$data/templama/dynamic_templama_p54.jsonl
dates=2019-Q2:2022-Q2
probe_files=("$templama" "new-entities=$data/ecbd/ecbd_2020_2021_np.jsonl" "popular=$data/ecbd/ecbd_popular.jsonl")

"$python" "$here/make_corpus.py" "$out/corpus.txt" --templama "$templama" --dates "$dates" \
  --ecbd "$data/ecbd/ecbd_2020_2021_np.jsonl"

gradloc trace --model "$model" --probes "${probe_files[@]}" --dates "$dates" --max-probes "$probes" \
  --reference "$out/reference.txt" --reference-batches "$reference" --max-length 64 --output "$out/profile.json"

gradloc evaluate --model "$model" --probes "${probe_files[@]}" --dates "$dates" --max-probes "$probes" \
  --text "$out/heldout.txt" --max-text-batches "$text" --max-length 64 --output "$out/before.json"

gradloc train --model "$model" --corpus "$out/corpus.txt" --profile "$out/profile.json" --policy freeze \
  --block-size 64 --batch-size 4 --max-steps "$steps" --lr 1e-4 --output "$out/run" --overwrite

gradloc evaluate --model "$out/run/final" --probes "${probe_files[@]}" --dates "$dates" --max-probes "$probes" \
  --text "$out/heldout.txt" --max-text-batches "$text" --max-length 64 --output "$out/after.json"

"$python" -c "
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
print('the trained model loads with from_pretrained:', sys.argv[1])" "$out/run/final"
