"""The diffusion transformer (DiT, Peebles and Xie, arXiv 2212.09748): adaLN-Zero blocks over image patches.

The step's shape, as few passes over memory as the mathematics needs:

    [modulated qkv -> attention -> projection -> modulated fc1 -> GELU fc2] x depth -> modulated head

A modulated linear adds to the residual stream what is still to be added, norms and modulates the sum and multiplies:
one pass over memory, then one product. So a block leaves its MLP's output to the next block's qkv, the last one to the
head. The modulation vectors depend only on (t, y): one Linear computes them for the whole network, and each block reads
its six in place.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit.errors import UserError
from fastdit.kernels import attention, gelu_linear, modulated_linear

# Table 1 of the paper; the model's name adds the patch: "S/2".
SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}
TIME_FEATURES = 256


class DiT(nn.Module):
    """Class-conditional diffusion transformer.

    Args:
        input_size: side, or (height, width), of the image or latent; multiples of `patch`.
        patch, channels, width, depth, heads, mlp_ratio: the architecture; see `SIZES`.
        classes: number of classes; labels are 0..classes-1.
        null_class: one more label, `classes`, meaning "no class" (for guidance). The caller drops labels.
        out_channels: channels of the output, `channels` when None (DDPM with learned variance: twice that).
        attention_backend: see `fastdit.kernels.attention`.
        grad_checkpoint: keep only the blocks' inputs for the backward pass and recompute the rest.
        seed: of the initial weights; the global random state is neither read nor advanced.

    Raises UserError when sizes do not fit together.
    """

    def __init__(
        self,
        *,
        input_size: int | tuple[int, int],
        patch: int,
        channels: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        classes: int,
        null_class: bool = True,
        out_channels: int | None = None,
        attention_backend: str = "auto",
        grad_checkpoint: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        rows, cols = (input_size, input_size) if isinstance(input_size, int) else input_size
        sizes = {"input_size": min(rows, cols), "patch": patch, "channels": channels, "width": width}
        for field, value in (sizes | {"depth": depth, "heads": heads, "classes": classes}).items():
            if value < 1:
                raise UserError(f"{field}: {value} must be at least 1")
        if rows % patch or cols % patch:
            raise UserError(f"input_size: {rows}x{cols} is not a multiple of patch {patch}; change one of them")
        if width % heads or width % 4:
            raise UserError(f"width: {width} must be a multiple of heads ({heads}) and of 4; change one of them")
        self.input_size, self.grid = (rows, cols), (rows // patch, cols // patch)
        self.patch, self.channels, self.out_channels = patch, channels, out_channels or channels
        self.width, self.depth, self.heads, self.mlp_width = width, depth, heads, int(width * mlp_ratio)
        self.classes, self.null_class = classes, null_class
        self.grad_checkpoint = grad_checkpoint

        self.patch_embed = PatchEmbed(patch, channels, width)
        self.register_buffer("pos_embed", sincos_positions(self.grid, width), persistent=False)
        self.time_embed = TimeEmbed(width)
        self.label_embed = _bare(nn.Embedding, classes + null_class, width)
        self.adaln = _bare(nn.Linear, width, (6 * depth + 2) * width)
        self.blocks = nn.ModuleList(Block(width, heads, self.mlp_width, attention_backend) for _ in range(depth))
        self.head = _bare(ModulatedLinear, width, patch * patch * self.out_channels)
        self.init_weights(seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, channels, H, W); t (B,) noise level as the noise process gives it; y (B,) int labels.

        Returns (B, out_channels, H, W) in the weights' dtype (under autocast: in its dtype).
        Raises ValueError for other shapes. Labels out of range are the caller's to exclude.
        """
        self._check(x, t, y)
        c = F.silu(self.time_embed(t) + self.label_embed(y))
        vectors = self.adaln(c).unflatten(1, (-1, self.width)).unbind(1)  # views, each (B, width)

        x = self.patch_embed(x)
        x = x + self.pos_embed.to(x.dtype)
        branch = gate = None  # x still lacks gate * branch
        for i, block in enumerate(self.blocks):
            own = vectors[6 * i : 6 * i + 6]
            x, branch = self._run(block, x, branch, gate, *own)
            gate = own[-1]
        shift, scale = vectors[-2:]
        _, out = self.head(x, branch, gate, scale, shift)
        return unpatchify(out, self.grid, self.patch)

    def _run(self, block: nn.Module, *args: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
        return block(*args)

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        expected = (self.channels, *self.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        for name, vector in (("t", t), ("y", y)):
            if tuple(vector.shape) != (x.shape[0],):
                raise ValueError(f"{name} must be (B,) = ({x.shape[0]},), got {tuple(vector.shape)}")
        if y.is_floating_point():
            raise ValueError(f"y must hold integer labels, got {y.dtype}")

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """DiT's initialisation: Xavier linears, zero biases, N(0, 0.02) for the time MLP and the label table;
        zero modulation and head, so that every block starts as the identity and the output as zero."""
        device = self.adaln.weight.device
        if device.type == "meta":
            return
        generator = torch.Generator(device).manual_seed(seed)
        for name, weight in self.named_parameters():
            if name.endswith("bias") or name.startswith(("adaln", "head")):
                weight.zero_()
            elif name.startswith(("time_embed", "label_embed")):
                weight.normal_(std=0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(weight.flatten(1), generator=generator)


class Block(nn.Module):
    """Attention, then MLP, for any number of tokens."""

    def __init__(self, width: int, heads: int, mlp_width: int, attention_backend: str) -> None:
        super().__init__()
        self.heads, self.attention_backend = heads, attention_backend
        self.qkv = _bare(ModulatedLinear, width, 3 * width)
        self.proj = _bare(nn.Linear, width, width)
        self.fc1 = _bare(ModulatedLinear, width, mlp_width, keep_x=True)  # qkv keeps that tensor already
        self.fc2 = _bare(GeluLinear, mlp_width, width)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        gate: Tensor | None,
        attn_shift: Tensor,
        attn_scale: Tensor,
        attn_gate: Tensor,
        mlp_shift: Tensor,
        mlp_scale: Tensor,
        mlp_gate: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x (B, N, width) is the residual stream without gate * y, what the block before adds; None for none.

        The vectors are (B, width). Returns the stream without this block's MLP, and the MLP's output, which mlp_gate
        is still to be multiplied with.
        """
        x, qkv = self.qkv(x, y, gate, attn_scale, attn_shift)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        y = self.proj(attention(q, k, v, backend=self.attention_backend).flatten(2))
        x, hidden = self.fc1(x, y, attn_gate, mlp_scale, mlp_shift)
        return x, self.fc2(hidden)


# Each calls its kernel from its own forward, for that is where ZeRO-3 gathers a module's weights.


class ModulatedLinear(nn.Linear):
    """See `fastdit.kernels.modulated_linear`."""

    def __init__(self, *sizes: int, keep_x: bool = False, device: torch.device | None = None) -> None:
        super().__init__(*sizes, device=device)
        self.keep_x = keep_x

    def forward(
        self, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(x + gate * y, linear(LN(x + gate * y) * (1 + scale) + shift))."""
        return modulated_linear(x, y, gate, scale, shift, self.weight, self.bias, keep_x=self.keep_x)


class GeluLinear(nn.Linear):
    """See `fastdit.kernels.gelu_linear`."""

    def forward(self, u: Tensor) -> Tensor:
        """linear(gelu(u))."""
        return gelu_linear(u, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Images to tokens: a GEMM over flattened patches, its weight in a convolution's layout."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H/p * W/p, width), row by row."""
        p = self.weight.shape[-1]
        x = x.to(self.weight.dtype).unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B C h p w p
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class TimeEmbed(nn.Module):
    """Sinusoidal features of the noise level, then an MLP. Features are fp32: cosines first, then sines.

    Frequency i of n = 128 is 10000^(-i / (n - freq_shift)). The original DiT has freq_shift 0, diffusers'
    class 1, and the weights of one are a different function under the other: so the shift travels in the
    state dict. As an integer it survives a cast of the model to bf16.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = _bare(nn.Linear, TIME_FEATURES, width)
        self.fc2 = _bare(nn.Linear, width, width)
        self.register_buffer("freq_shift", torch.zeros((), dtype=torch.int64))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, width)."""
        n = TIME_FEATURES // 2
        exponent = -math.log(10000) * torch.arange(n, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(exponent / (n - self.freq_shift))
        features = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.fc2(F.silu(self.fc1(features.to(self.fc1.weight.dtype))))


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D position table (rows * cols, width): fp32 of fp64 arithmetic, as in the original DiT.

    First half: the column, second half: the row; each as the sines, then the cosines, of
    coordinate * 10000^(-i / (width / 4)).
    """
    rows, cols = np.indices(grid, dtype=np.float64).reshape(2, -1)
    omega = 1.0 / 10000 ** (np.arange(width // 4, dtype=np.float64) / (width / 4))
    angles = [np.outer(coordinate, omega) for coordinate in (cols, rows)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)
    return torch.tensor(table, dtype=torch.float32)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """(B, h * w, p * p * C) -> (B, C, h * p, w * p); within a token: row, column, channel."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # B h w p p C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def flops_per_image(model: DiT) -> int:
    """FLOPs of all matrix products for one image, forward and backward: 3 x 2 x multiply-adds."""
    tokens, width = math.prod(model.grid), model.width
    linear = 4 * width * width + 2 * width * model.mlp_width  # a block's GEMMs, per token
    products = 2 * tokens * width  # q k^T and its product with v, per token
    patches = model.patch**2 * (model.channels + model.out_channels) * width
    conditioning = TIME_FEATURES * width + width * width + (6 * model.depth + 2) * width * width
    return 6 * (tokens * (model.depth * (linear + products) + patches) + conditioning)


def _bare(kind: type[nn.Module], *sizes: int, **options: bool) -> nn.Module:
    """A module whose weights `init_weights` fills; torch's filling takes time and global random numbers."""
    return nn.utils.skip_init(kind, *sizes, device=torch.get_default_device(), **options)
