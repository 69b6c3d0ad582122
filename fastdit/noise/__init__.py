"""Noise processes: how clean images become noisy ones, what the network predicts, and the way back.

`process.py` defines the interface, `NoiseProcess`. Each process has one file (`edm.py`, `ddpm.py`, `flow.py`) and one
line in `registry.py`. `sampling.py` holds the samplers and classifier-free guidance.
"""

from fastdit.noise.ddpm import DDPM
from fastdit.noise.edm import EDM
from fastdit.noise.flow import Flow
from fastdit.noise.process import NoiseProcess
from fastdit.noise.registry import PROCESSES
from fastdit.noise.sampling import SDE, DiffusionForm, PerSampleNoise, sample

__all__ = ["DDPM", "EDM", "PROCESSES", "SDE", "DiffusionForm", "Flow", "NoiseProcess", "PerSampleNoise", "sample"]
