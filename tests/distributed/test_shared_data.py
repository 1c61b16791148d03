"""What several processes read: each its share, the exact batch also after a change of their number,
and a token cache that another node has built."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time

import pytest
import ranks
import torch
from tiny_runs import Runs

from slope.data import BatchLoader, cache, prepare

SAME = [
    "trainer.max_steps=6", "trainer.val_check_interval=3", "callbacks.checkpoint.every_n_steps=3",
    "model.config.resid_pdrop=0", "trainer.precision=64-true", "trainer.strategy=ddp",
]  # fmt: skip
MICRO_BATCHES = 2  # of a step, 8 sequences in all
ON = ["resume=true", "resume_iter=3"]


# -- runs ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of one and of two processes, each taken over by the other at step 3; their reads."""
    root = tmp_path_factory.mktemp("shared")
    made = Runs(root, ranks.write_corpus(root / "corpus"))
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def alone(*overrides):
        with ranks.reads_of_training() as reads:
            made.run(*SAME, *overrides)
        return reads

    reads = {"one": alone("name=one")}
    shutil.copytree(made.checkpoints("one"), made.checkpoints("one-two"))
    two = [*made.base, *SAME, "datamodule.batch_size=2"]
    jobs = {"two": [*two, "name=two"], "one-two": [*two, "name=one-two", *ON]}
    ranks.run_on(root, list(jobs.values()), devices=2)
    for number, name in enumerate(jobs):
        files = [root / f"reads_{number}_{rank}.json" for rank in (0, 1)]
        reads[name] = [json.loads(file.read_text()) for file in files]
    shutil.copytree(made.checkpoints("two"), made.checkpoints("two-one"))
    reads["two-one"] = alone("name=two-one", *ON)
    torch.set_num_threads(before)
    return made, reads


def steps(reads):
    """The sequences of each optimizer step; Lightning reads one batch more than it trains on."""
    whole = len(reads) // MICRO_BATCHES
    each = [reads[MICRO_BATCHES * k : MICRO_BATCHES * (k + 1)] for k in range(whole)]
    return [sorted(sum(step, [])) for step in each]


def test_each_rank_reads_its_share_and_no_more(runs):
    _, reads = runs
    first, second = reads["two"]
    assert {len(batch) for batch in first + second} == {2}
    assert len(first) == len(second) == len(reads["one"])
    for batch, a, b in zip(reads["one"], first, second, strict=True):
        assert a + b == batch


@pytest.mark.parametrize(("before", "after"), [("one", "two"), ("two", "one")])
def test_another_number_of_processes_goes_on_at_the_exact_batch(runs, before, after):
    made, reads = runs
    name = f"{before}-{after}"
    found = reads[name] if after == "one" else [sum(b, []) for b in zip(*reads[name], strict=True)]
    assert steps(found)[:3] == steps(reads["one"])[3:6]
    a, b = (made.last(which)["state_dict"] for which in ("one", name))
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, rtol=0, atol=1e-13, msg=key)


def test_a_process_that_sees_no_checkpoint_does_not_start_from_scratch(runs):
    made, _ = runs
    shutil.copytree(made.checkpoints("one"), made.root / "seen-by-0")
    job = [*made.base, *SAME, "name=late", "datamodule.batch_size=2", "resume=true"]
    job.append(f"paths.checkpoint_dir={made.root}/seen-by-{{rank}}")
    text = "the step to go on from is 6 for rank 0 and 0 for rank 1; .* type the same command again"
    with pytest.raises(AssertionError, match=text):
        ranks.run_on(made.root, [job], devices=2)


# -- batches of processes that compute together ----------------------------------------------------


class Numbers:
    """A data set whose examples are their numbers."""

    max_length = 1

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def examples(self, indices, seed, epochs):
        return {"input_ids": torch.as_tensor(indices)[:, None]}


@pytest.mark.parametrize("size", [1, 3, 8, 9, 11, 16])
@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_validation_in_step(size, world_size):
    each = []
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size}
        loader = BatchLoader(Numbers(size), 2, seed=0, shuffle=False, **place)
        each.append(list(loader.in_step()))
    assert len({len(batches) for batches in each}) == 1
    counted = [
        int(number)
        for batches in each
        for batch in batches
        for number in batch["input_ids"].flatten()
        if batch.get("weight", 1)
    ]
    assert sorted(counted) == list(range(size))


# -- a file system that shows late what another node wrote -----------------------------------------


@pytest.fixture
def corpus(tmp_path):
    files = ranks.write_corpus(tmp_path / "corpus")
    return {
        "dataset": "text", "data_files": [str(files)], "tokenizer": "bpe:300", "max_length": 16,
        "val_ratio": 0.2, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip


class SlowView:
    """``open_cache`` on a node that sees what is in a folder only some time after now."""

    def __init__(self, seconds, error):
        self.end, self.error, self.open = time.monotonic() + seconds, error, cache.open_cache

    def __call__(self, directory, key, *, verify=False):
        if time.monotonic() < self.end:
            raise self.error
        return self.open(directory, key, verify=verify)


def while_another_node_builds(settings, patience):
    """Call ``prepare`` while somebody holds the lock of the cache for a moment."""
    from filelock import FileLock

    held = threading.Event()
    lock = FileLock(str(settings["directory"].with_name(f"{settings['directory'].name}.lock")))

    def hold():
        with lock:
            held.set()
            time.sleep(0.2)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        return prepare(settings["corpus"], progress=False, patience=patience)
    finally:
        thread.join()


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("no such folder"), cache.UnusableCacheError("train.bin has 0 bytes")],
    ids=["folder", "files"],
)
def test_a_cache_that_shows_late_is_waited_for(corpus, monkeypatch, caplog, error):
    built = prepare(corpus, progress=False)
    monkeypatch.setattr(cache, "_build", lambda *_: pytest.fail("built again"))
    monkeypatch.setattr(cache, "open_cache", SlowView(0.8, error))
    with caplog.at_level(logging.WARNING, "slope.data"):
        found = while_another_node_builds({"corpus": corpus, "directory": built.cache_dir}, 20)
    assert found.fingerprint == built.fingerprint
    assert "another process is building token cache" in caplog.text
    assert "is built but not to be seen yet; looking again for up to 20 s" in caplog.text


def test_a_cache_that_never_shows_is_an_error_that_says_what_to_do(corpus, monkeypatch):
    built = prepare(corpus, progress=False)
    monkeypatch.setattr(cache, "open_cache", SlowView(60, FileNotFoundError()))
    text = (
        r"is not to be seen from this node after 0.4 s \(no such folder\); that process failed .* "
        r"start again, or type datamodule.cache_dir=<a folder that all nodes see>"
    )
    with pytest.raises(RuntimeError, match=text):
        while_another_node_builds({"corpus": corpus, "directory": built.cache_dir}, 0.4)


def test_a_cache_that_shows_while_it_is_built_again_is_kept(corpus, monkeypatch):
    """Processes of the other node have its files mapped."""
    built = prepare(corpus, progress=False)
    file = built.cache_dir / "train.bin"
    before = file.stat().st_ino
    seen, calls = cache.open_cache, []

    def open_cache(directory, key, *, verify=False):
        calls.append(directory)
        if len(calls) < 3:  # before the lock, and with it
            raise FileNotFoundError(directory)
        return seen(directory, key, verify=verify)

    monkeypatch.setattr(cache, "open_cache", open_cache)
    assert prepare(corpus, progress=False).fingerprint == built.fingerprint
    assert file.stat().st_ino == before
    assert not list(built.cache_dir.parent.glob("*.tmp-*"))
