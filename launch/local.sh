#!/usr/bin/env bash
# Starts N processes on this machine, one for each of its first N GPUs, or N on its cores:
#   launch/local.sh 8 --config configs/maemi.py:paper --config.train.batch=16 \
#     --config.data.manifest=MANIFEST.csv --workdir runs/maemi
# The batches of the recipe must be multiples of N (here 8). All processes end when one ends. The exit code is 0 if all
# succeed, else that of the first process (by number) that failed.
set -euo pipefail
if [[ ${1-} == --help ]]; then
  sed -n '/^set/q; 2,$ s/^# \{0,1\}//p' "$0"
  exit 0
fi
if [[ ! ${1-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: launch/local.sh N --config FILE[:PRESET] ...: N processes, 1 or more" >&2
  exit 2
fi
export JAX_NUM_PROCESSES=$1 JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-1234}
shift
PATH=$PWD/.venv/bin:$PATH
processes=()
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' INT TERM # all processes save the same step
for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
  JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i python -m jmae.train "$@" &
  processes+=($!)
done
code=0
for process in "${processes[@]}"; do
  status=0
  wait "$process" || status=$?
  while ((status > 128)) && kill -0 "$process" 2>/dev/null; do # a signal ended `wait`, not the process
    status=0
    wait "$process" || status=$?
  done
  code=$((code ? code : status))
done
exit "$code"
