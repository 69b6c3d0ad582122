"""The loader benchmark: fastdit's loader (DALI; for latents memory too) and PyTorch's DataLoader, on the same samples,
in turns in one process.

Both give the batches that training takes, on its device: float32 (b, C, H, W) and int64 labels. Nothing uses them, so
what is measured is how fast they can come, and what they cost in processor time. The order, the flips and the latents'
noise are those of fastdit's loader, so that both have the same work to do, batch by batch.
"""

import io
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import NamedTuple

import numpy as np
import psutil
import record as records
import torch
from PIL import Image, ImageOps
from record import Section, aligned
from timing import Quantiles, quantiles
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdit.config import Config
from fastdit.data import Source
from fastdit.data.order import Order, noise_seed
from fastdit.engine import build
from fastdit.errors import UserError

OURS, THEIRS = "fastdit", "DataLoader"
KEPT, KEPT_BY_HOST = "fastdit, kept", "fastdit, kept by host"  # latents in memory
TURNS = 10
SECONDS = 1.0  # a turn lasts at least so long: a worker's processor time is known to 10 ms
MEASURES = ("images_per_s", "ratio", "cpu_s_per_1000")
COLUMNS = ("loader", "ran", *(f"{measure}_{q}" for measure in MEASURES for q in ("p20", "p50", "p80")), "turns")


class TorchSamples(Dataset):
    """Samples of an image or latent source, each prepared by a worker as fastdit's loader does it.

    Images: Pillow decodes, turns by EXIF, converts to `channels`, scales to cover `size` (bicubic), cuts the centre;
    then mirrored, and float32 in [-1, 1]. Latents: the stored view's bytes, which the device unpacks.
    """

    def __init__(self, source: Source, size: tuple[int, int], channels: int):
        self.source, self.size, self.channels = source, size, channels

    def __getitem__(self, request: tuple[int, bool]) -> tuple[Tensor, int]:
        i, flip = request
        prepared = self._latent(i, flip) if self.source.kind == "latent" else self._image(i, flip)
        return prepared, int(self.source.labels[i])

    def _latent(self, i: int, flip: bool) -> Tensor:
        return torch.from_numpy(np.array(self.source.samples.view(i, flip)))

    def _image(self, i: int, flip: bool) -> Tensor:
        try:
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(self.source.read(i))))
            image = image.convert("L" if self.channels == 1 else "RGB")
        except OSError as error:
            raise UserError(f"{self.source.where(i)}: Pillow cannot decode the image ({error}); replace it") from None
        height, width = self.size
        scale = max(height / image.height, width / image.width)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
        pixels = np.array(ImageOps.mirror(image) if flip else image).reshape(height, width, self.channels)
        return torch.from_numpy(pixels).permute(2, 0, 1).float().sub_(127.5).div_(127.5)


class TorchLoader:
    """An endless iterator of `(x, y)` from a DataLoader: `data.threads` forked workers that stay, two batches ahead for
    each, and for a GPU pinned memory and copies that the host does not wait for."""

    def __init__(self, config: Config, source: Source, device: torch.device):
        data, self.source, self.device = config.data, source, device
        self.scale, self.shift = (
            torch.tensor(value, device=device).reshape(-1, 1, 1) for value in (data.latent_scale, data.latent_shift)
        )
        self.order = Order(source.n, config.batch, config.seed, flip=data.flip)
        size = (data.size, data.size) if isinstance(data.size, int) else data.size
        self.generator, self.position = torch.Generator(device), 0
        self._batches = iter(
            DataLoader(
                TorchSamples(source, size, data.channels),
                batch_sampler=self._requests(),
                num_workers=data.threads,
                pin_memory=device.type == "cuda",
                multiprocessing_context="fork",
            )
        )

    def _requests(self) -> Iterator[list[tuple[int, bool]]]:
        position = 0
        while True:
            request = self.order.request(position)
            yield list(zip(request.ids.tolist(), request.flips.tolist()))
            position += self.order.stride

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Raises UserError for an image that Pillow cannot decode."""
        try:
            batch = next(self._batches)
        except UserError as error:  # with the worker's traceback before its message
            raise UserError(str(error).strip().rpartition("UserError: ")[2]) from None
        x, y = (part.to(self.device, non_blocking=True) for part in batch)
        if self.source.kind == "latent":
            x, std = self.source.samples.form.unpack(x)
            if std is not None:
                self.generator.manual_seed(noise_seed(self.order.seed, self.position))
                x = torch.empty_like(x).normal_(generator=self.generator).mul_(std).add_(x)
            x = (x - self.shift).mul_(self.scale)
        self.position += self.order.stride
        return x, y

    def close(self) -> None:
        """Ends the workers."""
        self._batches = None


class Processors:
    """Processor time of this process, its threads included, and of the workers it has by now."""

    def __init__(self):
        self.workers = psutil.Process().children(recursive=True)

    def seconds(self) -> float:
        times = (worker.cpu_times() for worker in self.workers)
        return time.process_time() + sum(spent.user + spent.system for spent in times)

    def settle(self) -> float:
        """Wait until nothing is prepared ahead any more, 10 s at most; then `seconds`."""
        now = self.seconds()
        for _ in range(40):
            before = now
            time.sleep(0.25)
            now = self.seconds()
            if now - before < 0.01:
                break
        return now


class Taken(NamedTuple):
    """A loader's turn."""

    images_per_s: float
    cpu_s_per_1000: float


