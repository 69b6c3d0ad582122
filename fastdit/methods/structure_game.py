"""SADM: structure-guided adversarial training (Yang et al., CVPR 2024, arXiv 2402.17563).

Denoising losses judge each sample by itself. Here a second player, Psi, also compares the batch's structure, all
pairwise distances, between clean samples and their one-step estimates:

    f_i = Psi(x0_i),   g_i = Psi(x0_hat_i)                             x0_hat from the denoising loss's own forward pass
    P_ij = |f_i - f_j| / rms |f_i - f_j|,   Q_ij the same of g         over pairs i != j of the global batch
    L_str = sum w_ij penalty(P_ij - Q_ij) / sum w_ij,   w_ij = sqrt(w_i w_j),   w_i = s^2 / (sigma_i^2 + s^2)

    denoiser:  min  L_denoise + lambda L_str       over its own weights
    Psi:       max  L_str                          over its own, on the same x0 and x0_hat

Both step from where they stand: neither sees the other's update of the same step. So Psi passes once over x0 and once
over x0_hat, and one backward pass from L_str, on the spot, makes both gradients: d L_str / d x0_hat, which goes to the
denoiser with its own loss, and d L_str / d Psi, which waits for the end of the step. That is six forward passes' worth
(each player by itself, one after the other: nine). Psi's activations are gone before the denoiser's backward pass; its
gradients, as large as its weights, stay beside it.

From the paper: the game, and that the discriminator's score is the structural distance itself. Its normalisation (which
bounds the maximisation: see kernels/structure.py), pairs over all ranks, weights that fade with noise, and all numbers
are ours.

It is played on top of any other method: `StructureGame(Denoising(...))`, `StructureGame(SelfDiscrimination(...))`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from fastdit.kernels import AdamWEMA, StructureLoss, structure_loss
from fastdit.methods.denoising import Denoising, Network, Outcome
from fastdit.methods.ranks import average_over_ranks, ranks
from fastdit.methods.self_discrimination import SelfDiscrimination
from fastdit.models import LatentDecoder

COINCIDENT = 1e-12  # mean squared distance of features that are taken for one point


@dataclass(frozen=True)
class SADM:
    """Settings of SADM, all ours.

    Args:
        structure: off; fixed: Psi stays as it starts; adversarial: it is trained against the denoiser.
        weight: lambda.
        psi: latent_resnet: a small ResNet on latents or small images; image_resnet: a pretrained ResNet-18 on pixels
            (psi_weights), for latents on what data.autoencoder, which is not trained, makes of them; teacher: SD-DiT's
            teacher, which moves by itself and is no player: structure must be fixed.
        psi_weights: file that Psi starts from: of fastdit-warm-start, or a torchvision ResNet-18; none: random.
        psi_width: latent_resnet's, of its first block.
        psi_features: dimension of latent_resnet's features.
        psi_decoder_gradient: whether what image_resnet says of latents goes back to them through the decoder. False: by
            a fixed linear map of a cell to its pixels' mean colour instead, fitted at the start; features are still
            those of the decoded pictures, at two passes of the decoder for a sample and step in place of four. On
            photographs, taef2 and a random ResNet the two gradients have a cosine of 0.46 to 0.51, and a small step
            along the map's lowers L_str by 0.54 to 0.69 of what one along the decoder's does.
        spectral_norm: bound the weights of latent_resnet.
        gradient_penalty: weight of mean |d (v . Psi(x)) / d x|^2 with random unit vectors v, over the mean squared
            distance of the features (unless distances are not normalised); 0 is off.
        psi_lr: Psi's learning rate.
        psi_warmup: share of the run over which it rises, as the denoiser's: by a line that begins one step above zero.
        psi_schedule: after that: constant, or cosine to zero at the end of the run.
        psi_betas: of Psi's Adam.
        psi_every: denoiser steps per step of Psi.
        distance: of features: euclidean, squared or cosine.
        normalise: distances by their root mean square or their mean over the pairs, or not at all. Over the mean, a
            Psi that sets one sample apart and lets all others coincide wins as much as the batch is large, and finds
            that: on the shipped images (batch 64, one seed, 570 steps) L_str rose to 16 and Psi's gradient norm to
            1125, over the root mean square to 1.1 and 46.
        penalty: of a difference of distances.
        huber_delta: where huber turns linear.
        sigma_data: s above.
    """

    structure: Literal["off", "fixed", "adversarial"] = "adversarial"
    weight: float = 0.1
    psi: Literal["latent_resnet", "image_resnet", "teacher"] = "latent_resnet"
    psi_weights: str | None = None
    psi_width: int = 96
    psi_features: int = 512
    psi_decoder_gradient: bool = True
    spectral_norm: bool = False
    gradient_penalty: float = 0.0
    psi_lr: float = 1e-4
    psi_warmup: float = 0.0
    psi_schedule: Literal["constant", "cosine"] = "constant"
    psi_betas: tuple[float, float] = (0.5, 0.999)
    psi_every: int = 1
    distance: Literal["euclidean", "squared", "cosine"] = "euclidean"
    normalise: Literal["rms", "mean", "none"] = "rms"
    penalty: Literal["l2", "l1", "huber"] = "l2"
    huber_delta: float = 0.2
    sigma_data: float = 0.5

    def psi_lr_at(self, step: int, steps: int) -> float:
        """Psi's learning rate in step `step` (0-based) of `steps`."""
        warm = min(1.0, (step + 1) / (self.psi_warmup * steps)) if self.psi_warmup else 1.0
        cosine = self.psi_schedule == "cosine"
        return self.psi_lr * warm * (0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1.0)


