"""Keep latents in memory: read them once, then gather each batch from there.

    place "device"   gather views by the seeded permutation -> exchange between ranks -> unpack
    place "cpu"      gather -> copy to the device -> exchange -> unpack

order.py decides which samples come next, as it does for DALI. Rank r of w keeps a w-th of the samples, a run of
consecutive ids. Every rank knows which samples every other rank shows next, so each rank sends the others theirs in one
all-to-all, and no rank asks or waits for sizes.
"""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from fastdit.data.order import Request
from fastdit.data.sources import Source
from fastdit.data.transfer import to_device
from fastdit.errors import UserError

# Shares of the total memory that "auto" may fill. The rest is for weights, activations and the page cache.
DEVICE_SHARE, HOST_SHARE = 0.1, 0.25
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of control groups, v2 and v1
_CHUNK_BYTES = 64 << 20  # copied to the device at a time while the cache is filled

Cache = Literal["auto", "none", "cpu", "device"]


def choose_cache(
    cache: Cache, source: Source, device: torch.device, group: dist.ProcessGroup | None, ranks_here: int = 1
) -> Literal["none", "cpu", "device"]:
    """Return the place that the setting `cache` stands for; every rank of `group` gets the same answer.

    "auto" takes the device if a rank's latents fill at most DEVICE_SHARE of its memory. Otherwise it takes the host if
    the latents of the `ranks_here` ranks of this machine fill at most HOST_SHARE of the host's memory. Otherwise, and
    for sources other than latents, it takes none. This is a collective for "auto".

    Raises UserError if "cpu" or "device" is asked for and the source holds no latents.
    """
    if source.kind != "latent":
        if cache in ("cpu", "device"):
            raise UserError(
                f"data.cache: {cache} keeps latents, and {source.path} holds images; set it to none or auto"
            )
        return "none"
    if cache != "auto":
        return cache
    rank_bytes = bytes_per_rank(source, dist.get_world_size(group) if group else 1)
    choice = int(rank_bytes * ranks_here <= HOST_SHARE * _host_memory())
    if device.type == "cuda" and rank_bytes <= DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory:
        choice = 2
    if group:  # machines may differ
        smallest = torch.tensor(choice, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
        choice = int(smallest)
    return ("none", "cpu", "device")[choice]


def _host_memory() -> int:
    """Return the host's memory in bytes, or the container's limit if that is less."""
    limits = [psutil.virtual_memory().total]
    for path in LIMITS:
        with suppress(OSError, ValueError):  # no such file; "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def bytes_per_rank(source: Source, ranks: int) -> int:
    """Return the size in bytes of the largest share of the latents that one of `ranks` ranks keeps."""
    form = source.samples.form
    return -(-source.n // ranks) * form.views * form.view_bytes


class CachedLatents:
    """Keep this rank's share of a source's latents in memory.

    Args:
        place: "cpu" (pinned memory if there is a GPU) or "device".
        group: the ranks that share the latents; None keeps all of them in this process.

    Raises UserError if the latents do not fit into memory.
    """

    def __init__(
        self, source: Source, place: Literal["cpu", "device"], device: torch.device, group: dist.ProcessGroup | None
    ):
        # Find this rank's ids.
        samples, form = source.samples, source.samples.form
        self.device, self.group = device, group
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self.n_views, self.each = form.views, -(-source.n // self.ranks)
        first = min(self.rank * self.each, source.n)
        ids = range(first, min(first + self.each, source.n))

        # Allocate the memory.
        where = device if place == "device" else torch.device("cpu")
        self.pinned = where.type == "cpu" and device.type == "cuda"
        size = (len(ids) * form.views, form.view_bytes)
        try:
            self.views = torch.empty(size, dtype=torch.uint8, device=where, pin_memory=self.pinned)
        except RuntimeError as error:  # torch.OutOfMemoryError among them
            raise UserError(
                f"data.cache: {place}: {size[0] * size[1] / 1e9:.1f} GB of latents do not fit there "
                f"({str(error).splitlines()[0][:80]}); set it to {'cpu or none' if place == 'device' else 'none'}"
            ) from None

        # Fill it, a chunk at a time.
        per_chunk = max(1, _CHUNK_BYTES // (form.views * form.view_bytes))
        for begin in range(0, len(ids), per_chunk):
            chunk = [samples.view(i, bool(k)) for i in ids[begin : begin + per_chunk] for k in range(form.views)]
            rows = slice(begin * form.views, begin * form.views + len(chunk))
            self.views[rows].copy_(torch.from_numpy(np.stack(chunk)))

    @property
    def bytes(self) -> int:
        """Return the size of this rank's share in bytes."""
        return self.views.numel()

    def gather(self, requests: list[Request], index: int) -> Tensor:
        """Return the views that `requests[index]` asks for, uint8 (b, view_bytes), on the device.

        requests: the requests of all ranks at this step, in rank order. With a group this is a collective.
        """
        if self.group is None:
            return self._rows(requests[index])
        # Collect the views that this rank keeps, for every rank that asks for them.
        owners = [request.ids // self.each for request in requests]
        parts = [_select(request, owner == self.rank) for request, owner in zip(requests, owners)]
        sent = self._rows(Request(0, *(np.concatenate(x) for x in zip(*((p.ids, p.flips) for p in parts)))))

        # Exchange them.
        received = sent.new_empty(len(requests[index].ids), sent.shape[1])
        counts = np.bincount(owners[index], minlength=self.ranks).tolist()
        dist.all_to_all_single(received, sent, counts, [len(part.ids) for part in parts], group=self.group)

        # They arrive owner by owner, and from each owner in the order of the request. Undo that sorting.
        place = np.empty(len(received), dtype=np.int64)
        place[np.argsort(owners[index], kind="stable")] = np.arange(len(received))
        return received[to_device(place, self.device)]

    def _rows(self, request: Request) -> Tensor:
        """Return views of samples that this rank keeps, on the device."""
        local = (request.ids - self.rank * self.each) * self.n_views + (request.flips if self.n_views == 2 else 0)
        index = to_device(local, self.views.device)
        if not self.pinned:
            return self.views.index_select(0, index)
        out = torch.empty(len(local), self.views.shape[1], dtype=torch.uint8, pin_memory=True)
        return to_device(torch.index_select(self.views, 0, index, out=out), self.device)


def _select(request: Request, mask: np.ndarray) -> Request:
    """Return the request for the samples of `request` where `mask` (b,) bool is true."""
    return Request(request.position, request.ids[mask], request.flips[mask])


class CachedReader:
    """Iterate over `(request, views)` as LatentReader does, but from memory.

    requests: lists of all ranks' requests, in rank order. index: the place of this rank in these lists.
    """

    def __init__(self, latents: CachedLatents, requests: Iterable[list[Request]], index: int):
        self._latents, self._requests, self._index = latents, iter(requests), index

    def __next__(self) -> tuple[Request, Tensor]:
        requests = next(self._requests)
        return requests[self._index], self._latents.gather(requests, self._index)

    def close(self) -> None:
        """Do nothing: the latents stay in memory."""
