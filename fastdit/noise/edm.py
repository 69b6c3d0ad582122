"""EDM: additive noise of standard deviation sigma, with a preconditioned denoiser.

Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", 2022.
The level is sigma itself. `fastdit.noise` says what each member is; its samplers are in `sampling.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import UserError
from fastdit.kernels import DenoiseCoefficients, affine_denoise_loss


@dataclass(frozen=True)
class EDM:
    """Training levels: ln sigma ~ N(p_mean, p_std^2). Sampling: sigma_max to sigma_min, bent by rho, then 0.

    sigma_data is the standard deviation of the data, in the data's units.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    name: ClassVar[str] = "edm"
    samplers: ClassVar[tuple[str, ...]] = ("heun", "euler")

    def __post_init__(self):
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"noise.edm.sigma_min, noise.edm.sigma_max: {self.sigma_min} and {self.sigma_max}; need 0 < min < max"
            )
        for field in ("p_std", "sigma_data", "rho"):
            if not getattr(self, field) > 0:
                raise UserError(f"noise.edm.{field}: {getattr(self, field)}; must be positive")

    def out_channels(self, channels: int) -> int:
        return channels

    def draw(self, n: int, *, generator: torch.Generator | None, device: torch.device | str) -> Tensor:
        """(n,) float32 sigmas, log-normal (Table 1, "Noise distribution")."""
        return (self.p_mean + self.p_std * torch.randn(n, generator=generator, device=device)).exp()

    def add_noise(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        return x0 + level[:, None, None, None] * eps

    def network_input(self, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """c_in x_t and c_noise = ln(sigma) / 4 (Table 1)."""
        c_in = (level.square() + self.sigma_data**2).rsqrt()
        return c_in[:, None, None, None] * x_t, level.log() / 4

    def loss(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over the dimensions of lambda(sigma) (D - x0)^2, lambda = 1 / c_out^2 (Eq. 2 and Table 1).

        Taken at the network's own output (Eq. 8), where it is 1. Its target, (x0 - c_skip x_t) / c_out,
        is written out in x0 and eps, because as it stands it subtracts close numbers at small sigma.
        """
        sd, inv_total = self.sigma_data, (level.square() + self.sigma_data**2).rsqrt()
        c_skip, c_out = (sd * inv_total).square(), level * sd * inv_total
        coefficients = DenoiseCoefficients(
            target_x0=level / sd * inv_total,
            target_eps=-sd * inv_total,
            clean_x0=c_skip,
            clean_eps=c_skip * level,
            clean_out=c_out,
            weight=torch.ones_like(level),
        )
        return affine_denoise_loss(out, x0, eps, coefficients)

    def clean(self, out: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """The denoiser D = c_skip x_t + c_out out (Eq. 7, Table 1)."""
        sigma, sd = level[:, None, None, None], self.sigma_data
        total = sigma.square() + sd**2
        return sd**2 / total * x_t + sigma * sd * total.rsqrt() * out.to(level.dtype)

    def noise_to_signal(self, level: Tensor) -> Tensor:
        return level

    def level_at(self, noise_to_signal: float, n: int, device: torch.device | str) -> Tensor:
        """(n,) float32, that sigma."""
        if not 0 < noise_to_signal < math.inf:
            raise ValueError(f"noise_to_signal={noise_to_signal}; must be positive and finite")
        return torch.full((n,), noise_to_signal, dtype=torch.float32, device=device)

    def at_quantile(self, share: Tensor) -> Tensor:
        """Return the sigma below which `share` of the training sigmas lie."""
        return (self.p_mean + self.p_std * torch.special.ndtri(share)).exp()

    def quantile_of(self, level: Tensor) -> Tensor:
        """Return the share of the training sigmas below `level`."""
        return torch.special.ndtr((level.log() - self.p_mean) / self.p_std)

    def ode_levels(self, steps: int) -> np.ndarray:
        """(steps + 1,) float64 sigmas from sigma_max to sigma_min, then 0 (Eq. 5)."""
        ramp = np.linspace(self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho), steps)
        return np.append(ramp**self.rho, 0.0)
