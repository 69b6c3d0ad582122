"""Training for a set time: what a step costs, and a run of exactly the steps that this buys."""

import hashlib
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from fastdit.distributed import Runtime

SHORT = {"cuda": 10, "cpu": 4}  # steps of the rehearsal that compiles and tunes kernels and allocates memory
LEAST, MOST = {"cuda": 20, "cpu": 10}, 1000  # steps of a rehearsal that is timed
TURNS = 5  # in which contenders are timed, one after the other in each
PREPARED = (50, 100)  # steps of the runs by which a method's preparation is priced


class SilentRuntime(Runtime):
    """A rank whose sessions leave no files behind."""

    first = False

    @classmethod
    def like(cls, ranks: Runtime) -> "SilentRuntime":
        return cls(ranks.rank, ranks.world, ranks.local_rank, ranks.device, ranks.hosts)


class Price(NamedTuple):
    """Hold what a contender's run costs, in seconds: `fixed`, and `step` for each of its steps.

    rehearsed is the number of steps that were timed, warm_up what it took until all was compiled.
    """

    step: float
    fixed: float
    rehearsed: int
    warm_up: float


class Trained(NamedTuple):
    """The seconds of a run, and the step at which it was given up as diverged; 0 if it was not."""

    seconds: float
    diverged: int


def price_runs(sessions: dict[str, object], seconds: float) -> dict[str, Price]:
    """Price contenders by rehearsals in their sessions, which are thrown away afterwards: about `seconds` for each.

    They rehearse in turns, and a price is the median of its turns, so that a machine that is busy for a while does not
    favor one of them. A step does not cost the same all through a run: a method may begin or end a loss after a share
    of the run, or have it in every n-th step only. So a rehearsal is a whole run of few steps. A method's preparation
    may take a number of steps or a share of the run: it is priced by two lengths, which tell its fixed part from that
    for each step.
    """
    runs = {name: session.run for name, session in sessions.items()}
    device = next(iter(runs.values())).runtime.device
    kind = device.type

    # Warm up: compile and tune kernels, allocate memory.
    warm_ups, steps = {}, {}
    for name, run in runs.items():
        warm_ups[name] = _timed(device, lambda run=run: (prepare(run, SHORT[kind]), _rehearse(run, SHORT[kind])))
        quick = _timed(device, lambda run=run: _rehearse(run, SHORT[kind])) / SHORT[kind]
        steps[name] = min(MOST, max(LEAST[kind], round(seconds / TURNS / quick)))

    # Rehearse in turns.
    turns = {name: [] for name in runs}
    for _ in range(TURNS):
        for name, run in runs.items():
            few, many = (_timed(device, lambda n=n, run=run: prepare(run, n)) for n in PREPARED)
            slope = max(0.0, (many - few) / (PREPARED[1] - PREPARED[0]))
            fixed = max(0.0, few - slope * PREPARED[0])
            spent = _timed(device, lambda run=run, name=name: _rehearse(run, steps[name]))
            turns[name].append((spent / steps[name] + slope, fixed))
    return {
        name: Price(*(median(values) for values in zip(*turns[name])), TURNS * steps[name], warm_ups[name])
        for name in runs
    }


def _timed(device: torch.device, work: Callable[[], object]) -> float:
    wait(device)
    begun = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begun


def _rehearse(run, steps: int) -> None:
    """Take all steps of a run that has only so many."""
    from fastdit.training.loop import train_step  # imports DeepSpeed: after runtime.start

    run.config = replace(run.config, steps=steps, warmup=min(run.config.warmup, steps))
    for step in range(steps):
        train_step(run, step)
    run.meter.read()


def prepare(run, steps: int) -> None:
    """Let the method prepare a run of `steps` steps, as `fastdit.training.loop.train` does before step 0."""
    state = run.loader.state_dict()
    run.method.prepare(run.loader, steps, run.say)
    if run.loader.state_dict() != state:
        run.loader.load_state_dict(state)


def train(session, points: int, note: Callable[[int, float, dict[str, float]], None]) -> Trained:
    """Train a fresh session to its last step as `fastdit.training.loop.train` does, but without checkpoints.

    A method's preparation counts as training. `note` is called at each of `points` points with the finished steps, the
    seconds so far and the means since the last point.
    """
    from fastdit.training.loop import train_step

    run, steps = session.run, session.run.config.steps
    every = -(-steps // points)
    wait(run.runtime.device)
    begun = time.perf_counter()
    prepare(run, steps)
    for step in range(steps):
        train_step(run, step)
        if (step + 1) % every == 0 or step + 1 == steps:
            values = run.meter.read()  # waits for the device
            worst = values.pop("worst_streak")
            values.pop("first_bad")
            note(step + 1, time.perf_counter() - begun, values)
            if worst >= run.config.max_nonfinite:
                return Trained(time.perf_counter() - begun, step + 1)
    wait(run.runtime.device)
    return Trained(time.perf_counter() - begun, 0)


def wait(device: torch.device) -> None:
    """Wait until a GPU has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def machine_label(device: torch.device) -> str:
    """Return the device's name with a mark of its machine, which tells equal devices apart but names nobody."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        boot = ""
    return f"{name} {hashlib.sha256((boot + platform.node()).encode()).hexdigest()[:4]}"
