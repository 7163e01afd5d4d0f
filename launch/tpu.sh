#!/usr/bin/env bash
# A TPU pod, here of 16 chips, which divide the recipe's batches: the same command on each of its hosts, with jmae[tpu]
# and the data on all of them:
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
