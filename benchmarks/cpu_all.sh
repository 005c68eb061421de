#!/usr/bin/env bash
# Every CPU benchmark, then the tables and plots that show them. For a quiet machine: about 25 minutes on 2 cores.
#   benchmarks/cpu_all.sh [MODEL.gguf]      a second model file to run beside llama.cpp
# A benchmark that fails is named at the end; the others go on.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
failed=()

run() {
    echo "== $*" >&2
    "$python" "$@" || failed+=("$*")
}

run -m turbolm bench kernels --json benchmarks/results/cpu_kernels.json
run -m turbolm bench throughput --json benchmarks/results/cpu_throughput.json
run benchmarks/cpu_vs_llamacpp.py --save ${1:+--model "$1"}
run benchmarks/cpu_context.py --save cpu_context
run benchmarks/cpu_start.py --save cpu_start
run benchmarks/cpu_quality.py --save cpu_quality_smollm2
run benchmarks/cpu_formats.py --save cpu_formats
run benchmarks/convert_start.py --save convert_start
run benchmarks/vs_transformers.py --save vs_transformers
run benchmarks/tables.py
run benchmarks/plots.py

if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
