"""Settings of SADM; structure_game.py explains the method."""

import math
from dataclasses import dataclass
from typing import Literal

from fastdit.errors import UserError, check_ranges
from fastdit.methods.encoder_warm_start import count_warm_steps
from fastdit.models.structure_encoders import NORM_GROUP


@dataclass(frozen=True)
class SADM:
    """Settings of SADM, all ours.

    Args:
        structure: off; fixed: Psi keeps its initial weights; adversarial: it is trained against the denoiser.
        weight: lambda, a number, or auto: at the network's output the structure loss's gradient keeps the norm
            `gradient_ratio` relative to the denoising loss's.
        gradient_ratio: that ratio. Metrics show what it is.
        weight_floor: smallest lambda of auto.
        weight_cap: largest lambda of auto.
        start: share of the run before the game begins; until then Psi is not used and costs nothing. Early x0
            predictions carry no structure, and against them a warm-started Psi would only unlearn the classes.
        max_noise: noise-to-signal ratio above which samples have weight zero. Under DDPM, with outputs 10 % wrong, the
            weights alone leave samples above 20 three times the gradient of those below 1.
        clamp: Psi sees samples and x0 predictions clamped to [-clamp, clamp]; none: the largest magnitude among the
            clean samples of the micro-batch. Clamped values get no gradient.
        psi: latent_resnet: a small ResNet on latents or small images; image_resnet: a pretrained ResNet-18 on pixels
            (psi_weights), which sees latents as data.autoencoder, which is not trained, decodes them; teacher: SD-DiT's
            teacher, which follows the student and cannot be trained as a player: structure must be fixed.
        psi_weights: file of Psi's initial weights: from fastdit-warm-start, or a torchvision ResNet-18.
        psi_warm_steps: steps in which latent_resnet learns to classify the data before step 0; their time counts as
            training. none: half of the run's steps, at most 10,000, which is 1 to 2 % of the work of a small run. There
            are none with psi_weights, nor where the data has a single class.
        psi_width: width of latent_resnet's first block.
        psi_features: dimension of latent_resnet's features.
        psi_decoder_gradient: whether image_resnet's gradient for latents passes through the decoder. False: it passes a
            fixed linear map from a cell to its pixels' mean color instead, fitted at the start; features are still
            those of the decoded pictures, at two passes of the decoder for a sample and step in place of four.
        spectral_norm: bound the weights of latent_resnet.
        gradient_penalty: weight of mean |d (v . Psi(x)) / d x|^2 with random unit vectors v, over the mean squared
            distance of the features (unless distances are not normalized); 0 is off.
        psi_lr: Psi's learning rate.
        psi_warmup: share of the run over which it rises linearly, from the start of the game on.
        psi_schedule: after that: constant, or cosine to zero at the end of the run.
        psi_betas: betas of Psi's Adam.
        psi_every: denoiser steps per step of Psi.
        distance: distance of features: euclidean, squared or cosine.
        normalise: divide distances by their root mean square or their mean over the pairs, or do not. With the mean, a
            Psi that sets one sample apart and lets all others coincide gains as much as the batch is large, and
            training finds that.
        penalty: penalty of a difference of distances.
        huber_delta: difference from which huber is linear.
        sigma_data: s above.
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
    normalise: Literal["rms", "mean", "none"] = "rms"
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
        if self.psi == "latent_resnet" and self.psi_width % NORM_GROUP:
            raise UserError(f"sadm.psi_width: {self.psi_width} must be a multiple of {NORM_GROUP}; change it")
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
        played = step + 1 - self.first_step(steps)
        warm = min(1.0, played / (self.psi_warmup * steps)) if self.psi_warmup else 1.0
        cosine = self.psi_schedule == "cosine"
        return self.psi_lr * warm * (0.5 * (1 + math.cos(math.pi * step / steps)) if cosine else 1.0)

    def warm_steps(self, steps: int, classes: int) -> int:
        """Return the number of Psi's steps as a classifier before a run of `steps` steps. Raises UserError."""
        if self.structure == "off" or self.psi != "latent_resnet" or self.psi_weights:
            return 0
        return count_warm_steps("sadm", self.psi_warm_steps, steps, classes)
