"""What sharding cannot do is said before any work, with what to type instead."""

from __future__ import annotations

import pytest
import ranks
from tiny_runs import Runs

from slope.training import hardware, program, strategies

FSDP = ["trainer.strategy=fsdp2", "trainer.devices=2", "datamodule.batch_size=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("refusals")
    return Runs(root, ranks.write_corpus(root / "corpus"))


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["trainer.strategy=fsdp"], "'fsdp' is unknown; did you mean fsdp2. use auto, ddp, fsdp2"),
        (["trainer.strategy=tp"], "'tp' is not offered: a layer that is cut along d_in .*=fsdp2"),
        ([*FSDP, "trainer.strategy=hsdp"], "trainer.devices=2 trainer.num_nodes=1; type trainer.s"),
        ([*FSDP, "optimizer=adamw-zero"], "optimizer=adamw-zero: Adam's moments are .* type optim"),
        ([*FSDP, "optimizer=lamb"], "optimizer=lamb: a trust ratio .* type optimizer=adamw, or tr"),
        ([*FSDP, "model.compile=true"], "model.compile=True: .* model.compile=False, or trainer.s"),
        (
            [*FSDP, "pruner=sr-ste"],
            "pruned_matrix=dynamic-weight: .* pruner.pruned_matrix=static-w",
        ),
        ([*FSDP, "pruner.evolve_interval=2"], "evolve_interval=2: .* type pruner.evolve_interval="),
        ([*FSDP, "callbacks.diagnostics.every_n_steps=5"], "every_n_steps=5: .*every_n_steps=null"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_refused_before_any_work(runs, overrides, text):
    with pytest.raises(ValueError, match=text):
        runs.run("name=bad", *overrides)
    assert not (runs.root / "logs").exists() and not (runs.root / "checkpoints").exists()


def test_bert_is_refused(runs):
    cfg = runs.config("name=bad", *FSDP)
    cfg.model.family = "bert"
    with pytest.raises(ValueError, match="with a BERT model: its head .* or trainer.strategy=ddp"):
        strategies.check(cfg, hardware.hardware_of(cfg))


def test_a_loss_scaler_is_refused(runs):
    cfg = runs.config("name=bad", *FSDP, "trainer.precision=16-mixed")
    gpus = hardware.Hardware("gpu", devices=2, num_nodes=1, precision="16-mixed")
    with pytest.raises(ValueError, match="precision=16-mixed: .* trainer.precision=bf16-mixed, or"):
        strategies.check(cfg, gpus)


@pytest.mark.parametrize("overrides", [["trainer.strategy=fsdp2"], FSDP, [*FSDP, "pruner=none"]])
def test_accepted(runs, overrides):
    cfg = runs.config("name=good", *overrides)
    found = program.check(cfg)
    assert strategies.is_sharded(cfg, found.world_size) is (found.world_size > 1)


def test_the_second_node_of_the_bare_command_is_not_the_first(runs, monkeypatch):
    cfg = runs.config("name=good", "trainer.num_nodes=2", "trainer.devices=2")
    place = hardware.hardware_of(cfg)
    for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(hardware.rank_zero_only, "rank", 0)
    monkeypatch.setenv("NODE_RANK", "1")
    assert not hardware.is_first(place)
    assert hardware.rank_zero_only.rank == 2
    monkeypatch.setenv("NODE_RANK", "0")
    assert hardware.is_first(place)
