"""Prepare batches with DALI pipelines, in the order that order.py defines.

    images    encoded bytes -> decode -> resize -> center crop -> mirror -> float32 CHW in [-1, 1]
    latents   a stored view's bytes -> the device, which unpacks them

DALI's threads read the pages of the memory maps while the training step runs. They also decode, unless a GPU does. The
same graphs run on a machine without a GPU.

Pillow decodes very long images and those that DALI's decoder refuses (GIF, AVIF, some WebP). They enter as PNM files,
so that DALI scales and mirrors all images alike.
"""

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import lru_cache

import numpy as np
import nvidia.nvimgcodec as nvimgcodec
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from fastdit.data.image_rules import MOST_ELONGATED, MOST_PIXELS, wrong_channels
from fastdit.data.order import BatchFailed, Request
from fastdit.data.pillow_images import to_pnm
from fastdit.data.sources import Source

log = logging.getLogger(__name__)
_HAS_EXIF = 0x08  # flag of a WebP file
_PIXEL = np.frombuffer(b"P5 1 1 255\n\0", dtype=np.uint8)  # a whole image


class DaliReader:
    """Iterate over `(request, tensor)` in the order of `requests`, and prepare `prefetch` batches ahead.

    Raises BatchFailed at the turn of a batch that DALI could not prepare.
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
        self.source, self.device = source, device
        self._requests = iter(requests)
        # DALI gets views of memory maps, not copies. These references keep the inputs in flight alive.
        self._in_flight: deque[tuple[Request, tuple]] = deque()
        self._latest: tuple[Request, tuple] | None = None
        self._unfit: set[int] = set()  # positions of requests that fail, though DALI gets stand-ins for them

        # Build the pipeline.
        self._pipe = Pipeline(
            batch_size=batch,
            num_threads=threads,
            device_id=None if device.type == "cpu" else device.index,
            prefetch_queue_depth=prefetch + 1,
            exec_dynamic=True,  # outputs own their memory, so torch may keep them without a copy
        )
        with self._pipe:
            self._pipe.set_outputs(*self._graph())
        self._pipe.build()

    def __next__(self) -> tuple[Request, torch.Tensor]:
        # The host need not wait for outputs that are bound to torch's stream.
        stream = None if self.device.type == "cpu" else torch.cuda.current_stream(self.device)
        try:
            outputs = self._pipe.run(stream)
        except RuntimeError as error:
            if not self._in_flight:
                raise
            raise BatchFailed(self._in_flight.popleft()[0]) from error
        self._latest = self._in_flight.popleft()  # its inputs must outlive the work that the GPU may still have queued
        request, _ = self._latest
        if request.position in self._unfit:
            raise BatchFailed(request)
        return request, self._tensor(request, *outputs)

    def close(self) -> None:
        """Stop DALI's threads. Tensors that were returned stay valid."""
        del self._pipe
        self._in_flight.clear()
        self._latest = None

    def _feed(self) -> tuple:
        """Return the inputs of the next request. DALI calls this ahead of `__next__`."""
        request = next(self._requests)
        inputs = self._inputs(request)
        self._in_flight.append((request, inputs))
        return inputs

    def _graph(self) -> tuple[DataNode, ...]:
        """Build the DALI graph on `self._feed` and return its outputs."""
        raise NotImplementedError

    def _inputs(self, request: Request) -> tuple:
        """Return the inputs that DALI gets for `request`."""
        raise NotImplementedError

    def _tensor(self, request: Request, *outputs) -> torch.Tensor:
        """Return DALI's outputs for `request` as one torch tensor, without a copy."""
        raise NotImplementedError


