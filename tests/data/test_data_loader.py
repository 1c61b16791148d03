"""The loader is a pure function of the seed and the batch number."""

from __future__ import annotations

import pickle
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slope.data import BatchLoader, TokenDataset
from slope.data.dataset import HEADER_BYTES
from slope.data.loader import epoch_order

LENGTH = 4


def make_dataset(folder, sequences, rest=0, dtype="uint16"):
    """Token t is t, so that the first token of a sequence tells which one it is."""
    tokens = np.arange(sequences * LENGTH + rest, dtype=dtype)
    path = folder / f"{sequences}-{rest}-{dtype}.bin"
    path.write_bytes(bytes(HEADER_BYTES) + tokens.tobytes())
    return TokenDataset(path, dtype, len(tokens), LENGTH)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


def numbers(batch):
    return (batch["input_ids"][:, 0] // LENGTH).tolist()


def taken(loader, count):
    return [numbers(batch) for batch in islice(loader, count)]


sizes = st.integers(1, 40)


@given(sequences=sizes, batch=st.integers(1, 7), world=st.integers(1, 5), seed=st.integers(0, 9))
def test_ranks_share_the_same_global_batch(folder, sequences, batch, world, seed):
    data = make_dataset(folder, sequences)
    alone = taken(BatchLoader(data, batch * world, seed=seed, shuffle=True), 6)
    ranks = [
        taken(BatchLoader(data, batch, seed=seed, shuffle=True, rank=r, world_size=world), 6)
        for r in range(world)
    ]
    for number, whole in enumerate(alone):
        assert whole == [item for rank in ranks for item in rank[number]]


@given(sequences=sizes, batch=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_every_epoch_is_a_permutation(folder, sequences, batch, seed):
    loader = BatchLoader(make_dataset(folder, sequences), batch, seed=seed, shuffle=True)
    epochs = 3
    stream = [i for rows in taken(loader, -(-epochs * sequences // batch)) for i in rows]
    orders = [stream[e * sequences : (e + 1) * sequences] for e in range(epochs)]
    assert all(sorted(order) == list(range(sequences)) for order in orders)
    assert orders == [epoch_order(seed, e, sequences).tolist() for e in range(epochs)]
    if sequences > 20:
        assert orders[0] != orders[1] != orders[2]


@given(sequences=sizes, batch=st.integers(1, 7), stop=st.integers(0, 60), world=st.integers(1, 3))
def test_resume_at_any_batch(folder, sequences, batch, stop, world):
    data = make_dataset(folder, sequences)
    options = {"seed": 3, "shuffle": True, "rank": world - 1, "world_size": world}
    unbroken = taken(BatchLoader(data, batch, **options), stop + 3)
    loader = BatchLoader(data, batch, **options)
    taken(loader, stop)
    state = loader.state_dict()
    assert state["batches"] == stop
    resumed = BatchLoader(data, batch, **options)
    resumed.load_state_dict(state)
    assert taken(resumed, 3) == unbroken[stop:]
    assert taken(BatchLoader(data, batch, start_batch=stop, **options), 3) == unbroken[stop:]
    assert taken(loader, 3) == unbroken[stop:]  # a new iterator of the old loader goes on too


@given(
    sequences=sizes,
    rest=st.integers(0, LENGTH - 1),
    batch=st.integers(1, 7),
    world=st.integers(1, 5),
)
def test_validation_reads_all_once_in_order(folder, sequences, rest, batch, world):
    data = make_dataset(folder, sequences, rest)
    loaders = [
        BatchLoader(data, batch, seed=0, shuffle=False, rank=r, world_size=world)
        for r in range(world)
    ]
    passes = [[numbers(b) for b in loader] for loader in loaders]
    assert [[numbers(b) for b in loader] for loader in loaders] == passes
    assert [len(p) for p in passes] == [len(loader) for loader in loaders]
    assert max(map(len, passes)) - min(map(len, passes)) <= 1
    longest = max(map(len, passes))
    stream = [i for number in range(longest) for p in passes if number < len(p) for i in p[number]]
    assert stream == list(range(sequences))
    assert all(rows for p in passes for rows in p)


def test_a_broken_validation_pass_starts_again(folder):
    loader = BatchLoader(make_dataset(folder, 10), 3, seed=0, shuffle=False)
    assert taken(loader, 2) == taken(loader, 2) == [[0, 1, 2], [3, 4, 5]]


def test_resume_with_another_number_of_processes(folder):
    data = make_dataset(folder, 30)
    two = BatchLoader(data, 2, seed=5, shuffle=True, world_size=2)
    taken(two, 6)  # 24 sequences
    one = BatchLoader(data, 4, seed=5, shuffle=True)
    one.load_state_dict(two.state_dict())
    unbroken = BatchLoader(data, 4, seed=5, shuffle=True)
    assert taken(one, 4) == taken(unbroken, 10)[6:]


def test_state_of_another_run_is_refused(folder):
    data = make_dataset(folder, 30)
    loader = BatchLoader(data, 4, seed=5, shuffle=True)
    taken(loader, 3)
    state = loader.state_dict()
    with pytest.raises(ValueError, match="made with seed=5, this run has seed=6"):
        BatchLoader(data, 4, seed=6, shuffle=True).load_state_dict(state)
    with pytest.raises(ValueError, match="sequences=30, this run has sequences=31"):
        other = make_dataset(folder, 31)
        BatchLoader(other, 4, seed=5, shuffle=True).load_state_dict(state)
    with pytest.raises(ValueError, match="12 sequences, which is not a whole number"):
        BatchLoader(data, 5, seed=5, shuffle=True).load_state_dict(state)


def test_bad_arguments_are_named(folder):
    data = make_dataset(folder, 5)
    for wrong, text in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"seed": -1}, "seed=-1"),
        ({"start_batch": -1}, "start_batch=-1"),
    ):
        options = {"batch_size": 2, "seed": 0, "shuffle": True, **wrong}
        with pytest.raises(ValueError, match=text):
            BatchLoader(data, **options)
    empty = TokenDataset(data.path, "uint16", 2, LENGTH)
    with pytest.raises(ValueError, match="holds no sequence"):
        BatchLoader(empty, 2, seed=0, shuffle=True)
    with pytest.raises(TypeError, match="endless"):
        len(BatchLoader(data, 2, seed=0, shuffle=True))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_dataset_items(folder, dtype):
    data = make_dataset(folder, 5, rest=3, dtype=dtype)
    assert len(data) == 5
    assert data.tokens.shape == (23,)
    torch.testing.assert_close(data[1], torch.tensor([4, 5, 6, 7]), rtol=0, atol=0)
    assert torch.equal(data[-1], data[4])
    assert torch.equal(data.batch([3, 0]), torch.stack([data[3], data[0]]))
    with pytest.raises(IndexError, match="5 sequences"):
        data[5]
    carried = pickle.dumps(data)
    assert len(carried) < 1000
    assert torch.equal(pickle.loads(carried)[2], data[2])


def test_the_order_is_the_same_on_every_machine_and_version():
    assert epoch_order(1111, 0, 8).tolist() == [0, 5, 1, 4, 2, 7, 6, 3]
    assert epoch_order(1111, 1, 8).tolist() == [0, 7, 4, 5, 1, 6, 3, 2]
