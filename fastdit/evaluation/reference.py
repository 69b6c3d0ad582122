"""Compute the real side of an evaluation: features of real images, made once and cached, or ADM's statistics.

It includes the floor: the same figures, with one half of the real images in place of the samples and the other half as
the reference. Samples with figures below the floor cannot be told from the data.
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
from fastdit.files import write_atomically
from fastdit.metrics.feature_nets import FeatureNet
from fastdit.metrics.moments import Moments
from fastdit.metrics.precision_recall import radii
from fastdit.metrics.summary import Collector, Summary, compare
from fastdit.run_parts import Shape

KEPT = 10_000  # real images, at most, whose features are kept, as many as in an ADM reference batch
SEED = 0  # chooses the real images, the same for every run
_STATISTICS = {"mu", "sigma"}
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Reference:
    """Hold the statistics of real images.

    Args:
        data: the source of the images, or the path of the statistics.
        n: number of images; None if it is not known.
        summary: features and moments of the images.
        floor: figures between two halves of the images, by the names of `compare`; empty without images.
        floor_n: numbers of images in the halves.
    """

    data: str
    n: int | None
    summary: Summary
    floor: dict[str, float]
    floor_n: tuple[int, int]


def of_source(
    source: Source, config: Config, n: int, net: FeatureNet, runtime: Runtime, batch: int, progress: Callable
) -> Reference | None:
    """Return the reference of `n` images of `source` on rank 0, and None elsewhere. A collective.

    The images have the size and channels of `config.data` and are not mirrored. The result is cached.

    net: the feature network. batch: images of a rank's batch. progress: wraps the starts of the batches, as tqdm does.

    Raises UserError if the images do not fit the run.
    """
    # Look into the cache.
    path, key = _cached(source, config, n, net)
    found = _read(path, key, runtime.device) if runtime.first else None
    if runtime.share(found is not None):
        if found is not None and found.summary.radii is None:  # of an older version
            found = _with_radii(found, runtime.device)
            _write(path, key, found)
        return found

    # Read the images, compute their features, and cache them.
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
        crop=config.data.crop,
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
    """Return the reference of an `.npz` file on rank 0, and None elsewhere. A collective.

    The file holds the ADM evaluator's statistics mu and sigma (and mu_s and sigma_s), or its images arr_0, or both, or
    the `images` of fastdit/sample.py. net, batch, progress: as in `of_source`.

    Raises UserError if the file holds none of these, or does not fit the feature network or the run.
    """
    # Read the file, and check that it fits the feature network.
    arrays = read_archive(path, "give an ADM reference .npz")
    images = next((arrays[name] for name in ("arr_0", "images") if name in arrays), None)
    if images is None and not arrays.keys() >= _STATISTICS:
        raise UserError(f"{path}: holds neither mu and sigma nor images (arr_0); give an ADM reference batch")
    if arrays.keys() >= _STATISTICS and net.label:
        raise UserError(
            f"{path}: holds statistics of the 2015 Inception network's features, not of {net.label}'s; take "
            "--features inception, or images as --data"
        )

    # Compute features of its images, if there are any.
    made = None
    if images is not None:
        expected = (len(images), shape.height, shape.width, shape.channels)
        if images.dtype != np.uint8 or images.shape != expected or len(images) < 4:
            raise UserError(f"{path}: its images are {images.dtype} {images.shape}; the samples are uint8 {expected}")
        made = _make(_reader(images), path, len(images), net, runtime, batch, progress)
    if not runtime.first or not arrays.keys() >= _STATISTICS:
        return made

    # Its statistics, if there are any, replace those of the images.
    moments = {"moments": _moments(arrays, "mu", "sigma", runtime.device)}
    if "mu_s" in arrays and "sigma_s" in arrays:
        moments["spatial"] = _moments(arrays, "mu_s", "sigma_s", runtime.device)
    if made is None:
        return Reference(path, None, Summary(**moments), {}, (0, 0))
    return replace(made, n=None, summary=replace(made.summary, **moments))


def _make(
    read: Callable[[np.ndarray], Tensor],
    data: str,
    n: int,
    net: FeatureNet,
    runtime: Runtime,
    batch: int,
    progress: Callable,
) -> Reference | None:
    """Return the reference of `n` images on rank 0, and None elsewhere. A collective.

    read: returns the images of a batch of indices, uint8 (batch, C, H, W). Images with indices of `n` or more are
        ignored. The other arguments are those of `of_source`.
    """
    # Compute the features of both halves, the images with even and with odd indices.
    halves = [Collector((n + 1) // 2, KEPT // 2), Collector(n // 2, KEPT // 2)]
    for start in progress(range(0, n, batch * runtime.world)):
        ids = start + runtime.rank * batch + np.arange(batch)
        output = net(read(ids).to(runtime.device))
        for parity, half in enumerate(halves):
            chosen = (ids % 2 == parity) & (ids < n)
            half.add(output.take(torch.from_numpy(chosen).to(runtime.device)), ids[chosen] // 2)

    # Combine the ranks' parts, and compare the halves for the floor.
    a, b = (half.summary().over_ranks(runtime.total, runtime.gather) for half in halves)
    if not runtime.first:
        return None
    return _with_radii(Reference(data, n, a + b, compare(a, b), (a.moments.n, b.moments.n)), runtime.device)


def _with_radii(made: Reference, device: torch.device) -> Reference:
    """Return a reference with the radii of its features, which every evaluation needs."""
    known = radii(made.summary.kept.to(device)).cpu()
    return replace(made, summary=replace(made.summary, radii=known))


def _levels(x: Tensor) -> Tensor:
    """Return the loader's images in [-1, 1] as the bytes that they were read from."""
    return ((x + 1) * 127.5).round().to(torch.uint8)


