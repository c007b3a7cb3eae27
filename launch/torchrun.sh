#!/usr/bin/env bash
# Trains one task with torchrun, on this host or, started on each of several hosts, on all of them:
#
#   bash launch/torchrun.sh mine.yaml --task math train.engine=fsdp
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=first.host bash launch/torchrun.sh mine.yaml --task math     # on the first
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=first.host bash launch/torchrun.sh mine.yaml --task math     # on the second
#
# NPROC_PER_NODE: ranks on this host; all its GPUs, or else all its cores. MASTER_PORT: 29500. What is overridden, and
# paths, are the same on all hosts; the results are on the first.
set -euo pipefail

meet=(--standalone)
if ((${NNODES:-1} > 1)); then
    meet=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?of this host, from 0}")
    meet+=(--master-addr "${MASTER_ADDR:?the first host}" --master-port "${MASTER_PORT:-29500}")
fi
exec torchrun "${meet[@]}" --nproc-per-node "${NPROC_PER_NODE:-auto}" -m lori_dist train "$@"
