#!/usr/bin/env bash
# Measure quill on a GPU, in parts of less than ten minutes each. A part prints a table at its end, and writes each
# figure to OUT/PART as soon as it has it: as JSON, and what it prints as log.txt. Nothing is downloaded.
#
#   bench/gpu.sh tests                     the test suite; prints how many of its tests ran on the GPU
#   bench/gpu.sh train ../nanoGPT          tokens/s of 10.7M parameters and of GPT-2, and their shares of the card's rates
#   bench/gpu.sh stock ../nanoGPT          nanoGPT's config as shipped, and its recipe with quill: whole processes
#   bench/gpu.sh speedrun                  config/speedrun_gpu.py, 5 seeds: whole processes, and the mean loss
#   bench/gpu.sh best                      config/shakespeare_char_best.py, 5 seeds: the same
#   bench/gpu.sh generate ../nanoGPT       tokens/s of generation, and its share of the memory's bandwidth
#   bench/gpu.sh xl                        tokens/s of training GPT-2 XL with activation checkpointing
#   bench/gpu.sh replay ../nanoGPT         compare the losses of both from the same weights and batches
#   bench/gpu.sh compare variants.txt      rank variants by the loss on the training split's tail; a line of the file is
#                                          what follows `python train.py`
#
# Without a checkout of nanoGPT, quill is measured alone; only replay needs one. Further flags go to `python -m bench`
# (of tests: to pytest), as in bench/gpu.sh xl --compile=False.
# Environment variables: QUILL_CORPORA is the folder of tinyshakespeare.txt, DEVICE the device (cuda), OUT the folder for
# results (out/gpu), PAIRS the number of runs (3; stock and xl 1; speedrun and best 5), PYTHON the interpreter (python);
# for compare, JOBS is the number of runs at a time (4), SEEDS the number of seeds (1), MINUTES the time after which no
# run is started (8). tests, generate and xl need no texts. nanoGPT's prepare.py needs the package requests.
set -euo pipefail

fail() {
  echo "gpu.sh: $1" >&2
  exit 2
}

absolute() { # realpath is not everywhere
  case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac
}

part=${1:-} place='' flags=()
for argument in "${@:2}"; do
  case $argument in --*) flags+=("$argument") ;; *) place=$(absolute "$argument") ;; esac
done
here=$(absolute "$0") device=${DEVICE:-cuda} python=${PYTHON:-python}
results=$(absolute "${OUT:-out/gpu}")
out=$results/$part
[ -z "${QUILL_CORPORA:-}" ] || QUILL_CORPORA=$(absolute "$QUILL_CORPORA")
text=${QUILL_CORPORA:-}/tinyshakespeare.txt
cd "$(dirname "$here")/.."

prepare() { # our dataset, and nanoGPT's in its own folder, which is `place`
  [ -f "$text" ] || fail "QUILL_CORPORA must be the folder of tinyshakespeare.txt"
  [ -z "$place" ] || [ -d "$place/data/shakespeare_char" ] || fail "$place: give a checkout of nanoGPT"
  "$python" prepare.py shakespeare_char "--input=$text" "--data_dir=$results/data"
  if [ -n "$place" ] && [ ! -f "$place/data/shakespeare_char/train.bin" ]; then
    cp "$text" "$place/data/shakespeare_char/input.txt"
    "$python" "$place/data/shakespeare_char/prepare.py"
  fi
}

warm_up() { # config: two steps, so that the files which a whole process reads are no longer on the disk only
  "$python" train.py "$1" "--device=$device" "--data_dir=$results/data" "--out_dir=$out/warm_up" --overwrite=True \
    --max_iters=2 --eval_iters=1 "${@:2}" >/dev/null
}

bench() { # name, number of runs, flags
  "$python" -m bench "$1" "--device=$device" "--data_dir=$results/data" "--out_dir=$out" ${place:+"--peer=$place"} \
    "--pairs=${PAIRS:-$2}" "${@:3}" ${flags[@]+"${flags[@]}"}
}

run_tests() { # which, other arguments of pytest; it exits with 5 if there are none
  "$python" -m pytest -q -rpfE --durations=10 -k "$@" | tee -a "$out/pytest.txt" | sed '/^PASSED/d' || [ $? = 5 ] || failed=1
}

measure() {
  case $part in
    tests) # only the tests that take a device compile: a model takes half a minute
      local failed=0 count
      rm -f "$out/pytest.txt"
      run_tests cuda "${@:2}"
      TORCHDYNAMO_DISABLE=1 run_tests 'not cuda' "${@:2}"
      count=$(grep -cE '^PASSED .*\[(.*-)?cuda[]-]' "$out/pytest.txt" || true)
      echo "$count tests ran on the GPU"
      [ "$count" -gt 0 ] || [ "${device#cuda}" = "$device" ] || fail 'no test ran on the GPU'
      return "$failed"
      ;;
    train)
      prepare
      bench train 3
      ;;
    stock) # the flags are nanoGPT's recipe, whatever config/shakespeare_char.py has
      prepare
      warm_up config/shakespeare_char.py --compile=auto
      bench loss 1 --recipe=config/shakespeare_char.py --max_iters=5000 --lr_decay_iters=5000 --eval_interval=250 \
        --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64 --gradient_accumulation_steps=1 \
        --dropout=0.2 --attention_dropout=0.2 --optimizer=adamw --learning_rate=1e-3 --min_lr=1e-4 --warmup_iters=100 \
        --schedule=cosine --beta1=0.9 --beta2=0.99 --weight_decay=0.1 --grad_clip=1.0 --ema_decay=0 --patience=0
      ;;
    speedrun)
      prepare
      warm_up config/speedrun_gpu.py
      bench loss 5 --recipe=config/speedrun_gpu.py --target=1.4697
      ;;
    best)
      prepare
      warm_up config/shakespeare_char_best.py
      bench loss 5 --recipe=config/shakespeare_char_best.py --target=1.42
      ;;
    generate)
      bench generate 3
      ;;
    xl)
      bench xl 1
      ;;
    replay)
      [ -n "$place" ] || fail 'replay needs a checkout of nanoGPT, as in gpu.sh replay ../nanoGPT'
      prepare
      bench replay 1
      ;;
    compare)
      local variants=$place
      [ -f "$variants" ] || fail "compare needs a file with a variant on each line, as in gpu.sh compare variants.txt"
      place=''
      prepare
      bench compare 1 "$variants" --val_split=train_tail "--jobs=${JOBS:-4}" "--seeds=${SEEDS:-1}" "--minutes=${MINUTES:-8}"
      ;;
  esac
}

case $part in
  tests | train | stock | speedrun | best | generate | xl | replay | compare) ;;
  *)
    sed -n '2,/^set/{/^#/p}' "$here"
    exit 2
    ;;
esac
export PYTHONUNBUFFERED=1
mkdir -p "$out" || fail "$out: can't be written to"
measure "$@" 2>&1 | tee "$out/log.txt"
