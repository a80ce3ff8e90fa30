#!/usr/bin/env bash
# Usage: tools/dist_test.sh CONFIG CHECKPOINT GPUS [arguments of tools/test.py]
# On several machines, run it on each, with NNODES, NODE_RANK, MASTER_ADDR and PORT set as for torchrun.
set -euo pipefail
: "${3:?usage: $0 CONFIG CHECKPOINT GPUS [arguments of tools/test.py]}"
exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" --master_port="${PORT:-29500}" --nproc_per_node="$3" \
    "$(dirname "$0")/test.py" "$1" "$2" --launcher pytorch "${@:4}"
