"""Register custom operators without dispatcher cost where nothing traces them. Every kernel is registered here.

`@operator("fastdit::NAME")` decorates the function that runs; its annotations give the operator's schema.
`NAME.register_fake` gives the results' shapes to torch.compile and fake tensors, and `NAME.register_autograd` gives
the backward pass.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


class Operator:
    """Call an operator of `torch.library` where something observes operators, else the plain function.

    Autograd, torch.compile, fake tensors and dispatch modes observe operators and need the dispatcher. A backward pass
    that runs eagerly, or a call without gradients, has none of them. There the plain function saves the dispatcher's
    10 us a call (2-core AMD EPYC, torch 2.13), as much as a kernel launch; a block has six calls a step on a GPU.

    `torch.library.custom_op` would do the same in fewer lines, but its first call imports torch's compiler, which takes
    2 s of a process's time on the same machine.

    Attributes: `op`, the operator; `function`, the plain function.
    """

    def __init__(self, name: str, function: Callable):
        self.name, self.function = name, function
        torch.library.define(
            name, torch.library.infer_schema(function, mutates_args=()), tags=torch.Tag.pt2_compliant_tag
        )
        torch.library.impl(name, "default", _untraced(function))
        namespace, _, short = name.partition("::")
        self.op = getattr(getattr(torch.ops, namespace), short).default
        self._backward, self._save = self._refuse, None
        torch.library.register_autograd(name, self._differentiate, setup_context=self._keep)

    def register_fake(self, function: Callable) -> Callable:
        """Register the function that returns empty results, and return it."""
        return torch.library.register_fake(self.name, function)

    def register_autograd(self, backward: Callable, *, setup_context: Callable | None = None) -> None:
        """Register the backward pass, as `torch.library.register_autograd` does. Without one, it raises an error."""
        self._backward, self._save = backward, setup_context

    def _differentiate(self, ctx, *grads):
        return self._backward(ctx, *grads)

    def _keep(self, ctx, inputs, output) -> None:
        if self._save is not None:
            self._save(ctx, inputs, output)

    def _refuse(self, ctx, *grads):
        """Raise RuntimeError. Else torch would leave this part of a gradient out, with a warning."""
        raise RuntimeError(f"{self.name} has no backward pass")

    def __call__(self, *args):
        return self.op(*args) if _watched(args) else self.function(*args)


def _untraced(function: Callable) -> Callable:
    """Return a function that torch's compiler, if it is at work, does not look into when a compiled graph calls it."""
    disabled = None

    @functools.wraps(function)
    def call(*args):
        nonlocal disabled
        if "torch._dynamo" not in sys.modules:
            return function(*args)
        disabled = disabled or torch.compiler.disable(function)
        return disabled(*args)

    return call


def operator(name: str) -> Callable[[Callable], Operator]:
    """Return a decorator that makes an `Operator`, named `namespace::name`.

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
