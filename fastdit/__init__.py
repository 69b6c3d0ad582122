"""fastdit: fast training of class-conditional diffusion transformers, with SD-DiT and SADM."""

__version__ = "0.1.0"
