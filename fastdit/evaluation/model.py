"""Draw samples with a network from Python: what `fastdit.load` and `fastdit.from_pretrained` have in common."""

import operator
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from functools import cached_property, partial
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

from fastdit.config import SampleConfig
from fastdit.errors import UserError, a_few
from fastdit.evaluation import draw_samples
from fastdit.evaluation.open_run import choose_sampler
from fastdit.methods.denoising import Shape
from fastdit.models import LatentDecoder
from fastdit.noise import PROCESSES, NoiseProcess

Output = Literal["uint8", "pil", "latents"]
Classes = str | int | Sequence[str | int] | None


class Model:
    """Hold a network with its weights, and draw samples from it.

    Attributes:
        network: the network, in eval mode, on `device`: (x (B, C, H, W), t (B,), y (B,)) -> (B, out_channels, H, W).
        noise: the noise process that it was trained for, or None if that is unknown.
        shape: channels, height and width of a sample as the network sees it, and the number of classes.
        class_names: names of the classes, by label; numbers as text where there are no names.
        device: the device that everything runs on.
        settings: the sampler's settings that `sample` takes where it is not told others.
    """

    def __init__(
        self,
        network: nn.Module,
        noise: NoiseProcess | None,
        shape: Shape,
        class_names: Sequence[str],
        device: torch.device,
        settings: SampleConfig,
        name: str,
        guided: bool = True,
    ) -> None:
        """Take the attributes above.

        name: the file or folder that the weights come from, for messages. guided: whether there is a null label.
        """
        self.network, self.noise, self.shape, self.device = network.to(device).eval(), noise, shape, device
        self.class_names, self.settings = tuple(class_names), settings
        self._name, self._guided = name, guided

    def __repr__(self) -> str:
        """Return the origin of the weights, the shape of samples and the noise process."""
        size = f"{self.shape.channels}x{self.shape.height}x{self.shape.width}"
        noise = self.noise.name if self.noise else "unknown noise process"
        kind = type(self).__name__
        return f"<fastdit.{kind} {self._name}: {size}, {self.shape.classes} classes, {noise}, on {self.device}>"

    def labels(self, classes: Classes = None, n: int | None = None) -> np.ndarray:
        """Return the class labels (n,) int64 of the samples that `sample` draws with the same arguments."""
        chosen = self._labels_of(classes)
        n = len(chosen) if n is None else whole("n", n, least=1)
        return draw_samples.balanced_labels(n, chosen)

    def sample(
        self,
        classes: Classes = None,
        n: int | None = None,
        *,
        guidance: float | None = None,
        seed: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        interval: tuple[float, float] | None = None,
        guided_channels: int | None = None,
        diffusion_form: str | None = None,
        diffusion_norm: float | None = None,
        last_step_size: float | None = None,
        precision: str | None = None,
        batch: int | None = None,
        output: Output = "uint8",
        progress: bool = False,
    ) -> np.ndarray | list[Image.Image]:
        """Draw samples, and return them as images uint8 (n, H, W, C), where C is 1 or 3.

        Sample i depends on `seed`, its class and i alone. With equal settings on the same device, it is to the bit what
        `fastdit/sample.py` draws.

        Args:
            classes: class names or labels, which the samples have in turn; None takes all. A number is a label.
            n: number of samples; None draws one of each class.
            guidance: classifier-free guidance scale; 1 is off. None here and below takes `settings`.
            seed: seed of the noise, from 0.
            steps: sampler steps.
            sampler: a name in `noise.samplers`.
            interval: (lo, hi), noise-to-signal ratios between which guidance acts.
            guided_channels: number of the first channels that are guided.
            diffusion_form, diffusion_norm, last_step_size: the SDE of the sampler euler_maruyama.
            precision: arithmetic: auto, bf16, tf32 or fp32.
            batch: samples that are drawn at once, on which rounding depends; None takes 12 on a CPU, 128 on a GPU.
            output: uint8; pil returns a list of PIL images; latents returns the samples as they leave the sampler,
                float32 (n, C, H, W), neither decoded nor clamped.
            progress: whether to show a progress bar.

        Raises UserError if a value is impossible, if the noise process is not known, or if samples are latents that no
        autoencoder is there to decode.
        """
        # Check the arguments before any work.
        if output not in get_args(Output):
            raise UserError(f"output: {output!r} is unknown; give one of {', '.join(get_args(Output))}")
        labels, seed = self.labels(classes, n), whole("seed", seed, least=0)
        batch = None if batch is None else whole("batch", batch, least=1)
        settings = self.choose(
            {
                "guidance": guidance,
                "steps": steps,
                "sampler": sampler,
                "interval": interval,
                "guided_channels": guided_channels,
                "diffusion_form": diffusion_form,
                "diffusion_norm": diffusion_norm,
                "last_step_size": last_step_size,
                "precision": precision,
            }
        )
        decoder = None if output == "latents" else self._needed_decoder()

        # Draw the samples.
        shown = partial(tqdm, desc="sampling", unit="batch") if progress else None
        drawn = self._draw(settings, labels, seed, batch, decoder, shown)
        if output == "latents":
            return drawn.numpy()
        images = draw_samples.to_uint8(drawn)
        if output == "uint8":
            return images
        return [Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in images]

    def _draw(
        self,
        settings: SampleConfig,
        labels: np.ndarray,
        seed: int,
        batch: int | None,
        decoder: LatentDecoder | None,
        progress: Callable[[list], Iterable] | None,
    ) -> torch.Tensor:
        """Return samples (n, C, H, W) float32 on the CPU, as `draw_samples.draw` does."""
        return draw_samples.draw(
            self._prepared(settings),
            self.noise,
            settings,
            self.shape,
            labels,
            indices=range(len(labels)),
            seed=seed,
            device=self.device,
            decoder=decoder,
            progress=progress,
            batch=batch,
        )

    def _prepared(self, settings: SampleConfig) -> nn.Module:
        """Return the network in the dtype that sampling has: itself in fp32, or a copy in bf16."""
        as_it_is = draw_samples.precision_on(settings, self.device) != "bf16"
        return draw_samples.prepare(self.network if as_it_is else deepcopy(self.network), settings, self.device)

    def grid(self, classes: Classes = None, n: int | None = None, **settings) -> Image.Image:
        """Draw samples as `sample` does, and return a picture with a row for each class, behind the class's name.

        n: number of samples; None draws eight of each class. settings: those of `sample`, without `output`.
        """
        n = 8 * len(self._labels_of(classes)) if n is None else n
        images = self.sample(classes, n, **settings, output="uint8")
        return draw_samples.grid(images, self.labels(classes, n), self.class_names)

    @cached_property
    def decoder(self) -> LatentDecoder | None:
        """Return the decoder of latents, on `device`; None without one. Raises UserError if it is unreadable."""
        decoder = self._build_decoder()
        return decoder.to(self.device) if decoder else None

    def _build_decoder(self) -> LatentDecoder | None:
        """Return the decoder of latents, on the CPU, or None if there is none."""
        return None

    def _needed_decoder(self) -> LatentDecoder | None:
        """Return the decoder, or None if samples are images. Raises UserError if they are latents without a decoder."""
        if self.decoder is None and self.shape.channels not in (1, 3):
            raise UserError(
                f"{self._name}: samples are latents of {self.shape.channels} channels; open it with autoencoder=, or "
                'draw with output="latents"'
            )
        return self.decoder

    def choose(self, chosen: dict[str, object]) -> SampleConfig:
        """Return the sampler's settings with the values of `chosen` that are not None. Raises UserError."""
        if self.noise is None:
            raise UserError(
                f"{self._name}: does not tell its noise process; open it with noise=, one of {', '.join(PROCESSES)}"
            )
        settings = choose_sampler(self.settings, typed(chosen))
        if not self._guided and settings.guidance != 1:
            raise UserError(f"{self._name}: its label table has no null class to guide with; draw with guidance=1")
        if settings.sampler not in (None, *self.noise.samplers):
            choices = ", ".join(self.noise.samplers)
            raise UserError(f"sampler: {self.noise.name} has no {settings.sampler!r}; choose one of {choices}")
        self.noise.check_sampling_steps(settings.steps)
        if (settings.guided_channels or 0) > self.shape.channels:
            raise UserError(f"guided_channels: {settings.guided_channels}; samples have {self.shape.channels} channels")
        return settings

    def _labels_of(self, classes: Classes) -> list[int]:
        """Return the labels of class names or labels, all of them for None. Raises UserError for one that is none."""
        if classes is None:
            return list(range(self.shape.classes))
        known = {name: label for label, name in enumerate(self.class_names)}
        listed = [classes] if isinstance(classes, str | int | np.integer) else list(classes)
        if not listed:
            raise UserError("classes: is empty; give names or labels, or None for all")
        return [self._label_of(item, known) for item in listed]

    def _label_of(self, item: str | int, known: dict[str, int]) -> int:
        """Return the label of one class name or label. Raises UserError if there is no such class."""
        if isinstance(item, str):
            if item not in known:
                raise UserError(f"classes: there is no class {item!r}; the names are {a_few(self.class_names, 10)}")
            return known[item]
        label = whole("classes", item)
        if not 0 <= label < self.shape.classes:
            raise UserError(f"classes: {label} is out of range; labels are 0 to {self.shape.classes - 1}")
        return label


