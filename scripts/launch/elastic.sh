#!/bin/bash
# TorchElastic: a process that dies takes the others with it, and all begin again from the last checkpoint, with as many
# machines as there are then. One line on each of them; HOST is one of their names, the same everywhere:
#   MACHINES=1:4 HOST=node1 scripts/launch/elastic.sh CONFIG [KEY=VALUE ...]
set -u
: "${1:?usage: scripts/launch/elastic.sh CONFIG [KEY=VALUE ...]}"
machines=${MACHINES:-1} processes=${PROCESSES:-gpu}   # of each machine: gpu, all of its GPUs, or a number
exec torchrun --nnodes "$machines" --nproc-per-node "$processes" --max-restarts "${RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-id "${RUN_ID:-transformer-vq}" --rdzv-endpoint "${HOST:-localhost}:${PORT:-29500}" \
    -m transformer_vq train "$@" --resume
