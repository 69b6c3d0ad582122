"""What settings must satisfy beyond their types."""

import math
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING

from fastdit.errors import UserError
from fastdit.models.structure_encoders import NORM_GROUP, STAGES

if TYPE_CHECKING:
    from fastdit.config import Config

# Smallest and largest value of each numeric field; none is always allowed where the type allows it.
_POSITIVE = (
    "steps batch micro_batch log_every save_every keep_checkpoints max_nonfinite data.size data.channels data.classes "
    "data.threads model.patch model.depth model.width model.heads sample.steps sample.guided_channels "
    "sample.per_class sample.max_classes sd_dit.decoder_width sd_dit.decoder_depth sd_dit.decoder_heads "
    "sd_dit.head_width sd_dit.bottleneck sd_dit.prototypes sd_dit.every sadm.psi_width sadm.psi_features "
    "sadm.psi_every psi_align.projector_width psi_align.psi_width psi_align.psi_features"
)
_NOT_NEGATIVE = (
    "warmup lr eps weight_decay grad_clip seed threads sample_every sample.interval sample.agreement "
    "eval.every eval.seed"
)
_RANGES = {
    **dict.fromkeys(_POSITIVE.split(), (1, math.inf)),
    **dict.fromkeys(_NOT_NEGATIVE.split(), (0, math.inf)),
    "betas": (0, 1),
    "eval.n": (2, math.inf),  # a covariance takes two
    "eval.n_real": (4, math.inf),  # and so does each half of the real images
    "label_drop": (0, 1),
    "ema.decay": (0, 1),
    "data.latent_scale": (1e-6, math.inf),
    **dict.fromkeys(("sd_dit.student_temperature", "sd_dit.teacher_temperature"), (0.025, math.inf)),
    "sd_dit.teacher_temperature_start": (0.025, math.inf),  # exp(1 / it) must be an fp32 number
    **dict.fromkeys(("sd_dit.center_momentum", "sd_dit.momentum", "sd_dit.momentum_end"), (0, 1)),
    "sd_dit.teacher_temperature_warmup": (0, 1),
    "sd_dit.mask_ratio": (0, 0.95),
    "sd_dit.beta": (0, math.inf),
    "sd_dit.split": (0.01, math.inf),
    **dict.fromkeys(("sd_dit.share", "sd_dit.momentum_share"), (0.001, 1)),
    "sd_dit.until": (0, 1),
    **dict.fromkeys(("sadm.weight", "sadm.gradient_ratio", "sadm.weight_floor", "sadm.weight_cap"), (0, math.inf)),
    **dict.fromkeys(("sadm.gradient_penalty", "sadm.psi_lr", "sadm.psi_warm_steps"), (0, math.inf)),
    **dict.fromkeys(("sadm.huber_delta", "sadm.sigma_data", "sadm.clamp", "sadm.max_noise"), (1e-6, math.inf)),
    **dict.fromkeys(("sadm.psi_warmup", "sadm.psi_betas", "sadm.start"), (0, 1)),
    **dict.fromkeys(("psi_align.weight", "psi_align.psi_warm_steps"), (0, math.inf)),
    **dict.fromkeys(("psi_align.depth", "psi_align.until"), (0, 1)),
    "psi_align.stage": (1, STAGES),
    "ema.std": (0.001, 0.28),  # a power-function profile cannot be wider than 12^-1/2
}


def check(config: "Config") -> None:
    """Raises UserError for the first field that is out of its range, or does not fit another."""
    for field, (low, high) in _RANGES.items():
        value = attrgetter(field)(config)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not isinstance(number, str) and not low <= number <= high:
                wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"{field}: must be {wanted}, got {number}")
    if config.finetune and not config.init_from:
        raise UserError("finetune: needs the weights to start from; give --init_from")
    _check_model(config)
    _check_decoder(config)
    _check_psi(config)
    _check_alignment(config)
    _check_sampling(config)


