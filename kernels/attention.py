"""Unmasked multi-head attention over (B, N, H, d) tensors: one function, several backends.

    flash_attn   the flash-attn package (version 3, 4 or 2, the first that imports); CUDA in fp16 or bf16
    sdpa         torch's scaled_dot_product_attention, for which torch chooses the kernel; every device and dtype
    products     sdpa in the forward pass, plain matrix products in the backward pass; every device and dtype
    cudnn, flash, efficient, math   exactly that kernel of torch
    auto         flash_attn where it can be used; products for short sequences in bf16 on CPUs; else sdpa

`products` exists because the backward pass of torch's CPU kernel is slow in bf16 for short sequences. On a Xeon with
AMX, forward and backward passes of 64 samples of 49 tokens take a fifth of sdpa's time. README.md here has the
measurements.
"""

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ._dispatch import constant_result
from .rotary import norm_rotate

_TORCH_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ("flash_attn", "sdpa", "products", *_TORCH_KERNELS)
PRODUCTS_TOKENS = 512  # the longest sequence that "auto" gives to "products"; from there on sdpa is as fast


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    backend: str = "auto",
    qk_norm: bool | tuple[Tensor, Tensor] = False,
    rope: Tensor | None = None,
    rope_ids: Tensor | None = None,
) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for every head (arXiv 1706.03762, equation 1).

    q, k, v: (B, N, H, d) of one shape, floating dtype and device. Views of a fused qkv are read in place.
    backend: one of `BACKENDS`, or "auto".
    qk_norm, rope, rope_ids: `norm`, `rope` and `ids` of `fastdit.kernels.norm_rotate`, which is applied to q and k
        first.

    Returns (B, N, H, d) in the inputs' dtype. Raises ValueError for other shapes, and for a `backend` that cannot
    serve this device, dtype and head dim; the message gives the reason.
    """
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be (B, N, H, d) of one shape, got {shapes}")
    if qk_norm or rope is not None:
        q, k = norm_rotate(q, k, norm=qk_norm, rope=rope, ids=rope_ids)
    # The length is compared here, so that torch.compile guards on the comparison if it is dynamic.
    if backend == "auto" and _prefers_products(q.device, q.dtype) and q.shape[1] <= PRODUCTS_TOKENS:
        backend = "products"
    return _run(_resolve(backend, q.device, q.dtype, q.shape[-1]), q, k, v)


def attention_backends(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, head_dim: int = 64
) -> tuple[str, ...]:
    """Return the names of the backends that can be used here, after trying each once on a few values.

    benchmarks/rate_pieces.py and the tests choose by it what to run. `dtype` None means bf16 on CUDA, else fp32.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return tuple(name for name in BACKENDS if _problem(name, device, dtype, head_dim) is None)


def describe_attention(backend: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """Return one line for the start of a run, as "attention: torch sdpa (cpu)".

    Raises ValueError as `attention` does.
    """
    device = torch.device(device)
    name = _resolve(backend, device, dtype, head_dim)
    label = _flash_attn()[0] if name == "flash_attn" else f"torch {name}"
    if name == "products":
        label = "torch sdpa, backward by products"
    elif backend == "auto" and _prefers_products(device, dtype):
        label += f", backward by products up to {PRODUCTS_TOKENS} tokens"
    return f"attention: {label} ({device.type})"


def _prefers_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether "auto" uses the backend "products" for short sequences."""
    return device.type == "cpu" and dtype == torch.bfloat16


@constant_result  # the choice depends on constants only
def _resolve(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Return the name of the backend that serves these inputs, or raise ValueError with the reason."""
    if backend == "auto":
        return "flash_attn" if _problem("flash_attn", device, dtype, head_dim) is None else "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose auto, {', '.join(BACKENDS)}")
    if problem := _problem(backend, device, dtype, head_dim):
        raise ValueError(f"attention backend {backend!r} cannot be used: {problem}")
    return backend


