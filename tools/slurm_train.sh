#!/usr/bin/env bash
# Usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
# The environment sets GPUS (8), GPUS_PER_NODE (8 at most), CPUS_PER_TASK (5) and SRUN_ARGS, which is split at spaces.
set -euo pipefail
: "${4:?usage: $0 PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]}"
gpus=${GPUS:-8} gpus_per_node=${GPUS_PER_NODE:-$((gpus < 8 ? gpus : 8))}
# shellcheck disable=SC2086
exec srun --partition="$1" --job-name="$2" --gres=gpu:"$gpus_per_node" --ntasks="$gpus" --ntasks-per-node="$gpus_per_node" \
    --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    python -u "$(dirname "$0")/train.py" "$3" --work-dir "$4" --launcher slurm "${@:5}"
