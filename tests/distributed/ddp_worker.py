"""Tiny training run that one process, or each of several, does; started by ``test_ddp``."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slope
from slope.methods.evolving import Evolution

STEPS, MICRO_BATCHES, GLOBAL_BATCH = 6, 2, 4
# Interval of the column mask, and whether the row mask evolves.
CASES = {"each-step": (1, False), "every-2": (2, False), "evolving": (1, True)}


def build(interval: int) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).double()
    config = slope.SparsityConfig(adapter_rank=2, column_mask_interval=interval, mask="random")
    slope.sparsify(model, config)
    return model


def train(rank: int, world_size: int, case: str) -> dict[str, torch.Tensor]:
    """Clipped, accumulated AdamW across the adapters' start at step 3 of 6."""
    interval, evolves = CASES[case]
    model = build(interval)
    wrapped: nn.Module = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    evolution = Evolution(interval=2, stop=1.0) if evolves else None
    schedule = slope.SlopeSchedule(STEPS, lora_start=0.5, evolution=evolution)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, fused=True)
    for step in range(STEPS):
        schedule.apply(model, step)
        for micro in range(MICRO_BATCHES):
            seed = torch.Generator().manual_seed(100 * step + micro)
            x = torch.randn(GLOBAL_BATCH, 16, dtype=torch.float64, generator=seed)
            share = GLOBAL_BATCH // world_size
            loss = wrapped(x[rank * share : (rank + 1) * share]).square().mean()
            (loss / MICRO_BATCHES).backward()
        schedule.before_optimizer_step(model, optimizer, step)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    assert slope.adapters_active(model)
    return model.state_dict()


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    for case in CASES:
        torch.save(train(rank, world_size, case), Path(folder) / f"{case}_rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # A gloo thread that asks for the interpreter's lock while that shuts down aborts the process
    # (seen once in some hundred runs); all that counts is written.
    os._exit(0)
