"""Tiny runs of our own loop and of other people's trainers, on the same rows."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import slope

STEPS, ACCUMULATE, ROWS, LENGTH, LR, CLIP = 8, 2, 2, 8, 1e-2, 0.3


class Tokens(Dataset):
    """Rows in a fixed order, as many as the steps take."""

    def __init__(self, rows=STEPS * ACCUMULATE * ROWS):
        self.ids = torch.randint(1, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def tiny(**options):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=64, max_position_embeddings=LENGTH, initializer_range=0.2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    slope.sparsify(
        model, slope.SparsityConfig(**{"adapter_rank": 2, "column_mask_interval": 3} | options)
    )
    return model


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.1)


def own_loop(model, schedule, autocast=False, clip_first=False):
    """Losses of each optimizer step; ``clip_first`` as the Trainer of transformers has it."""
    optimizer, losses = optimizer_of(model), []
    batches = iter(DataLoader(Tokens(), batch_size=ROWS))
    for step in range(STEPS):
        schedule.apply(model, step)
        total = 0.0
        for _ in range(ACCUMULATE):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**next(batches)).loss / ACCUMULATE
            loss.backward()
            total += loss.item()
        if not clip_first:
            schedule.before_optimizer_step(model, optimizer, step)
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if clip_first:
            schedule.before_optimizer_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


class Unshuffled(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def hf(model, folder, callback, evaluation=None, **options):
    """Trainer of transformers; ``evaluation``: its rows to evaluate on."""
    settings = {
        "max_steps": STEPS, "per_device_train_batch_size": ROWS, "max_grad_norm": CLIP,
        "gradient_accumulation_steps": ACCUMULATE, "logging_steps": 1, "save_strategy": "no",
        "lr_scheduler_type": "constant", "use_cpu": True, "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    return Unshuffled(
        model, TrainingArguments(str(folder), **settings | options), train_dataset=Tokens(),
        eval_dataset=evaluation, callbacks=[callback], optimizers=(optimizer_of(model), None),
    )  # fmt: skip


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def lightning(model, callback, *callbacks, optimizer=None, **options):
    """Losses of each optimizer step of a Lightning trainer."""
    pl = pytest.importorskip("pytorch_lightning")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.losses.append(loss.item() / ACCUMULATE)
            return loss

        def configure_optimizers(self):
            return optimizer or optimizer_of(self.model)

    module = Module()
    settings = {
        "max_steps": STEPS, "accumulate_grad_batches": ACCUMULATE, "gradient_clip_val": CLIP,
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False,
        "enable_progress_bar": False, "enable_model_summary": False,
    }  # fmt: skip
    trainer = pl.Trainer(callbacks=[callback, *callbacks], **settings | options)
    trainer.fit(module, DataLoader(Tokens(), batch_size=ROWS))
    return [sum(module.losses[i : i + ACCUMULATE]) for i in range(0, len(module.losses), 2)]
