"""The real side of an evaluation: features of the data, made once and cached, or statistics of the ADM evaluator.

The floor comes with it: the same figures with one half of the real images in the samples' place and the other half
as the reference. Below it no samples can be told from the data.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdit.config import Config
from fastdit.data import Source, make_loader
from fastdit.data.readers import choose_backend
from fastdit.distributed import Runtime
from fastdit.errors import UserError
from fastdit.metrics.feature_nets import FeatureNet
from fastdit.metrics.moments import Moments
from fastdit.metrics.summary import Collector, Summary, compare
from fastdit.run_parts import Shape

KEPT = 10_000  # real images whose features are kept, as many as an ADM reference batch has
SEED = 0  # of the choice of real images: the same for every run
_STATISTICS = {"mu", "sigma"}
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Reference:
    """`summary` of `n` real images (None: not known) of `data`; `floor` by compare's names, between halves of
    `floor_n` images."""

    data: str
    n: int | None
    summary: Summary
    floor: dict[str, float]
    floor_n: tuple[int, int]


def of_source(
    source: Source, config: Config, n: int, net: FeatureNet, runtime: Runtime, batch: int, progress: Callable
) -> Reference | None:
    """Of `n` images as the run's network sees them, not mirrored; from the cache if they were read before.

    A collective; None but on rank 0. Raises UserError where the images do not fit the run.
    """
    path, key = _cached(source, config, n, net)
    found = _read(path, key, runtime.device) if runtime.first else None
    if runtime.share(found is not None):
        return found
    loader = make_loader(
        source,
        batch=batch,
        size=config.data.size,
        channels=config.data.channels,
        rank=runtime.rank,
        world=runtime.world,
        seed=SEED,
        flip=False,
        device=runtime.device,
        threads=config.data.threads,
        on_corrupt=config.data.on_corrupt,
        convert=config.data.convert,
        reader=config.data.reader,
    )
    with closing(loader):
        made = _make(lambda ids: _levels(next(loader)[0]), source.path, n, net, runtime, batch, progress)
    if made is not None:
        _write(path, key, made)
    return made


def of_archive(
    path: str, shape: Shape, net: FeatureNet, runtime: Runtime, batch: int, progress: Callable
) -> Reference | None:
    """Of an `.npz`: the ADM evaluator's mu, sigma (and mu_s, sigma_s), its images arr_0, or both; or our `images`.

    A collective; None but on rank 0. Raises UserError when it is none of these or does not fit net or run.
    """
    arrays = _archive(path)
    images = next((arrays[name] for name in ("arr_0", "images") if name in arrays), None)
    if images is None and not arrays.keys() >= _STATISTICS:
        raise UserError(f"{path}: holds neither mu and sigma nor images (arr_0); give an ADM reference batch")
    if arrays.keys() >= _STATISTICS and net.label:
        raise UserError(
            f"{path}: holds statistics of the 2015 Inception network's features, not of {net.label}'s; take "
            "--features inception, or images as --data"
        )
    made = None
    if images is not None:
        wanted = (len(images), shape.height, shape.width, shape.channels)
        if images.dtype != np.uint8 or images.shape != wanted or len(images) < 4:
            raise UserError(f"{path}: its images are {images.dtype} {images.shape}; the run's are uint8 {wanted}")
        made = _make(_reader(images), path, len(images), net, runtime, batch, progress)
    if not runtime.first or not arrays.keys() >= _STATISTICS:
        return made
    given = {"moments": _given(arrays, "mu", "sigma", runtime.device)}
    if "mu_s" in arrays and "sigma_s" in arrays:
        given["spatial"] = _given(arrays, "mu_s", "sigma_s", runtime.device)
    if made is None:
        return Reference(path, None, Summary(**given), {}, (0, 0))
    return replace(made, n=None, summary=replace(made.summary, **given))


def _make(
    read: Callable[[np.ndarray], Tensor],
    data: str,
    n: int,
    net: FeatureNet,
    runtime: Runtime,
    batch: int,
    progress: Callable,
) -> Reference | None:
    """`read` gives the images uint8 (batch, C, H, W) of the numbers it is given; beyond `n` they do not count."""
    halves = [Collector((n + 1) // 2, KEPT // 2), Collector(n // 2, KEPT // 2)]
    for start in progress(range(0, n, batch * runtime.world)):
        ids = start + runtime.rank * batch + np.arange(batch)
        output = net(read(ids).to(runtime.device))
        for parity, half in enumerate(halves):
            mine = (ids % 2 == parity) & (ids < n)
            half.add(output.take(torch.from_numpy(mine).to(runtime.device)), ids[mine] // 2)
    a, b = (half.summary().over_ranks(runtime.total, runtime.gather) for half in halves)
    if not runtime.first:
        return None
    return Reference(data, n, a + b, compare(a, b), (a.moments.n, b.moments.n))


def _levels(x: Tensor) -> Tensor:
    """The loader's [-1, 1] back to the bytes they were."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


