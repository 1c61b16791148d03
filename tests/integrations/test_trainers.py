"""Other people's trainers give the losses of our own plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_trainers import (
    ACCUMULATE,
    CLIP,
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
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

import slope
from slope.integrations.transformers import SlopeTrainerCallback
from slope.methods.evolving import Evolution

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CASES = {
    "slope": ({}, {"lora_start": 0.5}),
    "evolving": ({}, {"lora_start": 0.5, "evolution": Evolution(2, 0.3, 1.0)}),
    "sr-ste": (
        {"method": "dynamic-weight", "srste_decay": 0.01, "adapter_rank": 0,
         "column_mask_interval": 0},
        {"lora_start": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_the_hf_trainer_equals_the_plain_loop(case, autocast, tmp_path):
    sparsity, settings = CASES[case]
    ours = tiny(**sparsity)
    theirs = copy.deepcopy(ours)
    schedule = slope.SlopeSchedule(STEPS, **settings)
    expected = own_loop(ours, schedule, autocast, clip_first=case != "slope")
    trainer = hf(theirs, tmp_path, SlopeTrainerCallback(**settings), bf16=autocast)
    trainer.train()
    assert losses_of(trainer) == pytest.approx(expected, rel=1e-6)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], tensor)
    assert slope.adapters_active(theirs) == (case != "sr-ste")


def test_scaled_gradients_get_no_decay(tmp_path):
    sparsity, settings = CASES["sr-ste"]
    trainer = hf(tiny(**sparsity), tmp_path, SlopeTrainerCallback(**settings), max_grad_norm=0.0)
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match=r"type max_grad_norm=1\.0 or bf16=True"):
        trainer.train()


def test_the_hf_trainer_resumes_across_the_start_of_the_adapters(tmp_path):
    settings = {"lora_start": 0.5}
    whole = hf(tiny(), tmp_path / "whole", SlopeTrainerCallback(**settings),
               save_strategy="steps", save_steps=3)  # fmt: skip
    whole.train()
    for saved in (3, 6):
        again = hf(tiny(seed=7), tmp_path / "again", SlopeTrainerCallback(**settings))
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved}"))
        assert losses_of(again) == losses_of(whole)
        for name, tensor in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], tensor), name


def test_saved_by_the_hf_trainer_and_by_us(tmp_path):
    trainer = hf(tiny(), tmp_path, SlopeTrainerCallback(lora_start=0.5))
    trainer.train()
    model = trainer.model.eval()
    ids = Tokens()[0]["input_ids"][None]
    logits = model(input_ids=ids).logits
    trainer.save_model(str(tmp_path / "stock"))
    from safetensors.torch import load_file

    state = load_file(tmp_path / "stock" / "model.safetensors")
    assert state.keys() == model.state_dict().keys()
    slope.save_pretrained(model, tmp_path / "ours")
    ours = slope.load_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(ours(input_ids=ids).logits, logits, rtol=0, atol=0)
    slope.densify(model, fold_adapters=True).save_pretrained(tmp_path / "dense")
    dense = LlamaForCausalLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(dense(input_ids=ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_the_hf_trainer_logs_mask_diagnostics(tmp_path):
    callback = SlopeTrainerCallback(lora_start=0.5, diagnostics=True)
    trainer = hf(tiny(), tmp_path, callback, logging_steps=4)
    trainer.train()
    rows = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(rows) == 2
    for row in rows:
        assert row["mask/density"] == 0.5
        assert row["mask/flip_rate"] == 0.0
        assert row["mask/column_flip_rate"] >= 0
    assert rows[1]["mask/adapter_norm"] > 0


def test_bad_shares_are_reported_when_the_callback_is_made():
    with pytest.raises(ValueError, match=r"lora_start=0 is outside \(0, 1\]"):
        SlopeTrainerCallback(lora_start=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_lightning_equals_the_plain_loop(case, autocast):
    from slope.integrations.lightning import SlopeCallback

    sparsity, settings = CASES[case]
    ours = tiny(**sparsity)
    theirs = copy.deepcopy(ours)
    expected = own_loop(ours, slope.SlopeSchedule(STEPS, **settings), autocast)
    precision = "bf16-mixed" if autocast else "32-true"
    found = lightning(theirs, SlopeCallback(**settings), precision=precision)
    assert found == pytest.approx(expected, rel=1e-6)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], tensor)


def test_lightning_logs_mask_diagnostics():
    from pytorch_lightning.loggers import Logger

    from slope.integrations.lightning import SlopeCallback

    class Rows(Logger):
        def __init__(self):
            super().__init__()
            self.rows = []

        name, version = "rows", 0

        def log_metrics(self, metrics, step=None):
            self.rows.append((step, metrics))

        def log_hyperparams(self, *args, **kwargs):
            pass

    logger = Rows()
    callback = SlopeCallback(lora_start=0.5, diagnostics=True)
    lightning(tiny(), callback, logger=logger, log_every_n_steps=4)
    masks = [(step, row["mask/density"]) for step, row in logger.rows if "mask/density" in row]
    assert masks == [(4, 0.5), (8, 0.5)]


def test_accelerate_equals_the_plain_loop():
    from accelerate import Accelerator

    settings = CASES["slope"][1]
    ours = tiny()
    theirs = copy.deepcopy(ours)
    expected = own_loop(ours, slope.SlopeSchedule(STEPS, **settings))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model, optimizer, loader = accelerator.prepare(
        theirs, optimizer_of(theirs), DataLoader(Tokens(), batch_size=ROWS)
    )
    schedule, losses, step, first = slope.SlopeSchedule(STEPS, **settings), [0.0] * STEPS, 0, True
    for batch in loader:
        if first:
            schedule.apply(model, step)
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            losses[step] += loss.item() / ACCUMULATE
            first = accelerator.sync_gradients
            if first:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
                step += 1
            optimizer.step()
            optimizer.zero_grad()
    assert losses == pytest.approx(expected, rel=1e-6)
