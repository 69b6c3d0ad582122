"""A source read once, in a given order: for who makes other data of it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Literal

import numpy as np
import torch

from fastdit.data.order import BatchFailed, Request
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
) -> Iterator[tuple[np.ndarray, torch.Tensor]]:
    """`(ids, x)` for each of `batches`, arrays of sample ids: x float32 (b, 3, *size) in [-1, 1], on `device`.

    The source is one of images. They are as in ImageReader, never mirrored; all become colour. The next batches are
    prepared meanwhile. An image that cannot be decoded raises UserError ("stop"), or its id is missing in `ids`
    ("skip").
    """
    from fastdit.data.pipeline import ImageReader, undecodable  # imports DALI: not for who does without

    batches = [ids for ids in batches if len(ids)]
    if not batches:
        return
    options = {"batch": max(map(len, batches)), "device": device, "threads": threads, "prefetch": prefetch}
    options |= {"size": size, "channels": 3, "convert": True}
    at = 0
    while at < len(batches):
        requests = [Request(k, ids, np.zeros(len(ids), dtype=bool)) for k, ids in enumerate(batches[at:])]
        with closing(ImageReader(source, requests, **options)) as reader:
            try:
                for request in requests:
                    _, x = next(reader)
                    yield request.ids, x
                    at += 1
            except BatchFailed as failure:
                corrupt = undecodable(source, failure.request.ids, **options)
                if not corrupt:  # not the data's fault: out of memory, say
                    raise
                for i in corrupt:
                    what = f"{source.where(i)}: the image (sample {i}) is corrupt and cannot be decoded"
                    if on_corrupt == "stop":
                        raise UserError(f"{what}; replace or remove it, or set on_corrupt to skip") from failure
                    log.warning("%s; left out", what)
                kept = np.setdiff1d(batches[at], corrupt)
                batches[at : at + 1] = [kept] if len(kept) else []
