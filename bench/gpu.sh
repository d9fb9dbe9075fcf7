#!/usr/bin/env bash
# What only a GPU can show, in one table: under eight minutes on one H100.
#
#   bench/gpu.sh [FILE]       FILE: JSON lines that the results are appended to, bench/results.jsonl if not given
#
# The most important parts come first. Each has a time limit, and all together have BENCH_GPU_S seconds (470): what is
# cut short or fails is named in the table, with what it had recorded by then, and the next part runs all the same while
# there is time. Compiling ViT-L/14 takes most of it. The whole output of
# part N is in runs/bench_gpu/N.log. PYTHON chooses the interpreter. Exit code: 0, 1 if a part failed, 2 without a GPU.
set -u
cd "$(dirname "$0")/.." || exit 2
results=$(realpath -m "${1:-bench/results.jsonl}")
if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; else PYTHON=python3; fi
fi
if ! "$PYTHON" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)' 2>/dev/null; then
    echo "bench/gpu.sh: torch sees no CUDA device here ($PYTHON); run it on a machine with an NVIDIA GPU" >&2
    exit 2
fi

logs=runs/bench_gpu
mkdir -p "$logs"
: >"$logs/parts.tsv"
deadline=$((SECONDS + ${BENCH_GPU_S:-470}))
number=0
failed=0

count_lines() { if [ -f "$results" ]; then wc -l <"$results"; else echo 0; fi; }

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 before began code outcome left=$((deadline - SECONDS))
    shift 2
    number=$((number + 1))
    before=$(count_lines)
    began=$SECONDS
    if [ "$limit" -gt "$left" ]; then limit=$left; fi
    if [ "$limit" -gt 0 ]; then
        echo "== $number. $name (at most $limit s): $*"
        timeout --kill-after=5 "$limit" "$@" >"$logs/$number.log" 2>&1
        code=$?
    else
        echo "no time was left" >"$logs/$number.log"
        code=none
    fi
    case $code in
    none) outcome="no time left" ;;
    0) outcome=ok ;;
    124 | 137) outcome="timed out" ;;
    *) outcome="failed, exit code $code" ;;
    esac
    if [ "$code" != 0 ]; then failed=1; fi
    tail -n 12 "$logs/$number.log"
    printf '%s\t%s\t%s\t%s\t%s\n' "$name" "$outcome" $((SECONDS - began)) "$before" "$(count_lines)" >>"$logs/parts.tsv"
}

step() { # NAME SECONDS OPTIONS...
    local name=$1 limit=$2
    shift 2
    part "$name" "$limit" "$PYTHON" bench/step.py --results "$results" "$@"
}

bench() { # NAME SECONDS SCRIPT OPTIONS...
    local name=$1 limit=$2 script=$3
    shift 3
    part "$name" "$limit" "$PYTHON" "$script" --results "$results" "$@"
}

step "ViT-L/14 step, batch 512, eager, then compiled" 330 --model vitl14 --batch 512 --mode compiled
bench "clustering head" 60 bench/clustering.py --chunks 2 4 auto
part "tests that need a GPU" 90 "$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu and not (slow or network)"
bench "moments in 8 bits, ViT-L/14" 60 bench/optimizers.py --model vitl14 --batch 32 efficiency.rematerialization.enabled=false
step "ViT-S/14 step, compiled" 80 --batch 256 --mode compiled
step "ViT-S/14 step, CUDA graphs" 80 --batch 256 --mode cudagraphs
bench "evaluations" 40 bench/evaluations.py knn linear attentive --device cuda
bench "loading" 40 bench/loading.py
step "ViT-L/14 step, largest batch, compiled" 240 --model vitl14 --batch 512 --mode compiled --largest-batch

"$PYTHON" - "$logs/parts.tsv" "$results" <<'PYTHON_END'
import json, sys
from pathlib import Path

sys.path.insert(0, "bench")
from results import print_table

path = Path(sys.argv[2])
lines = path.read_text().splitlines() if path.is_file() else []
rows = []
for line in Path(sys.argv[1]).read_text().splitlines():
    name, outcome, seconds, first, last = line.split("\t")
    found = []
    for text in lines[int(first) : int(last)]:
        result = json.loads(text)
        batch = result["settings"].get("batch")
        numbers = [f"{key} {value:.4g}" for key, value in result["numbers"][0].items() if isinstance(value, (int, float))]
        found.append(", ".join([*([f"batch {batch}"] if batch else []), *numbers]))
    rows.append({"part": name, "outcome": outcome, "s": int(seconds), "first row of the result": found[0] if found else ""})
print()
print_table(rows)
PYTHON_END
exit $failed
