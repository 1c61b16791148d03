"""Compiled training steps on several GPUs of one machine under DDP: dense and SLoPe, in turns.

    torchrun --nproc-per-node 2 benchmarks/gpu_data_parallel.py --models gpt2-xl,opt-2.7b --layers 6

Each step is timed with its all-reduce and without (``no_sync``), so that the cost of communication
is seen; gradients of sparse layers have half the bytes. Medians over the rounds; speed-ups are
dense / SLoPe of the same round. Process 0 prints.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import os
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slope
from slope.bench import models
from slope.bench.models import ModelCase

CONTENDERS = ("dense", "dense, no all-reduce", "SLoPe", "SLoPe, no all-reduce")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="gpt2-xl")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="sequences of each GPU")
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    for name in options.models.split(","):
        compare(ModelCase(name, options.layers), options, device)
    dist.destroy_process_group()


def compare(case: ModelCase, options: argparse.Namespace, device: torch.device) -> None:
    """Time the contenders and print a table."""
    torch.compiler.reset()
    steps: dict[str, Callable[[], None]] = {}
    sent = {}
    positions = models.batch_of(case, argparse.Namespace(batch=None, seq=None), True)[1]
    length = min(options.seq, positions)
    batch = options.batch * options.seq // length
    for name, config in (("dense", None), ("SLoPe", slope.SparsityConfig())):
        model = models.build(case, length, device, torch.float32, config)
        sent[name] = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        tokens = models.random_tokens(model, batch, length, device)
        # As the training program does it; torch 2.13 has a new name for leaving buffers alone.
        known = inspect.signature(DistributedDataParallel).parameters
        alone = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        wrapped = DistributedDataParallel(model, device_ids=[device.index], **{alone: False})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        forward = torch.compile(wrapped)
        for sync, suffix in ((True, ""), (False, ", no all-reduce")):
            step = functools.partial(take_step, wrapped, forward, optimizer, tokens, sync)
            steps[name + suffix] = step
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds):
        turn = number % len(CONTENDERS)
        for name in CONTENDERS[turn:] + CONTENDERS[:turn]:
            torch.cuda.synchronize()
            dist.barrier()
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(3):
                steps[name]()
            torch.cuda.synchronize()
            times[name].append((time.perf_counter() - begin) / 3 * 1e3)
    if dist.get_rank() == 0:
        report(case, batch, length, times, sent)


def take_step(
    wrapped: DistributedDataParallel,
    forward: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    tokens: torch.Tensor,
    sync: bool,
) -> None:
    """Forward, backward, clipping and fused AdamW; ``forward`` is the compiled ``wrapped``."""
    with nullcontext() if sync else wrapped.no_sync():
        with torch.autocast("cuda", torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def report(
    case: ModelCase, batch: int, length: int, times: dict[str, list[float]], sent: dict[str, int]
) -> None:
    """A line per contender."""
    size = dist.get_world_size()
    print(f"\n## {case.model}, {case.layers} blocks, {size} GPUs, {batch} x {length} tokens each\n")
    print("| | ms (lowest to highest) | times as fast as dense alike | gradients, GB |")
    print("|---|---|---|---|")
    for name, own in times.items():
        kind, _, rest = name.partition(",")
        base = times["dense" + ("," + rest if rest else "")]
        ratio = statistics.median(b / o for b, o in zip(base, own, strict=True))
        spread = f"{statistics.median(own):.1f} ({min(own):.1f} to {max(own):.1f})"
        print(f"| {name} | {spread} | {ratio:.3f} | {sent[kind] / 1e9:.2f} |", flush=True)


if __name__ == "__main__":
    main()
