"""Define the residual stream where a second loss branches off, and measure the gradients that meet there."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdit.kernels import gate_residual_modulate

LARGEST_RATIO = 100.0


class Stream(NamedTuple):
    """Hold the residual stream x + gate * branch in parts, as blocks return it."""

    x: Tensor  # (B, tokens, width), in the stream's dtype; the others have the weights'
    branch: Tensor  # (B, tokens, width)
    gate: Tensor  # (B, width)

    def normalize(self, rows: Tensor | None = None) -> Tensor:
        """Return LN(x + gate * branch) without modulation for the tokens `rows` (B, M) int64; None takes all.

        The result has the weights' dtype.
        """
        none = self.gate.new_zeros(()).expand_as(self.gate)
        return gate_residual_modulate(self.x, self.branch, self.gate, none, none, rows=rows)[1]

    def first_samples(self, count: int) -> "Stream":
        """Return the stream of the first `count` samples."""
        return self if count == len(self.x) else Stream(*(part[:count] for part in self))


class GradientRatio:
    """Compare the gradients of two losses at a tensor that both depend on, without another backward pass.

    `fork` returns its argument twice, once for each loss. The backward pass adds the two gradients, as autograd does
    anyway, and adds their squared norms to `squares` (2,) fp32. It adds in place, so replays of a CUDA graph count.
    """

    def __init__(self) -> None:
        self.squares = torch.zeros(2)

    def to(self, device: torch.device) -> None:
        """Move the sums. Call it before a CUDA graph is recorded."""
        self.squares = self.squares.to(device)

    def reset(self) -> None:
        """Start a new sum."""
        self.squares.zero_()

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x for the first loss, and x for the second."""
        return _Fork.apply(x, self.squares)

    def read(self, squares: Tensor) -> Tensor:
        """Return the norm () of the second gradient over that of the first, from `squares` summed over ranks.

        It is at most LARGEST_RATIO: in a network's first step the first gradient is zero, because the output layer is
        zero, and an infinite ratio would fill every mean in the log.
        """
        smallest = torch.finfo(torch.float32).tiny
        return (squares[1] / squares[0].clamp_min(smallest)).sqrt().clamp_max(LARGEST_RATIO)


class _Fork(torch.autograd.Function):
    """Return x twice, and add the squared norms of both gradients to `squares` in the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        ctx.squares = squares
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.view_as(x)

    @staticmethod
    def backward(ctx, first: Tensor | None, second: Tensor | None) -> tuple[Tensor | None, None]:
        if first is None or second is None:  # a step without one of the losses
            return (second if first is None else first), None
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in (first, second)]
        ctx.squares.add_(torch.stack(norms).square())
        return first + second, None
