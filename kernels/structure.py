"""Compute SADM's structure loss (arXiv 2402.17563): predicted samples keep the pairwise distances of real ones.

The paper leaves the normalization of the distances, the weights of the pairs and the penalty open. Ours are:

    r_ij = |f_i - f_j|,  s_ij = |g_i - g_j|,  w_ij = w_i w_j
    P_ij = r_ij / sqrt(sum_{i!=j} w_ij r_ij^2 / sum_{i!=j} w_ij),   Q_ij likewise from s
    L    = sum_{i!=j} w_ij penalty(P_ij - Q_ij) / sum_{i!=j} w_ij

The moments carry the same weights as the pairs: a sample of weight zero has no influence at all. P and Q therefore
have a weighted mean square of 1, and with squared errors L = 2 - 2 mean_w(P Q). L lies between 0, where P and Q
agree, and 2, where no pair is apart in both, for any B. With the mean in place of the root mean square, and equal
weights, L reaches B: a point far from all others, which coincide, has P = B / 2 with each of them.

The forward pass walks twice over tiles of pairs i < j: first for the moments, then for the loss. The backward pass
recomputes the tiles. Neither a (B, B, d) tensor nor, beyond one panel of rows, a (B, B) tensor exists, and every sum
has a fixed order.

Distances are computed from differences, not from |f_i|^2 + |f_j|^2 - 2 f_i.f_j. The difference of large numbers
loses near pairs (at a relative distance of 1e-3, half of all digits of the square), it does not give an exact zero
diagonal, and its gradient divides by what it lost. The price is that tensor cores are not used. With B = 1024 and
d = 512, forward and backward passes are 6 G fp32 operations on pairs, which take 0.2 ms at an H100's fp32 peak; with
B = 8192 they take 64 times that.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ._dispatch import choose
from .structure_triton import TINY, moments_of, square_factor, structure, units

DISTANCES = ("euclidean", "squared", "cosine")
NORMALIZATIONS = ("rms", "mean", "none")
PENALTIES = ("l2", "l1", "huber")

_REFERENCE_CHUNK = 1 << 26  # rows * B * d of one chunk of the reference


class StructureLoss(NamedTuple):
    """Hold the loss and the statistics that a trainer logs, all on the device. Only `loss` carries a gradient.

    The statistics carry the pairs' weights too, so they describe the pairs that the loss acts on.
    """

    loss: Tensor  # () fp32
    moments: Tensor  # (5,) fp64, weighted means over pairs of: real, fake, real^2, fake^2, real * fake distance

    @property
    def real_distance(self) -> Tensor:
        """Return the () weighted mean distance of real features, before normalization."""
        return self.moments[0]

    @property
    def fake_distance(self) -> Tensor:
        """Return the () weighted mean distance of generated features, before normalization."""
        return self.moments[1]

    @property
    def correlation(self) -> Tensor:
        """Return the () weighted Pearson correlation of real and generated distances over all pairs."""
        real, fake, real2, fake2, product = self.moments.unbind()
        variances = (real2 - real.square()) * (fake2 - fake.square())
        return (product - real * fake) * variances.clamp_min(TINY).rsqrt()


def structure_loss(
    real: Tensor,
    fake: Tensor,
    weight: Tensor | None = None,
    *,
    distance: str = "euclidean",
    normalize: str = "rms",
    penalty: str = "l2",
    huber_delta: float = 1.0,
    implementation: str | None = None,
) -> StructureLoss:
    """Return L of the module's docstring for features f = real and g = fake of one batch, with gradients for both.

    real, fake: (B, d) of one floating dtype and any strides. The arithmetic is fp32 (fp64 for fp64).
    weight: (B,) w_i >= 0, or None for ones. It is a constant without a gradient. If all products w_i w_j are zero, the
        loss is zero. Its values are not checked.
    distance: "euclidean" |a - b|; "squared" |a - b|^2; "cosine" 1 - cos(a, b), computed from unit vectors as
        |a - b|^2 / 2. A zero vector stays zero, at 1/2 from all others.
    normalize: divide distances by their "rms" or their "mean", or by nothing ("none").
    penalty: of e = P - Q: "l2" e^2, "l1" |e|, "huber" e^2 / 2, which is linear from huber_delta on.
    huber_delta: the error from which the Huber penalty is linear.
    implementation: see `fastdit.kernels._dispatch`. There is a Triton kernel for all dtypes but fp64.

    Coincident points are at distance exactly 0 and pull at each other with gradient 0.

    Beyond a padded copy of the features and their transposes, the backward pass takes 128 MiB for any B. Where ranks
    gather their features, each may compute the loss of all; its own rows of the gradient are exact.
    Raises ValueError for other shapes, dtypes and choices, for B < 2, and for an `implementation` that cannot run here.
    """
    _check(real, fake, weight, distance, normalize, penalty, huber_delta)
    work = torch.promote_types(real.dtype, torch.float32)
    f, g = real.to(work), fake.to(work)
    if distance == "cosine":
        f, g = _unit(f), _unit(g)
    weight = f.new_ones(f.shape[0]) if weight is None else weight.detach().to(work)
    chosen = choose(real.device, implementation=implementation, triton=work == torch.float32)
    run = structure if chosen == "triton" else structure_loss_reference
    loss, totals = run(f, g, weight, distance, normalize, penalty, huber_delta)[:2]
    return StructureLoss(loss, moments_of(totals.detach()))


def structure_loss_reference(
    f: Tensor, g: Tensor, weight: Tensor, distance: str, normalize: str, penalty: str, delta: float
) -> tuple[Tensor, Tensor]:
    """Return (loss, totals) of features (unit vectors for "cosine") and weights, in chunks of rows.

    totals (6,) fp64: sums over pairs i != j of w r, w s, w r^2, w s^2, w r s and w.
    """
    size = f.shape[0]
    rows = max(1, _REFERENCE_CHUNK // f.numel())
    spans = [(start, min(start + rows, size)) for start in range(0, size, rows)]

    def recomputed(function, *args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    totals = sum(recomputed(_chunk_totals, f, g, weight, a, b, distance) for a, b in spans)
    scale = units(moments_of(totals), normalize).to(f.dtype)
    costs = sum(recomputed(_chunk_cost, f, g, weight, scale, a, b, distance, penalty, delta) for a, b in spans)
    return (costs / totals[5].clamp_min(TINY)).to(f.dtype), totals


def _chunk_totals(f: Tensor, g: Tensor, weight: Tensor, start: int, stop: int, distance: str) -> Tensor:
    """Return the (6,) fp64 sums over the pairs of rows start..stop-1 with all samples."""
    r, s = (_distances(x, start, stop, distance) for x in (f, g))
    w = _pair_weights(weight, start, stop)
    return torch.stack([x.sum(dtype=torch.float64) for x in (w * r, w * s, w * r * r, w * s * s, w * r * s, w)])


def _chunk_cost(
    f: Tensor, g: Tensor, weight: Tensor, scale: Tensor, start: int, stop: int, distance: str, penalty: str,
    delta: float,
) -> Tensor:  # fmt: skip
    """Return the () fp64 weighted penalty of the pairs of rows start..stop-1 with all samples."""
    p, q = (_distances(x, start, stop, distance) / unit for x, unit in zip((f, g), scale))
    if penalty == "l2":
        cost = (p - q).square()
    elif penalty == "l1":
        cost = (p - q).abs()
    else:
        cost = F.huber_loss(p, q, reduction="none", delta=delta)
    return (_pair_weights(weight, start, stop) * cost).sum(dtype=torch.float64)


def _pair_weights(weight: Tensor, start: int, stop: int) -> Tensor:
    """Return the (stop - start, B) products w_i w_j, zero on the diagonal."""
    index = torch.arange(len(weight), device=weight.device)
    return weight[start:stop, None] * weight * (index[start:stop, None] != index)


def _distances(x: Tensor, start: int, stop: int, distance: str) -> Tensor:
    """Return (stop - start, B) distances from differences: cdist's other route, a product, is not exact near zero."""
    r = torch.cdist(x[start:stop], x, compute_mode="donot_use_mm_for_euclid_dist")
    return r if distance == "euclidean" else square_factor(distance) * r.square()


def _unit(x: Tensor) -> Tensor:
    """Return rows of x at unit length; zero rows stay zero."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1)


def _check(real, fake, weight, distance, normalize, penalty, delta) -> None:
    """Raise ValueError unless the arguments are those that `structure_loss` documents."""
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
        ("normalize", normalize, NORMALIZATIONS),
        ("penalty", penalty, PENALTIES),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    if not delta > 0:
        raise ValueError(f"huber_delta={delta} must be positive")
