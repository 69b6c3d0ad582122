"""Define SD-DiT: self-supervised discrimination beside generation (Zhu et al., CVPR 2024, arXiv 2403.17004).

An image appears at two points of its probability-flow ODE, one noisy and one nearly clean:

    x_S = x0 + sigma_S eps,  sigma_S from the noise process's law      x_T = x0 + sigma_T eps,  sigma_T low in that law

    x_S --visible patches--> student encoder --> decoder --> out        L_G = denoising loss over all patches
                                  |
                                 head --> z_S --+
                                                +--> L_D = mean_i -q_i . log p_i, for patches and for the class
    x_T ---- all patches ---> teacher encoder,  |
                              head --> z_T -----+

    p = softmax(h(z_S) / tau_S),   q = softmax((h'(z_T) - C) / tau_T),   h: cosines with the prototypes
    L = L_G + beta L_D
    teacher <- m teacher + (1 - m) student            after each update
    C <- mu C + (1 - mu) mean of h'(z_T) over ranks   after each update, for class and patches separately

The paper gives the pair of views, the patches that each network sees, the two losses and the layers that carry them. It
excludes reconstruction and mask tokens. iBOT, on which it builds, gives head, temperatures, centering and momenta.
Everything else is ours, and `SDDiT` marks it so.

In plain DiT steps, a step with the default settings costs by count 1.11 at S/2 and 1.09 at XL/2 with the split decoder,
and 1.24 and 1.21 with the extra one. With the split decoder it costs 0.95 if `every` is 4 or `share` is 0.25, and 1.00
after `until`. `python benchmarks/throughput.py --method sd_dit` measures it.
"""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastdit.kernels import AnyGenerator, PrototypeLoss, draw_uniform, split_tokens
from fastdit.methods.denoising import GRADIENTS, Denoising, Network, Outcome, Panels, Shape, image_inputs
from fastdit.methods.gradient_balance import GradientBalance
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
    check_fp8_width,
    check_heads,
    decoder_products,
    encoder_products,
    head_products,
    split_products,
)

__all__ = ["SDDiT", "SelfDiscrimination"]

TEACHER = "teacher"
BETAS = (1e-3, 1.0)  # smallest and largest beta of auto
LOWEST_QUANTILE = 1e-3  # lower limit, in the student's law, of a teacher's level relative to the student's


