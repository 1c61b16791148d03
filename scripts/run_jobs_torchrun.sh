#!/usr/bin/env bash
# Train on all GPUs of one machine, or of several without a scheduler. From the repository root:
#
#   scripts/run_jobs_torchrun.sh experiment=owt/gpt2s pruner=slope name=my-run
#
# Several machines: the same line on each, with NODES, NODE_RANK (0, 1, …) and MASTER set:
#
#   NODES=2 NODE_RANK=0 MASTER=node0:29500 scripts/run_jobs_torchrun.sh experiment=…
#
# GPUS overrides the number of processes per machine. Started again, it goes on where it stopped; where
# a process dies, torchrun starts all of them again, RESTARTS times (3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PATH="$PWD/.venv/bin:$PATH"

gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
nodes=${NODES:-1}
if ((nodes > 1)); then
  rendezvous=(--node-rank="${NODE_RANK:?set NODE_RANK, 0 on the first machine}"
    --master-addr="${MASTER%:*}" --master-port="${MASTER##*:}")
else
  rendezvous=(--standalone)
fi

exec torchrun --nnodes="$nodes" --nproc-per-node="$gpus" --max-restarts="${RESTARTS:-3}" \
  "${rendezvous[@]}" training/run.py \
  trainer.devices="$gpus" trainer.num_nodes="$nodes" resume=True "$@"
