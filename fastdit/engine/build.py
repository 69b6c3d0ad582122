"""From settings to parts: the noise process, the network, the data."""

from dataclasses import dataclass

import torch

from fastdit.config import Config
from fastdit.data import Loader, Source, make_loader, open_source
from fastdit.methods.denoising import Denoising
from fastdit.models import DiT


@dataclass(frozen=True)
class Shape:
    """What the network must fit."""

    channels: int
    height: int
    width: int
    classes: int


def shape_of(config: Config, classes: int) -> Shape:
    size = config.data.size
    height, width = (size, size) if isinstance(size, int) else size
    return Shape(config.data.channels, height, width, classes)


def build_noise(config: Config):
    return getattr(config.noise, config.noise.name)


def build_network(config: Config, shape: Shape) -> DiT:
    """A freshly initialised DiT on the CPU; its weights depend on `config.seed` alone."""
    return DiT(
        input_size=(shape.height, shape.width),
        channels=shape.channels,
        classes=shape.classes,
        out_channels=build_noise(config).out_channels(shape.channels),
        patch=config.model.patch,
        mlp_ratio=config.model.mlp_ratio,
        attention_backend=config.model.attention,
        seed=config.seed,
        **config.model.dims(),
    )


def build_method(config: Config, shape: Shape) -> Denoising:
    return Denoising(build_noise(config), shape.classes, config.label_drop)


def open_data(config: Config) -> Source:
    return open_source(config.data.source, classes=config.data.classes)


def build_loader(
    config: Config,
    source: Source,
    *,
    batch: int,
    rank: int,
    world: int,
    device: torch.device,
    flip: bool | None = None,
) -> Loader:
    """A loader by the run's settings; `flip` overrides theirs. Raises UserError when the source does not fit them."""
    data = config.data
    return make_loader(
        source,
        batch=batch,
        rank=rank,
        world=world,
        seed=config.seed,
        size=data.size,
        channels=data.channels,
        flip=data.flip if flip is None else flip,
        device=device,
        threads=data.threads,
        on_corrupt=data.on_corrupt,
        latent_scale=data.latent_scale,
        latent_shift=data.latent_shift,
    )


def identity(config: Config, shape: Shape) -> dict:
    """What a checkpoint must share with the run that reads it, by field."""
    return {
        **{f"model.{key}": value for key, value in config.model.dims().items()},
        "model.patch": config.model.patch,
        "model.mlp_ratio": config.model.mlp_ratio,
        "noise.name": config.noise.name,
        "channels": shape.channels,
        "size": [shape.height, shape.width],
        "classes": shape.classes,
    }
