"""Training latents to pictures, a few at a time, with or without the autoencoder's own gradient."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .autoencoders import Autoencoder

AT_ONCE = 4  # pictures whose activations are in memory together; always so many, for rounding depends on it


class LatentDecoder(nn.Module):
    """x (B, C, h, w) -> (B, 3, factor h, factor w), about [-1, 1], float32 but under autocast.

    A picture depends on its latent alone. In the backward pass activations are computed again, `AT_ONCE` pictures at a
    time, so that memory does not grow with the batch.

    scale, shift: of the training latents, x = (z - shift) * scale; numbers, or one a channel.
    """

    def __init__(
        self, autoencoder: Autoencoder, *, scale: float | Sequence[float] = 1.0, shift: float | Sequence[float] = 0.0
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        for name, value in (("scale", scale), ("shift", shift)):
            self.register_buffer(name, torch.tensor(value).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("colours", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        z = x / self.scale + self.shift
        if not len(z):
            factor = self.autoencoder.factor
            return z.new_empty(0, 3, factor * z.shape[2], factor * z.shape[3])
        return torch.cat([self._decode(part) for part in z.split(AT_ONCE)])

    def _decode(self, z: Tensor) -> Tensor:
        if not (z.requires_grad and torch.is_grad_enabled()):
            return self.autoencoder.decode(z)
        if self.colours is None:
            return checkpoint(self.autoencoder.decode, z, use_reentrant=False, preserve_rng_state=False)
        with torch.no_grad():
            pictures = self.autoencoder.decode(z)
        # Nearest: unlike the bilinear kernel's, its gradient is summed in a fixed order on GPUs.
        blocks = F.interpolate(F.conv2d(z, self.colours[:, :, None, None]), scale_factor=float(self.autoencoder.factor))
        return pictures + (blocks - blocks.detach())

    @torch.no_grad()
    def approximate_gradient(self) -> None:
        """From now on gradients pass a linear map in the decoder's place (ours); pictures stay what they are.

        The map gives each cell's pixels one colour, W z. W, (3, C), is fitted by least squares to the mean colours of
        the cells of random smooth pictures, encoded; always the same. A picture and its gradient then cost one pass of
        the decoder, not three; the gradient tells of colours and of shapes larger than a cell, and nothing of texture.
        """
        factor = self.autoencoder.factor
        x = _smooth_pictures(16, 8 * factor)
        mean, _ = self.autoencoder.encode(x.to(next(self.autoencoder.parameters(), x).device))
        cells = mean.movedim(1, -1).flatten(0, 2).double().cpu()
        seen = F.avg_pool2d(x, factor).movedim(1, -1).flatten(0, 2).double()
        cells = torch.cat([cells, torch.ones(len(cells), 1, dtype=cells.dtype)], dim=1)  # the constant has no gradient
        self.colours = torch.linalg.lstsq(cells, seen).solution[:-1].T.float().to(mean.device).contiguous()


def _smooth_pictures(n: int, side: int) -> Tensor:
    """(n, 3, side, side) in [-1, 1]: random colours at every scale alike down to four pixels, as in photographs."""
    generator, x = torch.Generator().manual_seed(0), torch.zeros(n, 3, side, side)
    cells = 1
    while cells <= max(side // 4, 4):
        field = torch.randn(n, 3, cells, cells, generator=generator)
        x = x + F.interpolate(field, (side, side), mode="bilinear", align_corners=False)
        cells *= 2
    return (0.4 * x).tanh()
