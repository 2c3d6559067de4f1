#!/bin/bash
# Slurm: two machines of eight GPUs, until the run is done. Three minutes before its time is up, or when it is preempted,
# the run writes a checkpoint and the job goes back into the queue; it goes on from there.
#   sbatch scripts/launch/slurm.sh CONFIG [KEY=VALUE ...]
#SBATCH --job-name=transformer-vq
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -u
: "${1:?usage: sbatch scripts/launch/slurm.sh CONFIG [KEY=VALUE ...]}"
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
stopped=
trap 'stopped=yes; kill -TERM "$step"' USR1 TERM
srun torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${PROCESSES:-8}" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$head:${PORT:-29500}" \
    -m transformer_vq train "$@" --resume &
step=$!
wait "$step"
code=$?
if [ -n "$stopped" ]; then       # the first wait ended with the signal, before the checkpoint was written
    wait "$step"
    code=$?
    [ "$code" -eq 0 ] || exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
