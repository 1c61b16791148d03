"""Which path is the fastest for a product: measured once, remembered on disk.

A choice belongs to (operation, shape, bucket of tokens, dtypes, GPU, library versions). Paths are
timed as a user runs them, back to back on the current stream, so a path that keeps the host longer
than the GPU loses where it should. Not so where a decode kernel competes, that is for few tokens:
there every path waits for the host, about as long, so kernels alone are timed. They are what CUDA
graphs and compiled models run. Few are up to 1024, in small layers up to 4096.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from slope.backends.choices import ChoiceStore
from slope.backends.decoding import MAX_TOKENS

log = logging.getLogger(__name__)

DECODE_PATHS = frozenset(("mma", "triton"))
ROUNDS = 5
CALLS_PER_ROUND = 8
_CYCLES_PER_SECOND = 2e9  # of a GPU's clock, about
_LONGEST_HOST = 0.02  # seconds that the calls of a round are waited for
_FLUSH_BYTES = 128 << 20  # twice the largest L2 cache
_FAILURES = (RuntimeError, ValueError)  # out of memory is a RuntimeError


@dataclass(frozen=True)
class ProductKey:
    """What a choice is made for.

    Attributes:
        operation: ``"forward"`` or ``"input_gradient"``.
        out_features: O of the layer.
        in_features: I of the layer.
        tokens: bucket of tokens, a power of two.
        dtype: of the product.
        values_dtype: of the parameter, which is cast on the way.
        aliased: whether the values lie in the packed operand already.
        adapter_rank: of an adapter computed along, 0 without.
        usual_scale: whether a kernel may multiply X downᵀ by its scale.
        corners: of the blocks that its ``up`` consists of, or empty.
    """

    operation: str
    out_features: int
    in_features: int
    tokens: int
    dtype: str
    values_dtype: str
    aliased: bool = False
    adapter_rank: int = 0
    usual_scale: bool = True
    corners: str = ""


@dataclass(frozen=True)
class Choice:
    """A path and why.

    Attributes:
        path: its name.
        algorithms: what a path does it with, for those that can in several ways.
        microseconds: what was measured, by path.
        refused: paths that could not be measured, with the reason.
    """

    path: str
    algorithms: Mapping[str, Any] = field(default_factory=dict)
    microseconds: Mapping[str, float] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)

    def reason(self) -> str:
        """One line for a report."""
        times = sorted(self.microseconds.items(), key=lambda pair: pair[1])
        named = {
            path: f"{path} ({name})" for path, name in self.algorithms.items() if name is not None
        }
        text = ", ".join(f"{named.get(path, path)} {time:.1f} µs" for path, time in times)
        by_reason: dict[str, list[str]] = {}
        for path, why in self.refused.items():
            by_reason.setdefault(why, []).append(path)
        refused = "; ".join(f"{', '.join(paths)}: {why}" for why, paths in by_reason.items())
        return "; ".join(part for part in (text, refused) if part) or "not measured"


def bucket(tokens: int) -> int:
    """A power of two near a token count, from 1: up to 64 the next one, beyond it the nearest.

    What is chosen for a few tokens has tiles for so many and no more. More than 64 tokens never
    share a bucket with fewer.

    Example:
        >>> [bucket(t) for t in (1, 3, 20, 64, 65, 1000, 16384)]
        [1, 4, 32, 64, 128, 1024, 16384]
    """
    above = 1 << (tokens - 1).bit_length()
    if tokens <= MAX_TOKENS or 2 * tokens * tokens >= above * above:
        return above
    return max(above // 2, 2 * MAX_TOKENS)


class Tuner:
    """Chooses paths, measuring each product once.

    Args:
        store: where choices outlive the process.
        machine: GPU and library versions, part of every key on disk.
        timer: as :func:`time_interleaved`; stands for the GPU's clock in tests.
    """

    def __init__(
        self,
        store: ChoiceStore,
        machine: Mapping[str, str],
        timer: Callable[[Mapping[str, Callable[[], Any]], bool], dict[str, float]] | None = None,
    ) -> None:
        self._store = store
        self._machine = dict(machine)
        self._timer = timer or time_interleaved
        self._known: dict[ProductKey, Choice] = {}

    def known(self) -> dict[ProductKey, Choice]:
        """Choices made or read so far."""
        return dict(self._known)

    def choose(
        self,
        key: ProductKey,
        paths: Mapping[str, Callable[[Any], Any]],
        algorithms: Mapping[str, Callable[[], Sequence[Any]]],
    ) -> Choice:
        """The fastest path for a product.

        Args:
            key: the product.
            paths: by name; each takes an algorithm and does the product once.
            algorithms: of a path, those that compete to be its one; values of JSON. Paths that are
                not named have None alone.

        Returns:
            The choice; what fails while it is measured is left out, a path with the reason.
        """
        found = self._known.get(key)
        if found is not None:
            return found
        where = asdict(key) | self._machine | {"paths": sorted(paths)}
        on_disk = self._store.load(where)
        if on_disk is not None:
            found = Choice(**on_disk)
            self._known[key] = found
            return found
        found = self._measure(paths, algorithms, not DECODE_PATHS.isdisjoint(paths))
        self._known[key] = found
        if not found.refused:  # there may have been no memory left, which is no property of a GPU
            self._store.save(where, asdict(found))
        log.info("%s: %s (%s)", key, found.path, found.reason())
        return found

    def _measure(
        self,
        paths: Mapping[str, Callable[[Any], Any]],
        algorithms: Mapping[str, Callable[[], Sequence[Any]]],
        kernels_alone: bool,
    ) -> Choice:
        chosen: dict[str, Any] = {}
        refused: dict[str, str] = {}
        ready: dict[str, Callable[[], Any]] = {}
        for name, path in paths.items():
            try:
                found = algorithms[name]() if name in algorithms else (None,)
                algorithm, call = self._fastest(path, found, kernels_alone)
            except _FAILURES as error:
                refused[name] = (str(error).splitlines() or [type(error).__name__])[0]
                continue
            ready[name] = call
            if name in algorithms:
                chosen[name] = algorithm
        if not ready:
            raise RuntimeError(f"no path can do this product: {refused}")
        times = self._timer(ready, kernels_alone)
        best = min(times, key=lambda name: times[name])
        return Choice(best, chosen, times, refused)

    def _fastest(
        self, path: Callable[[Any], Any], algorithms: Sequence[Any], kernels_alone: bool
    ) -> tuple[Any, Callable[[], Any]]:
        """The fastest algorithm of a path and the call with it, made once.

        Raises:
            RuntimeError: of the last algorithm, if all fail, or
            ValueError: likewise.
        """
        ready: dict[Any, Callable[[], Any]] = {}
        for algorithm in algorithms:
            call = functools.partial(path, algorithm)
            try:
                call()
            except _FAILURES:
                if algorithm == algorithms[-1] and not ready:
                    raise
                continue
            ready[algorithm] = call
        best = next(iter(ready))
        if len(ready) > 1:
            times = self._timer(ready, kernels_alone)
            best = min(times, key=lambda name: times[name])
        return best, ready[best]


def time_interleaved(
    paths: Mapping[str, Callable[[], Any]], kernels_alone: bool = False
) -> dict[str, float]:
    """Median µs per call of each path, the paths taking turns; synchronises.

    Args:
        paths: calls by name, each made before.
        kernels_alone: without the host's time, and with weights that are in no cache.
    """
    timed = _time_kernels if kernels_alone else _time_calls
    samples: dict[str, list[float]] = {name: [] for name in paths}
    for round_ in range(ROUNDS + 1):
        for name, call in paths.items():
            milliseconds = timed(call)
            if round_:  # the first round warms up
                samples[name].append(milliseconds / CALLS_PER_ROUND * 1e3)
    return {name: statistics.median(times) for name, times in samples.items()}


def _time_calls(call: Callable[[], Any]) -> float:
    """Milliseconds of a round's calls, back to back."""
    begin, end = _events()
    torch.cuda.synchronize()
    begin.record()
    for _ in range(CALLS_PER_ROUND):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def _time_kernels(call: Callable[[], Any]) -> float:
    """Milliseconds of a round's calls without the host's time, weights read from memory.

    The calls are queued twice: first to see how long that takes, then behind a kernel that sleeps
    as long. Between them other memory is read through the L2 cache, as a model's other layers do,
    unless there is none left for that. Written, it would have to go back to memory meanwhile.
    """
    scratch = None
    with contextlib.suppress(torch.OutOfMemoryError):
        scratch = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
    pairs = [_events() for _ in range(CALLS_PER_ROUND)]
    seconds = 0.0
    for asleep in (False, True):
        torch.cuda.synchronize()
        if asleep:
            torch.cuda._sleep(int(min(2 * seconds, _LONGEST_HOST) * _CYCLES_PER_SECOND))
        started = time.perf_counter()
        for begin, end in pairs:
            if scratch is not None:
                scratch.sum()
            begin.record()
            call()
            end.record()
        seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    return sum(begin.elapsed_time(end) for begin, end in pairs)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