def _reader(images: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    return lambda ids: torch.from_numpy(images[ids % len(images)]).permute(0, 3, 1, 2)


def _archive(path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); give an ADM reference .npz") from None


def _given(arrays: dict[str, np.ndarray], mean: str, covariance: str, device: torch.device) -> Moments:
    mean, covariance = (torch.from_numpy(arrays[name]).to(device) for name in (mean, covariance))
    return Moments.given(2, mean, covariance)  # of how many, these files do not say, and nothing asks


# -- the cache --


def _cached(source: Source, config: Config, n: int, net: FeatureNet) -> tuple[Path, str]:
    """Where the reference lies, and what it must belong to: data, network, weights, resize filter, size, number."""
    some = np.unique(np.linspace(0, source.n - 1, 64).astype(int)).tolist()
    content = hashlib.sha256(source.labels.tobytes())
    for i in some:
        content.update(source.read(i).tobytes())
    key = {
        "data": str(Path(source.path).resolve()) if Path(source.path).exists() else source.path,
        "content": content.hexdigest(),
        "n": n,
        "size": config.data.size,
        "channels": config.data.channels,
        "net": [net.name, net.weights, net.resize],
        "kept": KEPT,
    }
    if source.kind == "image" and (reader := choose_backend(config.data.reader).name) != "dali":
        key["reader"] = reader  # its pixels differ by a few levels
    text = json.dumps(key)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdit"
    return home / f"{net.name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz", text


def _write(path: Path, key: str, reference: Reference) -> None:
    summary = reference.summary
    arrays = {"mu": summary.moments.mean, "sigma": summary.moments.covariance, "features": summary.kept}
    if summary.spatial is not None:
        arrays |= {"mu_s": summary.spatial.mean, "sigma_s": summary.spatial.covariance}
    rest = {"data": reference.data, "n": reference.n, "floor": reference.floor, "floor_n": reference.floor_n}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            named = {name: value.cpu().numpy() for name, value in arrays.items()}
            np.savez(file, key=np.array(key), rest=np.array(json.dumps(rest)), **named)
        partial.replace(path)
    except OSError as error:
        print(f"{path.parent}: cannot keep the reference there ({error.strerror}); it will be made again", flush=True)


def _read(path: Path, key: str, device: torch.device) -> Reference | None:
    """None where there is none, or not a whole one of that key."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) != key:
                return None
            rest = json.loads(str(file["rest"]))
            parts = {"moments": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
            found = {
                part: Moments.given(rest["n"], *(torch.from_numpy(file[name]).to(device) for name in names))
                for part, names in parts.items()
                if names[0] in file
            }
            kept = torch.from_numpy(file["features"])
    except _UNREADABLE:
        return None
    return Reference(rest["data"], rest["n"], Summary(**found, kept=kept), rest["floor"], tuple(rest["floor_n"]))
