"""Make a diffusers autoencoder decode a run's own latents, as DiTPipeline decodes: `decode(x / scaling_factor)`."""

import torch
from torch import Tensor, nn

from fastdit.errors import UserError

from .autoencoders import Diffusers
from .latent_decoder import LatentDecoder


@torch.no_grad()
def pipeline_vae(decoder: LatentDecoder) -> nn.Module:
    """Return the diffusers model of `decoder`, changed in place, with which DiTPipeline decodes the run's latents.

    A run's latents are x = (z - shift) * scale of the model's z. One scale without a shift becomes `scaling_factor`.
    Scales of channels and shifts, which DiTPipeline does not know, become part of the 1x1 convolutions between both
    halves of an AutoencoderKL, with `scaling_factor` 1. Its `encode` returns the run's latents then.

    Raises UserError if the autoencoder is not diffusers', or is an AutoencoderTiny with such a shift or scales.
    """
    autoencoder = decoder.autoencoder
    if not isinstance(autoencoder, Diffusers):
        raise UserError(f"{autoencoder.name} is no autoencoder of diffusers")
    model, count = autoencoder.model, autoencoder.channels
    scale, shift = (value.flatten().double().expand(count) for value in (decoder.scale, decoder.shift))
    if not shift.any() and bool((scale == scale[0]).all()):
        model.register_to_config(scaling_factor=decoder.scale.flatten()[0].item())
        if "shift_factor" in model.config:
            model.register_to_config(shift_factor=None)
        return model
    if not hasattr(model, "post_quant_conv"):
        raise UserError(f"{autoencoder.name} is an {type(model).__name__}, which has no place for a shift of latents")

    # z = x / scale + shift before the decoder, and the posterior of x after the encoder.
    half = torch.ones_like(scale)
    model.post_quant_conv = _after(_affine(1 / scale, shift), model.post_quant_conv)
    moments = _affine(torch.cat([scale, half]), torch.cat([-shift * scale, 2 * scale.log()]))
    model.quant_conv = _after(model.quant_conv, moments)
    model.register_to_config(
        use_quant_conv=True, use_post_quant_conv=True, scaling_factor=1.0, shift_factor=None, latents_mean=None,
        latents_std=None,
    )  # fmt: skip
    return model


def _affine(factor: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Return matrix (C, C) and vector (C,) of x * factor + offset, float64."""
    return torch.diag(factor), offset


def _after(first: nn.Conv2d | tuple | None, second: nn.Conv2d | tuple | None) -> nn.Conv2d:
    """Return the 1x1 convolution that is `first`, then `second`: convolutions, matrices with vectors, or None."""
    pairs = [
        (one.weight[:, :, 0, 0].double(), one.bias.double()) if isinstance(one, nn.Conv2d) else one
        for one in (first, second)
        if one is not None
    ]
    matrix, offset = pairs[0]
    for weight, bias in pairs[1:]:
        matrix, offset = weight @ matrix, weight @ offset + bias
    joined = nn.Conv2d(matrix.shape[1], matrix.shape[0], 1)
    joined.weight.copy_(matrix[:, :, None, None])
    joined.bias.copy_(offset)
    return joined.requires_grad_(False)
