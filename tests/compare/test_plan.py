"""What a comparison consists of, and every mistake in it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from slope import configs
from slope.compare import plan
from slope.training.pruner import check_pruner

SMOKE = "experiment=compare/smoke"
COMPARISONS = {  # methods
    "bert/table_mixed": 7, "bert/table_mixed_small": 7, "bert/table_modules": 3,
    "bert/table_modules_small": 3, "bert/table_ranks": 5, "bert/table_ranks_small": 5,
    "compare/adapters": 45, "compare/column_mask": 6, "compare/gpu": 4, "compare/small": 27,
    "compare/smoke": 3,
}  # fmt: skip


@cache
def whole(name):
    return plan.load([f"experiment={name}", "paths.root=nowhere"])


def with_section(monkeypatch, change):
    """Compose the smoke comparison with its section changed in place."""
    compose = configs.compose

    def changed(overrides):
        cfg = compose(overrides)
        OmegaConf.set_struct(cfg, False)
        change(cfg)
        return cfg

    monkeypatch.setattr(plan.configs, "compose", changed)


def set_key(key, value):
    return lambda cfg: OmegaConf.update(cfg, key, value, merge=False, force_add=True)


def drop_key(name):
    return lambda cfg: cfg.compare.pop(name)


def test_the_comparisons_are_listed_and_composed_by_the_other_tests():
    assert plan.choices() == list(COMPARISONS)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison_composes_and_names_its_methods(name):
    comparison = whole(name)
    assert len(comparison.methods) == COMPARISONS[name]
    assert len(comparison.runs) == len(comparison.methods) * len(comparison.seeds)
    for label, method in comparison.methods.items():
        assert method.panel or label in (comparison.baseline, comparison.reference)
    text = (Path(configs.__file__).parent / "experiment" / f"{name}.yaml").read_text()
    assert f"slope compare experiment={name}\n" in text


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_method_of_a_comparison_is_another_one(name):
    first = whole(name).runs[: COMPARISONS[name]]
    assert len({OmegaConf.to_yaml(run.cfg.pruner) for run in first}) == COMPARISONS[name]


@pytest.mark.parametrize("name", COMPARISONS)
def test_every_method_of_a_comparison_can_be_run(name):
    for run in whole(name).runs[: COMPARISONS[name]]:
        check_pruner(run.cfg.pruner)


def test_runs_of_a_seed_differ_in_the_method_alone(tmp_path):
    comparison = plan.load([SMOKE, f"paths.root={tmp_path}", "name=mine", "trainer.max_steps=7"])
    assert [(run.method, run.seed) for run in comparison.runs] == [
        ("dense", 0), ("slope", 0), ("slope-lora", 0), ("dense", 1), ("slope", 1), ("slope-lora", 1)
    ]  # fmt: skip
    dense, slope, _, dense_1, *_ = comparison.runs
    assert dense.log_dir == tmp_path / "logs/mine/dense/seed0"
    assert dense.cfg.paths.checkpoint_dir == str(tmp_path / "checkpoints/mine/dense/seed0")
    assert (dense.cfg.resume, dense.cfg.compare, dense.steps) == (True, None, 7)
    own = {"name", "paths.log_dir", "paths.checkpoint_dir"}
    one, other = plan.flat(dense.cfg), plan.flat(slope.cfg)
    differ = {key for key in one if one[key] != other[key]} - own
    assert differ == {"pruner.pruned_matrix"}
    one, other = plan.flat(dense.cfg), plan.flat(dense_1.cfg)
    differ = {key for key in one if one[key] != other[key]} - own
    assert differ == {"seed", "pruner.mask_seed"}


def test_select_keeps_the_order_of_the_comparison(tmp_path):
    comparison = plan.load([SMOKE, f"paths.root={tmp_path}"])
    chosen = plan.select(comparison, ["slope-lora", " dense"])
    assert [run.name for run in chosen] == [
        "dense seed 0", "slope-lora seed 0", "dense seed 1", "slope-lora seed 1"
    ]  # fmt: skip
    assert plan.select(comparison, None) == list(comparison.runs)
    message = r"--only: there is no method 'slop'; did you mean 'slope'\? Methods: dense, slope, "
    with pytest.raises(ValueError, match=message):
        plan.select(comparison, ["dense", "slop"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["experiment=demo"],
            r"experiment=demo is one run, `slope train` does it; choose exp.*ada",
        ),
        ([], r"nothing to compare; choose experiment=bert/table_mixed or experiment="),
        ([SMOKE, "seed=3"], r"seed=3 has no meaning .* type 'compare.seeds=\[3\]'"),
        ([SMOKE, "trainer.num_nodes=2"], r"trainer.num_nodes=2: .* one machine; .*--jobs N"),
        ([SMOKE, "trainer.max_step=2"], r"did you mean 'trainer.max_steps'"),
        ([SMOKE, "compare.seeds=[]"], r"compare.seeds=\[\] must be a list of different whole"),
        ([SMOKE, "compare.seeds=[1,1]"], r"compare.seeds=\[1, 1\] must be"),
        ([SMOKE, "compare.seeds=[0.5]"], r"compare.seeds=\[0.5\] must be"),
        ([SMOKE, "compare.baseline=dens"], r"baseline: there is no method 'dens'.*mean 'dense'"),
        ([SMOKE, "compare.reference=slop"], r"reference: there is no method 'slop'.*'slope'"),
        (
            [SMOKE, "compare.methods.slope.overrides=['pruner.patern=1:4']"],
            r"method 'slope': .*did you mean 'pruner.pattern'",
        ),
        (
            [SMOKE, "compare.methods.slope.overrides=['trainer.max_steps=40']"],
            r"method 'slope' changes trainer.max_steps from 20 to 40, but all methods .* share data"
            r".*set it for all \(trainer.max_steps=40\).*may change pruner, train.optimizer",
        ),
        (
            [SMOKE, "compare.methods.slope.overrides=['seed=3']"],
            r"method 'slope' changes pruner.mask_seed|method 'slope' changes seed",
        ),
    ],
)
def test_mistake_on_the_command_line_is_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        plan.load(overrides)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_key("compare", 3), r"compare=3 must be a section with methods and seeds"),
        (set_key("compare.sedes", [1]), r"compare has an unknown key 'sedes'; .* 'seeds'"),
        (drop_key("baseline"), r"compare has no 'baseline'; it needs methods, seeds, baseline"),
        (set_key("compare.methods", {}), r"compare.methods=\{\} must name at least one method"),
        (set_key("compare.methods", ["dense"]), r"compare.methods=\['dense'\] must name"),
        (set_key("compare.methods.slope", "slope"), r"methods.slope='slope' must be a section"),
        (
            lambda cfg: cfg.compare.methods.update({"a/b": {"about": "x", "overrides": []}}),
            r"compare.methods.a/b: a label names a folder; use letters",
        ),
        (set_key("compare.methods.slope.abuot", "x"), r"unknown key 'abuot'; .*'about'"),
        (
            lambda cfg: cfg.compare.methods.slope.pop("overrides"),
            r"compare.methods.slope has no 'overrides'; it needs about, overrides",
        ),
        (
            set_key("compare.methods.slope.overrides", "pruner=slope"),
            r"compare.methods.slope.overrides='pruner=slope' must be a list of texts",
        ),
        (set_key("compare.methods.slope.overrides", [1]), r"overrides=\[1\] must be a list of te"),
    ],
)
def test_bad_section_is_named(monkeypatch, change, message):
    with_section(monkeypatch, change)
    with pytest.raises(ValueError, match=message):
        plan.load([SMOKE])


def leave(run, *, checkpoint=False, summary=False, **changes):
    """Pretend that ``run`` was begun with other settings."""
    cfg = run.cfg.copy()
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    run.log_dir.mkdir(parents=True)
    (run.log_dir / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    if checkpoint:
        folder = Path(run.cfg.paths.checkpoint_dir)
        folder.mkdir(parents=True)
        (folder / "last.ckpt").touch()
    if summary:
        (run.log_dir / "summary.json").write_text("{}")


@pytest.mark.parametrize("kept", ["checkpoint", "summary"])
def test_changed_setting_of_a_run_that_exists_is_an_error(tmp_path, kept):
    words = [SMOKE, f"paths.root={tmp_path}"]
    leave(plan.load(words).runs[1], trainer__max_steps=19, pruner__pattern="1:4", **{kept: True})
    message = (
        r"comparison 'compare-smoke' holds a run of slope seed 0 that was done with "
        r"pruner.pattern=1:4, here it is 2:4; trainer.max_steps=19, here it is 20. "
        r"Type the settings of then, or name=<another>"
    )
    with pytest.raises(ValueError, match=message):
        plan.load(words)
    plan.load([*words, "name=another"])


def test_settings_that_change_no_number_may_change(tmp_path):
    words = [SMOKE, f"paths.root={tmp_path}"]
    leave(plan.load(words).runs[0], checkpoint=True, plot=True, datamodule__num_workers=7)
    leave(plan.load(words).runs[1], trainer__max_steps=19)  # nothing of it is worth keeping
    states = [run.state() for run in plan.load(words).runs]
    assert states == ["begun", "begun", "new", "new", "new", "new"]
