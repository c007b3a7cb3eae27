#!/usr/bin/env bash
# Submits a run to a Ray cluster and follows its log, from a folder that needs to hold the configuration and no more:
#
#   RAY_ADDRESS=http://HEAD:8265 bash launch/ray_submit.sh mine.yaml cluster.workers=16 cluster.gpus_per_worker=1
#
# The folder is sent along, so methods of your own in it are found, but neither model nor rows should be in it: these,
# and `output`, are absolute paths that all nodes see. The nodes have lori_dist, or the folder has it. Ctrl-C ends the
# following, not the run; the same command resumes where a run stopped. Where the cluster was started with
# RAY_AUTH_MODE=token, that and RAY_AUTH_TOKEN_PATH are set here too.
set -euo pipefail

exec ray job submit --address "${RAY_ADDRESS:?of the cluster, http://HEAD:8265}" --working-dir . -- \
    python -m lori_dist run "$@" cluster.address=auto
