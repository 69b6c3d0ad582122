"""Noise processes: how clean images become noisy ones, what the network is asked for, and the way back.

One process a file (`edm.py`, `ddpm.py`, `flow.py`), each a frozen dataclass with the same members, so that a
training method never asks which one it holds. With x0 and eps (B, C, H, W) and `level` (B,):

    name, samplers                       registry name; sampler names, the default first
    out_channels(C)                      channels the network must return
    draw(n, generator=, device=)         (n,) float32 training levels (EDM sigma, DDPM timestep, flow time)
    add_noise(x0, eps, level)            x_t
    network_input(x_t, level)            what the network is called with beside labels: (B, C, H, W) and (B,)
    loss(out, x0, eps, level)            weighted loss per sample (B,), and the clean estimate x0_hat
    clean(out, x_t, level)               the same x0_hat from x_t, where x0 and eps are not known
    noise_to_signal(level)               (B,) noise / signal: EDM's sigma, comparable between processes
    level_at(noise_to_signal, n, device) (n,) float32, the level of that ratio; ValueError unless it is positive
    at_quantile(share)                   the level below which that share of the training levels lies; share in (0, 1)
    quantile_of(level)                   the share of the training levels below `level`, the inverse of `at_quantile`

All of it is computed in `level`'s dtype (float32 in training, float64 in the samplers) whatever the dtype of
`out`, the network's raw output, and nothing waits for the device. `sampling.py` holds the samplers and
classifier-free guidance.
"""

from dataclasses import fields

from fastdit.errors import UserError
from fastdit.noise.ddpm import DDPM
from fastdit.noise.edm import EDM
from fastdit.noise.flow import Flow
from fastdit.noise.sampling import PerSampleNoise, sample

__all__ = ["DDPM", "EDM", "Flow", "PerSampleNoise", "make_noise", "sample"]

PROCESSES = {process.name: process for process in (EDM, DDPM, Flow)}


def make_noise(name: str, **settings) -> EDM | DDPM | Flow:
    """The process called `name` ("edm", "ddpm" or "flow") with its fields set.

    Raises UserError for an unknown name or field, and for values the process cannot work with.
    """
    if name not in PROCESSES:
        raise UserError(f"noise: unknown process {name!r}; choose one of {', '.join(PROCESSES)}")
    known = [field.name for field in fields(PROCESSES[name])]
    for setting in settings:
        if setting not in known:
            raise UserError(f"noise.{name}.{setting}: no such field; {name} has {', '.join(known)}")
    return PROCESSES[name](**settings)
