"""Define the plain method, which maps a noisy sample to a denoising loss, as all diffusion transformers do.

    x0 --add_noise--> x_t --network(x_t, level, y)--> out --loss--> scalar

`Denoising` is also the interface of every method, and other methods override its members. Class members describe a
method and build it from a run's settings. The others take part in training. `registry.py` lists all methods.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fastdit.kernels import AnyGenerator, draw_normal, draw_uniform
from fastdit.models import DiT, LatentDecoder, flops_per_image

Network = Callable[..., Tensor]
Panels = dict[str, dict[str, str]]  # title -> metric -> label
GRADIENTS = "gradient norm of the added loss / of the denoising loss"  # title of a panel that methods share


@dataclass(frozen=True)
class Shape:
    """Hold the shape of a run's samples and the number of their classes, which a network must fit."""

    channels: int
    height: int
    width: int
    classes: int


class Outcome(NamedTuple):
    """Hold the result of a method for one micro-batch."""

    loss: Tensor  # () float32, with its graph
    terms: dict[str, Tensor]  # named parts of the loss and health signals, () float32, detached
    x0_hat: Tensor  # (B, C, H, W) float32, the x0 prediction, with its graph
    level: Tensor  # (B,) the noise levels of the samples
    outputs: tuple[Tensor, ...] = ()  # the network's outputs, on which loss and x0_hat depend