def whole(name: str, value: object, least: int | None = None) -> int:
    """Return a whole number. Raises UserError if it is none, or is below `least`."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise UserError(f"{name}: expected a whole number, got {value!r}") from None
    if least is not None and found < least:
        raise UserError(f"{name}: must be at least {least}, got {found}")
    return found


def one_of(settings: type, name: str, value: object) -> str:
    """Return the value of a field that is one of a few words. Raises UserError for another one."""
    choices = get_args(settings.__annotations__[name])
    if value not in choices:
        raise UserError(f"{name}: {value!r} is unknown; give one of {', '.join(choices)}")
    return value


def typed(chosen: dict[str, object]) -> dict[str, object]:
    """Return the sampler's settings with their types. Raises UserError for a value of another type."""
    typed = {}
    for name, value in chosen.items():
        if value is None or (name in ("sampler", "diffusion_form") and isinstance(value, str)):
            typed[name] = value
        elif name == "precision":
            typed[name] = one_of(SampleConfig, name, value)
        elif name in ("steps", "guided_channels"):
            typed[name] = whole(name, value)
        elif name == "interval":
            pair = list(value) if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str) else []
            if len(pair) != 2:
                raise UserError(f"interval: expected a pair (lo, hi), got {value!r}")
            typed[name] = (number(name, pair[0]), number(name, pair[1]))
        else:
            typed[name] = number(name, value)
    return typed


def number(name: str, value: object) -> float:
    """Return a number as a float. Raises UserError if it is none."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise UserError(f"{name}: expected a number, got {value!r}")
    return float(value)
