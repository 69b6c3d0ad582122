"""Times the parts of training steps where they happen, several contenders in turns.

A step is cut into laps, one after another without gaps, so that the laps of a step add up to it. On a GPU a cut is a
CUDA event, and the host waits once, at the end of a turn: within a turn it runs ahead as in training, and a step takes
what the slower of host and GPU needs. On a CPU a cut is a reading of the clock.
"""

import time
from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

import torch
from journal import Journal

from fastdit.distributed import Runtime

Laps = dict[str, float]  # milliseconds by name, of one step


class Turn(NamedTuple):
    """Steps that a contender takes in a row, the first few of them not counted."""

    untimed: int
    timed: int


# A GPU's first steps after a wait find an idle host and batches prepared ahead. A CPU's steps are long, and its clock
# drifts from one to the next: so contenders take turns as often as can be.
TURNS = {"cuda": Turn(3, 5), "cpu": Turn(0, 1)}


class Stopwatch:
    """Time the laps of steps on one device."""

    def __init__(self, device: torch.device):
        self.gpu = device.type == "cuda"
        self._steps: list[list[tuple[str, torch.cuda.Event | float]]] = []

    def start(self) -> None:
        """Begin a step."""
        self._steps.append([("", self._now())])

    def lap(self, name: str) -> None:
        """End a lap and name what happened in it; a step may hold several laps of one name."""
        self._steps[-1].append((name, self._now()))

    def read(self) -> list[Laps]:
        """Return the laps of all steps since the last `read`. Waits for the device."""
        if self.gpu:
            torch.cuda.synchronize()
        found = []
        for step in self._steps:
            laps: Laps = defaultdict(float)
            for (_, begin), (name, end) in pairwise(step):
                laps[name] += begin.elapsed_time(end) if self.gpu else (end - begin) * 1e3
            found.append(dict(laps))
        self._steps = []
        return found

    def _now(self) -> torch.cuda.Event | float:
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Contender:
    """Takes training steps: `step` starts the watch and takes laps, named by phase or by phase/component.

    Phases: data, forward, backward, optimizer (with the averages), extras (the method's own), rest.
    """

    ran = ""
    flops: dict[str, float]  # for one image and step, by component
    held = peak = 0  # bytes: between steps, and at most
    host: float | None = None  # ms that the host takes to launch a step, which is not to exceed the GPU's; on GPUs

    def __init__(self, watch: Stopwatch):
        self.watch = watch

    def step(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        """Stop the loader's threads."""


class Rounds:
    """Lets contenders take turns, round by round, and journals each round as it ends.

    A line is {"what": "round", "laps": {contender: [laps of each timed step]}}. With several ranks a round is a
    collective: all start a turn together, and each keeps its own times.
    """

    def __init__(self, runtime: Runtime, turn: Turn, journal: Journal):
        self.runtime, self.turn, self.journal, self.taken = runtime, turn, journal, 0

    def take(self, contenders: dict[str, Contender]) -> None:
        """Take one round. Who begins changes from round to round."""
        names = list(contenders)
        first = self.taken % len(names)
        laps: dict[str, list[Laps]] = {}
        for name in names[first:] + names[:first]:
            self.runtime.barrier()
            for _ in range(self.turn.untimed + self.turn.timed):
                contenders[name].step()
            laps[name] = contenders[name].watch.read()[self.turn.untimed :]
        self.taken += 1
        self.journal.write("round", laps={name: laps[name] for name in names})
