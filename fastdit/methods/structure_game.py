"""Define SADM: structure-guided adversarial training (Yang et al., CVPR 2024, arXiv 2402.17563).

A denoising loss treats each sample by itself. SADM also matches the structure of the batch, which is all pairwise
feature distances, between clean samples and their x0 predictions. A second player, the encoder Psi, gives the features:

    f_i = Psi(x0_i),   g_i = Psi(x0_hat_i)                  x0_hat from the denoising loss's own forward pass
    P_ij = |f_i - f_j| / rms,  Q_ij likewise from g         over pairs i != j of the global batch
    L_str = sum w_ij penalty(P_ij - Q_ij) / sum w_ij,       w_ij = w_i w_j,   w_i = s^2 / (sigma_i^2 + s^2)

    denoiser:  min  L_denoise + lambda L_str       over its weights
    Psi:       max  L_str                          over its weights, on the same x0 and x0_hat

The mean square inside rms has the weights w_ij too (kernels/structure.py). At high noise even the best x0_hat is a blur
that cannot match the structure, so the weights of pairs fall with noise. They must fall as 1 / sigma_i^2, because the
gradient of x0_hat in the network's output grows as sigma_i under DDPM. Samples above a noise level have weight zero.
Psi sees x0_hat clamped to the range of the clean samples; values outside get no structure gradient.

Both players step from the same point: neither sees the other's update of the same step. So Psi passes once over x0 and
once over x0_hat, and a single backward pass from L_str, within the denoiser's forward pass, gives both gradients:
d L_str / d x0_hat, which the denoiser adds to its gradient, and d L_str / d Psi, which waits for the end of the step.
This costs as much as six forward passes of Psi; players that take turns would need nine. Psi's activations are freed
before the denoiser's backward pass. Its gradients, as large as its weights, stay in memory until the end of the step.

The game, with the structural distance itself as the discriminator's score, is the paper's. The normalization (which
bounds the maximization), pairs over all ranks, weights that fall with noise, the clamp, the choice of lambda, the start
of the game and of Psi, and all numbers are ours.

SADM runs on top of any other method: `StructureGame(Denoising(...))`, `StructureGame(SelfDiscrimination(...))`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fastdit.errors import UserError
from fastdit.kernels import AdamWEMA, AnyGenerator, StructureLoss, draw_normal, structure_loss
from fastdit.methods.denoising import GRADIENTS, Denoising, Network, Outcome, Panels, Shape
from fastdit.methods.encoder_build import build_latent_resnet, count_flops
from fastdit.methods.encoder_warm_start import warm_start_before_run
from fastdit.methods.gradient_balance import GradientBalance
from fastdit.methods.ranks import average_over_ranks, gather_over_ranks, max_over_ranks, ranks
from fastdit.methods.self_discrimination import SelfDiscrimination
from fastdit.methods.structure_settings import SADM
from fastdit.methods.wrapper import Wrapper
from fastdit.models import ImageResNet, LatentDecoder
from fastdit.models.image_resnet import SMALLEST

COINCIDENT = 1e-12  # lower limit of the features' mean squared distance in the gradient penalty


class StructureGame(Wrapper):
    """Add the structure loss and the second player to another method, `base`.

    Args:
        base: the method that computes outcomes.
        settings: see `SADM`.
        psi: maps (B, C, H, W) float32 to features (B, d); trained here, in fp32, if the structure is adversarial.
        psi_flops: FLOPs of psi's forward pass for one sample.
        decoder: decodes latents to the pictures that psi sees, and is not trained; None: psi sees the samples.
        decoder_flops: FLOPs of the decoder's forward pass for one sample.

    Every rank holds all of Psi, which is a hundredth of a DiT. Its gradients are averaged over ranks.
    """

    name = "sadm"
    summary = "the structure game"
    settings_type = SADM
    panels: ClassVar[Panels] = {
        GRADIENTS: {"gradient_ratio": "structure, at the output"},
        "structure loss": {"structure_loss": "structure loss"},
        "weight of the structure loss": {"structure_weight": "weight"},
        "mean distance of features": {"real_distance": "clean samples", "fake_distance": "x0 predictions"},
        "correlation of the distances": {"distance_correlation": "correlation"},
        "Psi's gradient norm": {"psi_grad_norm": "Psi's gradient norm"},
    }

    @classmethod
    def check(cls, config) -> None:
        """Raise UserError if Psi needs a method or an autoencoder that the run does not have."""
        psi, data = config.sadm.psi, config.data
        if psi == "teacher" and not config.uses("sd_dit"):
            raise UserError(f"sadm.psi: teacher is SD-DiT's; it needs --method sd_dit+sadm, got {config.method}")
        if psi == "image_resnet" and data.channels not in (1, 3) and data.autoencoder is None:
            raise UserError(
                f"sadm.psi: image_resnet sees pixels, and data.channels is {data.channels}; give --data.autoencoder, "
                "which decodes latents, or choose another psi"
            )

    @classmethod
    def check_batch(cls, samples: int) -> None:
        """Raise UserError for a single sample, which has no distance to another."""
        if samples < 2:
            raise UserError("batch: sadm compares samples of one micro-batch over all ranks; it needs at least two")

    @classmethod
    def build(
        cls, config, shape: Shape, module: nn.Module, base: Denoising, decoder: LatentDecoder | None = None
    ) -> tuple[nn.Module, "StructureGame"]:
        """Return the base's module, and the game. Raises UserError if Psi cannot be built or does not fit."""
        # Build Psi, and find the shape of its input.
        settings, psi, seen = config.sadm, build_psi(config, shape, base), shape
        decoder = decoder if settings.psi == "image_resnet" else None
        if decoder is not None:
            factor = decoder.autoencoder.factor
            seen = Shape(3, factor * shape.height, factor * shape.width, shape.classes)
            if not settings.psi_decoder_gradient:
                decoder.approximate_gradient()
        if settings.psi == "image_resnet" and min(seen.height, seen.width) < SMALLEST:
            raise UserError(
                f"sadm.psi: image_resnet needs at least {SMALLEST} rows and columns, it would see {seen.height} x "
                f"{seen.width}; choose another psi, or larger samples"
            )

        # Count the FLOPs of both networks.
        psi_flops = psi.flops if isinstance(psi, TeacherFeatures) else count_flops(psi, seen)
        decoder_flops = count_flops(decoder, shape) if decoder is not None else 0
        return module, cls(base, settings, psi, psi_flops, decoder, decoder_flops)

    @classmethod
    def checkpoint_signature(cls, config) -> dict[str, object]:
        """Return the settings that fix Psi's tensors in a checkpoint."""
        names = ("structure", "psi", "psi_width", "psi_features", "spectral_norm")
        return {f"sadm.{name}": getattr(config.sadm, name) for name in names}

    def __init__(
        self,
        base: Denoising,
        settings: SADM,
        psi: nn.Module,
        psi_flops: float = 0.0,
        decoder: LatentDecoder | None = None,
        decoder_flops: float = 0.0,
    ) -> None:
        # Hold both networks, frozen. Psi is unfrozen only while its gradients are computed.
        super().__init__(base)
        self.settings, self.psi, self.psi_flops = settings, psi.eval().requires_grad_(False), psi_flops
        self.decoder, self.decoder_flops = decoder, decoder_flops
        self.autocast = False  # whether Psi and the decoder compute in bf16

        # Hold the state of the game.
        self.adversarial = settings.structure == "adversarial"
        self.begun = settings.structure != "off"
        self.balance = GradientBalance(
            settings.weight, settings.gradient_ratio, settings.weight_floor, settings.weight_cap
        )
        self.step = 0
        self.batches = 0  # micro-batches whose gradients Psi holds
        self.psi_lr = settings.psi_lr

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: AnyGenerator) -> Outcome:
        """Return the base's outcome with lambda L_str added to its loss, without a host sync.

        L_str is computed over the pairs of all ranks' micro-batches. Before a step of Psi, its gradients are added to
        its weights' `grad`. Raises ValueError if all ranks together have only one sample.
        """
        outcome = super().loss(network, x0, y, generator)
        if not self.begun:
            return outcome

        # Compute L_str of Psi's features, and its gradient in the x0 prediction.
        limit = self._limit(x0)
        with torch.no_grad():
            real = self._decoded(x0.clamp(-limit, limit))
        x0_hat = outcome.x0_hat.detach().requires_grad_()
        structure = self._play(real, x0_hat, limit, outcome.level, generator)
        value, slope = structure.loss.detach(), x0_hat.grad

        # Measure it relative to the denoising loss's gradient, both at the network's output.
        if outcome.outputs:
            self.balance.add(
                torch.autograd.grad(outcome.loss, outcome.outputs, retain_graph=True),
                torch.autograd.grad(outcome.x0_hat, outcome.outputs, slope, retain_graph=True),
            )
        elif self.balance.auto:
            raise ValueError("sadm.weight: auto needs the network's outputs, which the base's outcome lacks")

        # Add the structure loss, whose gradient is known already.
        terms = {
            "structure_loss": value,
            "real_distance": structure.real_distance.float(),
            "fake_distance": structure.fake_distance.float(),
            "distance_correlation": structure.correlation.float(),
        }
        loss = outcome.loss + self.balance.weight * _WithSlope.apply(outcome.x0_hat, value, slope)
        return outcome._replace(loss=loss, terms=outcome.terms | terms)

    def _play(
        self, real: Tensor, x0_hat: Tensor, limit: Tensor | float, level: Tensor, generator: AnyGenerator
    ) -> StructureLoss:
        """Return L_str without its graph, and add its gradient to that of the leaf `x0_hat`.

        Before a step of Psi, the gradient of L_str minus the penalty is also added to that of Psi's weights.
        """
        # Compute L_str, with gradients in Psi's weights if this step updates them.
        learns = self.adversarial and (self.step + 1) % self.settings.psi_every == 0
        penalty = self.settings.gradient_penalty if learns else 0.0
        self.psi.requires_grad_(learns)
        weights = list(self.psi.parameters()) if learns else []
        seen = real.requires_grad_(penalty > 0), self._decoded(x0_hat.clamp(-limit, limit))
        features = [self._features(x) for x in seen]
        structure = self._compare(*features, level)

        # Run the backward pass of both players. The gradient penalty is part of Psi's objective only.
        if penalty:
            structure.loss.backward(inputs=[x0_hat], retain_graph=True)
            (structure.loss - penalty * self._steepness(seen, features, generator)).backward(inputs=weights)
        else:
            structure.loss.backward(inputs=[x0_hat, *weights])
        self.psi.requires_grad_(False)
        self.batches += learns
        return structure

    def _limit(self, x0: Tensor) -> Tensor | float:
        """Return the largest magnitude that Psi sees, the same on all ranks."""
        if self.settings.clamp is not None:
            return self.settings.clamp
        return max_over_ranks(x0.abs().amax())

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int, say: Callable[[str], None]) -> None:
        """Prepare the base, then warm-start Psi for `SADM.warm_steps` steps."""
        super().prepare(batches, steps, say)
        if not (count := self.settings.warm_steps(steps, self.classes)):
            return
        warm_start_before_run("sadm", self.psi, self.classes, batches, count, self.autocast, say)

    def preparation_batches(self, steps: int) -> int:
        """Return the number of batches on which the base and Psi are prepared."""
        return super().preparation_batches(steps) + self.settings.warm_steps(steps, self.classes)

    def end_step(self) -> dict[str, Tensor]:
        """Set lambda, update Psi in one of `psi_every` steps, and return the health signals of base and game."""
        terms = super().end_step()
        self.step += 1
        if self.begun:
            if self.balance.auto:
                terms = terms | {"structure_weight": self.balance.weight}
            terms = terms | self.balance.end_step()
        return terms | self._step_psi() if self.batches else terms

    def _step_psi(self) -> dict[str, Tensor]:
        """Take one ascent step of Psi on L_str, unless gradients are not finite, and return the gradient norm."""
        grads = [p.grad for p in self.psi.parameters()]
        torch._foreach_div_(grads, -self.batches)  # the optimizer descends
        self.batches = 0
        average_over_ranks(grads)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        for group in self.optimizer.param_groups:
            group["lr"] = self.psi_lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._measure_norms()
        return {"psi_grad_norm": norm}

    @torch.no_grad()
    def _measure_norms(self) -> None:
        """Run one power iteration of Psi's spectral norms on the new weights, for the next step of both players."""
        self.psi.train()
        for module in self.psi.modules():
            if isinstance(module, ParametrizationList):
                module()
        self.psi.eval()

    def _decoded(self, x: Tensor) -> Tensor:
        """Return Psi's input for samples x: decoded pictures if there is a decoder, else the samples."""
        if self.decoder is None:
            return x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.decoder(x).float()

    def _features(self, x: Tensor) -> Tensor:
        """Return Psi's features (B, d) float32 of its input x."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.psi(x).float()

    def _steepness(self, seen: Sequence[Tensor], features: Sequence[Tensor], generator: AnyGenerator) -> Tensor:
        """Return the gradient penalty (), the mean over Psi's inputs for clean samples and x0 predictions of all ranks.

        If L_str does not depend on the scale of the features, the slope is divided by their spread. Otherwise Psi could
        lower the penalty by shrinking its features, and the penalty would bound nothing.
        """
        # Differentiate random projections of the features in their inputs.
        both = torch.cat(features)
        batch, width = features[0].shape
        numbers = draw_normal((batch, 2, width), generator=generator, device=both.device)  # for both rows of a sample
        v = F.normalize(numbers.transpose(0, 1).flatten(0, 1), dim=1)
        slopes = torch.autograd.grad((v * both).sum(), seen, create_graph=True)

        # Average the squared slopes over all ranks.
        scaled = self.settings.normalize == "none" and self.settings.distance != "cosine"
        total = 0.0
        for part, slope in zip(features, slopes):
            rows = _AllRanks.apply(torch.cat([part, slope.flatten(1).square().sum(1, keepdim=True)], dim=1))
            squares = rows[:, -1].mean()
            total = total + (squares if scaled else squares / (2 * rows[:, :-1].var(0).sum()).clamp_min(COINCIDENT))
        return total / 2

    def _compare(self, real: Tensor, fake: Tensor, level: Tensor) -> StructureLoss:
        """Return L_str over the pairs of all ranks. Every rank gets the same value, with the gradient for its rows."""
        settings, sigma = self.settings, self.noise.noise_to_signal(level)
        weight = settings.sigma_data**2 / (sigma.square() + settings.sigma_data**2) * (sigma <= settings.max_noise)
        rows = _AllRanks.apply(torch.cat([real, fake, weight[:, None]], dim=1))
        all_real, all_fake, weight = rows.split([real.shape[1], fake.shape[1], 1], dim=1)
        return structure_loss(
            all_real if real.requires_grad else all_real.detach(),  # compute no gradient that no player needs
            all_fake,
            weight[:, 0].detach(),
            distance=settings.distance,
            normalize=settings.normalize,
            penalty=settings.penalty,
            huber_delta=settings.huber_delta,
        )

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        """Decide whether the game is on, set Psi's learning rate, and begin the base's step."""
        self.begun = self.settings.structure != "off" and step >= self.settings.first_step(steps)
        self.psi_lr = self.settings.psi_lr_at(step, steps)
        return super().begin_step(step, steps)

    def flops(self, module: nn.Module) -> dict[str, float]:
        """Return FLOPs by part, for the step that `begin_step` began last.

        Psi passes forward over x0 and x0_hat, and backward to x0_hat; before its step also backward to its weights for
        both. The decoder passes forward over both, and backward to x0_hat, which repeats its forward pass.
        """
        game = {}
        if self.begun:
            passes = 3 + (3 / self.settings.psi_every if self.adversarial else 0)
            decoded = 4 if self.settings.psi_decoder_gradient else 2
            game["structure"] = passes * self.psi_flops + decoded * self.decoder_flops
        return super().flops(module) | game

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move everything, and build Psi's optimizer.

        Psi keeps fp32 weights and computes in `dtype`; on GPUs its weights are channels-last.
        """
        super().to(device, dtype)
        self.psi.to(device)
        if device.type == "cuda":
            self.psi.to(memory_format=torch.channels_last)
        if self.decoder is not None:
            self.decoder.to(device)
        self.balance.to(device)
        self.autocast = dtype == torch.bfloat16
        if self.adversarial:
            self.optimizer = AdamWEMA(self.psi.parameters(), lr=self.psi_lr, betas=self.settings.psi_betas)

    def state_dict(self) -> dict:
        """Return the state of the base, of Psi and its optimizer, and of lambda."""
        game = {}
        if self.settings.structure != "off":
            game = {"step": self.step, "psi": self.psi.state_dict(), "balance": self.balance.state_dict()}
        if self.adversarial:
            game["optimizer"] = self.optimizer.state_dict()
        return super().state_dict() | game

    def load_state_dict(self, state: dict) -> None:
        """Load the result of `state_dict`."""
        super().load_state_dict(state)
        if self.settings.structure != "off":
            self.step = state["step"]
            self.psi.load_state_dict(state["psi"])
            if "balance" in state:  # older checkpoints lack it
                self.balance.load_state_dict(state["balance"])
        if self.adversarial:
            self.optimizer.load_state_dict(state["optimizer"])
            # The checkpoint may come from another device, where weights and moments have another memory layout.
            for weight, moments in self.optimizer.state.items():
                for name, value in moments.items():
                    moments[name] = torch.empty_like(weight).copy_(value) if value.shape == weight.shape else value


