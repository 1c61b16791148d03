"""How the processes of a run share its model: Lightning's strategies, chosen by name.

===========  ===================================================================================
``auto``     one process alone, ``ddp`` where there are more
``ddp``      each process has the whole model; gradients are averaged (``optimizer=adamw-zero``
             shares out Adam's moments)
``fsdp2``    parameters, gradients and moments are shared out over all processes, block by block
``hsdp``     shared out over the processes of a node, repeated on each node
===========  ===================================================================================

Sharded ``values`` are DTensors, cut along d_out; metadata and column masks are buffers and whole on
every process. This module knows nothing of files but how to make whole tensors of shards and shards
of whole tensors.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from pytorch_lightning.plugins import DoublePrecision
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from slope.training.hardware import Hardware

STRATEGIES = ("auto", "ddp", "fsdp2", "hsdp")
SHARDED = ("fsdp2", "hsdp")
_PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")
_USE_DDP = "or trainer.strategy=ddp"


def is_sharded(cfg: DictConfig, world_size: int) -> bool:
    """Whether a run's parameters are DTensors: no process can read them whole by itself."""
    return world_size > 1 and str(cfg.trainer.strategy) in SHARDED


def check(cfg: DictConfig, hardware: Hardware) -> None:
    """Refuse what a strategy cannot do, before any work.

    Raises:
        ValueError: naming the setting and what to type instead.
    """
    name = str(cfg.trainer.strategy)
    if name not in STRATEGIES:
        raise ValueError(_unknown(name))
    if not is_sharded(cfg, hardware.world_size):
        return
    given = f"trainer.strategy={name}"
    if name == "hsdp" and (hardware.num_nodes == 1 or hardware.per_node == 1):
        raise ValueError(
            f"{given} shares the model out over the devices of a node and repeats it on each node, "
            f"but trainer.devices={hardware.per_node} trainer.num_nodes={hardware.num_nodes}; type "
            "trainer.strategy=fsdp2."
        )
    for wrong, setting, why, instead in _refusals(cfg, hardware):
        if wrong:
            raise ValueError(f"{given} with {setting}: {why}; type {instead}, {_USE_DDP}.")


def _unknown(name: str) -> str:
    known = ", ".join(STRATEGIES)
    if name.replace("-", "_") in ("tp", "tensor_parallel", "tensor"):
        return (
            f"trainer.strategy={name!r} is not offered: a layer that is cut along d_in has to be "
            "cut at groups of m and at whole bytes of its packed positions, along d_out at groups "
            "of m for the column mask, and every block would wait for two more exchanges; type "
            "trainer.strategy=fsdp2, or hsdp for several nodes."
        )
    near = "; did you mean fsdp2?" if name == "fsdp" else ";"
    return f"trainer.strategy={name!r} is unknown{near} use {known}."


def _refusals(cfg: DictConfig, hardware: Hardware) -> Iterator[tuple[bool, str, str, str]]:
    """What sharding cannot do: whether it is asked for, the setting, why, what to type instead."""
    from slope.training import pruner

    optimizer, pruned = str(cfg.train.optimizer.name), cfg.pruner
    every = cfg.callbacks.diagnostics.every_n_steps
    yield (
        optimizer == "adamw-zero", "optimizer=adamw-zero", "Adam's moments are shared out already",
        "optimizer=adamw",
    )  # fmt: skip
    yield (
        optimizer == "lamb", "optimizer=lamb",
        "a trust ratio needs the norm of a whole tensor", "optimizer=adamw",
    )  # fmt: skip
    yield (
        str(cfg.model.family) == "bert", "a BERT model", "its head is called beside the model",
        "another model",
    )  # fmt: skip
    yield (
        hardware.precision not in _PRECISIONS, f"trainer.precision={hardware.precision}",
        f"it knows {', '.join(_PRECISIONS)}", "trainer.precision=bf16-mixed",
    )  # fmt: skip
    yield (
        bool(cfg.model.get("compile")),
        "model.compile=True",
        "not tried yet",
        "model.compile=False",
    )
    if not pruner.check_pruner(pruned):
        return
    yield (
        not pruner.is_compressed(pruned), f"pruner.pruned_matrix={pruned.pruned_matrix}",
        "only compressed layers know what to do with a part of their weights",
        "pruner.pruned_matrix=static-weight pruner.reduction_dim=True",
    )  # fmt: skip
    yield (
        bool(pruned.evolve_interval), f"pruner.evolve_interval={pruned.evolve_interval}",
        "a mask evolves with whole layers in view", "pruner.evolve_interval=0",
    )  # fmt: skip
    yield (
        bool(every), f"callbacks.diagnostics.every_n_steps={every}",
        "one process cannot read whole layers", "callbacks.diagnostics.every_n_steps=null",
    )  # fmt: skip


