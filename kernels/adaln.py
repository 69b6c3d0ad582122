"""The adaLN family (DiT, arXiv 2212.09748, section 3.2): what happens to the residual stream between GEMMs.

Seen as passes over memory there are only three operations, and each site of the network is exactly one call:

    modulate                 h = LN(x) * (1 + scale) + shift                       before the first block
    gate_residual_modulate   x = x + gate * y;  h = LN(x) * (1 + scale) + shift    all other sites
    gate_residual            x = x + gate * y                                      where no norm follows

All three are one operator and its backward, in Triton and in C++; `*_reference` are readable PyTorch. `linear.py`
joins them with the linear layer that follows.

Arithmetic is fp32 (fp64 for fp64 inputs): `1 + scale` formed in bf16 would lose small scales. The new stream is
rounded to its dtype before it is normed, so fused and separate calls of one implementation agree to the bit. The
kernels' sums have a fixed order, which depends on the number of tokens and the width only: a sample's result is the
same to the bit in every run, at every place of a batch of any size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import adaln_triton
from ._dispatch import choose
from ._native import load_native
from ._operator import operator

EPS = 1e-6
NORMS = ("layer", "rms")
_TRITON_TYPES = {torch.float32, torch.bfloat16, torch.float16}
_CPP_TYPES = {torch.float32}


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
    """LN(x) * (1 + scale) + shift, the norm without affine parameters.

    Args:
        x: (B, N, D).
        scale, shift: (B, D), or (B, N, D) for a condition of each token. Views of a larger tensor are read in place.
        norm: "layer", or "rms" for x / sqrt(mean(x^2) + eps).
        rows: (B, M) int32 or int64 in [0, N), no two equal in a sample: these tokens only, in this order, as if x and
            the vectors of each token had been gathered before. Other tokens' gradients are zero.
        implementation: see `fastdit.kernels._dispatch`. Triton takes fp32, bf16 and fp16 and D up to 8192, C++ takes
            fp32 with (B, D) vectors and no `rows`; all else is the reference's.

    Returns (B, N or M, D) in x's dtype. Raises ValueError for what breaks this contract.
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
    """(r, LN(r) * (1 + scale) + shift) with r = x + gate * y, or r = x where y and gate are None.

    x, y (B, N, D); gate, scale, shift (B, D) or (B, N, D); the rest as in `modulate`. Both results (B, N or M, D) in
    x's dtype. Raises ValueError for what breaks this contract.
    """
    check(x, y, gate, scale, shift, rows, norm)
    chosen = choose_adaln(x, y, gate, scale, shift, rows, implementation)
    if chosen == "reference":
        return gate_residual_modulate_reference(x, y, gate, scale, shift, eps, norm=norm, rows=rows)
    new_r = y is not None or rows is not None
    r, h, _ = adaln(x, y, gate, scale, shift, rows, eps, norm == "rms", new_r, chosen)
    return r if new_r else x, h


def gate_residual(x: Tensor, y: Tensor, gate: Tensor, *, implementation: str | None = None) -> Tensor:
    """x + gate * y.

    x, y (B, N, D); gate (B, D) or (B, N, D). Returns (B, N, D) in x's dtype. Raises ValueError for other shapes.
    On CPUs "auto" is the reference.
    """
    check(x, y, gate)
    chosen = choose_adaln(x, y, gate, None, None, None, implementation)
    if chosen == "reference":
        return gate_residual_reference(x, y, gate)
    return adaln(x, y, gate, None, None, None, EPS, False, True, chosen)[0]


# Reference


def modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float = EPS, *, norm: str = "layer", rows: Tensor | None = None
) -> Tensor:
    x, scale, shift = (_gather(tensor, rows) for tensor in (x, scale, shift))
    acc = torch.promote_types(x.dtype, torch.float32)
    normed = (F.layer_norm if norm == "layer" else F.rms_norm)(x.to(acc), x.shape[-1:], eps=eps)
    return torch.addcmul(_rows(shift, acc), normed, 1 + _rows(scale, acc)).to(x.dtype)


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
    x, y, gate, scale, shift = (_gather(tensor, rows) for tensor in (x, y, gate, scale, shift))
    r = x if y is None else gate_residual_reference(x, y, gate)
    return r, modulate_reference(r, scale, shift, eps, norm=norm)


