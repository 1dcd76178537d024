#!/usr/bin/env bash
# What is to be measured on a GPU, in 12 minutes at most: `bash benchmarks/gpu.sh OUT [tests] [figures] [train]`, all
# three if none is named. Each part has a limit of its own and writes as it goes, so that a cut-off leaves what was done:
#
#   tests     150 s  tests/gpu                                       -> OUT/tests.txt
#   figures   300 s  benchmarks/train_gpu.py                         -> OUT/train_gpu.json
#   train     240 s  BERT-base with recipe=fast, on docstrings       -> OUT/runs/base (metrics.jsonl, report.html)
#
# PYTHON names the interpreter [.venv/bin/python, else python3]. --tiny first tries all of it on a CPU.
set -u
tiny=
[ "${1:-}" = --tiny ] && tiny=1 && shift
out=${1:?usage: bash benchmarks/gpu.sh [--tiny] OUT [tests] [figures] [train]}
shift
parts=${*:-tests figures train}
cd "$(dirname "$0")/.." || exit
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$python")" ] || python=python3
export PYTHONPATH=$PWD

model="model=base precision=bf16 global_batch_size=512 micro_batch_size=256 steps=4000"
prep="max_len=128 tokenizer.vocab_size=16384 passes=4"
sizes=
if [ "$tiny" ]; then
  model="model=tiny model.hidden_size=32 global_batch_size=64 micro_batch_size=32 steps=20"
  prep="max_len=64 tokenizer.vocab_size=1000 tokenizer.sample_mib=1 source.max_documents=2000"
  sizes=--tiny
fi

run_tests() { timeout -k 5 150 "$python" -m pytest -x -q -p no:cacheprovider tests/gpu 2>&1 | tee "$out/tests.txt"; }

run_figures() { timeout -k 5 310 "$python" benchmarks/train_gpu.py $sizes --minutes 5 --out "$out/train_gpu.json"; }

run_train() {
  [ -f "$out/shards/manifest.json" ] ||
    "$python" -m data_prep source=docstrings out="$out/shards" val_fraction=0.02 $prep || return
  # SIGTERM ends it in order, with a checkpoint and its last line of metrics.
  timeout -k 20 240 "$python" -m pretrain.train recipe=fast $model run=base runs_root="$out/runs" \
    data.path="$out/shards" expect.max_len=[] log.every=10 eval.every=250 eval.max_samples=4000 wandb.mode=disabled
  "$python" -m pretrain.report "$out/runs/base"
}

for part in $parts; do
  echo "== $part, $(date +%T)"
  "run_$part"
done
