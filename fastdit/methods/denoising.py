"""The plain method: a noisy sample in, a denoising loss out (methods common to all diffusion transformers).

x0 --add_noise--> x_t --network(x_t, level, y)--> out --loss--> scalar

`Denoising` is also what every method is to the training loop: others override its members.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastdit.models import flops_per_image

Network = Callable[..., Tensor]


class Outcome(NamedTuple):
    """Of one micro-batch."""

    loss: Tensor  # () float32, what is differentiated
    terms: dict[str, Tensor]  # its named parts and health signals, () float32, detached; the same names every time
    x0_hat: Tensor  # (B, C, H, W) float32, the one-step clean estimate, with its gradient
    level: Tensor  # (B,) the noise level it was made at


@dataclass
class Denoising:
    """Loss of a class-conditional denoiser under one noise process.

    Args:
        noise: a process of `fastdit.noise`.
        classes: number of classes; label `classes` is the null label.
        label_drop: share of samples trained with the null label (Ho and Salimans 2022, algorithm 1).
    """

    noise: object
    classes: int
    label_drop: float

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: torch.Generator) -> Outcome:
        """x0 (B, C, H, W) float32, y (B,) int64, both on the generator's device. No host sync."""
        level, eps, y = self.draw(x0, y, generator)
        net_in, net_t = self.noise.network_input(self.noise.add_noise(x0, eps, level), level)
        return self.judge(network(net_in, net_t, y), x0, eps, level)

    def draw(self, x0: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A step's noise levels (B,), noise of x0's shape, and labels of which some are dropped."""
        level = self.noise.draw(len(x0), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        return level, eps, self.drop_labels(y, generator)

    def judge(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Outcome:
        """The denoising loss, a mean over the batch, of the network's output."""
        per_sample, x0_hat = self.noise.loss(out, x0, eps, level)
        loss = per_sample.mean()
        return Outcome(loss, {"loss": loss.detach()}, x0_hat, level)

    def drop_labels(self, y: Tensor, generator: torch.Generator) -> Tensor:
        """y with each label replaced by the null label with probability `label_drop`."""
        dropped = torch.rand(y.shape, generator=generator, device=y.device) < self.label_drop
        return torch.where(dropped, self.classes, y)

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        """Set what changes from step to step; `step` (0-based) of `steps` comes next.

        Returns the decays of the averages of all weights that the optimizer shall keep beside the sampled one, by name.
        """
        return {}

    def end_step(self) -> dict[str, Tensor]:
        """After the optimizer's update, on every rank: health signals of the whole step, as in `Outcome.terms`."""
        return {}

    def sampled_network(self, module: nn.Module) -> nn.Module:
        """The part of the trained module that draws samples."""
        return module

    def followers(self, module: nn.Module) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """By average: tensors that must equal it after each update, and the parameters they follow."""
        return {}

    def graphed(self, module: nn.Module, batch: int) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        """Networks that each micro-batch of `batch` samples calls once, and tensors like those they are called with."""
        return [(module, image_inputs(module, batch))]

    def flops(self, module: nn.Module) -> dict[str, float]:
        """FLOPs of all matrix products for one image and step, forward and backward, by part."""
        return {"network": flops_per_image(module)}

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move what the method itself holds; networks of its own get `dtype`."""

    def state_dict(self) -> dict:
        """What a resumed run must go on from, the same on all ranks."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Take a `state_dict`, whose tensors may be on another device."""


def image_inputs(network: nn.Module, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like the x, t and y that a network of `fastdit.models` is called with, on its device."""
    device = next(network.parameters()).device
    x = torch.zeros(batch, network.channels, *network.input_size, device=device)
    return x, torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
