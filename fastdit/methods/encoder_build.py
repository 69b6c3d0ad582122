"""Build the encoder Psi of `sadm` and `psi_align`, and count the FLOPs of its forward pass."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastdit.methods.denoising import Shape
from fastdit.models import LatentDecoder, LatentResNet, load_structure_encoder


def build_latent_resnet(settings, shape: Shape, seed: int) -> LatentResNet:
    """Return Psi on the CPU, built by a method's `psi_` settings, with the weights of their file if they name one.

    Raises UserError if the file cannot be read.
    """
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


def count_flops(network: nn.Module, shape: Shape) -> int:
    """Return the FLOPs of a forward pass of `network` for one sample."""
    # A pass of a decoder costs as much as one of a large DiT, so it is counted on the meta device.
    device = "meta" if isinstance(network, LatentDecoder) else "cpu"
    weights = {name: value.to(device) for name, value in (*network.named_parameters(), *network.named_buffers())}
    x = torch.zeros(1, shape.channels, shape.height, shape.width, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        torch.func.functional_call(network.eval(), weights, x)
    return counter.get_total_flops()
