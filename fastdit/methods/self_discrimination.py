"""SD-DiT: self-supervised discrimination beside generation (Zhu et al., CVPR 2024, arXiv 2403.17004).

An image appears at two points of its probability-flow ODE, much and hardly noised:

    x_S = x0 + sigma_S eps,  sigma_S from the noise process's law        x_T = x0 + sigma_T eps,  sigma_T = 0.002

    x_S --visible patches--> student encoder --> decoder --> out        L_G = denoising loss over all patches
                                  |
                                 head --> z_S --+
                                                +--> L_D = mean_i -q_i . log p_i, patches and class token each
    x_T ---- all patches ---> teacher encoder,  |
                              head --> z_T -----+

    p = softmax(h(z_S) / tau_S),   q = softmax((h'(z_T) - C) / tau_T),   h: cosines with the prototypes
    L = L_G + beta L_D
    teacher <- m teacher + (1 - m) student            after each update
    C <- mu C + (1 - mu) mean of h'(z_T) over ranks   after each update, class token and patches apart

From the paper: the pair, who sees what, the two losses and which layers carry them, no reconstruction, no mask token.
From iBOT, on which it builds: head, temperatures, centring, momenta. What neither says is ours, and marked so below.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastdit.kernels import split_tokens
from fastdit.methods.denoising import Denoising, Network, Outcome, image_inputs
from fastdit.methods.ranks import ranks, sum_over_ranks
from fastdit.models import HiddenTokens, Student, Target, Teacher, decoder_products, encoder_products, head_products

TEACHER = "teacher"


@dataclass(frozen=True)
class SDDiT:
    """Settings of SD-DiT. Known from the paper: mask_ratio. The decoder's are MaskDiT's; of the head, temperatures,
    centring and momenta iBOT's; all others ours.

    Args:
        mask_ratio: share of the patches that the student's encoder does not see, drawn for each sample.
        teacher_noise: noise-to-signal ratio of the teacher's view: EDM's sigma; flow's t / (1 - t); of a DDPM the
            nearest timestep's. Its noise is the student's, scaled. Ours.
        hidden_tokens: what the decoder gets at hidden patches: their noised pixels through the encoder's first layer
            (ours), one learned token (MaskDiT), or zeros.
        cls: the class-level loss compares the mean of the visible patches, or a learned token (iBOT's). Ours: blocks
            that start as the identity leave the token blind for long. On the shipped images its teacher's entropy was
            within 0.001 of uniform for 300 steps; the mean told images apart at once, at equal denoising loss.
        beta: weight of the discriminative loss. Ours.
        student_temperature: tau_S.
        teacher_temperature: tau_T after the warm-up.
        teacher_temperature_start: tau_T at the start; it rises linearly.
        teacher_temperature_warmup: share of the run that this takes. Ours.
        centering: keeps the teacher from collapse: ema (DINO, iBOT), sinkhorn (SwAV, DINOv2), or none.
        center_momentum: mu.
        momentum: m at the start; it rises to momentum_end as half a cosine.
        momentum_end: m at the end of the run. Equal to `momentum`: constant.
        decoder_width: features per token of the decoder.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        head_width: hidden layers of the projection head.
        bottleneck: features that are compared with prototypes.
        prototypes: their number, K.
    """

    mask_ratio: float = 0.2
    teacher_noise: float = 0.002
    hidden_tokens: HiddenTokens = "noised_patch"
    cls: Literal["token", "mean"] = "mean"
    beta: float = 0.1
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup: float = 0.1
    centering: Literal["ema", "sinkhorn", "none"] = "ema"
    center_momentum: float = 0.9
    momentum: float = 0.996
    momentum_end: float = 1.0
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    head_width: int = 2048
    bottleneck: int = 256
    prototypes: int = 8192

    def teacher_temperature_at(self, progress: float) -> float:
        """tau_T when the share `progress` of the run is done."""
        warmup = self.teacher_temperature_warmup
        done = min(1.0, progress / warmup) if warmup else 1.0
        return self.teacher_temperature_start + done * (self.teacher_temperature - self.teacher_temperature_start)

    def momentum_at(self, progress: float) -> float:
        """m when the share `progress` of the run is done."""
        return self.momentum_end - (self.momentum_end - self.momentum) * (1 + math.cos(math.pi * progress)) / 2


class SelfDiscrimination(Denoising):
    """The method for a `Student`, whose teacher it holds.

    Args:
        noise, classes, label_drop: as in `Denoising`.
        settings: see `SDDiT`.
        student: the module to be trained, before it is sharded: the teacher starts as its copy.
    """

    def __init__(self, noise, classes: int, label_drop: float, settings: SDDiT, student: Student) -> None:
        super().__init__(noise, classes, label_drop)
        self.settings = settings
        self.teacher = Teacher(student)
        self.tokens = math.prod(student.network.grid)
        self.keep = max(1, round((1 - settings.mask_ratio) * self.tokens))
        self.centers = torch.zeros(2, settings.prototypes)  # of class tokens, of patches
        self.temperature = settings.teacher_temperature_at(0.0)
        self._forget()

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: torch.Generator) -> Outcome:
        """L, and its terms: `loss` is L_G, comparable between methods. Both views get one label and one eps (ours)."""
        level, eps, y = self.draw(x0, y, generator)
        split = None
        if self.keep < self.tokens:
            split = split_tokens(len(x0), self.tokens, self.keep, generator=generator, device=x0.device)

        quiet = self.noise.level_at(self.settings.teacher_noise, len(x0), x0.device)
        view, t = self.noise.network_input(self.noise.add_noise(x0, eps, quiet), quiet)
        target = Target(self.teacher(view, t, y, split and split[0]), self.teacher.head.prototypes.weight, self.centers)

        view, t = self.noise.network_input(self.noise.add_noise(x0, eps, level), level)
        out, of_class, of_patches = network(
            view, t, y, split, target,
            student_temperature=self.settings.student_temperature,
            teacher_temperature=self.temperature,
            centering=self.settings.centering,
            all_reduce=sum_over_ranks,
        )  # fmt: skip
        self._remember(of_class, of_patches)
        generative = self.judge(out, x0, eps, level)
        discriminative = of_class.loss + of_patches.loss
        terms = {
            "discriminative_loss": discriminative.detach(),
            "teacher_entropy": of_patches.teacher_entropy,
            "teacher_student_kl": of_patches.kl,
            "cls_teacher_entropy": of_class.teacher_entropy,
            "cls_teacher_student_kl": of_class.kl,
        }
        loss = generative.loss + self.settings.beta * discriminative
        return generative._replace(loss=loss, terms=generative.terms | terms)

    def describe(self, x: Tensor) -> Tensor:
        """The teacher's pooled features (B, width) of clean samples x, without a label; gradients reach x only."""
        quiet = self.noise.level_at(self.settings.teacher_noise, len(x), x.device)
        view, t = self.noise.network_input(x, quiet)
        y = torch.full((len(x),), self.classes, device=x.device)
        return self.teacher.describe(view, t, y)

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        progress = step / steps
        self.temperature = self.settings.teacher_temperature_at(progress)
        return {TEACHER: self.settings.momentum_at(progress)}

    def end_step(self) -> dict[str, Tensor]:
        """Move the centres; prototype usage is the share of them that the teacher prefers for any patch of the step.

        Teacher features that are not finite leave the centres as they are.
        """
        means, wins = self.means / self.count, self.wins.to(self.means.dtype)
        packed = sum_over_ranks(torch.cat([means, wins[None]]))
        means, wins = packed[:2] / ranks(), packed[2]
        moved = torch.lerp(means, self.centers, self.settings.center_momentum)
        self.centers = torch.where(moved.isfinite().all(), moved, self.centers)
        self._forget()
        return {"prototype_usage": (wins > 0).float().mean(), "centre_norm": self.centers[1].norm()}

    def _remember(self, of_class, of_patches) -> None:
        self.means = self.means + torch.stack([of_class.teacher_mean, of_patches.teacher_mean])
        self.wins = self.wins + of_patches.wins
        self.count += 1

    def _forget(self) -> None:
        self.means, self.count = torch.zeros_like(self.centers), 0
        self.wins = torch.zeros(self.centers.shape[1], dtype=torch.int64, device=self.centers.device)

    def sampled_network(self, module: Student) -> nn.Module:
        """Encoder and decoder of the student: neither head nor teacher."""
        return module.network

    def followers(self, module: Student) -> dict:
        return {TEACHER: (list(self.teacher.parameters()), self.teacher.sources(module))}

    def graphed(self, module: Student, batch: int) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        encoder, decoder, weight = module.network.encoder, module.network.decoder, module.network.decoder.adaln.weight
        visible = torch.zeros(batch, self.keep, dtype=torch.int64, device=weight.device)
        tokens = weight.new_zeros(batch, self.tokens, decoder.width, requires_grad=True)
        condition = weight.new_zeros(batch, encoder.width, requires_grad=True)
        return [
            (self.teacher.encoder, image_inputs(encoder, batch)),
            (encoder, (*image_inputs(encoder, batch), *[visible][: self.keep < self.tokens])),
            (decoder, (tokens, condition)),
        ]

    def flops(self, module: Student) -> dict[str, float]:
        network, compared = module.network, head_products(module.head, self.keep + 1)
        extra = network.encoder.class_token is not None
        return {
            "encoder": 6 * encoder_products(network.encoder, self.keep + extra),
            "decoder": 6 * decoder_products(network),
            "head": 6 * compared,
            "teacher": self.teacher_flops() + 2 * compared,
        }

    def teacher_flops(self) -> int:
        """FLOPs of the teacher's encoder for one image."""
        encoder = self.teacher.encoder
        return 2 * encoder_products(encoder, self.tokens + (encoder.class_token is not None))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        self.teacher.to(device, dtype)
        self.centers = self.centers.to(device)
        self._forget()

    def state_dict(self) -> dict:
        return {"centers": self.centers.cpu()}

    def load_state_dict(self, state: dict) -> None:
        self.centers = state["centers"].to(self.centers.device)
