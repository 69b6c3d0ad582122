"""Unmasked multi-head attention over (B, N, H, d) tensors: one function, several backends.

flash_attn                      the flash-attn package (3, 4 or 2, the first that imports); CUDA, fp16 or bf16
sdpa                            torch's scaled_dot_product_attention, torch choosing the kernel; everywhere
cudnn, flash, efficient, math   that one of torch's kernels and no other
auto                            flash_attn where it is usable, else sdpa
"""

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .rotary import norm_rotate

_TORCH_KERNELS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ("flash_attn", "sdpa", *_TORCH_KERNELS)


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
    """softmax(q k^T / sqrt(d)) v for every head.

    q, k, v (B, N, H, d), equal shapes, dtypes and devices; views of a fused qkv are taken as they are.
    qk_norm, rope and rope_ids: as norm, rope and ids of `fastdit.kernels.norm_rotate`, done to q and k before.
    Returns (B, N, H, d) in their dtype. Raises ValueError for other shapes, and for a `backend` that cannot
    serve this device, dtype and head dim (the message says why).
    """
    if q.dim() != 4 or k.shape != q.shape or v.shape != q.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q, k, v must be (B, N, H, d) of one shape, got {shapes}")
    if qk_norm or rope is not None:
        q, k = norm_rotate(q, k, norm=qk_norm, rope=rope, ids=rope_ids)
    return _run(_resolve(backend, q.device, q.dtype, q.shape[-1]), q, k, v)


def attention_backends(
    device: torch.device | str = "cpu", dtype: torch.dtype | None = None, head_dim: int = 64
) -> tuple[str, ...]:
    """The backends usable here. `dtype` None: bf16 on CUDA, else fp32. Tries each once on a few values."""
    device = torch.device(device)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return tuple(name for name in BACKENDS if _problem(name, device, dtype, head_dim) is None)


def describe_attention(backend: str, device: torch.device | str, dtype: torch.dtype, head_dim: int) -> str:
    """'attention: torch sdpa (cpu)', for the start of a run. Raises ValueError as `attention` does."""
    device = torch.device(device)
    name = _resolve(backend, device, dtype, head_dim)
    label = _flash_attn()[0] if name == "flash_attn" else f"torch {name}"
    return f"attention: {label} ({device.type})"


# Decided once, while torch.compile traces: the choice depends on constants only.
@torch.compiler.assume_constant_result
def _resolve(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    if backend == "auto":
        return "flash_attn" if _problem("flash_attn", device, dtype, head_dim) is None else "sdpa"
    if backend not in BACKENDS:
        raise ValueError(f"attention backend {backend!r} is unknown; choose auto, {', '.join(BACKENDS)}")
    if problem := _problem(backend, device, dtype, head_dim):
        raise ValueError(f"attention backend {backend!r} cannot be used: {problem}")
    return backend


def _run(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    if name == "flash_attn":
        out = _flash_attn()[1](q, k, v)
        return out[0] if isinstance(out, tuple) else out  # flash-attn 4 and early 3 return (out, log-sum-exp)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if name == "sdpa":
        out = F.scaled_dot_product_attention(q, k, v)
    else:
        with sdpa_kernel(_TORCH_KERNELS[name]):
            out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


@lru_cache
def _flash_attn() -> tuple[str, Callable] | None:
    """(label, function) of the first flash-attn that imports: 3 (Hopper), 4 (Hopper and Blackwell), 2."""
    for label, module in (
        ("flash-attn 3", "flash_attn_interface"),
        ("flash-attn 4", "flash_attn.cute"),
        ("flash-attn 2", "flash_attn"),
    ):
        try:
            return label, importlib.import_module(module).flash_attn_func
        except (ImportError, AttributeError):  # flash-attn 4 alone leaves `flash_attn` an empty namespace
            continue
    return None


@lru_cache
def _problem(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why backend `name` cannot be used, or None. What the rules let pass is tried on a few values."""
    if name == "sdpa":
        return None
    if name in ("flash_attn", "cudnn", "efficient") and device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type}"
    if name == "flash_attn":
        if _flash_attn() is None:
            return "the package flash-attn is not installed; pip install flash-attn"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"flash-attn takes float16 and bfloat16, not {dtype}"
        if head_dim % 8 or head_dim > 256:
            return f"flash-attn takes head dims that are multiples of 8 up to 256, not {head_dim}"
    probe = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype, requires_grad=True)
    with warnings.catch_warnings(record=True) as reasons, torch.enable_grad():
        warnings.simplefilter("always")
        try:
            _run(name, probe, probe, probe)
        except Exception as error:  # each library has its own; all mean "not here"
            why = [str(error), *(str(reason.message) for reason in reasons)]
            return " ".join(part.split("\n")[0].split(" (Triggered")[0] for part in why)
    return None