@dataclass
class Denoising:
    """Compute the loss of a class-conditional denoiser under one noise process.

    Args:
        noise: a process of `fastdit.noise`.
        classes: number of classes; label `classes` is the null label.
        label_drop: share of samples trained with the null label (Ho and Salimans 2022, algorithm 1).
    """

    noise: object
    classes: int
    label_drop: float

    name: ClassVar[str] = "dit"
    """Name of the method in `--method`, in configuration files and in benchmarks."""

    summary: ClassVar[str] = "the plain denoising loss"
    """Description of the method in `--help`."""

    settings_type: ClassVar[type | None] = None
    """Frozen dataclass of the method's settings, with defaults. Their group of flags has the method's name."""

    refuses: ClassVar[dict[str, str]] = {}
    """Methods that this one cannot be combined with, by name, and the reason."""

    panels: ClassVar[Panels] = {}
    """Panels of the report for the metrics that the method adds."""

    older_signature: ClassVar[dict[str, object]] = {}
    """Values that checkpoints without these fields of `checkpoint_signature` were written with."""

    @classmethod
    def complete(cls, settings):
        """Return `settings` with every open choice made, as a run's config.yaml records them."""
        return settings

    @classmethod
    def check(cls, config) -> None:
        """Raise UserError if the method's settings do not fit other settings of the run's `config`."""

    @classmethod
    def check_batch(cls, samples: int) -> None:
        """Raise UserError if the method cannot train on micro-batches of `samples` samples over all ranks."""

    @classmethod
    def build_network(cls, config, sizes: dict, out_channels: int) -> nn.Module:
        """Return the network that is sampled, on the CPU. Its weights depend on `config.seed` alone.

        sizes: arguments of a `DiT`. This is called for the base of a combination only, and never for a wrapper.
        """
        return DiT(**sizes, out_channels=out_channels, seed=config.seed)

    @classmethod
    def build(
        cls, config, shape: Shape, module: nn.Module, base: "Denoising", decoder: LatentDecoder | None = None
    ) -> tuple[nn.Module, "Denoising"]:
        """Return the module that is trained, on the CPU, and the method. Raises UserError.

        module, base: module and method that this one is built on; at first the network and the plain method.
        decoder: decodes latents to pictures; None if samples are pictures or if there is no autoencoder.
        """
        return module, base

    @classmethod
    def checkpoint_signature(cls, config) -> dict[str, object]:
        """Return the settings that a run must share with the checkpoints that it reads, by flag."""
        return {}

    def loss(self, network: Network, x0: Tensor, y: Tensor, generator: AnyGenerator) -> Outcome:
        """Return the outcome for samples x0 (B, C, H, W) float32 of classes y (B,) int64, without a host sync.

        All tensors are on the generator's device. Training passes a `SampleGenerator`. With it, all ranks must draw the
        same numbers in the same order, and the first dimension of what is drawn is the sample.
        """
        level, eps, y = self.draw(x0, y, generator)
        net_in, net_t = self.noise.network_input(self.noise.add_noise(x0, eps, level), level)
        return self.compute_loss(network(net_in, net_t, y), x0, eps, level)

    def draw(self, x0: Tensor, y: Tensor, generator: AnyGenerator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw noise levels (B,) and noise of x0's shape, drop some labels, and return all three."""
        level = self.noise.draw(len(x0), generator=generator, device=x0.device)
        eps = draw_normal(x0.shape, generator=generator, device=x0.device)
        return level, eps, self.drop_labels(y, generator)

    def compute_loss(self, out: Tensor, x0: Tensor, eps: Tensor, level: Tensor) -> Outcome:
        """Return the outcome with the denoising loss, a mean over the batch, of the network's output."""
        # Gradients are asked for at a view of the output. At the output itself, hooks of DeepSpeed 0.19 would run: they
        # scale gradients and start the engine's backward pass.
        out = out.view_as(out)
        per_sample, x0_hat = self.noise.loss(out, x0, eps, level)
        loss = per_sample.mean()
        return Outcome(loss, {"loss": loss.detach()}, x0_hat, level, (out,))

    def drop_labels(self, y: Tensor, generator: AnyGenerator) -> Tensor:
        """Replace each label by the null label with probability `label_drop`."""
        dropped = draw_uniform(y.shape, generator=generator, device=y.device) < self.label_drop
        return torch.where(dropped, self.classes, y)

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor]], steps: int, say: Callable[[str], None]) -> None:
        """Prepare a run of `steps` steps before its step 0, on every rank. It is not called for a resumed run.

        batches: this rank's (x0, y) from the first on; training starts over with the first. say: prints a line once.
        """

    def preparation_batches(self, steps: int) -> int:
        """Return the number of batches on which `prepare` trains before a run of `steps` steps."""
        return 0

    def begin_step(self, step: int, steps: int) -> dict[str, float]:
        """Set the values of all schedules for the next step, `step` (0-based) of `steps`.

        Return, by name, the decay of each EMA of all weights that the optimizer keeps beside the sampled EMA.
        """
        return {}

    def end_step(self) -> dict[str, Tensor]:
        """Return health signals of the whole step, as in `Outcome.terms`. Every rank calls it after the update."""
        return {}

    def sampled_network(self, module: nn.Module) -> nn.Module:
        """Return the part of the trained module that draws samples."""
        return module

    def ema_replicas(self, module: nn.Module) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """Map each EMA's name to (replica tensors, source parameters).

        Replicas are refreshed from the EMA after every optimizer step.
        """
        return {}

    def graphed(self, module: nn.Module, batch: int) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
        """Return the networks that a micro-batch of `batch` samples calls once each, with tensors like their inputs."""
        return [(module, image_inputs(module, batch))]

    def flops(self, module: nn.Module) -> dict[str, float]:
        """Return the FLOPs of all matrix products for one image and step, forward and backward, by part."""
        return {"network": flops_per_image(module)}

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the method's tensors, and its networks, which also get `dtype`."""

    def state_dict(self) -> dict:
        """Return the state from which a resumed run continues, the same on all ranks."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Load the result of `state_dict`, whose tensors may be on another device."""


def image_inputs(network: nn.Module, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return zeros with the shapes and dtypes of a network's arguments x, t and y, on its device."""
    device = next(network.parameters()).device
    x = torch.zeros(batch, network.channels, *network.input_size, device=device)
    return x, torch.zeros(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)
