"""Mistakes around a trainer are named, and what a trainer may do besides changes no loss."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny_trainers import (
    ACCUMULATE,
    ROWS,
    STEPS,
    Tokens,
    hf,
    lightning,
    losses_of,
    optimizer_of,
    own_loop,
    tiny,
)
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

import slope
from slope.deploy.source import open_source
from slope.integrations.transformers import SlopeTrainerCallback
from slope.methods.evolving import Evolution, swap

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
HALF = {"lora_start": 0.5}


def logits(model):
    return model.eval()(input_ids=Tokens(1).ids).logits


def trained(folder, **options):
    trainer = hf(tiny(), folder, SlopeTrainerCallback(**HALF), **options)
    trainer.train()
    return trainer


def dense():
    return slope.densify(tiny())


# --- the same losses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True,
         "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True,
         "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"eval_strategy": "steps", "eval_steps": 1, "evaluation": Tokens(4)},
    ],
    ids=["checkpointing", "reentrant", "evaluation"],
)  # fmt: skip
@pytest.mark.parametrize("evolution", [None, Evolution(2, 0.3, 1.0)], ids=["fixed", "evolving"])
def test_what_else_the_hf_trainer_does_changes_no_loss(options, evolution, tmp_path):
    settings = HALF | {"evolution": evolution}
    ours = tiny()
    theirs = copy.deepcopy(ours)
    expected = own_loop(ours, slope.SlopeSchedule(STEPS, **settings), clip_first=True)
    trainer = hf(theirs, tmp_path, SlopeTrainerCallback(**settings), **options)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-6)


def test_lightning_checkpoints_activations_with_the_same_losses():
    from slope.integrations.lightning import SlopeCallback

    plain, checkpointed = tiny(), tiny()
    checkpointed.gradient_checkpointing_enable()
    expected = lightning(plain, SlopeCallback(**HALF))
    assert lightning(checkpointed, SlopeCallback(**HALF)) == expected


@pytest.mark.parametrize("ours_first", [True, False])
def test_averaged_weights_of_lightning_in_any_order_of_callbacks(ours_first):
    from pytorch_lightning.callbacks import EMAWeightAveraging

    from slope.integrations.lightning import SlopeCallback

    model, alone = tiny(), tiny()
    callbacks = [SlopeCallback(**HALF), EMAWeightAveraging(decay=0.5)]
    expected = lightning(alone, SlopeCallback(**HALF))
    assert lightning(model, *(callbacks if ours_first else callbacks[::-1])) == expected
    assert slope.adapters_active(model)
    assert not torch.equal(logits(model), logits(alone))


def test_the_length_of_a_run_that_is_given_in_epochs(tmp_path):
    from slope.integrations.lightning import SlopeCallback

    # 16 batches by 3: each epoch ends with a step of one batch.
    of_hf, of_lightning = SlopeTrainerCallback(**HALF), SlopeCallback(**HALF)
    trainer = hf(tiny(), tmp_path, of_hf, max_steps=-1, num_train_epochs=3,
                 gradient_accumulation_steps=3)  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == of_hf.schedule.max_steps == 18
    lightning(tiny(), of_lightning, max_steps=-1, max_epochs=3, accumulate_grad_batches=3)
    assert of_lightning.schedule.max_steps == 18


def test_fp16_with_a_loss_scaler():
    model = tiny()
    optimizer, schedule = optimizer_of(model), slope.SlopeSchedule(STEPS, **HALF)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)  # too large for fp16
    before = copy.deepcopy(model.state_dict())
    for step, batch in zip(range(STEPS), DataLoader(Tokens(), batch_size=ROWS), strict=False):
        schedule.apply(model, step)
        with torch.autocast("cpu", torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert scaler.get_scale() < 2.0**24
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all()
        assert name.endswith("adapter.down") or not torch.equal(parameter, before[name]), name


def test_a_step_that_the_loss_scaler_skips_swaps_nothing():
    _, layer = next(iter(slope.sparse_layers(tiny())))
    before = copy.deepcopy(layer.state_dict())
    for value in (float("nan"), float("inf")):
        gradient = torch.randn(layer.out_features, layer.in_features)
        gradient[0, 0] = value
        assert swap(layer, gradient, 0.5, optimizer_of(layer)) == 0
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_averaged_weights_of_a_plain_loop():
    model = tiny()
    averaged = AveragedModel(model)
    optimizer, schedule = optimizer_of(model), slope.SlopeSchedule(STEPS, **HALF)
    for step, batch in zip(range(STEPS), DataLoader(Tokens(), batch_size=ROWS), strict=False):
        schedule.apply(model, step)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    averaged.update_parameters(model)  # the first average is a copy
    assert not torch.equal(logits(averaged), logits(model))
    slope.activate_adapters(averaged)
    assert torch.equal(logits(averaged), logits(model))


# --- saving and loading -------------------------------------------------------------------------


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = trained(
        tmp_path, evaluation=Tokens(4), eval_strategy="steps", eval_steps=2, save_steps=2,
        save_strategy="steps", save_only_model=True, load_best_model_at_end=True,
    )  # fmt: skip
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == min(losses) < losses[-1]


def test_weights_that_a_trainer_saved_wake_their_adapters(tmp_path):
    from safetensors.torch import load_model

    trainer = trained(tmp_path, save_strategy="steps", save_steps=4)
    early, late = tiny(seed=3), tiny(seed=3)
    load_model(early, tmp_path / "checkpoint-4" / "model.safetensors")
    load_model(late, tmp_path / "checkpoint-8" / "model.safetensors")
    assert not slope.adapters_active(early)
    assert slope.adapters_active(late)
    assert torch.equal(logits(late), logits(trainer.model))


def test_a_trainers_checkpoint_that_is_taken_for_an_export(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=8)
    folder = tmp_path / "checkpoint-8"
    with pytest.raises(
        FileNotFoundError, match=r"safetensors\.torch\.load_model\(\), into a model"
    ):
        slope.load_pretrained(folder)
    with pytest.raises(ValueError, match="is a trainer's checkpoint of a sparse model: it holds"):
        open_source(folder)


@pytest.mark.parametrize("wrapper", [AveragedModel, torch.nn.DataParallel])
def test_wrappers_are_looked_through(wrapper, tmp_path):
    model = tiny()
    slope.save_pretrained(wrapper(model), tmp_path / "sparse")
    assert torch.equal(logits(slope.load_pretrained(tmp_path / "sparse")), logits(model))


# --- mistakes -----------------------------------------------------------------------------------


def test_a_forgotten_sparsify(tmp_path):
    from slope.integrations.lightning import SlopeCallback

    message = r"no sparse layers; call slope\.sparsify\(model, \.\.\.\).*or type lora_start=None"
    with pytest.raises(ValueError, match=message):
        hf(dense(), tmp_path, SlopeTrainerCallback()).train()
    with pytest.raises(ValueError, match=message):
        lightning(dense(), SlopeCallback())
    hf(dense(), tmp_path, SlopeTrainerCallback(lora_start=None), max_steps=1).train()


def test_an_optimizer_that_is_older_than_the_sparse_layers(tmp_path):
    from slope.integrations.lightning import SlopeCallback

    model = dense()
    optimizer = optimizer_of(model)
    slope.sparsify(model)
    trainer = hf(model, tmp_path, SlopeTrainerCallback())
    trainer.optimizer = optimizer
    with pytest.raises(ValueError, match="holds no weights of the sparse layers"):
        trainer.train()
    with pytest.raises(ValueError, match="holds no weights of the sparse layers"):
        lightning(model, SlopeCallback(), optimizer=optimizer)


def test_an_optimizer_of_the_adapters_alone_is_the_users_affair(tmp_path):
    model = tiny()
    trainer = hf(model, tmp_path, SlopeTrainerCallback(lora_lazy=False), max_steps=1)
    trainer.optimizer = torch.optim.AdamW(slope.adapter_parameters(model))
    trainer.train()


@pytest.mark.parametrize("wrapped", ["accelerate", "parallel"])
def test_sparsify_comes_before_prepare(wrapped):
    from accelerate import Accelerator

    model = dense()
    if wrapped == "accelerate":
        model, _ = Accelerator(cpu=True).prepare(model, optimizer_of(model))
    else:
        model = torch.nn.DataParallel(model)
    with pytest.raises(ValueError, match=r"before .* or accelerator\.prepare\(\)"):
        slope.sparsify(model)


def test_sparsify_does_not_prune_adapters_of_peft():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(dense(), peft.LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match=r"before get_peft_model\(\), or on model\.merge_and"):
        slope.sparsify(model)
    assert len(slope.sparsify(model.merge_and_unload()).sparse) == 11


def test_peft_on_the_dense_layers_of_a_sparse_model(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny()
    before = copy.deepcopy(dict(slope.sparse_layers(model)))
    over = peft.get_peft_model(model, peft.LoraConfig(target_modules=r".*layers\.0\..*q_proj"))
    hf(over, tmp_path, SlopeTrainerCallback(**HALF)).train()
    for name, layer in slope.sparse_layers(model):
        assert torch.equal(layer.values, before[name].values)
    assert any(p.any() for name, p in over.named_parameters() if "lora_B" in name)


def test_trained_adapters_are_not_put_to_sleep_unasked(tmp_path):
    trained(tmp_path, save_strategy="steps", save_steps=8)
    message = "before the adapters start.*trained already.*Type lora_lazy=False"
    for goes_on in (False, True):
        again = hf(tiny(), tmp_path, SlopeTrainerCallback(**HALF), max_steps=4 * STEPS)
        if not goes_on:
            again.model.load_state_dict(trained(tmp_path).model.state_dict())
        with pytest.raises(ValueError, match=message):
            again.train(resume_from_checkpoint=goes_on)
    slope.deactivate_adapters(again.model)
    slope.SlopeSchedule(4).apply(again.model, 0)
    assert not slope.adapters_active(again.model)


def test_an_accumulation_that_changes_leaves_the_length_of_the_run_open():
    from pytorch_lightning.callbacks import GradientAccumulationScheduler

    from slope.integrations.lightning import SlopeCallback

    changing = {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 1}
    every = GradientAccumulationScheduler({0: ACCUMULATE, 1: 2 * ACCUMULATE})
    with pytest.raises(ValueError, match=r"GradientAccumulationScheduler.*SlopeCallback\(max_st"):
        lightning(tiny(), SlopeCallback(), every, **changing)
    model = tiny()
    lightning(model, SlopeCallback(12, **HALF), every, **changing)
    assert slope.adapters_active(model)


def test_lightning_with_two_optimizers_is_refused():
    pytest.importorskip("pytorch_lightning")
    from slope.integrations.lightning import SlopeCallback

    model = tiny()
    trainer = SimpleNamespace(optimizers=[optimizer_of(model), optimizer_of(model)])
    with pytest.raises(ValueError, match="follows the steps of one optimizer, and this run has 2"):
        SlopeCallback(**HALF).on_train_start(trainer, model)
