"""A whole fine-tuning: one run per seed, and a table of them.

A run's folder holds ``settings.json``, one ``seed<k>`` folder per finished seed (result, losses,
predictions in the official format), and the table: ``results.csv``, ``results.md``,
``summary.json``. The same command goes on where it stopped; another one never writes into it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slope.finetune.config import RESULT, Settings

if TYPE_CHECKING:
    from slope.finetune.features import WordPieces
    from slope.finetune.glue import GlueTask
    from slope.finetune.squad import SquadTask

log = logging.getLogger(__name__)

_SETTINGS, _CONTENTS, _MODEL = "settings.json", "contents", "model"
_MAY_DIFFER = ("seeds", "progress_bar", "accelerator", "batch_size_eval", "root", "name")


def finetune(settings: Settings) -> dict[str, Any]:
    """Fine-tune once per seed and sum up.

    Returns:
        What ``summary.json`` holds: mean and spread of each metric over all seeds of the folder.

    Raises:
        ValueError: if data, tokenizer and checkpoint do not fit, or the folder is of other
            settings.
        FileNotFoundError: if a file is missing.
        RuntimeError: if the hub cannot be reached, there is no GPU and one is asked for, or the
            loss diverges.
    """
    folder = settings.directory
    _check_folder(folder, settings)
    _check_contents(folder, settings, _contents(settings, None))
    todo = settings.unfinished()
    done = [seed for seed in settings.seeds if seed not in todo]
    if done:
        log.info("%s: done before: seed %s.", folder, ", ".join(map(str, done)))
    if todo:
        _run(settings, folder, todo)
    found = results(settings)
    summary = _summary(settings, found)
    texts = {
        "results.csv": _csv(found),
        "results.md": markdown(summary),
        "summary.json": json.dumps(summary, indent=1) + "\n",
    }
    for name, text in texts.items():
        _write(folder / name, text)
    return summary


def results(settings: Settings) -> list[dict[str, Any]]:
    """What each finished seed of the folder gave, in order of seed; metrics are in percent."""
    paths = settings.directory.glob(f"seed*[0-9]/{RESULT}")
    found = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    return sorted(found, key=lambda result: result["seed"])


def check(settings: Settings) -> None:
    """Find what is wrong before there is a checkpoint: folder, device and the task's files.

    Raises:
        ValueError, FileNotFoundError, RuntimeError: as :func:`finetune` does.
    """
    _check_folder(settings.directory, settings)
    _check_device(settings)
    _task(settings)


def _run(settings: Settings, folder: Path, seeds: Sequence[int]) -> None:
    from lightning_fabric import Fabric

    import slope
    from slope.finetune import loop
    from slope.finetune.features import load_word_pieces
    from slope.finetune.model import load_encoder, with_head
    from slope.training import initial, rng

    _check_device(settings)
    initial.locate(settings.init_from)
    task = _task(settings)
    pieces = load_word_pieces(settings.tokenizer, settings.init_from)
    encoder = load_encoder(settings, pieces)
    train, evaluations = task.features(pieces)
    log.info(
        "%s: %d inputs to train on, %s to evaluate.",
        settings.task,
        len(train),
        " + ".join(str(len(features)) for features in evaluations.values()),
    )
    precision: Any = settings.precision  # one of PRECISIONS, which Fabric knows
    fabric = Fabric(accelerator=settings.accelerator, devices=1, precision=precision)
    contents = _contents(settings, task)
    _check_contents(folder, settings, contents)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_fixed(settings) | {_CONTENTS: contents}, indent=1)
    _write(folder / _SETTINGS, text + "\n")
    for seed in seeds:
        began = time.monotonic()
        rng.seed_all(seed)
        model = with_head(encoder, task.head, task.outputs)
        losses = loop.train(model, train, pieces, settings, seed, fabric)
        outputs = {
            split: loop.predict(model, features, pieces, settings, fabric)
            for split, features in evaluations.items()
        }
        scores = task.score(outputs)
        report = slope.sparsity_report(model)
        result = {
            "seed": seed,
            **scores,
            "train_loss": statistics.fmean(losses[-max(1, len(losses) // 10) :]),
            "steps": len(losses),
            "seconds": round(time.monotonic() - began, 1),
            "layers": report.summary(),
            "sparse_layers": len(report.sparse),
        }
        rows = "".join(f"{step},{loss!r}\n" for step, loss in enumerate(losses, start=1))
        files = task.predictions(outputs) | {
            "losses.csv": f"step,loss\n{rows}",
            RESULT: json.dumps(result, indent=1) + "\n",
        }
        _save(folder / f"seed{seed}", files, model.cpu() if settings.save else None, pieces)
        log.info("seed %d: %s", seed, ", ".join(f"{k} {v:.2f}" for k, v in scores.items()))


def _task(settings: Settings) -> GlueTask | SquadTask:
    from slope.finetune.glue import GlueTask
    from slope.finetune.squad import SquadTask

    return SquadTask(settings) if settings.task == "squad" else GlueTask(settings)


def _save(folder: Path, files: Mapping[str, str], model: Any, pieces: WordPieces) -> None:
    """Write what a seed gave, all of it or nothing."""
    draft = folder.with_name(folder.name + ".partial")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    for name, text in files.items():
        (draft / name).write_text(text, encoding="utf-8")
    if model is not None:
        _save_model(model, draft / _MODEL, pieces)
    os.replace(draft, folder)


def _save_model(model: Any, folder: Path, pieces: WordPieces) -> None:
    import slope
    from slope.layers import adapted_layers

    if any(True for _ in slope.sparse_layers(model)):
        slope.save_pretrained(model, folder, pieces.backend)
        return
    if any(True for _ in adapted_layers(model)):  # dense, or of masks without a compressed form
        slope.densify(model, fold_adapters=True)
    model.save_pretrained(folder)
    pieces.backend.save(str(folder / "tokenizer.json"))


def _check_device(settings: Settings) -> None:
    import torch

    gpu = torch.cuda.is_available()
    if settings.accelerator == "cuda" and not gpu:
        raise RuntimeError(
            f"accelerator=cuda, but torch {torch.__version__} finds no GPU; check nvidia-smi and "
            "the torch build, or type accelerator=cpu."
        )
    if settings.precision == "16-mixed" and (settings.accelerator == "cpu" or not gpu):
        raise ValueError(
            "precision=16-mixed needs a GPU: on a CPU there is no fp16 with a loss scaler; type "
            "precision=32-true, or bf16-mixed."
        )


def _check_folder(folder: Path, settings: Settings) -> None:
    path = folder / _SETTINGS
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"'{folder}' holds something else; type name=<another>.")
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    before.pop(_CONTENTS, None)
    now = _fixed(settings)
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"'{folder}' is of other settings: {key} is {before.get(key)} in it and "
                f"{now.get(key)} here; type name=<another>, or the settings that it was begun with."
            )


def _contents(settings: Settings, task: GlueTask | SquadTask | None) -> dict[str, str]:
    """SHA-256 of what is read, by the setting that leads to it: a path may lead elsewhere later."""
    from slope.training import initial

    found = {}
    with suppress(FileNotFoundError):
        found["init_from"] = initial.fingerprint(settings.init_from)
    if task is not None:
        found["data"] = hashlib.sha256(repr(task.content()).encode()).hexdigest()
    return found


def _check_contents(folder: Path, settings: Settings, now: Mapping[str, str]) -> None:
    path = folder / _SETTINGS
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8")).get(_CONTENTS, {})
    for key, digest in now.items():
        if before.get(key, digest) != digest:
            raise ValueError(
                f"'{folder}' has seeds of another {key}: what {key}={getattr(settings, key)} leads "
                "to has changed since; type name=<another> for what it is now."
            )


def _fixed(settings: Settings) -> dict[str, Any]:
    """What all seeds of a folder share."""
    return {key: value for key, value in asdict(settings).items() if key not in _MAY_DIFFER}


def _summary(settings: Settings, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    from importlib.metadata import version

    means = {}
    for name, first in results[0].items():
        if isinstance(first, float):
            values = [result[name] for result in results]
            spread = statistics.stdev(values) if len(values) > 1 else None
            means[name] = {"mean": statistics.fmean(values), "std": spread, "values": values}
    return {
        "task": settings.task,
        "init_from": settings.init_from,
        "dense": settings.dense,
        "layers": results[0]["layers"],
        "sparse_layers": results[0].get("sparse_layers"),  # older seeds do not tell
        "seeds": [result["seed"] for result in results],
        "metrics": means,
        "settings": _fixed(settings),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers")},
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The table for readers: one row per seed, then mean ± standard deviation."""
    metrics = {k: v for k, v in summary["metrics"].items() if k != "seconds"}
    zeros_kept = not summary["dense"] and summary["sparse_layers"] != 0
    trained = "Kept weights" if zeros_kept else "All weights"
    lines = [
        f"# {summary['task']} from {summary['init_from']}",
        "",
        f"{summary['layers']}. {trained} trained; "
        "metrics in percent, train_loss in nats (STS-B: squared error); ± is the standard "
        "deviation over the seeds.",
        "",
        f"| seed | {' | '.join(metrics)} |",
        "|---|" + "---:|" * len(metrics),
    ]
    for row, seed in enumerate(summary["seeds"]):
        cells = (f"{entry['values'][row]:.2f}" for entry in metrics.values())
        lines.append(f"| {seed} | {' | '.join(cells)} |")
    cells = (_spread(entry) for entry in metrics.values())
    lines.append(f"| mean | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(entry: Mapping[str, Any]) -> str:
    std = "" if entry["std"] is None else f" ± {entry['std']:.2f}"
    return f"{entry['mean']:.2f}{std}"


def _csv(results: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(results[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(results)
    return text.getvalue()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
