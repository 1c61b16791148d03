"""Where a run is done: accelerator, devices, nodes, precision, and this process's place in it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.rank_zero import rank_zero_only

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
_SHORT = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}


@dataclass(frozen=True)
class Hardware:
    """Where a run is done."""

    accelerator: str
    devices: int | list[int]
    num_nodes: int
    precision: str

    @property
    def per_node(self) -> int:
        """Processes on one node."""
        return self.devices if isinstance(self.devices, int) else len(self.devices)

    @property
    def world_size(self) -> int:
        """Processes over all nodes."""
        return self.per_node * self.num_nodes


def hardware_of(cfg: DictConfig) -> Hardware:
    """What the ``trainer`` section asks for, as far as this machine has it.

    Raises:
        ValueError: for a value that is wrong, or more devices than there are.
        RuntimeError: if there is no GPU and one is asked for.
    """
    wanted, devices = str(cfg.trainer.accelerator), cfg.trainer.devices
    devices = OmegaConf.to_container(devices) if OmegaConf.is_config(devices) else devices
    nodes = int(cfg.trainer.num_nodes)
    if wanted not in ("auto", "cpu", "gpu", "cuda"):
        raise ValueError(f"trainer.accelerator={wanted!r} is unknown; use auto, cpu or gpu.")
    gpus = torch.cuda.device_count()
    if wanted in ("gpu", "cuda") and not gpus:
        raise RuntimeError(
            f"trainer.accelerator={wanted}, but torch {torch.__version__} finds no GPU; check "
            "nvidia-smi and the torch build, or type trainer.accelerator=cpu."
        )
    accelerator = "gpu" if wanted != "cpu" and gpus else "cpu"
    chosen = _devices(devices, gpus if accelerator == "gpu" else 1)
    count = len(chosen) if isinstance(chosen, list) else chosen
    if accelerator == "gpu" and count > gpus:
        raise ValueError(
            f"trainer.devices={devices}, but this machine has {gpus} GPU(s); type "
            f"trainer.devices={gpus}, or trainer.accelerator=cpu for processes on the CPU."
        )
    if accelerator == "cpu" and isinstance(chosen, list):
        chosen = count
    if nodes < 1:
        raise ValueError(f"trainer.num_nodes={nodes} must be at least 1.")
    precision = _SHORT.get(str(cfg.trainer.precision), str(cfg.trainer.precision))
    if precision == "auto":
        fits = accelerator == "gpu" and torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "bf16-mixed" if fits else "32-true"
    if precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={precision} is unknown; use auto, {', '.join(PRECISIONS)}."
        )
    if precision == "16-mixed" and accelerator == "cpu":  # Lightning would compute in bf16
        raise ValueError(
            f"trainer.precision={cfg.trainer.precision} needs a GPU: on a CPU there is no fp16 "
            "with a loss scaler; type trainer.precision=32-true, or bf16-mixed."
        )
    return Hardware(accelerator, chosen, nodes, precision)


def _devices(devices: Any, everything: int) -> int | list[int]:
    if isinstance(devices, list) and devices:
        return [int(index) for index in devices]
    if str(devices) in ("auto", "-1"):
        return everything
    if str(devices).isdigit() and int(devices) > 0:
        return int(devices)
    raise ValueError(
        f"trainer.devices={devices} is not a number of devices; use 1, 2, … or -1 for all."
    )


def accumulation(cfg: DictConfig, world_size: int) -> int:
    """Micro-batches per optimizer step.

    Raises:
        ValueError: if the global batch is not a whole number of micro-batches of all processes.
    """
    batch = int(cfg.train.global_batch_size)
    micro, nodes = int(cfg.datamodule.batch_size), int(cfg.trainer.num_nodes)
    if batch < 1 or micro < 1 or batch % (micro * world_size):
        at_once = max(1, micro * world_size)
        near = max(1, round(batch / at_once)) * at_once
        raise ValueError(
            f"train.global_batch_size={batch} is no multiple of datamodule.batch_size={micro} x "
            f"trainer.devices={world_size // nodes} x trainer.num_nodes={nodes} = {at_once}; "
            f"try train.global_batch_size={near}."
        )
    return batch // (micro * world_size)


def is_first(hardware: Hardware) -> bool:
    """Whether this process is the first of all; also before the processes know each other.

    torchrun and SLURM tell a process its rank. The bare command is typed on each node, where
    ``NODE_RANK`` is all that tells the nodes apart until Lightning has started the others.
    """
    if "RANK" not in os.environ and "SLURM_PROCID" not in os.environ and hardware.num_nodes > 1:
        node, local = (int(os.environ.get(key, 0)) for key in ("NODE_RANK", "LOCAL_RANK"))
        rank_zero_only.rank = node * hardware.per_node + local
    return bool(rank_zero_only.rank == 0)
