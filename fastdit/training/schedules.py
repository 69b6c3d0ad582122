"""Numbers that change with the step, as pure functions of it: nothing to save, nothing to restore."""

import math

import numpy as np

from fastdit.config import Config, EMAConfig


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of step `step` (0-based): linear warm-up, then constant or cosine to zero at `config.steps`."""
    scale = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine" and step >= config.warmup:
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        scale = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * scale


def ema_decay(config: EMAConfig, step: int) -> float:
    """Decay of the weight average after step `step` (0-based).

    `fixed`: min(decay, (1+t)/(10+t)), t = step. `power`: (1 - 1/t)^(gamma+1), t = step + 1 (Karras et al. 2024,
    section 3.1), gamma from the relative width `std`.
    """
    if config.kind == "fixed":
        return min(config.decay, (1 + step) / (10 + step))
    return (1 - 1 / (step + 1)) ** (power_gamma(config.std) + 1)


def power_gamma(std: float) -> float:
    """gamma of the power-function profile whose relative standard deviation is `std`: the largest root of
    (gamma+1) / ((gamma+2)^2 (gamma+3)) = std^2 (variance of the Beta(gamma+1, 1) law on [0, 1])."""
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
