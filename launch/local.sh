#!/usr/bin/env bash
# Several processes on this machine, one for each of its first N GPUs, or on its cores:
#   launch/local.sh N --config configs/maemi.py:paper --config.data.manifest=MANIFEST.csv --workdir runs/maemi
# Exit code: that of the first process that ends with another than 0; the others end with it.
set -euo pipefail
export JAX_NUM_PROCESSES=$1 JAX_COORDINATOR_ADDRESS=127.0.0.1:${PORT:-1234}
shift
processes=()
trap 'kill -TERM "${processes[@]}" 2>/dev/null || true' INT TERM # all save the same step
for ((i = 0; i < JAX_NUM_PROCESSES; i++)); do
  JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i python -m jmae.train "$@" &
  processes+=($!)
done
code=0
for process in "${processes[@]}"; do
  status=0
  wait "$process" || status=$?
  while ((status > 128)) && kill -0 "$process" 2>/dev/null; do # a signal ended the waiting, not the process
    status=0
    wait "$process" || status=$?
  done
  code=$((code ? code : status))
done
exit "$code"