def _run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute attention of (B, N, H, d) tensors with the backend `name`."""
    if name == "flash_attn":
        out = _flash_attn()[1](q, k, v)
        return out[0] if isinstance(out, tuple) else out  # flash-attn 4 and early 3 return (out, log-sum-exp)
    if name == "products":
        return _Products.apply(q, k, v)
    if name == "sdpa":
        return _sdpa(q, k, v)
    with sdpa_kernel(_TORCH_KERNELS[name]):
        return _sdpa(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Call torch's scaled_dot_product_attention on (B, N, H, d) tensors."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class _Products(torch.autograd.Function):
    """Run sdpa forward, and recompute the (N, N) probabilities for five matrix products in the backward pass.

    Scores and softmax are fp32, and the probabilities are rounded to the inputs' dtype, so the gradient's error is that
    of sdpa's own backward pass. bf16 scores are up to 1.4 times as fast, but their rounding raises it by half.
    The products are the derivative of arXiv 1706.03762, equation 1. Scores and probabilities take up to
    8 * B * H * N^2 bytes of temporary memory.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return _sdpa(q, k, v)

    @staticmethod
    def backward(ctx, dout):
        # One copy of each head's (N, d) matrix, which the products below share.
        batch, tokens, heads, dim = dout.shape
        scale = dim**-0.5
        matrices = torch.stack([x.transpose(1, 2) for x in (*ctx.saved_tensors, dout)]).flatten(1, 2)
        q, k, v, dout = matrices.unbind()

        # Recompute the probabilities.
        exact_q, exact_k = matrices[:2].to(torch.promote_types(q.dtype, torch.float32)).unbind()
        probabilities = _scaled_product(exact_q, exact_k.mT, scale).softmax(-1).to(q.dtype)

        # Softmax's backward pass turns their gradient, dout v^T, into that of the scores.
        dscores = torch._softmax_backward_data(dout @ v.mT, probabilities, -1, q.dtype)
        gradients = (
            _scaled_product(dscores, k, scale),
            _scaled_product(dscores.mT, q, scale),
            probabilities.mT @ dout,
        )
        return tuple(x.view(batch, heads, tokens, dim).transpose(1, 2) for x in gradients)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * (a @ b) for (batch, rows, columns) tensors, scaled before the result is rounded."""
    unread = a.new_empty(1, 1, 1)  # beta=0 ignores it, NaNs included
    return torch.baddbmm(unread, a, b, beta=0, alpha=scale)


@lru_cache
def _flash_attn() -> tuple[str, Callable] | None:
    """Return (label, function) of the first flash-attn that imports: 3 (Hopper), 4 (Hopper and Blackwell), 2."""
    for label, module in (
        ("flash-attn 3", "flash_attn_interface"),
        ("flash-attn 4", "flash_attn.cute"),
        ("flash-attn 2", "flash_attn"),
    ):
        try:
            return label, importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):  # with flash-attn 4 alone, `flash_attn` is an empty namespace
            continue
    return None


@lru_cache
def _problem(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why backend `name` cannot be used, or None. A backend that no rule excludes is tried on a few values."""
    if name in ("sdpa", "products"):
        return None
    # Check known limits first: their messages are clearer than those of the libraries.
    if name in ("flash_attn", "cudnn", "efficient") and device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if name == "flash_attn":
        if _flash_attn() is None:
            return "the package flash-attn is not installed; pip install flash-attn"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"flash-attn takes float16 and bfloat16, not {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"flash-attn takes head dims that are multiples of 8 up to 256, not {head_dim}"
    # Try it. torch reports through warnings why a kernel of its own refuses.
    probe = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings(record=True) as reasons, torch.enable_grad():
        warnings.simplefilter("always")
        try:
            _run(name, probe, probe, probe)
        except Exception as error:  # each library raises its own type, and any means that the backend is unusable
            why = [str(error), *(str(reason.message) for reason in reasons)]
            return " ".join(part.split("\n")[0].split(" (Triggered")[0] for part in why)
    return None