def build_psi(config, shape: Shape, base: Denoising) -> nn.Module:
    """Return SADM's structure encoder Psi, on the CPU. Raises UserError if its weights cannot be read."""
    settings = config.sadm
    if settings.psi == "teacher":
        return TeacherFeatures(base)
    if settings.psi == "image_resnet":
        return ImageResNet(settings.psi_weights)
    return build_latent_resnet(settings, shape, config.seed)


class TeacherFeatures(nn.Module):
    """Use SD-DiT's teacher as Psi. The teacher is no submodule, because its state belongs to SD-DiT."""

    def __init__(self, method: SelfDiscrimination) -> None:
        super().__init__()
        self._features, self.flops = method.pooled_features, method.teacher_flops()

    def forward(self, x: Tensor) -> Tensor:
        return self._features(x)


class _WithSlope(torch.autograd.Function):
    """Return `value` () as a function of x with the known gradient `slope`, of x's shape."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return upstream * slope, None, None


class _AllRanks(torch.autograd.Function):
    """Gather rows of all ranks, (B, d) -> (ranks * B, d), in rank order.

    Every rank then computes the same loss, and the engine averages gradients over ranks. So a rank's rows get the
    upstream gradient times the number of ranks, which makes the average the gradient of the one loss.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.ranks = ranks()
        return gather_over_ranks(rows.view_as(rows))

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        if ctx.ranks == 1:
            return upstream
        return ctx.ranks * upstream.chunk(ctx.ranks)[dist.get_rank()]
