"""What a comparison consists of: its methods, its seeds, and the configuration of every run.

A comparison is an experiment (``configs/experiment/compare/`` and others) with a section
``compare``: the ``methods``, each with ``about``, ``overrides`` and perhaps the ``panel`` of the
figure that it is drawn in and the scores ``published`` for it; the ``seeds``; the ``baseline`` that
the others are measured against; perhaps a ``reference``, a second method that is drawn in every
panel; and perhaps the tasks that every run is fine-tuned on, ``finetune`` (:mod:`.columns`).

Every pair of a method and a seed is one run of the training program. What a method may change is
how its weights are pruned, started and optimised; whatever would give it other data, another model
or another number of steps is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from slope import configs
from slope.compare import columns
from slope.compare.columns import Column
from slope.finetune import Settings
from slope.spelling import did_you_mean

ENDED = ("finished", "diverged")
"""States of runs that are not repeated."""
SUMMARY = "summary.json"
"""File of a run that is trained."""
OUTCOME = "outcome.json"
"""File of a run that ended otherwise: why."""

_MAY_DIFFER = (
    "pruner",
    "train.optimizer",
    "train.scheduler",
    "init_from",
    "callbacks.diagnostics",
)
_STEPS = "trainer.max_steps"
# What a finished run may have been done with differently, its numbers being the same.
_UNREAD = (
    "paths",
    "name",
    "resume",
    "resume_iter",
    "logger",
    "plot",
    "demo",
    "generate",
    "trainer.enable_progress_bar",
    "datamodule.cache_dir",
    "datamodule.num_workers",
    "callbacks.checkpoint",
    "callbacks.evaluation",
)
_LABEL = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        label: short name; a folder is named after it.
        about: what it is, for the reader of the table.
        overrides: what sets it apart, as on the command line.
        panel: the part of the figure that it is drawn in; None where it has none of its own.
        published: what a paper gives for it, column of fine-tuning to score.
    """

    label: str
    about: str
    overrides: tuple[str, ...]
    panel: str | None = None
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Run:
    """One method with one seed.

    Attributes:
        method: its label.
        seed: of the data order, the initial weights and the masks.
        cfg: the resolved configuration of the training program.
        config_file: where the comparison keeps that configuration.
        fine_tunings: what is done with its checkpoint when it is trained.
    """

    method: str
    seed: int
    cfg: DictConfig
    config_file: Path
    fine_tunings: tuple[Settings, ...] = ()

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.method} seed {self.seed}"

    @property
    def log_dir(self) -> Path:
        """Where the training program writes its log, metrics and summary."""
        return Path(self.cfg.paths.log_dir)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        return int(self.cfg.trainer.max_steps)

    @property
    def trained(self) -> bool:
        """Whether the training program has done all steps."""
        return (self.log_dir / SUMMARY).is_file()

    def summary(self) -> dict[str, Any]:
        """What the training program says of a run that is trained."""
        found: dict[str, Any] = json.loads((self.log_dir / SUMMARY).read_text(encoding="utf-8"))
        return found

    def left_to_tune(self) -> list[Settings]:
        """The fine-tunings to come; none if the weights are of no use."""
        left = [chosen for chosen in self.fine_tunings if chosen.unfinished()]
        if left and self.trained and not math.isfinite(float(self.summary()["val_loss"])):
            return []
        return left

    def state(self) -> str:
        """``new``, ``begun``, ``finished``, ``diverged`` or ``failed``."""
        if self.trained and not self.left_to_tune():
            return "finished"
        outcome = read_outcome(self.log_dir)
        if outcome is not None:
            return str(outcome["status"])
        return "begun" if (self.log_dir / "config.yaml").is_file() else "new"


@dataclass(frozen=True)
class Comparison:
    """A list of methods, and the runs that it takes.

    Attributes:
        name: of the folder under ``logs/``.
        directory: that folder.
        methods: in the order of the file.
        seeds: of every method.
        baseline: label of the method that the others are measured against.
        reference: label of a second method drawn in every panel, or None.
        runs: one per method and seed; all methods of a seed before the next seed, so that a
            comparison that is stopped early has whole seeds to show.
        columns: what every run is fine-tuned on.
        progress_bar: draw one over all runs.
        devices: ``trainer.devices`` of a run.
    """

    name: str
    directory: Path
    methods: Mapping[str, Method]
    seeds: tuple[int, ...]
    baseline: str
    reference: str | None
    runs: tuple[Run, ...]
    columns: tuple[Column, ...] = ()
    progress_bar: bool = True
    devices: Any = 1

    def check_jobs(self, jobs: int | None) -> None:
        """See whether so many runs can be done at once.

        Raises:
            ValueError: if they cannot.
        """
        if jobs is not None and jobs < 1:
            raise ValueError(f"--jobs {jobs} must be at least 1.")
        if self.devices != 1 and jobs not in (None, 1):
            raise ValueError(
                f"--jobs {jobs} with trainer.devices={self.devices}: runs at once have one device "
                "each; type trainer.devices=1, or --jobs 1."
            )