def take_turn(loader, config: Config, device: torch.device, processors: Processors) -> Taken:
    """Begins and ends with as many batches prepared ahead as the loader keeps: in between, as many were made as were
    taken, and their processor time is the turn's. The first ones, made before the turn, do not count for the rate."""
    ahead = 2 * config.data.threads + 4
    spent = processors.settle()
    for _ in range(ahead):
        next(loader)
    _wait(device)
    taken, begin = 0, time.perf_counter()
    while taken < 2 * ahead or time.perf_counter() - begin < SECONDS:
        next(loader)
        taken += 1
    _wait(device)
    rate = taken * config.batch / (time.perf_counter() - begin)
    spent = processors.settle() - spent
    return Taken(rate, spent / ((ahead + taken) * config.batch) * 1e3)


def measure_loaders(config: Config, device: torch.device, turns: int | None, command: str) -> dict:
    """The record. Raises UserError."""
    source = build.open_data(config)
    config = build.standardised(config, source)
    with ExitStack() as stack:
        theirs = TorchLoader(config, source, device)  # forks its workers: before others start threads, which these lack
        options = {"batch": config.batch, "rank": 0, "world": 1, "device": device}
        loaders = {OURS: build.build_loader(config, source, **options)}
        if source.kind == "latent":
            places = {"device": KEPT} | ({"cpu": KEPT_BY_HOST} if device.type == "cuda" else {})
            loaders |= {
                name: build.build_loader(config, source, cache=place, **options) for place, name in places.items()
            }
        loaders[THEIRS] = theirs
        for loader in loaders.values():
            stack.enter_context(closing(loader))
        firsts = {name: next(loader) for name, loader in loaders.items()}
        record = records.start(command, device, _settings(config, source, firsts), LOADER.benchmark)
        processors = Processors()
        taken: dict[str, list[Taken]] = {name: [] for name in loaders}
        for turn in range(turns or TURNS):
            for name in list(loaders)[:: 1 if turn % 2 else -1]:
                taken[name].append(take_turn(loaders[name], config, device, processors))
    ran = {OURS: "DALI", KEPT: "data.cache device", KEPT_BY_HOST: "data.cache cpu", THEIRS: "torch, Pillow"}
    record["rows"] = [_row(name, ran[name], taken[name], taken[THEIRS]) for name in loaders]
    return record


def _settings(config: Config, source: Source, firsts: dict[str, tuple[Tensor, Tensor]]) -> dict:
    (x, y), (other, _) = firsts[OURS], firsts[THEIRS]
    if not all(torch.equal(y, labels) for _, labels in firsts.values()):
        raise RuntimeError("the loaders give different samples")
    height, width = x.shape[-2:]
    some = range(0, source.n, math.ceil(source.n / 256) | 1)  # odd: data may repeat in fours
    return {
        "data": source.path,
        "kind": source.kind,
        "samples": source.n,
        "sample_bytes": round(float(np.mean([source.read(i).nbytes for i in some]))),
        "shape": [config.data.channels, height, width],
        "batch": config.batch,
        "dtype": "float32",
        "threads": config.data.threads,
        "seconds": SECONDS,
        "difference": (x - other).abs().mean().item(),
    }


def _row(name: str, ran: str, taken: list[Taken], theirs: list[Taken]) -> dict:
    values = {
        "images_per_s": quantiles([turn.images_per_s for turn in taken]),
        "ratio": quantiles([turn.images_per_s / other.images_per_s for turn, other in zip(taken, theirs)]),
        "cpu_s_per_1000": quantiles([turn.cpu_s_per_1000 for turn in taken]),
    }
    spreads = (_spread(values[measure]) for measure in MEASURES)
    return dict(zip(COLUMNS, (name, ran, *(value for spread in spreads for value in spread), len(taken)), strict=True))


def _spread(found: Quantiles) -> tuple[float, float, float]:
    return found.p20, found.p50, found.p80


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loader_lines(record: dict) -> list[str]:
    """Markdown: a line for each loader."""
    settings = record["settings"]
    cells = [("loader", "runs", "images/s (20-80 %)", f"in {THEIRS}'s (20-80 %)", "CPU s for 1000 images (20-80 %)")]
    for row in record["rows"]:
        levels = [[_number(row[f"{measure}_{q}"]) for q in ("p50", "p20", "p80")] for measure in MEASURES]
        shown = [f"{middle} ({low}-{high})" for middle, low, high in levels]
        cells.append((row["loader"], row["ran"], *shown))
    shape = "x".join(map(str, settings["shape"]))
    return [
        f"{settings['samples']:,} {settings['kind']} samples of {settings['sample_bytes'] / 1024:.1f} KiB as {shape}, "
        f"{settings['threads']} threads or workers. First batches differ by {settings['difference']:.1g} on average "
        "(images: of values from -1 to 1).",
        "",
        *aligned(cells),
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


LOADER = Section("loader", ("<!-- loader: begin -->\n", "<!-- loader: end -->\n"), loader_lines)
