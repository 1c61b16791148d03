"""What to sparsify and how: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

from slope.pattern import NMPattern

METHODS = (
    "static-weight", "dynamic-weight", "static-input", "dynamic-input", "dynamic-output-grad",
    "fst", "s-ste",
)  # fmt: skip
MASKS = ("magnitude", "random", "transposable", "wanda")
ADAPTER_INITS = ("normal", "kaiming", "orthogonal")
BACKENDS = ("auto", "dense", "cusparselt", "gemm", "mma", "triton")
# An example of each setting that is a number.
_NUMBERS = {
    "seed": 0, "column_mask_interval": 100, "adapter_rank": 16, "adapter_scale": 0.0625,
    "unstructured_sparsity": 60, "srste_decay": 2e-4,
}  # fmt: skip
# The exact search over the masks of one m x m tile: 90 for 2:4, above 10^8 for 4:8.
MAX_TRANSPOSABLE_GROUP = 4


@dataclass(frozen=True)
class SparsityConfig:
    """Settings of :func:`slope.sparsify`.

    Attributes:
        pattern: ``"n:m"``, n kept of every m, for example ``"2:4"``.
        mask: how the static weight mask is chosen, once: ``"magnitude"`` of the given weights (on a
            random initialisation a uniformly random support), ``"random"``, ``"transposable"`` (n:m
            along d_in and d_out alike, of the largest total magnitude, so that the second pruning
            drops nothing and the input gradient is exact), or ``"wanda"`` (|weight| times the norm
            of its input feature, arXiv:2306.11695; needs ``sparsify(..., calibration=batches)``).
        seed: of random masks and of the adapters' initialisation, each layer its own stream.
        column_mask_interval: optimizer steps between refreshes of the backward's column mask;
            1 each step, 0 never. Read by SLoPe alone.
        adapter_rank: 0 for no adapters; a whole number is a rank; a number in (0, 1) is a ratio of
            d_in.
        adapter_scale: factor of the adapter's product; None means 1/rank.
        skip: name patterns (``fnmatch``) of modules that stay dense; a pattern that names a parent
            covers all below it.
        rules: ordered (name pattern, ``"n:m"`` or ``"dense"``); the first that matches wins and may
            sparsify a layer that is dense by default.
        backend: ``"auto"`` or a backend's name; of SLoPe, the other methods multiply densely.
        method: ``"static-weight"`` (SLoPe), ``"dynamic-weight"`` (SR-STE), ``"static-input"``,
            ``"dynamic-input"``, ``"dynamic-output-grad"``, ``"fst"`` or ``"s-ste"``.
        reduction_dim: True prunes along the dimension that each product sums over. False:
            static-weight prunes along d_out in the forward and d_in in the backward;
            dynamic-weight uses the forward's weight for the input gradient; the input methods do
            not prune along the tokens for the weight gradient; dynamic-output-grad uses one pruned
            gradient for both products. Unstructured masks have no such dimension and ignore it.
        prune_backward: False: the input gradient uses the forward's weight, not pruned again.
        unstructured_sparsity: percent of zeros of a static mask by the magnitudes of a whole weight
            matrix; None means n:m.
        mask_rescale: kept weights times sqrt(m/n), so that a layer under a random mask keeps the
            output variance of the dense one.
        srste_decay: share of a pruned weight that is added to its gradient in each optimizer step.
        mvue: FST prunes the output gradient, unbiased, for the weight gradient.
        adapter_init: how the down-projection is drawn, see :class:`slope.Adapter`.

    Raises:
        ValueError: for any value outside these, and for a combination that has no meaning.
    """

    pattern: str = "2:4"
    mask: str = "magnitude"
    seed: int = 0
    column_mask_interval: int = 1
    adapter_rank: int | float = 0
    adapter_scale: float | None = None
    skip: Sequence[str] = ()
    rules: Sequence[tuple[str, str]] = ()
    backend: str = "auto"
    method: str = "static-weight"
    reduction_dim: bool = True
    prune_backward: bool = True
    unstructured_sparsity: float | None = None
    mask_rescale: bool = False
    srste_decay: float = 0.0
    mvue: bool = True
    adapter_init: str = "normal"

    def __post_init__(self) -> None:
        NMPattern.parse(self.pattern)
        self._check_types()
        for name, choices in (
            ("mask", MASKS),
            ("backend", BACKENDS),
            ("method", METHODS),
            ("adapter_init", ADAPTER_INITS),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"{name}={value!r} is unknown; choose one of {', '.join(choices)}."
                )
        interval = self.column_mask_interval
        if not 0 <= interval < float("inf") or int(interval) != interval:
            raise ValueError(
                f"column_mask_interval={interval} must be a whole number of "
                "optimizer steps: 1 for each step, 100 for every hundredth, 0 for never."
            )
        rank = self.adapter_rank
        if not 0 <= rank < float("inf") or (rank > 1 and int(rank) != rank):
            raise ValueError(
                f"adapter_rank={rank} must be 0 (no adapters), a whole number, or a ratio of d_in "
                "between 0 and 1, for example 16 or 0.0156."
            )
        scale = self.adapter_scale
        if scale is not None and (scale == 0 or not math.isfinite(scale)):
            raise ValueError(
                f"adapter_scale={scale} must be a finite number other than 0, for example 0.0625; "
                "None means 1/rank."
            )
        if not isinstance(self.seed, Integral):
            raise ValueError(f"seed={self.seed} must be a whole number, for example seed=0.")
        for rule in self.rules:
            if isinstance(rule, str) or not isinstance(rule, Sequence) or len(rule) != 2:
                raise ValueError(
                    f"rule {rule!r} must be a pair (name pattern, 'n:m' or 'dense'), for example "
                    "('*.mlp.*', '2:4')."
                )
            if rule[1] != "dense":
                NMPattern.parse(rule[1])
        if not 0 <= self.srste_decay < math.inf:
            raise ValueError(
                f"srste_decay={self.srste_decay} must be a number of at least 0, for example 2e-4; "
                "0 is the plain straight-through estimator."
            )
        percent = self.unstructured_sparsity
        if percent is not None and not 0 < percent < 100:
            raise ValueError(
                f"unstructured_sparsity={percent} is outside (0, 100); it is the percentage of "
                "zeros, for example 60; None keeps the pattern n:m."
            )
        self._check_mask()
        self._check_method()
        if self.unstructured_sparsity is not None:
            self._check_unstructured()

    @property
    def compressed(self) -> bool:
        """True for SLoPe itself, whose layers store only the kept weights."""
        return (
            self.method == "static-weight"
            and self.reduction_dim
            and self.unstructured_sparsity is None
        )

    def _check_types(self) -> None:
        for name, example in _NUMBERS.items():
            value = getattr(self, name)
            optional = getattr(SparsityConfig, name) is None  # its default
            if value is None and optional:
                continue
            if not isinstance(value, Real) or isinstance(value, bool):
                raise ValueError(
                    f"{name}={value!r} must be a number{' or None' if optional else ''}, for "
                    f"example {name}={example}."
                )
        for name in ("reduction_dim", "prune_backward", "mask_rescale", "mvue"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}={value!r} must be True or False, without quotes.")
        named = repr([self.skip]) if isinstance(self.skip, str) else "['lm_head']"
        for name, typed in (("skip", named), ("rules", "[('*.mlp.*', '2:4')]")):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Collection):
                raise ValueError(f"{name}={value!r} must be a list, for example {name}={typed}.")
        for pattern in self.skip:
            if not isinstance(pattern, str):
                raise ValueError(
                    f"skip holds {pattern!r}, which is no text; name layers as "
                    "model.named_modules() does, for example skip=['lm_head']."
                )

    def _check_mask(self) -> None:
        if self.mask != "magnitude" and self.method != "static-weight":
            raise ValueError(
                f"mask={self.mask!r} with method={self.method!r} has no meaning: it chooses no "
                "weight mask once and for all; choose mask='magnitude' or method='static-weight'."
            )
        if self.mask_rescale and self.mask != "random":
            raise ValueError(
                f"mask_rescale=True with mask={self.mask!r} has no meaning: it restores the output "
                "variance that a random mask takes; choose mask='random' or mask_rescale=False."
            )
        if self.mask in ("transposable", "wanda") and not self.reduction_dim:
            why = {
                "transposable": "the mask is n:m along d_in and d_out alike",
                "wanda": "weights along d_out read the same input, so its norm decides nothing",
            }[self.mask]
            raise ValueError(
                f"mask={self.mask!r} with reduction_dim=False has no meaning: {why}; choose "
                "reduction_dim=True or mask='magnitude'."
            )
        if self.mask != "transposable":
            return
        for text in (self.pattern, *(rule[1] for rule in self.rules if rule[1] != "dense")):
            if NMPattern.parse(text).m > MAX_TRANSPOSABLE_GROUP:
                raise ValueError(
                    f"mask='transposable' with pattern {text}: the exact search serves m up to "
                    f"{MAX_TRANSPOSABLE_GROUP}; choose pattern 2:4 or mask='magnitude'."
                )

    def _check_method(self) -> None:
        method = self.method
        if self.srste_decay and method not in ("dynamic-weight", "fst"):
            raise ValueError(
                f"srste_decay={self.srste_decay:g} with method={method!r} has no meaning: no "
                "pruned weight of it learns; choose srste_decay=0, or method='dynamic-weight' or "
                "'fst'."
            )
        if not self.mvue and method != "fst":
            raise ValueError(
                f"mvue=False with method={method!r} has no meaning: only fst prunes by MVUE; leave "
                "mvue=True or choose method='fst'."
            )
        if method == "fst":
            for text in (self.pattern, *(rule[1] for rule in self.rules if rule[1] != "dense")):
                if NMPattern.parse(text).m > MAX_TRANSPOSABLE_GROUP:
                    raise ValueError(
                        f"method='fst' with pattern {text}: its transposable masks are searched "
                        f"exactly for m up to {MAX_TRANSPOSABLE_GROUP}; choose pattern 2:4 or "
                        "method='dynamic-weight'."
                    )
        if method in ("fst", "s-ste") and not self.reduction_dim:
            raise ValueError(
                f"reduction_dim=False with method={method!r} has no meaning: the input gradient "
                "uses the forward's weight in any case; choose reduction_dim=True."
            )
        if self.prune_backward:
            return
        if method not in ("static-weight", "dynamic-weight"):
            raise ValueError(
                f"prune_backward=False with method={method!r} has no meaning: it prunes no weight "
                "a second time; choose prune_backward=True, or method='static-weight' or "
                "'dynamic-weight'."
            )
        if method == "dynamic-weight" and not self.reduction_dim:
            raise ValueError(
                "prune_backward=False with method='dynamic-weight' and reduction_dim=False says it "
                "twice: the input gradient uses the forward's weight; choose one of the two."
            )

    def _check_unstructured(self) -> None:
        given = f"unstructured_sparsity={self.unstructured_sparsity:g}"
        if self.method != "static-weight":
            raise ValueError(
                f"{given} with method={self.method!r} has no meaning: an unstructured mask is a "
                "static weight mask; choose method='static-weight' or unstructured_sparsity=None."
            )
        if self.mask != "magnitude":
            raise ValueError(
                f"{given} with mask={self.mask!r} has no meaning: an unstructured mask keeps the "
                "largest magnitudes; choose mask='magnitude' or unstructured_sparsity=None."
            )
        if not self.prune_backward:
            raise ValueError(
                f"{given} with prune_backward=False has no meaning: an unstructured mask is not "
                "pruned a second time; choose prune_backward=True or unstructured_sparsity=None."
            )
        for name, target in self.rules:
            if target not in ("dense", str(self.pattern)):
                raise ValueError(
                    f"{given} with the rule ({name!r}, {target!r}) has no meaning: its layers have "
                    "no n:m pattern; choose 'dense' in the rule or unstructured_sparsity=None."
                )
