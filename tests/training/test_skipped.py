"""Which skipped steps are named, and how."""

from types import SimpleNamespace

import torch

from fastdit.data.order import Order
from fastdit.training.skipped import LINES, SkippedSteps

N, BATCH, ACCUMULATED = 40, 3, 2


class Loader:
    """The part of a loader that is asked for ids."""

    def __init__(self, steps: int):
        self.order = Order(N, BATCH, shuffle=False)
        self.position, self.source = steps * ACCUMULATED * BATCH, SimpleNamespace(path="data/x")

    def ids_at(self, position: int, rank: int) -> list[int]:
        return self.order.request(position).ids.tolist()


def report(skips: SkippedSteps, steps: range, bad: dict[int, int | None], count: float) -> list[str]:
    """The lines of steps, in which the micro-batch bad[step] has an infinite loss, or only the gradient has one."""
    for step in steps:
        for k in range(ACCUMULATED):
            loss = torch.tensor(torch.inf if step in bad and bad[step] == k else 1.0, requires_grad=True)
            skips.note_loss(step, loss * 1)
        skips.note_step(step, torch.tensor(float(step in bad)))
    lines = []
    runtime = SimpleNamespace(gather=lambda value: [value])
    skips.report(count, runtime, Loader(steps[-1]), lines.append)
    return lines


def test_the_micro_batch_is_named():
    skips = SkippedSteps()
    assert report(skips, range(1, 4), {}, 0.0) == []
    assert report(skips, range(4, 7), {5: 1, 6: None}, 2.0) == [
        "step 5 is skipped: the loss is not finite in the micro-batch of rank 0, samples 27, 28, 29"
        " (fastdit-data check data/x looks for bad ones)",
        "step 6 is skipped: a gradient is not finite, although the loss of every rank is",
    ]
    assert not skips.losses
    assert not skips.flags


def test_only_the_first_are_named():
    skips, lines = SkippedSteps(), []
    for first in range(1, 40, 2):
        lines += report(skips, range(first, first + 2), {first: 0, first + 1: 0}, first + 1.0)
    assert len(lines) == LINES + 1
    assert lines[-1] == "further skipped steps are not named; the metrics count them"
