#!/bin/bash
# SLURM: a process for each GPU, all of them started again after a preemption or the time limit.
#
#   sbatch launch/slurm.sh configs/phases/sft.yaml name=first
#
# Change the lines below to what your cluster has. The directory that you submit from, with the data
# and output_dir, lies on a file system that all nodes share.
#SBATCH --job-name=alignjax
#SBATCH --output=%x-%j.log
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
# SIGTERM reaches the processes so many seconds before the time is over: a step, and saving.
#SBATCH --signal=TERM@300
# Again in the queue after a preemption or when a node has failed; one log for all attempts.
#SBATCH --requeue
#SBATCH --open-mode=append
set -u

cd "${SLURM_SUBMIT_DIR:?start this file with sbatch}" || exit 1
# The processes get SIGTERM themselves; the script waits until they have saved.
trap : TERM

# Not --kill-on-bad-exit: the first process to have saved would end the others.
srun --kill-on-bad-exit=0 alignjax run "$@"
status=$?

# Saved after SIGTERM: the same command goes on from there.
if [ "$status" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
