#!/usr/bin/env bash
#SBATCH --job-name=slope
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output=slurm-%j.log
#
# Submit from the repository root; every argument goes to the training command:
#
#   sbatch --nodes=2 scripts/run_jobs_slurm.sh experiment=owt/gpt2s pruner=slope name=my-run
#
# Five minutes before the time is up the run gets SIGTERM, saves and ends. The same line submitted
# again goes on from there, bit for bit.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"
export PATH="$PWD/.venv/bin:$PATH"

# One task per GPU: Lightning reads ranks and addresses from SLURM.
srun python training/run.py \
  trainer.devices="$SLURM_NTASKS_PER_NODE" trainer.num_nodes="$SLURM_NNODES" resume=True "$@"
