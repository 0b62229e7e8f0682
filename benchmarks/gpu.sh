#!/usr/bin/env bash
# Everything that needs a GPU, in one run: build, tests, compute-sanitizer, benchmarks, and a table last.
#
#   benchmarks/gpu.sh [--quick] [--tune | --models] [--dry-run]
#
#   --quick    without torch.compile and with fewer shapes: at most 4 minutes, else at most 9 (on 16 cores)
#   --tune     in place of all but the build: batch norm in launches that overlap, and in one, by size of tensor,
#              into <card>-<date>-tune.json; at most 9 minutes
#   --models   in place of all but the build: other models, batches and stock variants than in the whole run,
#              into <card>-<date>-models.json; at most 9 minutes
#   --dry-run  what a machine without a GPU can do, and what such a machine does anyway: compile for sm_90a,
#              report each kernel's registers and spills, and run every command line on the CPU at toy sizes
#
# A stage that fails or runs out of time does not stop the later ones; the exit status is then 1. Writes
# <card>-<date>.json and .log into $OUT (default: benchmarks/results). $PYTHON (default: python3) needs torch,
# pybind11, CMake, ninja and pytest; nothing is installed. The library is built in place, for this card alone.
# Needs bash 5, nvcc and compute-sanitizer.
set -euo pipefail

quick='' tune='' models='' dry_run=''
for word in "$@"; do
    case $word in
        --quick) quick=yes ;;
        --tune) tune=yes ;;
        --models) models=yes ;;
        --dry-run) dry_run=yes ;;
        -h | --help)
            sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p}' "$0"
            exit
            ;;
        *)
            echo "gpu.sh: unknown argument '$word'; there are --quick, --tune, --models, --dry-run and --help" >&2
            exit 2
            ;;
    esac
done

