"""Read a source once, in a given order, as encoding and evaluation do."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import torch

from fastdit.data.image_rules import SKIP, Crop, decoding_fault
from fastdit.data.order import BatchFailed, Request
from fastdit.data.readers import ReaderName, choose_backend, find_corrupt
from fastdit.data.sources import Source
from fastdit.errors import UserError

log = logging.getLogger(__name__)


def read_in_order(
    source: Source,
    batches: Sequence[np.ndarray],
    *,
    size: tuple[int, int],
    device: torch.device,
    threads: int = 2,
    prefetch: int = 2,
    on_corrupt: Literal["stop", "skip"] = "stop",
    reader: ReaderName = "auto",
    crop: Crop = "center",
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield `(ids, x)` for each of `batches`, arrays of sample ids: x float32 (b, 3, *size) in [-1, 1], on `device`.

    The source must hold images. They are scaled and cropped as in ImageReader, and never mirrored. All become RGB: a
    gray image gets three equal channels. The next batches are prepared while the caller uses the current one.

    on_corrupt: "stop" raises UserError at an image that cannot be decoded; "skip" leaves its id out of `ids`.
    reader, crop: the library that decodes, and the way in which images are scaled, as in `make_loader`.
    """
    batches = [ids for ids in batches if len(ids)]
    if not batches:
        return
    # Choose the library that decodes.
    backend = choose_backend(reader, crop)
    if backend.instead and crop == "center":
        log.warning("%s: %s", source.path, backend.describe("image", threads))
    options = {"batch": max(map(len, batches)), "device": device, "threads": threads, "prefetch": prefetch}
    options |= {"size": size, "channels": 3, "convert": True}
    options |= {"crop": crop} if backend.name == "torch" else {}
    # Read until a batch fails; leave out its corrupt images and start again at that batch.
    done = 0
    while done < len(batches):
        requests = [Request(k, ids, np.zeros(len(ids), dtype=bool)) for k, ids in enumerate(batches[done:])]
        with closing(backend.module.ImageReader(source, requests, **options)) as images:
            try:
                for request in requests:
                    _, x = next(images)
                    yield request.ids, x
                    done += 1
            except BatchFailed as failure:
                corrupt = find_corrupt(failure)
                for i in corrupt:
                    image = f"{source.where(i)}: the image (sample {i})"
                    if on_corrupt == "stop":
                        raise UserError(f"{image} {decoding_fault(source, i, SKIP)}") from failure
                    log.warning("%s %s", image, decoding_fault(source, i, "left out"))
                intact = np.setdiff1d(batches[done], corrupt)
                batches[done : done + 1] = [intact] if len(intact) else []
