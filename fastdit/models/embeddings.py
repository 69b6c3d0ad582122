"""Embed what enters the blocks: patches, learned tokens, noise levels and positions, absolute and rotary."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.kernels import embed_tokens, rope_table

from .layers import uninitialized

TIME_FEATURES = 256
Rotation = tuple[Tensor, Tensor | None]  # `rope` and `rope_ids` of `fastdit.kernels.attention`


class PatchEmbed(nn.Module):
    """Embed patches as tokens by a GEMM over flattened patches. The weight has a convolution's layout."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return tokens (B, N, width) of x (B, C, H, W), N = H/p * W/p row by row, with positions (N, width) added.

        ids (B, keep) int64 selects tokens, in this order; None takes all. Tokens have the wider dtype of weight and
        positions.
        """
        if ids is not None:
            return embed_tokens(x, self.weight, self.bias, positions, ids)
        p = self.weight.shape[-1]
        x = x.to(self.weight.dtype).unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B C h p w p
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias) + positions


class PositionTable(nn.Module):
    """Hold the fixed table of positions. Adding it to tokens begins the residual stream and gives it its dtype.

    The table is kept as integers: a cast of the network to bf16 would round it.

    Args:
        grid, width: see `sincos_positions`.
        fp32_stream: whether the stream is fp32 where the weights are bf16.
    """

    def __init__(self, grid: tuple[int, int], width: int, fp32_stream: bool) -> None:
        super().__init__()
        self.fp32_stream = fp32_stream
        self.register_buffer("bits", sincos_positions(grid, width).view(torch.int32), persistent=False)

    def forward(self, dtype: torch.dtype) -> Tensor:
        """Return the table (rows * cols, width), in the dtype of a stream among weights of `dtype`."""
        table = self.bits.view(torch.float32)
        return table if self.fp32_stream else table.to(dtype)


class Token(nn.Module):
    """Hold one learned token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, batch: int, tokens: int) -> Tensor:
        """Return the token as a view (batch, tokens, width)."""
        return self.weight.expand(batch, tokens, -1)


class TimeEmbed(nn.Module):
    """Embed noise levels by sinusoidal features (fp32, first cosines, then sines) and an MLP.

    Frequency i of n = 128 is 10000^(-i / (n - freq_shift)). The original DiT has freq_shift 0 and diffusers' class has
    1. Weights that were trained with one are wrong with the other, so the state dict holds the shift. It is an integer,
    which survives a cast of the model to bf16.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = uninitialized(nn.Linear, TIME_FEATURES, width)
        self.fc2 = uninitialized(nn.Linear, width, width)
        self.register_buffer("freq_shift", torch.zeros((), dtype=torch.int64))

    def forward(self, t: Tensor) -> Tensor:
        """Return the embeddings (B, width) of noise levels t (B,)."""
        n = TIME_FEATURES // 2
        exponent = -math.log(10000) * torch.arange(n, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(exponent / (n - self.freq_shift))
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Return the fixed 2-D position table (rows * cols, width) in fp32, computed in fp64 like the original DiT's.

    The first half encodes the column and the second half the row, each as the sines, then the cosines, of
    coordinate * 10000^(-i / (width / 4)).
    """
    rows, cols = np.indices(grid, dtype=np.float64).reshape(2, -1)
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = [np.outer(coordinate, omega) for coordinate in (cols, rows)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.tensor(table, dtype=torch.float32)


class RotaryTable(nn.Module):
    """Hold the rotation of each token's queries and keys: see `fastdit.kernels.rope_table`.

    The state dict holds theta, so that weights trained with rotation are told from weights trained without. The table
    is kept as integers: a cast of the network to bf16 would round fp32 angles.

    Args:
        grid: rows and columns of patches.
        head_dim: channels of a head, a multiple of 4.
        class_token: whether a class token precedes the patches. It has no position and is not rotated.
    """

    def __init__(self, grid: tuple[int, int], head_dim: int, class_token: bool = False) -> None:
        super().__init__()
        theta = 10000
        table = rope_table(grid, head_dim, theta=theta)
        if class_token:
            table = torch.cat([F.pad(table.new_ones(1, head_dim // 2), (0, head_dim // 2)), table])
        self.class_token = class_token
        self.register_buffer("theta", torch.tensor(theta))
        self.register_buffer("bits", table.view(torch.int32), persistent=False)

    def forward(self, visible: Tensor | None = None) -> Rotation:
        """Return the table, and the rows (B, tokens) of the tokens; None if token n has row n.

        visible (B, keep) int64 holds the ids of the patches that are present; None means all.
        """
        if visible is not None and self.class_token:
            visible = F.pad(visible + 1, (1, 0))
        return self.bits.view(torch.float32), visible
