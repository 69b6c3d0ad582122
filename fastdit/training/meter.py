"""Keep running means and counts of skipped steps on the device between two lines of metrics."""

import torch

from fastdit.methods.ranks import sum_over_ranks


class Meter:
    """Add up named scalars without a host sync. Only `read` transfers them to the host."""

    def __init__(self, device: torch.device, world: int):
        self.device, self.world = device, world
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        zero = torch.zeros((), device=device)
        self.streak, self.worst, self.skipped, self.first_bad = zero, zero, zero, zero - 1

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """Add one value to each running mean; `terms` are 0-dim float32 tensors on the device."""
        for name, value in terms.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1

    def step(self, nonfinite: torch.Tensor, step: int) -> None:
        """Note whether optimizer step `step` was skipped (0-dim float32: 1 is skipped, the same on all ranks)."""
        self.streak = (self.streak + nonfinite) * nonfinite
        self.first_bad = torch.where(self.streak > self.worst, step - self.streak + 1, self.first_bad)
        self.worst = torch.maximum(self.worst, self.streak)
        self.skipped = self.skipped + nonfinite

    def state_dict(self) -> dict:
        """Return the state from which a resumed run goes on, as numbers.

        The current streak of skipped steps is left out, so that a resumed run may skip `max_nonfinite` steps anew.
        """
        sums = {name: float(value) for name, value in self.sums.items()}
        return {"sums": sums, "counts": dict(self.counts), "skipped": float(self.skipped)}

    def load_state_dict(self, state: dict) -> None:
        """Go on from what `state_dict` returned."""
        like = {"dtype": torch.float32, "device": self.device}
        self.sums = {name: torch.tensor(value, **like) for name, value in state["sums"].items()}
        self.counts, self.skipped = dict(state["counts"]), torch.tensor(state["skipped"], **like)

    def read(self) -> dict[str, float]:
        """Return the means over ranks and over calls of `add` since the last read, by name, and counts of steps.

        It is a collective, and it waits for the device. The counts are `skipped` (steps since the run began),
        `worst_streak` (the longest streak of skipped steps since the last read) and `first_bad` (the step at which that
        streak began, counted from 1).
        """
        names = list(self.sums)
        means = torch.stack([self.sums[name].float() / self.counts[name] for name in names])
        means = sum_over_ranks(means) / self.world
        failures = torch.stack([self.skipped, self.worst, self.first_bad])
        values = torch.cat([means, failures]).tolist()
        self.sums, self.counts = {}, {}
        self.worst = self.streak
        return dict(zip([*names, "skipped", "worst_streak", "first_bad"], values))
