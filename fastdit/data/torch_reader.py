"""Prepare batches without DALI: the same samples in the same order as in pipeline.py, at a higher cost.

    images     data.threads worker processes of a torch DataLoader decode whole batches with Pillow, into memory that
               they share with this process; the device makes floats of the bytes
    latents    data.threads threads gather views out of the memory maps

A worker sends only a short note about each batch through DataLoader's queue. A pipe writes such a note in one piece. So
a worker that is killed leaves no half-written message, which this process would wait for forever.
"""

import gc
import mmap
import os
import signal
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile
from torch.utils.data import DataLoader, Dataset

from fastdit.data.image_rules import Crop, wrong_channels
from fastdit.data.order import BatchFailed, Request
from fastdit.data.pillow_images import decode, fit
from fastdit.data.sources import Source
from fastdit.data.transfer import to_device
from fastdit.errors import UserError

# Workers are forked. They start within 0.1 s and inherit the listing of the data, where a fork server first imports
# torch (1 to 3 s), receives the listing by pickle, and leaves named semaphores behind when a command ends by os._exit.
# A fork is unsafe for a child that uses CUDA, or takes a lock that another thread of the parent held. These children
# call only Pillow, numpy and DataLoader's loop, as the workers of every PyTorch program do on Linux.
_START_METHOD = "fork"
_WATCH_SECONDS = 0.5  # between two looks of a worker at whether its parent lives


class Job(NamedTuple):
    """Ask a worker for a batch: the slot of the shared memory to fill, sample ids, and which are mirrored."""

    slot: int
    ids: np.ndarray
    flips: np.ndarray


@dataclass
class Note:
    """Report about a batch, from its worker. If all fields are empty, the batch is in its slot.

    Args:
        corrupt: ids of the images that cannot be decoded.
        wrong: id and number of channels of the first image that does not fit.
        error: the text of a UserError.
        crash: the traceback of any other exception.
        shapes: height, width and channels of the files, int64 (b, 3), if asked for.
    """

    corrupt: list[int] = field(default_factory=list)
    wrong: tuple[int, int] | None = None
    error: str | None = None
    crash: str | None = None
    shapes: np.ndarray | None = None


class BatchDecoder(Dataset):
    """Decode batches of images within a worker.

    Args:
        slots: shared memory, uint8 (slots, batch, channels, height, width).
        convert: whether to convert images with another number of channels.
        shapes: whether to report the files' shapes.
        crop: the way in which images are scaled: see `fit`.
    """

    def __init__(self, source: Source, slots: np.ndarray, convert: bool, shapes: bool = False, crop: Crop = "center"):
        self.source, self.slots, self.convert, self.shapes, self.crop = source, slots, convert, shapes, crop
        self.parent = os.getpid()

    def __getitem__(self, job: Job) -> Note:
        """Fill a slot and return a note. Nothing is raised, because DataLoader would wrap the exception's text."""
        try:
            return self._decode(job)
        except UserError as error:
            return Note(error=str(error))
        except MemoryError:
            return Note(error="data.threads: no memory is left to decode an image; lower --data.threads or the batch")
        except Exception:
            return Note(crash=traceback.format_exc()[-3000:])  # a pipe takes 4096 bytes in one piece

    def _decode(self, job: Job) -> Note:
        """Decode the images of a job into its slot. Raises UserError if a file cannot be read."""
        _, _, channels, *size = self.slots.shape
        note, shapes = Note(), []
        for pixels, i, flip in zip(self.slots[job.slot], job.ids.tolist(), job.flips.tolist()):
            file = self.source.read(i)
            try:
                image, found = decode(file)
                prepared = fit(image, tuple(size), channels, self.crop)
            except MemoryError:
                raise
            except Exception:  # a damaged file makes Pillow's parsers fail in many ways
                note.corrupt.append(i)
                continue
            pixels[...] = prepared[..., ::-1] if flip else prepared
            shapes.append((image.height, image.width, found))
            if found != channels and not self.convert and note.wrong is None:
                note.wrong = i, found
        if self.shapes:
            note.shapes = np.array(shapes, dtype=np.int64).reshape(-1, 3)
        return note


