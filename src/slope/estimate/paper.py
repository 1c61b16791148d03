"""The paper's memory accounting and that of the authors' script (arXiv 2405.16325).

Per group of 4 weights the paper counts, in bits: dense training weights, gradients and Adam's
moments; sparse training two sparse copies, a mask of a byte per weight, gradients and moments. It
prints 3 bits of positions; the tensors hold 4, two per kept value, and so does this module: more of
the published ratios follow. These are of shortened models with dense embeddings and head, and the
script that made them halves gradients and moments of *every* matrix, embeddings and head included,
which training them would not allow. It is counted that way here, the few biases and norms too, and
nothing is changed to come closer.
"""

from __future__ import annotations

from dataclasses import dataclass

from slope.estimate.report import estimate
from slope.estimate.request import parse

_POSITIONS = 4
DENSE_TRAINING = 4 * 16 + 4 * 16 + 2 * 4 * 32
SPARSE_TRAINING = 2 * (2 * 16 + _POSITIONS) + 4 * 8 + 2 * 16 + 2 * 2 * 32
DENSE_SERVING = 4 * 16
SPARSE_SERVING = 2 * 16 + _POSITIONS
RANK_RATIOS = (0.0, 0.015625, 0.0625)
TOLERANCE = 0.02


@dataclass(frozen=True)
class Published:
    """A row of the paper's memory table.

    Attributes:
        name: the paper's name of the model.
        model: ours.
        blocks_training: blocks of the shortened model that was measured in training.
        blocks_inference: in inference.
        training: sparse / dense memory.
        inference: the same at the rank ratios of ``RANK_RATIOS``.
    """

    name: str
    model: str
    blocks_training: int
    blocks_inference: int
    training: float
    inference: tuple[float, float, float]


PUBLISHED = (
    Published("OPT-66B", "opt/66b", 2, 3, 0.67, (0.63, 0.65, 0.70)),
    Published("OPT-30B", "opt/30b", 3, 6, 0.67, (0.61, 0.63, 0.69)),
    Published("OPT-13B", "opt/13b", 6, 12, 0.68, (0.51, 0.62, 0.68)),
    Published("OPT-6.6B", "opt/6.7b", 12, 12, 0.68, (0.60, 0.62, 0.68)),
    Published("OPT-2.6B", "opt/2.7b", 12, 12, 0.67, (0.62, 0.64, 0.70)),
    Published("LLaMA-3-8B", "llama3/8b", 4, 4, 0.63, (0.66, 0.69, 0.71)),
    Published("Mistral-v0.3-7B", "mistral/7b", 2, 2, 0.68, (0.66, 0.69, 0.65)),
)


@dataclass(frozen=True)
class Row:
    """A published ratio, sparse / dense, beside what is counted for the same shortened model.

    Attributes:
        what: what it is of.
        blocks: of the shortened model.
        published: in the paper's table.
        paper: by the paper's accounting.
        ours: of what a run of this library holds: training state under bf16-mixed, or bf16 weights
            and adapters that serve.
    """

    what: str
    blocks: int
    published: float
    paper: float
    ours: float

    @property
    def follows(self) -> bool:
        """Whether the published ratio follows from the paper's accounting."""
        return abs(self.published - self.paper) <= TOLERANCE


def rows(model: str) -> list[Row]:
    """The published ratios of a model and ours.

    Args:
        model: its name in the configurations.

    Raises:
        ValueError: if the paper has no row of it.
    """
    found = next((row for row in PUBLISHED if row.model == model), None)
    if found is None:
        known = ", ".join(row.model.replace("/", "-") for row in PUBLISHED)
        raise ValueError(
            f"--accounting paper: the paper's table has no {model}; choose model= from {known}."
        )
    made = [_row("training", found, found.blocks_training, found.training, 0.0)]
    for ratio, published in zip(RANK_RATIOS, found.inference, strict=True):
        what = f"inference, rank {ratio:.2%}"
        made.append(_row(what, found, found.blocks_inference, published, ratio))
    return made


def _row(what: str, found: Published, blocks: int, published: float, rank_ratio: float) -> Row:
    words = [f"model={found.model}", f"model.config.num_hidden_layers={blocks}"]
    if found.model == "mistral/7b":
        words.append("model.config.vocab_size=32768")  # of release v0.3, which was measured
    width = parse(words).cfg.model.config.hidden_size
    rank = int(rank_ratio * width) // 16 * 16
    counted = estimate(parse([*words, f"rank={rank}"]))
    model, dense, sparse = counted.model, counted.dense, counted.sparse
    # All layers but the head are sparse in the script, the first QKV too.
    linears = [layer for layer in model.linears if layer.out_features != model.vocabulary]
    size = sum(layer.size for layer in linears)
    if what == "training":
        halved = 4 * 16 + (4 * 16 + 2 * 4 * 32) // 2  # the weight stays dense
        total = SPARSE_TRAINING * size + halved * (model.parameters - size)
        paper = total / (DENSE_TRAINING * model.parameters)
        ours = sparse.training.state / dense.training.state
    else:
        rest = model.parameters - size
        rest += rank * sum(layer.out_features + layer.in_features for layer in linears)
        paper = (SPARSE_SERVING * size + DENSE_SERVING * rest) / (DENSE_SERVING * model.parameters)
        ours = (sparse.serving.weights + sparse.serving.adapters) / dense.serving.weights
    return Row(what, blocks, published, paper, ours)
