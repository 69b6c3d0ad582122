"""Define a plain DiT that is trained as encoder and decoder: its first blocks may see the visible patches only.

    visible patches --> blocks 0 .. k-1 (encoder) --+
                                                    +--> blocks k .. depth-1 (decoder) --> head --> image
    hidden patches, embedded, with positions -------+

Hidden tokens skip the encoder in the residual stream, as in TREAD (Krause et al., arXiv 2501.04765): they enter block k
as noised patch embeddings with positions. There is no bridge and no other new weight, so the network that is sampled
and exported, and its EMA weights, are those of an ordinary DiT. With nothing hidden, as in sampling, it computes the
same as a DiT.
"""

import torch
from torch import Tensor

from fastdit.errors import UserError
from fastdit.kernels import gate_residual, scatter_tokens

from .dit import DiT, block_products, encoder_products, run_blocks, unpatchify
from .streams import GradientRatio, Stream

HIDDEN_TOKENS = ("noised_patch", "zeros")


class SplitDiT(DiT):
    """Use the first `split` blocks of a class-conditional DiT as SD-DiT's encoder.

    Args:
        split: number of blocks of the encoder, from 1 to depth - 1.
        hidden_tokens: the decoder's input at hidden patches, beside positions: their noised embedding, or zeros.
        sizes: arguments of `DiT`.

    Raises UserError if sizes do not fit together, and ValueError for another `hidden_tokens`.
    """

    def __init__(self, *, split: int, hidden_tokens: str = "noised_patch", **sizes) -> None:
        super().__init__(**sizes)
        if not 1 <= split < self.depth:
            raise UserError(
                f"sd_dit.split: {split} blocks of model.depth ({self.depth}) leave none to the encoder or the decoder; "
                "give at least 1 block to each"
            )
        if hidden_tokens not in HIDDEN_TOKENS:
            raise ValueError(f"hidden_tokens={hidden_tokens!r}: choose one of {', '.join(HIDDEN_TOKENS)}")
        self.split, self.hidden_tokens = split, hidden_tokens
        self.gradients: GradientRatio | None = None  # a method that measures gradients sets it

    def forward(self, x: Tensor, t: Tensor, y: Tensor, visible: Tensor | None = None) -> Tensor | tuple[Tensor, Stream]:
        """Return the output of a `DiT`; with `visible` also the encoder's tokens (B, keep, width).

        visible (B, keep) int64 holds the ids of the patches that the encoder sees. With keep = N the encoder sees all
        of them in their order, whatever the ids. Raises ValueError for other shapes.
        """
        if visible is None:
            return super().forward(x, t, y)
        self._check(x, t, y)
        _, vectors = self.condition(t, y)
        hides = visible.shape[1] < self.grid[0] * self.grid[1]

        # Encode the visible patches, and fork the stream for the discriminative loss.
        seen = self.patch_embed(x, self.pos_embed, visible if hides else None)
        rotation = self.rotation(visible if hides else None)
        blocks = list(self.blocks)
        seen, branch, gate = run_blocks(blocks[: self.split], seen, vectors, self.grad_checkpoint, rotation=rotation)
        tokens, compared = self.gradients.fork(seen) if self.gradients else (seen, seen)
        stream = Stream(compared, branch, gate)

        # Decode all patches: the hidden ones enter here.
        rest = vectors[6 * self.split :]
        if hides:
            tokens = scatter_tokens(gate_residual(tokens, branch, gate), visible, self._base(x, tokens))
            branch = gate = None
        tokens, branch, gate = run_blocks(
            blocks[self.split :], tokens, rest, self.grad_checkpoint, branch, gate, self.rotation()
        )
        shift, scale = rest[-2:]
        _, out = self.head(tokens, branch, gate, scale, shift)
        return unpatchify(out, self.grid, self.patch), stream

    def generate(self, x: Tensor, t: Tensor, y: Tensor, split: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Stream]:
        """Return the output (B, out_channels, H, W), and the encoder's tokens (B, keep, width).

        split holds the ids (B, keep) of the visible and (B, N - keep) of the hidden patches, int64; None hides nothing.
        """
        if split is None:
            count = self.grid[0] * self.grid[1]
            split = (torch.arange(count, device=x.device).expand(x.shape[0], count),)
        return self(x, t, y, split[0])

    def _base(self, x: Tensor, like: Tensor) -> Tensor:
        """Return the decoder's input (B, N, width) at the hidden patches; other positions hold anything."""
        if self.hidden_tokens == "zeros":
            return self.pos_embed.to(like.dtype).expand(x.shape[0], -1, -1)
        # Embedding all patches costs one small GEMM; embedding the hidden ones alone would cost a scatter more.
        return self.patch_embed(x, self.pos_embed)


def split_products(network: SplitDiT, keep: int) -> tuple[int, int]:
    """Return the multiply-adds of encoder and decoder, forward, for one image with `keep` visible patches."""
    tokens, width = network.grid[0] * network.grid[1], network.width
    patches = network.patch**2 * width
    decoder = (network.depth - network.split) * block_products(tokens, width, network.mlp_width)
    encoder = encoder_products(network, keep) - (network.depth - network.split) * block_products(
        keep, width, network.mlp_width
    )
    embedded = tokens * patches * network.channels if keep < tokens and network.hidden_tokens == "noised_patch" else 0
    return encoder, decoder + embedded + tokens * patches * network.out_channels
