#!/usr/bin/env bash
# Everything that needs a GPU, in parts of at most nine minutes, the most telling first.
#
#   benchmarks/gpu.sh [--smoke] DATA OUT
#
# DATA is the folder that {root} stands for in evidence.yaml, OUT keeps logs, runs and trained models. A part that ended
# well is not run again, so the script may be stopped and started as often as need be. --smoke makes a few steps of the
# smallest parts, on any machine. PYTHON names the interpreter.
set -u
smoke=""
if [ "${1:-}" = "--smoke" ]; then smoke=yes; shift; fi
if [ $# -ne 2 ]; then echo "usage: benchmarks/gpu.sh [--smoke] DATA OUT" >&2; exit 2; fi
data=$1 out=$2 python=${PYTHON:-python} failed=""
mkdir -p "$out"
cd "$(dirname "$0")/.." || exit 1

part() { # NAME COMMAND...
    local name=$1; shift
    if [ -f "$out/$name.done" ]; then echo "$name: done before"; return; fi
    local started=$SECONDS
    if timeout 540 "$@" > "$out/$name.log" 2>&1; then
        touch "$out/$name.done"
        echo "$name: $((SECONDS - started)) s"
    else
        echo "$name: failed after $((SECONDS - started)) s, see $out/$name.log"
        failed="$failed $name"
    fi
}

cost() { # NAME MODEL OPTIONS...: seconds and memory beside plain fine-tuning
    local name=$1; shift
    part "cost-$name" "$python" benchmarks/accelerator.py "$@" --output "$out/accelerator"
}

case_of() { # NAME: trained models, then UNSC beside its controls and retraining
    part "case-$1" "$python" benchmarks/evidence.py run --root "$data" --output_dir "$out" ${smoke:+--smoke} --case "$1"
}

if [ -n "$smoke" ]; then
    part tests "$python" -m pytest -q tests/trainer/test_gpu.py
    cost llama-1b llama-1b --adapters --layers 1 --tokens 16 --forget 4 --retain 8 --batch 2 --steps 4
    case_of alexnet_fashion_mnist
else
    part tests "$python" -m pytest -q tests/trainer/test_gpu.py
    cost vit-b vit-b --batch 64 --forget 1024 --retain 4096 --read 128 --workers 8
    cost llama-1b llama-1b --adapters
    cost llama-8b llama-8b --adapters --dtype bfloat16
    case_of resnet18_cifar10
    cost vit-b-autocast vit-b --autocast --batch 64 --forget 1024 --retain 4096 --read 128 --workers 8
    case_of alexnet_fashion_mnist
    case_of alexnet_as_published
    case_of allcnn_cifar10
    case_of resnet18_cifar100
    cost vit-l vit-l --batch 32 --forget 512 --retain 2048 --read 64 --workers 8
fi
if [ -n "$failed" ]; then echo "failed:$failed"; exit 1; fi
