"""Register custom operators without dispatcher cost where nothing traces them. Every kernel is registered here.

`@operator("fastdit::NAME")` decorates the function that runs; its annotations give the operator's schema.
`NAME.register_fake` gives the results' shapes to torch.compile and fake tensors, and `NAME.register_autograd` gives
the backward pass.
"""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """Call a `torch.library.custom_op` where something observes operators, else the plain function.

    Autograd, torch.compile, fake tensors and dispatch modes observe operators and need the dispatcher. A backward pass
    that runs eagerly, or a call without gradients, has none of them. There the plain function saves the dispatcher's
    10 us a call (2-core AMD EPYC, torch 2.13), as much as a kernel launch; a block has six calls a step on a GPU.

    Attributes: `op`, the custom operator; `function`, the plain function; `register_fake` and `register_autograd`,
    those of `op`.
    """

    def __init__(self, name: str, function: Callable):
        self.function = function
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake, self.register_autograd = self.op.register_fake, self.op.register_autograd

    def __call__(self, *args):
        return self.op(*args) if _watched(args) else self.function(*args)


def operator(name: str) -> Callable[[Callable], Operator]:
    """Return a decorator like `torch.library.custom_op(name, mutates_args=())` that makes an `Operator`.

    The function takes positional arguments only, changes none of them and returns new tensors, as custom operators
    must. An empty tensor stands for an absent result, because an operator cannot return None.
    """
    return lambda function: Operator(name, function)


def _watched(args: tuple) -> bool:
    """Return whether a tracer, autograd or a tensor subclass has to see this call."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or is_in_torch_dispatch_mode():
        return True
    return not set(map(type, args)) <= _PLAIN  # a tensor subclass may override operators


_PLAIN = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str}
