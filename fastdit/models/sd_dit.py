"""Define SD-DiT's networks (arXiv 2403.17004): a student that generates and discriminates, and its teacher.

    student   a SplitDiT or EncoderDecoder on the visible patches; its encoder's tokens pass the projection head
    teacher   EMA weights of the student's encoder and head; it sees all patches and has neither decoder nor gradients

The head is iBOT's (Zhou et al., arXiv 2111.07832): a three-layer MLP whose output's direction is compared with K
prototypes. Class token and patches share it.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.kernels import PrototypeLoss, prototype_loss

from .dit import Encoder, copy_blocks
from .encoder_decoder import EncoderDecoder
from .layers import GeluLinear, uninitialized
from .split_dit import SplitDiT
from .streams import Stream


class Target(NamedTuple):
    """Hold the teacher outputs that the student head is trained to match."""

    features: Tensor  # (n, 1 + keep, k) for the batch's first n samples, the class first
    prototypes: Tensor  # (K, k), those of the teacher
    centers: Tensor  # (2, K), centers of the class's logits and of the patches' logits


class Student(nn.Module):
    """Hold the network that generates and the head that discriminates.

    Args:
        network: the encoder and decoder.
        head_width, bottleneck, prototypes: sizes of the head: its hidden width, number of features, and K.
        seed: seed of the head's initial weights.
    """

    def __init__(
        self, network: EncoderDecoder | SplitDiT, *, head_width: int, bottleneck: int, prototypes: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.network = network
        self.head = ProjectionHead(network.width, head_width, bottleneck, prototypes, seed + 1)  # unlike the network

    @property
    def encoder(self) -> Encoder:
        """Return the module with the encoder's weights. The first `encoder_depth` of its blocks are the encoder."""
        return self.network.encoder if isinstance(self.network, EncoderDecoder) else self.network

    @property
    def encoder_depth(self) -> int:
        """Return the number of blocks of the encoder."""
        return self.network.split if isinstance(self.network, SplitDiT) else self.encoder.depth

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        split: tuple[Tensor, Tensor] | None,
        target: Target | None,
        **options,
    ) -> tuple[Tensor, PrototypeLoss, PrototypeLoss] | tuple[Tensor, Tensor]:
        """Return the network's output, and the discriminative losses of the class and of the visible patches.

        x, t, y, split: the arguments of the network's `generate`. options: those of `fastdit.kernels.prototype_loss`.
        With target None the network only generates, and the second result is the zero of `ProjectionHead.idle`. The
        losses are computed here because under ZeRO-3 a weight is whole only within its module's forward.
        """
        # Without a target, only generate.
        if target is None:
            out = self.network(x, t, y) if split is None else self.network.generate(x, t, y, split)[0]
            return out, self.head.idle(out)

        # Generate, and compare the encoder's tokens of the samples that the teacher saw.
        out, stream = self.network.generate(x, t, y, split)
        tokens = stream.first_samples(len(target.features)).normalize()
        features = self.head(tokens if self.encoder.class_token is not None else with_mean(tokens, tokens))
        parts = zip(_parts(features), _parts(target.features), target.centers)
        return out, *(self.head.compare(s, t, target.prototypes, c, **options) for s, t, c in parts)


