#!/usr/bin/env bash
# Trains one task with DeepSpeed's launcher, on this host or, with a hostfile, on all that stand in it:
#
#   bash launch/deepspeed.sh mine.yaml --task math train.engine=deepspeed train.engine.stage=3
#   HOSTFILE=hosts bash launch/deepspeed.sh mine.yaml --task math train.engine=deepspeed
#
# A hostfile has a line `HOST slots=DEVICES` for each host. This one reaches them by pdsh and by ssh without a password;
# they have the same folders and environment. NPROC_PER_NODE: ranks on each; all GPUs, or else one, or the slots.
# MASTER_ADDR, MASTER_PORT: the first host, as the others call it, and 29500.
set -euo pipefail

options=(--master_port "${MASTER_PORT:-29500}")
[[ -z ${MASTER_ADDR:-} ]] || options+=(--master_addr "$MASTER_ADDR")
[[ -z ${NPROC_PER_NODE:-} ]] || options+=(--num_gpus "$NPROC_PER_NODE")
[[ -z ${HOSTFILE:-} ]] || options+=(--hostfile "$HOSTFILE")
exec deepspeed "${options[@]}" --module lori_dist train "$@"
