"""A whole run: data, model, training, validation, summary, pictures."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

import slope
from slope.data.pairs import Masking
from slope.integrations.lightning import MaskCheck, SlopeCallback
from slope.schedule import SlopeSchedule
from slope.training import checkpoint as checkpoints
from slope.training import (
    diagnostics,
    evaluation,
    folders,
    initial,
    pruner,
    rng,
    signature,
    strategies,
)
from slope.training.hardware import Hardware, accumulation, hardware_of, is_first
from slope.training.loop import Intervals, RunLoop
from slope.training.masked import MaskedLanguageModule
from slope.training.metrics import COLUMNS, MetricsFile, clearly
from slope.training.module import LanguageModule, TrainBatches
from slope.training.optim import LORA_LR_RATIO, LearningRates
from slope.training.progress import Progress, console_handler
from slope.training.summary import finish, write_text

log = logging.getLogger(__name__)

_VISIBLE_WITHIN = 60.0  # seconds; NFS remembers a missing file for up to that long (acdirmax)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Do the run that a configuration describes, or go on with it.

    Args:
        cfg: the composed configuration (see ``slope config``).

    Returns:
        The summary that is written to ``summary.json``. After Ctrl-C or SIGTERM: ``interrupted``
        True, ``steps`` and ``checkpoint``. On processes other than the first: empty.

    Raises:
        ValueError: for settings, data or checkpoints that do not fit, before any work is done.
        RuntimeError: if the loss diverges or a file cannot be written.
        FileNotFoundError: if the checkpoint or the weights asked for do not exist.
    """
    hardware = hardware_of(cfg)
    accumulate = accumulation(cfg, hardware.world_size)
    first = is_first(hardware)
    log_dir, directory = Path(cfg.paths.log_dir), Path(cfg.paths.checkpoint_dir)
    _check_settings(cfg, hardware)
    known = signature.config_signature(cfg)
    found = folders.start_from(cfg, log_dir, directory, first)
    weights = None
    if found is not None:
        signature.check(found.content["slope"]["signature"], known, found.path, whole=False)
    elif cfg.init_from is not None:
        weights = initial.read(cfg.init_from)
        initial.check(weights, cfg.model, int(cfg.datamodule.max_length))
    with _run_log(log_dir, first), _quiet_lightning():
        return _run(cfg, hardware, accumulate, known, found, weights)


def check(cfg: DictConfig) -> Hardware:
    """Find what is wrong with a configuration, as far as it can be known before the data.

    Returns:
        Where the run would be done.

    Raises:
        ValueError: for settings that do not fit.
        RuntimeError: if a device or a package is missing.
        FileNotFoundError: if the weights to start from are missing.
    """
    hardware = hardware_of(cfg)
    accumulation(cfg, hardware.world_size)
    _check_settings(cfg, hardware)
    if cfg.init_from is not None and not checkpoints.saved(Path(cfg.paths.checkpoint_dir)):
        initial.locate(cfg.init_from)
    return hardware


