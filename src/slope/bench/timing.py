"""Times of calls that do the same work: taking turns, warmed up, medians with their spread.

Contenders are timed in rounds. In each round every one is called a few times back to back, in an
order that rotates, so that a slow moment of the machine or a hot chip hits all of them; a speed-up
is the median over the rounds of base time / own time. A GPU is timed by its events, and the time
that the host needs to queue a call is taken beside; a CPU is timed by ``perf_counter``.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Factory = Callable[[], Call]
"""Makes what a call reads, and hands back the call; may fail."""

_FEWEST_ROUNDS = 5  # still tell a spread when time is short
_MOST_CALLS = 50  # per round: fewer than a GPU's queue takes before the host has to wait
_FLUSH_BYTES = 256 << 20  # where the size of the L2 cache is not known


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The spread of at least one sample."""
        ordered = sorted(samples)
        last = len(ordered) - 1
        low, high = (ordered[round(share * last)] for share in (0.1, 0.9))
        return cls(statistics.median(ordered), low, high)


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one sample per round.

    Attributes:
        seconds: of the device.
        host: until the call was queued; equal to ``seconds`` on a CPU.
        calls: back to back in each round.
    """

    seconds: tuple[float, ...]
    host: tuple[float, ...]
    calls: int

    def speed_up(self, base: Timing) -> Spread:
        """Base time / own time, paired by round."""
        pairs = zip(base.seconds, self.seconds, strict=False)
        return Spread.of([theirs / own for theirs, own in pairs])


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: samples per contender.
        window: seconds that the calls of one round should fill.
        warmup: calls before the first round.
        limit: seconds for all rounds; once they have passed, five rounds are enough.
    """

    rounds: int
    window: float
    warmup: int
    limit: float


class Deadline:
    """The end of a budget.

    Args:
        seconds: from now; None never ends.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        """Whether the budget is used up."""
        return time.monotonic() >= self._end


class Clock:
    """Times calls on one device.

    Args:
        device: ``cuda`` or ``cpu``.
        cold: overwrite the GPU's L2 cache before each call: a weight that fits into it would
            otherwise be read from there, which no whole model does.
    """

    def __init__(self, device: torch.device, cold: bool = False) -> None:
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._on_gpu else None
        self._scratch: torch.Tensor | None = None
        if cold and self._on_gpu:
            cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
            size = 4 * cache or _FLUSH_BYTES
            self._scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def run(self, call: Call, calls: int) -> tuple[float, float]:
        """Seconds per call, of the device and of the host."""
        self.synchronize()
        if not self._on_gpu:
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            seconds = (time.perf_counter() - begin) / calls
            return seconds, seconds
        if self._scratch is not None:
            return self._run_cold(call, calls, self._scratch)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        call()  # keeps the GPU busy until the host is ahead, as in the middle of a step
        first.record()
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        host = time.perf_counter() - begin
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e-3 / calls, host / calls

    def _run_cold(self, call: Call, calls: int, scratch: torch.Tensor) -> tuple[float, float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        host = 0.0
        for first, last in events:
            scratch.zero_()
            first.record()
            begin = time.perf_counter()
            call()
            host += time.perf_counter() - begin
            last.record()
        self.synchronize()
        seconds = sum(first.elapsed_time(last) for first, last in events) * 1e-3
        return seconds / calls, host / calls

    def captured(self, call: Call) -> Call:
        """A warm call as a CUDA graph: its kernels alone, without the host's work."""
        assert self._side is not None
        now = torch.cuda.current_stream(self.device)
        self._side.wait_stream(now)
        with torch.cuda.stream(self._side):  # what is made once per stream is not captured
            call()
        now.wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._side):
            call()
        replay: Call = graph.replay
        return replay

    def synchronize(self) -> None:
        """Wait for the device."""
        if self._on_gpu:
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Give a GPU's memory of dropped tensors back, so that the next case finds it."""
        if self._on_gpu:
            gc.collect()
            torch.cuda.empty_cache()


def interleave(
    calls: Mapping[str, Call], clock: Clock, effort: Effort, deadline: Deadline
) -> dict[str, Timing]:
    """Time calls that are warm, taking turns.

    Args:
        calls: by name.
        clock: of their device.
        effort: how long.
        deadline: of the whole program; once it has passed, five rounds are enough.

    Returns:
        One timing per call, with equally many samples.
    """
    if not calls:
        return {}
    counts = {}
    for name, call in calls.items():
        estimate = max(clock.run(call, 1)[0], 1e-7)
        counts[name] = min(max(1, round(effort.window / estimate)), _MOST_CALLS)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    names, own = list(calls), Deadline(effort.limit)
    for number in range(effort.rounds):
        if number >= _FEWEST_ROUNDS and (own.passed or deadline.passed):
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            samples[name].append(clock.run(calls[name], counts[name]))
    return {
        name: Timing(tuple(s for s, _ in pairs), tuple(h for _, h in pairs), counts[name])
        for name, pairs in samples.items()
    }


def warmed(call: Call, clock: Clock, effort: Effort) -> Call:
    """The call after its warm-up; whatever it cannot do, it fails to do here."""
    for _ in range(max(1, effort.warmup)):
        call()
    clock.synchronize()
    return call


def reason(error: BaseException) -> str:
    """An error as the note of a row, in one line."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


@contextmanager
def noting(failures: dict[str, str], name: str) -> Iterator[None]:
    """Turn an error inside into a reason: a contender that fails is a row of the table.

    Args:
        failures: where the reason is written.
        name: under which name.
    """
    try:
        yield
    except Exception as error:  # another library's code may fail in any way
        failures[name] = reason(error)
