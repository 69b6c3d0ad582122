"""Build the parts of a run from its settings: noise process, network, decoder, method and data."""

import os
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from fastdit.config import Config, DataConfig
from fastdit.data import Loader, Source, make_loader, open_source
from fastdit.data.cache import Cache, choose_cache
from fastdit.data.manifest import read_manifest
from fastdit.data.tables import TableSamples
from fastdit.distributed import ranks_here
from fastdit.errors import UserError
from fastdit.methods.denoising import Denoising, Shape
from fastdit.methods.registry import methods_of
from fastdit.models import (
    LatentDecoder,
    add_block_scales,
    freeze_for_diffit,
    load_checkpoint,
    open_autoencoder,
    use_fp8,
)
from fastdit.noise import NoiseProcess
from fastdit.weights_description import check_description, check_process


def shape_of(config: Config, classes: int) -> Shape:
    """Return the shape of the run's samples."""
    size = config.data.size
    height, width = (size, size) if isinstance(size, int) else size
    return Shape(config.data.channels, height, width, classes)


def build_noise(config: Config) -> NoiseProcess:
    """Return the run's noise process."""
    return config.noise.process


def build_network(config: Config, shape: Shape) -> nn.Module:
    """Return the network that is sampled, on the CPU. Its initial weights depend on `config.seed` alone."""
    sizes = {
        "input_size": (shape.height, shape.width),
        "channels": shape.channels,
        "classes": shape.classes,
        "patch": config.model.patch,
        "mlp_ratio": config.model.mlp_ratio,
        "attention_backend": config.model.attention,
        "grad_checkpoint": config.model.grad_checkpoint == "blocks",
        "qk_norm": config.model.qk_norm == "rms",
        "rope": config.model.rope,
        "fp32_stream": config.model.stream == "fp32",
        **config.model.dims(),
    }
    base = methods_of(config.method)[0]
    network = base.build_network(config, sizes, build_noise(config).out_channels(shape.channels))
    if config.finetune == "diffit":
        add_block_scales(network)
    return network


def build_decoder(config: Config, shape: Shape) -> LatentDecoder | None:
    """Return the decoder of the run's latents, on the CPU, or None if samples are images.

    Raises UserError if the autoencoder cannot be read or its latents have another number of channels.
    """
    data = config.data
    if data.autoencoder is None:
        return None
    autoencoder = open_autoencoder(data.autoencoder)
    if autoencoder.channels != shape.channels:
        raise UserError(
            f"data.autoencoder: latents of {data.autoencoder} have {autoencoder.channels} channels, data.channels is "
            f"{shape.channels}; give the autoencoder that the latents were made with"
        )
    return LatentDecoder(autoencoder, scale=data.latent_scale, shift=data.latent_shift)


def _say(line: str) -> None:
    """Print a line on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        print(line)


def build_training(config: Config, shape: Shape, decoder: LatentDecoder | None = None) -> tuple[nn.Module, Denoising]:
    """Return the module that is trained, on the CPU, and the method that trains it.

    The module starts at the weights of `config.init_from`, if that is set. With `config.precision` fp8, the blocks of
    the sampled network use fp8 products in training; teachers and EMA networks do not. `decoder` comes from
    `build_decoder`. Raises UserError if those weights cannot be read or do not fit.
    """
    # Build the sampled network, and load the weights that it starts from.
    network = build_network(config, shape)
    if config.init_from:
        process, classes = build_noise(config), check_description(config, config.init_from, _say)
        load_checkpoint(
            network,
            config.init_from,
            new_labels=config.finetune is not None,
            weights=config.init_weights,
            classes=classes,
            check_noise=lambda trained: check_process(process, trained, config.init_from),
            spare_outputs=process.spare_outputs,
            say=_say,
        )
    if config.finetune == "diffit":
        freeze_for_diffit(network)
    if config.precision == "fp8":
        use_fp8(network)

    # Let each method wrap the module and the method before it.
    module, method = network, Denoising(build_noise(config), shape.classes, config.label_drop)
    for kind in methods_of(config.method):
        module, method = kind.build(config, shape, module, method, decoder)
    return module, method


def open_data(config: Config) -> Source:
    """Open the run's source of samples. Raises UserError if it cannot be read, or has none of the columns asked for."""
    data = config.data
    columns = {"image_column": data.image_column, "label_column": data.label_column}
    source = open_source(data.source, classes=data.classes, labels=data.labels, **columns)
    for name, column in columns.items():
        if column is not None and not isinstance(source.samples, TableSamples):
            raise UserError(f"data.{name}: {source.path} is no Hugging Face data set and has no columns; leave it out")
    _check_crop(config, source)
    return source


