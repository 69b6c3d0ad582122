"""DDPM: a discrete chain of linear betas; the network predicts eps and, in as many channels, the variance.

Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models", 2020, with the learned-range variance and hybrid
loss of Nichol, Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021: what the original DiT is
trained with. The level is the timestep 0 .. steps - 1, as float32. `fastdit.noise.process` documents each member;
the samplers are in `sampling.py`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, repeat
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import UserError, check_ranges
from fastdit.kernels import AnyGenerator, draw_integers

LONGEST = 2**24  # timesteps are float32, which holds no larger whole numbers exactly


class Chain(NamedTuple):
    """Constants of a chain, each (length,) float64, in the order of rising noise."""

    timestep: np.ndarray  # in the process the network was trained with
    beta: np.ndarray  # Nichol Eq. 19; the largest reverse variance
    alpha_bar: np.ndarray
    alpha_bar_prev: np.ndarray  # 1 at the first
    posterior_var: np.ndarray  # Ho Eq. 7; the smallest reverse variance. The first, 0, becomes the second


@dataclass(frozen=True)
class DDPM:
    """Train at `steps` timesteps with betas linear from beta_start to beta_end, not rescaled for other `steps`.

    There is no `weighting`, unlike in EDM and Flow. The loss has two terms, and only the eps error has a counterpart
    weighted for x0. The variational term is a likelihood in bits, which has no such weight.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    name: ClassVar[str] = "ddpm"
    summary: ClassVar[str] = "Ho et al. 2020 with learned-range variance (Nichol and Dhariwal 2021)"
    samplers: ClassVar[tuple[str, ...]] = ("ddpm", "ddim")
    network_settings: ClassVar[tuple[str, ...]] = ("steps", "beta_start", "beta_end")
    spare_outputs: ClassVar[bool] = False

    def __post_init__(self):
        check_ranges(self, "noise.ddpm.", {"steps": (2, LONGEST)})
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(
                f"noise.ddpm.beta_start, noise.ddpm.beta_end: {self.beta_start} and {self.beta_end}; "
                "need 0 < start <= end < 1"
            )

    @property
    def data_std(self) -> float:
        return 1.0

    def out_channels(self, channels: int) -> int:
        """Return twice `channels`: eps, then the variance."""
        return 2 * channels

    def check_sampling_steps(self, steps: int) -> None:
        """Raise UserError for more sampler steps than the chain has."""
        if steps > self.steps:
            raise UserError(f"sample.steps: {steps}; noise.ddpm.steps allows at most {self.steps}")

    def draw(self, n: int, *, generator: AnyGenerator, device: torch.device | str) -> Tensor:
        """Draw (n,) timesteps, uniform over 0 .. steps - 1, as float32."""
        return draw_integers(self.steps, (n,), generator=generator, device=device).float()

    def add_noise(self, x0: Tensor, eps: Tensor, level: Tensor) -> Tensor:
        """Return sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps (Ho Eq. 4)."""
        signal, noise, *_ = self._at(level)
        return signal * x0 + noise * eps

    def network_input(self, x_t: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_t and the timestep."""
        return x_t, level

    def loss(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_hybrid = L_simple + 0.001 L_vlb (Nichol Eq. 16), each a mean over the dimensions, and x0_hat.

        L_simple is the eps error (Ho Eq. 14) and trains eps alone. L_vlb, of which a timestep is one in
        `steps` terms, is in bits and trains the variance alone: it sees eps detached. In its KL, variances
        are in units of posterior_var and the means differ by a multiple of the eps error (Ho Eq. 12), so no
        two close numbers are subtracted. At timestep 0 the term is the decoder's likelihood instead.
        """
        _, _, ratio, log_min, log_range, mean_scale = self._at(level)
        eps_hat, v = out.to(level.dtype).chunk(2, dim=1)
        error = eps_hat - eps
        squared, frozen = error.square(), error.detach()

        log_var = log_range * (v + 1) / 2  # over posterior_var; Nichol Eq. 15, v in [-1, 1]
        kl = 0.5 * (log_var + torch.expm1(-log_var) + mean_scale * frozen.square() * torch.exp(-log_var))
        # at timestep 0 the reverse mean is x0_hat itself
        nll = _decoder_nll(x0, ratio * frozen, log_min + log_var)
        vlb = torch.where((level == 0)[:, None, None, None], nll, kl) / math.log(2)

        per_sample = (squared + 0.001 * self.steps * vlb).mean(dim=(1, 2, 3))
        return per_sample, x0 - ratio * error

    def clean(self, out: Tensor, x_t: Tensor, level: Tensor) -> Tensor:
        """Return (x_t - sqrt(1 - alpha_bar) eps_hat) / sqrt(alpha_bar) (Ho Eq. 4 solved for x0)."""
        signal, noise, *_ = self._at(level)
        return (x_t - noise * out.to(level.dtype).chunk(2, dim=1)[0]) / signal

    def noise_to_signal(self, level: Tensor) -> Tensor:
        return self._at(level)[2].flatten()

    def level_at(self, noise_to_signal: float, n: int, device: torch.device | str) -> Tensor:
        """Return (n,) float32, each the timestep whose ratio is nearest on a log scale."""
        if not 0 < noise_to_signal < math.inf:
            raise ValueError(f"noise_to_signal={noise_to_signal}; must be positive and finite")
        timestep = np.abs(_log_ratio(self) - math.log(noise_to_signal)).argmin()
        return torch.full((n,), int(timestep), dtype=torch.float32, device=device)

    def at_quantile(self, share: Tensor) -> Tensor:
        """Return the timestep below which `share` of the training timesteps lie, rounded down."""
        return (share * self.steps).floor().clamp(0, self.steps - 1)

    def quantile_of(self, level: Tensor) -> Tensor:
        """Return the share of the training timesteps below `level`, which itself counts half."""
        return (level + 0.5) / self.steps

    def chain(self, steps: int | None = None) -> Chain:
        """Return the whole chain, or `steps` of its timesteps, evenly spaced from first to last (Nichol, section 4).

        The rounding is that of the published respacing, so that samples of a published model agree.
        Raises UserError for a number of steps that the chain does not have.
        """
        length = self.steps if steps is None else steps
        if not 1 <= length <= self.steps:
            raise UserError(f"steps: {length}; this DDPM can be sampled in 1 to {self.steps} steps")
        # a single step must start from the noise (ours)
        first, stride = (self.steps - 1.0, 0.0) if length == 1 else (0.0, (self.steps - 1) / (length - 1))
        timestep = np.array([round(t) for t in accumulate(repeat(stride, length - 1), initial=first)])

        alpha_bar = np.cumprod(1 - np.linspace(self.beta_start, self.beta_end, self.steps))[timestep]
        prev = np.append(1.0, alpha_bar[:-1])
        beta = 1 - alpha_bar / prev
        posterior_var = beta * (1 - prev) / (1 - alpha_bar)
        posterior_var[0] = posterior_var[min(1, length - 1)]
        return Chain(timestep, beta, alpha_bar, prev, posterior_var)

    def _at(self, level: Tensor) -> tuple[Tensor, ...]:
        """Return the columns of `_table` at each level, (B, 1, 1, 1) each, in level's dtype."""
        rows = _table(self, level.device)[level.long()].to(level.dtype)
        return rows[:, :, None, None, None].unbind(1)


def _decoder_nll(x0: Tensor, error: Tensor, log_var: Tensor) -> Tensor:
    """Return -log of the reverse Gaussian's mass in x0's bin of 2/255, in nats (Ho Eq. 13); error is x0 - mean.

    The outermost bins reach to infinity. The mass is bounded below as in the published code (1e-12), which
    approximates the normal distribution function by a tanh; here it is exact.
    """
    inv_std = torch.exp(-0.5 * log_var)
    above = torch.special.ndtr((error + 1 / 255) * inv_std)
    below = torch.special.ndtr((error - 1 / 255) * inv_std)
    mass = torch.where(x0 > 0.999, 1.0, above) - torch.where(x0 < -0.999, 0.0, below)
    return -mass.clamp(min=1e-12).log()


@lru_cache
def _log_ratio(process: DDPM) -> np.ndarray:
    """Return (steps,) float64, the log of noise / signal at each timestep."""
    alpha_bar = process.chain().alpha_bar
    return np.log((1 - alpha_bar) / alpha_bar) / 2


@lru_cache
def _table(process: DDPM, device: torch.device) -> Tensor:
    """Return a (steps, 6) float32 table, built once per device; the columns are named in the code."""
    c = process.chain()
    noise = np.sqrt(1 - c.alpha_bar)
    mean_shift = c.beta / (np.sqrt(1 - c.beta) * noise)  # per unit of eps error, Ho Eq. 11
    columns = {
        "signal": np.sqrt(c.alpha_bar),
        "noise": noise,
        "noise to signal": noise / np.sqrt(c.alpha_bar),
        "log of the smallest reverse variance": np.log(c.posterior_var),
        "log of the largest over the smallest": np.log(c.beta / c.posterior_var),
        "squared mean shift over the smallest": mean_shift**2 / c.posterior_var,
    }
    return torch.from_numpy(np.stack(list(columns.values()), axis=1)).float().to(device)