class SelfDiscrimination(Denoising):
    """Compute L_G and L_D of a `Student`, and hold its teacher.

    Args:
        noise, classes, label_drop: as in `Denoising`.
        settings: see `SDDiT`.
        student: the trained module, before it is sharded. The teacher starts as its copy.
    """

    name = "sd_dit"
    summary = "self-supervised discrimination beside it"
    settings_type = SDDiT
    panels: ClassVar[Panels] = {
        "discriminative loss": {"discriminative_loss": "discriminative loss"},
        "teacher entropy (nats)": {"teacher_entropy": "patches", "cls_teacher_entropy": "class"},
        "KL(teacher || student) (nats)": {"teacher_student_kl": "patches", "cls_teacher_student_kl": "class"},
        "share of prototypes in use": {"prototype_usage": "patches"},
        "norm of the center": {"center_norm": "patches"},
        GRADIENTS: {"discriminative_gradient_ratio": "discrimination, at the encoder's output"},
    }
    older_signature: ClassVar[dict[str, object]] = {"sd_dit.decoder": "extra", "sd_dit.teacher": "moving"}

    @classmethod
    def complete(cls, settings: SDDiT) -> SDDiT:
        """Return `settings` with `decoder` set."""
        return replace(settings, decoder=settings.named_decoder)

    @classmethod
    def check(cls, config) -> None:
        """Raise UserError if the settings of the decoder do not fit the DiT."""
        settings, dims = config.sd_dit, config.model.dims()
        if settings.decoder == "split":
            settings.split_of(dims["depth"])
            return
        sizes = settings.sizes_for(dims["width"], dims["depth"])
        check_heads(sizes.decoder_width, sizes.decoder_heads, "sd_dit.decoder_")
        config.model.check_head_dim(sizes.decoder_width, sizes.decoder_heads, "sd_dit.decoder_")
        if config.precision == "fp8":
            check_fp8_width("sd_dit.decoder_width", sizes.decoder_width)

    @classmethod
    def build_network(cls, config, sizes: dict, out_channels: int) -> EncoderDecoder | SplitDiT:
        """Return a `SplitDiT`, or an `EncoderDecoder` whose encoder is the whole DiT."""
        # The split DiT has the sizes of the plain one.
        settings = config.sd_dit
        if settings.decoder == "split":
            return SplitDiT(
                split=settings.split_of(sizes["depth"]),
                hidden_tokens=settings.hidden_tokens,
                out_channels=out_channels,
                seed=config.seed,
                **sizes,
            )

        # The extra decoder has sizes of its own.
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
        self.centers = torch.zeros(2, student.head.sizes[-1])  # centers of the class and of the patches
        self.gradients = student.network.gradients = GradientRatio()
        self.balance = GradientBalance(settings.beta, settings.gradient_ratio, *BETAS)
        self.temperature = settings.teacher_temperature_at(0.0)
        self.compares = True  # whether the step has L_D
        self.finished = False  # whether L_D is off for the rest of the run
        self._reset()

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: AnyGenerator) -> Outcome:
        """Return L and its terms, without a host sync. The term `loss` is L_G, which compares with other methods.

        Both views of an image share label and noise (ours).
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

        # Run the teacher on the first samples of the batch, or on all of them.
        count = self._compared(len(x0))
        quiet = self._teacher_level(level[:count], generator)
        quiet_view = self.noise.network_input(self.noise.add_noise(x0[:count], eps[:count], quiet), quiet)
        features = self.teacher(*quiet_view, y[:count], split and split[0][:count])
        target = Target(features, self.teacher.head.prototypes.weight, self.centers)

        # Run the student on all samples, and compare it on those that the teacher saw.
        out, class_loss, patch_loss = network(
            view, t, y, split, target,
            student_temperature=self.settings.student_temperature,
            teacher_temperature=self.temperature,
            centering=self.settings.centering,
            all_reduce=sum_over_ranks,
        )  # fmt: skip
        self._accumulate(class_loss, patch_loss)

        # Add up the losses.
        generative = self.compute_loss(out, x0, eps, level)
        discriminative = class_loss.loss + patch_loss.loss
        terms = {
            "discriminative_loss": discriminative.detach(),
            "teacher_entropy": patch_loss.teacher_entropy,
            "teacher_student_kl": patch_loss.kl,
            "cls_teacher_entropy": class_loss.teacher_entropy,
            "cls_teacher_student_kl": class_loss.kl,
        }
        loss = generative.loss + self.balance.weight * discriminative
        return generative._replace(loss=loss, terms=generative.terms | terms)

    def pooled_features(self, x: Tensor) -> Tensor:
        """Return the teacher's pooled features (B, width) of clean samples x (B, C, H, W), with the null label.

        The teacher sees the mean of its noisy view, so equal samples have equal features. Gradients reach x only.
        """
        quiet = self._quiet_level(len(x), x.device)
        view, t = self.noise.network_input(self.noise.add_noise(x, torch.zeros_like(x), quiet), quiet)
        y = torch.full((len(x),), self.classes, device=x.device)
        return self.teacher.pooled_features(view, t, y)

    def _teacher_level(self, level: Tensor, generator: AnyGenerator) -> Tensor:
        """Return the teacher's noise levels for the student's levels (n,)."""
        kind, amount = self.settings.teacher_law
        if kind != "relative":
            return self._quiet_level(len(level), level.device)
        lower = amount * draw_uniform(level.shape, generator=generator, device=level.device)
        return self.noise.at_quantile((self.noise.quantile_of(level) - lower).clamp_min(LOWEST_QUANTILE))

    def _quiet_level(self, count: int, device: torch.device) -> Tensor:
        """Return the teacher's noise level (count,) by a rule that does not depend on the student's level."""
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
        """Return the number of samples of a micro-batch that L_D compares."""
        return max(1, round(self.settings.share * batch))

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        """Set the step's temperature and whether it has L_D; return the decay of the teacher's EMA if it moves."""
        settings, progress = self.settings, step / steps
        self.finished = progress >= settings.until
        self.compares = not self.finished and step % settings.every == 0
        self.temperature = settings.teacher_temperature_at(progress)
        self.gradients.reset()
        if settings.frozen or not self.compares:
            return {}
        return {TEACHER: settings.momentum_at(step, steps) ** settings.every}

    def end_step(self) -> dict[str, Tensor]:
        """Update the centers, and return prototype usage, their norm and the ratio of both losses' gradients.

        Prototype usage is the share of the prototypes that the teacher prefers for at least one patch of the step. The
        ratio is |beta grad L_D| / |grad L_G| at the encoder's output. Teacher features that are not finite leave the
        centers as they are.
        """
        if not self.count:
            return {}

        # Sum everything over ranks in one all-reduce.
        means, wins = self.means / self.count, self.wins.to(self.means.dtype)
        packed = sum_over_ranks(torch.cat([means.flatten(), wins, self.gradients.squares]))
        means, wins, squares = packed.split([means.numel(), wins.numel(), 2])

        # Update the centers by the mean over ranks.
        moved = torch.lerp(means.view_as(self.centers) / ranks(), self.centers, self.settings.center_momentum)
        self.centers = torch.where(moved.isfinite().all(), moved, self.centers)
        self._reset()

        # Set beta for the next step; the measured gradient of L_D has this step's in it.
        signals = {}
        if self.balance.auto:
            signals["beta"] = self.balance.weight
            self.balance.update(torch.stack([squares[0], squares[1] / self.balance.weight**2]))
        return signals | {
            "prototype_usage": (wins > 0).float().mean(),
            "center_norm": self.centers[1].norm(),
            "discriminative_gradient_ratio": self.gradients.read(squares),
        }

    def _accumulate(self, class_loss: PrototypeLoss, patch_loss: PrototypeLoss) -> None:
        """Add the teacher's statistics of a micro-batch to those of the step."""
        self.means = self.means + torch.stack([class_loss.teacher_mean, patch_loss.teacher_mean])
        self.wins = self.wins + patch_loss.wins
        self.count += 1

    def _reset(self) -> None:
        """Clear the statistics of the step."""
        self.means, self.count = torch.zeros_like(self.centers), 0
        self.wins = torch.zeros(self.centers.shape[1], dtype=torch.int64, device=self.centers.device)

    def sampled_network(self, module: Student) -> nn.Module:
        """Return the student's encoder and decoder, without head and teacher."""
        return module.network

    def ema_replicas(self, module: Student) -> dict:
        """Map the teacher's EMA to (the teacher's parameters, the student's). A frozen teacher has no EMA."""
        if self.settings.frozen:
            return {}
        return {TEACHER: (list(self.teacher.parameters()), self.teacher.sources(module))}

    def graphed(self, module: Student, batch: int) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        """Return the networks that a step calls, with tensors like their inputs."""
        # The teacher's encoder sees the compared samples.
        network, encoder = module.network, module.encoder
        images = image_inputs(encoder, batch)
        visible = torch.zeros(batch, self.keep, dtype=torch.int64, device=images[0].device)
        parts = []
        if not self.teacher.skips_blocks:
            parts.append((self.teacher.encoder, image_inputs(encoder, self._compared(batch))))

        # Steps without L_D call a plain network, which needs a graph of its own, after `until` or if nothing is hidden.
        hides = self.keep < self.tokens
        plain = self.settings.until < 1 or (self.settings.every > 1 and not hides)
        if not isinstance(network, EncoderDecoder):
            return [*parts, *[(network, images)][:plain], (network, (*images, visible))]

        # The encoder and the extra decoder are called by themselves.
        tokens = visible.new_zeros(batch, self.tokens, network.decoder.width, dtype=network.decoder.adaln.weight.dtype)
        condition = tokens.new_zeros(batch, encoder.width)
        return [
            *parts,
            *[(encoder, images)][: plain or not hides],
            *[(encoder, (*images, visible))][:hides],
            (network.decoder, (tokens.requires_grad_(), condition.requires_grad_())),
        ]

    def flops(self, module: Student) -> dict[str, float]:
        """Return the mean FLOPs of a step for one image, by part. After `until`, L_D costs nothing."""
        # Count one pass of head and networks over an image.
        network, settings = module.network, self.settings
        seen = self.keep if self.hides else self.tokens
        compared = 0.0 if self.finished else settings.share / settings.every
        head = head_products(module.head, self.keep + 1)
        if isinstance(network, EncoderDecoder):
            encoder = encoder_products(network.encoder, seen + (network.encoder.class_token is not None))
            decoder = decoder_products(network)
        else:
            encoder, decoder = split_products(network, seen)

        # The backward pass costs twice a forward pass. L_D is computed for some samples and in some steps only.
        return {
            "encoder": 6 * encoder,
            "decoder": 6 * decoder,
            "head": 6 * compared * head,
            "teacher": compared * (self.teacher_flops() + 2 * head),
        }

    def teacher_flops(self) -> int:
        """Return the FLOPs of the teacher's encoder, forward, for one image."""
        encoder = self.teacher.encoder
        if self.teacher.skips_blocks:
            return 2 * self.tokens * encoder.patch**2 * encoder.channels * encoder.width
        return 2 * encoder_products(encoder, self.tokens + (encoder.class_token is not None))

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move teacher, centers and sums. The teacher gets `dtype`."""
        self.teacher.to(device, dtype)
        self.gradients.to(device)
        self.balance.to(device)
        self.centers = self.centers.to(device)
        self._reset()

    def state_dict(self) -> dict:
        """Return the centers, what beta follows, and a frozen teacher's weights, which no EMA holds."""
        frozen = {"teacher": self.teacher.state_dict()} if self.settings.frozen else {}
        balance = {"balance": self.balance.state_dict()} if self.balance.auto else {}
        return {"centers": self.centers.cpu(), **balance, **frozen}

    def load_state_dict(self, state: dict) -> None:
        """Load the result of `state_dict`."""
        self.centers = state["centers"].to(self.centers.device)
        if self.balance.auto and "balance" in state:  # a run that began with a fixed beta has none
            self.balance.load_state_dict(state["balance"])
        if self.settings.frozen:
            self.teacher.load_state_dict(state["teacher"])
