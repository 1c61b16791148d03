"""Two gloo processes train the same model as one process, across the adapters' start."""

from __future__ import annotations

import ddp_worker
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo"
)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    mp.spawn(ddp_worker.worker, args=(2, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("case", ddp_worker.CASES)
def test_two_processes_equal_one_across_the_adapters_start(two_ranks, case):
    states = [torch.load(two_ranks / f"{case}_rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    alone = ddp_worker.train(rank=0, world_size=1, case=case)
    interval, evolves = ddp_worker.CASES[case]
    fresh = ddp_worker.build(interval).state_dict()
    for name, expected in alone.items():
        assert torch.equal(states[0][name], states[1][name]), f"ranks differ in {name}"
        torch.testing.assert_close(states[0][name], expected, rtol=0, atol=1e-12, msg=name)
        if name.endswith(("values", "up")):
            assert not torch.equal(expected, fresh[name]), f"{name} did not train"
        if name.endswith("metadata"):
            assert torch.equal(expected, fresh[name]) is not evolves