def gate_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    acc = torch.promote_types(x.dtype, torch.float32)
    return torch.addcmul(x.to(acc), _rows(gate, acc), y.to(acc)).to(x.dtype)


def _rows(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, D) -> (B, 1, D): one vector per sample, for all of its tokens; (B, N, D) as it is."""
    return (vector if vector.dim() == 3 else vector.unsqueeze(1)).to(dtype)


def _gather(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    if rows is None or tensor is None or tensor.dim() == 2:
        return tensor
    return tensor.gather(1, rows.long().unsqueeze(2).expand(-1, -1, tensor.shape[2]))


# C++: csrc/adaln_cpu.cpp takes addresses, 0 where there is nothing.


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _view(tensor: Tensor | None) -> tuple[int, int, int]:
    if tensor is None:
        return 0, 0, 0
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1) if tensor.dim() == 3 else 0


def _cpp_forward(x, y, gate, scale, shift, rows, eps, rms, r, h, stats) -> None:
    views, outputs = map(_view, (x, y, gate, scale, shift)), map(_address, (r, h, stats))
    load_native("cpu")[0].adaln(*views, *outputs, *x.shape, eps, rms, torch.get_num_threads())


def _cpp_backward(dr, dh, kept, y, gate, scale, shift, rows, stats, rms, from_x, *outputs) -> None:
    views = map(_view, (dr, dh, kept, y, gate, scale, shift))
    shape = (dr if dh is None else dh).shape
    load_native("cpu")[0].adaln_backward(
        *views, _address(stats), *map(_address, outputs), *shape, rms, from_x, torch.get_num_threads()
    )


# Operators. An operator returns no None: an empty tensor stands for what is not there.


@operator("fastdit::adaln")
def adaln(
    x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor | None, shift: Tensor | None, rows: Tensor | None,
    eps: float, rms: bool, keep_r: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(r, h, stats): r if `keep_r`, h and stats (B, N, 2), the mean and 1/deviation of each row, if there is a scale.

    Without `keep_r` the backward pass forms r again from x and y, which costs nothing.
    """
    outputs = _forward_outputs(x, y, gate, scale, shift, rows, eps, rms, keep_r, implementation)
    run = adaln_triton.forward if implementation == "triton" else _cpp_forward
    inputs = map(_readable, (x, y, gate, scale, shift, rows))
    run(*inputs, eps, rms, *map(_or_none, outputs))
    return outputs


@adaln.register_fake
def _forward_outputs(x, y, gate, scale, shift, rows, eps, rms, keep_r, implementation):
    shape = x.shape if rows is None else (*rows.shape, x.shape[2])
    normed = scale is not None
    r, h = x.new_empty(shape if keep_r else 0), x.new_empty(shape if normed else 0)
    return r, h, x.new_empty((*shape[:2], 2) if normed else 0, dtype=torch.float32)