def make(cfg: DictConfig, hardware: Hardware, sleeping: bool) -> str | Strategy:
    """The strategy of a run, for Lightning's trainer.

    Args:
        cfg: checked configuration.
        hardware: where the run is done.
        sleeping: whether adapters sleep at some steps and take no part in the backward.
    """
    if hardware.world_size == 1:
        return "auto"
    if is_sharded(cfg, hardware.world_size):
        whole_nodes = str(cfg.trainer.strategy) == "hsdp"
        return ShardedStrategy(hardware, whole_nodes, bool(cfg.trainer.no_sync))
    # Buffers are equal on every process. torch 2.13 has a new name for leaving them alone.
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DDPStrategy(find_unused_parameters=sleeping, **{name: False})


class SameStart(pl.Callback):
    """All processes begin with the same settings, data and step, or none does.

    Args:
        facts: plain values that must be equal everywhere, by what to call them.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self._facts = dict(facts)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before a checkpoint is loaded.

        Raises:
            RuntimeError: on every process, naming what differs.
        """
        if trainer.world_size == 1:
            return
        everyone: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyone, self._facts)
        first = everyone[0]
        for key in sorted({key for facts in everyone for key in facts}):
            for rank, facts in enumerate(everyone):
                if facts.get(key) != first.get(key):
                    raise RuntimeError(
                        f"{key} is {first.get(key)!r} for rank 0 and {facts.get(key)!r} for rank "
                        f"{rank}; all processes need the same command, and folders that all of "
                        "them see (paths.root). A network file system may be late: type the same "
                        "command again."
                    )


def around(hardware: Hardware) -> dict[str, Any]:
    """What Lightning's trainer is told of precision and environment: ``precision``, ``plugins``."""
    plugins: list[Any] = []
    if SLURMEnvironment.detect():
        # The run itself answers SLURM's signals.
        plugins.append(SLURMEnvironment(auto_requeue=False))
    if hardware.precision != "64-true":
        return {"precision": hardware.precision, "plugins": plugins}
    # By name the trainer would refuse doubles for sharded models.
    return {"precision": None, "plugins": [*plugins, DoublePrecision()]}


