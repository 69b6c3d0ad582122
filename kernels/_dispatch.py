"""Which implementation of an operation runs: Triton on GPUs, C++ on CPUs where there is one, else the reference.

`FASTDIT_KERNELS` (auto, triton, cpp or reference) or an operation's `implementation` argument force a choice. The
variable is a wish for all operations: one that lacks the implementation, or a tensor elsewhere, takes the reference.
The argument is an order for one call: what cannot be had raises.
"""

import os

import torch

from ._native import load_native

CHOICES = ("auto", "triton", "cpp", "reference")


# Decided once, while torch.compile traces: the choice depends on constants only.
@torch.compiler.assume_constant_result
def choose(
    device: torch.device,
    *,
    implementation: str | None = None,
    triton: bool = True,
    cpp: bool = False,
    auto_cpp: bool = True,
) -> str:
    """What takes this call on `device`: "triton", "cpp" or "reference". `triton`, `cpp`: whether those could.

    auto_cpp: whether C++ is taken without being asked for.
    Triton runs on CPU tensors only under TRITON_INTERPRET=1, and C++ where it was built.
    Raises ValueError for an unknown choice, and for an `implementation` that cannot run here.
    """
    wish = implementation or os.environ.get("FASTDIT_KERNELS", "auto")
    if wish not in CHOICES:
        source = "implementation" if implementation else "FASTDIT_KERNELS"
        raise ValueError(f"{source}={wish!r} is unknown; choose one of {', '.join(CHOICES)}")
    on_gpu = device.type == "cuda"
    found = wish
    if wish == "auto":
        found = "triton" if on_gpu else "cpp" if auto_cpp else "reference"
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
    """Whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"