class ImageReader(DaliReader):
    """Read image files as float32 (b, channels, *size) in [-1, 1].

    The image is scaled until it just covers `size`, and its center is cut out. The filter is cubic with antialiasing,
    extents are rounded to whole pixels, and values to 8 bits. That is Pillow's bicubic filter, except that the edge is
    repeated beyond the border. EXIF orientation is applied. A palette image counts as RGB. An image of more than 2^28
    pixels counts as corrupt. One that is over 64 times as long as wide is cut to its middle before it is scaled.

    convert: convert an image with other than `channels` channels: repeat gray, make color gray, drop transparency.
        Without `convert` such an image raises UserError.
    """

    def __init__(
        self,
        source: Source,
        requests: Iterable[Request],
        *,
        size: tuple[int, int],
        channels: int,
        convert: bool = False,
        **options,
    ):
        self.size, self.channels, self.convert = size, channels, convert
        self.by_pillow: set[int] = set()  # ids of the images that Pillow decodes, because DALI does not
        self._options = {"size": size, "channels": channels, "convert": convert, **options}
        self._shapes: dict[int, dict[int, tuple[int, int, int]]] = {}  # of those images, by position and place
        self._pool: ThreadPoolExecutor | None = None
        super().__init__(source, requests, **options)

    def __next__(self) -> tuple[Request, torch.Tensor]:
        try:
            return super().__next__()
        except BatchFailed as failure:
            return self._retry(failure)

    def close(self) -> None:
        super().close()
        if self._pool:
            self._pool.shutdown()

    def _retry(self, failure: BatchFailed) -> tuple[Request, torch.Tensor]:
        """Return the failed batch, with Pillow's pixels of the images that DALI refuses.

        Raises the failure if DALI refuses none of them, and BatchFailed with the ids that Pillow refuses too.
        """
        request = failure.request
        refused = _refused(self.source, request.ids, self._options)
        if not refused:
            raise failure
        decoded = self._decode([self.source.read(i) for i in refused])
        corrupt = [i for i, pixels in zip(refused, decoded) if pixels is None]
        self.by_pillow.update(set(refused) - set(corrupt))
        if corrupt:
            raise BatchFailed(request, corrupt) from failure
        options = {**self._options, "batch": len(request.ids), "prefetch": 0}
        with closing(type(self)(self.source, [], **options)) as again:
            again.by_pillow, again._requests = self.by_pillow, iter([request])
            return DaliReader.__next__(again)

    def _decode(self, files: Sequence[np.ndarray]) -> list[tuple[np.ndarray, tuple[int, int, int]] | None]:
        """Return Pillow's `to_pnm` of each file, or None for a file that it cannot decode. Threads share the files."""
        _tell_once(self.source.path)
        Image.MAX_IMAGE_PIXELS = None  # MOST_PIXELS is checked instead
        self._pool = self._pool or ThreadPoolExecutor(self._options["threads"], "fastdit-pillow")
        return list(self._pool.map(_to_pnm, files))

    def _graph(self) -> tuple[DataNode, ...]:
        # Decode.
        encoded, mirror = fn.external_source(
            self._feed, num_outputs=2, batch=True, no_copy=True, dtype=[types.UINT8, types.INT32], ndim=[1, 0]
        )
        image = fn.decoders.image(
            encoded,
            device="cpu" if self.device.type == "cpu" else "mixed",
            output_type=types.GRAY if self.channels == 1 else types.RGB,
            jpeg_fancy_upsampling=True,  # as the CPU decoder always does
        )

        # Scale to cover, crop the center, mirror and normalize.
        covering = fn.resize(
            image,
            mode="not_smaller",
            size=self.size,
            interp_type=types.INTERP_CUBIC,
            antialias=True,
            subpixel_scale=False,
        )
        x = fn.crop_mirror_normalize(
            covering,
            crop=self.size,
            rounding="truncate",
            mirror=mirror,
            mean=127.5,
            std=127.5,
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        return x, fn.peek_image_shape(encoded, image_type=types.ANY_DATA)

    def _inputs(self, request: Request) -> tuple:
        ids = request.ids.tolist()
        images = [self.source.read(i) for i in ids]
        # DALI 2.4 crashes on an image that does not parse in a batch of 32 or more.
        places = [k for k, image in enumerate(images) if ids[k] in self.by_pillow or not _parses(image)]
        if places:
            decoded = self._decode([images[k] for k in places])
            if None in decoded:
                self._unfit.add(request.position)
                images = [_PIXEL] * len(images)
            else:
                self.by_pillow.update(ids[k] for k in places)
                self._shapes[request.position] = {k: shape for k, (_, shape) in zip(places, decoded)}
                for k, (pnm, _) in zip(places, decoded):
                    images[k] = pnm
        return images, request.flips.astype(np.int32)

    def _file_shapes(self, request: Request, shapes) -> np.ndarray:
        """Return the height, width and channels of the batch's files, int64 (b, 3)."""
        found = np.array(shapes.as_array())
        for k, shape in self._shapes.pop(request.position, {}).items():
            found[k] = shape
        return found

    def _tensor(self, request: Request, images, shapes) -> torch.Tensor:
        channels = self._file_shapes(request, shapes)[:, 2]
        wrong = np.flatnonzero(channels != self.channels)
        if len(wrong) and not self.convert:
            raise wrong_channels(self.source, request.ids[wrong[0]], int(channels[wrong[0]]), self.channels)
        return torch.from_dlpack(images.as_tensor())


def _parses(image: np.ndarray) -> bool:
    """Return whether the decoder's library finds an image's kind and extents, which takes a few microseconds.

    An image that is too large or too long for DALI's graph counts as one that does not parse.
    """
    # For these the library prints errors, or takes a padding byte of WebP for a chunk.
    head = image[:21].tobytes()
    if head[:4] == b"GIF8" or head[4:12] in (b"ftypavif", b"ftypavis"):
        return False
    if head[8:16] == b"WEBPVP8X" and head[20] & _HAS_EXIF and _has_padding(image):
        return False
    try:
        found = nvimgcodec.CodeStream(image)
        short, long = sorted((found.height, found.width))
        return short * long <= MOST_PIXELS and long <= MOST_ELONGATED * short
    except RuntimeError:
        return False


def _has_padding(image: np.ndarray) -> bool:
    """Return whether a chunk of a WebP file has an odd length, so that a padding byte follows it."""
    at = 12
    while at + 8 <= len(image):
        length = int.from_bytes(image[at + 4 : at + 8].tobytes(), "little")
        if length % 2:
            return True
        at += 8 + length
    return False


def _to_pnm(file: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]] | None:
    """Return Pillow's `to_pnm` of a file, or None if Pillow cannot decode it."""
    try:
        return to_pnm(file)
    except MemoryError:
        raise
    except Exception:  # a damaged file makes Pillow's parsers fail in many ways
        return None


