"""Decode training latents to pictures, a few at a time, with the decoder's gradient or an approximate one (ours)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .autoencoders import Autoencoder

AT_ONCE = 4  # pictures whose activations are in memory together; rounding depends on it, so it is fixed


class LatentDecoder(nn.Module):
    """Decode x (B, C, h, w) to pictures (B, 3, factor * h, factor * w), about in [-1, 1], fp32 except under autocast.

    A picture depends on its latent alone. The backward pass recomputes activations of `AT_ONCE` pictures at a time, so
    memory does not grow with the batch.

    Args:
        autoencoder: the frozen autoencoder.
        scale, shift: normalization of the training latents, x = (z - shift) * scale; numbers, or one for each channel.
    """

    def __init__(
        self, autoencoder: Autoencoder, *, scale: float | Sequence[float] = 1.0, shift: float | Sequence[float] = 0.0
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(value).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("colors", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pictures of training latents x."""
        z = x / self.scale + self.shift
        if not len(z):
            factor = self.autoencoder.factor
            return z.new_empty(0, 3, factor * z.shape[2], factor * z.shape[3])
        return torch.cat([self._decode(part) for part in z.split(AT_ONCE)])

    def _decode(self, z: Tensor) -> Tensor:
        """Decode z, and recompute activations or approximate the gradient in the backward pass."""
        if not (z.requires_grad and torch.is_grad_enabled()):
            return self.autoencoder.decode(z)
        if self.colors is None:
            return checkpoint(self.autoencoder.decode, z, use_reentrant=False, preserve_rng_state=False)
        with torch.no_grad():
            pictures = self.autoencoder.decode(z)
        # Interpolation is by the nearest cell: unlike the bilinear kernel's, its gradient is summed in a fixed order.
        blocks = F.interpolate(F.conv2d(z, self.colors[:, :, None, None]), scale_factor=float(self.autoencoder.factor))
        return pictures + (blocks - blocks.detach())

    @torch.no_grad()
    def approximate_gradient(self) -> None:
        """Replace the decoder by a linear map in the backward pass (ours). The pictures stay the same.

        The map gives all pixels of a cell the color W z. A least-squares fit of W (3, C) predicts mean colors of cells
        from their latents, for random smooth pictures that are always the same. A picture and its gradient then cost
        one pass of the decoder instead of three. The gradient depends on colors, and on shapes larger than a cell, but
        not on texture.
        """
        # Encode pictures, and average the colors of each cell.
        factor = self.autoencoder.factor
        x = _smooth_pictures(16, 8 * factor)
        mean, _ = self.autoencoder.encode(x.to(next(self.autoencoder.parameters(), x).device))
        cells = mean.movedim(1, -1).flatten(0, 2).double().cpu()
        seen = F.avg_pool2d(x, factor).movedim(1, -1).flatten(0, 2).double()

        # Fit colors to latents and a constant.
        cells = torch.cat([cells, torch.ones(len(cells), 1, dtype=cells.dtype)], dim=1)  # the constant has no gradient
        self.colors = torch.linalg.lstsq(cells, seen).solution[:-1].T.float().to(mean.device).contiguous()


def _smooth_pictures(n: int, side: int) -> Tensor:
    """Return pictures (n, 3, side, side) in [-1, 1]: equally strong random colors at every scale down to 4 pixels."""
    generator, x = torch.Generator().manual_seed(0), torch.zeros(n, 3, side, side)
    cells = 1
    while cells <= max(side // 4, 4):
        field = torch.randn(n, 3, cells, cells, generator=generator)
        x = x + F.interpolate(field, (side, side), mode="bilinear", align_corners=False)
        cells *= 2
    return (0.4 * x).tanh()
