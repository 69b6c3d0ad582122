"""Define the diffusion transformer (DiT, Peebles and Xie, arXiv 2212.09748): adaLN-Zero blocks over patches.

`Encoder` holds everything up to the last block. `DiT` adds the layer that turns tokens into an image.

A step is organized to move as little memory as the mathematics allows:

    [modulated qkv -> attention -> projection -> modulated fc1 -> GELU fc2] x depth -> modulated head

A modulated linear layer fuses four operations: add the previous branch (gated) to the residual stream, LayerNorm,
modulate, matmul. A block therefore leaves its MLP's output to the next block's qkv, and the last block leaves it to the
head. The modulation vectors depend on (t, y) only: one Linear computes them for the whole network, and each block reads
its six in place.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit.errors import UserError
from fastdit.kernels import attention, embed_tokens, fp8_linear, gelu_linear, modulated_linear

# Table 1 of the paper. A model's name adds the patch size, as in "S/2".
SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}
TIME_FEATURES = 256


class Encoded(NamedTuple):
    """Hold the output of the blocks: the residual stream x + gate * branch in parts, and the next layer's vectors."""

    x: Tensor  # (B, tokens, width)
    branch: Tensor  # (B, tokens, width)
    gate: Tensor  # (B, width), as are the others
    scale: Tensor
    shift: Tensor
    condition: Tensor  # silu(time + label)


class Encoder(nn.Module):
    """Run patches and condition through all blocks. The owner fills the weights with `init_weights`.

    Args:
        input_size: side, or (height, width), of the image or latent; multiples of `patch`.
        patch, channels, width, depth, heads, mlp_ratio: the architecture; see `SIZES`.
        classes: number of classes; labels are 0..classes-1.
        null_class: whether to add one label, `classes`, which means "no class" (for guidance). The caller drops labels.
        class_token: whether to put a learned token, without a position, in front of the patches.
        attention_backend: see `fastdit.kernels.attention`.
        grad_checkpoint: whether to keep only the blocks' inputs for the backward pass and recompute the rest.

    Raises UserError if sizes do not fit together.
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
        class_token: bool = False,
        attention_backend: str = "auto",
        grad_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        # `copy_blocks` builds an encoder of another depth from these.
        self.arguments = {
            "input_size": input_size,
            "patch": patch,
            "channels": channels,
            "width": width,
            "depth": depth,
            "heads": heads,
            "mlp_ratio": mlp_ratio,
            "classes": classes,
            "null_class": null_class,
            "class_token": class_token,
            "attention_backend": attention_backend,
            "grad_checkpoint": grad_checkpoint,
        }

        # Check the sizes.
        rows, cols = (input_size, input_size) if isinstance(input_size, int) else input_size
        sizes = {"input_size": min(rows, cols), "patch": patch, "channels": channels, "width": width}
        for field, value in (sizes | {"depth": depth, "heads": heads, "classes": classes}).items():
            if value < 1:
                raise UserError(f"{field}: {value} must be at least 1")
        if rows % patch or cols % patch:
            raise UserError(f"input_size: {rows}x{cols} is not a multiple of patch {patch}; change one of them")
        check_heads(width, heads)
        self.input_size, self.grid = (rows, cols), (rows // patch, cols // patch)
        self.patch, self.channels = patch, channels
        self.width, self.depth, self.heads, self.mlp_width = width, depth, heads, int(width * mlp_ratio)
        self.classes, self.null_class = classes, null_class
        self.grad_checkpoint = grad_checkpoint

        # Build the layers without initial values.
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.register_buffer("pos_embed", sincos_positions(self.grid, width), persistent=False)
        self.class_token = Token(width) if class_token else None
        self.time_embed = TimeEmbed(width)
        self.label_embed = uninitialized(nn.Embedding, classes + null_class, width)
        self.adaln = uninitialized(nn.Linear, width, (6 * depth + 2) * width)
        self.blocks = nn.ModuleList(Block(width, heads, self.mlp_width, attention_backend) for _ in range(depth))
        self.gains: BlockScale | None = None  # see fastdit.models.finetune

    def forward(self, x: Tensor, t: Tensor, y: Tensor, visible: Tensor | None = None) -> Encoded:
        """Encode x (B, channels, H, W) at noise levels t (B,), as the noise process gives them, with int labels y (B,).

        visible (B, keep) int64 selects the patches that enter, counted row by row; None takes all. The class token
        comes first. Raises ValueError for other shapes. The caller excludes labels and patches out of range.
        """
        self._check(x, t, y)
        c, vectors = self.condition(t, y)
        x = self.patch_embed(x, self.pos_embed, visible)
        if self.class_token is not None:
            x = torch.cat([self.class_token(x.shape[0], 1), x], dim=1)
        x, branch, gate = run_blocks(self.blocks, x, vectors, self.grad_checkpoint)
        shift, scale = vectors[-2:]
        return Encoded(x, branch, gate, scale, shift, c)

    def condition(self, t: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return silu(time + label) (B, width), and six modulation vectors a block and two more, each (B, width)."""
        c = F.silu(self.time_embed(t) + self.label_embed(y))
        vectors = self.adaln(c).unflatten(1, (-1, self.width))
        if self.gains is not None:
            vectors = self.gains(vectors)
        return c, vectors.unbind(1)  # views

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        """Raise ValueError unless shapes and the labels' dtype are those of `forward`."""
        expected = (self.channels, *self.input_size)
        if x.dim() != 4 or tuple(x.shape[1:]) != expected:
            raise ValueError(f"x must be (B, {', '.join(map(str, expected))}), got {tuple(x.shape)}")
        for name, vector in (("t", t), ("y", y)):
            if tuple(vector.shape) != (x.shape[0],):
                raise ValueError(f"{name} must be (B,) = ({x.shape[0]},), got {tuple(vector.shape)}")
        if y.is_floating_point():
            raise ValueError(f"y must hold integer labels, got {y.dtype}")


