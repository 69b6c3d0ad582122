"""Mean and covariance of features, in float64, from any split of the data; and the Frechet distance between two."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # the sum of every rank's tensor


@dataclass(frozen=True)
class Moments:
    """Of `n` vectors: their `mean` (d,) and `scatter` (d, d), the sum of outer products about the mean. float64."""

    n: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Moments":
        """Of the rows of x (n, d)."""
        x = x.double()
        mean = x.mean(0) if len(x) else x.new_zeros(x.shape[1])
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    @classmethod
    def given(cls, n: int, mean: Tensor, covariance: Tensor) -> "Moments":
        """From statistics made elsewhere, of `n` vectors."""
        return cls(n, mean.double(), covariance.double() * (n - 1))

    def __add__(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan, Golub, LeVeque 1979, eq. 2.1)."""
        n = self.n + other.n
        if n == 0:
            return self
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.n * other.n / n)
        return Moments(n, self.mean + apart * (other.n / n), scatter)

    def over_ranks(self, total: Total) -> "Moments":
        """Of every rank's vectors together, everywhere the same. A collective: `total` reduces twice its size."""
        counts = total(torch.tensor([self.n], dtype=torch.float64, device=self.mean.device))
        n = int(counts.item())
        if n == 0:
            return self
        mean = total(self.mean * self.n) / n
        apart = self.mean - mean
        return Moments(n, mean, total(self.scatter + torch.outer(apart, apart) * self.n))

    @property
    def covariance(self) -> Tensor:
        """Unbiased, (d, d). Raises ValueError for fewer than two vectors."""
        if self.n < 2:
            raise ValueError(f"no covariance of {self.n} vectors")
        return self.scatter / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^1/2), of the covariances A and B (Heusel et al. 2017).

    A B has the eigenvalues of the symmetric A^1/2 B A^1/2, which are real and not negative: nothing imaginary to
    drop and no epsilon to add, also where fewer samples than features make A and B singular.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * _positive(values).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    cross = _positive(torch.linalg.eigvalsh((product + product.T) / 2)).sqrt().sum()
    apart = a.mean - b.mean
    return (apart @ apart + a.covariance.trace() + b.covariance.trace() - 2 * cross).item()


def _positive(values: Tensor) -> Tensor:
    """Eigenvalues without those that are only rounding: their square roots would not be small."""
    noise = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return torch.where(values > noise, values, 0.0)
