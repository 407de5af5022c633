#!/usr/bin/env bash
# Measure quill on a GPU, in parts that take minutes each. Results are printed and written as JSON.
#
#   bench/gpu.sh tests                     the test suite; tests that take a device run on the GPU too
#   bench/gpu.sh train ../nanoGPT          tokens/s at 10.7M parameters; GPT-2's shape and its MFU
#   bench/gpu.sh stock ../nanoGPT          config/shakespeare_char.py and nanoGPT's config, whole processes, one pair
#   bench/gpu.sh replay ../nanoGPT         compare the losses of both from the same weights and batches
#   bench/gpu.sh generate ../nanoGPT       tokens/s of generation
#
# Without a checkout of nanoGPT, quill is measured alone; only replay needs one. Environment variables: QUILL_CORPORA is the
# folder of tinyshakespeare.txt, DEVICE the device (cuda), OUT the folder for results (out/bench), PYTHON the interpreter
# (python). nanoGPT's prepare.py needs the package requests.
set -euo pipefail

part=${1:-} peer=${2:-} device=${DEVICE:-cuda} python=${PYTHON:-python}
out=$(realpath -m "${OUT:-out/bench}")
options=("--device=$device" "--data_dir=$out/data" "--out_dir=$out")
if [ -n "$peer" ]; then
  peer=$(realpath -m "$peer")
  options+=("--peer=$peer")
fi
corpora=${QUILL_CORPORA:+$(realpath -m "$QUILL_CORPORA")}
here=$(realpath "$0")
cd "$(dirname "$here")/.."

fail() {
  echo "gpu.sh: $1" >&2
  exit 2
}

prepare() { # our dataset, and nanoGPT's in its own folder
  local text=$corpora/tinyshakespeare.txt
  [ -f "$text" ] || fail "QUILL_CORPORA must be the folder of tinyshakespeare.txt"
  [ -z "$peer" ] || [ -f "$peer/train.py" ] || fail "$peer: there is no train.py; give a checkout of nanoGPT"
  [ -n "$peer" ] || [ "$part" != replay ] || fail "replay needs a checkout of nanoGPT, as in gpu.sh replay ../nanoGPT"
  "$python" prepare.py shakespeare_char "--input=$text" "--data_dir=$out/data"
  if [ -n "$peer" ] && [ ! -f "$peer/data/shakespeare_char/train.bin" ]; then
    cp "$text" "$peer/data/shakespeare_char/input.txt"
    "$python" "$peer/data/shakespeare_char/prepare.py"
  fi
}

case $part in
  tests)
    "$python" -m pytest -q
    ;;
  train)
    prepare
    "$python" -m bench train "${options[@]}" --pairs=3
    ;;
  replay)
    prepare
    "$python" -m bench replay "${options[@]}"
    ;;
  stock)
    prepare
    "$python" -m bench loss "${options[@]}" --recipe=config/shakespeare_char.py --pairs=1
    ;;
  generate)
    "$python" -m bench generate "${options[@]}" --pairs=3
    ;;
  *)
    sed -n '2,/^set/{/^#/p}' "$here"
    exit 2
    ;;
esac