def _run(
    cfg: DictConfig,
    hardware: Hardware,
    accumulate: int,
    known: dict[str, Any],
    found: checkpoints.Found | None,
    weights: initial.Weights | None,
) -> dict[str, Any]:
    from slope.data import BatchLoader, pairs, prepare
    from slope.data.tokenizer import plain_tokenizer
    from slope.models import attend_causally, build_model

    first = rank_zero_only.rank == 0
    log_dir, directory = Path(cfg.paths.log_dir), Path(cfg.paths.checkpoint_dir)
    max_steps, max_length = int(cfg.trainer.max_steps), int(cfg.datamodule.max_length)

    _check_tokens(cfg, weights)
    # Whoever builds the cache shows it; the others wait.
    data = prepare(
        cfg.datamodule,
        progress=bool(cfg.trainer.enable_progress_bar),
        patience=_VISIBLE_WITHIN if hardware.num_nodes > 1 else 0.0,
    )
    tokenizer = plain_tokenizer(data.tokenizer)
    masked = str(cfg.model.family) == "bert"
    if masked:
        data = pairs(data, Masking.from_config(cfg.datamodule.masking, max_length))
    if weights is not None:
        initial.check_tokenizer(weights, tokenizer, data.vocab_size)
    rng.seed_all(int(cfg.seed))
    model = build_model(cfg.model, data.vocab_size, max_length, eos_token_id=data.eos_token_id)
    if weights is not None:
        _start_with(model, weights, cfg)
    # What a checkpoint holds of masks replaces those chosen here.
    fresh = found is None
    report = pruner.apply(
        cfg.pruner, model, _calibration(cfg, data) if fresh else None, choose_masks=fresh
    ) or slope.sparsity_report(model)
    log.info("%s", report.summary())
    schedule = pruner.schedule(cfg.pruner, max_steps, bool(slope.adapter_parameters(model)))
    for sentence in pruner.never(schedule):
        log.warning("%s", sentence)
    texts = evaluation.TextEvaluation.open(cfg, model, data.tokenizer)

    module = (MaskedLanguageModule if masked else LanguageModule)(
        model,
        _rates(cfg, schedule),
        _plain(cfg.train.optimizer),
        fused=hardware.precision != "16-mixed",  # a loss scaler and clipping need the plain kernel
    )
    known |= signature.model_signature(model, data.vocab_size)
    known |= {"data": data.fingerprint, "seed": int(cfg.seed)}
    known["train.global_batch_size"] = int(cfg.train.global_batch_size)
    known["trainer.max_steps"] = max_steps
    if masked:
        known["datamodule.masking"] = _plain(cfg.datamodule.masking)
    if found is not None:
        _fit_to(found, known, module, accumulate, schedule)

    sharded = strategies.is_sharded(cfg, hardware.world_size)
    step = 0 if found is None else int(found.content["global_step"])
    log_every = max(1, int(cfg.trainer.log_every_n_steps))
    saving = cfg.callbacks.checkpoint
    in_parts = checkpoints.is_sharded(saving.format, sharded)
    files = checkpoints.VerifiedCheckpointIO(found, in_parts, bool(saving.asynchronous))

    def validation() -> Iterable[dict[str, Tensor]]:
        loader = BatchLoader(
            data.val,
            int(cfg.datamodule.batch_size_eval),
            seed=0,
            shuffle=False,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        limit = cfg.trainer.limit_val_batches
        batches = loader.in_step() if sharded else loader
        if limit is None:
            return batches
        # Counted over all processes, so that their number does not change what is measured.
        return islice(batches, math.ceil(int(limit) / trainer.world_size))

    loop = RunLoop(
        intervals=Intervals(
            max_steps=max_steps,
            log=log_every,
            validate=int(cfg.trainer.val_check_interval),
            save=int(saving.every_n_steps),
            progress=int(saving.progress_every_n_steps or 0),
            keep_best=int(saving.save_top_k),
        ),
        directory=directory,
        files=files,
        progress=Progress(max_steps, bool(cfg.trainer.enable_progress_bar)) if first else None,
        validation=validation,
        signature=known,
        tokens_per_step=int(cfg.train.global_batch_size) * max_length,
        tokens_per_epoch=len(data.train) * max_length,
        seed=int(cfg.seed),
        tokenizer=tokenizer,
        evaluation=texts,
    )
    waking = SlopeCallback(
        max_steps, schedule.lora_start, schedule.lora_lazy, schedule.dense_start, schedule.evolution
    )
    same = {"the step to go on from": step}
    if texts is not None:
        same |= {f"tokens of {label}": len(text.ids) for label, text in texts.texts.items()}
    callbacks = [
        strategies.SameStart(known | same),
        waking,
        MaskCheck(int(cfg.trainer.check_masks_every_n_steps)),
        loop,
    ]
    strategies.rejoin(hardware)
    trainer = _trainer(cfg, hardware, accumulate, schedule, files, callbacks)
    batches = TrainBatches(
        BatchLoader(
            data.train,
            int(cfg.datamodule.batch_size),
            seed=int(cfg.seed),
            shuffle=True,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start_batch=step * accumulate,
            pin_memory=hardware.accelerator == "gpu",
        ),
        max_steps * accumulate,
    )
    if cfg.model.get("compile"):
        attend_causally(model)  # batches are packed, none is padded
        # the head of a masked model is called by itself
        (cast(Any, model).base_model if masked else model).compile()
    if in_parts:
        strategies.save_in_parts(trainer.strategy)
    if trainer.world_size > 1:
        # Lightning would wait for the device in every micro-batch to ask about SIGTERM; RunLoop
        # asks once per optimizer step.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    with _no_cache(model), contextlib.ExitStack() as tables:
        if first:
            tables.enter_context(folders.held(cfg, log_dir))
            # Only now: a run that could not begin leaves its name free.
            folders.claim(cfg, log_dir, directory, found)
            if masked:
                # where `slope finetune` looks
                write_text(directory / "tokenizer.json", tokenizer["json"])
            columns = COLUMNS if texts is None else (*COLUMNS, *texts.columns)
            metrics = MetricsFile(log_dir / "metrics.csv", step, columns)
            loop.metrics = tables.enter_context(metrics)
            masks = None
            if not sharded:
                masks = diagnostics.MaskDiagnostics.open(cfg, step, schedule, model)
            if masks is not None:
                loop.diagnostics = tables.enter_context(masks)
        try:
            trainer.fit(module, batches, ckpt_path=None if found is None else str(found.path))
        except Exception:
            if first and found is None and trainer.global_step == 0:
                folders.release(log_dir, directory)
            raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not first:
        return {}
    if loop.stopped_by is not None and trainer.global_step < max_steps:
        path = directory / checkpoints.LAST
        log.info(
            "stopped by %s at step %d of %d; saved %s. The same command with resume=True goes on.",
            loop.stopped_by,
            trainer.global_step,
            max_steps,
            path,
        )
        return {"interrupted": True, "steps": trainer.global_step, "checkpoint": str(path)}
    return finish(cfg, hardware, data, model, schedule, report, trainer, loop)


def _start_with(model: nn.Module, weights: initial.Weights, cfg: DictConfig) -> None:
    """Load trained weights, and say what may not be meant."""
    sparse = initial.load_into(model, weights)
    done = weights.progress()
    how_far = "" if done is None else f" (step {done[0]} of {done[1]})"
    log.info("starts from the weights of %s%s.", weights.path, how_far)
    if done is not None and done[0] < done[1]:
        log.warning(
            "the run of %s was not finished; unless that is meant, finish it first by its own "
            "command and resume=True.",
            weights.path,
        )
    if sparse is not None and cfg.pruner.pruned_matrix in ("none", "dense"):
        log.warning(
            "%s is sparse (%s), and this run is dense: its zeros become weights. Type pruner=slope "
            "to keep them, unless that is meant.",
            weights.path,
            sparse,
        )


def _check_tokens(cfg: DictConfig, weights: initial.Weights | None) -> None:
    """Find a tokenizer that cannot serve before the corpus is tokenised with it."""
    from slope.data import ready_tokenizer
    from slope.data.pairs import Pieces
    from slope.data.tokenizer import plain_tokenizer, vocabulary_entries

    ready = ready_tokenizer(cfg.datamodule)
    if ready is None:  # it is trained on the corpus, to at most so many entries
        entries = vocabulary_entries(str(cfg.datamodule.tokenizer))
        if weights is not None:
            initial.check_entries(weights, entries)
        return
    tokenizer, size = ready
    if str(cfg.model.family) == "bert":
        Pieces.of(tokenizer, size)
    if weights is not None:
        initial.check_tokenizer(weights, plain_tokenizer(tokenizer), size)


def _check_settings(cfg: DictConfig, hardware: Hardware) -> None:
    """Everything that can be wrong and be known before the data."""
    if not cfg.name:
        raise ValueError("the run has no name; type name=my-run.")
    for key in ("trainer.max_steps", "trainer.val_check_interval", "trainer.log_every_n_steps"):
        value = OmegaConf.select(cfg, key)
        if int(value) < 1:
            raise ValueError(f"{key}={value} must be at least 1.")
    if str(cfg.logger) not in ("csv", "none", "tensorboard", "wandb"):
        raise ValueError(f"logger={cfg.logger!r} is unknown; use csv, tensorboard, wandb or none.")
    if str(cfg.logger) in ("tensorboard", "wandb") and find_spec(cfg.logger) is None:
        raise RuntimeError(
            f"logger={cfg.logger} needs a package that is missing; type pip install {cfg.logger}, "
            "or logger=csv."
        )
    if str(cfg.model.family) == "bert":
        Masking.from_config(cfg.datamodule.masking, int(cfg.datamodule.max_length))
    sparse = pruner.check_pruner(cfg.pruner, "cuda" if hardware.accelerator == "gpu" else "cpu")
    pruner.schedule(cfg.pruner, int(cfg.trainer.max_steps))
    strategies.check(cfg, hardware)
    checkpoints.is_sharded(cfg.callbacks.checkpoint.format, False)
    diagnostics.every_n_steps(cfg)
    if sparse and cfg.pruner.mask == "wanda" and cfg.init_from is None:
        raise ValueError(
            "pruner.mask=wanda with init_from=null has no meaning: weights that were never trained "
            "do not know their inputs; choose pruner.mask=magnitude, or init_from=<a checkpoint or "
            "a folder of save_pretrained>."
        )
    _try_on_meta(cfg)


def _try_on_meta(cfg: DictConfig) -> None:
    """Build and sparsify the model without memory: what does not fit is wrong now or never."""
    from slope.models import build_model

    with torch.device("meta"):
        model = build_model(cfg.model, 1, int(cfg.datamodule.max_length))
        pruner.apply(cfg.pruner, model, choose_masks=False)
    evaluation.check(cfg, model)


def _calibration(cfg: DictConfig, data: Any) -> Iterable[dict[str, Tensor]] | None:
    """The first micro-batches that one process would train on; the same on every process."""
    from slope.data import BatchLoader

    if cfg.pruner.mask != "wanda":
        return None
    loader = BatchLoader(
        data.train, int(cfg.datamodule.batch_size), seed=int(cfg.seed), shuffle=True
    )
    inputs = ("input_ids", "attention_mask", "token_type_ids")
    return (
        {name: batch[name] for name in inputs if name in batch}
        for batch in islice(loader, int(cfg.pruner.calibration_batches))
    )


def _fit_to(
    found: checkpoints.Found,
    known: dict[str, Any],
    module: LanguageModule,
    accumulate: int,
    schedule: SlopeSchedule,
) -> None:
    """Check a checkpoint against this run, and fit it to what may differ."""
    content, step = found.content, int(found.content["global_step"])
    max_steps = schedule.max_steps
    for difference in signature.check(content["slope"]["signature"], known, found.path, whole=True):
        log.warning("the checkpoint was made with other settings: %s.", difference)
    if step > max_steps:
        raise ValueError(
            f"checkpoint {found.path} is at step {step}, beyond trainer.max_steps={max_steps}; "
            f"type trainer.max_steps={step} or more{_or_earlier(found, max_steps)}."
        )
    began = content["slope"]["state"]["adapters_started_at_step"]
    if began is not None and began < step < schedule.start_step and schedule.lora_start is not None:
        raise ValueError(
            f"the adapters of checkpoint {found.path} are trained since step {began}, but with "
            f"trainer.max_steps={max_steps} they would sleep until step {schedule.start_step}, and "
            "the model would lose what they add; type pruner.lora_lazy=False to keep them active"
            f"{_or_earlier(found, began)}."
        )
    if signature.adapt(content, module):
        log.info("the checkpoint has no adapters; they join at their start, untrained.")
    signature.set_position(content, step * accumulate)
    if rank_zero_only.rank == 0:
        checkpoints.complete(found)
    log.info("going on from step %d of %d (%s).", step, max_steps, found.path)


def _or_earlier(found: checkpoints.Found, most: int) -> str:
    """The checkpoint to go back to, if one of at most so many steps was kept."""
    steps = [checkpoints.step_of(path) for path in checkpoints.saved(found.path.parent)]
    kept = [step for step in steps if step is not None and step <= most]
    return f", or resume_iter={max(kept)}" if kept else ""


def _rates(cfg: DictConfig, schedule: SlopeSchedule) -> LearningRates:
    settings, max_steps = cfg.train.scheduler, int(cfg.trainer.max_steps)
    shapes = {
        "linear_warmup": "linear",
        "cosine_warmup": "cosine",
        "polynomial_warmup": "polynomial",
    }
    if settings.name not in shapes:
        raise ValueError(
            f"scheduler {settings.name!r} is unknown; use scheduler={' or '.join(shapes)}."
        )
    warmup = settings.warmup_steps
    if warmup is None:
        warmup = round(float(settings.warmup_ratio) * max_steps)
    if warmup >= max_steps:
        log.warning(
            "the learning rate never leaves its warm-up of %d steps in a run of %d; type a smaller "
            "train.scheduler.warmup_steps or warmup_ratio.",
            warmup,
            max_steps,
        )
    peak = float(cfg.train.optimizer.lr)
    lora = cfg.pruner.lora_lr
    return LearningRates(
        peak=peak,
        warmup_steps=int(warmup),
        max_steps=max_steps,
        minimum=peak * float(settings.min_lr_ratio),
        shape=shapes[settings.name],
        degree=float(settings.get("degree", 1)),
        lora_peak=LORA_LR_RATIO * peak if lora is None else float(lora),
        lora_start_step=None if schedule.lora_start is None else schedule.start_step,
        lora_shape=str(cfg.pruner.lora_schedule),
    )


def _trainer(
    cfg: DictConfig,
    hardware: Hardware,
    accumulate: int,
    schedule: SlopeSchedule,
    files: checkpoints.VerifiedCheckpointIO,
    callbacks: list[pl.Callback],
) -> pl.Trainer:
    clip = cfg.trainer.gradient_clip_val
    # Sleeping adapters take no part in the backward.
    sleeping = schedule.lora_start is not None and schedule.lora_lazy
    around = strategies.around(hardware)
    return pl.Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.devices,
        num_nodes=hardware.num_nodes,
        strategy=strategies.make(cfg, hardware, sleeping),
        precision=around["precision"],
        plugins=[files, *around["plugins"]],
        callbacks=callbacks,
        logger=_logger(cfg),
        max_steps=int(cfg.trainer.max_steps),
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=None if clip is None else float(clip),
        log_every_n_steps=1,
        limit_val_batches=0,  # RunLoop validates, at the same place where it saves
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=cfg.paths.log_dir,
    )


