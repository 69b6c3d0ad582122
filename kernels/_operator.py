"""Operators as PyTorch's tracers want them, and as fast as a plain function where no tracer looks."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """A `torch.library.custom_op` that steps aside where it has nothing to do.

    The dispatcher costs the host 10 us a call (2-core AMD EPYC, torch 2.13), as much as the launch of a kernel, and a
    block has six calls a step on a GPU. It is needed by what watches operators: autograd, torch.compile, fake tensors,
    dispatch modes. An `autograd.Function` that runs eagerly has none of them, and gets the plain function.
    """

    def __init__(self, name: str, function: Callable):
        self.function = function
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake, self.register_autograd = self.op.register_fake, self.op.register_autograd

    def __call__(self, *args):
        return self.op(*args) if _watched(args) else self.function(*args)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Decorates the function that an operator runs; as that of `torch.library.custom_op`, of mutates_args=()."""
    return lambda function: Operator(name, function)


def _watched(args: tuple) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return True
    return not set(map(type, args)) <= _PLAIN  # else some tensor's type has operators of its own


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str}
