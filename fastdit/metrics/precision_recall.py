"""Compute precision and recall of samples by k-nearest-neighbor manifolds (Kynkaanniemi et al. 2019)."""

import torch
from torch import Tensor

_ELEMENTS = 1 << 25  # in a block of distances, which takes 256 MiB


def precision_recall(samples: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Return precision and recall, both from 0 to 1.

    Precision is the share of samples inside the manifold of the real features. Recall is the share of real features
    inside the manifold of the samples. The manifold of a set is the union of balls around its members. The radius of a
    ball is the distance to the k-th nearest other member, or to the farthest one in a set of at most k. These are the
    conventions of the ADM evaluator and of torch-fidelity.

    samples: (n, d). real: (m, d). Distances are float64, computed in blocks.
    """
    samples, real = samples.double(), real.double()
    return _inside(samples, real, _radii(real, k)), _inside(real, samples, _radii(samples, k))


def _radii(x: Tensor, k: int) -> Tensor:
    """Return the radius of the ball around each row of x (n, d), (n,)."""
    nearest = min(k + 1, len(x))  # the first is the member itself
    return torch.cat([torch.cdist(rows, x).kthvalue(nearest).values for rows in _blocks(x, len(x))])


def _inside(x: Tensor, centers: Tensor, radii: Tensor) -> float:
    """Return the share of the rows of x (n, d) that lie inside a ball; centers (m, d), radii (m,)."""
    found = [(torch.cdist(rows, centers) <= radii).any(1) for rows in _blocks(x, len(centers))]
    return torch.cat(found).double().mean().item()


def _blocks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Split x (n, d) into rows whose distances to `columns` others fit into a block."""
    return x.split(max(1, _ELEMENTS // columns))
