"""Copy from the host to a device without letting the host wait."""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Return `values`, a numpy array or a tensor of the host, on `device`; the host does not wait for the copy.

    The result has the shape and dtype of `values`. On the CPU it may share memory with `values`.
    """
    host = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda":
        return host.to(device)
    # A copy from pageable memory stalls the host in spite of `non_blocking`, and torch's watch for synchronizing calls
    # does not see it. The pinned copy may be dropped at once: a non-blocking copy records an event on its block of
    # memory (at::native::copy_kernel_cuda, aten/src/ATen/native/cuda/Copy.cu), and torch's caching host allocator
    # hands the block out again only after that event.
    if not host.is_pinned():
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
