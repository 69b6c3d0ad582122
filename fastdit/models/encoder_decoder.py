"""Define SD-DiT's network with an extra decoder: a DiT encodes the visible patches, and a light decoder sees all.

The layout is MaskDiT's (Zheng et al., arXiv 2306.09305), but without its mask token (ours): a hidden patch enters the
decoder as its own noised pixels.

    visible patches ----> encoder ----> bridge --+
                                                 +--> + positions --> decoder blocks --> head --> image
    hidden patches, embedded by the encoder's    |
    first layer ----------------------> bridge --+

The bridge is one adaLN-modulated linear layer to the decoder's width. MaskDiT's bridge starts at zero and ours does
not: the zero head alone makes the first output zero, so the encoder gets gradients as soon as the head has moved. With
nothing hidden, as in sampling, this is an ordinary, deeper DiT. `split_dit` has the variant without extra blocks.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from fastdit.kernels import scatter_tokens

from .dit import (
    Block,
    Encoded,
    Encoder,
    block_products,
    check_head_dim,
    check_heads,
    init_weights,
    run_blocks,
    unpatchify,
)
from .embeddings import PositionTable, RotaryTable, Token
from .layers import ModulatedLinear, uninitialized
from .streams import GradientRatio, Stream

HiddenTokens = Literal["noised_patch", "mask_token", "zeros"]


class EncoderDecoder(nn.Module):
    """Hold a class-conditional encoder and decoder, which together are called like a `DiT`.

    Args:
        encoder: the encoder, with or without a class token. The decoder has its `qk_norm`, `rope`, `fp32_stream` and
            `grad_checkpoint`.
        out_channels: channels of the output.
        width, depth, heads: sizes of the decoder.
        hidden_tokens: the decoder's input at hidden patches: their noised pixels, one learned token, or zeros.
        attention_backend: see `fastdit.kernels.attention`.
        seed: seed of the initial weights, including the encoder's.

    Raises UserError if sizes do not fit together, and ValueError for another `hidden_tokens`.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        out_channels: int,
        width: int,
        depth: int,
        heads: int,
        hidden_tokens: HiddenTokens = "noised_patch",
        attention_backend: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_heads(width, heads, "decoder_")
        check_head_dim(width, heads, encoder.qk_norm, encoder.rope is not None, "decoder_")
        if hidden_tokens not in get_args(HiddenTokens):
            raise ValueError(f"hidden_tokens={hidden_tokens!r}: choose one of {', '.join(get_args(HiddenTokens))}")
        self.hidden_tokens, self.channels, self.out_channels = hidden_tokens, encoder.channels, out_channels
        self.width, self.heads, self.grid = encoder.width, encoder.heads, encoder.grid
        self.gradients: GradientRatio | None = None  # a method that measures gradients sets it
        self.encoder = encoder
        self.bridge = uninitialized(ModulatedLinear, encoder.width, width)
        self.mask_token = Token(width) if hidden_tokens == "mask_token" else None
        self.decoder = Decoder(
            encoder.grid,
            encoder.patch,
            out_channels,
            encoder.width,
            width,
            depth,
            heads,
            attention_backend,
            encoder.grad_checkpoint,
            encoder.qk_norm,
            encoder.rope is not None,
            encoder.positions.fp32_stream,
        )
        init_weights(self, seed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the output (B, out_channels, H, W) with nothing hidden; the arguments are those of `DiT`."""
        return self.generate(x, t, y, None)[0]

    def generate(self, x: Tensor, t: Tensor, y: Tensor, split: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Stream]:
        """Return the output (B, out_channels, H, W), and the encoder's tokens (B, [1 +] keep, width).

        The class token comes first. split holds the ids (B, keep) of the visible and (B, N - keep) of the hidden
        patches, int64; None hides nothing. The other arguments are those of `DiT`.
        """
        # Encode the visible patches, and fork the stream for the discriminative loss.
        encoded = self.encoder(x, t, y, split and split[0])
        seen, compared = self.gradients.fork(encoded.x) if self.gradients else (encoded.x, encoded.x)
        stream = Stream(compared, encoded.branch, encoded.gate)

        # Decode all patches: the hidden ones enter here.
        _, tokens = self.bridge(seen, encoded.branch, encoded.gate, encoded.scale, encoded.shift)
        if self.encoder.class_token is not None:
            tokens = tokens[:, 1:]
        if split is not None:
            tokens = scatter_tokens(tokens, split[0], self._hidden(x, encoded, split[1], tokens))
        return self.decoder(tokens, encoded.condition), stream

    def _hidden(self, x: Tensor, encoded: Encoded, hidden: Tensor, like: Tensor) -> Tensor:
        """Return the decoder's input (B, N, decoder width) at the hidden patches; other positions hold anything."""
        batch, tokens = x.shape[0], self.grid[0] * self.grid[1]
        if self.mask_token is not None:
            return self.mask_token(batch, tokens)
        zeros = like.new_zeros(()).expand(batch, tokens, like.shape[2])
        if self.hidden_tokens == "zeros":
            return zeros
        patches = self.encoder.patch_embed(x, self.encoder.pos_embed, hidden)
        _, patches = self.bridge(patches, None, None, encoded.scale, encoded.shift)
        return scatter_tokens(patches, hidden, zeros)


class Decoder(nn.Module):
    """Turn tokens into an image, conditioned like the encoder."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch: int,
        out_channels: int,
        condition_width: int,
        width: int,
        depth: int,
        heads: int,
        attention_backend: str,
        grad_checkpoint: bool,
        qk_norm: bool,
        rope: bool,
        fp32_stream: bool,
    ) -> None:
        super().__init__()
        self.grad_checkpoint = grad_checkpoint
        self.grid, self.patch, self.width, self.depth = grid, patch, width, depth
        self.positions = PositionTable(grid, width, fp32_stream)
        self.adaln = uninitialized(nn.Linear, condition_width, (6 * depth + 2) * width)
        self.rope = RotaryTable(grid, width // heads) if rope else None
        self.blocks = nn.ModuleList(Block(width, heads, 4 * width, attention_backend, qk_norm) for _ in range(depth))
        self.head = uninitialized(ModulatedLinear, width, patch * patch * out_channels)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Return the image (B, out_channels, H, W) of tokens (B, N, width) and condition (B, condition_width)."""
        vectors = self.adaln(condition).unflatten(1, (-1, self.width)).unbind(1)
        tokens = tokens + self.positions(tokens.dtype)
        rotation = None if self.rope is None else self.rope()
        x, branch, gate = run_blocks(self.blocks, tokens, vectors, self.grad_checkpoint, rotation=rotation)
        shift, scale = vectors[-2:]
        _, out = self.head(x, branch, gate, scale, shift)
        return unpatchify(out, self.grid, self.patch)


def decoder_products(network: EncoderDecoder) -> int:
    """Return the multiply-adds of bridge and decoder, forward, for one image. Hidden patches cross the bridge too."""
    decoder, tokens = network.decoder, network.grid[0] * network.grid[1]
    width = decoder.width
    blocks = decoder.depth * block_products(tokens, width, 4 * width)
    ends = tokens * width * (network.width + decoder.patch**2 * network.out_channels)
    return blocks + ends + network.width * (6 * decoder.depth + 2) * width
