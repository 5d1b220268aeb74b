#!/usr/bin/env bash
# Train under a fixed name, or go on with what a run of that name has saved: the same command, each time a job starts.
#
#   docker/resumable.sh ant-1 --task Isaac-Ant-v0 --algo m3po
#
# Ends with exit code 75 when training was told to stop and has saved; the same command then goes on.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

name="${1:-}"
if [[ ! "$name" =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]]; then
    echo "usage: $0 NAME [OPTION OF train.py]...; NAME: letters, digits, '.', '_' and '-'" >&2
    exit 2
fi
arguments=("${@:2}" --log_root logs --run_name "$name")

# Run folders are logs/<algorithm>/<experiment>/<time>_<name>. One without a checkpoint has nothing to go on with; of
# several, the last one counts.
shopt -s nullglob
checkpoints=(logs/*/*/????-??-??_??-??-??_"$name"/model_*.pt)
if ((${#checkpoints[@]})); then
    arguments+=(--resume "$(dirname -- "${checkpoints[-1]}")")
fi
# an empty volume may have been mounted over it
mkdir -p -- "${TMPDIR:-/tmp}"
exec ./isaaclab.sh -p scripts/train.py "${arguments[@]}"
