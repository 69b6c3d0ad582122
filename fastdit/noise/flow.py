"""Flow matching on the straight path x_t = (1 - t) x0 + t eps; the network predicts the velocity eps - x0.

Lipman et al., "Flow Matching for Generative Modeling", 2023, with time running from data (0) to noise (1) as
in SiT (Ma et al. 2024, its linear path) and SD3 (Esser et al. 2024). The level is t, in (0, 1).
`fastdit.noise` says what each member is; the samplers are in `sampling.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import UserError
from fastdit.kernels import DenoiseCoefficients, affine_denoise_loss

LAWS = ("logit_normal", "uniform")


@dataclass(frozen=True)
class Flow:
    """Training times by `law`: "logit_normal", logit t ~ N(mean, std^2) (SD3, section 3.1), or "uniform"."""

    law: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    name: ClassVar[str] = "flow"
    samplers: ClassVar[tuple[str, ...]] = ("heun", "euler")

    def __post_init__(self):
        if self.law not in LAWS:
            raise UserError(f"noise.flow.law: unknown law {self.law!r}; choose one of {', '.join(LAWS)}")
        if not self.std > 0:
            raise UserError(f"noise.flow.std: {self.std}; must be positive")

    def out_channels(self, channels: int) -> int:
        return channels

    def draw(self, n: int, *, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """(n,) float32 times, kept off 0 and 1, where float32 would round a few of them to."""
        if self.law == "uniform":
            t = torch.rand(n, generator=generator, device=device)
        else:
            t = (self.mean + self.std * torch.randn(n, generator=generator, device=device)).sigmoid()
        return t.clamp(2**-24, 1 - 2**-24)

    def add_noise(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        t = level[:, None, None, None]
        return (1 - t) * x0 + t * eps

    def network_input(self, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """x_t and 1000 t: ours, so that the network's sinusoidal features see the range they are made for."""
        return x_t, 1000 * level

    def loss(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the dimensions of (out - (eps - x0))^2 (Lipman Eq. 23 with sigma_min = 0)."""
        one = torch.ones_like(level)
        coefficients = DenoiseCoefficients(
            target_x0=-one, target_eps=one, clean_x0=1 - level, clean_eps=level, clean_out=-level, weight=one
        )
        return affine_denoise_loss(out, x0, eps, coefficients)

    def clean(self, out: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """x_t - t out, since x_t - t (eps - x0) = x0."""
        return x_t - level[:, None, None, None] * out.to(level.dtype)

    def noise_to_signal(self, level: Tensor) -> Tensor:
        return level / (1 - level)

    def level_at(self, noise_to_signal: float, n: int, device: torch.device | str) -> Tensor:
        """(n,) float32 times s / (1 + s)."""
        if not 0 < noise_to_signal < math.inf:
            raise ValueError(f"noise_to_signal={noise_to_signal}; must be positive and finite")
        time = noise_to_signal / (1 + noise_to_signal)
        return torch.full((n,), time, dtype=torch.float32, device=device)

    def at_quantile(self, share: Tensor) -> Tensor:
        """Return the time below which `share` of the training times lie."""
        if self.law == "logit_normal":
            share = (self.mean + self.std * torch.special.ndtri(share)).sigmoid()
        return share.clamp(2**-24, 1 - 2**-24)

    def quantile_of(self, level: Tensor) -> Tensor:
        """Return the share of the training times below `level`."""
        return level if self.law == "uniform" else torch.special.ndtr((level.logit() - self.mean) / self.std)

    def ode_levels(self, steps: int) -> np.ndarray:
        """(steps + 1,) float64 times, evenly from 1 to 0."""
        return np.linspace(1.0, 0.0, steps + 1)
