"""Draw random numbers for a micro-batch, by a torch.Generator or as a function of each sample's position.

A training step passes a `SampleGenerator`. The first dimension of every drawn tensor is the sample. The numbers of a
sample depend on the seed, on its position in the global stream of samples, and on the number of the draw within its
micro-batch. So they depend neither on the number of ranks, nor on the size of the micro-batch, nor on the device. Every
rank must make the same draws in the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .philox import philox_integers, philox_normal, philox_uniform


@dataclass
class SampleGenerator:
    """Draw the random numbers of one micro-batch.

    Args:
        seed: the seed of the run, modulo 2^64.
        position: the position of the micro-batch's first sample in the global stream. The others follow it.
        device: the device of the numbers.
        draws: the number of the next draw.
    """

    seed: int
    position: int
    device: torch.device | str
    draws: int = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal numbers, float32 of shape (samples, ...), for the first samples of the micro-batch."""
        return philox_normal(*_sizes(shape), **self._place()).view(*shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Draw uniform numbers in [0, 1), float32 of shape (samples, ...)."""
        return philox_uniform(*_sizes(shape), **self._place()).view(*shape)

    def integers(self, high: int, shape: Sequence[int]) -> Tensor:
        """Draw integers in [0, high), int64 of shape (samples, ...)."""
        return philox_integers(high, *_sizes(shape), **self._place()).view(*shape)

    def _place(self) -> dict:
        """Return the place of the next draw's numbers, and count the draw."""
        self.draws += 1
        return {"seed": self.seed, "position": self.position, "draw": self.draws - 1, "device": self.device}


AnyGenerator = torch.Generator | SampleGenerator | None  # None is torch's global generator


def draw_normal(shape: Sequence[int], *, generator: AnyGenerator, device: torch.device | str) -> Tensor:
    """Draw standard normal numbers, float32 of shape (samples, ...). `generator` lives on `device`."""
    if isinstance(generator, SampleGenerator):
        return generator.normal(shape)
    return torch.randn(*shape, generator=generator, device=device)


def draw_uniform(shape: Sequence[int], *, generator: AnyGenerator, device: torch.device | str) -> Tensor:
    """Draw uniform numbers in [0, 1), float32 of shape (samples, ...). `generator` lives on `device`."""
    if isinstance(generator, SampleGenerator):
        return generator.uniform(shape)
    return torch.rand(*shape, generator=generator, device=device)


def draw_integers(high: int, shape: Sequence[int], *, generator: AnyGenerator, device: torch.device | str) -> Tensor:
    """Draw integers in [0, high), int64 of shape (samples, ...). `generator` lives on `device`."""
    if isinstance(generator, SampleGenerator):
        return generator.integers(high, shape)
    return torch.randint(high, tuple(shape), generator=generator, device=device)


def _sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Return the number of samples and the numbers of a sample."""
    return shape[0], math.prod(shape[1:])
