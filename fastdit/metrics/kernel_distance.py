"""Compute KID (Binkowski et al. 2018).

It is the squared maximum mean discrepancy of two sets of features under a cubic kernel.
"""

import numpy as np
import torch
from torch import Tensor

SUBSETS, SUBSET_SIZE = 100, 1000  # torch-fidelity's defaults


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = SUBSETS, size: int = SUBSET_SIZE, seed: int = 2020
) -> tuple[float, float]:
    """Return mean and standard deviation of the unbiased estimate over `subsets` random pairs of subsets.

    The estimate may be negative. Kernel, estimator and random subsets are those of torch-fidelity; the arithmetic is
    float64.

    x: (n, d). y: (m, d). size: rows in a subset; at most those of the smaller set. Raises ValueError for fewer than
    two rows.
    """
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError(f"no kernel distance of {len(x)} and {len(y)} features")
    x, y = x.double(), y.double()
    random = np.random.RandomState(seed)
    estimates = torch.stack([_unbiased(_subset(random, x, size), _subset(random, y, size)) for _ in range(subsets)])
    return estimates.mean().item(), estimates.std(correction=0).item()


def _subset(random: np.random.RandomState, x: Tensor, size: int) -> Tensor:
    """Return `size` random rows of x (n, d)."""
    return x[torch.from_numpy(random.choice(len(x), size, replace=False)).to(x.device)]


def _unbiased(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased estimate for x (n, d) and y (n, d), a scalar."""
    n = len(x)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return the cubic kernel of all pairs of rows of x (n, d) and y (m, d), (n, m)."""
    return (x @ y.T / x.shape[1] + 1) ** 3
