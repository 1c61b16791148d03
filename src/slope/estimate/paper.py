"""The paper's memory accounting and that of the authors' script (arXiv 2405.16325).

Per group of 4 weights the paper counts, in bits: dense training 4*16 + 4*16 + 2*4*32 = 384
(weights, gradients, Adam's moments); sparse training 2*(2*16 + 3) + 4*8 + 2*16 + 2*2*32 = 262 (two
sparse copies with 3 bits of positions, a mask of a byte per weight, gradients, moments); inference
64 and 2*16 + 3 = 35. The stored format has 4 bits of positions, two per kept value: 264 and 36.

The published ratios are of shortened models with dense embeddings and head, and the script that
made them halves gradients and moments of *every* matrix, embeddings and head included, which
training them would not allow. This module counts it that way and changes nothing to come closer.
"""

from __future__ import annotations

from dataclasses import dataclass

DENSE_TRAINING = 4 * 16 + 4 * 16 + 2 * 4 * 32
DENSE_INFERENCE = 4 * 16
POSITIONS_AS_PRINTED = 3
POSITIONS_AS_STORED = 4
RANK_RATIOS = (0.0, 0.015625, 0.0625)


def sparse_training(positions: int) -> int:
    """Bits per 4 weights of a sparse layer in training.

    Example:
        >>> sparse_training(POSITIONS_AS_PRINTED) / DENSE_TRAINING
        0.6822916666666666
    """
    return 2 * (2 * 16 + positions) + 4 * 8 + 2 * 16 + 2 * 2 * 32


def sparse_inference(positions: int) -> int:
    """Bits per 4 weights of a sparse layer that serves.

    Example:
        >>> sparse_inference(POSITIONS_AS_PRINTED) / DENSE_INFERENCE
        0.546875
    """
    return 2 * 16 + positions


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
class Weights:
    """What the accounting reads of a model.

    Attributes:
        linears: (O, I) of every linear layer but the head: all are sparse, the first QKV too.
        matrices: numbers in the other matrices: embeddings, positions, an untied head.
        vectors: numbers in biases and norms.
        width: hidden size, which ranks are ratios of.
    """

    linears: tuple[tuple[int, int], ...]
    matrices: int
    vectors: int
    width: int


def weights_of(model: str, blocks: int | None = None) -> Weights:
    """Count a model of the configurations, shortened to ``blocks``; needs no memory.

    Args:
        model: its name, for example ``"opt/66b"``.
        blocks: None for all.
    """
    import torch

    from slope import configs, sparsity_report
    from slope.models import build_model, structure

    overrides = [f"model={model}"]
    if blocks is not None:
        key = "n_layer" if model.startswith("gpt") else "num_hidden_layers"
        overrides.append(f"model.config.{key}={blocks}")
    if model == "mistral/7b":
        overrides.append("model.config.vocab_size=32768")  # of release v0.3, which was measured
    cfg = configs.compose(overrides)
    with torch.device("meta"):
        built = build_model(cfg.model, 1, max_length=1)
    head = structure(built).head
    linears = tuple(
        (layer.out_features, layer.in_features)
        for layer in sparsity_report(built).layers
        if layer.name != head
    )
    sizes = [(parameter.ndim, parameter.numel()) for parameter in built.parameters()]
    sparse = sum(out * in_ for out, in_ in linears)
    return Weights(
        linears=linears,
        matrices=sum(size for ndim, size in sizes if ndim > 1) - sparse,
        vectors=sum(size for ndim, size in sizes if ndim == 1),
        width=int(built.config.hidden_size),
    )


def training_ratio(weights: Weights, positions: int = POSITIONS_AS_STORED) -> float:
    """Sparse / dense memory of training, as the script counts."""
    size = sum(out * in_ for out, in_ in weights.linears)
    dense = DENSE_TRAINING / 4 * (size + weights.matrices + weights.vectors)
    halved = 16 + 16 / 2 + 2 * 32 / 2  # the weight stays dense, gradient and moments do not
    sparse = sparse_training(positions) / 4 * size + halved * weights.matrices
    return (sparse + DENSE_TRAINING / 4 * weights.vectors) / dense


def inference_ratio(
    weights: Weights, rank_ratio: float = 0.0, positions: int = POSITIONS_AS_STORED
) -> float:
    """Sparse / dense memory of inference, with adapters of (I + O) r numbers.

    The rank is ``rank_ratio`` of the hidden size for every layer, rounded down to a multiple of 16.
    """
    size = sum(out * in_ for out, in_ in weights.linears)
    rank = int(rank_ratio * weights.width) // 16 * 16
    adapters = sum((out + in_) * rank for out, in_ in weights.linears)
    rest = weights.matrices + weights.vectors
    sparse = sparse_inference(positions) / 4 * size + 16 * (rest + adapters)
    return sparse / (16 * (size + rest))