def _check_crop(config: Config, source: Source) -> None:
    """Raise UserError if latents were made of images that were cropped in another way than `data.crop` says."""
    manifest = read_manifest(source.samples.folder) if source.kind == "latent" else None
    made = (manifest or {}).get("crop", config.data.crop)  # older manifests do not say it
    if made != config.data.crop:
        raise UserError(
            f"data.crop: {config.data.crop}, but the latents in {source.path} are of images cropped as {made}; give "
            f"--data.crop {made}, so that evaluations crop real images alike"
        )


def standardized(config: Config, source: Source) -> Config:
    """Return `config` with the scale and shift of the latents that `data.standardize` asks for.

    Raises UserError if the statistics that it needs are missing or unusable, or contradict `data.latent_scale` and
    `data.latent_shift`.
    """
    # Read the statistics of the channels.
    data = config.data
    if data.standardize == "factor":
        return config
    manifest = read_manifest(source.samples.folder) if source.kind == "latent" else None
    if manifest is None or "channel_std" not in manifest:
        raise UserError(
            f"data.standardize: {source.path} has no manifest with statistics of channels; encode it with "
            "fastdit/encode.py, or set it to factor"
        )
    mean, std = manifest["channel_mean"], manifest["channel_std"]
    if len(mean) != data.channels or not all(s > 0 for s in std):
        raise UserError(f"data.standardize: {source.path} has channels of deviation {std}; set it to factor")

    # Compute scale and shift from them, and compare with those of the settings.
    data_std = build_noise(config).data_std
    scale, shift = tuple(data_std / s for s in std), tuple(mean)
    current = (data.latent_scale, data.latent_shift)
    if current not in ((scale, shift), (DataConfig.latent_scale, DataConfig.latent_shift)):
        raise UserError(
            f"data.standardize: latent_scale {current[0]} and latent_shift {current[1]} are not what the statistics of "
            f"{source.path} give; leave them out, take the data that the run began with, or set it to factor"
        )
    return replace(config, data=replace(data, latent_scale=scale, latent_shift=shift))


def build_loader(
    config: Config,
    source: Source,
    *,
    batch: int,
    rank: int,
    world: int,
    device: torch.device,
    flip: bool | None = None,
    cache: Cache = "none",
    group: dist.ProcessGroup | None = None,
) -> Loader:
    """Return a loader with the run's settings; `flip`, unless None, replaces `data.flip`.

    batch: samples of one batch on this rank.
    cache, group: as in `choose_cache` and `make_loader`. Training passes `data.cache`; others read without a cache.

    Raises UserError if the source does not fit the settings.
    """
    data = config.data
    chosen = choose_cache(cache, source, device, group, ranks_here())
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
        convert=data.convert,
        crop=data.crop,
        reader=data.reader,
        latent_scale=data.latent_scale,
        latent_shift=data.latent_shift,
        cache=chosen,
        group=group if chosen != "none" else None,
    )


def checkpoint_signature(config: Config, shape: Shape) -> dict:
    """Return, by field, the values in which a checkpoint must agree with the run that reads it."""
    noise = build_noise(config)
    signatures = [method.checkpoint_signature(config) for method in methods_of(config.method)]
    return {
        "method": config.method,
        "finetune": config.finetune,
        **{field: value for signature in signatures for field, value in signature.items()},
        **{f"model.{key}": value for key, value in config.model.dims().items()},
        "model.patch": config.model.patch,
        "model.mlp_ratio": config.model.mlp_ratio,
        "model.qk_norm": config.model.qk_norm,
        "model.rope": config.model.rope,
        "noise.name": noise.name,
        **{f"noise.{noise.name}.{field}": getattr(noise, field) for field in noise.network_settings},
        "channels": shape.channels,
        "size": [shape.height, shape.width],
        "classes": shape.classes,
    }