@lru_cache
def _tell_once(path: str) -> None:
    """Tell, once a source, that DALI does not decode all of its images."""
    log.warning("%s: has images that NVIDIA DALI does not decode, or very long ones; Pillow is tried on them", path)


class ShapeReader(ImageReader):
    """Decode images, and return the height, width and channels of their files, int64 (b, 3)."""

    def _tensor(self, request: Request, images, shapes) -> np.ndarray:
        return self._file_shapes(request, shapes)


class LatentReader(DaliReader):
    """Read latents as views' bytes, uint8 (b, form.view_bytes); a flip takes the mirrored image's view."""

    def _graph(self) -> tuple[DataNode, ...]:
        (views,) = fn.external_source(
            self._feed, num_outputs=1, batch=True, no_copy=True, dtype=[types.UINT8], ndim=[1]
        )
        return (fn.copy(views.gpu() if self.device.type == "cuda" else views),)

    def _inputs(self, request: Request) -> tuple:
        samples = self.source.samples
        return ([samples.view(i, flip) for i, flip in zip(request.ids.tolist(), request.flips.tolist())],)

    def _tensor(self, request: Request, views) -> torch.Tensor:
        return torch.from_dlpack(views.as_tensor())


def _refused(source: Source, ids: np.ndarray, options: dict) -> list[int]:
    """Return those of `ids` (k,) that DALI cannot decode, tried one by one. `options` are those of ImageReader."""
    refused = np.array([not _parses(source.read(i)) for i in ids.tolist()])
    singles = [Request(k, ids[k : k + 1], np.zeros(1, dtype=bool)) for k in np.flatnonzero(~refused).tolist()]
    with closing(ImageReader(source, singles, **options | {"batch": 1, "threads": 1, "prefetch": 0})) as probe:
        for request in singles:
            try:
                DaliReader.__next__(probe)
            except BatchFailed:
                refused[request.position] = True
    return ids[refused].tolist()
