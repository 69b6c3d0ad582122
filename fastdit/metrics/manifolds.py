"""Precision and recall of samples by k-nearest-neighbour manifolds (Kynkaanniemi et al. 2019)."""

import torch
from torch import Tensor

_ELEMENTS = 1 << 25  # of a block of distances: 256 MiB


def precision_recall(samples: Tensor, real: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Share of samples inside the manifold of the real features, and of real ones inside that of the samples.

    samples (n, d), real (m, d). A set's manifold is the union of balls around its members, each as large as the
    distance to the k-th nearest other member (to the farthest, in a set of no more than k). Distances are float64,
    in blocks. These are the conventions of the ADM evaluator and of torch-fidelity.
    """
    samples, real = samples.double(), real.double()
    return _inside(samples, real, _radii(real, k)), _inside(real, samples, _radii(samples, k))


def _radii(x: Tensor, k: int) -> Tensor:
    nearest = min(k + 1, len(x))  # the first is the member itself
    return torch.cat([torch.cdist(rows, x).kthvalue(nearest).values for rows in _blocks(x, len(x))])


def _inside(x: Tensor, centres: Tensor, radii: Tensor) -> float:
    found = [(torch.cdist(rows, centres) <= radii).any(1) for rows in _blocks(x, len(centres))]
    return torch.cat(found).double().mean().item()


def _blocks(x: Tensor, columns: int) -> tuple[Tensor, ...]:
    return x.split(max(1, _ELEMENTS // columns))
