#!/usr/bin/env bash
# A training on a Slurm cluster that survives preemption and the time limit. From the root of the checkout:
#
#   ./isaaclab.sh -p -c pass && mkdir -p logs
#   sbatch docker/slurm_job.sh --task Isaac-Ant-v0 --algo m3po
#   sbatch --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 docker/slurm_job.sh --task Isaac-Ant-v0 --distributed
#
# Arguments are those of train.py. What a site wants besides (partition, account, time) are options of sbatch.
#SBATCH --job-name=m3po
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=logs/slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
set -euo pipefail

saved=75 # training's exit code when it was told to stop and has saved

# The first node is where the processes of a distributed training meet.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
export MASTER_ADDR MASTER_PORT SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"

# One task per GPU, with the variables that torch.distributed reads, and no launcher between: every process gets the
# signals itself, and its exit code is seen. A task that ends first must not take one along that is still saving. The
# number of a job outlasts a requeue, so it names the run.
# shellcheck disable=SC2016
in_task='RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec docker/resumable.sh "$@"'
srun --kill-on-bad-exit=0 bash -c "$in_task" task "slurm-$SLURM_JOB_ID" "$@" &
tasks=$!

# USR1, two minutes before the time limit, reaches this script alone, and is passed on. At a preemption, Slurm sends TERM
# to the tasks itself; this script only has to outlive it.
trap 'interrupted=true; kill -USR1 "$tasks"' USR1
trap 'interrupted=true' TERM

# a signal ends the waiting, not the tasks
interrupted=true
while "$interrupted"; do
    interrupted=false status=0
    wait "$tasks" || status=$?
done

if ((status == saved)); then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
