"""From settings to parts: the noise process, the network, the data."""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdit.config import Config, DataConfig
from fastdit.data import Loader, Source, make_loader, open_source
from fastdit.data.cache import Cache, choose_cache
from fastdit.data.manifest import read_manifest
from fastdit.engine.runtime import ranks_here
from fastdit.errors import UserError
from fastdit.methods.denoising import Denoising
from fastdit.methods.psi_alignment import PsiAlign, PsiAlignment
from fastdit.methods.self_discrimination import SelfDiscrimination
from fastdit.methods.structure_game import SADM, StructureGame, TeacherFeatures
from fastdit.models import (
    AlignedDiT,
    DiT,
    Encoder,
    EncoderDecoder,
    ImageResNet,
    LatentDecoder,
    LatentResNet,
    SplitDiT,
    Student,
    TokenTargets,
    add_gains,
    freeze_for_diffit,
    load_checkpoint,
    load_structure_encoder,
    open_autoencoder,
)
from fastdit.models.image_resnet import SMALLEST


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


def build_network(config: Config, shape: Shape) -> DiT | EncoderDecoder:
    """What is sampled, freshly initialised on the CPU; its weights depend on `config.seed` alone."""
    sizes = {
        "input_size": (shape.height, shape.width),
        "channels": shape.channels,
        "classes": shape.classes,
        "patch": config.model.patch,
        "mlp_ratio": config.model.mlp_ratio,
        "attention_backend": config.model.attention,
        **config.model.dims(),
    }
    out_channels = build_noise(config).out_channels(shape.channels)
    if config.uses("sd_dit"):
        network = _build_sd_dit(config, sizes, out_channels)
    else:
        network = DiT(**sizes, out_channels=out_channels, seed=config.seed)
    if config.finetune == "diffit":
        add_gains(network)
    return network


def _build_sd_dit(config: Config, sizes: dict, out_channels: int) -> EncoderDecoder | SplitDiT:
    """Build SD-DiT's encoder and decoder from the DiT's sizes."""
    settings = config.sd_dit
    if settings.decoder == "split":
        return SplitDiT(
            split=settings.split_of(sizes["depth"]),
            hidden_tokens=settings.hidden_tokens,
            out_channels=out_channels,
            seed=config.seed,
            **sizes,
        )
    decoder = settings.sizes_for(sizes["width"], sizes["depth"])
    return EncoderDecoder(
        Encoder(**sizes, class_token=settings.cls == "token"),
        out_channels=out_channels,
        width=decoder.decoder_width,
        depth=decoder.decoder_depth,
        heads=decoder.decoder_heads,
        hidden_tokens=settings.hidden_tokens,
        attention_backend=config.model.attention,
        seed=config.seed,
    )


def build_decoder(config: Config, shape: Shape) -> LatentDecoder | None:
    """What makes pictures of the run's samples, on the CPU; None where they are pictures. Raises UserError."""
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


def build_training(config: Config, shape: Shape, decoder: LatentDecoder | None = None) -> tuple[nn.Module, Denoising]:
    """What is trained, on the CPU, with the weights of `config.init_from` where that is set; and the method.

    decoder: from `build_decoder`, for SADM's image_resnet.
    """
    network = build_network(config, shape)
    if config.init_from:
        load_checkpoint(network, config.init_from, new_labels=config.finetune is not None)
    if config.finetune == "diffit":
        freeze_for_diffit(network)
    module, method = network, Denoising(build_noise(config), shape.classes, config.label_drop)
    if config.uses("sd_dit"):
        settings, dims = config.sd_dit, config.model.dims()
        head = settings.sizes_for(dims["width"], dims["depth"])
        module = Student(
            network,
            head_width=head.head_width,
            bottleneck=head.bottleneck,
            prototypes=head.prototypes,
            seed=config.seed,
        )
        method = SelfDiscrimination(method.noise, method.classes, method.label_drop, settings, module)
    if config.uses("sadm"):
        psi, seen = build_psi(config, shape, method), shape
        decoder = decoder if config.sadm.psi == "image_resnet" else None
        if decoder is not None:
            factor = decoder.autoencoder.factor
            seen = Shape(3, factor * shape.height, factor * shape.width, shape.classes)
            if not config.sadm.psi_decoder_gradient:
                decoder.approximate_gradient()
        if config.sadm.psi == "image_resnet" and min(seen.height, seen.width) < SMALLEST:
            raise UserError(
                f"sadm.psi: image_resnet needs at least {SMALLEST} rows and columns, it would see {seen.height} x "
                f"{seen.width}; choose another psi, or larger samples"
            )
        decoded = _flops(decoder, shape) if decoder is not None else 0
        method = StructureGame(method, config.sadm, psi, _flops(psi, seen), decoder, decoded)
    if config.uses("psi_align"):
        module, method = _build_alignment(config, shape, network, method)
    return module, method


def _build_alignment(config: Config, shape: Shape, network: DiT, base: Denoising) -> tuple[AlignedDiT, PsiAlignment]:
    """Build psi_align's module and method. Raises UserError when Psi's weights cannot be read."""
    settings = config.psi_align
    psi = _build_latent_resnet(config.sadm if config.shares_psi else settings, shape, config.seed)
    module = AlignedDiT(
        network,
        block=settings.block_of(network.depth),
        hidden=settings.hidden_of(network.width),
        features=psi.channels_of(settings.stage),
        seed=config.seed,
    )
    flops = _flops(TokenTargets(psi, settings.stage, network.grid), shape)
    shared = base.psi if config.shares_psi else None
    return module, PsiAlignment(base, settings, module, psi, flops, shared)


