#!/usr/bin/env bash
# Runs the same command on each host of a TPU pod, here of 16 chips. The batches of the recipe must be multiples of the
# number of chips. jmae[tpu] and the data must be on all hosts:
#   launch/tpu.sh NAME ZONE --config configs/maemi.py:paper --config.train.batch=16 \
#     --config.data.manifest=MANIFEST.csv --workdir /shared/maemi
set -euo pipefail
if [[ ${1-} == --help ]]; then
  sed -n '/^set/q; 2,$ s/^# \{0,1\}//p' "$0"
  exit 0
fi
if (($# < 3)); then
  echo "usage: launch/tpu.sh NAME ZONE --config FILE[:PRESET] ..." >&2
  exit 2
fi
name=$1 zone=$2
shift 2
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd jmae && JAX_NUM_PROCESSES=auto .venv/bin/python -m jmae.train $(printf '%q ' "$@")"
