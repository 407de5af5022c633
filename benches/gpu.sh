#!/usr/bin/env bash
# Every figure of a GPU's table, in parts that take minutes each. Results are printed and written to OUT as JSON.
#
#   benches/gpu.sh tests                     the test suite, each test that takes a device on the GPU too
#   benches/gpu.sh train ../nanoGPT          tokens/s at 10.7M parameters; GPT-2's shape and its MFU
#   benches/gpu.sh stock ../nanoGPT          config/shakespeare_char.py beside nanoGPT's, whole processes, one pair
#   benches/gpu.sh generate ../nanoGPT       tokens/s of generation
#
# Without a checkout of nanoGPT, ours is measured alone. Set QUILL_CORPORA to the folder of tinyshakespeare.txt.
set -euo pipefail
cd "$(dirname "$0")/.."

part=${1:-} peer=${2:-} device=${DEVICE:-cuda} out=${OUT:-out/bench} python=${PYTHON:-python}
options=("--device=$device" "--data_dir=$out/data" "--out_dir=$out")
if [ -n "$peer" ]; then options+=("--peer=$peer"); fi

prepare() { # ours, and the peer's beside its own script
  local text=$QUILL_CORPORA/tinyshakespeare.txt
  "$python" prepare.py shakespeare_char "--input=$text" "--data_dir=$out/data"
  if [ -n "$peer" ] && [ ! -f "$peer/data/shakespeare_char/train.bin" ]; then
    cp "$text" "$peer/data/shakespeare_char/input.txt"
    "$python" "$peer/data/shakespeare_char/prepare.py"
  fi
}

case $part in
  tests) "$python" -m pytest -q ;;
  train) prepare && "$python" bench.py train "${options[@]}" --pairs=3 ;;
  stock) prepare && "$python" bench.py loss "${options[@]}" --recipe=config/shakespeare_char.py --pairs=1 ;;
  generate) "$python" bench.py generate "${options[@]}" --pairs=3 ;;
  *) sed -n '2,/^set/{/^#/p}' "$0" && exit 2 ;;
esac