def choices() -> list[str]:
    """What may stand behind ``experiment=`` of a comparison."""
    return configs.comparisons()


def load(overrides: Sequence[str]) -> Comparison:
    """Read a comparison and compose the configuration of each of its runs.

    Args:
        overrides: as on the command line, ``experiment=compare/...`` among them; they hold for
            every method, and a method's own come after them.

    Raises:
        ValueError: if an override or the ``compare`` section is wrong, a method changes what all
            methods must share, or a run that exists was done with other settings.
    """
    for text in overrides:
        if text.startswith("seed="):
            raise ValueError(
                f"{text} has no meaning for a comparison, each method is run once per seed; type "
                f"'compare.seeds=[{text.partition('=')[2]}]'."
            )
    cfg = configs.compose(overrides)
    section = _section(cfg, overrides)
    tuned = columns.read(section.get("finetune"))
    methods = {label: _method(label, entry, tuned) for label, entry in section["methods"].items()}
    seeds = _seeds(section["seeds"])
    baseline = _label(section["baseline"], "baseline", methods)
    reference = section.get("reference")
    if reference is not None:
        reference = _label(reference, "reference", methods)
    if int(cfg.trainer.num_nodes) != 1:
        raise ValueError(
            f"trainer.num_nodes={cfg.trainer.num_nodes}: a comparison runs on one machine; type "
            "trainer.num_nodes=1, trainer.devices for the GPUs of a run, and --jobs N for several "
            "runs of one device at once."
        )
    shared = flat(cfg)
    composed = {label: _compose(shared, overrides, method) for label, method in methods.items()}
    directory = Path(cfg.paths.log_dir)
    runs = tuple(
        _run(composed[label], label, seed, cfg, tuned) for seed in seeds for label in methods
    )
    for run in runs:
        _check_unchanged(run, str(cfg.name))
    return Comparison(
        str(cfg.name),
        directory,
        methods,
        seeds,
        baseline,
        reference,
        runs,
        tuned,
        bool(cfg.trainer.enable_progress_bar),
        cfg.trainer.devices,
    )


def select(comparison: Comparison, labels: Iterable[str] | None) -> list[Run]:
    """The runs of some methods; None: of all.

    Raises:
        ValueError: for a label that the comparison does not have.
    """
    if labels is None:
        return list(comparison.runs)
    wanted = [_label(label.strip(), "--only", comparison.methods) for label in labels]
    return [run for run in comparison.runs if run.method in wanted]


def read_outcome(log_dir: Path) -> dict[str, Any] | None:
    """Why a run did not finish: ``status``, ``message`` and, if it diverged, ``step``."""
    path = log_dir / OUTCOME
    if not path.is_file():
        return None
    outcome: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return outcome


def fine_tunings_file(config_file: Path) -> Path:
    """Where the settings of a run's fine-tunings are kept, a list in JSON, if it has any."""
    return config_file.with_suffix(".finetune.json")


def _section(cfg: DictConfig, overrides: Sequence[str]) -> dict[str, Any]:
    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    section = tree["compare"]
    if section is None:
        chosen = [text for text in overrides if text.startswith("experiment=")]
        what = f"{chosen[-1]} is one run, `slope train` does it" if chosen else "nothing to compare"
        raise ValueError(f"{what}; choose experiment={' or experiment='.join(choices())}.")
    if not isinstance(section, dict):
        raise ValueError(f"compare={section!r} must be a section with methods and seeds.")
    _known("compare", section, ("methods", "seeds", "baseline"), ("reference", "finetune"))
    if not isinstance(section["methods"], dict) or not section["methods"]:
        raise ValueError(
            f"compare.methods={section['methods']!r} must name at least one method, for example "
            "{dense: {about: nothing is pruned, overrides: [pruner=none]}}."
        )
    return section


def _method(label: Any, entry: Any, tuned: Sequence[Column]) -> Method:
    where = f"compare.methods.{label}"
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise ValueError(
            f"{where}: a label names a folder; use letters, digits and . _ - +, for example "
            "slope-r16."
        )
    if not isinstance(entry, dict):
        raise ValueError(f"{where}={entry!r} must be a section {{about: text, overrides: [...]}}.")
    _known(where, entry, ("about", "overrides"), ("panel", "published"))
    overrides = entry["overrides"]
    if not isinstance(overrides, list) or not all(isinstance(text, str) for text in overrides):
        raise ValueError(
            f"{where}.overrides={overrides!r} must be a list of texts, for example "
            "[pruner=slope, pruner.add_lora=false]."
        )
    panel, published = entry.get("panel"), entry.get("published") or {}
    labels = [column.label for column in tuned]
    if not isinstance(published, dict) or not all(
        key in labels and isinstance(value, float | int) for key, value in published.items()
    ):
        raise ValueError(
            f"{where}.published={published!r} must give numbers for columns of compare.finetune"
            f" ({', '.join(labels) or 'there are none'})."
        )
    return Method(
        label,
        str(entry["about"]),
        tuple(overrides),
        None if panel is None else str(panel),
        {str(key): float(value) for key, value in published.items()},
    )