def _reader(images: np.ndarray) -> Callable[[np.ndarray], Tensor]:
    """Return a function that returns the images of a batch of indices; indices beyond the end start again."""
    return lambda ids: torch.from_numpy(images[ids % len(images)]).permute(0, 3, 1, 2)


def read_archive(path: str, remedy: str) -> dict[str, np.ndarray]:
    """Return the arrays of an `.npz` file by name. Raises UserError with `remedy`."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {remedy}") from None
    except (ValueError, AttributeError):  # pickled objects, plain text, or a single array
        raise UserError(f"{path}: is no .npz file of plain arrays; {remedy}") from None
    except _UNREADABLE as error:
        raise UserError(f"{path}: cannot be read ({str(error).splitlines()[0]}); {remedy}") from None


def _moments(arrays: dict[str, np.ndarray], mean: str, covariance: str, device: torch.device) -> Moments:
    """Return the moments in two arrays of a file, which are named `mean` and `covariance`."""
    mean, covariance = (torch.from_numpy(arrays[name]).to(device) for name in (mean, covariance))
    return Moments.given(2, mean, covariance)  # the files do not say the number of images, and nothing uses it


# -- the cache --


def _cached(source: Source, config: Config, n: int, net: FeatureNet) -> tuple[Path, str]:
    """Return the path of a reference in the cache, and the key that it must hold.

    The key names everything that the reference depends on: data, feature network, weights, resize filter, size, number.
    """
    # Hash the labels and a few of the samples.
    some = np.unique(np.linspace(0, source.n - 1, 64).astype(int)).tolist()
    content = hashlib.sha256(source.labels.tobytes())
    for i in some:
        content.update(source.read(i).tobytes())

    # Write the key as JSON. Its hash is part of the file name.
    key = {
        "data": str(Path(source.path).resolve()) if Path(source.path).exists() else source.path,
        "content": content.hexdigest(),
        "n": n,
        "size": config.data.size,
        "channels": config.data.channels,
        "net": [net.name, net.weights, net.resize],
        "kept": KEPT,
    }
    if source.kind == "image":
        if (reader := choose_backend(config.data.reader, config.data.crop).name) != "dali":
            key["reader"] = reader  # its pixels differ by a few levels
        if config.data.crop != "center":
            key["crop"] = config.data.crop
    text = json.dumps(key)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastdit"
    return home / f"{net.name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz", text


def _write(path: Path, key: str, reference: Reference) -> None:
    """Write a reference into the cache, or print a line if that fails. Several runs may do so at the same time."""
    # Collect arrays and numbers.
    summary = reference.summary
    arrays = {"mu": summary.moments.mean, "sigma": summary.moments.covariance, "features": summary.kept}
    arrays["radii"] = summary.radii
    if summary.spatial is not None:
        arrays |= {"mu_s": summary.spatial.mean, "sigma_s": summary.spatial.covariance}
    rest = {"data": reference.data, "n": reference.n, "floor": reference.floor, "floor_n": reference.floor_n}

    # Write them.
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path, many_writers=True) as temporary, temporary.open("wb") as file:
            named = {name: value.cpu().numpy() for name, value in arrays.items()}
            np.savez(file, key=np.array(key), rest=np.array(json.dumps(rest)), **named)
    except (OSError, UserError) as error:
        reason = getattr(error, "strerror", error)
        print(f"{path.parent}: cannot keep the reference there ({reason}); it will be made again", flush=True)


def _read(path: Path, key: str, device: torch.device) -> Reference | None:
    """Return the reference in a cached file, or None if it does not exist, is damaged, or has another key."""
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
            known = torch.from_numpy(file["radii"]) if "radii" in file else None  # older files have none
    except _UNREADABLE:
        return None
    summary = Summary(**found, kept=kept, radii=known)
    return Reference(rest["data"], rest["n"], summary, rest["floor"], tuple(rest["floor_n"]))
