"""Running means and failure counts that live on the device between two records."""

import torch
import torch.distributed as dist


class Meter:
    """Adds up named scalars without a host sync; `read` is the one transfer."""

    def __init__(self, device: torch.device, world: int):
        self.device, self.world = device, world
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}
        zero = torch.zeros((), device=device)
        self.streak, self.worst, self.skipped, self.first_bad = zero, zero, zero, zero - 1

    def add(self, terms: dict[str, torch.Tensor]) -> None:
        """0-dim float32 tensors on the device."""
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
        """What a resumed run must go on from, on the CPU. A streak of skipped steps is not: it gets a new chance."""
        sums = {name: value.cpu() for name, value in self.sums.items()}
        return {"sums": sums, "counts": dict(self.counts), "skipped": self.skipped.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self.sums = {name: value.to(self.device) for name, value in state["sums"].items()}
        self.counts, self.skipped = dict(state["counts"]), state["skipped"].to(self.device)

    def read(self) -> dict[str, float]:
        """Means over calls of `add` and over ranks since the last read; `skipped`, `worst_streak`, `first_bad`.

        A collective.
        """
        names = list(self.sums)
        means = torch.stack([self.sums[name].float() / self.counts[name] for name in names])
        if self.world > 1:
            dist.all_reduce(means)
            means /= self.world
        failures = torch.stack([self.skipped, self.worst, self.first_bad])
        values = torch.cat([means, failures]).tolist()
        self.sums, self.counts = {}, {}
        self.worst = self.streak
        return dict(zip([*names, "skipped", "worst_streak", "first_bad"], values))
