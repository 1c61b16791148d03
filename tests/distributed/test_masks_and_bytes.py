"""On four gloo processes: column masks from shards, masks compared, gradient bytes counted."""

from __future__ import annotations

import json

import masks_worker
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from slope.integrations.lightning import MaskCheck

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    mp.spawn(masks_worker.worker, args=(str(folder),), nprocs=masks_worker.WORLD)
    ranks = range(masks_worker.WORLD)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in ranks]


@pytest.mark.parametrize("mesh", masks_worker.MESHES)
def test_column_masks_from_shards_are_those_of_the_whole_layer(found, mesh):
    for rank in found:
        assert rank["refresh"][mesh] == [True] * len(masks_worker.LAYERS)


def test_masks_that_differ_are_named_on_every_rank(found):
    said = (
        "masks differ between processes: body.0: metadata of rank 1, body.1: column_mask of rank "
        "1, 3 is not that of rank 0. The processes no longer train the same model; "
    )
    for rank in found:
        equal, differ = rank["errors"][:4], rank["errors"][4:]
        assert equal == [""] * 4
        assert differ[0].startswith(said)
        named = said.replace("body", "model.body")
        assert differ[1].startswith(f"step 20: {named}")  # the callback, where it is due
        assert differ[2:] == ["", ""]  # within a step, and between two comparisons


def test_a_comparison_every_so_often():
    with pytest.raises(ValueError, match="check_masks_every_n_steps=-1 must be a number of optim"):
        MaskCheck(-1)


def test_gradients_on_the_wire_are_n_of_m(found):
    for rank in found:
        dense, half, quarter = rank["wire"]
        for layer in ("body.0", "body.1"):
            assert half[f"{layer}.values"] * 2 == dense[f"{layer}.weight"]
            assert quarter[f"{layer}.values"] * 4 == dense[f"{layer}.weight"]
        assert half["body.2.weight"] == dense["body.2.weight"] == 16 * 32 * 4
        assert half["body.1.bias"] == dense["body.1.bias"]
