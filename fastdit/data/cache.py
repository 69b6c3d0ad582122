"""Latents kept in memory: read once, then gathered where they lie. Which come next is order.py's, as with DALI.

    held on the device   gather views by the seeded permutation -> exchange between ranks -> unpack
    held by the host     gather -> copy to the device -> exchange -> unpack

Rank r of w holds a w-th of the samples, a run of consecutive ids. Every rank knows which samples every other shows
next, so each sends the others theirs in one all-to-all, and nobody asks or waits for sizes.
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

# Shares of memory that "auto" may fill, over all that is there: the rest is for weights, activations and page cache.
DEVICE_SHARE, HOST_SHARE = 0.1, 0.25
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of control groups, v2 and v1
_AT_ONCE = 64 << 20  # bytes on their way to the device while the cache is filled

Cache = Literal["auto", "none", "cpu", "device"]


def choose_cache(
    asked: Cache, source: Source, device: torch.device, group: dist.ProcessGroup | None, ranks_here: int = 1
) -> Literal["none", "cpu", "device"]:
    """What `asked` means for `source`, on every rank of `group` alike (a collective for "auto").

    "auto" takes the device where a rank's share fills at most DEVICE_SHARE of its memory, else the host where those of
    the `ranks_here` ranks of this machine fill at most HOST_SHARE; else none, and for anything but latents none.
    Raises UserError where something else than latents shall be kept.
    """
    if source.kind != "latent":
        if asked in ("cpu", "device"):
            raise UserError(
                f"data.cache: {asked} keeps latents, and {source.path} holds images; set it to none or auto"
            )
        return "none"
    if asked != "auto":
        return asked
    share = held_bytes(source, dist.get_world_size(group) if group else 1)
    choice = int(share * ranks_here <= HOST_SHARE * _host_memory())
    if device.type == "cuda" and share <= DEVICE_SHARE * torch.cuda.get_device_properties(device).total_memory:
        choice = 2
    if group:  # machines may differ
        smallest = torch.tensor(choice, device=device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN, group=group)
        choice = int(smallest)
    return ("none", "cpu", "device")[choice]


def _host_memory() -> int:
    """In bytes; a container's limit where that is less."""
    limits = [psutil.virtual_memory().total]
    for path in LIMITS:
        with suppress(OSError, ValueError):  # no such file; "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def held_bytes(source: Source, ranks: int) -> int:
    """Of the latents that one rank keeps, at most."""
    form = source.samples.form
    return -(-source.n // ranks) * form.views * form.view_bytes


class HeldLatents:
    """This rank's share of a source's latents, in memory.

    Args:
        place: where: "cpu" (pinned, for a GPU) or "device".
        group: over whose ranks they are spread; None: this process keeps all.

    Raises UserError when they do not fit.
    """

    def __init__(
        self, source: Source, place: Literal["cpu", "device"], device: torch.device, group: dist.ProcessGroup | None
    ):
        samples, form = source.samples, source.samples.form
        self.device, self.group = device, group
        self.rank, self.ranks = (dist.get_rank(group), dist.get_world_size(group)) if group else (0, 1)
        self.n_views, self.each = form.views, -(-source.n // self.ranks)
        first = min(self.rank * self.each, source.n)
        ids = range(first, min(first + self.each, source.n))
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
        at_once = max(1, _AT_ONCE // (form.views * form.view_bytes))
        for begin in range(0, len(ids), at_once):
            part = [samples.view(i, bool(k)) for i in ids[begin : begin + at_once] for k in range(form.views)]
            rows = slice(begin * form.views, begin * form.views + len(part))
            self.views[rows].copy_(torch.from_numpy(np.stack(part)))

    @property
    def bytes(self) -> int:
        return self.views.numel()

    def gather(self, requests: list[Request], own: int) -> Tensor:
        """The views of requests[own], uint8 (b, view_bytes), on the device.

        requests: those of all ranks at this step, in rank order. With a group this is a collective.
        """
        if self.group is None:
            return self._rows(requests[own])
        wanted = [request.ids // self.each for request in requests]  # who has them
        parts = [_chosen(request, owner == self.rank) for request, owner in zip(requests, wanted)]
        given = self._rows(Request(0, *(np.concatenate(x) for x in zip(*((p.ids, p.flips) for p in parts)))))
        taken = given.new_empty(len(requests[own].ids), given.shape[1])
        counts = np.bincount(wanted[own], minlength=self.ranks).tolist()
        dist.all_to_all_single(taken, given, counts, [len(part.ids) for part in parts], group=self.group)
        # They come owner by owner, from each in the order asked for.
        place = np.empty(len(taken), dtype=np.int64)
        place[np.argsort(wanted[own], kind="stable")] = np.arange(len(taken))
        return taken[to_device(place, self.device)]

    def _rows(self, request: Request) -> Tensor:
        """Views of samples held here, on the device."""
        local = (request.ids - self.rank * self.each) * self.n_views + (request.flips if self.n_views == 2 else 0)
        index = to_device(local, self.views.device)
        if not self.pinned:
            return self.views.index_select(0, index)
        out = torch.empty(len(local), self.views.shape[1], dtype=torch.uint8, pin_memory=True)
        return to_device(torch.index_select(self.views, 0, index, out=out), self.device)


def _chosen(request: Request, here: np.ndarray) -> Request:
    return Request(request.position, request.ids[here], request.flips[here])


class HeldReader:
    """Iterates over `(request, views)` as LatentReader does, from memory.

    requests: lists of all ranks' requests, in rank order; `own` is this rank's place in them.
    """

    def __init__(self, held: HeldLatents, requests: Iterable[list[Request]], own: int):
        self._held, self._requests, self._own = held, iter(requests), own

    def __next__(self) -> tuple[Request, Tensor]:
        requests = next(self._requests)
        return requests[self._own], self._held.gather(requests, self._own)

    def close(self) -> None:
        """Nothing to stop: what is held stays."""
