"""Define the base class of methods that add to another method, such as SADM and psi_align."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastdit.kernels import AnyGenerator
from fastdit.methods.denoising import Denoising, Network, Outcome


class Wrapper(Denoising):
    """Pass every call on to another method, `base`. A subclass overrides what it adds to, and calls `super()`.

    Args:
        base: the method that computes outcomes, which may be a wrapper itself.
    """

    def __init__(self, base: Denoising) -> None:
        super().__init__(base.noise, base.classes, base.label_drop)
        self.base = base

    def base_module(self, module: nn.Module) -> nn.Module:
        """Return the part of the trained module that the base trains."""
        return module

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: AnyGenerator) -> Outcome:
        """Return the base's outcome."""
        return self.base.loss(network, x0, y, generator)

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int, say: Callable[[str], None]) -> None:
        """Prepare the base."""
        self.base.prepare(batches, steps, say)

    def preparation_batches(self, steps: int) -> int:
        """Return the number of batches on which the base prepares itself."""
        return self.base.preparation_batches(steps)

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        """Begin the base's step, and return the decays of its EMAs."""
        return self.base.begin_step(step, steps)

    def end_step(self) -> dict[str, Tensor]:
        """End the base's step, and return its health signals."""
        return self.base.end_step()

    def sampled_network(self, module: nn.Module) -> nn.Module:
        """Return the network that the base samples."""
        return self.base.sampled_network(self.base_module(module))

    def ema_replicas(self, module: nn.Module) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """Return the replicas of the base's EMAs."""
        return self.base.ema_replicas(self.base_module(module))

    def graphed(self, module: nn.Module, batch: int) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        """Return the networks that the base calls, with tensors like their inputs."""
        return self.base.graphed(self.base_module(module), batch)

    def flops(self, module: nn.Module) -> dict[str, float]:
        """Return the FLOPs of the base's parts."""
        return self.base.flops(self.base_module(module))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the base."""
        self.base.to(device, dtype)

    def state_dict(self) -> dict:
        """Return the base's state under its name."""
        return {"base": self.base.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Load the base's state."""
        self.base.load_state_dict(state["base"])
