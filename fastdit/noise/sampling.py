"""From noise to samples: ODE, SDE and ancestral samplers with classifier-free guidance, for every noise process.

`sample` is the one entry point. `_GuidedNetwork` wraps the network as a function of (x, level) for the samplers. The
sampler's state is float64; the network is called in float32.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fastdit.errors import UserError, check_ranges
from fastdit.noise.process import NoiseProcess

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
DrawNoise = Callable[[Sequence[int]], Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]
DiffusionForm = Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"]

# Diffusion coefficients w of the time t, which is 1 at noise, and of the norm, as in github.com/willisma/SiT,
# transport/path.py: ICPlan.compute_diffusion. On the straight path, sigma and linear are the same.
_DIFFUSION: dict[str, Callable[[float, float], float]] = {
    "constant": lambda t, norm: norm,
    "SBDM": lambda t, norm: norm * t / (1 - t),
    "sigma": lambda t, norm: norm * t,
    "linear": lambda t, norm: norm * t,
    "decreasing": lambda t, norm: 0.25 * (1 - norm * math.cos(math.pi * t)) ** 2,
    "increasing-decreasing": lambda t, norm: norm * math.sin(math.pi * t) ** 2,
}


@dataclass(frozen=True)
class SDE:
    """Choose the SDE that `euler_maruyama` solves. Names and defaults are those of SiT's sampler.

    diffusion_form, diffusion_norm: the diffusion coefficient. Every choice has the same marginals.
    last_step_size: length of the last step, in time, which draws no noise.

    Raises UserError for an unknown form, a negative norm or a step that is not inside (0, 1).
    """

    diffusion_form: DiffusionForm = "sigma"
    diffusion_norm: float = 1.0
    last_step_size: float = 0.04

    def __post_init__(self):
        check_ranges(self, "sample.", {"diffusion_norm": (0,), "last_step_size": (0.0001, 0.9999)})
        if self.diffusion_form not in _DIFFUSION:
            raise UserError(
                f"sample.diffusion_form: unknown form {self.diffusion_form!r}; choose one of {', '.join(_DIFFUSION)}"
            )

    def diffusion(self, t: float) -> float:
        """Return the diffusion coefficient w at time t: the noise of a step dt has the variance 2 w dt."""
        return _DIFFUSION[self.diffusion_form](t, self.diffusion_norm)

    def times(self, steps: int) -> np.ndarray:
        """Return (steps + 1,) float64 times, evenly spaced from 1 to the last step's, then 0.

        SBDM's coefficient is infinite at 1, so it starts at 1 - 0.001, the epsilon of SiT's code. Raises UserError for
        fewer than 2 steps.
        """
        if steps < 2:
            raise UserError(f"sample.steps: {steps}; euler_maruyama takes at least 2, the last one without noise")
        first = 0.999 if self.diffusion_form == "SBDM" else 1.0
        return np.append(np.linspace(first, self.last_step_size, steps), 0.0)


@torch.no_grad()
def sample(
    process: NoiseProcess,
    network: Network,
    noise: Tensor,
    y: Tensor,
    *,
    steps: int,
    sampler: str | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[float, float] | None = None,
    guided_channels: int | None = None,
    null_label: int | None = None,
    sde: SDE | None = None,
    draw_noise: DrawNoise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw samples (n, C, H, W) float32 of classes y (n,) int64 from unit-variance `noise` (n, C, H, W).

    network: the raw model, (x (m, C, H, W) float32, t (m,) float32, y (m,)) -> (m, out_channels(C), H, W).
    steps: sampler steps. `heun` calls the network 2 steps - 1 times, `full_heun` 2 steps, the others `steps` times.
    sampler: one of process.samplers; the first if None.
    guidance: null + guidance * (conditional - null) of the prediction (Ho, Salimans 2022), both from one
        batch of 2n, labels y then null_label. At 1 the network is called on the conditional n alone.
    guidance_interval: (lo, hi) in units of process.noise_to_signal. Guidance acts where lo < it <= hi
        (Kynkaanniemi et al. 2024); elsewhere the network is called on the conditional n alone.
    guided_channels: guide only the first so many channels (the original DiT: 3), the others are conditional.
        By default all C. A predicted variance is never guided.
    sde: what `euler_maruyama` solves; SiT's defaults if None.
    draw_noise: shape -> fresh unit-variance noise, for `ddpm` and `euler_maruyama`; see PerSampleNoise.
    progress: wraps the iterable of steps, for example tqdm.tqdm.

    Raises UserError for settings a user can mend, ValueError for tensors or callables that do not fit.
    """
    sampler = sampler or process.samplers[0]
    if sampler not in process.samplers:
        choices = ", ".join(process.samplers)
        raise UserError(f"sampler: {process.name} has no sampler {sampler!r}; choose one of {choices}")
    if steps < 1:
        raise UserError(f"steps: {steps}; sampling takes at least 1")
    if guidance != 1 and null_label is None:
        raise UserError("guidance: the model has no null class to guide with; set guidance to 1")
    if guidance_interval is not None and not guidance_interval[0] < guidance_interval[1]:
        raise UserError(f"guidance_interval: {guidance_interval}; must be (lo, hi) with lo < hi")
    if guided_channels is not None and not 1 <= guided_channels <= noise.shape[1]:
        raise UserError(f"guided_channels: {guided_channels}; samples have {noise.shape[1]} channels")
    if y.shape != noise.shape[:1]:
        raise ValueError(f"{tuple(y.shape)} labels for noise of shape {tuple(noise.shape)}")

    channels = guided_channels or noise.shape[1]
    predict = _GuidedNetwork(process, network, y, null_label, guidance, guidance_interval, channels)
    progress = progress or (lambda order: order)
    return _SAMPLERS[sampler](process, predict, noise.double(), steps, sde or SDE(), draw_noise, progress).float()


