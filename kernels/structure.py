"""SADM's structure loss (arXiv 2402.17563): do generated samples keep the pairwise distances of the real ones?

The paper leaves the distances' normalisation, the pairs' weights and the penalty open; these are ours:

    P_ij = |f_i - f_j| / rms_{i!=j} |f_i - f_j|,   Q_ij the same of g
    L    = sum_{i!=j} w_ij penalty(P_ij - Q_ij) / sum_{i!=j} w_ij,   w_ij = sqrt(w_i w_j)

So P and Q have mean square 1, and with equal weights and squared errors L = 2 - 2 mean(P Q): from 0, where they agree,
to 2, where no pair is apart in both, for any B. Over the mean instead L reaches B: one point far from all others,
which coincide, has P = B / 2 with each.

Two passes over tiles of pairs i < j: the means, then the loss. Backward recomputes the tiles. Neither a
(B, B, d) nor, beyond one panel of rows, a (B, B) tensor exists, and every sum has a fixed order.

Distances come from differences, not from |f_i|^2 + |f_j|^2 - 2 f_i.f_j: the difference of large numbers loses
near pairs (at a relative distance of 1e-3, half of all digits of the square), does not give an exact zero
diagonal, and its gradient divides by what it lost. The price: no tensor cores. With B = 1024, d = 512, forward
and backward are 6 G fp32 operations on pairs, 0.2 ms at an H100's fp32 peak; 64 times that at B = 8192.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._dispatch import choose
from .structure_triton import TINY, square_factor, structure, units

DISTANCES = ("euclidean", "squared", "cosine")
NORMALISATIONS = ("rms", "mean", "none")
PENALTIES = ("l2", "l1", "huber")

_REFERENCE_CHUNK = 1 << 26  # rows * B * d of the reference's chunk


class StructureLoss(NamedTuple):
    """The loss, and what a trainer logs, all on the device. Only `loss` carries a gradient."""

    loss: Tensor  # () fp32
    moments: Tensor  # (5,) fp64, means over pairs i != j of: real, fake, real^2, fake^2, real * fake distance

    @property
    def real_distance(self) -> Tensor:
        """() mean distance of real features, before normalisation."""
        return self.moments[0]

    @property
    def fake_distance(self) -> Tensor:
        """() mean distance of generated features, before normalisation."""
        return self.moments[1]

    @property
    def correlation(self) -> Tensor:
        """() Pearson correlation of the real and the generated distances over all pairs."""
        real, fake, real2, fake2, product = self.moments.unbind()
        variances = (real2 - real.square()) * (fake2 - fake.square())
        return (product - real * fake) * variances.clamp_min(TINY).rsqrt()


def structure_loss(
    real: Tensor,
    fake: Tensor,
    weight: Tensor | None = None,
    *,
    distance: str = "euclidean",
    normalise: str = "rms",
    penalty: str = "l2",
    huber_delta: float = 1.0,
    implementation: str | None = None,
) -> StructureLoss:
    """L of the module's docstring for features f = real and g = fake of one batch, with gradients for both.

    real, fake (B, d), one floating dtype, any strides; arithmetic in fp32 (fp64 for fp64). weight (B,) >= 0 or
    None for ones: w_i, a constant; its values are the caller's to keep. All weights zero: the loss is zero.
    distance: "euclidean" |a - b|, "squared" |a - b|^2, "cosine" 1 - cos(a, b), taken of unit vectors as
    |a - b|^2 / 2; a zero vector stays zero, 1/2 from all others. normalise: distances by their "rms", their "mean",
    or "none". penalty of e = P - Q: "l2" e^2, "l1" |e|, "huber" e^2 / 2, from huber_delta on linear.
    Coincident points are at distance exactly 0 and pull at each other with gradient 0.

    Memory beyond a padded copy of the features and their transposes: 128 MiB in backward, for any B. Where
    ranks gather their features, each may compute the loss of all; its own rows of the gradient are exact.
    Raises ValueError for other shapes, dtypes and choices, and for B < 2.
    """
    _check(real, fake, weight, distance, normalise, penalty, huber_delta)
    work = torch.promote_types(real.dtype, torch.float32)
    f, g = real.to(work), fake.to(work)
    if distance == "cosine":
        f, g = _unit(f), _unit(g)
    root = f.new_ones(f.shape[0]) if weight is None else weight.detach().to(work).sqrt()
    chosen = choose(real.device, implementation=implementation, triton=work == torch.float32)
    run = structure if chosen == "triton" else structure_loss_reference
    loss, moments = run(f, g, root, distance, normalise, penalty, huber_delta)[:2]
    return StructureLoss(loss, moments.detach())


def structure_loss_reference(
    f: Tensor, g: Tensor, root: Tensor, distance: str, normalise: str, penalty: str, delta: float
) -> tuple[Tensor, Tensor]:
    """(loss, moments) of features (unit vectors for "cosine") and root = sqrt(weight), in chunks of rows."""
    size = f.shape[0]
    rows = max(1, _REFERENCE_CHUNK // f.numel())
    spans = [(start, min(start + rows, size)) for start in range(0, size, rows)]

    def recomputed(function, *args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    moments = sum(recomputed(_chunk_moments, f, g, a, b, distance) for a, b in spans) / (size * (size - 1))
    scale = units(moments, normalise).to(f.dtype)
    sums = sum(recomputed(_chunk_sums, f, g, root, scale, a, b, distance, penalty, delta) for a, b in spans)
    return (sums[0] / sums[1].clamp_min(TINY)).to(f.dtype), moments


def _chunk_moments(f: Tensor, g: Tensor, start: int, stop: int, distance: str) -> Tensor:
    r, s = (_distances(x, start, stop, distance) for x in (f, g))
    return torch.stack([x.sum(dtype=torch.float64) for x in (r, s, r * r, s * s, r * s)])


def _chunk_sums(
    f: Tensor, g: Tensor, root: Tensor, scale: Tensor, start: int, stop: int, distance: str, penalty: str, delta: float
) -> Tensor:
    p, q = (_distances(x, start, stop, distance) / unit for x, unit in zip((f, g), scale))
    if penalty == "l2":
        cost = (p - q).square()
    elif penalty == "l1":
        cost = (p - q).abs()
    else:
        cost = F.huber_loss(p, q, reduction="none", delta=delta)
    index = torch.arange(len(root), device=root.device)
    pairs = root[start:stop, None] * root * (index[start:stop, None] != index)
    return torch.stack([(pairs * cost).sum(dtype=torch.float64), pairs.sum(dtype=torch.float64)])


def _distances(x: Tensor, start: int, stop: int, distance: str) -> Tensor:
    """(stop - start, B), from differences: cdist's other route, a product, is not exact near zero."""
    r = torch.cdist(x[start:stop], x, compute_mode="donot_use_mm_for_euclid_dist")
    return r if distance == "euclidean" else square_factor(distance) * r.square()


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def _check(real, fake, weight, distance, normalise, penalty, delta) -> None:
    if real.dim() != 2 or fake.shape != real.shape:
        raise ValueError(f"real and fake must be (B, d) of one shape, got {tuple(real.shape)}, {tuple(fake.shape)}")
    if not real.is_floating_point() or fake.dtype != real.dtype:
        raise ValueError(f"real and fake must have one floating dtype, got {real.dtype}, {fake.dtype}")
    if real.shape[0] < 2 or real.shape[1] < 1:
        raise ValueError(f"a pair needs two samples and a feature, got {tuple(real.shape)}")
    if weight is not None and (tuple(weight.shape) != (real.shape[0],) or not weight.is_floating_point()):
        raise ValueError(f"weight must be floating (B,) = ({real.shape[0]},), got {weight.dtype} {tuple(weight.shape)}")
    for name, value, known in (
        ("distance", distance, DISTANCES),
        ("normalise", normalise, NORMALISATIONS),
        ("penalty", penalty, PENALTIES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if not delta > 0:
        raise ValueError(f"huber_delta={delta} must be positive")
