"""Compute mean and covariance of features from any split of the data, and the Frechet distance of two sets.

All arithmetic is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # returns the sum of all ranks' tensors


@dataclass(frozen=True)
class Moments:
    """Hold the moments of `n` vectors, float64.

    Args:
        n: the number of vectors.
        mean: their mean, (d,).
        scatter: the sum of the outer products of their deviations from the mean, (d, d).
    """

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Return the moments of the rows of x (n, d)."""
        x = x.double()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        centered = x - mean
        return cls(len(x), mean, centered.T @ centered)

    @classmethod
    def given(cls, n: int, mean: Tensor, covariance: Tensor) -> "Moments":
        """Return moments from the mean (d,) and the unbiased covariance (d, d) of `n` vectors."""
        return cls(n, mean.double(), covariance.double() * (n - 1))

    def __add__(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together (Chan, Golub, LeVeque 1979, eq. 2.1)."""
        n = self.n + other.n
        if n == 0:
            return self
        difference = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(difference, difference) * (self.n * other.n / n)
        return Moments(n, self.mean + difference * (other.n / n), scatter)

    def over_ranks(self, total: Total) -> "Moments":
        """Return the moments of all ranks' vectors together, the same on every rank.

        This is a collective. `total` first sums `n`, then `mean`, then `scatter`.
        """
        counts = total(torch.tensor([self.n], dtype=torch.float64, device=self.mean.device))
        n = int(counts.item())
        if n == 0:
            return self
        mean = total(self.mean * self.n) / n
        difference = self.mean - mean
        return Moments(n, mean, total(self.scatter + torch.outer(difference, difference) * self.n))

    @property
    def covariance(self) -> Tensor:
        """Return the unbiased covariance, (d, d). Raises ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"no covariance of {self.n} vectors")
        return self.scatter / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^1/2) for the covariances A and B (Heusel et al. 2017).

    A B has the eigenvalues of the symmetric A^1/2 B A^1/2, which are real and not negative. So there is no imaginary
    part to drop and no epsilon to add, even if fewer samples than features make A and B singular.

    Raises ValueError for fewer than two vectors.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * _positive(values).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    cross = _positive(torch.linalg.eigvalsh((product + product.T) / 2)).sqrt().sum()
    difference = a.mean - b.mean
    return (difference @ difference + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def _positive(values: Tensor) -> Tensor:
    """Set eigenvalues that are only rounding to 0, because their square roots would not be small."""
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0)