class Teacher(nn.Module):
    """Hold a copy of the student's encoder and head, without gradients.

    Args:
        student: the student before it is sharded; the teacher starts as its copy.
        frozen: whether the teacher stays as it starts. If all its blocks are the identity then, as in a new DiT, they
            are skipped.
    """

    def __init__(self, student: Student, frozen: bool = False) -> None:
        super().__init__()
        self.encoder = copy_blocks(student.encoder, student.encoder_depth)
        self.head = copy.deepcopy(student.head)
        self.requires_grad_(False)
        self.skips_blocks = frozen and _is_identity(self.encoder)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor, visible: Tensor | None) -> Tensor:
        """Return features (B, 1 + keep, k) of the class and of the patches `visible` (B, keep); None takes all.

        The teacher sees all patches of x. Without a class token, the class's features are those of the mean over all
        patches, including those hidden from the student.
        """
        encoded = self._encode(x, t, y)
        if self.encoder.class_token is not None:
            return self.head(encoded.normalize(None if visible is None else F.pad(visible + 1, (1, 0))))
        tokens = encoded.normalize()
        chosen = tokens
        if visible is not None:
            chosen = tokens.gather(1, visible[:, :, None].expand(-1, -1, tokens.shape[2]))
        return self.head(with_mean(tokens, chosen))

    def pooled_features(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the mean (B, width) over each sample's normalized patches. Gradients reach x."""
        return self._encode(x, t, y).normalize()[:, int(self.encoder.class_token is not None) :].mean(1)

    def sources(self, student: Student) -> list[nn.Parameter]:
        """Return the student's parameters in the order of the teacher's. A teacher's may be the leading rows only."""
        weights = {f"encoder.{name}": p for name, p in student.encoder.named_parameters()}
        weights |= {f"head.{name}": p for name, p in student.head.named_parameters()}
        return [weights[name] for name, _ in self.named_parameters()]

    def _encode(self, x: Tensor, t: Tensor, y: Tensor) -> Stream:
        """Return the residual stream after the encoder's blocks, which are skipped if they are the identity."""
        if not self.skips_blocks:
            return Stream(*self.encoder(x, t, y)[:3])
        tokens = self.encoder.patch_embed(x, self.encoder.pos_embed)
        if self.encoder.class_token is not None:
            tokens = torch.cat([self.encoder.class_token(x.shape[0], 1), tokens], dim=1)
        branch = torch.zeros_like(tokens, dtype=self.encoder.adaln.weight.dtype)
        return Stream(tokens, branch, branch[:, 0])


class ProjectionHead(nn.Module):
    """Apply three linear layers with GELUs between, and compare the result with prototypes."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int, seed: int) -> None:
        super().__init__()
        self.sizes = (width, hidden, bottleneck, prototypes)  # ZeRO-3 leaves the weights empty between forward passes
        self.fc1 = uninitialized(nn.Linear, width, hidden)
        self.fc2 = uninitialized(GeluLinear, hidden, hidden)
        self.fc3 = uninitialized(GeluLinear, hidden, bottleneck)
        self.prototypes = Prototypes(prototypes, bottleneck)

        # iBOT has deviation 0.02 at its widths. In narrow heads 0.02 gives small features and exploding gradients, so
        # here the deviation follows the width.
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith("bias"):
                    weight.zero_()
                else:
                    nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return features (B, T, bottleneck) of tokens (B, T, width)."""
        return self.fc3(self.fc2(self.fc1(tokens)))

    def compare(self, student: Tensor, teacher: Tensor, *args, **options) -> PrototypeLoss:
        """Return the loss between features (B, T, bottleneck) of student and teacher: see `Prototypes`."""
        return self.prototypes(student.flatten(0, 1), teacher.flatten(0, 1), *args, **options)

    def idle(self, like: Tensor) -> Tensor:
        """Return a zero () that gives every weight of the head a gradient of zeros, for a step without comparison.

        Under ZeRO-3, DeepSpeed 0.19 gives a weight without a gradient that of an earlier step. Without ZeRO it leaves
        the weight's EMAs as they are.
        """
        return 0.0 * self.prototypes(self(like.new_zeros(1, 1, self.sizes[0])).flatten(0, 1)).sum()


class Prototypes(nn.Module):
    """Compare features with K directions: the head's last layer, with normalized weights and its gain frozen at 1."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(
        self,
        student: Tensor,
        teacher: Tensor | None = None,
        teacher_prototypes: Tensor | None = None,
        center: Tensor | None = None,
        **options,
    ) -> PrototypeLoss | Tensor:
        """Return `fastdit.kernels.prototype_loss` of features (T, k). `center` is used for centering "ema" only.

        Without a teacher, return the products (T, 1) of the student's features with the first prototype.
        """
        if teacher is None:
            return student @ self.weight[:1].T
        center = center if options["centering"] == "ema" else None
        return prototype_loss(student, teacher, self.weight, teacher_prototypes, center=center, **options)


def head_products(head: ProjectionHead, tokens: int) -> int:
    """Return the multiply-adds of a forward pass of MLP and prototypes for `tokens` tokens."""
    width, hidden, bottleneck, prototypes = head.sizes
    return tokens * (width * hidden + hidden * hidden + hidden * bottleneck + bottleneck * prototypes)


def with_mean(averaged: Tensor, tokens: Tensor) -> Tensor:
    """Return `tokens` (B, M, width) behind the mean token of `averaged` (B, N, width)."""
    return torch.cat([averaged.mean(1, keepdim=True), tokens], dim=1)


def _is_identity(encoder: Encoder) -> bool:
    """Return whether no block adds anything to the residual stream, because all modulation is zero."""
    weights = (encoder.adaln.weight, encoder.adaln.bias)
    return not any(weight.is_meta or weight.any() for weight in weights)


def _parts(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features of the class and of the patches."""
    return features[:, :1], features[:, 1:]
