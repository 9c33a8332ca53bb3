#!/bin/bash
# Train on several machines under SLURM: sbatch docs/slurm.sh cfg/coco.yml [main.py options]
# One torchrun a machine starts a process a GPU. BATCH_SIZE counts all processes together; learning rates are the
# settings' own. SLURM's signal before the end of the time saves and stops the run, and the job queues itself again:
# --continue goes on where it was, also on another number of processes. Adapt the lines below to your cluster.
#SBATCH --job-name=text-to-image
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --output=slurm-%j.out
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"
source .venv/bin/activate

cfg=${1:?which settings? sbatch docs/slurm.sh cfg/coco.yml}
shift
host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=1

# torchrun hands SIGTERM on to its processes, which finish their step and save.
srun torchrun --nnodes="$SLURM_NNODES" --nproc_per_node="$SLURM_GPUS_ON_NODE" --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d --rdzv_endpoint="$host:29500" \
    main.py --cfg "$cfg" --continue "$@" \
    --set TRAIN.PRECISION bf16 TRAIN.CHANNELS_LAST True TRAIN.GLOBAL_DAMSM True &
training=$!
stop() {
    kill -TERM "$training"
    wait "$training" || true
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap stop TERM
wait "$training"
