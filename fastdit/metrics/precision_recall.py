"""Compute precision and recall of samples by k-nearest-neighbor manifolds (Kynkaanniemi et al. 2019)."""

import torch
from torch import Tensor

NEIGHBORS = 3  # the k of the manifolds
_ELEMENTS = 1 << 25  # in a block of distances, which takes 256 MiB


def precision_recall(
    samples: Tensor, real: Tensor, *, k: int = NEIGHBORS, real_radii: Tensor | None = None
) -> tuple[float, float]:
    """Return precision and recall, both from 0 to 1.

    Precision is the share of samples inside the manifold of the real features. Recall is the share of real features
    inside the manifold of the samples. The manifold of a set is the union of balls around its members. The radius of a
    ball is the distance to the k-th nearest other member, or to the farthest one in a set of at most k. These are the
    conventions of the ADM evaluator and of torch-fidelity.

    samples: (n, d). real: (m, d). Distances are float64, computed in blocks.
    real_radii: the radii of `real` (m,), if they are known: computing them takes most of the time for few samples.
    """
    samples, real = samples.double(), real.double()
    real_radii = radii(real, k) if real_radii is None else real_radii
    return _inside(samples, real, real_radii), _inside(real, samples, radii(samples, k))


def radii(x: Tensor, k: int = NEIGHBORS) -> Tensor:
    """Return the radius of the ball around each row of x (n, d), float64 (n,)."""
    x = x.double()
    nearest = min(k + 1, len(x))  # the first is the member itself
    return torch.cat([torch.cdist(rows, x).kthvalue(nearest).values for rows in _blocks(x, len(x))])


def _inside(x: Tensor, centers: Tensor, radii: Tensor) -> float:
    """Return the share of the rows of x (n, d) that lie inside a ball; centers (m, d), radii (m,)."""
    found = [(torch.cdist(rows, centers) <= radii).any(1) for rows in _blocks(x, len(centers))]
    return torch.cat(found).double().mean().item()


def _blocks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    """Split x (n, d) into rows whose distances to `columns` others fit into a block."""
    return x.split(max(1, _ELEMENTS // columns))
