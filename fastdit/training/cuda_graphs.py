"""Run a network's passes as CUDA graphs: the host launches one graph instead of hundreds of kernels.

In a small network, launching the kernels takes longer than running them, and the GPU waits. A graph holds a whole
pass, captured once, on tensors that stay at their addresses. PyTorch's `make_graphed_callables` captures one graph of
the forward pass and one of the backward pass. Autograd sees a single node, whose gradients reach DeepSpeed's hooks as
usual.

    module(x, t, y)   copy x, t, y to the graph's input tensors; replay; return the graph's output tensors
    backward          copy the upstream gradients to the graph's input tensors; replay; return its weight gradients

A replay overwrites the outputs of the replay before. A network must therefore have run backward, and its gradients
must have been used, before it is called again. A step calls each network of `Denoising.graphed` once.
"""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastdit.errors import UserError
from fastdit.training.deepspeed_config import DeepSpeedConfig

AUTO_PARAMETERS = 200_000_000  # a step of DiT-B/2 at batch 256 gains 3 % from graphs on an H200, and of S/2 30 %


def check(settings: DeepSpeedConfig, device: torch.device) -> None:
    """Raise UserError if `settings` or `device` rule out CUDA graphs."""
    if device.type != "cuda":
        raise UserError("cuda_graphs: there is no GPU to record on; leave it out")
    if settings.stage == 3:
        raise UserError("cuda_graphs: ZeRO-3 gathers weights to other places each step; take zero1 or zero2")
    if settings.accumulation > 1:
        raise UserError(
            f"cuda_graphs: each of the {settings.accumulation} accumulated micro-batches would overwrite the gradients "
            "of the one before; take a micro_batch of the batch's whole share for a rank"
        )


def wanted(choice: bool | Literal["auto"], settings: DeepSpeedConfig, device: torch.device, parameters: int) -> bool:
    """Return whether to record graphs. auto does where `check` allows it, for up to AUTO_PARAMETERS parameters."""
    if choice == "auto":
        allowed = device.type == "cuda" and settings.stage < 3 and settings.accumulation == 1
        return allowed and parameters <= AUTO_PARAMETERS
    return choice


def record_all(parts: Iterable[tuple[nn.Module, tuple[Tensor, ...]]], required: bool) -> str:
    """Capture the passes of all `parts`, pairs of a module and samples. Return a description of the outcome.

    Where a capture fails, this part and those after it run without a graph. Raises UserError instead where graphs are
    `required` and memory is short: a graph keeps the memory of its passes to itself.
    """
    try:
        for part, samples in parts:
            record(part, samples)
    except RuntimeError as error:
        short = isinstance(error, torch.OutOfMemoryError) or isinstance(error.__context__, torch.OutOfMemoryError)
        if required and not short:
            raise
        if required:
            raise UserError(
                "cuda_graphs: not enough memory, since a graph keeps that of its passes to itself; take a smaller "
                "batch, or --cuda_graphs false"
            ) from None
        return f"no CUDA graphs ({'not enough memory' if short else str(error).splitlines()[0]})"
    return "CUDA graphs"


def record(module: nn.Module, samples: tuple[Tensor, ...]) -> None:
    """Capture the passes of `module`. Later calls with tensors like `samples` replay them; other calls run as before.

    The passes are captured on views of the weights, which are leaves of their own. DeepSpeed keeps the autograd nodes
    of the weights themselves, which belong to the default stream, and a capture must not touch that stream. A replay
    gets the weights as further inputs: they lie where the views lie, so nothing is copied, and they get the gradients.

    samples: tensors with the shapes, dtypes, device and `requires_grad` that the module gets in training. Their values
    are lost. The weights' values may change afterwards, but not their addresses.
    """
    eager, kinds = module.forward, [_kind(sample) for sample in samples]
    names, weights = zip(*module.named_parameters())
    views = tuple(weight.detach().requires_grad_(weight.requires_grad) for weight in weights)
    plain = _WithoutHooks(module, eager)

    def on_views(*inputs: Tensor):
        args, views = inputs[: len(samples)], inputs[len(samples) :]
        return functional_call(plain, {f"module.{name}": view for name, view in zip(names, views, strict=True)}, args)

    replay = torch.cuda.make_graphed_callables(on_views, (*samples, *views), allow_unused_input=True)
    trains = any(weight.requires_grad for weight in weights)

    def forward(*args: Tensor | None):
        tensors = tuple(arg for arg in args if arg is not None)
        captured = [_kind(tensor) for tensor in tensors] == kinds and torch.is_grad_enabled() == trains
        return replay(*tensors, *weights) if captured else eager(*args)

    module.forward = forward


def _kind(tensor: Tensor) -> tuple[torch.Size, bool]:
    """Return what must be equal in a call for a graph to be replayed."""
    return tensor.shape, tensor.requires_grad


class _WithoutHooks(nn.Module):
    """Call a module's forward method on its weights, without the hooks that DeepSpeed and others attached to it."""

    def __init__(self, module: nn.Module, forward: Callable) -> None:
        super().__init__()
        self.module, self.module_forward = module, forward

    def forward(self, *args: Tensor):
        return self.module_forward(*args)
