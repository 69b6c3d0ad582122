"""Name the steps that are skipped, and the samples whose loss was not finite, without a host sync in a step."""

from collections import deque
from collections.abc import Callable

import torch

from fastdit.data import Loader
from fastdit.distributed import Runtime

LINES = 5  # skipped steps that a start of a run names; the others are counted
PARTS = 4  # micro-batches that a line names
REMEMBERED = 20_000  # steps or micro-batches between two lines of metrics, at most, that are kept


class SkippedSteps:
    """Keep losses and flags, scalars on the device, until the metrics are read anyway. It launches no kernel."""

    def __init__(self) -> None:
        self.losses: deque[tuple[int, torch.Tensor]] = deque(maxlen=REMEMBERED)
        self.flags: deque[tuple[int, torch.Tensor]] = deque(maxlen=REMEMBERED)
        self.told = 0
        self.count: float | None = None  # of the last read; not known when a run resumes

    def note_loss(self, step: int, loss: torch.Tensor) -> None:
        """Keep this rank's loss of the loader's last micro-batch, which is part of step `step`, counted from 1."""
        self.losses.append((step, loss.detach()))

    def note_step(self, step: int, skipped: torch.Tensor) -> None:
        """Keep the flag of step `step`: 1 if it was skipped, the same on all ranks."""
        self.flags.append((step, skipped))

    def report(self, count: float, runtime: Runtime, loader: Loader, say: Callable[[str], None]) -> None:
        """Print a line for each step skipped since the last call, and forget what was kept.

        It is a collective if there are any, and it waits for the device. `count` is the number of steps that the run
        has skipped, the same on all ranks. `loader` stands behind the last micro-batch.
        """
        if count != self.count and self.told <= LINES:
            steps = _flagged([flag for _, flag in self.flags], lambda flags: flags > 0)
            steps = [self.flags[i][0] for i in steps]
            bad = _flagged([loss for _, loss in self.losses], lambda losses: ~losses.isfinite())
            begun = loader.position - len(self.losses) * loader.order.stride
            places = [(self.losses[i][0], begun + i * loader.order.stride) for i in bad]
            by_rank = runtime.gather(places) if steps else None
            if by_rank is not None:
                self._print(steps, by_rank, loader, say)
            self.told += len(steps)
        self.count = count
        self.losses.clear()
        self.flags.clear()

    def _print(self, steps: list[int], by_rank: list[list[tuple[int, int]]], loader: Loader, say) -> None:
        """Print a line for each of `steps`, as far as LINES allows. by_rank: (step, position) of the losses."""
        for step in steps[: max(0, LINES - self.told)]:
            parts = [
                f"rank {rank}, samples {', '.join(map(str, loader.ids_at(position, rank)))}"
                for rank, found in enumerate(by_rank)
                for at, position in found
                if at == step
            ]
            if not parts:
                say(f"step {step} is skipped: a gradient is not finite, although the loss of every rank is")
                continue
            more = f"; and {len(parts) - PARTS} more micro-batches" if len(parts) > PARTS else ""
            say(
                f"step {step} is skipped: the loss is not finite in the micro-batch of {'; '.join(parts[:PARTS])}{more}"
                f" (fastdit-data check {loader.source.path} looks for bad ones)"
            )
        if self.told <= LINES < self.told + len(steps):
            say("further skipped steps are not named; the metrics count them")


def _flagged(values: list[torch.Tensor], wrong: Callable[[torch.Tensor], torch.Tensor]) -> list[int]:
    """Return the indices of the scalars that are `wrong`. A scalar may be on the CPU although the others are not."""
    if not values:
        return []
    device = values[-1].device
    return wrong(torch.stack([value.to(device) for value in values])).nonzero().flatten().tolist()
