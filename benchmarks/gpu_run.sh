#!/usr/bin/env bash
# Everything that a GPU has to show, in at most nine minutes, the most telling first:
#
#     benchmarks/gpu_run.sh [--rehearse] [--from STEP]
#
# Steps: check, tests, layers, generate, quantize, summary. Each is a process with a time limit; what it has found is in
# $OUT (benchmarks/results by default) before the next one begins, and a step that fails does not stop the others. The exit
# code is the number of steps that failed. Needs Python with torch, triton, transformers and pytest; no installation of this
# package, no network. PYTHON names another interpreter; LIMIT is the time for everything, in seconds (530).
#
# --rehearse needs no GPU: the same steps with small sizes in Triton's interpreter (benchmarks/rehearse.py), with 20 times the
# time limits, and with a new folder for results unless OUT names one.
set -u
cd "$(dirname "$0")/.." || exit 1
steps=(check tests layers generate quantize summary)
first=check
rehearsal=no
if [ "${1:-}" = --rehearse ]; then rehearsal=yes; shift; fi
if [ "${1:-}" = --from ]; then first=${2:-}; shift 2; fi
if [ $# -gt 0 ] || [[ " ${steps[*]} " != *" $first "* ]]; then
    echo "usage: benchmarks/gpu_run.sh [--rehearse] [--from STEP], STEP one of: ${steps[*]}" >&2
    exit 2
fi
python=("${PYTHON:-python3}")
slower=1
if [ $rehearsal = yes ]; then
    python+=(benchmarks/rehearse.py)
    slower=20
    OUT=${OUT:-$(mktemp -d)}
    echo "a rehearsal: its times mean nothing; results go to $OUT"
fi
export PYTHONPATH="$PWD:$PWD/kernels/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
if [ $rehearsal = yes ]; then PYTHONPATH=$PWD/kernels/tests:$PYTHONPATH; fi
export BENCHMARK_RESULTS=${OUT:-$PWD/benchmarks/results}
mkdir -p "$BENCHMARK_RESULTS" || exit 1
failed=0
summary_seconds=15
end_of_run=$((SECONDS + ${LIMIT:-530} * slower - summary_seconds))

# limited SECONDS LOG COMMAND…: run it, keep its output, and count a failure; never beyond the end of the run
limited() {
    local seconds=$(($1 * slower)) log=$BENCHMARK_RESULTS/$2 left=$((end_of_run - SECONDS))
    shift 2
    if [ "$left" -lt 5 ]; then
        echo "no time is left for $*" | tee "$log"
        return
    fi
    timeout --kill-after=5 "$((seconds < left ? seconds : left))" "$@" 2>&1 | tee "$log"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "FAILED with code $code: $*" | tee -a "$log"
        failed=$((failed + 1))
    fi
}

step() {
    echo "== $1, $(date +%T)"
    case $1 in
    check)
        limited 100 gpu-check.log "${python[@]}" -m transformers_quip doctor
        ;;
    tests) # each function in a process of its own, because a hanging kernel cannot be stopped in another way
        "${python[@]}" -m pytest --collect-only -q -m gpu kernels/tests 2>/dev/null \
            | sed -n 's/\[.*//; /::/p' | awk '!seen[$0]++' > "$BENCHMARK_RESULTS/gpu-tests.txt"
        if [ ! -s "$BENCHMARK_RESULTS/gpu-tests.txt" ]; then
            echo "FAILED: no tests were found"
            failed=$((failed + 1))
        fi
        local end=$((SECONDS + 120 * slower)) number=0
        while read -r test; do
            number=$((number + 1))
            if [ $SECONDS -ge $end ]; then
                echo "no time is left for $test"
                continue
            fi
            limited 45 "gpu-test-$number.log" "${python[@]}" -m pytest -q -x -m gpu -p no:cacheprovider "$test" < /dev/null
        done < "$BENCHMARK_RESULTS/gpu-tests.txt"
        ;;
    layers)
        limited 80 gpu-layers.log "${python[@]}" benchmarks/gpu.py --only layers --minutes 1.2 --name gpu-layers
        limited 25 gpu-experts.log "${python[@]}" benchmarks/gpu.py --only experts --minutes 0.3 --name gpu-experts
        ;;
    generate)
        limited 60 gpu-generate-small.log "${python[@]}" benchmarks/gpu.py --only generate --model smollm2-135m --minutes 0.9 \
            --name gpu-generate-small
        limited 110 gpu-generate-8b.log "${python[@]}" benchmarks/gpu.py --only generate --model llama-3-8b --minutes 1.7 \
            --name gpu-generate-8b
        ;;
    quantize)
        limited 20 gpu-quantize-small.log "${python[@]}" benchmarks/gpu.py --only quantize --model smollm2-135m --minutes 0.3 \
            --name gpu-quantize-small
        limited 40 gpu-quantize-8b.log "${python[@]}" benchmarks/gpu.py --only quantize --model llama-3-8b --minutes 0.6 \
            --name gpu-quantize-8b
        ;;
    summary)
        end_of_run=$((end_of_run + summary_seconds))
        limited 60 gpu-summary.log "${python[@]}" benchmarks/gpu_summary.py
        ;;
    esac
}

reached=no
for name in "${steps[@]}"; do
    [ "$name" = "$first" ] && reached=yes
    [ "$reached" = yes ] && step "$name"
done
echo "== done, $failed failed"
exit "$failed"
