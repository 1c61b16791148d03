#!/usr/bin/env bash
#SBATCH --job-name=slope
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#
# Submit from the repository root; every argument goes to the training command:
#
#   sbatch --nodes=2 scripts/run_jobs_slurm.sh experiment=owt/gpt2s pruner=slope name=my-run
#
# Five minutes before the time is up this script gets SIGUSR1 and passes it on: the run saves and
# ends, and the job goes back into the queue, as often as it takes. A preempted job gets SIGTERM,
# saves as well, and SLURM requeues it. Either goes on where it stopped, bit for bit. A run that
# fails is not requeued.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this file with sbatch}"
export PATH="$PWD/.venv/bin:$PATH"

# One task per GPU: Lightning reads ranks, nodes and the first node's address from SLURM. A process
# that fails ends the others.
srun --kill-on-bad-exit=1 python training/run.py \
  trainer.devices="$SLURM_NTASKS_PER_NODE" trainer.num_nodes="$SLURM_NNODES" resume=True "$@" &
run=$!

time_is_up=no
trap 'time_is_up=yes; kill -USR1 "$run"' USR1
code=0
wait "$run" || code=$?
# The signal ends wait, not the run.
while kill -0 "$run" 2>/dev/null; do
  code=0
  wait "$run" || code=$?
done

if [[ $time_is_up == yes && $code != 0 ]]; then
  echo "time is up; requeueing job $SLURM_JOB_ID"
  exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
