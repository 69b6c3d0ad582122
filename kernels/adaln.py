"""The adaLN operations (DiT, arXiv 2212.09748, section 3.2) that touch the residual stream between two GEMMs.

Counted as passes over memory there are three operations, and each site of the network is one call:

    modulate                 h = LN(x) * (1 + scale) + shift                       before the first block
    gate_residual_modulate   x = x + gate * y;  h = LN(x) * (1 + scale) + shift    all other sites
    gate_residual            x = x + gate * y                                      where no norm follows

One custom operator with its backward pass serves all three, in Triton and in C++; `*_reference` are readable PyTorch.
`linear.py` joins the operator with the linear layer that follows.

The stream may be fp32 and all else bf16: x, r and their gradients have the stream's dtype; h has that of scale and
shift; y and each vector get gradients in their own. The arithmetic is fp32 (fp64 for fp64 inputs), because `1 + scale`
in bf16 would lose small scales. The new stream is rounded to its dtype before the norm, so fused and separate calls of
one implementation agree to the bit. The kernels' sums have a fixed order, which depends only on the number of tokens
and the width. A sample's result therefore has the same bits in every run, at every position in a batch of any size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import adaln_triton
from ._dispatch import choose
from ._native import load_native
from ._operator import operator
from .fp8 import FP8

EPS = 1e-6
NORMS = ("layer", "rms")
_TRITON_TYPES = {torch.float32, torch.bfloat16, torch.float16}
_CPP_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}  # branch dtypes, as csrc/adaln_cpu.cpp names them


def modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float = EPS,
    *,
    norm: str = "layer",
    rows: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return LN(x) * (1 + scale) + shift, where the norm has no affine parameters.

    Args:
        x: (B, N, D), floating.
        scale, shift: floating (B, D), or (B, N, D) for backbones that condition each token on its own, as in-context
            or video models do. fastdit's DiT passes (B, D). Views of a larger tensor are read in place.
        norm: "layer" for LayerNorm, which DiT uses, or "rms" for x / sqrt(mean(x^2) + eps), which backbones with
            RMSNorm need.
        rows: (B, M) int32 or int64 in [0, N), distinct within a sample. The result has these tokens only, in this
            order, as if x and the vectors of each token had been gathered first. Other tokens get zero gradients.
        implementation: see `fastdit.kernels._dispatch`. Triton takes fp32, bf16 and fp16 with D up to 8192. C++ takes
            x in fp32, all else in fp32 or all in bf16, with (B, D) vectors and without `rows`. The reference serves
            everything else.

    Returns (B, N or M, D) in scale's dtype. Raises ValueError for other shapes, dtypes and devices, for an unknown
    `norm`, and for an `implementation` that cannot run here.
    """
    check(x, None, None, scale, shift, rows, norm)
    chosen = choose_adaln(x, None, None, scale, shift, rows, implementation)
    if chosen == "reference":
        return modulate_reference(x, scale, shift, eps, norm=norm, rows=rows)
    return adaln(x, None, None, scale, shift, rows, eps, norm == "rms", False, chosen)[1]


