#!/usr/bin/env bash
# Tests and all measurements on a GPU within a time budget, everything into one new folder:
#
#     bash benchmarks/gpu_all.sh OUTPUT [SECONDS] [MODELS]
#
# SECONDS (default 570) bounds the whole. Each part gets its share of what is left and stops by itself;
# one that does not is stopped and leaves what it measured. A part that fails does not end the rest.
# PYTHON names the interpreter, PARTS a selection: PARTS="layer train" bash benchmarks/gpu_all.sh out 300
set -u -o pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ] || [ $# -gt 3 ]; then
  echo "usage: bash benchmarks/gpu_all.sh OUTPUT [SECONDS] [MODELS]" >&2
  exit 2
fi
output=$1
end=$((SECONDS + ${2:-570}))
models=${3:-llama3-8b,opt-6.7b,opt-13b}
python=${PYTHON:-python}
parts=${PARTS:-tests layer decode train infer compiled memory setup lowrank}
if [ -e "$output" ] && [ -n "$(ls -A "$output")" ]; then
  echo "$output holds results already and results are never overwritten; name a new folder." >&2
  exit 2
fi
mkdir -p "$output"
output=$(cd "$output" && pwd)
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
export SLOPE_TUNING_DIR="${SLOPE_TUNING_DIR:-$output/tuning}"  # choices travel with the results
failed=0

# part NAME PERCENT COMMAND...: at most that share of the time left, {} standing for its budget
part() {
  local name=$1 percent=$2 begin=$SECONDS left code
  shift 2
  case " $parts " in *" $name "*) ;; *) return ;; esac
  left=$(((end - SECONDS) * percent / 100))
  if [ "$left" -lt 5 ]; then
    echo "$name no time left" | tee -a "$output/summary.txt"
    return
  fi
  # it starts no case after two thirds of its time, so as to end the one it is in
  timeout -k 15 "$left" "${@//\{\}/$((left * 2 / 3 + 1))}" 2>&1 | tee "$output/$name.log"
  code=$?
  [ "$code" -eq 0 ] || failed=1
  echo "$name exit $code, $((SECONDS - begin)) s of $left" | tee -a "$output/summary.txt"
}

# bench NAME PERCENT EXPERIMENT OPTIONS...
bench() {
  local name=$1 percent=$2 experiment=$3
  shift 3
  part "$name" "$percent" "$python" -c 'import sys; from slope.cli import main; sys.exit(main())' \
    bench "$experiment" --device cuda --budget '{}' --output "$output/$name" "$@"
}

part tests 30 "$python" -m pytest -q -rs -m gpu tests/gpu tests/bench
bench layer 30 layer
part decode 25 "$python" benchmarks/gpu_decode.py --seconds '{}'
bench train 45 train --models "$models" --layers 2
bench infer 35 infer --models "$models" --layers 2
# Compiling takes most of it, so one model and few sizes.
bench compiled 40 infer --models "${models%%,*}" --layers 2 --modes graph --compile \
  --ranks 0,0.015625 --prompt 2048 --tokens 1,16,64
bench setup 40 setup
bench lowrank 50 lowrank
bench memory 100 memory --models "$models"
exit $failed
