"""A source read once, in a given order: for who makes other data of it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import torch

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
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """Yield `(ids, x)` for each of `batches`, arrays of sample ids: x float32 (b, 3, *size) in [-1, 1], on `device`.

    The source is one of images. They are as in ImageReader, never mirrored; all become color: a grey image has three
    equal channels. The next batches are prepared meanwhile. `reader` chooses the library, as in `make_loader`. An image
    that cannot be decoded raises UserError ("stop"), or its id is missing in `ids` ("skip").
    """
    batches = [ids for ids in batches if len(ids)]
    if not batches:
        return
    backend = choose_backend(reader)
    if backend.instead:
        log.warning("%s: %s", source.path, backend.describe("image", threads))
    options = {"batch": max(map(len, batches)), "device": device, "threads": threads, "prefetch": prefetch}
    options |= {"size": size, "channels": 3, "convert": True}
    at = 0
    while at < len(batches):
        requests = [Request(k, ids, np.zeros(len(ids), dtype=bool)) for k, ids in enumerate(batches[at:])]
        with closing(backend.module.ImageReader(source, requests, **options)) as images:
            try:
                for request in requests:
                    _, x = next(images)
                    yield request.ids, x
                    at += 1
            except BatchFailed as failure:
                corrupt = find_corrupt(failure, source, backend, options)
                for i in corrupt:
                    what = f"{source.where(i)}: the image (sample {i}) is corrupt and cannot be decoded"
                    if on_corrupt == "stop":
                        raise UserError(f"{what}; replace or remove it, or set on_corrupt to skip") from failure
                    log.warning("%s; left out", what)
                kept = np.setdiff1d(batches[at], corrupt)
                batches[at : at + 1] = [kept] if len(kept) else []
