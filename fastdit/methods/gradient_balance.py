"""Set the weight of an additional loss term by a target ratio of gradients, or keep it fixed.

The value of a term says little about its effect: its gradient may grow while its value falls. So the weight is chosen
such that, at the network's output, the term's gradient has a target norm relative to that of the denoising loss:

    weight = ratio * sqrt(D / T),   clamped to [floor, cap]
    D, T   = squared norms of both gradients, over the outputs of all micro-batches and ranks, as EMAs over steps

The weight of a step depends on earlier steps only. So all micro-batches of a step have the same objective, and no
forward pass waits for a collective. Both EMAs start at zero together, so the bias of their start cancels in the
quotient. Before the first measurement the weight is the floor.

This is ours. VQGAN (arXiv 2012.09841, section 3.1) weighs its adversarial loss in the same manner at its last layer.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastdit.methods.ranks import sum_over_ranks

MEMORY = 0.9  # decay of the EMAs, which average about ten steps
TINY = 1e-30  # avoids 0 / 0 if a gradient is zero


class GradientBalance:
    """Measure both gradients of a step, and hold the term's weight. Every value stays on the device.

    Args:
        weight: a fixed weight, or "auto".
        ratio: target of |weight * gradient of the term| / |gradient of the denoising loss|; used for "auto" only.
        floor, cap: bounds of the weight; used for "auto" only.
    """

    def __init__(self, weight: float | Literal["auto"], ratio: float = 0.1, floor: float = 0.0, cap: float = 1.0):
        self.auto = weight == "auto"
        self.ratio, self.floor, self.cap = ratio, floor, cap
        self.squares = torch.zeros(2)  # sums over this step's micro-batches: denoising loss, term
        self.smoothed = torch.zeros(2)  # the EMAs D and T
        self.weight = self._set_weight() if self.auto else weight

    def add(self, denoising: Sequence[Tensor], term: Sequence[Tensor]) -> None:
        """Add the gradients of one micro-batch at the network's outputs, the term's without its weight."""
        self.squares = self.squares + torch.stack([_squared_norm(denoising), _squared_norm(term)])

    def end_step(self) -> dict[str, Tensor]:
        """Return this step's `gradient_ratio` and set the weight of the next step. All ranks must call it.

        Gradients that are not finite leave the weight as it is.
        """
        denoising, term = squares = sum_over_ranks(self.squares)
        signals = {"gradient_ratio": self.weight * (term / denoising.clamp_min(TINY)).sqrt()}
        self.squares = torch.zeros_like(squares)
        self.update(squares)
        return signals

    def update(self, squares: Tensor) -> None:
        """Set the weight of the next step, if it is not fixed, from both squared norms (2,) summed over ranks.

        The term's norm is without its weight. Gradients that are not finite leave the weight as it is.
        """
        if self.auto:
            smoothed = torch.lerp(squares, self.smoothed, MEMORY)
            self.smoothed = torch.where(smoothed.isfinite().all(), smoothed, self.smoothed)
            self.weight = self._set_weight()

    def _set_weight(self) -> Tensor:
        """Return the weight () that the EMAs imply."""
        denoising, term = self.smoothed
        return (self.ratio * (denoising / term.clamp_min(TINY)).sqrt()).clamp(self.floor, self.cap)

    def to(self, device: torch.device) -> None:
        """Move all values."""
        self.squares, self.smoothed = self.squares.to(device), self.smoothed.to(device)
        if self.auto:
            self.weight = self._set_weight()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the EMAs, on the CPU."""
        return {"smoothed": self.smoothed.cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the result of `state_dict`."""
        self.smoothed = state["smoothed"].to(self.smoothed.device)
        self.to(self.smoothed.device)


def _squared_norm(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares () float32, which is accumulated in fp32 for bf16 gradients too."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)) for x in parts]
    return torch.stack(norms).float().square().sum()
