"""EDM: additive noise of standard deviation sigma, with a preconditioned denoiser.

Karras, Aittala, Aila, Laine, "Elucidating the Design Space of Diffusion-Based Generative Models", 2022.
The level is sigma itself. `fastdit.noise.process` documents each member; the samplers are in `sampling.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import UserError, check_ranges
from fastdit.kernels import AnyGenerator, DenoiseCoefficients, affine_denoise_loss, draw_normal
from fastdit.noise.process import Weighting, check_weighting


@dataclass(frozen=True)
class EDM:
    """Train at ln sigma ~ N(p_mean, p_std^2), and sample from sigma_max to sigma_min, spaced by rho, then 0.

    sigma_data is the standard deviation of the data, in the data's units.

    Args:
        weighting: output weights the squared error of the x0 prediction by 1 / c_out^2, as Karras et al. do, so that
            every level weighs the same at the network's output. x0 weights it by 1, which emphasizes high noise. The
            weights are not normalized, so the losses differ in scale.
    """

    p_mean: float = -1.2
    p_std: float = 1.2
    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    weighting: Weighting = "output"

    name: ClassVar[str] = "edm"
    summary: ClassVar[str] = "Karras et al. 2022"
    samplers: ClassVar[tuple[str, ...]] = ("heun", "euler")
    network_settings: ClassVar[tuple[str, ...]] = ("sigma_data",)
    spare_outputs: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self, "noise.edm.", {})
        if not 0 < self.sigma_min < self.sigma_max:
            raise UserError(
                f"noise.edm.sigma_min, noise.edm.sigma_max: {self.sigma_min} and {self.sigma_max}; need 0 < min < max"
            )
        for field in ("p_std", "sigma_data", "rho"):
            if not getattr(self, field) > 0:
                raise UserError(f"noise.edm.{field}: {getattr(self, field)}; must be positive")
        check_weighting(self.name, self.weighting)

    @property
    def data_std(self) -> float:
        return self.sigma_data

    def out_channels(self, channels: int) -> int:
        return channels

    def check_sampling_steps(self, steps: int) -> None:
        """Accept any number of steps."""

    def draw(self, n: int, *, generator: AnyGenerator, device: torch.device | str) -> Tensor:
        """Draw (n,) float32 sigmas from a log-normal law (Table 1, "Noise distribution")."""
        return (self.p_mean + self.p_std * draw_normal((n,), generator=generator, device=device)).exp()

    def add_noise(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        return x0 + level[:, None, None, None] * eps

    def network_input(self, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return c_in x_t and c_noise = ln(sigma) / 4 (Table 1)."""
        c_in = (level.square() + self.sigma_data**2).rsqrt()
        return c_in[:, None, None, None] * x_t, level.log() / 4

    def loss(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean over the dimensions of lambda(sigma) (D - x0)^2 for each sample, and D (Eq. 2).

        Weighting "output" has lambda = 1 / c_out^2 (Table 1), "x0" has lambda = 1. Both are computed from the error of
        the network's raw output (Eq. 8), where the weights are 1 and c_out^2. The target of that output,
        (x0 - c_skip x_t) / c_out, is expanded in x0 and eps, because the quotient subtracts close numbers at small
        sigma.
        """
        sd, inv_total = self.sigma_data, (level.square() + self.sigma_data**2).rsqrt()
        c_skip, c_out = (sd * inv_total).square(), level * sd * inv_total
        coefficients = DenoiseCoefficients(
            target_x0=level / sd * inv_total,
            target_eps=-sd * inv_total,
            clean_x0=c_skip,
            clean_eps=c_skip * level,
            clean_out=c_out,
            weight=torch.ones_like(level) if self.weighting == "output" else c_out.square(),
        )
        return affine_denoise_loss(out, x0, eps, coefficients)

    def clean(self, out: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """Return the denoiser's D = c_skip x_t + c_out out (Eq. 7, Table 1)."""
        sigma, sd = level[:, None, None, None], self.sigma_data
        total = sigma.square() + sd**2
        return sd**2 / total * x_t + sigma * sd * total.rsqrt() * out.to(level.dtype)

    def noise_to_signal(self, level: Tensor) -> Tensor:
        return level

    def level_at(self, noise_to_signal: float, n: int, device: torch.device | str) -> Tensor:
        """Return (n,) float32, each sigma = noise_to_signal."""
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
        """Return (steps + 1,) float64 sigmas from sigma_max to sigma_min, then 0 (Eq. 5)."""
        ramp = np.linspace(self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho), steps)
        return np.append(ramp**self.rho, 0.0)
