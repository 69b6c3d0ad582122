"""Share networks and numbers between the tests of noise processes and of samplers."""

import torch

SHAPE = (5, 3, 3, 7)
SIGNS = {"own": 1, "sit": -1, "repa": 1}  # of the velocity eps - x0 in a flow's output, by convention


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(process, seed=0, scale=0.5):
    """out, x0, eps, level of a training step; the lowest timestep of a DDPM is among the levels."""
    level = process.draw(SHAPE[0], generator=torch.Generator().manual_seed(seed), device="cpu")
    if process.name == "ddpm":
        level[1] = 0
    channels = process.out_channels(SHAPE[1])
    out = randn(SHAPE[0], channels, *SHAPE[2:], seed=seed + 1)
    return out, scale * randn(*SHAPE, seed=seed + 2), randn(*SHAPE, seed=seed + 3), level


def level_of(process, t):
    """The level that a network is told by its time input `t`."""
    if process.name == "flow":
        return {"own": t / 1000, "sit": 1 - t, "repa": t}[process.convention]
    return (4 * t).exp() if process.name == "edm" else t


def wavy(process):
    """A made-up network, unlike for every label and level."""

    def network(x, t, y):
        wave = torch.sin(3 * x + (y / 3 + t / 400)[:, None, None, None])
        return torch.cat([0.3 * x + 0.5 * wave, wave.cos()], 1)[:, : process.out_channels(x.shape[1])]

    return network


def marginal(process, level):
    """signal and noise coefficients at `level`, a float64 tensor."""
    one = torch.ones(level.numel(), 1, 1, 1, dtype=level.dtype)
    flat = level.reshape(-1)
    return (
        process.add_noise(one, 0 * one, flat).reshape(level.shape),
        process.add_noise(0 * one, one, flat).reshape(level.shape),
    )


def raw_output(process, x0_hat, x_t, level):
    """Return the output whose clean estimate is x0_hat (DDPM's variance channels: zeros)."""
    level = level[:, None, None, None]
    if process.name == "edm":
        total, sd = level**2 + process.sigma_data**2, process.sigma_data
        return (x0_hat - sd**2 / total * x_t) * total.sqrt() / (level * sd)
    if process.name == "flow":
        return SIGNS[process.convention] * (x_t - x0_hat) / level
    signal, noise = marginal(process, level)
    eps = (x_t - signal * x0_hat) / noise
    return torch.cat([eps, torch.zeros_like(eps)], dim=1)