def _logger(cfg: DictConfig) -> Any:
    """A logger beside metrics.csv, which is always written."""
    name, log_dir = str(cfg.logger), str(cfg.paths.log_dir)
    if name == "tensorboard":
        from pytorch_lightning.loggers import TensorBoardLogger

        return TensorBoardLogger(log_dir, name="", version="tensorboard")
    if name == "wandb":
        from pytorch_lightning.loggers import WandbLogger

        return WandbLogger(
            name=cfg.name, id=cfg.name, project="slope", save_dir=log_dir, resume="allow"
        )
    return False


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@contextlib.contextmanager
def _no_cache(model: nn.Module) -> Iterator[None]:
    """Keep transformers from building a key/value cache in every training forward."""
    config: Any = model.config
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before


@contextlib.contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning's notes on hardware and stopping say nothing that we do not say."""
    loggers = [logging.getLogger(n) for n in ("pytorch_lightning", "lightning_fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 asks torch 2.13 for a class that will go.
            warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _run_log(log_dir: Path, first: bool) -> Iterator[None]:
    """Write the package's log to run.log, and to the console if nobody else does."""
    logger = logging.getLogger("slope")
    level = logger.level
    handlers: list[logging.Handler] = []
    if first:
        with clearly(log_dir / "run.log"):
            log_dir.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(log_dir / "run.log", encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
        if not logger.hasHandlers():
            handlers.append(console_handler())
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO if first else logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
