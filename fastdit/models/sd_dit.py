"""SD-DiT's networks (arXiv 2403.17004): a student that generates and discriminates, and the teacher it follows.

    student   EncoderDecoder on the visible patches; its encoder's tokens go through the projection head
    teacher   a moving average of the student's encoder and head: all patches, no decoder, no gradient

The head is iBOT's (Zhou et al., arXiv 2111.07832): a three-layer MLP to a bottleneck, whose direction is compared with
K prototypes, shared by class token and patches.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.kernels import PrototypeLoss, gate_residual_modulate, prototype_loss

from .dit import Encoder, GeluLinear, bare
from .encoder_decoder import EncoderDecoder


class Target(NamedTuple):
    """What the student's head shall agree with."""

    features: Tensor  # (B, 1 + keep, k) of the teacher, the class first
    prototypes: Tensor  # (K, k), the teacher's
    centers: Tensor  # (2, K): of the class token's logits, of the patches'


class Student(nn.Module):
    """`network` generates, `head` discriminates.

    Args:
        network: encoder and decoder.
        head_width, bottleneck, prototypes: the head's sizes: of its two hidden layers, of what is compared, and K.
        seed: of the head's initial weights.
    """

    def __init__(
        self, network: EncoderDecoder, *, head_width: int, bottleneck: int, prototypes: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.network = network
        self.head = ProjectionHead(network.width, head_width, bottleneck, prototypes, seed + 1)  # not the network's

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        split: tuple[Tensor, Tensor] | None,
        target: Target,
        **options,
    ) -> tuple[Tensor, PrototypeLoss, PrototypeLoss]:
        """The output of `EncoderDecoder.generate`, and the discriminative losses of class token and visible patches.

        `options` are those of `fastdit.kernels.prototype_loss`. The loss is formed here because under ZeRO-3 a weight
        is whole only within its module's forward.
        """
        out, stream = self.network.generate(x, t, y, split)
        normed = F.layer_norm(stream, stream.shape[-1:], eps=1e-6)  # as everywhere, the teacher's too
        features = self.head(_class_first(normed, self.network.encoder))
        parts = zip(_parts(features), _parts(target.features), target.centers)
        return out, *(self.head.compare(s, t, target.prototypes, c, **options) for s, t, c in parts)


class Teacher(nn.Module):
    """Encoder and head, at first the student's own. Weights ask for no gradient."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(student.network.encoder)
        self.head = copy.deepcopy(student.head)
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor, visible: Tensor | None) -> Tensor:
        """Sees all patches of x. Features (B, 1 + keep, k) of the class and the patches `visible` (None: all)."""
        encoded = self.encoder(x, t, y)
        rows = visible
        if visible is not None and self.encoder.class_token is not None:
            rows = F.pad(visible + 1, (1, 0))
        none = encoded.scale.new_zeros(()).expand_as(encoded.scale)
        _, normed = gate_residual_modulate(encoded.x, encoded.branch, encoded.gate, none, none, rows=rows)
        return self.head(_class_first(normed, self.encoder))

    def describe(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """One vector (B, width) for each x: the mean over its normed patches, with the gradient for x."""
        encoded = self.encoder(x, t, y)
        none = encoded.scale.new_zeros(()).expand_as(encoded.scale)
        _, normed = gate_residual_modulate(encoded.x, encoded.branch, encoded.gate, none, none)
        return normed[:, int(self.encoder.class_token is not None) :].mean(1)

    def sources(self, student: Student) -> list[nn.Parameter]:
        """The student's parameters, in the order of the teacher's."""
        return [*student.network.encoder.parameters(), *student.head.parameters()]


class ProjectionHead(nn.Module):
    """Three linear layers with GELUs between, and the prototypes."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int, seed: int) -> None:
        super().__init__()
        self.sizes = (width, hidden, bottleneck, prototypes)  # ZeRO-3 leaves the weights none between forwards
        self.fc1 = bare(nn.Linear, width, hidden)
        self.fc2 = bare(GeluLinear, hidden, hidden)
        self.fc3 = bare(GeluLinear, hidden, bottleneck)
        self.prototypes = Prototypes(prototypes, bottleneck)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith("bias"):
                    weight.zero_()
                else:  # at iBOT's widths its 0.02; in narrow heads that makes features so small that gradients explode
                    nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5, generator=generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, width) -> (B, T, bottleneck)."""
        return self.fc3(self.fc2(self.fc1(tokens)))

    def compare(self, student: Tensor, teacher: Tensor, *args, **options) -> PrototypeLoss:
        """Of (B, T, bottleneck) features: see `Prototypes`."""
        return self.prototypes(student.flatten(0, 1), teacher.flatten(0, 1), *args, **options)


class Prototypes(nn.Module):
    """K directions of the bottleneck's space; the last layer of the head, normalised, its gain frozen at 1."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, width))

    def forward(
        self, student: Tensor, teacher: Tensor, teacher_prototypes: Tensor, center: Tensor, **options
    ) -> PrototypeLoss:
        """See `fastdit.kernels.prototype_loss`, whose `center` serves centering "ema" only."""
        center = center if options["centering"] == "ema" else None
        return prototype_loss(student, teacher, self.weight, teacher_prototypes, center=center, **options)


def head_products(head: ProjectionHead, tokens: int) -> int:
    """Multiply-adds of MLP and prototypes, forward, for `tokens` tokens."""
    width, hidden, bottleneck, prototypes = head.sizes
    return tokens * (width * hidden + hidden * hidden + hidden * bottleneck + bottleneck * prototypes)


def _class_first(tokens: Tensor, encoder: Encoder) -> Tensor:
    """Tokens behind the class token; without one, behind their mean."""
    if encoder.class_token is not None:
        return tokens
    return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)


def _parts(features: Tensor) -> tuple[Tensor, Tensor]:
    return features[:, :1], features[:, 1:]
