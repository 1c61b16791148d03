"""Tiny training run that one process, or each of several, does; started by ``test_ddp``."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slope

STEPS, MICRO_BATCHES, GLOBAL_BATCH = 6, 2, 4


def build(interval: int) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)).double()
    config = slope.SparsityConfig(adapter_rank=2, column_mask_interval=interval, mask="random")
    slope.sparsify(model, config)
    return model


def train(rank: int, world_size: int, interval: int) -> dict[str, torch.Tensor]:
    """Clipped, accumulated AdamW across the adapters' start at step 3 of 6."""
    model = build(interval)
    wrapped: nn.Module = model
    if world_size > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    schedule = slope.SlopeSchedule(STEPS, lora_start=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1, fused=True)
    for step in range(STEPS):
        schedule.apply(model, step)
        for micro in range(MICRO_BATCHES):
            seed = torch.Generator().manual_seed(100 * step + micro)
            x = torch.randn(GLOBAL_BATCH, 16, dtype=torch.float64, generator=seed)
            share = GLOBAL_BATCH // world_size
            loss = wrapped(x[rank * share : (rank + 1) * share]).square().mean()
            (loss / MICRO_BATCHES).backward()
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
    for interval in (1, 2):
        state = train(rank, world_size, interval)
        torch.save(state, Path(folder) / f"interval{interval}_rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    # A gloo thread that asks for the interpreter's lock while that shuts down aborts the process
    # (seen once in some hundred runs); all that counts is written.
    os._exit(0)
