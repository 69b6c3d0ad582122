"""Load data: an endless, exactly resumable stream of batches on the device.

    order.py (which samples) -> pipeline.py (DALI prepares them ahead)       -> Loader (position, labels, noise)
                             or torch_reader.py (DataLoader with Pillow does)
                             or cache.py (latents in memory)

The loader's state is the position in the global stream of samples, and the samples found corrupt. The position is the
same on every rank and for any number of ranks. Prefetched batches are no part of the state.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from fastdit.data.cache import CachedLatents, CachedReader
from fastdit.data.image_rules import SKIP, Crop, decoding_fault
from fastdit.data.order import BatchFailed, Order, Request
from fastdit.data.readers import Backend, ReaderName, choose_backend, find_corrupt
from fastdit.data.sources import Source
from fastdit.data.synthetic import SyntheticReader
from fastdit.data.transfer import to_device
from fastdit.errors import UserError
from fastdit.kernels import philox_normal

log = logging.getLogger(__name__)
_POSTERIOR_DRAW = 2**32 - 1  # the draws of a training step, with the same seed and positions, are numbered from 0


class Reader(Protocol):
    """Prepare batches in the order of the requests."""

    def __next__(self) -> tuple[Request, torch.Tensor]:
        """Return the next batch. Raises BatchFailed if it cannot be prepared."""

    def close(self) -> None:
        """End the work ahead."""


def make_loader(
    source: Source,
    *,
    batch: int,
    size: int | tuple[int, int],
    channels: int,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    flip: bool = True,
    shuffle: bool = True,
    device: str | torch.device = "cpu",
    threads: int = 2,
    prefetch: int = 2,
    on_corrupt: Literal["stop", "skip"] = "stop",
    convert: bool = False,
    crop: Crop = "center",
    reader: ReaderName = "auto",
    latent_scale: float | Sequence[float] = 1.0,
    latent_shift: float | Sequence[float] = 0.0,
    cache: Literal["none", "cpu", "device"] = "none",
    group: dist.ProcessGroup | None = None,
) -> "Loader":
    """Return a loader of micro-batches of `batch` samples for rank `rank` of `world`.

    The loader yields `(x, y)` forever, on `device`: x float32 (batch, channels, H, W), y int64 (batch,).

    - Images are in [-1, 1], scaled to cover `size` (one number or (H, W)) and center-cropped; see ImageReader.
    - crop: "center" scales images in one step, "adm" as ADM's reference batches were made; see pillow_images.fit.
    - Latents are `(mean + std * noise - latent_shift) * latent_scale`, and the noise is drawn anew at every read. Scale
      and shift are one number, or one per channel. `size` and `channels` must be the stored ones.
    - flip: mirror half of the samples, others in each epoch. Latents need stored mirrored posteriors.
    - reader: "dali" reads files with NVIDIA DALI, "torch" with torch's DataLoader and Pillow, "auto" with DALI if it
      can be imported. Order, flips and latents are the same; pixels differ by a few levels (see pillow_images.py).
    - threads: DALI's CPU threads, or DataLoader's workers. prefetch: batches prepared ahead.
    - cache: the place where latents stay in memory, "device" or "cpu" (the host), or "none" to read files each time.
      The batches are the same, to the bit. With a `group`, the process group of all ranks, each rank keeps its
      share, and every batch is a collective.
    - on_corrupt: "stop" raises UserError at an image that cannot be decoded. "skip" shows the next good id in its place
      from then on; `Loader.skipped` counts such images.
    - convert: convert images with another number of channels, as in ImageReader.

    Raises UserError if the source does not fit the arguments, ValueError if the arguments make no sense.
    """
    # Check the arguments.
    if min(batch, threads) < 1 or prefetch < 0 or not 0 <= rank < world:
        raise ValueError(f"no loader with {batch=}, {threads=}, {prefetch=}, {rank=}, {world=}")
    if on_corrupt not in ("stop", "skip"):
        raise ValueError(f"{on_corrupt=} is neither 'stop' nor 'skip'")
    size = (size, size) if isinstance(size, int) else tuple(size)
    _check_fit(source, size, channels, flip)
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())

    # Choose the order, and where batches come from.
    options: dict[str, Any] = {"batch": batch, "device": device, "threads": threads, "prefetch": prefetch}
    if source.kind == "image":
        options |= {"size": size, "channels": channels, "convert": convert}
    order = Order(source.n, batch, seed, rank, world, shuffle, flip)
    latents = backend = None
    if cache != "none":
        if source.kind != "latent" or (group and (dist.get_rank(group), dist.get_world_size(group)) != (rank, world)):
            raise ValueError(f"no {cache=} for {source.kind}s, {rank=}, {world=}, {group=}")
        latents = CachedLatents(source, cache, device, group)
    elif source.kind != "synthetic":
        backend = choose_backend(reader, crop if source.kind == "image" else "center")
        if source.kind == "image" and backend.name == "torch":
            options["crop"] = crop
    affine = tuple(_per_channel(value, channels, device) for value in (latent_scale, latent_shift))
    return Loader(source, order, options, on_corrupt == "skip", latents, backend, affine)


def posterior_noise(mean: torch.Tensor, seed: int, position: int) -> torch.Tensor:
    """Return standard normal noise of the shape of `mean` (b, C, H, W) for samples at `position` and after it."""
    place = {"seed": seed, "position": position, "draw": _POSTERIOR_DRAW}
    return philox_normal(len(mean), mean[0].numel(), **place, device=mean.device).view_as(mean)


def _per_channel(value: float | Sequence[float], channels: int, device: torch.device) -> torch.Tensor:
    """Return one number per channel, float32 (C, 1, 1). Raises ValueError for another number of channels."""
    values = [value] * channels if isinstance(value, int | float) else list(value)
    if len(values) != channels:
        raise ValueError(f"{len(values)} numbers for latents of {channels} channels")
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _check_fit(source: Source, size: tuple[int, int], channels: int, flip: bool) -> None:
    """Raise UserError if the samples of `source` have another shape, or no mirrored latents where `flip` needs them."""
    if source.kind == "image":
        if channels not in (1, 3):
            raise UserError(f"{source.path}: images have 1 or 3 channels, the model takes {channels}")
        return
    found, expected = tuple(source.samples.shape[-3:]), (channels, *size)
    if found != expected:
        raise UserError(
            f"{source.path}: its samples are {found} (channels, height, width), the model takes {expected}; "
            "set the model's channels and input size to match"
        )
    if source.kind == "latent" and flip and not source.samples.has_flips:
        raise UserError(f"{source.path}: has no latents of mirrored images; turn flip off or encode them too")


class Loader:
    """Iterate over `(x, y)` forever; `make_loader` makes such a loader.

    Attributes:
        position: the number of samples that all ranks together have yielded so far.
        held: the latents in memory, or None if they are read from files.
    """

    def __init__(
        self,
        source: Source,
        order: Order,
        options: dict[str, Any],
        skip_corrupt: bool,
        latents: CachedLatents | None,
        backend: Backend | None,
        affine: tuple[torch.Tensor, torch.Tensor],
    ):
        """Make a loader that starts at position 0.

        Args:
            options: the reader's: batch, device, threads, prefetch, and for images size, channels and convert.
            skip_corrupt: whether to replace corrupt images instead of raising UserError.
            latents: the latents in memory, if they are cached.
            backend: the library that reads files, if files are read.
            affine: scale and shift of latents, (C, 1, 1) each.
        """
        self.source, self.order, self.position, self.held = source, order, 0, latents
        self._options, self._skip_corrupt, self._backend = options, skip_corrupt, backend
        self._scale, self._shift = affine
        self._corrupt: set[int] = set()
        self._reader: Reader | None = None

    @property
    def images_per_epoch(self) -> int:
        """Return the number of samples of the source."""
        return self.source.n

    @property
    def skipped(self) -> int:
        """Return the number of corrupt samples that this rank has met and replaced."""
        return len(self._corrupt)

    @property
    def reading(self) -> str | None:
        """Return the way in which files are read, in words for the start of a run, or None if no files are read."""
        return self._backend and self._backend.describe(self.source.kind, self._options["threads"])

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next batch: x float32 (batch, channels, H, W), y int64 (batch,).

        Raises UserError for an image that is corrupt or has another number of channels.
        """
        while True:
            if self._reader is None:
                self._reader = self._open()
            try:
                request, x = next(self._reader)
                break
            except BatchFailed as failure:
                self._set_aside(failure)
            except UserError:
                self.close()  # the reader would go on with the batch after this one
                raise
        if self.source.kind == "latent":
            x = self._draw(request, x)
        y = to_device(self.source.labels[request.ids], x.device)
        self.position += self.order.stride
        return x, y

    def ids_at(self, position: int, rank: int) -> list[int]:
        """Return the ids of the samples in the micro-batch of `rank` that begins at `position` of the global stream."""
        return replace(self.order, rank=rank).request(position, self._corrupt).ids.tolist()

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last batch yielded, as numbers and lists of numbers."""
        corrupt = sorted(self._corrupt)
        return {"position": self.position, "n": self.source.n, "seed": self.order.seed, "corrupt": corrupt}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken, also with another number of ranks or another batch size.

        Raises UserError if the state belongs to a source of another length or to another seed.
        """
        current = self.state_dict()
        for field, name in (("n", "number of samples"), ("seed", "seed")):
            if state[field] != current[field]:
                raise UserError(
                    f"{self.source.path}: the {name} is {current[field]}, the checkpoint's was {state[field]}; "
                    "resume with the same data and seed"
                )
        self.close()
        self.position, self._corrupt = state["position"], set(state["corrupt"])

    def close(self) -> None:
        """Stop the work ahead and its threads. The next batch asked for starts them again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _open(self) -> Reader:
        """Return a reader of the batches from here on; it may run ahead of the batches yielded."""
        if self.source.kind == "synthetic":
            return SyntheticReader(self.source.samples, self._requests(self.order), self._options["device"])
        if self.held is None:
            readers = self._backend.module
            reader = readers.ImageReader if self.source.kind == "image" else readers.LatentReader
            return reader(self.source, self._requests(self.order), **self._options)
        if self.held.group is None:
            return CachedReader(self.held, ([request] for request in self._requests(self.order)), 0)
        together = self._requests(replace(self.order, batch=self.order.stride, rank=0, world=1))
        return CachedReader(self.held, (request.split(self.order.batch) for request in together), self.order.rank)

    def _requests(self, order: Order) -> Iterator[Request]:
        """Yield the requests of `order` from the current position on, forever."""
        position = self.position
        while True:
            yield order.request(position, self._corrupt)
            position += order.stride

    def _draw(self, request: Request, views: torch.Tensor) -> torch.Tensor:
        """Return a sample of each posterior, scaled and shifted, or the mean if only that is stored.

        A sample's noise is a function of the seed and its position. views: uint8 (b, view_bytes).
        Returns float32 (b, C, H, W).
        """
        mean, std = self.source.samples.form.unpack(views)
        if std is None:
            return (mean - self._shift).mul_(self._scale)
        noise = posterior_noise(mean, self.order.seed, request.position)
        return noise.mul_(std).add_(mean).sub_(self._shift).mul_(self._scale)

    def _set_aside(self, failure: BatchFailed) -> None:
        """Find the failed batch's corrupt images; raise UserError, or exclude them and start again at that batch."""
        self.close()
        if self.source.kind != "image":
            raise failure
        corrupt = find_corrupt(failure)
        for i in corrupt:
            image = f"{self.source.where(i)}: the image (sample {i})"
            if not self._skip_corrupt:
                raise UserError(f"{image} {decoding_fault(self.source, i, SKIP)}") from failure
            log.warning("%s %s", image, decoding_fault(self.source, i, "skipped"))
        self._corrupt.update(corrupt)
        if len(self._corrupt) == self.source.n:
            raise UserError(f"{self.source.path}: none of its {self.source.n} images can be decoded")