def rejoin(hardware: Hardware) -> None:
    """Let processes that torchrun has started again find each other, and not those before them.

    torchrun's store outlives its processes, so in it are still the addresses of the dead; whoever
    starts first would call one of them.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or hardware.world_size == 1 or dist.is_initialized():
        return
    store, rank, world_size = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "nccl" if hardware.accelerator == "gpu" else "gloo",
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=world_size,
    )


def save_in_parts(strategy: Strategy) -> None:
    """Hand every process's part of a checkpoint to the trainer's way to files, ungathered."""
    if isinstance(strategy, ShardedStrategy):
        strategy._save_distributed_checkpoint = True

    def save_checkpoint(content: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        strategy.checkpoint_io.save_checkpoint(content, path, storage_options)

    strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes, or over those of a node and repeated on each (HSDP).

    Checkpoints name and number their tensors as every other strategy does, so that any goes on from
    them: whole tensors, gathered by the first process, or parts (:func:`save_in_parts`).

    Args:
        hardware: where the run is done.
        whole_nodes: HSDP.
        no_sync: add up the whole gradients of micro-batches and reduce once per optimizer step;
            else gradients are reduced, and stay sharded, in each micro-batch. HSDP exchanges
            between the nodes once per optimizer step in any case.
    """

    def __init__(self, hardware: Hardware, whole_nodes: bool, no_sync: bool) -> None:
        # Lightning's names: HSDP repeats over the first dimension and shards over the second.
        sizes = (hardware.num_nodes, hardware.per_node) if whole_nodes else (hardware.world_size, 1)
        super().__init__(*sizes, save_distributed_checkpoint=False)
        self._precision = hardware.precision
        self._whole_nodes = whole_nodes
        self._no_sync = no_sync

    def shard(self, model: nn.Module) -> None:
        """Share a model out in place, block by block; once."""
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(model, FSDPModule):
            mesh = self.device_mesh if self._whole_nodes else self.device_mesh["data_parallel"]
            shard(model, mesh, self._precision)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Inside: micro-batches after which the optimizer does not step."""
        assert self.lightning_module is not None
        model: Any = self.lightning_module.model
        switch = None
        if self._no_sync:
            switch = model.set_requires_gradient_sync
        elif self._whole_nodes:
            switch = model.set_requires_all_reduce
        if switch is None:
            yield
            return
        switch(False)
        try:
            yield
        finally:
            switch(True)

    # -- whole tensors -----------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning asks for :meth:`load_optimizer_state_dict`."""
        return True

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None
    ) -> None:
        """Written by the first process, by the trainer's way to files."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """Read by every process, by the trainer's way to files."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this process's part of whole tensors."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
        )

        assert self.model is not None
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole tensors on the first process, nothing on the others; all take part.

        For checkpoints in parts, each process's own.
        """
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        if self._save_distributed_checkpoint:
            return state
        whole = {
            number: {name: _whole(value, self.is_global_zero) for name, value in entry.items()}
            for number, entry in state["state"].items()
        }
        return {**state, "state": whole} if self.is_global_zero else {}

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this process's part of whole tensors; a sleeping adapter still has no state."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: _part(value, parameters[number]) for name, value in entry.items()}
                for number, entry in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def shard(model: nn.Module, mesh: Any, precision: str) -> None:
    """``fully_shard`` each block, the head if it is not tied, and the rest as the root.

    Under bf16-mixed the blocks and the head are gathered in bf16, in which they compute anyway, and
    reduced in fp32. Norms and the root (embeddings) are gathered in fp32, as autocast has them.

    Args:
        model: a model of transformers, sparse or dense.
        mesh: of one dimension, or of two: repeated over the first, sharded over the second.
        precision: as Lightning calls it.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from slope.models import structure, tied_weights

    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    parts = structure(model)
    for name in parts.blocks:
        block = model.get_submodule(name)
        if policy.param_dtype is not None:
            fully_shard(_norms(block), mesh=mesh)
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if parts.head is not None and not tied_weights(model):
        fully_shard(model.get_submodule(parts.head), mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh)


def _norms(block: nn.Module) -> list[nn.Module]:
    """Modules whose own parameters are vectors."""
    own = [(module, list(module.parameters(recurse=False))) for module in block.modules()]
    return [module for module, found in own if found and all(p.ndim < 2 for p in found)]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered by all processes together; any other tensor as it is."""
    sharded: Any = tensor
    gathered: Tensor = sharded.full_tensor() if hasattr(sharded, "full_tensor") else tensor
    return gathered


def _whole(value: Any, keep: bool) -> Any:
    if not torch.is_tensor(value):
        return value
    gathered = whole(value)
    return gathered.cpu() if keep else None


def _part(value: Any, parameter: nn.Parameter) -> Any:
    """The part of a whole tensor that belongs to this process's part of a parameter."""
    if not torch.is_tensor(value) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    # Every process has read the whole: nothing is sent.
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
