#!/usr/bin/env bash
# Usage: tools/dist_train.sh CONFIG GPUS [arguments of tools/train.py]
# On several machines, run it on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT set as for torchrun.
set -euo pipefail
: "${2:?usage: $0 CONFIG GPUS [arguments of tools/train.py]}"
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" --nproc_per_node="$2" \
    "$(dirname "$0")/train.py" "$1" --launcher pytorch "${@:3}"