@operator("fastdit::adaln_backward")
def adaln_backward(
    dr: Tensor | None, dh: Tensor | None, kept: Tensor | None, y: Tensor | None, gate: Tensor | None,
    scale: Tensor | None, shift: Tensor | None, rows: Tensor | None, stats: Tensor | None,
    tokens: int, rms: bool, from_x: bool, again: bool, implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dy, dgate, dscale, dshift, h), from `kept`: x if `from_x`, else r. `tokens`: those of x; h if `again`.

    Without dh and rows dx is dr, and not returned.
    """
    outputs = _backward_outputs(
        dr, dh, kept, y, gate, scale, shift, rows, stats, tokens, rms, from_x, again, implementation
    )
    run = adaln_triton.backward if implementation == "triton" else _cpp_backward
    inputs = map(_readable, (dr, dh, kept, y, gate, scale, shift, rows, stats))
    run(*inputs, rms, from_x, *map(_or_none, outputs))
    return outputs


@adaln_backward.register_fake
def _backward_outputs(dr, dh, kept, y, gate, scale, shift, rows, stats, tokens, rms, from_x, again, implementation):
    given, normed = dr if dh is None else dh, dh is not None
    fill = torch.empty_like if rows is None else torch.zeros_like  # tokens not in `rows` have zero gradients

    def gradient(tensor, wanted=True):
        if not wanted or tensor is None:
            return given.new_empty(0)
        return fill(tensor, memory_format=torch.contiguous_format)

    dx = gradient(given, normed) if rows is None else given.new_zeros(len(given), tokens, given.shape[2])
    vectors = gradient(gate), gradient(scale, normed), gradient(shift, normed)
    return dx, gradient(y), *vectors, gradient(dh, again)


def adaln_gradients(dr, dh, kept, y, gate, scale, shift, rows, stats, tokens, rms, from_x, again, implementation):
    """`adaln_backward` in autograd's terms: None for what is not there, dr itself for a dx that equals it."""
    if dr is None and dh is None:
        return (None,) * 6
    saved = kept, y, gate, scale, shift, rows, stats
    dx, *others = adaln_backward(dr, dh, *saved, tokens, rms, from_x, again, implementation)
    return dr if dh is None and rows is None else dx, *map(_or_none, others)


def _save(ctx, inputs, output):
    x, y, gate, scale, shift, rows, _, ctx.rms, keep_r, ctx.implementation = inputs
    r, h, stats = output
    ctx.tokens, ctx.from_x = x.shape[1], not keep_r
    kept = None if scale is None else r if keep_r else x
    ctx.save_for_backward(kept, y, gate, scale, shift, rows, stats)
    ctx.mark_non_differentiable(
        stats, *(tensor for tensor, there in ((r, keep_r), (h, scale is not None)) if not there)
    )
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dr, dh, _):
    gradients = adaln_gradients(dr, dh, *ctx.saved_tensors, ctx.tokens, ctx.rms, ctx.from_x, False, ctx.implementation)
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
    """Which implementation serves this call; raises as `choose`."""
    vectors = [vector for vector in (gate, scale, shift) if vector is not None]
    dtypes = {tensor.dtype for tensor in (x, y, *vectors) if tensor is not None}
    filled = x.numel() > 0 and (rows is None or rows.numel() > 0)
    return choose(
        x.device,
        implementation=implementation,
        triton=filled and x.shape[2] <= adaln_triton.MAX_WIDTH and dtypes <= _TRITON_TYPES,
        cpp=filled and rows is None and dtypes == _CPP_TYPES and all(vector.dim() == 2 for vector in vectors),
        auto_cpp=scale is not None,  # without a norm torch's addcmul is one pass too, and 1.3 times as fast on CPUs
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
    """Raises ValueError unless the arguments are as `gate_residual_modulate` says."""
    if norm not in NORMS:
        raise ValueError(f"norm={norm!r} is unknown; choose one of {', '.join(NORMS)}")
    if x.dim() != 3:
        raise ValueError(f"x must be (B, N, D), got {tuple(x.shape)}")
    if (y is None) != (gate is None):
        raise ValueError("y and gate go together; give both or neither")
    if y is not None and y.shape != x.shape:
        raise ValueError(f"y must have x's shape {tuple(x.shape)}, got {tuple(y.shape)}")
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
    if rows is not None:
        if rows.dim() != 2 or rows.shape[0] != batch or rows.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"rows must be int32 or int64 (B, M), B = {batch}, got {rows.dtype} {tuple(rows.shape)}")
        if rows.device != x.device:
            raise ValueError(f"rows is on {rows.device}, x on {x.device}")


def _readable(tensor: Tensor | None) -> Tensor | None:
    """As the kernels take it: integers in one piece, floats with inner stride 1."""
    if tensor is None or (tensor.is_floating_point() and tensor.stride(-1) == 1):
        return tensor
    return tensor.contiguous()


def _or_none(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None
