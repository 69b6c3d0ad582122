"""fastdit/train.py with CUDA graphs where there is no GPU: a program of tests/training/test_graphs.py.

A stand-in for `torch.cuda.make_graphed_callables` computes anew what a graph would replay, but like a graph it reads
and writes tensors that stay where they are, and a pass spoils what the one before it wrote. Ends with how often it
replayed.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdit import train
from fastdit.training import cuda_graphs

replays = {"forward": 0, "backward": 0}


def stand_in(passes: Callable, samples: tuple[Tensor, ...], allow_unused_input: bool = False):
    """Return a function of tensors like `samples`, which plays the graphs of `passes`."""
    assert allow_unused_input
    learning = [tensor for tensor in samples if tensor.requires_grad]
    # DeepSpeed keeps autograd nodes of the weights themselves, and a capture must not touch these nodes' stream.
    assert not any(isinstance(tensor, nn.Parameter) for tensor in learning)
    outputs, spec = tree_flatten(passes(*samples))
    outputs = [tensor.detach().clone() for tensor in outputs]
    gradients = [torch.empty_like(tensor) for tensor in learning]
    computed = []

    class Graphed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            replays["forward"] += 1
            for static, value in zip(samples, inputs, strict=True):
                assert static.shape == value.shape
                moved = static.data_ptr() != value.data_ptr()
                assert not (moved and isinstance(value, nn.Parameter)), "a weight moved"
                if moved:
                    static.copy_(value)
            for gradient in gradients:
                gradient.fill_(torch.nan)  # memory of the backward pass may be memory of the forward pass
            with torch.enable_grad():
                computed[:] = tree_flatten(passes(*samples))[0]
            for static, value in zip(outputs, computed):
                static.copy_(value)
            return tuple(tensor.detach() for tensor in outputs)

        @staticmethod
        def backward(ctx, *upstream):
            replays["backward"] += 1
            pairs = [(value, up) for value, up in zip(computed, upstream) if value.requires_grad]
            values, ups = zip(*pairs)
            found = iter(torch.autograd.grad(values, learning, ups, allow_unused=True))
            static, back = iter(gradients), []
            for tensor in samples:
                if not tensor.requires_grad:
                    back.append(None)
                    continue
                place, gradient = next(static), next(found)
                back.append(None if gradient is None else place.copy_(gradient).detach())
            return tuple(back)

    return lambda *args: tree_unflatten(Graphed.apply(*args), spec)


def main(argv: list[str]) -> None:
    torch.cuda.make_graphed_callables = stand_in
    cuda_graphs.check = lambda plan, device: None
    try:
        train.main(argv)
    finally:
        print(f"replayed: {replays['forward']} forward, {replays['backward']} backward")


if __name__ == "__main__":
    main(sys.argv[1:])
