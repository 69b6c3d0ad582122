"""Choose the implementation of an operation: Triton on GPUs, C++ on CPUs where it exists, else the reference.

The environment variable `FASTDIT_KERNELS` (auto, triton, cpp or reference) states a preference for all operations. An
operation that lacks that implementation, or whose tensors are on another device, falls back to the reference. An
operation's `implementation` argument is strict: the call raises where that implementation cannot run.
"""

import os
from collections.abc import Callable

import torch

from ._native import load_native

CHOICES = ("auto", "triton", "cpp", "reference")


def constant_result(function: Callable) -> Callable:
    """Let torch.compile call a function once, while it traces, and keep the result.

    This is `torch.compiler.assume_constant_result` without its import of the compiler, which takes 1.5 s of each
    process's start.
    """
    function._dynamo_marked_constant = True
    return function


@constant_result  # the choice depends on constants only
def choose(
    device: torch.device,
    *,
    implementation: str | None = None,
    triton: bool = True,
    cpp: bool = False,
    auto_cpp: bool = True,
) -> str:
    """Return the implementation of a call on `device`: "triton", "cpp" or "reference".

    implementation: the operation's argument of that name; None reads FASTDIT_KERNELS.
    triton, cpp: whether these implementations support the call's arguments.
    auto_cpp: whether "auto" chooses C++ on CPUs. Set it to False where the reference is faster.

    Triton runs on CPU tensors only under TRITON_INTERPRET=1, and C++ only where it was built.
    Raises ValueError for an unknown choice, and for an `implementation` that cannot run here.
    """
    wish = implementation or os.environ.get("FASTDIT_KERNELS", "auto")
    if wish not in CHOICES:
        source = "implementation" if implementation else "FASTDIT_KERNELS"
        raise ValueError(f"{source}={wish!r} is unknown; choose one of {', '.join(CHOICES)}")
    # Name the implementation that is asked for.
    on_gpu = device.type == "cuda"
    found = wish
    if wish == "auto":
        found = "triton" if on_gpu else "cpp" if auto_cpp else "reference"
    # Use it if it can run, else raise or fall back.
    if found == "triton":
        usable = triton and (on_gpu or interpreting())
    else:
        usable = found == "reference" or (cpp and device.type == "cpu" and load_native("cpu")[0] is not None)
    if usable:
        return found
    if implementation and wish != "auto":
        raise ValueError(f"implementation={wish!r} cannot run on {device.type} here, or not with these arguments")
    return "reference"


def interpreting() -> bool:
    """Return whether Triton kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