class StructureGame(Denoising):
    """Another method, `base`, with the structure term and the second player.

    Args:
        base: the method that makes outcomes; its hooks are called in turn.
        settings: see `SADM`.
        psi: (B, C, H, W) float32 to features (B, d); trained here, in fp32, if the structure is adversarial.
        psi_flops: FLOPs of its forward pass for one sample.
        decoder: makes of latents the pictures that psi sees; none: it sees the samples themselves. Never trained.
        decoder_flops: of its forward pass for one sample.

    Psi is whole on every rank: it is a hundredth of a DiT. Its gradients are averaged over the ranks.
    """

    def __init__(
        self,
        base: Denoising,
        settings: SADM,
        psi: nn.Module,
        psi_flops: float = 0.0,
        decoder: LatentDecoder | None = None,
        decoder_flops: float = 0.0,
    ) -> None:
        super().__init__(base.noise, base.classes, base.label_drop)
        self.base, self.settings, self.psi, self.psi_flops = base, settings, psi.eval().requires_grad_(False), psi_flops
        self.decoder, self.decoder_flops = decoder, decoder_flops
        self.plays = settings.structure == "adversarial"
        self.step = 0
        self.batches = 0  # micro-batches whose gradients Psi holds
        self.autocast = False
        self.psi_lr = settings.psi_lr

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: torch.Generator) -> Outcome:
        """The base's loss and lambda L_str, over the pairs of all ranks' micro-batches. No host sync.

        Where Psi shall step, its gradients are left with its weights. Raises ValueError if all ranks together have but
        one sample.
        """
        outcome = self.base.loss(network, x0, y, generator)
        if self.settings.structure == "off":
            return outcome
        with torch.no_grad():
            real = self._shown(x0)
        fake = self._shown(outcome.x0_hat)
        structure, slope = self._play(real.detach(), fake.detach(), outcome.level, generator)
        terms = {
            "structure_loss": structure.loss.detach(),
            "real_distance": structure.real_distance.float(),
            "fake_distance": structure.fake_distance.float(),
            "distance_correlation": structure.correlation.float(),
        }
        loss = outcome.loss + self.settings.weight * _WithSlope.apply(fake, structure.loss.detach(), slope)
        return outcome._replace(loss=loss, terms=outcome.terms | terms)

    def _play(
        self, real: Tensor, fake: Tensor, level: Tensor, generator: torch.Generator
    ) -> tuple[StructureLoss, Tensor]:
        """L_str of what Psi sees, its graph used up, and its gradient in `fake`.

        Before a step of Psi, L_str's gradient in its weights, less the gradient penalty's, is added to theirs.
        """
        learns = self.plays and (self.step + 1) % self.settings.psi_every == 0
        penalty = self.settings.gradient_penalty if learns else 0.0
        self.psi.requires_grad_(learns)
        weights = list(self.psi.parameters()) if learns else []
        seen = real.requires_grad_(penalty > 0), fake.requires_grad_()
        features = [self._features(x) for x in seen]
        structure = self._compare(*features, level)
        if penalty:  # no matter of the denoiser's
            structure.loss.backward(inputs=[fake], retain_graph=True)
            (structure.loss - penalty * self._steepness(seen, features, generator)).backward(inputs=weights)
        else:
            structure.loss.backward(inputs=[fake, *weights])
        self.psi.requires_grad_(False)
        self.batches += learns
        return structure, fake.grad

    def end_step(self) -> dict[str, Tensor]:
        """The base's, then Psi's step, one in `psi_every`."""
        terms = self.base.end_step()
        self.step += 1
        return terms | self._step_psi() if self.batches else terms

    def _step_psi(self) -> dict[str, Tensor]:
        """One ascent step of Psi on L_str. Gradients that are not finite change no weight."""
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
        """One power iteration of Psi's spectral norms, on the new weights: what both players see in the next step."""
        self.psi.train()
        for module in self.psi.modules():
            if isinstance(module, ParametrizationList):
                module()
        self.psi.eval()

    def _shown(self, x: Tensor) -> Tensor:
        """What Psi sees of samples x."""
        if self.decoder is None:
            return x
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.decoder(x).float()

    def _features(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.autocast):
            return self.psi(x).float()

    def _steepness(self, seen: Sequence[Tensor], features: Sequence[Tensor], generator: torch.Generator) -> Tensor:
        """The gradient penalty for clean samples and their estimates, as seen, over all ranks.

        Where L_str does not see the scale of the features, the slope is relative to their spread: else it would fall
        by shrinking them, and bound nothing.
        """
        both = torch.cat(features)
        v = F.normalize(torch.randn(both.shape, generator=generator, device=both.device), dim=1)
        slopes = torch.autograd.grad((v * both).sum(), seen, create_graph=True)
        scaled = self.settings.normalise == "none" and self.settings.distance != "cosine"
        total = 0.0
        for own, slope in zip(features, slopes):
            rows = _AllRanks.apply(torch.cat([own, slope.flatten(1).square().sum(1, keepdim=True)], dim=1))
            squares = rows[:, -1].mean()
            total = total + (squares if scaled else squares / (2 * rows[:, :-1].var(0).sum()).clamp_min(COINCIDENT))
        return total / 2

    def _compare(self, real: Tensor, fake: Tensor, level: Tensor) -> StructureLoss:
        """L_str over the pairs of all ranks: the same value on each, with the gradient for its own rows."""
        settings, sigma = self.settings, self.noise.noise_to_signal(level)
        weight = settings.sigma_data**2 / (sigma.square() + settings.sigma_data**2)
        rows = _AllRanks.apply(torch.cat([real, fake, weight[:, None]], dim=1))
        all_real, all_fake, weight = rows.split([real.shape[1], fake.shape[1], 1], dim=1)
        return structure_loss(
            all_real if real.requires_grad else all_real.detach(),  # what no player needs is not computed
            all_fake,
            weight[:, 0].detach(),
            distance=settings.distance,
            normalise=settings.normalise,
            penalty=settings.penalty,
            huber_delta=settings.huber_delta,
        )

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        self.psi_lr = self.settings.psi_lr_at(step, steps)
        return self.base.begin_step(step, steps)

    def sampled_network(self, module: nn.Module) -> nn.Module:
        return self.base.sampled_network(module)

    def followers(self, module: nn.Module) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        return self.base.followers(module)

    def graphed(self, module: nn.Module, batch: int) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        return self.base.graphed(module, batch)

    def flops(self, module: nn.Module) -> dict[str, float]:
        """Psi on x0 and on x0_hat, and backward to x0_hat; before its own step also to its weights, from both. The
        decoder on both, and backward, for which its own forward comes again."""
        own = {}
        if self.settings.structure != "off":
            passes = 3 + (3 / self.settings.psi_every if self.plays else 0)
            decoded = 4 if self.settings.psi_decoder_gradient else 2
            own["structure"] = passes * self.psi_flops + decoded * self.decoder_flops
        return self.base.flops(module) | own

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Psi keeps fp32 weights and computes in `dtype`."""
        self.base.to(device, dtype)
        self.psi.to(device)
        if self.decoder is not None:
            self.decoder.to(device)
        self.autocast = dtype == torch.bfloat16
        if self.plays:
            self.optimizer = AdamWEMA(self.psi.parameters(), lr=self.psi_lr, betas=self.settings.psi_betas)

    def state_dict(self) -> dict:
        own = {"step": self.step, "psi": self.psi.state_dict()} if self.settings.structure != "off" else {}
        if self.plays:
            own["optimizer"] = self.optimizer.state_dict()
        return {"base": self.base.state_dict(), **own}

    def load_state_dict(self, state: dict) -> None:
        self.base.load_state_dict(state["base"])
        if self.settings.structure != "off":
            self.step = state["step"]
            self.psi.load_state_dict(state["psi"])
        if self.plays:
            self.optimizer.load_state_dict(state["optimizer"])


class TeacherFeatures(nn.Module):
    """SD-DiT's teacher as Psi. It stays the method's own: no part of this module, nor of its state."""

    def __init__(self, method: SelfDiscrimination) -> None:
        super().__init__()
        self._describe, self.flops = method.describe, method.teacher_flops()

    def forward(self, x: Tensor) -> Tensor:
        return self._describe(x)


class _WithSlope(torch.autograd.Function):
    """`value` (), whose gradient in x is known: `slope`, of x's shape."""

    @staticmethod
    def forward(ctx, x: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return upstream * slope, None, None


class _AllRanks(torch.autograd.Function):
    """Rows of all ranks (B, d) -> (ranks * B, d), in rank order.

    Every rank then computes the same loss, and an engine averages gradients over ranks: so a rank's own rows get the
    upstream times the number of ranks, and the average is the gradient of that one loss.
    """

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        ctx.ranks = ranks()
        if ctx.ranks == 1:
            return own.view_as(own)
        rows = own.new_empty(ctx.ranks * len(own), *own.shape[1:])
        dist.all_gather_into_tensor(rows, own.contiguous())
        return rows

    @staticmethod
    def backward(ctx, upstream: Tensor) -> Tensor:
        if ctx.ranks == 1:
            return upstream
        return ctx.ranks * upstream.chunk(ctx.ranks)[dist.get_rank()]
