"""The plain method: a noisy sample in, a denoising loss out (methods common to all diffusion transformers).

x0 --add_noise--> x_t --network(x_t, level, y)--> out --loss--> scalar
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Network = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


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

    def loss(
        self, network: Network, x0: torch.Tensor, y: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Scalar loss (float32, mean over the batch) and its named parts, detached.

        x0 (B, C, H, W) float32, y (B,) int64, both on the generator's device. No host sync.
        """
        level = self.noise.draw(len(x0), generator=generator, device=x0.device)
        eps = torch.randn(x0.shape, generator=generator, device=x0.device)
        net_in, net_t = self.noise.network_input(self.noise.add_noise(x0, eps, level), level)
        out = network(net_in, net_t, self.drop_labels(y, generator))
        per_sample, _ = self.noise.loss(out, x0, eps, level)
        loss = per_sample.mean()
        return loss, {"loss": loss.detach()}

    def drop_labels(self, y: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """y with each label replaced by the null label with probability `label_drop`."""
        dropped = torch.rand(y.shape, generator=generator, device=y.device) < self.label_drop
        return torch.where(dropped, self.classes, y)
