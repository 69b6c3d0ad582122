"""Define the settings of SADM. structure_game.py explains the method."""

import math
from dataclasses import dataclass
from typing import Literal

from fastdit.errors import UserError, check_ranges
from fastdit.methods.encoder_warm_start import count_warm_steps
from fastdit.models.structure_encoders import check_width


@dataclass(frozen=True)
class SADM:
    """Hold the settings of SADM, all ours.

    Args:
        structure: off; fixed: Psi keeps its initial weights; adversarial: it is trained against the denoiser.
        weight: lambda, a number, or auto: the gradient norm of the structure loss at the network's output stays at
            `gradient_ratio` times that of the denoising loss.
        gradient_ratio: the target of auto. The metrics show the actual ratio.
        weight_floor: smallest lambda of auto.
        weight_cap: largest lambda of auto.
        start: share of the run before the game begins. Until then Psi is not used and costs nothing. Early x0
            predictions have no structure yet, and playing against them would only make Psi unlearn the classes.
        max_noise: noise-to-signal ratio above which samples have weight zero. Under DDPM, with outputs 10 % wrong, the
            weights alone leave samples above 20 three times the gradient of those below 1.
        clamp: limit of the samples and x0 predictions that Psi sees, which are clamped to [-clamp, clamp]; none: the
            largest magnitude among the clean samples of the micro-batch. Clamped values get no gradient.
        psi: latent_resnet: a small ResNet on latents or small images. image_resnet: a pretrained ResNet-18 on pixels
            (psi_weights); latents are decoded for it by data.autoencoder, which is not trained. teacher: SD-DiT's
            teacher, which follows the student and cannot be trained as a player, so structure must be fixed.
        psi_weights: file of Psi's initial weights: from fastdit-warm-start, or a torchvision ResNet-18.
        psi_warm_steps: steps in which latent_resnet learns to classify the data before step 0; their time counts as
            training. none: half of the run's steps, at most 10,000, which is 1 to 2 % of the work of a small run, and
            no step if psi_weights is set or the data has a single class.
        psi_width: width of latent_resnet's first block.
        psi_features: dimension of latent_resnet's features.
        psi_decoder_gradient: whether image_resnet's gradient passes through the decoder to the latents. If not, it
            passes a linear map from a cell to its pixels' mean color, fitted at the start. Features are still those of
            decoded pictures. A sample and step then cost two passes of the decoder instead of four.
        spectral_norm: bound the weights of latent_resnet.
        gradient_penalty: weight of mean |d (v . Psi(x)) / d x|^2 with random unit vectors v, over the mean squared
            distance of the features (unless distances are not normalized); 0 is off.
        psi_lr: Psi's learning rate.
        psi_warmup: share of the run, from the start of the game on, in which Psi's learning rate rises linearly.
        psi_schedule: Psi's learning rate after that: constant, or cosine to zero at the end of the run.
        psi_betas: betas of Psi's Adam.
        psi_every: denoiser steps per step of Psi.
        distance: distance of features: euclidean, squared or cosine.
        normalize: divide distances by their root mean square (rms) or their mean over the pairs, or not at all (none).
            With the mean, a Psi that separates one sample and lets all others coincide gains a factor that grows with
            the batch, and training finds this solution.
        penalty: penalty of a difference of distances.
        huber_delta: difference from which huber is linear.
        sigma_data: s in the weights s^2 / (sigma^2 + s^2) of the samples.
    """

    structure: Literal["off", "fixed", "adversarial"] = "adversarial"
    weight: float | Literal["auto"] = "auto"
    gradient_ratio: float = 0.1
    weight_floor: float = 1e-4
    weight_cap: float = 1.0
    start: float = 0.1
    max_noise: float = 5.0
    clamp: float | None = None
    psi: Literal["latent_resnet", "image_resnet", "teacher"] = "latent_resnet"
    psi_weights: str | None = None
    psi_warm_steps: int | None = None
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
    normalize: Literal["rms", "mean", "none"] = "rms"
    penalty: Literal["l2", "l1", "huber"] = "l2"
    huber_delta: float = 0.2
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be, or that another one excludes."""
        # Check the numbers.
        ranges = {"psi_width psi_features psi_every": (1,), "huber_delta sigma_data clamp max_noise": (1e-6,)}
        ranges |= {"weight gradient_ratio weight_floor weight_cap gradient_penalty psi_lr psi_warm_steps": (0,)}
        check_ranges(self, "sadm.", ranges | {"psi_betas": (0, 0.999999), "psi_warmup start": (0, 1)})
        if self.weight_floor > self.weight_cap:
            raise UserError(
                f"sadm.weight_floor: {self.weight_floor} is above sadm.weight_cap ({self.weight_cap}); lower it"
            )

        # Check Psi.
        if self.psi == "latent_resnet":
            check_width(self.psi_width, "sadm.psi_width")
        if self.psi == "teacher" and self.structure == "adversarial":
            raise UserError(
                "sadm.psi: teacher (of --method sd_dit+sadm) follows the student and is no player; "
                "set --sadm.structure fixed"
            )
        if self.psi == "image_resnet" and self.psi_weights is None:
            raise UserError("sadm.psi: image_resnet needs weights; give torchvision's resnet18 as sadm.psi_weights")

    def first_step(self, steps: int) -> int:
        """Return the step (0-based) of `steps` in which the game begins."""
        return round(self.start * steps)

    def psi_lr_at(self, step: int, steps: int) -> float:
        """Return Psi's learning rate in step `step` (0-based) of `steps`."""
        steps_of_game = step + 1 - self.first_step(steps)
        warm = min(1.0, steps_of_game / (self.psi_warmup * steps)) if self.psi_warmup else 1.0
        cosine = self.psi_schedule == "cosine"
        return self.psi_lr * warm * (0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1.0)

    def warm_steps(self, steps: int, classes: int) -> int:
        """Return the number of warm-start steps before a run of `steps` steps: see `count_warm_steps`."""
        if self.structure == "off" or self.psi != "latent_resnet" or self.psi_weights:
            return 0
        return count_warm_steps("sadm", self.psi_warm_steps, steps, classes)
