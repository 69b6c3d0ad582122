"""SD-DiT: self-supervised discrimination beside generation (Zhu et al., CVPR 2024, arXiv 2403.17004).

An image appears at two points of its probability-flow ODE, one noisy and one nearly clean:

    x_S = x0 + sigma_S eps,  sigma_S from the noise process's law      x_T = x0 + sigma_T eps,  sigma_T low in that law

    x_S --visible patches--> student encoder --> decoder --> out        L_G = denoising loss over all patches
                                  |
                                 head --> z_S --+
                                                +--> L_D = mean_i -q_i . log p_i, for patches and class each
    x_T ---- all patches ---> teacher encoder,  |
                              head --> z_T -----+

    p = softmax(h(z_S) / tau_S),   q = softmax((h'(z_T) - C) / tau_T),   h: cosines with the prototypes
    L = L_G + beta L_D
    teacher <- m teacher + (1 - m) student            after each update
    C <- mu C + (1 - mu) mean of h'(z_T) over ranks   after each update, for class and patches separately

The paper gives the pair, who sees what, the two losses and which layers carry them, and rules out reconstruction and
mask tokens. iBOT, on which it builds, gives head, temperatures, centering and momenta. Everything else is ours, and
`SDDiT` marks it so.

Cost of a step in plain DiT steps, by count, with the default settings: 1.11 at S/2 and 1.09 at XL/2 with the split
decoder, 1.24 and 1.21 with the extra one; 0.95 with the split decoder and `every` 4 or `share` 0.25, and 1.00 after
`until`. `python benchmarks/throughput.py --method sd_dit` measures it.
"""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastdit.errors import UserError
from fastdit.kernels import split_tokens
from fastdit.methods.denoising import GRADIENTS, Denoising, Network, Outcome, Panels, Shape, image_inputs
from fastdit.methods.ranks import ranks, sum_over_ranks
from fastdit.methods.sd_dit_settings import QUIET_QUANTILE, SDDiT
from fastdit.models import (
    Encoder,
    EncoderDecoder,
    GradientRatio,
    SplitDiT,
    Student,
    Target,
    Teacher,
    decoder_products,
    encoder_products,
    head_products,
    split_products,
)

__all__ = ["SDDiT", "SelfDiscrimination"]

TEACHER = "teacher"
LOWEST_QUANTILE = 1e-3  # of the student's law, for a teacher's level relative to the student's


