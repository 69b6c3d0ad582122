"""Passes of a network as CUDA graphs: the host launches one where it launched hundreds of kernels.

Where a network is small, its kernels take the GPU less than their launches the host: it waits. A graph holds a whole
pass, recorded once, on tensors that stay where they are. PyTorch's `make_graphed_callables` makes one of the forward
and one of the backward pass; autograd meets a single node, whose gradients reach DeepSpeed's hooks as always.

    module(x, t, y)   copy x, t, y to where the graph reads; replay; the results lie where the graph writes
    backward          copy the upstream gradients to where it reads; replay; so do the gradients of all weights

A pass overwrites what the one before wrote: a network must have run backward, and its gradients must have been used,
before it is called again. A step calls each of `Denoising.graphed`'s networks once, so that holds.
"""

import torch
from torch import Tensor, nn

from fastdit.errors import UserError
from fastdit.training.deepspeed_config import DeepSpeedConfig


def check(settings: DeepSpeedConfig, device: torch.device) -> None:
    """Raises UserError where graphs cannot serve."""
    if device.type != "cuda":
        raise UserError("cuda_graphs: there is no GPU to record on; leave it out, or train with --device cuda")
    if settings.stage == 3:
        raise UserError("cuda_graphs: ZeRO-3 gathers weights to other places each step; take zero1 or zero2")
    if settings.accumulation > 1:
        raise UserError(
            f"cuda_graphs: each of the {settings.accumulation} accumulated micro-batches would overwrite the gradients "
            "of the one before; take a micro_batch of the batch's whole share for a rank"
        )


def record(module: nn.Module, samples: tuple[Tensor, ...]) -> None:
    """From here on, a call of `module` with tensors like `samples` replays graphs; any other call runs as before.

    samples: like the tensors that the module will get in training: shapes, dtypes, device, and which of them ask for
    gradients. Their values are lost. Weights may change, but not move.
    """
    eager, kinds = module.forward, [_kind(sample) for sample in samples]
    replay = torch.cuda.make_graphed_callables(_Bare(module, eager), samples, allow_unused_input=True)
    learns = any(p.requires_grad for p in module.parameters())

    def forward(*args: Tensor | None):
        tensors = tuple(arg for arg in args if arg is not None)
        recorded = [_kind(tensor) for tensor in tensors] == kinds and torch.is_grad_enabled() == learns
        return replay(*tensors) if recorded else eager(*args)

    module.forward = forward


def _kind(tensor: Tensor) -> tuple[torch.Size, bool]:
    return tensor.shape, tensor.requires_grad


class _Bare(nn.Module):
    """A module's own forward and weights, without the hooks that DeepSpeed and others hung on it."""

    def __init__(self, module: nn.Module, forward) -> None:
        super().__init__()
        self.module, self.own = module, forward

    def forward(self, *args: Tensor):
        return self.own(*args)
