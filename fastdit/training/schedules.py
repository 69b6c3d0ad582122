"""Compute learning rate and EMA decay as pure functions of the step, so that a checkpoint need not hold them."""

import math

import numpy as np

from fastdit.config import Config, EMAConfig


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of step `step` (0-based).

    It warms up linearly. Then it is constant, or falls along a cosine to zero at `config.steps`.
    """
    scale = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if config.schedule == "cosine" and step >= config.warmup:
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        scale = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.lr * scale


def ema_decay(config: EMAConfig, step: int) -> float:
    """Return the EMA's decay for the update of step `step` (0-based).

    `fixed` is min(decay, (1+t)/(10+t)) with t = step. `constant` is decay. `power` is (1 - 1/t)^(gamma+1) with
    t = step + 1 and gamma from the relative width `std` (Karras et al. 2024, section 3.1).
    """
    if config.kind == "fixed":
        return min(config.decay, (1 + step) / (10 + step))
    if config.kind == "constant":
        return config.decay
    return (1 - 1 / (step + 1)) ** (power_gamma(config.std) + 1)


def power_gamma(std: float) -> float:
    """Return gamma of the power-function profile whose relative standard deviation is `std`.

    It is the largest root of (gamma+1) / ((gamma+2)^2 (gamma+3)) = std^2, the variance of the Beta(gamma+1, 1)
    distribution on [0, 1] (Karras et al. 2024, section 3.1).
    """
    inverse = std**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())
