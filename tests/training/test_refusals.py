"""What a run refuses, or says, before anything is lost by it."""

from __future__ import annotations

import fcntl
import re
import shutil

import pytest

from slope.training import checkpoint
from slope.training.module import LanguageModule
from slope.training.optim import with_options

PLAIN = ("pruner.add_lora=False", "trainer.val_check_interval=4")


def contents(root):
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name not in ("run.log", "lock")
    }


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["seed=5"], r"is of another run: seed is \d+ in it and 5 here"),
        (["datamodule.val_split_seed=3"], "run: corpus, split or tokenizer are not those that"),
        (
            ["optimizer=lamb"],
            "another run: train.optimizer.name is 'adamw' in it",
        ),
    ],
)
def test_a_resume_that_is_refused_changes_no_file(runs, finished, overrides, text):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    before = contents(runs.root / "logs") | contents(runs.root / "checkpoints")
    with pytest.raises(ValueError, match=text):
        runs.run("name=whole", "resume=True", *overrides)
    assert contents(runs.root / "logs") | contents(runs.root / "checkpoints") == before


def test_options_of_the_optimizer_hold_after_a_resume(runs, caplog):
    runs.run("name=first", "trainer.max_steps=3", *PLAIN)
    results = {}
    for name, option in (
        ("same", "trainer.max_steps=5"),
        ("decay", "train.optimizer.weight_decay=5"),
        ("betas", "train.optimizer.betas=[0.5,0.5]"),
    ):
        shutil.copytree(runs.checkpoints("first"), runs.checkpoints(name))
        runs.run(f"name={name}", "trainer.max_steps=5", "resume=True", option, *PLAIN)
        results[name] = runs.rows(name)[-1]["train/loss"]
    assert len(set(results.values())) == 3
    assert "train.optimizer.weight_decay is 0.1 in it and 5" in caplog.text


def test_options_replace_those_of_a_saved_state():
    saved = {"weight_decay": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    state = {
        "state": {},
        "param_groups": [
            {**saved, "name": "decay", "params": [0], "adam": False},
            {**saved, "name": "no_decay", "params": [1], "weight_decay": 0.0},
        ],
    }
    groups = [{"name": "decay", "weight_decay": 0.0}, {"name": "no_decay", "weight_decay": 0.0}]
    first, second = with_options(state, groups, (0.5, 0.6), 1e-4)["param_groups"]
    assert first["adam"] and "adam" not in second
    for group in (first, second):
        assert (group["weight_decay"], group["betas"], group["eps"]) == (0.0, (0.5, 0.6), 1e-4)
    assert state["param_groups"][0]["weight_decay"] == 0.1


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            ["pruner.lora_start=0.99"],
            "adapters never start.*type pruner.lora_start=0.66, pru",
        ),
        (["trainer.max_steps=1"], "adapters never start.*type pruner.lora_lazy=False"),
        (["pruner.evolve_interval=100"], "the mask never evolves: the first swap would be in step"),
        (["train.scheduler.warmup_steps=3"], "the learning rate never leaves its warm-up of 3"),
    ],
)
def test_what_never_happens_is_said(runs, caplog, overrides, text):
    with caplog.at_level("WARNING", logger="slope"):
        runs.run("name=short", "trainer.max_steps=3", *overrides)
    found = [record.getMessage() for record in caplog.records]
    assert any(re.search(text, message) for message in found), found


def test_a_run_that_fails_before_its_first_step_leaves_its_name_free(runs, monkeypatch):
    def fail(self, batch, number):
        raise RuntimeError("no such kernel")

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModule, "training_step", fail)
        with pytest.raises(RuntimeError, match="no such kernel"):
            runs.run("name=again", "trainer.max_steps=2")
    assert runs.run("name=again", "trainer.max_steps=2")["steps"] == 2


def test_a_run_is_trained_by_one_process_at_a_time(runs):
    folder = runs.root / "logs" / "twin"
    folder.mkdir(parents=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("process 1 on there")
        file.flush()
        with pytest.raises(RuntimeError, match="'twin' is being trained by process 1 on there; wa"):
            runs.run("name=twin", "trainer.max_steps=2")
    assert runs.run("name=twin", "trainer.max_steps=2")["steps"] == 2


def test_a_run_whose_checkpoints_are_gone_says_so(runs, finished):
    shutil.copytree(finished.root / "logs", runs.root / "logs")
    with pytest.raises(ValueError, match="exists already .*its checkpoints are gone, so type anot"):
        runs.run("name=whole")


def test_a_step_to_go_back_to_is_one_that_was_kept(runs, finished):
    shutil.copytree(finished.root, runs.root, dirs_exist_ok=True)
    kept = [checkpoint.step_of(path) or 12 for path in runs.checkpoints("whole").iterdir()]
    earlier = max(step for step in kept if step <= 8)
    text = f"type trainer.max_steps=12 or more, or resume_iter={earlier}\\."
    with pytest.raises(ValueError, match=text):
        runs.run("name=whole", "resume=True", "trainer.max_steps=8")
    with pytest.raises(ValueError, match=r"type trainer.max_steps=12 or more\."):
        runs.run("name=whole", "resume=True", "trainer.max_steps=1")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("pruner.pattern=foo", r"write for example pruner.pattern=2:4"),
        ("pruner.backend=cusparselt", r"pruner.backend=cusparselt needs a GPU, and this run is on"),
    ],
)
def test_values_that_cannot_be(runs, override, text):
    with pytest.raises(ValueError, match=text):
        runs.run("name=wrong", override)
    assert not (runs.root / "checkpoints" / "wrong").exists()


def test_a_percentage_is_no_share(runs):
    with pytest.raises(ValueError, match=r"is outside \[1, 100\); it is the percentage of zeros"):
        runs.run(
            "name=w", "pruner.unstructured_masking=True", "pruner.unstructured_mask_sparsity=0.6"
        )