class ImageReader:
    """Iterate over `(request, x)` in the order of `requests`: x float32 (b, channels, *size) in [-1, 1].

    Arguments and results are those of pipeline.ImageReader. `threads` is the number of workers. They prepare one batch
    each, and `prefetch` batches more. `crop` is that of `fit`, which only this reader can choose.
    """

    by_pillow: frozenset[int] = frozenset()  # Pillow decodes all images, none of them in place of another library
    _shapes = False

    def __init__(
        self,
        source: Source,
        requests: Iterable[Request],
        *,
        batch: int,
        device: torch.device,
        threads: int,
        prefetch: int,
        size: tuple[int, int],
        channels: int,
        convert: bool = False,
        crop: Crop = "center",
    ):
        self.source, self.device, self.channels = source, device, channels
        self._in_flight: deque[tuple[Request, int]] = deque()
        # One more slot than batches under way: DataLoader gives out the next job before it returns a batch.
        ahead = 1 + -(-prefetch // threads)
        self._slots = shared_array((ahead * threads + 1, batch, channels, *size))
        decoder = BatchDecoder(source, self._slots, convert, self._shapes, crop)
        self._notes: Iterator[Note] | None = start_workers(decoder, self._jobs(iter(requests)), threads, ahead)

    def __next__(self) -> tuple[Request, torch.Tensor]:
        """Return the next batch. Raises BatchFailed if images are corrupt, UserError if they do not fit."""
        if self._notes is None:
            raise StopIteration
        note = next_note(self._notes)
        if note is None:
            self.close()
            raise UserError(
                "data.threads: a process that decodes images ended unexpectedly, perhaps killed for lack of memory; "
                "lower --data.threads or the batch, and go on with --resume"
            )
        request, slot = self._in_flight.popleft()
        if note.crash:
            raise RuntimeError(f"a worker failed at the batch at position {request.position}:\n{note.crash}")
        if note.error:
            raise UserError(note.error)
        if note.corrupt:
            raise BatchFailed(request, note.corrupt)
        if note.wrong:
            raise wrong_channels(self.source, *note.wrong, self.channels)
        return request, self._result(self._slots[slot, : len(request.ids)], note)

    def _result(self, pixels: np.ndarray, note: Note) -> torch.Tensor:
        """Convert a batch, uint8 (b, channels, *size), to float32 in [-1, 1] on the device."""
        # `float` and the pinned copy copy the slot, so it is free when this returns. The factor is DALI's.
        return to_device(pixels, self.device).float().sub_(127.5).mul_(1 / 127.5)

    def close(self) -> None:
        """End the workers. Tensors that were returned stay valid."""
        self._notes = None  # the end of DataLoader's iterator ends its workers
        self._in_flight.clear()

    def _jobs(self, requests: Iterator[Request]) -> Iterator[Job]:
        """Yield the workers' jobs. DataLoader asks for the next one whenever a worker may begin it."""
        for k, request in enumerate(requests):
            slot = k % len(self._slots)
            self._in_flight.append((request, slot))
            yield Job(slot, request.ids, request.flips)


class ShapeReader(ImageReader):
    """Decode images, and return the height, width and channels of their files, int64 (b, 3)."""

    _shapes = True

    def _result(self, pixels: np.ndarray, note: Note) -> np.ndarray:
        return note.shapes


class LatentReader:
    """Iterate over `(request, views)` as pipeline.LatentReader does: views' bytes, uint8 (b, form.view_bytes).

    Threads replace worker processes here, because the work is copying, which numpy does without the interpreter's lock.
    1000 latents of 16 kB take 2 threads 0.02 s of processor time, and 2 DataLoader workers 0.06 s (AMD EPYC).
    """

    def __init__(
        self,
        source: Source,
        requests: Iterable[Request],
        *,
        batch: int,
        device: torch.device,
        threads: int,
        prefetch: int,
    ):
        self._samples, self._requests, self._device = source.samples, iter(requests), device
        self._ahead: deque[tuple[Request, Future]] = deque()
        self._pool = ThreadPoolExecutor(threads, "fastdit-latents")
        for _ in range(prefetch + 1):
            self._submit()

    def __next__(self) -> tuple[Request, torch.Tensor]:
        if not self._ahead:
            raise StopIteration
        request, gathered = self._ahead.popleft()
        self._submit()
        return request, to_device(gathered.result(), self._device)

    def close(self) -> None:
        """End the threads. Tensors that were returned stay valid."""
        self._ahead.clear()
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        """Let a thread gather the next batch, if there is one."""
        if (request := next(self._requests, None)) is not None:
            self._ahead.append((request, self._pool.submit(self._gather, request)))

    def _gather(self, request: Request) -> torch.Tensor:
        """Copy a batch out of the memory maps, into pinned memory if a GPU takes it from there."""
        views = [self._samples.view(i, flip) for i, flip in zip(request.ids.tolist(), request.flips.tolist())]
        gathered = torch.empty(len(views), len(views[0]), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        np.stack(views, out=gathered.numpy())
        return gathered


def shared_array(shape: tuple[int, ...]) -> np.ndarray:
    """Return uint8 memory that forked processes share with this one.

    The memory is no file in /dev/shm, because a container has only 64 MB there by default.
    """
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape, dtype=np.int64))), dtype=np.uint8).reshape(shape)


