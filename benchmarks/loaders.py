"""The loader benchmark: fastdit's loader with DALI, or with latents in memory, and PyTorch's DataLoader.

They take turns in one process, and give the same samples as training takes them, on its device: float32 (b, C, H, W)
and int64 labels. Nothing uses the batches, so the benchmark measures how fast they can come, and what they cost in
processor time. For images the DataLoader is that of `--data.reader torch`. The order, the flips and the noise are the
same, so that all have the same work to do, batch by batch.
"""

import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import psutil
import record as records
import torch
from journal import Journal
from record import Section, aligned
from timing import Quantiles, quantiles
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastdit import run_parts
from fastdit.config import Config
from fastdit.data import Source
from fastdit.data.cache import Cache
from fastdit.data.loader import posterior_noise
from fastdit.data.order import Order
from fastdit.data.readers import ReaderName
from fastdit.data.transfer import to_device

OURS, THEIRS = "fastdit", "DataLoader"
THREADS = "fastdit, threads"  # latents without DALI
KEPT, KEPT_BY_HOST = "fastdit, kept", "fastdit, kept by host"  # latents in memory
RAN = {OURS: "DALI", THREADS: "torch, threads", KEPT: "data.cache device", KEPT_BY_HOST: "data.cache cpu"}
TURNS = 10
SECONDS = 1.0  # a turn lasts at least so long: a worker's processor time is known to 10 ms
MEASURES = ("images_per_s", "ratio", "cpu_s_per_1000")
COLUMNS = ("loader", "ran", *(f"{measure}_{q}" for measure in MEASURES for q in ("p20", "p50", "p80")), "turns")


class LatentViews(Dataset):
    """Views of a latent source, one at a time, as DataLoader's workers read them."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, request: tuple[int, bool]) -> tuple[Tensor, int]:
        """Return the stored view's bytes, which the device unpacks, and the label."""
        i, flip = request
        return torch.from_numpy(np.array(self.source.samples.view(i, flip))), int(self.source.labels[i])


class LatentWorkers:
    """An endless iterator of `(x, y)` of latents from a DataLoader's forked workers, in fastdit's order.

    fastdit's own reader without DALI takes threads for latents, so the processes of a usual DataLoader are here.
    """

    def __init__(self, config: Config, source: Source, device: torch.device):
        data, self.source, self.device = config.data, source, device
        self.scale, self.shift = (
            torch.tensor(value, device=device).reshape(-1, 1, 1) for value in (data.latent_scale, data.latent_shift)
        )
        self.order = Order(source.n, config.batch, config.seed, flip=data.flip)
        self.position = 0
        self._batches = iter(
            DataLoader(
                LatentViews(source),
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
        views, y = (to_device(part, self.device) for part in next(self._batches))
        x, std = self.source.samples.form.unpack(views)
        if std is not None:
            x = posterior_noise(x, self.order.seed, self.position).mul_(std).add_(x)
        self.position += self.order.stride
        return (x - self.shift).mul_(self.scale), y

    def close(self) -> None:
        """End the workers."""
        self._batches = None


def open_loaders(config: Config, source: Source, device: torch.device) -> dict:
    """Return the loaders to compare, by name. They start at their first batch, DataLoader's at once.

    DataLoader comes first: it forks its workers, which is better done before the others start threads.
    """
    options = {"batch": config.batch, "rank": 0, "world": 1, "device": device}

    def loader(reader: ReaderName, cache: Cache = "none"):
        settings = replace(config, data=replace(config.data, reader=reader))
        return run_parts.build_loader(settings, source, cache=cache, **options)

    if source.kind == "image":
        return {THEIRS: loader("torch"), OURS: loader("dali")}
    loaders = {THEIRS: LatentWorkers(config, source, device), OURS: loader("dali"), THREADS: loader("torch")}
    loaders[KEPT] = loader("dali", "device")
    if device.type == "cuda":
        loaders[KEPT_BY_HOST] = loader("dali", "cpu")
    return loaders


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


def measure_loaders(
    config: Config, device: torch.device, turns: int | None, command: str, journal: Journal | None = None
) -> dict:
    """Measure all loaders, each turn a line of the journal as it ends, and return the record. Raises UserError."""
    journal = journal or Journal()
    source = run_parts.open_data(config)
    config = run_parts.standardized(config, source)
    with ExitStack() as stack:
        loaders = open_loaders(config, source, device)
        for loader in loaders.values():
            stack.enter_context(closing(loader))
        firsts = {name: next(loader) for name, loader in loaders.items()}
        loaders[THEIRS] = loaders.pop(THEIRS)  # the last row
        journal.write("record", **records.start(command, device, _settings(config, source, firsts), LOADER.benchmark))
        processors = Processors()
        for turn in range(turns or TURNS):
            for name in list(loaders)[:: 1 if turn % 2 else -1]:
                taken = take_turn(loaders[name], config, device, processors)
                journal.write("turn", loader=name, turn=turn, **taken._asdict())
    return loader_record(journal.lines)


def loader_record(lines: list[dict]) -> dict:
    """Return the record of the last run in a journal's lines: its rows are of the turns that every loader took."""
    begin = max(place for place, line in enumerate(lines) if line["what"] == "record")
    record = {key: value for key, value in lines[begin].items() if key not in ("what", "at")} | {"rows": []}
    taken: dict[str, dict[int, Taken]] = {}
    for line in lines[begin:]:
        if line["what"] == "turn":
            turn = Taken(line["images_per_s"], line["cpu_s_per_1000"])
            taken.setdefault(line["loader"], {})[line["turn"]] = turn
    kind = record["settings"]["kind"]
    order = [name for name in (OURS, THREADS, KEPT, KEPT_BY_HOST, THEIRS) if name in taken]
    whole = sorted(set.intersection(*(set(turns) for turns in taken.values()))) if THEIRS in taken else []
    if whole:
        turns = {name: [taken[name][turn] for turn in whole] for name in order}
        ran = RAN | {THEIRS: "torch, Pillow" if kind == "image" else "torch"}
        record["rows"] = [_row(name, ran[name], turns[name], turns[THEIRS]) for name in order]
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
