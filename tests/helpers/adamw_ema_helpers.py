"""Tensors for the tests of AdamW with EMAs."""

import math

import torch


def tensors(device, *shape, seed=0, count=1, misalign=0):
    """`count` normal tensors; `misalign` floats off the 16-byte grid."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(count):
        numel = math.prod(shape)
        base = torch.zeros(numel + misalign, device=device)
        out.append(base[misalign:].view(shape).copy_(torch.randn(shape, generator=generator)))
    return out
