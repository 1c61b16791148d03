#!/usr/bin/env python3
"""The numbers of docs/scaling.md.

Without arguments: tables of what ``slope estimate`` counts, as Markdown. With ``--measure
gpt2/small``: bytes of gradients on the wire between two processes on this machine.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace

MODELS = {"OPT-66B": "opt-66b", "LLaMA-3-70B": "llama3-70b"}
DEVICES = (8, 16, 64, 256, 1024)
STRATEGIES = ("ddp", "fsdp2", "hsdp")


def tables() -> Iterator[str]:
    """Lines of Markdown: state per GPU and bytes per step, dense against compressed."""
    from slope.estimate import parse
    from slope.estimate.memory import training_bytes
    from slope.estimate.shapes import shape_of
    from slope.estimate.traffic import traffic

    for title, name in MODELS.items():
        asked = parse([f"model={name}", "batch=1"])
        model = shape_of(asked)
        yield f"### {title}"
        yield ""
        yield "| GPUs | strategy | state | masks in it | exchange | sent by a GPU | by a host |"
        yield "|---|---|---|---|---|---|---|"
        for devices in DEVICES:
            for strategy in STRATEGIES[:2] if devices == 8 else STRATEGIES:
                request = replace(asked, devices=devices, strategy=strategy)
                sides = (False, True)
                dense, sparse = (training_bytes(model, request, sparse=side) for side in sides)
                before, after = (traffic(model, request, sparse=side) for side in sides)
                cells = [
                    f"{a / 1e9:,.1f} → {b / 1e9:,.1f}"
                    for a, b in (
                        (dense.state, sparse.state),
                        (dense.exchange, sparse.exchange),
                        (before.sent, after.sent),
                        (before.leaving_host, after.leaving_host),
                    )
                ]
                cells.insert(1, f"{sparse.masks / 1e9:.1f}")
                yield f"| {devices} | {strategy} | " + " | ".join(cells) + " |"
        yield ""


def measured(model: str) -> Iterator[str]:
    """Bytes of gradients on the wire for one step of a model on two gloo processes."""
    import torch.multiprocessing as multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_count, args=(model, folder), nprocs=2)
        with open(os.path.join(folder, "found"), encoding="utf-8") as file:
            yield file.read()


def _count(rank: int, name: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from slope import configs
    from slope.bench.wire import gradient_bytes
    from slope.models import build_model
    from slope.training import pruner

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    counts = []
    for choice in ("pruner=none", "pruner=slope"):
        cfg = configs.compose([f"model={name}", choice, "pruner.add_lora=False"])
        torch.manual_seed(0)
        model = build_model(cfg.model, 50257, max_length=16)
        pruner.apply(cfg.pruner, model)
        tokens = torch.randint(50257, (1, 16))
        counts.append(gradient_bytes(model, {"input_ids": tokens, "labels": tokens}))
    dense, sparse = counts
    layers = [name for name in sparse.bytes if name.endswith(".values")]
    a = sum(dense.bytes[layer.removesuffix("values") + "weight"] for layer in layers)
    b = sum(sparse.bytes[layer] for layer in layers)
    if rank == 0:
        with open(os.path.join(folder, "found"), "w", encoding="utf-8") as file:
            file.write(
                f"{name}, {len(layers)} sparse layers: {a:,} bytes dense, {b:,} compressed "
                f"({b / a:.4f}); all gradients: {dense.total:,} and {sparse.total:,} "
                f"({sparse.total / dense.total:.4f})."
            )
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a gloo thread may otherwise abort the interpreter's end


def main() -> None:
    """Print the tables, or measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", metavar="MODEL", help="a model of slope train, as gpt2/small")
    model = parser.parse_args().measure
    print("\n".join(measured(model) if model else tables()))


if __name__ == "__main__":
    main()