def _check_model(config: "Config") -> None:
    width, heads = (config.model.dims()[key] for key in ("width", "heads"))
    if width % heads or width % 4:
        raise UserError(f"model.width: {width} must be a multiple of model.heads ({heads}) and of 4; change one")
    size, patch = config.data.size, config.model.patch
    for side in (size,) if isinstance(size, int) else size:
        if side % patch:
            raise UserError(f"data.size: {side} is not a multiple of model.patch ({patch}); change one")
    for name in ("latent_scale", "latent_shift"):
        value = getattr(config.data, name)
        if isinstance(value, tuple) and len(value) != config.data.channels:
            raise UserError(
                f"data.{name}: {len(value)} numbers for {config.data.channels} channels; give one a channel"
            )


def _check_decoder(config: "Config") -> None:
    dims = config.model.dims()
    if config.sd_dit.decoder == "split":
        if config.uses("sd_dit"):
            config.sd_dit.split_of(dims["depth"])
        return
    sizes = config.sd_dit.sizes_for(dims["width"], dims["depth"])
    width, heads = sizes.decoder_width, sizes.decoder_heads
    if width % heads or width % 4:
        raise UserError(
            f"sd_dit.decoder_width: {width} must be a multiple of sd_dit.decoder_heads ({heads}) and of 4; change one"
        )


def _check_psi(config: "Config") -> None:
    sadm = config.sadm
    if not config.uses("sadm"):
        return
    if sadm.psi == "teacher" and not config.uses("sd_dit"):
        raise UserError(f"sadm.psi: teacher is SD-DiT's; it needs --method sd_dit+sadm, got {config.method}")
    if sadm.psi == "teacher" and sadm.structure == "adversarial":
        raise UserError("sadm.psi: teacher follows the student and is no player; set --sadm.structure fixed")
    if sadm.psi == "latent_resnet" and sadm.psi_width % NORM_GROUP:
        raise UserError(f"sadm.psi_width: {sadm.psi_width} must be a multiple of {NORM_GROUP}; change it")
    if sadm.weight_floor > sadm.weight_cap:
        raise UserError(
            f"sadm.weight_floor: {sadm.weight_floor} is above sadm.weight_cap ({sadm.weight_cap}); lower it"
        )
    pixels = config.data.channels in (1, 3) or config.data.autoencoder is not None
    if sadm.psi == "image_resnet" and (sadm.psi_weights is None or not pixels):
        raise UserError(
            f"sadm.psi: image_resnet needs sadm.psi_weights (torchvision's resnet18) and pixels, of latents by "
            f"--data.autoencoder; data.channels is {config.data.channels}"
        )


def _check_alignment(config: "Config") -> None:
    own = config.psi_align
    if not config.uses("psi_align"):
        return
    if config.shares_psi:
        for name, default in ((field.name, field.default) for field in fields(own) if field.name.startswith("psi_")):
            asked, used = getattr(own, name), getattr(config.sadm, name)
            if asked not in (default, used):
                raise UserError(
                    f"psi_align.{name}: {asked}, but beside sadm the one Psi has sadm.{name} {used}; make them equal"
                )
    if own.psi_width % NORM_GROUP:
        raise UserError(f"psi_align.psi_width: {own.psi_width} must be a multiple of {NORM_GROUP}; change it")


def _check_sampling(config: "Config") -> None:
    process, settings = getattr(config.noise, config.noise.name), config.sample
    if settings.sampler not in (None, *process.samplers):
        choices = ", ".join(process.samplers)
        raise UserError(f"sample.sampler: {process.name} has no {settings.sampler!r}; choose one of {choices}")
    most = getattr(process, "steps", math.inf)
    if settings.steps > most:
        raise UserError(f"sample.steps: {settings.steps}; noise.{process.name}.steps allows at most {most}")
    if settings.interval and not settings.interval[0] < settings.interval[1]:
        raise UserError(f"sample.interval: {list(settings.interval)}; the first must be below the second")
    if (settings.guided_channels or 0) > config.data.channels:
        raise UserError(f"sample.guided_channels: {settings.guided_channels}; data.channels is {config.data.channels}")
