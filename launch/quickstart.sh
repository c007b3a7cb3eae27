#!/usr/bin/env bash
# Sets up what is missing, then trains four tasks on this machine's CPU, merges them and evaluates everything.
# Arguments are overrides: bash launch/quickstart.sh adapter.density=0.05 output=/tmp/runs
set -euo pipefail
cd -P "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
export TORCH_EXTENSIONS_DIR="$PWD/.venv/torch_extensions"
exec .venv/bin/lori run configs/quickstart.yaml "$@"
