"""The end of a run: what it came to, written, drawn and printed."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from torch import nn

import slope
from slope.schedule import SlopeSchedule
from slope.training import diagnostics, pruner, strategies
from slope.training.hardware import Hardware
from slope.training.loop import RunLoop, peak_memory_bytes, perplexity
from slope.training.metrics import clearly
from slope.training.optim import state_bytes
from slope.training.progress import show_summary

log = logging.getLogger(__name__)


def finish(
    cfg: DictConfig,
    hardware: Hardware,
    data: Any,
    model: nn.Module,
    schedule: SlopeSchedule,
    report: slope.SparsityReport,
    trainer: pl.Trainer,
    loop: RunLoop,
) -> dict[str, Any]:
    """Sum up a complete run, draw and print it.

    Args:
        cfg: of the run.
        hardware: it was done on.
        data: its corpus and tokenizer.
        model: trained.
        schedule: of the adapters.
        report: of the sparse layers.
        trainer: at the last step.
        loop: with what was measured.

    Returns:
        The summary, as ``summary.json`` holds it.
    """
    log_dir, directory = Path(cfg.paths.log_dir), Path(cfg.paths.checkpoint_dir)
    state, step = loop.state, trainer.global_step
    tokens = step * loop.tokens_per_step
    assert state.val_loss is not None
    summary: dict[str, Any] = {
        "val_loss": state.val_loss,
        "val_perplexity": perplexity(state.val_loss),
        **{name.replace("/", "_"): value for name, value in state.validated.items()},
        "train_loss": state.train_loss(),
        "steps": step,
        "tokens": tokens,
        "tokens_per_second": tokens / state.training_seconds if state.training_seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
        "device": torch.cuda.get_device_name() if hardware.accelerator == "gpu" else "cpu",
        "parameters_dense": report.parameters_dense,
        "parameters_stored": report.parameters_stored,
        "weight_bytes_sparse_layers": report.weight_bytes_sparse_layers,
        "weight_bytes_dense_equivalent": report.weight_bytes_dense_equivalent,
        "optimizer_state_bytes": state_bytes(trainer.optimizers[0]),
        "adapters_started_at_step": state.adapters_started_at_step,
        "wall_seconds": state.seconds,
        **state.evaluated,
    }
    written = {
        "metrics": log_dir / "metrics.csv",
        "summary": log_dir / "summary.json",
        "report": log_dir / "report.txt",
        "config": log_dir / "config.yaml",
        "log": log_dir / "run.log",
        "checkpoints": directory,
    }
    if cfg.demo and str(cfg.model.family) == "bert":
        from slope.evaluation import unigram_loss

        train, val = data.train.source.tokens, data.val.source.tokens
        loss = unigram_loss(train, val, data.vocab_size, data.eos_token_id)
        summary["unigram_val_loss"] = loss
        summary["unigram_val_perplexity"] = perplexity(loss)
    elif cfg.demo:
        from slope.evaluation import bigram_loss

        summary["bigram_val_loss"] = bigram_loss(data.train, data.val, data.vocab_size)
        summary["bigram_val_perplexity"] = perplexity(summary["bigram_val_loss"])
    if (log_dir / diagnostics.FILE).is_file():
        written["diagnostics"] = log_dir / diagnostics.FILE
    write_text(written["report"], f"{report}\n")
    write_text(written["summary"], json.dumps(summary, indent=2) + "\n")
    text = None
    if strategies.is_sharded(cfg, hardware.world_size):
        log.info("no sample: the weights are sharded; `slope generate` reads %s.", directory)
    elif str(cfg.model.family) != "bert":
        # A finished run that was resumed has not trained a step.
        pruner.put_to_work(model, schedule, step)
        text = _sample(cfg, hardware, model, data.tokenizer)
        written["sample"] = log_dir / "sample.txt"
        write_text(written["sample"], f"{text}\n")
    if cfg.plot:
        from slope.plotting import plot_run

        pictures = [file for file in plot_run(log_dir) if file.suffix == ".png"]
        written |= zip(("curves", "mask curves"), pictures, strict=False)
    show_summary(summary, str(report), written, text)
    return summary


def _sample(cfg: DictConfig, hardware: Hardware, model: nn.Module, tokenizer: Any) -> str:
    from slope.evaluation import sample

    model.to("cuda" if hardware.accelerator == "gpu" else "cpu").eval()
    return sample(
        model,
        tokenizer,
        str(cfg.generate.prompt),
        int(cfg.generate.max_new_tokens),
        seed=int(cfg.seed),
    )


def write_text(path: Path, text: str) -> None:
    """Write a file of a run, whole or not at all.

    Raises:
        RuntimeError: if it cannot be written, saying what to do.
    """
    temporary = path.with_name(path.name + ".partial")
    with clearly(path):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
