"""What four gloo processes do for ``test_masks_and_bytes``; each writes down what it found."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import slope
from slope.bench.wire import gradient_bytes
from slope.integrations.agreement import check_masks
from slope.integrations.lightning import MaskCheck

WORLD = 4
# (d_out, pattern): shares of 8 rows in whole groups; shares of 4; of 3 and 6 that cut groups; the
# last process without a row.
LAYERS = [(32, "2:4"), (16, "2:4"), (12, "2:4"), (24, "2:4"), (6, "1:2")]
MESHES = {
    "fsdp2": lambda: init_device_mesh("cpu", (4,)),
    "hsdp": lambda: init_device_mesh("cpu", (2, 2), mesh_dim_names=("repeated", "sharded")),
}


class Scores(nn.Module):
    """A model called as those of transformers are."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 32), nn.Linear(32, 16))

    def forward(self, x):
        return SimpleNamespace(loss=self.body(x).square().mean())


def sparse_model(pattern="2:4", mask="magnitude"):
    torch.manual_seed(3)
    model = Scores()
    skip = ["body.2"]
    slope.sparsify(model, slope.SparsityConfig(pattern=pattern, mask=mask, skip=skip))
    return model


def refresh(mesh) -> list[bool]:
    """Of each layer: does refreshing from shards choose what the whole layer would?"""
    from torch.distributed.fsdp import fully_shard

    found = []
    for rows, pattern in LAYERS:
        torch.manual_seed(rows)
        whole = slope.SlopeLinear(16, rows, pattern=pattern, column_mask_interval=2)
        sharded = copy.deepcopy(whole)
        stale = torch.zeros_like(whole.column_mask)
        fully_shard(sharded, mesh=mesh)
        with torch.no_grad():
            for values in (whole.values, sharded.values.to_local()):
                values.sub_(0.1)  # other magnitudes than those that the masks are of
            sharded.column_mask.copy_(stale)
        whole.refresh_column_mask()
        slope.SlopeSchedule(10).refresh_masks(sharded, 2)
        found.append(
            torch.equal(whole.column_mask, sharded.column_mask)
            and not torch.equal(stale, whole.column_mask)
        )
    return found


def errors(rank: int) -> list[str]:
    """What comparing masks says: of equal ones, and where two processes are made to differ."""
    said = []
    model = sparse_model()
    layers = dict(model.named_modules())
    trainer = SimpleNamespace(global_step=20, accumulate_grad_batches=2)
    for _ in range(2):
        for check in (
            lambda: check_masks(model),
            lambda: MaskCheck(10).on_train_batch_end(trainer, Wrapped(model), None, None, 39),
            lambda: MaskCheck(10).on_train_batch_end(trainer, Wrapped(model), None, None, 38),
            lambda: MaskCheck(7).on_train_batch_end(trainer, Wrapped(model), None, None, 39),
        ):
            try:
                check()
                said.append("")
            except RuntimeError as error:
                said.append(str(error))
        if rank == 1:
            layers["body.0"].metadata[0, 0] ^= 0b0110
        if rank in (1, 3):
            layers["body.1"].column_mask[5, 1] ^= 1
    return said


class Wrapped(nn.Module):
    """A Lightning module around a model, as far as the callback asks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.device = torch.device("cpu")


def wire() -> list[dict[str, int]]:
    """Bytes of gradients of the dense model and of two compressed ones."""
    counts = []
    for model in (Scores(), sparse_model(), sparse_model("1:4")):
        count = gradient_bytes(model, {"x": torch.randn(4, 16)})
        assert sum(count.bytes.values()) == count.total
        counts.append(dict(count.bytes))
    return counts


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    found = {
        "refresh": {name: refresh(make()) for name, make in MESHES.items()},
        "errors": errors(rank),
        "wire": wire(),
    }
    Path(folder, f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # see ddp_worker
