"""KID: the squared maximum mean discrepancy of two sets of features under a cubic kernel (Binkowski et al. 2018)."""

import numpy as np
import torch
from torch import Tensor


def kernel_distance(
    x: Tensor, y: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 2020
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased estimate over `subsets` random pairs of subsets. May be below 0.

    x (n, d), y (m, d), at least two rows each. Subsets have `size` rows, or as many as the smaller set. Kernel,
    estimator and the drawing of subsets are torch-fidelity's, the arithmetic is float64.
    """
    size = min(size, len(x), len(y))
    if size < 2:
        raise ValueError(f"no kernel distance of {len(x)} and {len(y)} features")
    x, y = x.double(), y.double()
    draw = np.random.RandomState(seed)
    estimates = torch.stack([_unbiased(_chosen(draw, x, size), _chosen(draw, y, size)) for _ in range(subsets)])
    return estimates.mean().item(), estimates.std(correction=0).item()


def _chosen(draw: np.random.RandomState, x: Tensor, size: int) -> Tensor:
    return x[torch.from_numpy(draw.choice(len(x), size, replace=False)).to(x.device)]


def _unbiased(x: Tensor, y: Tensor) -> Tensor:
    n = len(x)
    within = sum(kernel.sum() - kernel.trace() for kernel in (_kernel(x, x), _kernel(y, y)))
    return within / (n * (n - 1)) - 2 * _kernel(x, y).mean()


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
