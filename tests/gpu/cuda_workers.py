"""What each process of a test on several GPUs does."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slope

STEPS, GLOBAL_BATCH = 6, 64


def data_parallel(rank: int, world_size: int, folder: str) -> None:
    """Clipped AdamW in bf16 across the adapters' start; writes ``{world_size}_{rank}.pt``."""
    torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl", init_method=f"file://{folder}/{world_size}", rank=rank, world_size=world_size
    )
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(128, 256), nn.Tanh(), nn.Linear(256, 128)).cuda()
    slope.sparsify(model, slope.SparsityConfig(adapter_rank=4, column_mask_interval=2))
    wrapped = DistributedDataParallel(model, device_ids=[rank], find_unused_parameters=True)
    schedule = slope.SlopeSchedule(STEPS, lora_start=0.5)
    # Small, since bf16 rounds otherwise per share and Adam's first steps follow signs alone.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    share = GLOBAL_BATCH // world_size
    for step in range(STEPS):
        schedule.apply(model, step)
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(GLOBAL_BATCH, 128, generator=generator)[rank * share :][:share].cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = (wrapped(x).float() - x).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), Path(folder) / f"{world_size}_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
