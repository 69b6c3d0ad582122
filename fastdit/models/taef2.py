"""Define TAESD's variant for FLUX.2 (Ollin Boer Bohan, MIT): a small autoencoder, 8x smaller, with 32 channels.

Its weights are two plain state dicts, `*_encoder.pth` and `*_decoder.pth`, whose keys are the layers' positions in the
sequences below. Pictures are in [0, 1] here.
"""

import torch
from torch import Tensor, nn

WIDTH, CHANNELS, FACTOR = 64, 32, 8


def encoder() -> nn.Sequential:
    """Return the encoder, which maps pictures (B, 3, H, W) to latents (B, 32, H/8, W/8)."""
    layers = [_conv(3, WIDTH), Block()]
    for stage in range(3):
        layers += [_conv(WIDTH, WIDTH, stride=2, bias=False), *(Block(pool=stage == 2) for _ in range(3))]
    return nn.Sequential(*layers, _conv(WIDTH, CHANNELS))


def decoder() -> nn.Sequential:
    """Return the decoder, which maps latents (B, 32, h, w) to pictures (B, 3, 8 * h, 8 * w)."""
    layers = [SoftClamp(), _conv(CHANNELS, WIDTH), nn.ReLU()]
    for stage in range(3):
        layers += [*(Block(pool=stage == 0) for _ in range(3)), nn.Upsample(scale_factor=2)]
        layers += [_conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*layers, Block(), _conv(WIDTH, 3))


class Block(nn.Module):
    """Apply relu(x + three convolutions of x). With `pool`, first add a normalized branch of 1x1 convolutions to x."""

    def __init__(self, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH), nn.ReLU(), _conv(WIDTH, WIDTH))
        self.pool = None
        if pool:
            inner = 4 * WIDTH
            first, last = (nn.Conv2d(*widths, 1, bias=False) for widths in ((WIDTH, inner), (inner, WIDTH)))
            self.pool = nn.Sequential(first, nn.GroupNorm(4, inner), nn.ReLU(), last)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(x + self.conv(x))


class SoftClamp(nn.Module):
    """Map values smoothly to between -3 and 3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def _conv(before: int, after: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, 3, stride, padding=1, bias=bias)
