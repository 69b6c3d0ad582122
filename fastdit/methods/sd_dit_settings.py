"""Define the settings of SD-DiT, and derive those left open from the network's sizes and the run's length."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fastdit.errors import UserError, check_ranges
from fastdit.models import HiddenTokens

PUBLISHED_WIDTH, PUBLISHED_DEPTH = 1152, 28  # sizes of XL, whose head and extra decoder are published
IBOT_MOMENTUM = 0.996
QUIET_QUANTILE = 0.05  # default quantile of the teacher's noise level in the student's law
_DECODER_SIZES = ("decoder_width", "decoder_depth", "decoder_heads")
_NOISE_FORMS = "a noise-to-signal ratio from 0.0001 to 1, quantile:SHARE or relative:SHARE with SHARE from 0.001 to 1"


class TeacherLaw(NamedTuple):
    """Hold the rule for the teacher's noise level: its kind (fixed, quantile or relative) and its number."""

    kind: str
    amount: float


class Sizes(NamedTuple):
    """Hold the sizes of the projection head and the extra decoder that suit one encoder."""

    head_width: int
    bottleneck: int
    prototypes: int
    decoder_width: int
    decoder_depth: int
    decoder_heads: int


@dataclass(frozen=True)
class SDDiT:
    """Hold the settings of SD-DiT.

    The paper gives mask_ratio; iBOT gives head, temperatures, centering and momenta; MaskDiT gives the extra decoder;
    all others are ours.

    Args:
        decoder: split takes the last blocks of the DiT as decoder. The sampled network is then a plain DiT, which reads
            official checkpoints. extra adds MaskDiT's decoder behind the whole DiT. Default: extra if a size of the
            decoder is set, else split, which costs less (ours).
        split: blocks of the encoder of `decoder split`: their number, or below 1 their share of the depth. Ours.
        mask_ratio: share of the patches that the student's encoder does not see, drawn for each sample.
        teacher_noise: noise level of the teacher's view. quantile:SHARE is a fixed level, below which that share of the
            student's levels lies. relative:SHARE lies below the student's level by at most that share of the law, drawn
            uniformly for each sample, as in SRA. A number is a fixed noise-to-signal ratio (EDM's sigma; flow's
            t / (1 - t); the nearest timestep of a DDPM). The teacher's noise is the student's, scaled. Ours.
        hidden_tokens: the decoder's input at hidden patches: their noised pixels through the encoder's first layer
            (ours), one learned token (MaskDiT; extra only), or zeros.
        cls: input of the class-level loss. mean compares the mean of the student's visible patches with that of all the
            teacher's patches. token compares a learned token (iBOT; extra only). The default is ours: while blocks are
            still near the identity, the token learns nothing about the image.
        beta: weight of the discriminative loss. Ours: choose it so that the metric discriminative_gradient_ratio lies
            between 0.2 and 0.8, or give auto, which keeps that ratio near `gradient_ratio`.
        gradient_ratio: target of auto: |beta grad L_D| over |grad L_G| at the encoder's output. Ours.
        every: steps per step with a discriminative loss; the others cost no teacher and no head. Ours.
        share: share of each micro-batch that the discriminative loss compares. Ours.
        until: share of the run after which the discriminative loss is off and no patch is hidden. Steps are then those
            of a plain DiT, and the network is trained as it is sampled. Ours.
        student_temperature: tau_S.
        teacher_temperature: tau_T after the warm-up.
        teacher_temperature_start: tau_T at the start, from which it rises linearly.
        teacher_temperature_warmup: share of the run in which tau_T rises. Ours.
        centering: protection of the teacher from collapse: ema (DINO, iBOT), sinkhorn (SwAV, DINOv2), or none.
        center_momentum: mu.
        momentum: m at the start; it rises to momentum_end as half a cosine. Default: iBOT's 0.996; in short runs a
            smaller m, with which the teacher's time constant of 1 / (1 - m) steps is the share momentum_share of the
            run. 1 freezes the teacher.
        momentum_end: m at the end of the run. If it equals `momentum`, m is constant.
        momentum_share: see `momentum`. Ours.
        decoder_width: features per token of the extra decoder. Default: in proportion to the encoder's, 512 for 1152.
        decoder_depth: blocks of the extra decoder. Default: in proportion to the encoder's, 8 for 28.
        decoder_heads: attention heads of the extra decoder. Default: heads of 32 features.
        head_width: features of the projection head's hidden layers. Default: in proportion to the encoder's width,
            iBOT's 2048 for 1152.
        bottleneck: features that are compared with prototypes. Default: in the same proportion, iBOT's 256 for 1152.
        prototypes: number of prototypes, K. Default: in the same proportion, iBOT's 8192 for 1152.
    """

    decoder: Literal["split", "extra"] | None = None
    split: float = 0.5
    mask_ratio: float = 0.2
    teacher_noise: float | str = f"quantile:{QUIET_QUANTILE}"
    hidden_tokens: HiddenTokens = "noised_patch"
    cls: Literal["token", "mean"] = "mean"
    beta: float | Literal["auto"] = 0.3
    gradient_ratio: float = 0.4
    every: int = 1
    share: float = 1.0
    until: float = 1.0
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup: float = 0.1
    centering: Literal["ema", "sinkhorn", "none"] = "ema"
    center_momentum: float = 0.9
    momentum: float | None = None
    momentum_end: float = 1.0
    momentum_share: float = 0.05
    decoder_width: int | None = None
    decoder_depth: int | None = None
    decoder_heads: int | None = None
    head_width: int | None = None
    bottleneck: int | None = None
    prototypes: int | None = None

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be, or that another one excludes."""
        # Check the numbers. An fp32 number must hold exp(1 / temperature).
        temperatures = "student_temperature teacher_temperature teacher_temperature_start"
        sizes = "decoder_width decoder_depth decoder_heads head_width bottleneck prototypes"
        ranges = {f"{sizes} every": (1,), temperatures: (0.025,), "beta gradient_ratio": (0,), "mask_ratio": (0, 0.95)}
        ranges |= {"center_momentum momentum momentum_end teacher_temperature_warmup until": (0, 1)}
        check_ranges(self, "sd_dit.", ranges | {"split": (0.01,), "share momentum_share": (0.001, 1)})

        # Check that settings of the extra decoder are not combined with a split DiT.
        sized = self._sized_decoder
        if self.named_decoder == "split":
            if sized:
                raise UserError(
                    f"sd_dit.{sized[0]}: decoder split takes blocks of the DiT; leave it out, or add "
                    "--sd_dit.decoder extra"
                )
            for name, value in (("hidden_tokens", "mask_token"), ("cls", "token")):
                if getattr(self, name) == value:
                    raise UserError(
                        f"sd_dit.{name}: {value} is a weight that a plain DiT does not have; add --sd_dit.decoder extra"
                    )
        _ = self.teacher_law  # raises for a value that cannot be parsed

    @property
    def _sized_decoder(self) -> list[str]:
        """Return the names of those sizes of the extra decoder that are set."""
        # A config.yaml from before `decoder` existed sets all of them.
        return [name for name in _DECODER_SIZES if getattr(self, name) is not None]

    @property
    def named_decoder(self) -> Literal["split", "extra"]:
        """Return `decoder`, or the default if it is not set."""
        return self.decoder or ("extra" if self._sized_decoder else "split")

    @property
    def teacher_law(self) -> TeacherLaw:
        """Return `teacher_noise`, parsed. Raises UserError if it has no meaning or is out of range."""
        kind, colon, amount = str(self.teacher_noise).rpartition(":")
        try:
            law = TeacherLaw(kind if colon else "fixed", float(amount))
        except ValueError:
            law = TeacherLaw("", math.nan)
        lowest = {"fixed": 1e-4, "quantile": 1e-3, "relative": 1e-3}.get(law.kind, math.inf)
        if not lowest <= law.amount <= 1 or law == ("quantile", 1):
            raise UserError(f"sd_dit.teacher_noise: must be {_NOISE_FORMS}, got {self.teacher_noise}")
        return law

    @property
    def frozen(self) -> bool:
        """Return whether the teacher stays as it starts."""
        return self.momentum == 1 and self.momentum_end == 1

    def teacher_temperature_at(self, progress: float) -> float:
        """Return tau_T after the share `progress` of the run."""
        warmup = self.teacher_temperature_warmup
        done = min(1.0, progress / warmup) if warmup else 1.0
        return self.teacher_temperature_start + done * (self.teacher_temperature - self.teacher_temperature_start)

    def momentum_at(self, step: int, steps: int) -> float:
        """Return m in step `step` (0-based) of `steps`."""
        start = self.momentum
        if start is None:
            start = min(IBOT_MOMENTUM, max(0.0, 1 - 1 / (self.momentum_share * steps)))
        return self.momentum_end - (self.momentum_end - start) * (1 + math.cos(math.pi * step / steps)) / 2

    def split_of(self, depth: int) -> int:
        """Return the number of encoder blocks of a split DiT. Raises UserError if no block is left to the decoder."""
        blocks = self.split
        if blocks < 1:
            blocks = min(max(round(blocks * depth), 1), depth - 1)
        if blocks != int(blocks) or not 1 <= blocks < depth:
            raise UserError(
                f"sd_dit.split: {self.split:g} must be a share below 1, or a whole number of blocks that leaves at "
                f"least one of model.depth ({depth}) to the decoder; change one, or add --sd_dit.decoder extra"
            )
        return int(blocks)

    def sizes_for(self, width: int, depth: int) -> Sizes:
        """Return the sizes of head and extra decoder for an encoder of `width` and `depth`, as set or in proportion."""
        decoder_width = self.decoder_width or _in_proportion(512, width, 64)
        heads = next(n for n in range(max(1, decoder_width // 32), 0, -1) if decoder_width % n == 0)
        return Sizes(
            head_width=self.head_width or _in_proportion(2048, width, 64),
            bottleneck=self.bottleneck or _in_proportion(256, width, 32),
            prototypes=self.prototypes or _in_proportion(8192, width, 256),
            decoder_width=decoder_width,
            decoder_depth=self.decoder_depth or max(1, round(8 * depth / PUBLISHED_DEPTH)),
            decoder_heads=self.decoder_heads or heads,
        )


def _in_proportion(published: int, width: int, multiple: int) -> int:
    """Return the multiple of `multiple` next to published / 1152 * width, at least `multiple`."""
    return max(1, round(published * width / PUBLISHED_WIDTH / multiple)) * multiple
