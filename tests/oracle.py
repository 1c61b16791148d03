"""What SLoPe computes, written out naively: the reference that the tests compare the library with.

Nothing here imports ``slope``. Masks are loops over Python floats; the layer keeps its whole dense
weight and multiplies with explicit 0/1 masks. T tokens, I d_in, O d_out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def row_keep(weight: Tensor, n: int, m: int) -> Tensor:
    """The n largest of every m along d_in; the lower index wins a tie."""
    rows = weight.double().tolist()
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    for o, row in enumerate(rows):
        for start in range(0, len(row), m):
            ranked = sorted(range(start, start + m), key=lambda i: (-abs(row[i]), i))
            for i in ranked[:n]:
                keep[o, i] = True
    return keep


def column_keep(weight: Tensor, kept: Tensor, n: int, m: int) -> Tensor:
    """Of the kept entries, the n largest of every m along d_out; pruned entries never compete."""
    rows, kept_rows = weight.double().tolist(), kept.tolist()
    d_out, d_in = weight.shape
    keep = torch.zeros(weight.shape, dtype=torch.bool)
    for i in range(d_in):
        for start in range(0, d_out, m):
            alive = [o for o in range(start, min(start + m, d_out)) if kept_rows[o][i]]
            for o in sorted(alive, key=lambda o: (-abs(rows[o][i]), o))[:n]:
                keep[o, i] = True
    return keep


def imposed_sparsity(n: int, m: int) -> float:
    """Lemma 2.1: the extra zeros of the second pruning, as a share of all entries."""
    s = n / m
    chances = [math.comb(m, j) * s**j * (1 - s) ** (m - j) for j in range(m + 1)]
    return sum(chances[j] * (j - n) / m for j in range(n + 1, m + 1))


def imposed_sparsity_std(n: int, m: int, groups: int) -> float:
    """Standard error of the same share measured on that many independent column groups."""
    s = n / m
    dropped = [max(j - n, 0) / m for j in range(m + 1)]
    weights = [math.comb(m, j) * s**j * (1 - s) ** (m - j) for j in range(m + 1)]
    mean = sum(w * d for w, d in zip(weights, dropped, strict=True))
    second = sum(w * d * d for w, d in zip(weights, dropped, strict=True))
    return math.sqrt((second - mean * mean) / groups)


def kept_values(dense: Tensor, keep: Tensor) -> Tensor:
    """The kept entries of each row in order, (O, K)."""
    return torch.stack([row[k] for row, k in zip(dense, keep, strict=True)])


def bit_stream(numbers: list[int], bits: int) -> list[int]:
    """Bytes that hold the numbers one after the other, least significant bit first."""
    total = 0
    for place, number in enumerate(numbers):
        total |= number << (place * bits)
    return list(total.to_bytes(math.ceil(len(numbers) * bits / 8), "little"))


class _MaskedProduct(torch.autograd.Function):
    """Y = X (W*row)^T;  grad X = grad Y (W*column);  grad W = (grad Y^T X) * row."""

    @staticmethod
    def forward(ctx, x, weight, row, column):
        ctx.save_for_backward(x, weight, row, column)
        return x @ (weight * row).T

    @staticmethod
    def backward(ctx, dy):
        x, weight, row, column = ctx.saved_tensors
        x_TI, dy_TO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return dy @ (weight * column), (dy_TO.T @ x_TI) * row, None, None


class DenseMaskedLinear(nn.Module):
    """A linear layer with its whole dense weight, masked by hand, and a hand-written adapter."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, n: int, m: int, row: Tensor | None = None
    ):
        super().__init__()
        self.n, self.m = n, m
        self.register_buffer("row", row_keep(weight, n, m) if row is None else row)
        self.weight = nn.Parameter(weight.detach().clone() * self.row)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.register_buffer("column", self.row.clone())
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None
        self.scale, self.active = 1.0, False
        self.refresh()

    def refresh(self) -> None:
        """Choose the column mask again from the present weights."""
        self.column = column_keep(self.weight.detach(), self.row, self.n, self.m)

    def keep_all_columns(self) -> None:
        """Make the input gradient exact."""
        self.column = self.row.clone()

    def forward(self, x: Tensor) -> Tensor:
        y = _MaskedProduct.apply(x, self.weight, self.row, self.column)
        if self.bias is not None:
            y = y + self.bias
        if self.active:
            y = y + (x @ self.down.T) @ self.up.T * self.scale
        return y


# ---------------------------------------------------------------- the other pruning methods


def largest_of_all(weight: Tensor, percent_zeros: float) -> Tensor:
    """Unstructured mask: the largest magnitudes of the whole matrix; the first of equals wins."""
    flat = weight.double().flatten().tolist()
    kept = math.floor((100 - percent_zeros) * len(flat) / 100)
    ranked = sorted(range(len(flat)), key=lambda i: (-abs(flat[i]), i))
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[ranked[:kept]] = True
    return keep.view(weight.shape)


def token_keep(matrix: Tensor, kept: Tensor, n: int, m: int) -> Tensor:
    """Of the kept entries, the n largest of every m consecutive rows; a ragged tail stays."""
    whole = len(matrix) - len(matrix) % m
    return torch.cat([column_keep(matrix[:whole], kept[:whole], n, m), kept[whole:]])


def feature_keep(x: Tensor, n: int, m: int) -> Tensor:
    """The n features of every m whose columns of x have the largest L2 norms, (I,)."""
    norms = [math.sqrt(sum(v * v for v in column)) for column in x.double().t().tolist()]
    return row_keep(torch.tensor([norms], dtype=torch.float64), n, m)[0]


def static_products(x, weight, dy, keep, backward_keep):
    """One static mask: Y = X W1^T, grad X = grad Y W2, grad W = (grad Y^T X) * mask."""
    return x @ (weight * keep).T, dy @ (weight * backward_keep), (dy.T @ x) * keep


def dynamic_weight_products(x, weight, dy, n, m, double_pruned):
    """SR-STE: W^R in the forward, every weight gets its gradient."""
    row = row_keep(weight, n, m)
    column = column_keep(weight, row, n, m) if double_pruned else row
    return x @ (weight * row).T, dy @ (weight * column), dy.T @ x


def input_products(x, weight, dy, n, m, keep, along_tokens):
    """Pruned inputs: the same mask on grad X; for grad W perhaps pruned along the tokens too."""
    pruned = x * keep
    again = x * token_keep(x, keep, n, m) if along_tokens else pruned
    return pruned @ weight.T, (dy @ weight) * keep, dy.T @ again


def output_grad_products(x, weight, dy, n, m, along_tokens):
    """Pruned output gradients: along d_out for grad X, along the tokens or d_out for grad W."""
    along_out = dy * row_keep(dy, n, m)
    everything = torch.ones_like(dy, dtype=torch.bool)
    other = dy * token_keep(dy, everything, n, m) if along_tokens else along_out
    return x @ weight.T, along_out @ weight, other.T @ x
