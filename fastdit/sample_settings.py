"""Settings of drawing and of evaluating samples, which are the groups `sample` and `eval` of a run's settings."""

from dataclasses import dataclass, fields
from typing import Literal

from fastdit.errors import UserError, check_ranges
from fastdit.noise import SDE, DiffusionForm, NoiseProcess


@dataclass(frozen=True)
class SampleConfig:
    """Choose how pictures are drawn, during and after training.

    Args:
        sampler: name of a sampler; none takes the default of the noise process (edm, flow: heun; ddpm: ddpm). edm and
            flow have heun, whose last step is Euler's, and euler. flow has full_heun too, Heun's method in all steps,
            and euler_maruyama, which solves an SDE. ddpm has ddpm and ddim.
        steps: sampler steps.
        guidance: classifier-free guidance scale; 1 is off.
        interval: lowest and highest noise-to-signal ratio at which guidance acts; none is everywhere.
        guided_channels: guide only the first so many channels (official DiT checkpoints: 3); none guides all.
        diffusion_form: diffusion coefficient of the SDE that euler_maruyama solves, by SiT's names.
        diffusion_norm: factor on the diffusion coefficient.
        last_step_size: time that the last step of euler_maruyama takes; it draws no noise.
        precision: arithmetic: bf16 (the sampler's state is float64, and an autoencoder has TF32 products), tf32, fp32,
            or auto (bf16 on GPUs, fp32 on CPUs).
        per_class: pictures of each class in the grid.
        max_classes: classes shown in the grid.
        agreement: samples for the class-agreement figure at the end (a k-NN on the training images, so not for
            latents); 0 is off.
    """

    sampler: str | None = None
    steps: int = 18
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    guided_channels: int | None = None
    diffusion_form: DiffusionForm = SDE.diffusion_form
    diffusion_norm: float = SDE.diffusion_norm
    last_step_size: float = SDE.last_step_size
    precision: Literal["auto", "bf16", "tf32", "fp32"] = "auto"
    per_class: int = 8
    max_classes: int = 16
    agreement: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be."""
        counts = "steps guided_channels per_class max_classes"
        check_ranges(self, "sample.", {counts: (1,), "interval agreement": (0,)})
        if self.interval and not self.interval[0] < self.interval[1]:
            raise UserError(f"sample.interval: {list(self.interval)}; the first must be below the second")
        sde = self.sde  # which checks its settings
        if self.sampler == "euler_maruyama":
            sde.times(self.steps)  # which checks the number of steps
            return
        for name in (field.name for field in fields(SDE) if getattr(sde, field.name) != field.default):
            raise UserError(f"sample.{name}: {getattr(sde, name)} needs the SDE sampler; add --sampler euler_maruyama")

    @property
    def sde(self) -> SDE:
        """Return what euler_maruyama solves."""
        return SDE(self.diffusion_form, self.diffusion_norm, self.last_step_size)

    def describe_sampler(self, process: NoiseProcess) -> str:
        """Return the name of the sampler that draws from `process`, with its settings if it solves an SDE."""
        name, sde = self.sampler or process.samplers[0], self.sde
        if name != "euler_maruyama":
            return name
        return f"{name} ({sde.diffusion_form} x {sde.diffusion_norm:g}, last step {sde.last_step_size:g})"


@dataclass(frozen=True)
class EvalConfig:
    """Choose how the EMA weights are evaluated: Frechet and kernel distance, precision and recall, class agreement.

    Args:
        every: steps between evaluations; the last step has one too; 0 is off. Their time does not count as training.
        n: samples drawn.
        n_real: images of the data, chosen at random but always the same; none takes all.
        data: reference: a source as in data.source, or statistics of the ADM evaluator (.npz); none: the training data.
        labels: class labels of the samples: balanced (counts differ by at most one) or random (uniform).
        features: network: lite0 (packaged; gives FD-lite0) or inception (gives FID; weights are yours).
        weights: file of the network's weights; none: the packaged ones, or those in torch's cache.
        seed: seed of noise and random labels; sample i depends on it and on i alone.
    """

    every: int = 0
    n: int = 10_000
    n_real: int | None = None
    data: str | None = None
    labels: Literal["balanced", "random"] = "balanced"
    features: Literal["lite0", "inception"] = "lite0"
    weights: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be."""
        # A covariance takes two samples, and so does each half of the real images.
        check_ranges(self, "eval.", {"every seed": (0,), "n": (2,), "n_real": (4,)})
