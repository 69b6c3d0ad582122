"""The adaLN family (DiT, arXiv 2212.09748, section 3.2): what happens to the residual stream between GEMMs.

Seen as passes over memory there are only three operations, and each site of the network is exactly one call:

    modulate                 h = LN(x) * (1 + scale) + shift                       before the first block
    gate_residual_modulate   x = x + gate * y;  h = LN(x) * (1 + scale) + shift    all other sites
    gate_residual            x = x + gate * y                                      where no norm follows

`*_reference` are readable PyTorch; the public functions choose the implementation.
All arithmetic is in fp32 (fp64 for fp64 inputs): `1 + scale` formed in bf16 would lose small scales.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6


def modulate(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    """LN(x) * (1 + scale) + shift, the LayerNorm without affine parameters.

    x (B, N, D); scale, shift (B, D), any strides, any floating dtypes. Returns (B, N, D) in x's dtype.
    Raises ValueError for other shapes.
    """
    _check(x, scale=scale, shift=shift)
    return modulate_reference(x, scale, shift, eps)


def gate_residual_modulate(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """(r, LN(r) * (1 + scale) + shift) with r = x + gate * y, rounded to x's dtype before it is normalised.

    x, y (B, N, D); gate, scale, shift (B, D). Both results (B, N, D) in x's dtype.
    Raises ValueError for other shapes.
    """
    _check(x, y, gate=gate, scale=scale, shift=shift)
    return gate_residual_modulate_reference(x, y, gate, scale, shift, eps)


def gate_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x + gate * y.

    x, y (B, N, D); gate (B, D). Returns (B, N, D) in x's dtype. Raises ValueError for other shapes.
    """
    _check(x, y, gate=gate)
    return gate_residual_reference(x, y, gate)


def modulate_reference(x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(acc), x.shape[-1:], eps=eps)
    return torch.addcmul(_rows(shift, acc), normed, 1 + _rows(scale, acc)).to(x.dtype)


def gate_residual_modulate_reference(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    r = gate_residual_reference(x, y, gate)
    return r, modulate_reference(r, scale, shift, eps)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(x.to(acc), _rows(gate, acc), y.to(acc)).to(x.dtype)


def _rows(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, D) -> (B, 1, D): one vector per sample, for all of its tokens."""
    return vector.to(dtype).unsqueeze(1)


def _check(x: Tensor, y: Tensor | None = None, **vectors: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be (B, N, D), got {tuple(x.shape)}")
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
    expected = (x.shape[0], x.shape[2])
    for name, vector in vectors.items():
        if tuple(vector.shape) != expected:
            raise ValueError(f"{name} must be (B, D) = {expected}, got {tuple(vector.shape)}")
