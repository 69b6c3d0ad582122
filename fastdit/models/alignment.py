"""Define the networks of `psi_align`: a DiT whose tokens after one block pass a projector, and the tokens' targets.

    x, t, y --> blocks 0 .. k-1 --> stream --> blocks k .. depth-1 --> head --> image
                                       |
                                       +--LN--> projector (three linear layers with SiLUs) --> cosine with the targets

The projector is REPA's (Yu et al., arXiv 2410.06940). REPA projects the stream itself; the LayerNorm is ours, and
costs nothing, because it is fused with the sum of the stream.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .dit import DiT, init_weights, run_blocks, unpatchify
from .layers import uninitialized
from .streams import GradientRatio, Stream
from .structure_encoders import LatentResNet


class AlignedDiT(nn.Module):
    """Hold a DiT and the projector of its tokens. Sampling needs the DiT alone.

    Args:
        network: the DiT.
        block: number of blocks before the tokens that are aligned, from 1 to the DiT's depth.
        hidden: width of the projector's two hidden layers.
        features: channels of the targets.
        seed: seed of the projector's initial weights.

    Raises ValueError if the DiT has no such block.
    """

    def __init__(self, network: DiT, *, block: int, hidden: int, features: int, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= block <= network.depth:
            raise ValueError(f"block={block} must be from 1 to the depth ({network.depth})")
        self.network, self.block = network, block
        self.projector = Projector(network.width, hidden, features, seed + 1)  # not the network's random numbers
        self.gradients = GradientRatio()  # of the denoising and the alignment loss, at the tokens

    def forward(self, x: Tensor, t: Tensor, y: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the DiT's output, and the mean cosine () float32 of projected tokens and targets.

        x, t, y: the arguments of `DiT`. targets: (B, N, features) float32. With None, the second result is the zero of
        `Projector.idle`. The cosine is computed here because under ZeRO-3 a weight is whole only within its module's
        forward.
        """
        if targets is None:
            out = self.network(x, t, y)
            return out, self.projector.idle(out)
        out, stream = self._generate(x, t, y)
        projected = self.projector(stream.normalize())
        return out, F.cosine_similarity(projected.float(), targets, dim=-1).mean()

    def _generate(self, x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Stream]:
        """Return the DiT's output (B, out_channels, H, W), and the residual stream after `block` blocks."""
        network = self.network
        _, vectors = network.condition(t, y)
        blocks, before = list(network.blocks), 6 * self.block

        # Run the blocks before the tokens, and fork the stream there.
        tokens = network.patch_embed(x, network.pos_embed)
        options = {"grad_checkpoint": network.grad_checkpoint, "rotation": network.rotation()}
        tokens, branch, gate = run_blocks(blocks[: self.block], tokens, vectors, **options)
        tokens, compared = self.gradients.fork(tokens)
        stream = Stream(compared, branch, gate)

        # Run the other blocks and the head.
        tokens, branch, gate = run_blocks(
            blocks[self.block :], tokens, vectors[before:], branch=branch, gate=gate, **options
        )
        shift, scale = vectors[-2:]
        _, out = network.head(tokens, branch, gate, scale, shift)
        return unpatchify(out, network.grid, network.patch), stream


class Projector(nn.Module):
    """Apply three linear layers with SiLUs between. Initial weights are REPA's: Xavier, and biases of zero."""

    def __init__(self, width: int, hidden: int, features: int, seed: int) -> None:
        super().__init__()
        self.sizes = (width, hidden, features)  # ZeRO-3 leaves the weights empty between forward passes
        self.fc1 = uninitialized(nn.Linear, width, hidden)
        self.fc2 = uninitialized(nn.Linear, hidden, hidden)
        self.fc3 = uninitialized(nn.Linear, hidden, features)
        init_weights(self, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the features (B, N, features) of tokens (B, N, width)."""
        return self.fc3(F.silu(self.fc2(F.silu(self.fc1(tokens)))))

    def idle(self, like: Tensor) -> Tensor:
        """Return a zero () that gives every weight a gradient of zeros, for a step without alignment.

        Under ZeRO-3, DeepSpeed 0.19 gives a weight without a gradient that of an earlier step. Without ZeRO it leaves
        the weight's EMAs as they are.
        """
        return 0.0 * self(like.new_zeros(1, 1, self.sizes[0])).float().sum()

    def products(self, tokens: int) -> int:
        """Return the multiply-adds of a forward pass over `tokens` tokens."""
        width, hidden, features = self.sizes
        return tokens * hidden * (width + hidden + features)


class TokenTargets(nn.Module):
    """Compute Psi's feature map of clean samples on the grid of the DiT's tokens.

    Args:
        psi: the encoder.
        stage: the block of psi whose map is taken, see `LatentResNet.feature_map`.
        grid: rows and columns of tokens.
    """

    def __init__(self, psi: LatentResNet, stage: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.psi, self.stage, self.grid = psi, stage, grid

    def forward(self, x: Tensor) -> Tensor:
        """Return the targets (B, tokens, channels) float32 of samples x (B, C, H, W).

        A side of the map that is longer than the grid's is averaged; a shorter side is interpolated bilinearly.
        """
        features = self.psi.feature_map(x, self.stage).float()
        sides = tuple(min(pair) for pair in zip(features.shape[2:], self.grid))
        features = F.adaptive_avg_pool2d(features, sides)
        if sides != self.grid:
            features = F.interpolate(features, size=self.grid, mode="bilinear", align_corners=False)
        return features.flatten(2).transpose(1, 2).contiguous()
