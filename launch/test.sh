#!/usr/bin/env bash
# Sets up what is missing, then checks style and types and runs the tests.
#
#   bash launch/test.sh               all but the slow tests: what CI runs
#   bash launch/test.sh --slow        the slow ones too
#   bash launch/test.sh --fast        for every save: nothing that takes long or starts a cluster
#   bash launch/test.sh --gpu         the tests that need a GPU, and nothing else
#   bash launch/test.sh tests/masks -k magnitude        anything else goes to pytest, which then runs in one process
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

selection="not slow"
case "${1:-}" in
    --slow) selection="" && shift ;;
    --fast) selection="not slow and not ray and not gpu" && shift ;;
    --gpu) selection="gpu" && shift ;;
esac

bash launch/setup.sh
bin=$PWD/.venv/bin
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
# Left by a killed build, a lock stops every later one; no build takes half an hour.
find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +30 -delete 2>/dev/null || true

if [[ $selection == gpu ]]; then
    "$bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "launch/test.sh: --gpu: torch finds no CUDA device, and all of these tests need one; run it where one is" >&2
        exit 1
    }
else
    export CUDA_VISIBLE_DEVICES="" # all other tests are of CPUs, with more ranks than a machine has GPUs
fi

# A process of tests on each core, but none where pytest has arguments: --pdb and -x want a single one.
processes=()
[[ $# -gt 0 || $selection == gpu ]] || processes=(-n logical --maxprocesses 8 --dist loadscope --no-loadscope-reorder)

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
exec "$bin/python" -m pytest -m "$selection" "${processes[@]}" "$@"
