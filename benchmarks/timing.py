"""How a benchmark times and weighs functions, so that its figures mean the same for every contender.

- Interleaved: each round calls every contender once, in an order that turns from round to round. Clocks and
  neighbours drift; so all contenders see the same drift.
- Cold: calls take sets of inputs in turn; on a GPU, before each timed call a buffer larger than the caches is read. On
  a CPU that would drive the interpreter's own code out too, half a millisecond a call that no step pays: there the sets
  together are larger than the caches (`sets_of`).
- GPU time is between two CUDA events. The GPU is kept waiting while the host enqueues a call, so a call's time is
  the GPU's own unless the host needs longer than that wait, as a loop over hundreds of small tensors does.
- CPU time is wall time of the call.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

HOST_LEAD = 4_000_000  # GPU clock cycles, 2 ms or more


class Effort(NamedTuple):
    """How long to measure each phase of a case: rounds within limits, about `seconds` in all."""

    least: int
    most: int
    seconds: float
    buffer: int  # bytes, of the reading between calls and of the copy


FULL = {"cuda": Effort(20, 200, 1.0, 1 << 28), "cpu": Effort(15, 100, 2.0, 1 << 28)}
QUICK = Effort(3, 3, 0.0, 1 << 25)


class Quantiles(NamedTuple):
    """Milliseconds of `rounds` calls: at 20 %, the median, at 80 %."""

    p20: float
    p50: float
    p80: float
    rounds: int


class Runner(NamedTuple):
    """`run(set)` is timed; `after(set)` is not, and makes what the next `run` of that set needs."""

    run: Callable[[int], object]
    after: Callable[[int], object] = lambda index: None


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device, effort: Effort):
        self.device, self.effort = device, effort
        self.buffer = torch.ones(effort.buffer // 4, device=device)

    def sets_of(self, size: int) -> int:
        """How many sets of inputs of `size` bytes calls take in turn, so that none is in a cache when its turn comes.

        On a CPU 64 at most: inputs below half a megabyte may stay in its last cache, as they would in a step.
        """
        return 3 if self.device.type == "cuda" else min(max(3, -(-self.effort.buffer // (2 * size))), 64)

    def interleave(self, runners: dict[str, Runner], sets: int) -> dict[str, Quantiles]:
        """Times of each runner, called once before to warm up. `sets`: how many sets of inputs calls take in turn."""
        names = list(runners)
        for runner in runners.values():
            runner.run(0)
            runner.after(0)
        times: dict[str, list[float]] = {name: [] for name in names}
        calls, rounds, start = 0, 0, time.perf_counter()
        while rounds < self.effort.least or (
            rounds < self.effort.most and time.perf_counter() - start < self.effort.seconds
        ):
            for place in range(len(names)):
                name = names[(rounds + place) % len(names)]
                calls += 1
                times[name].append(self._once(runners[name], calls % sets))
            rounds += 1
        return {name: quantiles(values) for name, values in times.items()}

    def _once(self, runner: Runner, index: int) -> float:
        if self.device.type == "cuda":
            self.buffer.sum()
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(HOST_LEAD)
            start.record()
            kept = runner.run(index)
            stop.record()
            stop.synchronize()
            milliseconds = start.elapsed_time(stop)
        else:
            begin = time.perf_counter()
            kept = runner.run(index)
            milliseconds = (time.perf_counter() - begin) * 1e3
        del kept  # freeing the results belongs to no contender
        runner.after(index)
        return milliseconds

    def copy_rate(self) -> float:
        """GB/s, bytes read plus bytes written, of a plain copy of a tensor larger than the caches."""
        target = torch.empty_like(self.buffer)
        median = self.interleave({"copy": Runner(lambda _: target.copy_(self.buffer))}, 1)["copy"].p50
        return 2 * self.buffer.nbytes / median / 1e6


def quantiles(values: list[float]) -> Quantiles:
    """Return the quantiles of milliseconds, or of other numbers."""
    levels = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return Quantiles(*(round(level, 6) for level in levels.tolist()), len(values))


class Memory(NamedTuple):
    """Bytes beyond those of the inputs: at most at any moment, and kept between forward and backward."""

    peak: int
    kept: int


def memory(device: torch.device, first: Callable[[], object], second: Callable[[object], object] | None) -> Memory:
    """Return the memory of first(), then second(first's result), or of first() alone.

    Call both once before: a first call allocates more.

    On a GPU by the caching allocator's counters, on a CPU by the profiler's record of every allocation.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = first()
        kept = torch.cuda.memory_allocated() - before
        if second is not None:
            second(result)
        torch.cuda.synchronize()
        return Memory(torch.cuda.max_memory_allocated() - before, kept)
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with quiet_profiler():
        profiler.start()
        try:
            result = first()
            middle = time.time_ns()
            results = second(result) if second is not None else None
            end = time.time_ns()
        finally:
            profiler.stop()
    del result, results
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held, peak, kept = 0, 0, 0
    for when, size in changes:
        if when > end:
            break
        held += size
        peak = max(peak, held)
        kept = held if when <= middle else kept
    return Memory(peak, kept)


@contextmanager
def quiet_profiler() -> Iterator[None]:
    """The profiler's library prints a line whenever it starts or stops, and torch one for memory older than it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes that tensors hold in memory; an expanded tensor holds less than it shows."""
    return sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
