#!/usr/bin/env bash
# Builds, checks and times on a bare machine with one NVIDIA GPU, in at most LIMIT seconds (590).
# Not yet run on a GPU. Its programs were run on a CPU, at small sizes; the plans say what to expect of a GPU.
#
#     bash benchmarks/gpu.sh                  # all parts, in this order: check demo, infer train (MAEMI), amae memmc_mae
#                                             # ppii simsid (their steps), largest masks anomalies memmc plans
#     bash benchmarks/gpu.sh largest masks    # some, as those that the time did not suffice for
#
# demo: AMAE on phantoms, trained and evaluated. infer: a whole breast volume. anomalies: P-PII's composites. plans: what
# the tables have by then beside the kept plans (benchmarks/results/scaling.json); it takes seconds, which are kept for
# it. A part that fails is said at the end and the others go on. Tables: NAME_gpu.json in $OUT, else in benchmarks/results,
# where other cases stay. SWEEPS=6: PyTorch's loops over the whole volume, too (1 is extrapolated). PYTHON: one that has
# jax and torch for the GPU; else python3 where it has, else build/gpu, a virtual environment that is made.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
parts='check demo infer train amae memmc_mae ppii simsid largest masks anomalies memmc plans'
limit=${LIMIT:-590} to=${OUT:-$root/benchmarks/results} wanted=${*:-$parts}
venv=$root/build/gpu said=() failed=0
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export XLA_PYTHON_CLIENT_PREALLOCATE=false # contestants share the GPU
unset JAX_PLATFORMS

gpu=$(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv) || {
    echo "no NVIDIA GPU here" >&2
    exit 2
}
mkdir -p "$to" && echo "$gpu" | tee "$to/gpu.csv"

# A copy, so that the tables of other machines stay as they are.
scratch=$(mktemp -d)
mkdir "$scratch/tests"
cp -r "$root/benchmarks" "$root/configs" "$scratch" && cp -r "$root/tests/golden" "$scratch/tests"
rm -f "$scratch"/benchmarks/results/*
for name in demo volume throughput masks anomalies memmc; do
    [ ! -f "$to/${name}_gpu.json" ] || cp "$to/${name}_gpu.json" "$scratch/benchmarks/results/$name.json"
done
keep() {
    for file in "$scratch"/benchmarks/results/*.json; do
        [ ! -f "$file" ] || cp "$file" "$to/$(basename "$file" .json)_gpu.json"
    done
    rm -rf "$scratch"
}
trap keep EXIT
trap 'exit 130' INT TERM
cd "$scratch" || exit 2

has_jax() { "$1" -c 'import jax, jmae.evaluate, jmae.train; assert jax.default_backend() == "gpu"' 2>/dev/null; }
has_torch() { "$1" -c 'import torch, transformers; assert torch.cuda.is_available()' 2>/dev/null; }
ready() { command -v "$1" >/dev/null && has_jax "$1" && has_torch "$1"; }
build() {
    python3 -m venv "$venv" && "$venv/bin/pip" install -q --upgrade pip || return
    "$venv/bin/pip" install -q -e "${root}[cuda,bench]"
}
part() { # NAME COMMAND...
    local name=$1 left=$((limit - SECONDS)) least=1 code
    shift
    case " $wanted " in *" $name "*) ;; *) return ;; esac
    [ "$name" = plans ] || left=$((left - 10)) least=20
    printf '\n== %s, %s s left\n' "$name" "$left"
    if [ "$left" -lt "$least" ]; then
        said+=("$name: not run, no time left") failed=1
        return
    fi
    timeout -k 10 -s INT "$left" "$@"
    code=$?
    case $code in
        0) said+=("$name: done") ;;
        3) said+=("$name: not run") ;;
        124 | 137) said+=("$name: stopped, out of time") failed=1 ;;
        *) said+=("$name: FAILED, exit code $code") failed=1 ;;
    esac
}

for python in "${PYTHON:-python3}" "$venv/bin/python"; do ! ready "$python" || break; done
if ! ready "$python"; then
    build
    if ! ready "$python"; then
        echo "build: FAILED: jax or torch does not see the GPU" >&2
        exit 2
    fi
fi
echo "built after $SECONDS s: $(command -v "$python")"

part check "$python" -m benchmarks.volume check
part demo "$python" -m benchmarks.demo
part infer "$python" -m benchmarks.volume infer --sweeps "${SWEEPS:-1}"
part train "$python" -m benchmarks.volume train --batch 6
for system in amae memmc_mae ppii simsid; do
    steps=("$system")
    [ "$system" != simsid ] || steps=("simsid teacher" "simsid student")
    part "$system" "$python" -m benchmarks.throughput --systems paper --rounds 5 --only "${steps[@]}"
done
part largest "$python" -m benchmarks.volume train --batch 0
part masks "$python" -m benchmarks.masks --rounds 3
part anomalies "$python" -m benchmarks.anomalies --step
part memmc "$python" -m benchmarks.memmc steps --batch 64
part memmc "$python" -m benchmarks.memmc scoring --batch 8
part plans "$python" -m benchmarks.against_plan --plans "$root/benchmarks/results/scaling.json" \
    --tables benchmarks/results/{volume,throughput}.json --out benchmarks/results/against_plan.json
printf '\n%s s, tables in %s\n' "$SECONDS" "$to"
printf '%s\n' "${said[@]}"
exit $failed