def gate_residual_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = EPS,
    *,
    norm: str = "layer",
    rows: Tensor | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (r, LN(r) * (1 + scale) + shift) with r = x + gate * y, or r = x where y and gate are None.

    x, y: (B, N, D), floating.
    gate, scale, shift: floating (B, D) or (B, N, D).
    The other arguments are those of `modulate`. Both results are (B, N or M, D), the first in x's dtype and the second
    in scale's. Raises ValueError as `modulate` does, and where only one of y and gate is given.
    """
    check(x, y, gate, scale, shift, rows, norm)
    chosen = choose_adaln(x, y, gate, scale, shift, rows, implementation)
    if chosen == "reference":
        return gate_residual_modulate_reference(x, y, gate, scale, shift, eps, norm=norm, rows=rows)
    new_r = y is not None or rows is not None
    r, h, _ = adaln(x, y, gate, scale, shift, rows, eps, norm == "rms", new_r, chosen)
    return r if new_r else x, h


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, implementation: str | None = None) -> Tensor:
    """Return x + gate * y.

    x, y are (B, N, D) and gate is (B, D) or (B, N, D), all floating. Returns (B, N, D) in x's dtype. On CPUs, "auto" is
    the reference. Raises ValueError for other shapes, dtypes and devices, and for an `implementation` that cannot run
    here.
    """
    check(x, y, gate)
    chosen = choose_adaln(x, y, gate, None, None, None, implementation)
    if chosen == "reference":
        return gate_residual_reference(x, y, gate)
    return adaln(x, y, gate, None, None, None, EPS, False, True, chosen)[0]


# The reference in PyTorch, which defines what the kernels compute.


def modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS, *, norm: str = "layer", rows: Tensor | None = None
) -> Tensor:
    """Compute `modulate` in PyTorch."""
    x, scale, shift = (_gather(tensor, rows) for tensor in (x, scale, shift))
    acc = torch.promote_types(x.dtype, torch.float32)
    normed = (F.layer_norm if norm == "layer" else F.rms_norm)(x.to(acc), x.shape[-1:], eps=eps)
    return torch.addcmul(_rows(shift, acc), normed, 1 + _rows(scale, acc)).to(scale.dtype)


def gate_residual_modulate_reference(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float = EPS,
    *,
    norm: str = "layer",
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `gate_residual_modulate` in PyTorch."""
    x, y, gate, scale, shift = (_gather(tensor, rows) for tensor in (x, y, gate, scale, shift))
    r = x if y is None else gate_residual_reference(x, y, gate)
    return r, modulate_reference(r, scale, shift, eps, norm=norm)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Compute `gate_residual` in PyTorch."""
    acc = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(x.to(acc), _rows(gate, acc), y.to(acc)).to(x.dtype)


def _rows(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a vector per sample (B, D) as (B, 1, D), and vectors per token (B, N, D) unchanged, in `dtype`."""
    return (vector if vector.dim() == 3 else vector.unsqueeze(1)).to(dtype)


def _gather(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    """Return the tokens `rows` of a (B, N, D) tensor. A vector per sample (B, D) has no tokens and is unchanged."""
    if rows is None or tensor is None or tensor.dim() == 2:
        return tensor
    return tensor.gather(1, rows.long().unsqueeze(2).expand(-1, -1, tensor.shape[2]))


# Calls of csrc/adaln_cpu.cpp, which takes addresses. Address 0 stands for an absent tensor.


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _view(tensor: Tensor | None) -> tuple[int, int, int]:
    """Return (address, stride of a sample, stride of a token); a vector per sample has token stride 0."""
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1) if tensor.dim() == 3 else 0


def _cpp(name: str, vector: Tensor) -> Callable:
    """Return the C++ function `name` for branches of the dtype of `vector`."""
    return getattr(load_native("cpu")[0], f"{name}_{_CPP_NAMES[vector.dtype]}")


def _cpp_forward(x, y, gate, scale, shift, rows, eps, rms, r, h, stats) -> None:
    views, outputs = map(_view, (x, y, gate, scale, shift)), map(_address, (r, h, stats))
    run = _cpp("adaln", gate if scale is None else scale)
    run(*views, *outputs, *x.shape, eps, rms, torch.get_num_threads())


def _cpp_backward(
    dr, dh, residual, y, gate, scale, shift, rows, stats, rms, from_x, dx, dy, dgate, dscale, dshift, h, dy_bias
) -> None:
    outputs = dx, dy, dgate, dscale, dshift, h
    views = map(_view, (dr, dh, residual, y, gate, scale, shift))
    shape = (dr if dh is None else dh).shape
    run = _cpp("adaln_backward", gate if scale is None else scale)
    run(*views, _address(stats), *map(_address, outputs), *shape, rms, from_x, torch.get_num_threads())
    if dy_bias is not None:
        dy_bias.copy_(dy.flatten(0, 1).sum(0))


# Custom operators. They cannot return None, so an empty tensor stands for an absent result.


