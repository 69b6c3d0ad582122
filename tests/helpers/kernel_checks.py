"""Make inputs and comparisons for tests of kernels. Import it first: without a GPU, Triton's interpreter runs them."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

IMPLEMENTATIONS = ("reference", "triton")
GUARD = 256


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal values, the same on every device, with NaNs in memory before and after them."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    memory = torch.full((values.numel() + 2 * GUARD,), float("nan"), device=DEVICE, dtype=dtype)
    out = memory[GUARD:-GUARD].view(shape)
    return out.copy_(values)


def assert_exact(got: torch.Tensor, exact: torch.Tensor, tolerance: float = 1e-5) -> None:
    """fp32 results against fp64 ones: no error above `tolerance` of the largest value."""
    assert got.shape == exact.shape
    assert got.isfinite().all()
    assert (got.double() - exact).abs().max() <= tolerance * exact.abs().max()


def assert_as_good_as(got: torch.Tensor, low: torch.Tensor, exact: torch.Tensor, atol: float = 1e-6) -> None:
    """Low-precision results: at most twice the error of torch's own in that precision."""
    assert got.dtype == low.dtype
    allowed = 2 * (low.double() - exact.double()).abs().max() + atol
    assert (got.double() - exact.double()).abs().max() <= allowed


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """`bytes`: of the largest tensor that any torch operation made while the mode was on."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out
