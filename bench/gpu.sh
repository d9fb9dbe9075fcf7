#!/usr/bin/env bash
# What only a GPU can show, in one table: under eight minutes on one H100.
#
#   bench/gpu.sh [FILE]       FILE: JSON lines that the results are appended to, bench/results.jsonl if not given
#
# Every part has a time limit; a part that fails is named in the table, and the next one runs all the same. The whole
# output of part N is in runs/bench_gpu/N.log. PYTHON chooses the interpreter. Exit code: 0, 1 if a part failed, 2 without
# a GPU.
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
number=0
failed=0

count_lines() { if [ -f "$results" ]; then wc -l <"$results"; else echo 0; fi; }

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 before began code outcome
    shift 2
    number=$((number + 1))
    before=$(count_lines)
    began=$SECONDS
    echo "== $number. $name (at most $limit s): $*"
    timeout --kill-after=5 "$limit" "$@" >"$logs/$number.log" 2>&1
    code=$?
    case $code in
    0) outcome=ok ;;
    124 | 137) outcome="timed out" ;;
    *) outcome="failed, exit code $code" ;;
    esac
    if [ "$code" -ne 0 ]; then failed=1; fi
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

step "ViT-S/14 step, eager" 35 --batch 256
step "ViT-S/14 step, compiled" 60 --batch 256 --mode compiled
step "ViT-S/14 step, CUDA graphs" 60 --batch 256 --mode cudagraphs
step "ViT-L/14 step, largest batch, compiled" 165 --model vitl14 --batch 512 --mode compiled --largest-batch
bench "clustering head" 40 bench/clustering.py --chunks 2 4 auto
bench "loading" 35 bench/loading.py
bench "evaluations" 30 bench/evaluations.py knn linear attentive --device cuda
part "tests that need a GPU" 50 "$PYTHON" -m pytest -q -p no:cacheprovider -m "gpu and not (slow or network)"

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
