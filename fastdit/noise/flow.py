"""Flow matching on the straight path x_t = (1 - t) x0 + t eps; the network predicts the velocity dx/dt = eps - x0.

Lipman et al., "Flow Matching for Generative Modeling", 2023, with time running from data (0) to noise (1) as
in the papers of SiT (Ma et al. 2024, its linear path) and SD3 (Esser et al. 2024). The level is t, in (0, 1).
Other trainers give their networks the time in other units, or let it run from noise to data, which turns the sign of
the velocity: see `CONVENTIONS`. `fastdit.noise.process` documents each member; the samplers are in `sampling.py`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import UserError, check_ranges
from fastdit.kernels import AnyGenerator, DenoiseCoefficients, affine_denoise_loss, draw_normal, draw_uniform
from fastdit.noise.process import Weighting, check_weighting

LAWS = ("logit_normal", "uniform")


class Convention(NamedTuple):
    """Hold a network's view of the path: its time input is offset + scale t, and it predicts sign (eps - x0).

    spare_outputs: whether files of such weights may have twice the outputs, of which the second half is not used.
    """

    offset: float
    scale: float
    sign: float
    spare_outputs: bool = False


CONVENTIONS = {
    "own": Convention(0, 1000, 1),  # the factor is ours: the network's sinusoidal features are made for that range
    "sit": Convention(1, -1, -1, spare_outputs=True),  # github.com/willisma/SiT, transport/path.py: ICPlan, learn_sigma
    "repa": Convention(0, 1, 1),  # github.com/sihyun-yu/REPA, loss.py: SILoss
}


@dataclass(frozen=True)
class Flow:
    """Train at times that follow `law`: "logit_normal", logit t ~ N(mean, std^2) (SD3, section 3.1), or "uniform".

    Args:
        weighting: output is the squared error of the velocity. x0 is that error times t^2, the squared error of the x0
            prediction, which emphasizes high noise. The weights are not normalized, so the losses differ in scale.
        convention: what the network is told and asked: own, time 1000 t and the velocity eps - x0; sit, as SiT's
            weights have it, time 1 - t and x0 - eps; repa, as REPA's have it, time t and eps - x0. It belongs to the
            weights.
    """

    law: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    weighting: Weighting = "output"
    convention: Literal["own", "sit", "repa"] = "own"

    name: ClassVar[str] = "flow"
    summary: ClassVar[str] = "linear flow matching"
    samplers: ClassVar[tuple[str, ...]] = ("heun", "euler", "full_heun", "euler_maruyama")
    network_settings: ClassVar[tuple[str, ...]] = ("convention",)

    def __post_init__(self):
        check_ranges(self, "noise.flow.", {})
        if self.law not in LAWS:
            raise UserError(f"noise.flow.law: unknown law {self.law!r}; choose one of {', '.join(LAWS)}")
        if not self.std > 0:
            raise UserError(f"noise.flow.std: {self.std}; must be positive")
        check_weighting(self.name, self.weighting)
        if self.convention not in CONVENTIONS:
            raise UserError(
                f"noise.flow.convention: unknown convention {self.convention!r}; choose one of {', '.join(CONVENTIONS)}"
            )

    @property
    def data_std(self) -> float:
        return 1.0

    @property
    def spare_outputs(self) -> bool:
        return CONVENTIONS[self.convention].spare_outputs

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
        """Return x_t and the time as the convention has it."""
        convention = CONVENTIONS[self.convention]
        return x_t, convention.offset + convention.scale * level

    def loss(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean over the dimensions of (v - (eps - x0))^2 (Lipman Eq. 23 with sigma_min = 0), and x0_hat.

        v is the velocity of `out`. Weighting "x0" multiplies the error by t^2. This gives (x0_hat - x0)^2, since
        x0_hat - x0 = -t (v - (eps - x0)).
        """
        sign, one = CONVENTIONS[self.convention].sign, torch.ones_like(level)
        coefficients = DenoiseCoefficients(
            target_x0=-sign * one,
            target_eps=sign * one,
            clean_x0=1 - level,
            clean_eps=level,
            clean_out=-sign * level,
            weight=one if self.weighting == "output" else level.square(),
        )
        return affine_denoise_loss(out, x0, eps, coefficients)

    def velocity(self, out: Tensor) -> Tensor:
        """Return the prediction of dx/dt = eps - x0, in the dtype of `out`."""
        return CONVENTIONS[self.convention].sign * out

    def clean(self, out: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """Return x_t - t v, since x_t - t (eps - x0) = x0."""
        return x_t - level[:, None, None, None] * self.velocity(out.to(level.dtype))

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