class PerSampleNoise:
    """Draw noise whose row i depends on seed, indices[i] and the number of calls before, and nothing else.

    A sample is therefore the same in every batch, on every rank and device. The numbers are drawn on the CPU.
    Use one object for both the initial noise (its first call) and a sampler's fresh noise.
    """

    def __init__(self, seed: int, indices: Sequence[int], device: torch.device | str):
        """Take a seed and the samples' indices, which are non-negative integers of any size."""
        self._device = device
        # torch's CPU generator keeps 32 bits of a seed, so 50,000 samples might hold duplicates
        self._rows = [
            np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(int(index),))))
            for index in indices
        ]

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Draw standard normal float32 of `shape` (n, C, H, W). Raises ValueError unless n is the number of indices."""
        if shape[0] != len(self._rows):
            raise ValueError(f"noise of shape {tuple(shape)} asked of {len(self._rows)} sample indices")
        rows = [row.standard_normal(tuple(shape[1:]), dtype=np.float32) for row in self._rows]
        return torch.from_numpy(np.stack(rows)).to(self._device)


@dataclass
class _GuidedNetwork:
    """Map (x (n, C, H, W), level) to the network's raw output in x's dtype, guided where guidance acts."""

    process: NoiseProcess
    network: Network
    y: Tensor
    null_label: int | None
    guidance: float
    interval: tuple[float, float] | None
    channels: int

    def __call__(self, x: Tensor, level: float) -> Tensor:
        levels = torch.full(x.shape[:1], level, dtype=x.dtype, device=x.device)
        net_x, net_t = (tensor.float() for tensor in self.process.network_input(x, levels))
        if not self._acts(level):
            return self.network(net_x, net_t, self.y).to(x.dtype)
        labels = torch.cat([self.y, torch.full_like(self.y, self.null_label)])
        out = self.network(net_x.repeat(2, 1, 1, 1), net_t.repeat(2), labels)
        conditional, null = out.to(x.dtype).chunk(2)
        guided = torch.lerp(null, conditional, self.guidance)[:, : self.channels]
        return torch.cat([guided, conditional[:, self.channels :]], dim=1)

    def _acts(self, level: float) -> bool:
        if self.guidance == 1 or self.interval is None:
            return self.guidance != 1
        # on the CPU, where reading a number back waits for nothing
        noise_to_signal = self.process.noise_to_signal(torch.tensor([level], dtype=torch.float64)).item()
        return self.interval[0] < noise_to_signal <= self.interval[1]


def _ode(process, predict, noise, steps, sde, draw_noise, progress, *, second_order: bool, full=False) -> Tensor:
    """Solve the probability-flow ODE dx/dlevel = (x - x0_hat) / level of EDM (Karras Alg. 1) and of straight flows.

    The method is Heun's or Euler's. The step to level 0, where this slope is not defined, is Euler's. With `full`,
    which is for flows, the slope is the predicted velocity, so that the last step is Heun's too.
    """

    def slope(x: Tensor, level: float) -> Tensor:
        if full:
            return process.velocity(predict(x, level))
        levels = torch.full(x.shape[:1], level, dtype=x.dtype, device=x.device)
        return (x - process.clean(predict(x, level), x, levels)) / level

    levels = process.ode_levels(steps).tolist()
    x = levels[0] * noise
    for i in progress(range(steps)):
        now, then = levels[i], levels[i + 1]
        d = slope(x, now)
        x_then = x + (then - now) * d
        if second_order and (full or then > 0):
            x_then = x + (then - now) * (d + slope(x_then, then)) / 2
        x = x_then
    return x


def _euler_maruyama(process, predict, noise, steps, sde, draw_noise, progress) -> Tensor:
    """Solve SiT's reverse SDE dx = (v - w score) dt + sqrt(2 w) dW on the straight path, with falling t.

    v is the velocity eps - x0, and w the diffusion coefficient (Ma et al. 2024). The last step has no noise: SiT's
    choice "Mean".
    """
    if draw_noise is None:
        raise ValueError("the euler_maruyama sampler needs draw_noise")
    times, x = sde.times(steps).tolist(), noise
    for i in progress(range(steps)):
        t, dt, w = times[i], times[i] - times[i + 1], sde.diffusion(times[i])
        v = process.velocity(predict(x, t))
        score = -(x + (1 - t) * v) / t  # -eps_hat / t, since x_t + (1 - t) (eps - x0) = eps
        x = x - dt * (v - w * score)
        if i < steps - 1:
            x = x + math.sqrt(2 * w * dt) * draw_noise(x.shape)
    return x


def _ddpm(process, predict, noise, steps, sde, draw_noise, progress) -> Tensor:
    """Draw ancestral samples with the learned variance (Ho Alg. 2, Nichol Eq. 15) on a chain of `steps`."""
    if draw_noise is None and steps > 1:
        raise ValueError("the ddpm sampler needs draw_noise")
    c, x = process.chain(steps), noise
    mean_shift = (c.beta / np.sqrt(1 - c.alpha_bar)).tolist()
    scale = np.sqrt(1 - c.beta).tolist()
    log_max, log_min = np.log(c.beta).tolist(), np.log(c.posterior_var).tolist()
    for i in progress(range(steps)[::-1]):
        eps, v = predict(x, float(c.timestep[i])).chunk(2, dim=1)
        x = (x - mean_shift[i] * eps) / scale[i]
        if i > 0:
            log_var = log_min[i] + (v + 1) / 2 * (log_max[i] - log_min[i])
            x = x + torch.exp(0.5 * log_var) * draw_noise(x.shape)
    return x


def _ddim(process, predict, noise, steps, sde, draw_noise, progress) -> Tensor:
    """Draw samples by deterministic DDIM (Song, Meng, Ermon 2021, Eq. 12 with sigma = 0) on a chain of `steps`."""
    c, x = process.chain(steps), noise
    signal, sigma = np.sqrt(c.alpha_bar).tolist(), np.sqrt(1 - c.alpha_bar).tolist()
    signal_prev, sigma_prev = np.sqrt(c.alpha_bar_prev).tolist(), np.sqrt(1 - c.alpha_bar_prev).tolist()
    for i in progress(range(steps)[::-1]):
        eps = predict(x, float(c.timestep[i])).chunk(2, dim=1)[0]
        x = signal_prev[i] * (x - sigma[i] * eps) / signal[i] + sigma_prev[i] * eps
    return x


_SAMPLERS = {
    "heun": partial(_ode, second_order=True),
    "full_heun": partial(_ode, second_order=True, full=True),
    "euler": partial(_ode, second_order=False),
    "euler_maruyama": _euler_maruyama,
    "ddpm": _ddpm,
    "ddim": _ddim,
}