def _known(
    where: str, entry: Mapping[Any, Any], needed: Sequence[str], more: Sequence[str]
) -> None:
    for key in entry:
        if key not in (*needed, *more):
            raise ValueError(
                f"{where} has an unknown key {key!r}"
                f"{did_you_mean(str(key), (*needed, *more))} Keys: {', '.join((*needed, *more))}."
            )
    for key in needed:
        if key not in entry:
            raise ValueError(f"{where} has no {key!r}; it needs {', '.join(needed)}.")


def _seeds(seeds: Any) -> tuple[int, ...]:
    def is_seed(seed: Any) -> bool:
        return isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0

    right = isinstance(seeds, list) and seeds and all(map(is_seed, seeds))
    if not right or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"compare.seeds={seeds!r} must be a list of different whole numbers of at least 0, for "
            "example compare.seeds=[0,1,2]."
        )
    return tuple(seeds)


def _label(label: Any, where: str, methods: Mapping[str, Method]) -> str:
    if label not in methods:
        raise ValueError(
            f"{where}: there is no method {label!r}{did_you_mean(str(label), methods)} "
            f"Methods: {', '.join(methods)}."
        )
    return str(label)


def _compose(shared: Mapping[str, Any], overrides: Sequence[str], method: Method) -> DictConfig:
    """The configuration of one method, seed and folders not yet its own."""
    try:
        composed = configs.compose([*overrides, *method.overrides])
    except ValueError as error:
        raise ValueError(f"method {method.label!r}: {error}") from error
    own = flat(composed)
    for key in sorted({*shared, *own}):
        theirs, mine = shared.get(key), own.get(key)
        # Fewer steps take nothing from the others: what prunes once needs one.
        fewer = key == _STEPS and isinstance(mine, int) and 0 < mine < int(theirs or 0)
        if theirs != mine and not fewer and not _within(key, _MAY_DIFFER):
            raise ValueError(
                f"method {method.label!r} changes {key} from {theirs!r} to {mine!r}, but all "
                f"methods of a comparison share data, model, steps and seeds; set it for all "
                f"({key}={mine}), or take it out of the method, which may change "
                f"{', '.join(_MAY_DIFFER)} and take fewer steps ({_STEPS})."
            )
    with open_dict(composed):
        composed.compare = None
    return composed


def _run(
    composed: DictConfig, label: str, seed: int, cfg: DictConfig, tuned: Sequence[Column]
) -> Run:
    own, directory = composed.copy(), Path(cfg.paths.log_dir)
    with open_dict(own):
        own.seed = seed
        own.name = f"{cfg.name}-{label}-seed{seed}"
        own.paths.log_dir = str(directory / label / f"seed{seed}")
        own.paths.checkpoint_dir = str(Path(cfg.paths.checkpoint_dir) / label / f"seed{seed}")
        own.resume, own.resume_iter = True, -1
        own.trainer.enable_progress_bar = False
    OmegaConf.resolve(own)
    return Run(
        label,
        seed,
        own,
        directory / "configs" / f"{label}-seed{seed}.yaml",
        columns.fine_tunings(tuned, own, f"{cfg.name}/{label}/seed{seed}"),
    )


def _check_unchanged(run: Run, name: str) -> None:
    """What is there of a run must be of this comparison, unless there is nothing worth keeping."""
    path = run.log_dir / "config.yaml"
    saved = any(Path(run.cfg.paths.checkpoint_dir).glob("*.ckpt"))
    if not path.is_file() or not (saved or run.state() in ENDED):
        return
    before, now = flat(OmegaConf.load(path)), flat(run.cfg)
    changed = [
        f"{key}={before.get(key)}, here it is {now.get(key)}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key) and not _within(key, _UNREAD)
    ]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise ValueError(
            f"comparison {name!r} holds a run of {run.name} that was done with "
            f"{'; '.join(changed[:3])}{more}. Type the settings of then, or name=<another> for a "
            "new comparison."
        )


def _within(key: str, names: Iterable[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def flat(cfg: Any) -> dict[str, Any]:
    """Dotted key to value, the ``compare`` section left out; lists stay whole.

    Example:
        >>> flat(OmegaConf.create({"a": {"b": [1, 2]}, "c": None}))
        {'a.b': [1, 2], 'c': None}
    """
    values: dict[str, Any] = {}

    def visit(node: Mapping[str, Any], prefix: str) -> None:
        for key, value in node.items():
            if isinstance(value, dict) and value:
                visit(value, f"{prefix}{key}.")
            else:
                values[f"{prefix}{key}"] = value

    tree = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(tree, dict)
    visit({str(key): value for key, value in tree.items() if key != "compare"}, "")
    return values