class DiT(Encoder):
    """Predict noise, x0 or a velocity with a class-conditional diffusion transformer.

    Args:
        out_channels: channels of the output; None: `channels`. DDPM with learned variance needs twice as many.
        seed: seed of the initial weights. The global random state is neither read nor advanced.
        sizes: arguments of `Encoder`.
    """

    def __init__(self, *, out_channels: int | None = None, seed: int = 0, **sizes) -> None:
        super().__init__(**sizes)
        self.out_channels = out_channels or self.channels
        self.head = uninitialized(ModulatedLinear, self.width, self.patch * self.patch * self.out_channels)
        init_weights(self, seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the output (B, out_channels, H, W) of x (B, channels, H, W), noise levels t (B,), int labels y (B,).

        The output has the weights' dtype (under autocast: its dtype). Raises ValueError for other shapes. The caller
        excludes labels out of range.
        """
        x, branch, gate, scale, shift, _ = super().forward(x, t, y)
        _, out = self.head(x, branch, gate, scale, shift)
        return unpatchify(out, self.grid, self.patch)


def run_blocks(
    blocks: Sequence[nn.Module],
    x: Tensor,
    vectors: Sequence[Tensor],
    grad_checkpoint: bool = False,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the residual stream x + gate * branch (B, N, width) through all blocks, and return its three parts.

    Each block takes the next six of `vectors`. branch and gate are None if x is the whole stream.
    """
    for i, block in enumerate(blocks):
        six = vectors[6 * i : 6 * i + 6]
        if grad_checkpoint and torch.is_grad_enabled():
            x, branch = checkpoint(block, x, branch, gate, *six, use_reentrant=False, preserve_rng_state=False)
        else:
            x, branch = block(x, branch, gate, *six)
        gate = six[-1]
    return x, branch, gate


def check_heads(width: int, heads: int, prefix: str = "") -> None:
    """Raise UserError unless the width is a multiple of the heads, and of 4 for the position table.

    prefix: the beginning of both settings' names in the message, such as "decoder_".
    """
    if width % heads or width % 4:
        raise UserError(
            f"{prefix}width: {width} must be a multiple of {prefix}heads ({heads}) and of 4; change one of them"
        )


@torch.no_grad()
def copy_blocks(encoder: Encoder, count: int) -> Encoder:
    """Return an encoder of the first `count` blocks, with a copy of their weights.

    A weight that spans the blocks, such as `adaln`, is cut to its leading rows. The `Encoded.scale` and `shift` of the
    result are therefore those with which block `count` modulates its input.
    """
    part = Encoder(**encoder.arguments | {"depth": count})
    if encoder.gains is not None:
        part.gains = BlockScale(count, part.width)
    whole = encoder.state_dict()
    cut = {name: whole[name].flatten()[: value.numel()].view_as(value) for name, value in part.state_dict().items()}
    part.load_state_dict(cut)
    return part


@torch.no_grad()
def init_weights(module: nn.Module, seed: int) -> None:
    """Fill the weights as the original DiT does (arXiv 2212.09748), in place. Weights on the meta device stay there.

    Linear layers are Xavier-initialized, biases are zero, and the timestep MLP, the label table and learned tokens are
    N(0, 0.02). Modulation and output layers are zero, so every block starts as the identity and the output as zero.
    """
    parameters = list(module.named_parameters())
    if parameters[0][1].is_meta:
        return
    generator = torch.Generator(parameters[0][1].device).manual_seed(seed)
    for name, weight in parameters:
        parts = set(name.split("."))
        if "bias" in parts or parts & {"adaln", "head"}:
            weight.zero_()
        elif parts & {"time_embed", "label_embed", "class_token", "mask_token"}:
            weight.normal_(std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(weight.flatten(1), generator=generator)


class Block(nn.Module):
    """Apply attention, then an MLP, to any number of tokens."""

    def __init__(self, width: int, heads: int, mlp_width: int, attention_backend: str) -> None:
        super().__init__()
        self.heads, self.attention_backend = heads, attention_backend
        self.qkv = uninitialized(ModulatedLinear, width, 3 * width)
        self.proj = uninitialized(Linear, width, width)
        # qkv keeps the input of fc1 already, so that keeping it again costs nothing.
        self.fc1 = uninitialized(ModulatedLinear, width, mlp_width, keep_x=True)
        self.fc2 = uninitialized(GeluLinear, mlp_width, width)

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
        """Return the residual stream before the MLP is added, and the MLP's output before mlp_gate, (B, N, width) each.

        x (B, N, width) is the stream to which the previous block's gate * y is still to be added; y and gate are None
        if there is no such branch. The vectors are (B, width).
        """
        x, qkv = self.qkv(x, y, gate, attn_scale, attn_shift)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        y = self.proj(attention(q, k, v, backend=self.attention_backend).flatten(2))
        x, hidden = self.fc1(x, y, attn_gate, mlp_scale, mlp_shift)
        return x, self.fc2(hidden)


# Each of these modules calls its kernel from its own forward, because ZeRO-3 gathers a module's weights there.


class Linear(nn.Linear):
    """Apply a linear layer, with fp8 products if `use_fp8` chose them."""

    fp8 = False

    def forward(self, x: Tensor) -> Tensor:
        """Return linear(x)."""
        return fp8_linear(x, self.weight, self.bias) if self.fp8 else super().forward(x)


class ModulatedLinear(Linear):
    """Apply a linear layer to a modulated LayerNorm: see `fastdit.kernels.modulated_linear`."""

    def __init__(self, *sizes: int, keep_x: bool = False, device: torch.device | None = None) -> None:
        super().__init__(*sizes, device=device)
        self.keep_x = keep_x

    def forward(
        self, x: Tensor, y: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (x + gate * y, linear(LN(x + gate * y) * (1 + scale) + shift)).

        x and y are (B, N, width), and the vectors (B, width). y and gate are None for no branch.
        """
        return modulated_linear(x, y, gate, scale, shift, self.weight, self.bias, keep_x=self.keep_x, fp8=self.fp8)


class GeluLinear(Linear):
    """Apply a linear layer to a GELU: see `fastdit.kernels.gelu_linear`."""

    def forward(self, u: Tensor) -> Tensor:
        """Return linear(gelu(u)), with the tanh form of GELU."""
        return gelu_linear(u, self.weight, self.bias, fp8=self.fp8)


class PatchEmbed(nn.Module):
    """Embed patches as tokens by a GEMM over flattened patches. The weight has a convolution's layout."""

    def __init__(self, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, channels, patch, patch))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, positions: Tensor, ids: Tensor | None = None) -> Tensor:
        """Return tokens (B, N, width) of x (B, C, H, W), N = H/p * W/p row by row, with positions (N, width) added.

        ids (B, keep) int64 selects tokens, in this order; None takes all.
        """
        if ids is not None:
            return embed_tokens(x, self.weight, self.bias, positions, ids)
        p = self.weight.shape[-1]
        x = x.to(self.weight.dtype).unflatten(3, (-1, p)).unflatten(2, (-1, p))  # B C h p w p
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        embedded = F.linear(patches, self.weight.flatten(1), self.bias)
        return embedded + positions.to(embedded.dtype)


class Token(nn.Module):
    """Hold one learned token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, batch: int, tokens: int) -> Tensor:
        """Return the token as a view (batch, tokens, width)."""
        return self.weight.expand(batch, tokens, -1)


class BlockScale(nn.Module):
    """Scale the gates of each block's attention and MLP by learned factors, which start at one."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(depth, 2, width))

    def forward(self, vectors: Tensor) -> Tensor:
        """Return the modulation vectors (B, 6 * depth + 2, width) with scaled gates."""
        one = torch.ones_like(self.weight[:, 0])
        attention, mlp = self.weight.unbind(1)
        factors = torch.stack([one, one, attention, one, one, mlp], dim=1).flatten(0, 1)
        return torch.cat([vectors[:, :-2] * factors, vectors[:, -2:]], dim=1)


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


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Return the image (B, C, h * p, w * p) of tokens (B, h * w, p * p * C) in the order row, column, channel."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # B h w p p C
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def flops_per_image(model: DiT) -> int:
    """Return the FLOPs of all matrix products for one image, forward and backward: 3 x 2 x multiply-adds."""
    tokens = math.prod(model.grid)
    return 6 * (encoder_products(model, tokens) + tokens * model.patch**2 * model.out_channels * model.width)


def encoder_products(encoder: Encoder, tokens: int) -> int:
    """Return the multiply-adds of an encoder's forward pass over `tokens` tokens of one image."""
    width, depth = encoder.width, encoder.depth
    conditioning = TIME_FEATURES * width + width * width + (6 * depth + 2) * width * width
    patches = tokens * encoder.patch**2 * encoder.channels * width
    return depth * block_products(tokens, width, encoder.mlp_width) + patches + conditioning


def block_products(tokens: int, width: int, mlp_width: int) -> int:
    """Return the multiply-adds of a block's forward pass for one image: linear layers, q k^T and the product with v."""
    return tokens * (4 * width * width + 2 * width * mlp_width + 2 * tokens * width)


def uninitialized(kind: type[nn.Module], *sizes: int, **options: bool) -> nn.Module:
    """Build a module without initial values, which would take time and global random numbers; see `init_weights`."""
    return nn.utils.skip_init(kind, *sizes, device=torch.get_default_device(), **options)