def start_workers(dataset: BatchDecoder, jobs: Iterator[Job], workers: int, ahead: int) -> Iterator[Note]:
    """Start a DataLoader's workers, which begin at once, and return the iterator over their notes."""
    Image.init()  # loads Pillow's plugins here: after a fork an import may wait for a lock that nobody gives back
    on_child_end = signal.getsignal(signal.SIGCHLD)
    # Workers block these signals (`_start_worker`), and so must threads that libraries start in a fork at once.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about more workers than cores, and about forks beside threads
            notes = iter(
                DataLoader(
                    dataset,
                    sampler=jobs,
                    batch_size=None,
                    num_workers=workers,
                    collate_fn=_unchanged,
                    worker_init_fn=_start_worker,
                    multiprocessing_context=_START_METHOD,
                    prefetch_factor=ahead,
                    generator=torch.Generator(),  # otherwise DataLoader draws a number from torch's global one
                )
            )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # DataLoader's handler raises at a worker's death, even in the middle of a step. `next_note` notices it within 5 s,
    # at a place where it can be reported in one line.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, on_child_end or signal.SIG_DFL)
    return notes


def next_note(notes: Iterator[Note]) -> Note | None:
    """Return the next batch's note, or None if a worker has died. Raises StopIteration at the end."""
    try:
        return next(notes)
    except RuntimeError:  # of DataLoader itself: a BatchDecoder raises nothing
        return None


def _unchanged(note: Note) -> Note:
    """Return `note`: the collate function that DataLoader needs."""
    return note


def _start_worker(_: int) -> None:
    """Prepare a worker process: let it end with its parent, and change its settings."""
    gc.freeze()  # keep the parent's objects: a destructor may join threads that this process lacks
    # Ctrl-C and a launcher's SIGTERM may reach every process while the parent still has a checkpoint to save.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    parent = torch.utils.data.get_worker_info().dataset.parent
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # MOST_PIXELS is checked instead
    ImageFile.LOAD_TRUNCATED_IMAGES = False


def _end_with(parent: int) -> None:
    """End this process when process `parent` asks for it, as Python does when it exits, or has ended."""
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGINT, signal.SIGTERM}, _WATCH_SECONDS)
        if received and received.si_signo == signal.SIGTERM and received.si_pid == parent:
            break
    os._exit(1)