@operator("fastdit::adaln")
def adaln(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, rows: Tensor | None,
    eps: float, rms: bool, keep_r: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (r, h, stats), with r only if `keep_r`, and h and stats only if there is a scale.

    stats (B, N, 2) fp32 holds the mean and the inverse deviation of each row. Without `keep_r` the backward pass forms
    r again from x and y, which it reads anyway.
    """
    outputs = _forward_outputs(x, y, gate, scale, shift, rows, eps, rms, keep_r, implementation)
    run = adaln_triton.forward if implementation == "triton" else _cpp_forward
    inputs = map(_readable, (x, y, gate, scale, shift, rows))
    run(*inputs, eps, rms, *map(_or_none, outputs))
    return outputs


@adaln.register_fake
def _forward_outputs(x, y, gate, scale, shift, rows, eps, rms, keep_r, implementation):
    """Allocate the results of `adaln`."""
    shape = x.shape if rows is None else (*rows.shape, x.shape[2])
    normed = scale is not None
    r, h = x.new_empty(shape if keep_r else 0), (scale if normed else x).new_empty(shape if normed else 0)
    return r, h, x.new_empty((*shape[:2], 2) if normed else 0, dtype=torch.float32)


@operator("fastdit::adaln_fp8")
def adaln_fp8(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, rows: Tensor | None,
    eps: float, rms: bool, keep_r: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return r, h in fp8 with a scale for each row (B, N, 1), and stats, by Triton: see `adaln` and `fp8.py`."""
    r, h, h_scale, stats = outputs = _fp8_outputs(x, y, gate, scale, shift, rows, eps, rms, keep_r)
    inputs = map(_readable, (x, y, gate, scale, shift, rows))
    adaln_triton.forward(*inputs, eps, rms, _or_none(r), h, stats, h_scale=h_scale)
    return outputs


@adaln_fp8.register_fake
def _fp8_outputs(x, y, gate, scale, shift, rows, eps, rms, keep_r):
    """Allocate the results of `adaln_fp8`."""
    shape = x.shape if rows is None else (*rows.shape, x.shape[2])
    h, h_scale = x.new_empty(shape, dtype=FP8), x.new_empty((*shape[:2], 1), dtype=torch.float32)
    return x.new_empty(shape if keep_r else 0), h, h_scale, x.new_empty((*shape[:2], 2), dtype=torch.float32)


@operator("fastdit::adaln_backward")
def adaln_backward(
    dr: Tensor | None, dh: Tensor | None, residual: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, rows: Tensor | None, stats: Tensor | None, y_bias: Tensor | None,
    tokens: int, rms: bool, from_x: bool, need_h: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (dx, dy, dgate, dscale, dshift, h, dy_bias), with h only if `need_h`.

    `residual` is x if `from_x`, else r. `tokens` is the number of tokens of x. Without dh and rows, dx equals dr and is
    empty here. dy_bias holds the column sums (D,) of dy in the dtype of `y_bias`, and is empty without it.
    """
    outputs = _backward_outputs(
        dr, dh, residual, y, gate, scale, shift, rows, stats, y_bias, tokens, rms, from_x, need_h, implementation
    )
    run = adaln_triton.backward if implementation == "triton" else _cpp_backward
    inputs = map(_readable, (dr, dh, residual, y, gate, scale, shift, rows, stats))
    run(*inputs, rms, from_x, *map(_or_none, outputs))
    return outputs


@adaln_backward.register_fake
def _backward_outputs(
    dr, dh, residual, y, gate, scale, shift, rows, stats, y_bias, tokens, rms, from_x, need_h, implementation
):
    """Allocate the results of `adaln_backward`."""
    upstream, normed = dr if dh is None else dh, dh is not None
    stream = dr if residual is None else residual  # has the stream's dtype
    fill = torch.empty_like if rows is None else torch.zeros_like  # tokens outside `rows` get zero gradients

    def gradient(tensor, needed=True):
        if not needed or tensor is None:
            return upstream.new_empty(0)
        return fill(tensor, memory_format=torch.contiguous_format)

    shape = (len(upstream), tokens, upstream.shape[2])
    dx = stream.new_empty(shape if normed else 0) if rows is None else stream.new_zeros(shape)
    vectors = gradient(gate), gradient(scale, normed), gradient(shift, normed)
    dy_bias = upstream.new_empty(0) if y_bias is None else torch.empty_like(y_bias)
    return dx, gradient(y), *vectors, gradient(dh, need_h), dy_bias


def adaln_gradients(
    dr, dh, residual, y, gate, scale, shift, rows, stats, y_bias, tokens, rms, from_x, need_h, implementation
):
    """Return `adaln_backward` as autograd expects it: None for absent gradients, and dr itself where dx equals it."""
    if dr is None and dh is None:
        return (None,) * 7
    saved = residual, y, gate, scale, shift, rows, stats, y_bias
    dx, *others = adaln_backward(dr, dh, *saved, tokens, rms, from_x, need_h, implementation)
    return dr if dh is None and rows is None else dx, *map(_or_none, others)


def _save(ctx, inputs, output):
    x, y, gate, scale, shift, rows, _, ctx.rms, keep_r, ctx.implementation = inputs
    r, h, stats = output
    ctx.tokens, ctx.from_x = x.shape[1], not keep_r
    residual = None if scale is None else r if keep_r else x
    ctx.save_for_backward(residual, y, gate, scale, shift, rows, stats)
    ctx.mark_non_differentiable(
        stats, *(tensor for tensor, there in ((r, keep_r), (h, scale is not None)) if not there)
    )
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dr, dh, _):
    options = ctx.tokens, ctx.rms, ctx.from_x, False, ctx.implementation
    gradients = adaln_gradients(dr, dh, *ctx.saved_tensors, None, *options)
    return *gradients[:5], *[None] * 5


adaln.register_autograd(_differentiate, setup_context=_save)


def choose_adaln(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    rows: Tensor | None,
    implementation: str | None,
) -> str:
    """Return the implementation of this call. Raises ValueError as `choose` does."""
    vectors = [vector for vector in (gate, scale, shift) if vector is not None]
    branch = {tensor.dtype for tensor in (y, *vectors) if tensor is not None}
    filled = x.numel() > 0 and (rows is None or rows.numel() > 0)
    return choose(
        x.device,
        implementation=implementation,
        triton=filled and x.shape[2] <= adaln_triton.MAX_WIDTH and branch | {x.dtype} <= _TRITON_TYPES,
        cpp=filled
        and rows is None
        and x.dtype == torch.float32
        and len(branch) == 1
        and branch <= _CPP_NAMES.keys()
        and all(vector.dim() == 2 for vector in vectors),
        auto_cpp=scale is not None,  # without a norm, torch's addcmul is one pass too, and 1.3 times as fast
    )


def check(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    rows: Tensor | None = None,
    norm: str = "layer",
) -> None:
    """Raise ValueError unless the arguments are those that `gate_residual_modulate` documents."""
    # Check the options and the stream.
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
    if x.dim() != 3:
        raise ValueError(f"x must be (B, N, D), got {tuple(x.shape)}")
    if (y is None) != (gate is None):
        raise ValueError("y and gate go together; give both or neither")
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
    # Check each floating tensor against x.
    batch, _, width = x.shape
    floating = {"x": x, "y": y, "gate": gate, "scale": scale, "shift": shift}
    for name, tensor in floating.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating, got {tensor.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if tensor.shape != x.shape and tuple(tensor.shape) != (batch, width):
            raise ValueError(
                f"{name} must be (B, D) = {(batch, width)}, got {tuple(tensor.shape)}; or (B, N, D) for each token"
            )
    # Check the row indices.
    if rows is not None:
        if rows.dim() != 2 or rows.shape[0] != batch or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows must be int32 or int64 (B, M), B = {batch}, got {rows.dtype} {tuple(rows.shape)}")
        if rows.device != x.device:
            raise ValueError(f"rows is on {rows.device}, x on {x.device}")


def _readable(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor as the kernels read it: integers contiguous, floats with inner stride 1."""
    if tensor is None or (tensor.is_floating_point() and tensor.stride(-1) == 1):
        return tensor
    return tensor.contiguous()


def _or_none(tensor: Tensor) -> Tensor | None:
    """Return None for an empty tensor."""
    return tensor if tensor.numel() else None
