"""Define the diffusion transformer (DiT, Peebles and Xie, arXiv 2212.09748): adaLN-Zero blocks over patches.

`Encoder` holds everything up to the last block. `DiT` adds the layer that turns tokens into an image.

A step is organized to move as little memory as the mathematics allows:

    [modulated qkv -> attention -> projection -> modulated fc1 -> GELU fc2] x depth -> modulated head

A modulated linear layer fuses four operations: add the previous branch (gated) to the residual stream, LayerNorm,
modulate, matmul. A block therefore leaves its MLP's output to the next block's qkv, and the last block leaves it to the
head. The modulation vectors depend on (t, y) only: one Linear computes them for the whole network, and each block reads
its six in place.

On GPUs, a layer of a block does not compute its bias's gradient. It takes the bias detached, and the bias is passed to
the operation that reads the layer's output, whose backward pass writes the output's gradient and sums up its columns:

    qkv.bias -> split_qkv      proj.bias -> modulated fc1      fc1.bias -> GELU fc2      fc2.bias -> next block's qkv
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit.errors import UserError
from fastdit.kernels import attention, split_qkv, sums_biases

from .embeddings import TIME_FEATURES, PatchEmbed, PositionTable, RotaryTable, Rotation, TimeEmbed, Token
from .layers import GeluLinear, Linear, ModulatedLinear, uninitialized

# Table 1 of the paper. A model's name adds the patch size, as in "S/2".
SIZES: dict[str, dict[str, int]] = {
    "S": {"depth": 12, "width": 384, "heads": 6},
    "B": {"depth": 12, "width": 768, "heads": 12},
    "L": {"depth": 24, "width": 1024, "heads": 16},
    "XL": {"depth": 28, "width": 1152, "heads": 16},
}


class Encoded(NamedTuple):
    """Hold the output of the blocks: the residual stream x + gate * branch in parts, and the next layer's vectors."""

    x: Tensor  # (B, tokens, width), in the stream's dtype; the others have the weights'
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
        qk_norm: whether blocks divide each head's queries and keys by their root mean square, with learned weights.
        rope: whether blocks rotate queries and keys by their patches' positions: see `fastdit.kernels.norm_rotate`.
        fp32_stream: whether the residual stream is fp32 where the weights are bf16. Else it has the weights' dtype.

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
        qk_norm: bool = False,
        rope: bool = False,
        fp32_stream: bool = True,
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
            "qk_norm": qk_norm,
            "rope": rope,
            "fp32_stream": fp32_stream,
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
        check_head_dim(width, heads, qk_norm, rope)
        self.input_size, self.grid = (rows, cols), (rows // patch, cols // patch)
        self.patch, self.channels = patch, channels
        self.width, self.depth, self.heads, self.mlp_width = width, depth, heads, int(width * mlp_ratio)
        self.classes, self.null_class = classes, null_class
        self.grad_checkpoint, self.qk_norm = grad_checkpoint, qk_norm

        # Build the layers without initial values.
        self.patch_embed = PatchEmbed(patch, channels, width)
        self.positions = PositionTable(self.grid, width, fp32_stream)
        self.rope = RotaryTable(self.grid, width // heads, class_token) if rope else None
        self.class_token = Token(width) if class_token else None
        self.time_embed = TimeEmbed(width)
        self.label_embed = uninitialized(nn.Embedding, classes + null_class, width)
        self.adaln = uninitialized(nn.Linear, width, (6 * depth + 2) * width)
        sizes = width, heads, self.mlp_width
        self.blocks = nn.ModuleList(Block(*sizes, attention_backend, qk_norm) for _ in range(depth))
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
        x, branch, gate = run_blocks(self.blocks, x, vectors, self.grad_checkpoint, rotation=self.rotation(visible))
        shift, scale = vectors[-2:]
        return Encoded(x, branch, gate, scale, shift, c)

    @property
    def pos_embed(self) -> Tensor:
        """Return the positions' table (patches, width), in the stream's dtype."""
        return self.positions(self.patch_embed.weight.dtype)

    def rotation(self, visible: Tensor | None = None) -> Rotation | None:
        """Return the rotation of the patches `visible` (B, keep), None for all; it is None without `rope`."""
        return None if self.rope is None else self.rope(visible)

    def condition(self, t: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return silu(time + label) (B, width), and six modulation vectors a block and two more, each (B, width)."""
        time = self.time_embed(t)
        # All blocks share the condition, so that its error adds up: it is rounded once.
        wide = time.to(torch.promote_types(time.dtype, torch.float32))
        c = F.silu(wide + self.label_embed(y)).to(time.dtype)
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
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the residual stream x + gate * branch (B, N, width) through all blocks, and return its three parts.

    Each block takes the next six of `vectors`. branch and gate are None if x is the whole stream. rotation is that of
    the tokens' queries and keys, if there is one.
    """
    bias = None  # of the layer that made the branch, if its gradient is left to the block that adds the branch
    for i, block in enumerate(blocks):
        six = vectors[6 * i : 6 * i + 6]
        # The caller may use the last block's branch twice, so that block computes its bias's gradient itself.
        passes_on = i + 1 < len(blocks) and block.passes_biases(x)
        others = {"y_bias": bias, "passes_on": passes_on, "rotation": rotation}
        if grad_checkpoint and torch.is_grad_enabled():
            options = {"use_reentrant": False, "preserve_rng_state": False}
            x, branch = checkpoint(block, x, branch, gate, *six, **options, **others)
        else:
            x, branch = block(x, branch, gate, *six, **others)
        gate, bias = six[-1], block.fc2.bias if passes_on else None
    return x, branch, gate


def keep_biases(network: nn.Module) -> None:
    """Let each layer of each block of `network` compute its bias's gradient itself, as ZeRO-3 requires.

    ZeRO-3 gathers a weight for its own module's forward pass only.
    """
    for module in network.modules():
        if isinstance(module, Block):
            module.keeps_biases = True


def check_heads(width: int, heads: int, prefix: str = "") -> None:
    """Raise UserError unless the width is a multiple of the heads, and of 4 for the position table.

    prefix: the beginning of both settings' names in the message, such as "decoder_".
    """
    if width % heads or width % 4:
        raise UserError(
            f"{prefix}width: {width} must be a multiple of {prefix}heads ({heads}) and of 4; change one of them"
        )


def check_head_dim(width: int, heads: int, qk_norm: bool, rope: bool, prefix: str = "") -> None:
    """Raise UserError unless a head's channels can be normalized and rotated; prefix: as in `check_heads`."""
    step, setting = (4, "rope") if rope else (2 if qk_norm else 1, "qk_norm")
    if width // heads % step:
        raise UserError(
            f"{prefix}heads: {heads} in {prefix}width {width} leave {width // heads} channels to a head, and "
            f"model.{setting} needs a multiple of {step}; change one of them"
        )


@torch.no_grad()
def copy_blocks(encoder: Encoder, count: int) -> Encoder:
    """Return an encoder of the first `count` blocks, with a copy of their weights and without gradient checkpointing.

    A weight that spans the blocks, such as `adaln`, is cut to its leading rows. The `Encoded.scale` and `shift` of the
    result are therefore those with which block `count` modulates its input.
    """
    part = Encoder(**encoder.arguments | {"depth": count, "grad_checkpoint": False})
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
    The weights of norms are one.
    """
    parameters = list(module.named_parameters())
    if parameters[0][1].is_meta:
        return
    generator = torch.Generator(parameters[0][1].device).manual_seed(seed)
    for name, weight in parameters:
        parts = set(name.split("."))
        if "bias" in parts or parts & {"adaln", "head"}:
            weight.zero_()
        elif parts & {"q_norm", "k_norm"}:
            weight.fill_(1.0)
        elif parts & {"time_embed", "label_embed", "class_token", "mask_token"}:
            weight.normal_(std=0.02, generator=generator)
        else:
            nn.init.xavier_uniform_(weight.flatten(1), generator=generator)


class Block(nn.Module):
    """Apply attention, then an MLP, to any number of tokens."""

    def __init__(self, width: int, heads: int, mlp_width: int, attention_backend: str, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads, self.attention_backend = heads, attention_backend
        self.keeps_biases = False  # see `keep_biases`
        self.qkv = uninitialized(ModulatedLinear, width, 3 * width)
        self.proj = uninitialized(Linear, width, width)
        # qkv keeps the input of fc1 already, so that keeping it again costs nothing.
        self.fc1 = uninitialized(ModulatedLinear, width, mlp_width, keep_x=True)
        self.fc2 = uninitialized(GeluLinear, mlp_width, width)
        # The heads share the weights. ZeRO-3 gathers them for the block's forward pass, which uses them.
        self.q_norm = nn.Parameter(torch.empty(width // heads)) if qk_norm else None
        self.k_norm = nn.Parameter(torch.empty(width // heads)) if qk_norm else None

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
        y_bias: Tensor | None = None,
        passes_on: bool = False,
        rotation: Rotation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the residual stream before the MLP is added, and the MLP's output before mlp_gate, (B, N, width) each.

        x (B, N, width) is the stream to which the previous block's gate * y is still to be added; y and gate are None
        if there is no such branch. The vectors are (B, width).

        y_bias: the bias of the layer that made y, if its gradient is to be computed here.
        passes_on: leave the gradient of `fc2.bias` to the caller, who passes it to the next block as `y_bias`.
        rotation: the rotation of queries and keys by position.
        """
        # Pass each layer's bias on to the operation that computes its gradient.
        qkv_bias = proj_bias = fc1_bias = None
        passes = self.passes_biases(x)
        if passes:
            qkv_bias, proj_bias, fc1_bias = self.qkv.bias, self.proj.bias, self.fc1.bias

        x, qkv = self.qkv(x, y, gate, attn_scale, attn_shift, y_bias, passes)
        q, k, v = split_qkv(qkv, self.heads, qkv_bias)
        table, ids = rotation or (None, None)
        qk_norm = False if self.q_norm is None else (self.q_norm, self.k_norm)
        y = attention(q, k, v, backend=self.attention_backend, qk_norm=qk_norm, rope=table, rope_ids=ids)
        y = self.proj(y.flatten(2), passes)
        x, hidden = self.fc1(x, y, attn_gate, mlp_scale, mlp_shift, proj_bias, passes)
        return x, self.fc2(hidden, fc1_bias, passes_on)

    def passes_biases(self, x: Tensor) -> bool:
        """Return whether the block's layers leave their bias gradients to the operations that read their outputs."""
        return not self.keeps_biases and sums_biases(x)


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
