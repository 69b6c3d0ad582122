"""Flow matching on the straight path x_t = (1 - t) x0 + t eps; the network predicts the velocity eps - x0.

Lipman et al., "Flow Matching for Generative Modeling", 2023, with time running from data (0) to noise (1) as
in SiT (Ma et al. 2024, its linear path) and SD3 (Esser et al. 2024). The level is t, in (0, 1).
`fastdit.noise.process` documents each member; the samplers are in `sampling.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import UserError, check_ranges
from fastdit.kernels import AnyGenerator, DenoiseCoefficients, affine_denoise_loss, draw_normal, draw_uniform
from fastdit.noise.process import Weighting, check_weighting

LAWS = ("logit_normal", "uniform")


@dataclass(frozen=True)
class Flow:
    """Train at times that follow `law`: "logit_normal", logit t ~ N(mean, std^2) (SD3, section 3.1), or "uniform".

    Args:
        weighting: output is the squared error of the velocity. x0 is that error times t^2, the squared error of the x0
            prediction, which emphasizes high noise. The weights are not normalized, so the losses differ in scale.
    """

    law: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    weighting: Weighting = "output"

    name: ClassVar[str] = "flow"
    summary: ClassVar[str] = "linear flow matching"
    samplers: ClassVar[tuple[str, ...]] = ("heun", "euler")
    network_settings: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        check_ranges(self, "noise.flow.", {})
        if self.law not in LAWS:
            raise UserError(f"noise.flow.law: unknown law {self.law!r}; choose one of {', '.join(LAWS)}")
        if not self.std > 0:
            raise UserError(f"noise.flow.std: {self.std}; must be positive")
        check_weighting(self.name, self.weighting)

    @property
    def data_std(self) -> float:
        return 1.0

    def out_channels(self, channels: int) -> int:
        return channels

    def check_sampling_steps(self, steps: int) -> None:
        """Accept any number of steps."""

    def draw(self, n: int, *, generator: AnyGenerator, device: torch.device | str) -> Tensor:
        """Draw (n,) float32 times, clamped inside (0, 1) because float32 rounds a few of them to 0 or 1."""
        if self.law == "uniform":
            t = draw_uniform((n,), generator=generator, device=device)
        else:
            t = (self.mean + self.std * draw_normal((n,), generator=generator, device=device)).sigmoid()
        return t.clamp(2**-24, 1 - 2**-24)

    def add_noise(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        t = level[:, None, None, None]
        return (1 - t) * x0 + t * eps

    def network_input(self, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and 1000 t. The factor is ours: the network's sinusoidal features are made for that range."""
        return x_t, 1000 * level

    def loss(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean over the dimensions of (out - (eps - x0))^2 (Lipman Eq. 23 with sigma_min = 0), and x0_hat.

        Weighting "x0" multiplies it by t^2. This gives (x0_hat - x0)^2, since x0_hat - x0 = -t (out - (eps - x0)).
        """
        one = torch.ones_like(level)
        weight = one if self.weighting == "output" else level.square()
        coefficients = DenoiseCoefficients(
            target_x0=-one, target_eps=one, clean_x0=1 - level, clean_eps=level, clean_out=-level, weight=weight
        )
        return affine_denoise_loss(out, x0, eps, coefficients)

    def clean(self, out: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """Return x_t - t out, since x_t - t (eps - x0) = x0."""
        return x_t - level[:, None, None, None] * out.to(level.dtype)

    def noise_to_signal(self, level: Tensor) -> Tensor:
        return level / (1 - level)

    def level_at(self, noise_to_signal: float, n: int, device: torch.device | str) -> Tensor:
        """Return (n,) float32, each the time s / (1 + s) of the ratio s."""
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
        """Return (steps + 1,) float64 times, evenly spaced from 1 to 0."""
        return np.linspace(1.0, 0.0, steps + 1)
