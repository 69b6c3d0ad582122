"""Judge a run of the comparison: `JUDGES` is a list of functions of a run's EMA weights and samples.

A judge is called with a `Sampled` run and the `Reference`, and returns figures by name. A figure is a dict with the
`value`, `n` (the samples or images that it is made of) and, where real images can stand in the samples' place, `floor`:
the same figure of other real images. A judge of samples returns one such dict for each guidance scale. A judge that
does not apply returns {name: {"skipped": reason}}.

    loss          denoising loss on the first images of the reference with fixed noise, by plain DiT's law and
                  weighting of noise levels; all patches are visible
    probe         for each block, the share of other images that a linear classifier of the block's tokens puts in the
                  right class. Tokens are averaged; images are a little noisy, and the network is not told their class.
    FD-PCA        Frechet distance of pixels (ours): needs no network and no labels. Images are projected on the 64
                  principal components of the reference, each divided by its standard deviation there, so that details
                  count as much as overall brightness. It compares two normal distributions in 64 dimensions.
    FD-lite0      Frechet distance, and KID-lite0 the kernel distance, of the features of EfficientNet-lite0
    agreement     share of samples that the nearest images of the reference put in the class that was asked for
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from convergence_data import Data, read_samples
from torch import Tensor, nn

from fastdit import run_parts
from fastdit.config import Config
from fastdit.errors import UserError
from fastdit.evaluation import draw_samples
from fastdit.evaluation.evaluator import JUDGED_PIXELS
from fastdit.metrics.class_agreement import class_agreement
from fastdit.metrics.feature_nets import feature_net
from fastdit.metrics.kernel_distance import kernel_distance
from fastdit.metrics.moments import Moments, frechet_distance
from fastdit.metrics.summary import Collector, Summary
from fastdit.models.dit import Block, block_products

LOSS_IMAGES = 2048
PROBE_IMAGES = 2000  # from which the probe learns, and as many on which it is tested
PROBE_QUANTILE = 0.2  # of the training levels: the noise level of the probe's images
COMPONENTS = 64
AT_ONCE = 500  # images that the feature network sees at once on a GPU, and 50 on a CPU
COUNTED_RATE = {"cuda": 200e12, "cpu": 20e9}  # FLOP/s by which the time of sampling is estimated before it is measured

Figures = dict[str, dict]


@dataclass
class Reference:
    """Real images that samples are compared with, and other real images for the floors.

    Args:
        images, others: (n, C, H, W) on the device, as the network sees them; both come from the training data.
        labels, other_labels: their classes (n,).
        pictures: whether they are images with values in [-1, 1].
        classes: number of classes.
        checksum: of all training data, from which they were taken.
        noise: plain DiT's noise process, by which the losses of all runs are computed that have the same kind.
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    other_labels: Tensor
    pictures: bool
    classes: int
    checksum: int
    noise: object = None
    _made: dict[str, object] = field(default_factory=dict)

    @classmethod
    def read(cls, data: Data, config: Config, count: int, device: torch.device) -> "Reference":
        """Read `count` images and as many others; where the data has fewer than that, half of it each."""
        count = min(count, data.n // 2)
        if count < 4:
            raise UserError(f"--data {data.name}: has {data.n} samples; the least is 8")
        images, labels, checksum = read_samples(data, config.data, 2 * count, device)
        # Latents are pictures where they were made here, or where the user says that the autoencoder is the identity.
        plain = (config.data.latent_scale, config.data.latent_shift) == (1.0, 0.0)
        pictures = plain and (data.pictures or config.data.autoencoder == "identity")
        halves = images[:count], labels[:count], images[count:], labels[count:]
        return cls(
            *halves, pictures=pictures, classes=data.classes, checksum=checksum, noise=run_parts.build_noise(config)
        )

    def once(self, name: str, make: Callable[[], object]) -> object:
        """Return make(), which is called the first time only: statistics of the reference serve all runs."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


@dataclass(frozen=True)
class Sampled:
    """Hold what the judges see of a run.

    Args:
        network: with the EMA weights, in eval mode, in the dtype of the training.
        config: the run's.
        samples: by guidance scale, (n, C, H, W) on the device; pictures are rounded to 8-bit levels.
        labels: classes (n,) that were asked for.
        nonfinite: samples that are not all numbers.
    """

    network: nn.Module
    config: Config
    samples: dict[str, Tensor]
    labels: Tensor
    nonfinite: int


def draw(network: nn.Module, config: Config, reference: Reference, n: int, scales: list[float]) -> Sampled:
    """Draw n samples, balanced over the classes, at each guidance scale. Sample i has the same noise in every run."""
    device, nonfinite, samples = reference.images.device, 0, {}
    shape = run_parts.Shape(*reference.images.shape[1:], reference.classes)
    labels = draw_samples.balanced_labels(n, range(shape.classes))
    for scale in scales:
        settings = replace(config.sample, guidance=scale)
        options = {"indices": range(n), "seed": 0, "device": device}
        x = draw_samples.draw(network, run_parts.build_noise(config), settings, shape, labels, **options)
        nonfinite += int((~x.isfinite()).flatten(1).any(1).sum())
        x = x.nan_to_num(0, 1, -1).to(device)
        samples[f"{scale:g}"] = ((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1 if reference.pictures else x
    return Sampled(network, config, samples, torch.from_numpy(labels).to(device), nonfinite)


def count_sampling(network: nn.Module, config: Config, n: int, scales: list[float]) -> float:
    """Return the FLOPs of drawing n samples at each scale: the matrix products of all blocks.

    Guidance doubles the network's calls. Heun's method calls it twice a step; `heun` once in the last.
    """
    sampler = config.sample.sampler or run_parts.build_noise(config).samplers[0]
    steps = config.sample.steps
    calls = {"heun": 2 * steps - 1, "full_heun": 2 * steps}.get(sampler, steps)
    size = config.data.size
    height, width = (size, size) if isinstance(size, int) else size
    tokens = height * width // config.model.patch**2
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    once = sum(2 * block_products(tokens, block.proj.in_features, block.fc2.in_features) for block in blocks)
    return float(once * calls * n * sum(1 if scale == 1 else 2 for scale in scales))


def judge_run(run: Sampled, reference: Reference) -> Figures:
    """Return the figures of all judges."""
    figures: Figures = {}
    for judge in JUDGES:
        figures |= judge(run, reference)
    return figures


def _by_scale(run: Sampled, figure: Callable[[Tensor], dict]) -> dict[str, dict]:
    return {scale: figure(x) for scale, x in run.samples.items()}


def judge_loss(run: Sampled, reference: Reference) -> Figures:
    """Compute the denoising loss of the EMA weights."""
    images, labels = reference.images[:LOSS_IMAGES], reference.labels[:LOSS_IMAGES]
    noise = run_parts.build_noise(run.config)
    if isinstance(reference.noise, type(noise)):
        noise = reference.noise
    value = denoising_loss(run.network, noise, images, labels)
    return {"loss": {"value": value, "n": len(images)}}


@torch.no_grad()
def denoising_loss(network: nn.Module, noise, x0: Tensor, y: Tensor) -> float:
    """Return the mean over samples x0 (n, C, H, W) with labels y (n,); the noise is the same in every call."""
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    generator, total = torch.Generator().manual_seed(0), 0.0
    for images, classes in zip(x0.split(128), y.split(128)):
        level = noise.draw(len(images), generator=generator, device="cpu").to(device)
        eps = torch.randn(images.shape, generator=generator).to(device)
        images = images.to(device)
        out = network(*noise.network_input(noise.add_noise(images, eps, level), level), classes.to(device))
        total += float(noise.loss(out, images, eps, level)[0].sum())
    return total / len(x0)


def judge_probe(run: Sampled, reference: Reference) -> Figures:
    """Compute the linear probe of each block."""
    if reference.classes < 2:
        return {"probe": {"skipped": "for several classes only"}}
    known, others = (
        block_features(run.network, run_parts.build_noise(run.config), images[:PROBE_IMAGES], reference.classes)
        for images in (reference.images, reference.others)
    )
    labels, other_labels = reference.labels[:PROBE_IMAGES], reference.other_labels[:PROBE_IMAGES]
    shares = [probe_accuracy(x, labels, z, other_labels) for x, z in zip(known, others)]
    return {"probe": {"value": max(shares), "n": len(other_labels), "blocks": shares}}


@torch.no_grad()
def block_features(network: nn.Module, noise, x0: Tensor, null_label: int) -> list[Tensor]:
    """Return for each block the mean of its tokens (n, width) float32, for noisy samples x0 (n, C, H, W).

    The noise level is the `PROBE_QUANTILE` of the training levels, and labels are the null label.
    """
    blocks = [module for module in network.modules() if isinstance(module, Block)]
    features: list[list[Tensor]] = [[] for _ in blocks]

    def keep(at: int):
        # A block returns the stream before its MLP's branch is added, and the branch; its gate is the last argument.
        return lambda _, args, out: features[at].append((out[0] + args[-1][:, None] * out[1]).mean(1).float())

    hooks = [block.register_forward_hook(keep(at)) for at, block in enumerate(blocks)]
    generator = torch.Generator().manual_seed(0)
    level = noise.at_quantile(torch.tensor(PROBE_QUANTILE)).to(x0.device)
    for images in x0.split(128):
        eps = torch.randn(images.shape, generator=generator).to(x0.device)
        levels = level.expand(len(images))
        y = torch.full((len(images),), null_label, device=x0.device)
        network(*noise.network_input(noise.add_noise(images, eps, levels), levels), y)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in features]


def probe_accuracy(x: Tensor, y: Tensor, z: Tensor, z_labels: Tensor) -> float:
    """Return the share of features z (m, d) that a ridge regression on x (n, d) with labels y (n,) classifies right."""
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x, z = ((features - mean) / std for features in (x, z))
    targets = nn.functional.one_hot(y).float()
    targets = targets - targets.mean(0)
    inner = x.T @ x + 1e-2 * len(x) * torch.eye(x.shape[1], device=x.device)
    guessed = (z @ torch.linalg.solve(inner, x.T @ targets) + nn.functional.one_hot(y).float().mean(0)).argmax(1)
    return float((guessed == z_labels).float().mean())


@dataclass(frozen=True)
class Pixels:
    """The reference in its own principal components: what FD-PCA compares with."""

    mean: Tensor  # (d,)
    basis: Tensor  # (d, k): components divided by their standard deviations
    moments: Moments

    @classmethod
    def of(cls, images: Tensor) -> "Pixels":
        flat = images.flatten(1).double()
        moments = Moments.of(flat)
        values, vectors = torch.linalg.eigh(moments.covariance)
        # Components that the images do not have (fewer images than pixels, constant pixels) cannot be divided by.
        count = min(COMPONENTS, int((values > values[-1] * 1e-9).sum()))
        basis = vectors[:, -count:] / values[-count:].sqrt()
        return cls(moments.mean, basis, Moments.of((flat - moments.mean) @ basis))

    def distance(self, images: Tensor) -> float:
        return frechet_distance(Moments.of((images.flatten(1).double() - self.mean) @ self.basis), self.moments)


def judge_pixels(run: Sampled, reference: Reference) -> Figures:
    """Compute FD-PCA."""
    pixels = reference.once("pixels", lambda: Pixels.of(reference.images))
    floor = reference.once("pixels' floor", lambda: pixels.distance(reference.others))
    return {"FD-PCA": _by_scale(run, lambda x: _figure(pixels.distance(x), len(x), reference, floor))}


def judge_features(run: Sampled, reference: Reference) -> Figures:
    """Compute FD-lite0 and KID-lite0, where the package with the network is installed."""
    if not reference.pictures:
        return {"FD-lite0": {"skipped": "latents are no pictures; they are not decoded here"}}
    if run.config.data.channels not in (1, 3):
        return {"FD-lite0": {"skipped": f"pictures of {run.config.data.channels} channels"}}
    try:
        net = reference.once("net", lambda: feature_net("lite0", None, reference.images.device))
    except UserError as error:
        return {"FD-lite0": {"skipped": str(error)}}

    real = reference.once("features", lambda: _summary(net, reference.images))
    floors = reference.once("features' floor", lambda: _distances(_summary(net, reference.others), real))
    found = {scale: _distances(_summary(net, x), real) for scale, x in run.samples.items()}
    count = len(run.labels)
    return {
        title: {scale: _figure(values[name], count, reference, floors[name]) for scale, values in found.items()}
        for title, name in (("FD-lite0", "frechet"), ("KID-lite0", "kernel"))
    }


def _distances(samples: Summary, real: Summary) -> dict[str, float]:
    """Return the Frechet and the kernel distance, this one of fewer pairs than evaluate.py takes.

    More pairs, or precision and recall, would take a CPU longer than all else here.
    """
    kernel, _ = kernel_distance(samples.kept, real.kept, subsets=50, size=500)
    return {"frechet": frechet_distance(samples.moments, real.moments), "kernel": kernel}


def _summary(net, images: Tensor) -> Summary:
    """Return the features' statistics of pictures (n, C, H, W) in [-1, 1]."""
    collected = Collector(len(images), len(images))
    batch = AT_ONCE if images.device.type == "cuda" else AT_ONCE // 10
    for ids in np.array_split(np.arange(len(images)), math.ceil(len(images) / batch)):
        levels = ((images[ids[0] : ids[-1] + 1] + 1) * 127.5).round().to(torch.uint8)
        collected.add(net(levels), ids)
    return collected.summary()


def judge_agreement(run: Sampled, reference: Reference) -> Figures:
    """Compute class agreement by the nearest images of the reference, for small pictures."""
    if not reference.pictures or reference.classes < 2 or reference.images[0].numel() > JUDGED_PIXELS:
        return {"agreement": {"skipped": "for small pictures of several classes only"}}
    known = reference.images, reference.labels
    floor = reference.once("agreement", lambda: class_agreement(reference.others, reference.other_labels, *known))
    shares = _by_scale(run, lambda x: _figure(class_agreement(x, run.labels, *known), len(x), reference, floor))
    return {"agreement": shares}


def _figure(value: float, n: int, reference: Reference, floor: float) -> dict:
    return {"value": value, "floor": floor, "n": n, "n_real": len(reference.images), "n_floor": len(reference.others)}


JUDGES: list[Callable[[Sampled, Reference], Figures]] = [
    judge_loss, judge_pixels, judge_features, judge_agreement, judge_probe,
]  # fmt: skip