results=${OUT:+$(realpath -m "$OUT")}
python=$(realpath -s "$(command -v "${PYTHON:-python3}")")
cd "$(dirname "$0")/.."
results=${results:-$PWD/benchmarks/results}
export PATH=${python%/*}:$PATH:/usr/local/cuda/bin PYTHONPATH=$PWD
if ! command -v nvcc >/dev/null; then
    echo "gpu.sh: there is no nvcc on the PATH" >&2
    exit 2
fi
scratch=$PWD/build/gpu
rm -rf "$scratch"
mkdir -p "$scratch" "$results"

# ---------------------------------------------------------------------------------------------------------
# the card

query=name,compute_cap,memory.total
if card=$(nvidia-smi -i 0 --query-gpu="$query" --format=csv,noheader,nounits 2>/dev/null); then
    IFS=, read -r name capability memory <<<"${card//, /,}"
    echo "$name"
else
    name=dry-run capability=9.0 memory=0 dry_run=yes
    echo "nvidia-smi finds no GPU: a dry run"
fi
architecture=${capability/./}
[[ $architecture != 90 ]] || architecture=90a
batch=$((memory > 60000 ? 256 : 64))
budget=530
[[ -z $quick ]] || budget=230
output=$results/$(tr -cs '[:alnum:]\n' - <<<"${name,,}")-$(date +%F)
if [[ -n $dry_run ]]; then
    budget=3600
    output=$PWD/build/gpu-dry-run # its figures are no measurements
    export TORCHDYNAMO_DISABLE=1
fi
[[ -z $models ]] || output+=-models
: >"$output.log"

# ---------------------------------------------------------------------------------------------------------
# stages

declare -A pids=()
failed='' unrun='' passed=ok

# start STAGE LIMIT COMMAND...: beside what runs already, for LIMIT seconds and not past the budget.
start() {
    local stage=$1 limit=$2 left=$((budget - SECONDS))
    shift 2
    if [[ -n $dry_run ]] || ((limit > left)); then limit=$left; fi
    ((limit > 0)) || limit=1
    echo "\$ $*" >"$scratch/$stage.log"
    timeout --kill-after=10 "$limit" "$@" >>"$scratch/$stage.log" 2>&1 </dev/null &
    pids[$stage]=$!
}

# finish STAGE...: waits for them and tells how they ended.
finish() {
    local stage status outcome log last ended seconds began=$EPOCHSECONDS
    for stage in "$@"; do
        status=0
        wait "${pids[$stage]}" || status=$?
        log=$scratch/$stage.log
        ended=$(stat -c %Y "$log") # with its last word
        case $status in
            0) outcome=$passed ;;
            124 | 137) outcome="FAILED, out of time" failed=yes ended=$EPOCHSECONDS ;;
            *) outcome="FAILED with status $status" failed=yes ;;
        esac
        seconds=$((ended - began))
        last=$(tail -n 1 "$log" | tr -d '\t' | cut -c 1-80)
        cat "$log" >>"$output.log"
        printf '%s\t%s\t%s\t%s\n' "$stage" "$outcome" "$seconds" "$last" >>"$scratch/stages.tsv"
        printf '%-20s %4s s  %-8s %s\n' "$stage" "$seconds" "$outcome" "$last"
        [[ $outcome != FAILED* ]] || tail -n +2 "$log" | tail -n 12 | cut -c 1-160 | sed 's/^/    | /'
        [[ $outcome != checked ]] || unrun+=" $stage"
    done
    report >/dev/null || true # so that a run that is killed has left something
}

report() {
    "$python" benchmarks/gpu_report.py "$scratch" --json "$output.json" ${dry_run:+--kernels}
}

# The table, and whether all went well.
conclude() {
    echo
    report || failed=yes
    [[ -z $unrun ]] || echo "For want of a GPU only the command lines were checked of:$unrun"
    [[ -z $failed ]]
}

trap 'jobs -p | xargs -r kill; exit 130' INT TERM

# ptxas reports only what it compiles, and a library of an earlier build would be taken for this one.
rm -f build/*/CMakeFiles/_C.dir/csrc/cuda/*.o fastres/_C*.so
start build 240 env FASTRES_CUDA=on FASTRES_CUDA_ARCHS="$architecture" \
    NVCC_APPEND_FLAGS='-Xptxas=-v -lineinfo' "$python" setup.py -q build_ext --inplace
finish build
if [[ -n $tune ]]; then
    tuning=("$python" benchmarks/tune.py --device cuda --json "$output-tune.json")
    if [[ -n $dry_run ]]; then
        passed=checked
        tuning+=(--device cpu --batches 1 --dtypes fp32 --seconds 0.01)
    fi
    start tune 500 "${tuning[@]}"
    finish tune
    sed -n '2,$p' "$scratch/tune.log"
    [[ -z $failed ]]
    exit
fi
# In a dry run the last word on each option is a small one.
small=() toy=()
if [[ -n $dry_run ]]; then
    small=(--device cpu --batch 1 --seconds 0.01 --threads 1)
    toy=(--device cpu --model cifar_resnet20 --batch 2 --image-size 32 --repeat 2 --threads 1)
fi
bench=("$python" -m fastres bench --device cuda --dtype bf16 --repeat 20)

# step STAGE ARGUMENT...: of `fastres bench`, to the end.
step() {
    local stage=$1
    shift
    start "$stage" 150 "${bench[@]}" "$@" --json "$scratch/$stage.json" "${toy[@]}"
    finish "$stage"
}

if [[ -n $models ]]; then
    [[ -z $dry_run ]] || passed=checked
    graph=(--cuda-graph)
    [[ -z $dry_run ]] || graph=() # which the CPU has none of
    step resnet50-graph --model resnet50 --batch 32 "${graph[@]}" --against eager,compile-reduce-overhead
    for model in resnet152 resnext50_32x4d resnet101; do
        step "$model-train" --model "$model" --batch "$((batch / 2))" --against eager,compile
    done
    # Stock at its best: batch norms folded into the weights.
    export TORCHINDUCTOR_FREEZING=1
    for images in 1 32 "$batch"; do
        # Of few images max-autotune replays a graph, too.
        if ((images > 32)); then graph=(); fi
        step "resnet50-infer-$images" --model resnet50 --mode infer --batch "$images" "${graph[@]}" \
            --against eager,compile-max-autotune
    done
    conclude
    exit
fi
start doctor 60 "$python" -m fastres doctor
finish doctor
if command -v cuobjdump >/dev/null && command -v nvdisasm >/dev/null; then
    start kernels 60 "$python" benchmarks/cuda_kernels.py --json "$output-kernels.json"
    finish kernels
fi

mapfile -t files < <(grep -lw device tests/test_*.py)
tests=("$python" -m pytest -m cuda -p no:cacheprovider --tb short "${files[@]}")
if [[ -n $dry_run ]]; then
    passed=checked
    start tests 0 "${tests[@]}" --collect-only
else
    # A test that hangs tells where, and one after which there is no time left is the last one.
    start tests 180 "${tests[@]}" --stop-after 160 -o faulthandler_timeout=60
fi
finish tests

# Speed: one after the other.
bandwidth=("$python" benchmarks/bandwidth.py --device cuda --batch "$batch" --seconds 1)
shapes=(--dtypes bf16 fp16 fp32 --all-shapes)
against=eager,compile
if [[ -n $quick ]]; then
    shapes=(--dtypes bf16)
    against=eager
fi
start channels_last 90 "${bandwidth[@]}" "${shapes[@]}" --json "$scratch/channels_last.json" "${small[@]}"
finish channels_last
start contiguous 30 "${bandwidth[@]}" --dtypes bf16 --contiguous --json "$scratch/contiguous.json" "${small[@]}"
finish contiguous
for model in resnet50 resnet18; do
    for mode in train infer; do
        step "$model-$mode" --model "$model" --mode "$mode" --batch "$batch" --against "$against"
    done
done
start profile 90 "$python" -m fastres profile --device cuda --dtype bf16 --model resnet50 --batch "$batch" \
    --json "$output-profile.json" "${toy[@]}"
finish profile

# What is left of the time: side by side, as nothing here is timed.
cases=("$python" benchmarks/sanitizer_cases.py)
tools=(memcheck racecheck initcheck synccheck)
for tool in "${tools[@]}"; do
    if [[ -n $dry_run ]]; then
        start "$tool" 0 "${cases[@]}" --device cpu
    else
        start "$tool" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 --print-limit 20 "${cases[@]}"
    fi
done
finish "${tools[@]}"
conclude