class SelfDiscrimination(Denoising):
    """Train a `Student` by L_G and L_D, and hold its teacher.

    Args:
        noise, classes, label_drop: as in `Denoising`.
        settings: see `SDDiT`.
        student: the module to be trained, before it is sharded. The teacher starts as its copy.
    """

    name = "sd_dit"
    summary = "self-supervised discrimination beside it"
    settings_type = SDDiT
    panels: ClassVar[Panels] = {
        "discriminative loss": {"discriminative_loss": "discriminative loss"},
        "teacher entropy (nats)": {"teacher_entropy": "patches", "cls_teacher_entropy": "class"},
        "KL(teacher || student) (nats)": {"teacher_student_kl": "patches", "cls_teacher_student_kl": "class"},
        "share of prototypes in use": {"prototype_usage": "patches"},
        "norm of the centre": {"centre_norm": "patches"},
        GRADIENTS: {"discriminative_gradient_ratio": "discrimination, at the encoder's output"},
    }
    older_signature: ClassVar[dict[str, object]] = {"sd_dit.decoder": "extra", "sd_dit.teacher": "moving"}

    @classmethod
    def complete(cls, settings: SDDiT) -> SDDiT:
        """Return `settings` with their decoder named."""
        return replace(settings, decoder=settings.named_decoder)

    @classmethod
    def check(cls, config) -> None:
        """Raise UserError if the decoder does not fit the DiT."""
        settings, dims = config.sd_dit, config.model.dims()
        if settings.decoder == "split":
            settings.split_of(dims["depth"])
            return
        sizes = settings.sizes_for(dims["width"], dims["depth"])
        width, heads = sizes.decoder_width, sizes.decoder_heads
        if width % heads or width % 4:
            raise UserError(
                f"sd_dit.decoder_width: {width} must be a multiple of sd_dit.decoder_heads ({heads}) and of 4; "
                "change one"
            )

    @classmethod
    def build_network(cls, config, sizes: dict, out_channels: int) -> EncoderDecoder | SplitDiT:
        """Return SD-DiT's encoder and decoder for the sizes of a DiT."""
        settings = config.sd_dit
        if settings.decoder == "split":
            return SplitDiT(
                split=settings.split_of(sizes["depth"]),
                hidden_tokens=settings.hidden_tokens,
                out_channels=out_channels,
                seed=config.seed,
                **sizes,
            )
        decoder = settings.sizes_for(sizes["width"], sizes["depth"])
        return EncoderDecoder(
            Encoder(**sizes, class_token=settings.cls == "token"),
            out_channels=out_channels,
            width=decoder.decoder_width,
            depth=decoder.decoder_depth,
            heads=decoder.decoder_heads,
            hidden_tokens=settings.hidden_tokens,
            attention_backend=config.model.attention,
            seed=config.seed,
        )

    @classmethod
    def build(
        cls, config, shape: Shape, module: nn.Module, base: Denoising, decoder=None
    ) -> tuple[Student, "SelfDiscrimination"]:
        """Return the network with a projection head, and the method with its teacher."""
        settings, dims = config.sd_dit, config.model.dims()
        head = settings.sizes_for(dims["width"], dims["depth"])
        student = Student(
            module,
            head_width=head.head_width,
            bottleneck=head.bottleneck,
            prototypes=head.prototypes,
            seed=config.seed,
        )
        return student, cls(base.noise, base.classes, base.label_drop, settings, student)

    @classmethod
    def checkpoint_signature(cls, config) -> dict[str, object]:
        """Return the settings that fix the tensors of a checkpoint."""
        settings, dims = config.sd_dit, config.model.dims()
        sizes = settings.sizes_for(dims["width"], dims["depth"])._asdict()
        fields = {"decoder": settings.decoder, "cls": settings.cls, "hidden_tokens": settings.hidden_tokens}
        if settings.decoder == "split":
            sizes = {name: size for name, size in sizes.items() if not name.startswith("decoder_")}
            fields["split"] = settings.split_of(dims["depth"])
        fields["teacher"] = "frozen" if settings.frozen else "moving"
        return {f"sd_dit.{name}": value for name, value in (fields | sizes).items()}

    def __init__(self, noise, classes: int, label_drop: float, settings: SDDiT, student: Student) -> None:
        super().__init__(noise, classes, label_drop)
        self.settings = settings
        self.teacher = Teacher(student, frozen=settings.frozen)
        self.tokens = math.prod(student.network.grid)
        self.keep = max(1, round((1 - settings.mask_ratio) * self.tokens))
        self.centers = torch.zeros(2, student.head.sizes[-1])  # of the class and of the patches
        self.gradients = student.network.gradients = GradientRatio()
        self.temperature = settings.teacher_temperature_at(0.0)
        self.compares = True  # whether the step has L_D
        self.finished = False  # whether no later step has
        self._reset()

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: torch.Generator) -> Outcome:
        """Return L and its terms; `loss` among them is L_G, comparable between methods.

        Both views of an image have one label and one eps (ours).
        """
        # Draw noise levels, labels and the visible patches, and build the student's view.
        level, eps, y = self.draw(x0, y, generator)
        split = None
        if self.hides:
            split = split_tokens(len(x0), self.tokens, self.keep, generator=generator, device=x0.device)
        view, t = self.noise.network_input(self.noise.add_noise(x0, eps, level), level)
        if not self.compares:
            out, nothing = network(view, t, y, split, None)
            outcome = self.compute_loss(out, x0, eps, level)
            return outcome._replace(loss=outcome.loss + nothing)

        # The teacher sees the first samples of the batch, or all of them.
        count = self._compared(len(x0))
        quiet = self._teacher_level(level[:count], generator)
        quiet_view = self.noise.network_input(self.noise.add_noise(x0[:count], eps[:count], quiet), quiet)
        features = self.teacher(*quiet_view, y[:count], split and split[0][:count])
        target = Target(features, self.teacher.head.prototypes.weight, self.centers)

        # The student generates all of them and is compared on those that the teacher saw.
        out, of_class, of_patches = network(
            view, t, y, split, target,
            student_temperature=self.settings.student_temperature,
            teacher_temperature=self.temperature,
            centering=self.settings.centering,
            all_reduce=sum_over_ranks,
        )  # fmt: skip
        self._accumulate(of_class, of_patches)
        generative = self.compute_loss(out, x0, eps, level)
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
        """Return the teacher's pooled features (B, width) of clean samples x, without a label; gradients reach x only.

        The input is the mean of the teacher's noisy view, so that equal samples have equal features.
        """
        quiet = self._quiet_level(len(x), x.device)
        view, t = self.noise.network_input(self.noise.add_noise(x, torch.zeros_like(x), quiet), quiet)
        y = torch.full((len(x),), self.classes, device=x.device)
        return self.teacher.describe(view, t, y)

    def _teacher_level(self, level: Tensor, generator: torch.Generator) -> Tensor:
        """Return the teacher's noise levels for the student's."""
        kind, amount = self.settings.teacher_law
        if kind != "relative":
            return self._quiet_level(len(level), level.device)
        lower = amount * torch.rand(level.shape, generator=generator, device=level.device)
        return self.noise.at_quantile((self.noise.quantile_of(level) - lower).clamp_min(LOWEST_QUANTILE))

    def _quiet_level(self, count: int, device: torch.device) -> Tensor:
        """Return the teacher's noise level (count,) where it does not depend on the student's."""
        kind, amount = self.settings.teacher_law
        if kind == "fixed":
            return self.noise.level_at(amount, count, device)
        quantile = amount if kind == "quantile" else QUIET_QUANTILE
        return self.noise.at_quantile(torch.full((count,), quantile, device=device))

    @property
    def hides(self) -> bool:
        """Return whether the step hides patches from the student's encoder."""
        return self.keep < self.tokens and not self.finished

    def _compared(self, batch: int) -> int:
        """Return how many samples of a micro-batch L_D compares."""
        return max(1, round(self.settings.share * batch))

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        """Set the step's temperature and whether it compares; return the decay of the teacher where it moves."""
        settings, progress = self.settings, step / steps
        self.finished = progress >= settings.until
        self.compares = not self.finished and step % settings.every == 0
        self.temperature = settings.teacher_temperature_at(progress)
        self.gradients.reset()
        if settings.frozen or not self.compares:
            return {}
        return {TEACHER: settings.momentum_at(step, steps) ** settings.every}

    def end_step(self) -> dict[str, Tensor]:
        """Move the centers, and return prototype usage, the centers' norm and the ratio of the two losses' gradients.

        Prototype usage is the share of the prototypes that the teacher prefers for any patch of the step. The ratio is
        |beta grad L_D| / |grad L_G| at the encoder's output. Teacher features that are not finite leave the centers as
        they are.
        """
        if not self.count:
            return {}
        means, wins = self.means / self.count, self.wins.to(self.means.dtype)
        packed = sum_over_ranks(torch.cat([means.flatten(), wins, self.gradients.squares]))
        means, wins, squares = packed.split([means.numel(), wins.numel(), 2])
        moved = torch.lerp(means.view_as(self.centers) / ranks(), self.centers, self.settings.center_momentum)
        self.centers = torch.where(moved.isfinite().all(), moved, self.centers)
        self._reset()
        return {
            "prototype_usage": (wins > 0).float().mean(),
            "centre_norm": self.centers[1].norm(),
            "discriminative_gradient_ratio": self.gradients.read(squares),
        }

    def _accumulate(self, of_class, of_patches) -> None:
        self.means = self.means + torch.stack([of_class.teacher_mean, of_patches.teacher_mean])
        self.wins = self.wins + of_patches.wins
        self.count += 1

    def _reset(self) -> None:
        self.means, self.count = torch.zeros_like(self.centers), 0
        self.wins = torch.zeros(self.centers.shape[1], dtype=torch.int64, device=self.centers.device)

    def sampled_network(self, module: Student) -> nn.Module:
        """Return the student's encoder and decoder, without head and teacher."""
        return module.network

    def ema_replicas(self, module: Student) -> dict:
        """Map the teacher's EMA to its replica's tensors and the student's parameters; a frozen teacher has none."""
        if self.settings.frozen:
            return {}
        return {TEACHER: (list(self.teacher.parameters()), self.teacher.sources(module))}

    def graphed(self, module: Student, batch: int) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        """Return the networks that a step calls, and tensors like those they are called with."""
        network, encoder = module.network, module.encoder
        images = image_inputs(encoder, batch)
        visible = torch.zeros(batch, self.keep, dtype=torch.int64, device=images[0].device)
        parts = []
        if not self.teacher.skips_blocks:
            parts.append((self.teacher.encoder, image_inputs(encoder, self._compared(batch))))
        hides = self.keep < self.tokens
        # After `until`, and where nothing is hidden, steps without comparison call a plain network: another graph.
        plain = self.settings.until < 1 or (self.settings.every > 1 and not hides)
        if not isinstance(network, EncoderDecoder):
            return [*parts, *[(network, images)][:plain], (network, (*images, visible))]
        tokens = visible.new_zeros(batch, self.tokens, network.decoder.width, dtype=network.decoder.adaln.weight.dtype)
        condition = tokens.new_zeros(batch, encoder.width)
        return [
            *parts,
            *[(encoder, images)][: plain or not hides],
            *[(encoder, (*images, visible))][:hides],
            (network.decoder, (tokens.requires_grad_(), condition.requires_grad_())),
        ]

    def flops(self, module: Student) -> dict[str, float]:
        """Return the mean FLOPs of a step for one image, by part; once L_D is off it costs none."""
        network, settings = module.network, self.settings
        seen = self.keep if self.hides else self.tokens
        compared = 0.0 if self.finished else settings.share / settings.every
        head = head_products(module.head, self.keep + 1)
        if isinstance(network, EncoderDecoder):
            encoder = encoder_products(network.encoder, seen + (network.encoder.class_token is not None))
            decoder = decoder_products(network)
        else:
            encoder, decoder = split_products(network, seen)
        return {
            "encoder": 6 * encoder,
            "decoder": 6 * decoder,
            "head": 6 * compared * head,
            "teacher": compared * (self.teacher_flops() + 2 * head),
        }

    def teacher_flops(self) -> int:
        """Return the FLOPs of the teacher's encoder for one image."""
        encoder = self.teacher.encoder
        if self.teacher.skips_blocks:
            return 2 * self.tokens * encoder.patch**2 * encoder.channels * encoder.width
        return 2 * encoder_products(encoder, self.tokens + (encoder.class_token is not None))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move teacher, centers and sums; the teacher gets `dtype`."""
        self.teacher.to(device, dtype)
        self.gradients.to(device)
        self.centers = self.centers.to(device)
        self._reset()

    def state_dict(self) -> dict:
        """Return the centers, and the weights of a frozen teacher, which no EMA holds."""
        frozen = {"teacher": self.teacher.state_dict()} if self.settings.frozen else {}
        return {"centers": self.centers.cpu(), **frozen}

    def load_state_dict(self, state: dict) -> None:
        """Load a `state_dict`."""
        self.centers = state["centers"].to(self.centers.device)
        if self.settings.frozen:
            self.teacher.load_state_dict(state["teacher"])