def build_psi(config: Config, shape: Shape, base: Denoising) -> nn.Module:
    """SADM's structure encoder. Raises UserError when its weights cannot be read."""
    settings = config.sadm
    if settings.psi == "teacher":
        return TeacherFeatures(base)
    if settings.psi == "image_resnet":
        return ImageResNet(settings.psi_weights)
    return _build_latent_resnet(settings, shape, config.seed)


def _build_latent_resnet(settings: SADM | PsiAlign, shape: Shape, seed: int) -> LatentResNet:
    """Build a Psi with the weights of `settings`. Raises UserError when they cannot be read."""
    psi = LatentResNet(
        channels=shape.channels,
        features=settings.psi_features,
        width=settings.psi_width,
        spectral_norm=getattr(settings, "spectral_norm", False),
        seed=seed,
    )
    if settings.psi_weights:
        load_structure_encoder(psi, settings.psi_weights)
    return psi


def _flops(network: nn.Module, shape: Shape) -> int:
    """FLOPs of one forward pass of one sample."""
    if isinstance(network, TeacherFeatures):
        return network.flops
    # A decoder's pass costs as much as a large DiT's: count it without computing it.
    device = "meta" if isinstance(network, LatentDecoder) else "cpu"
    weights = {name: value.to(device) for name, value in (*network.named_parameters(), *network.named_buffers())}
    x = torch.zeros(1, shape.channels, shape.height, shape.width, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(network.eval(), weights, x)
    return counter.get_total_flops()


def open_data(config: Config) -> Source:
    return open_source(config.data.source, classes=config.data.classes)


def standardised(config: Config, source: Source) -> Config:
    """`config` with the latents' scale and shift as `data.standardise` has them. Raises UserError."""
    data = config.data
    if data.standardise == "factor":
        return config
    manifest = read_manifest(source.samples.folder) if source.kind == "latent" else None
    if manifest is None or "channel_std" not in manifest:
        raise UserError(
            f"data.standardise: {source.path} has no manifest with statistics of channels; encode it with "
            "fastdit/encode.py, or set it to factor"
        )
    mean, std = manifest["channel_mean"], manifest["channel_std"]
    if len(mean) != data.channels or not all(s > 0 for s in std):
        raise UserError(f"data.standardise: {source.path} has channels of deviation {std}; set it to factor")
    wanted = config.noise.edm.sigma_data if config.noise.name == "edm" else 1.0
    scale, shift = tuple(wanted / s for s in std), tuple(mean)
    given = (data.latent_scale, data.latent_shift)
    if given not in ((scale, shift), (DataConfig.latent_scale, DataConfig.latent_shift)):
        raise UserError(
            f"data.standardise: latent_scale {given[0]} and latent_shift {given[1]} are not what the statistics of "
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
    """A loader by the run's settings; `flip` overrides theirs. Raises UserError when the source does not fit them.

    cache, group: as `choose_cache` and `make_loader` take them; the run's own is `data.cache`.
    """
    data = config.data
    kept = choose_cache(cache, source, device, group, ranks_here())
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
        reader=data.reader,
        latent_scale=data.latent_scale,
        latent_shift=data.latent_shift,
        cache=kept,
        group=group if kept != "none" else None,
    )


def identity(config: Config, shape: Shape) -> dict:
    """What a checkpoint must share with the run that reads it, by field."""
    own = {}
    if config.uses("sd_dit"):
        own |= _identity_of_sd_dit(config)
    if config.uses("sadm"):
        fields = ("structure", "psi", "psi_width", "psi_features", "spectral_norm")
        own |= {f"sadm.{field}": getattr(config.sadm, field) for field in fields}
    if config.uses("psi_align"):
        own |= _identity_of_alignment(config)
    return {
        "method": config.method,
        "finetune": config.finetune,
        **own,
        **{f"model.{key}": value for key, value in config.model.dims().items()},
        "model.patch": config.model.patch,
        "model.mlp_ratio": config.model.mlp_ratio,
        "noise.name": config.noise.name,
        "channels": shape.channels,
        "size": [shape.height, shape.width],
        "classes": shape.classes,
    }


def _identity_of_sd_dit(config: Config) -> dict:
    """Return the settings of SD-DiT that fix the tensors of a checkpoint."""
    settings, dims = config.sd_dit, config.model.dims()
    sizes = settings.sizes_for(dims["width"], dims["depth"])._asdict()
    fields = {"decoder": settings.decoder, "cls": settings.cls, "hidden_tokens": settings.hidden_tokens}
    if settings.decoder == "split":
        sizes = {name: size for name, size in sizes.items() if not name.startswith("decoder_")}
        fields["split"] = settings.split_of(dims["depth"])
    fields["teacher"] = "frozen" if settings.frozen else "moving"
    return {f"sd_dit.{name}": value for name, value in (fields | sizes).items()}


def _identity_of_alignment(config: Config) -> dict:
    """Return the settings of psi_align that fix the tensors of a checkpoint and what they were aligned with."""
    settings, dims = config.psi_align, config.model.dims()
    fixed = {
        "block": settings.block_of(dims["depth"]),
        "stage": settings.stage,
        "projector_width": settings.hidden_of(dims["width"]),
    }
    if not config.shares_psi:
        fixed |= {name: getattr(settings, name) for name in ("psi_width", "psi_features")}
    return {f"psi_align.{name}": value for name, value in fixed.items()}
