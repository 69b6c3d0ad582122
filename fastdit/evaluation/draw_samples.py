"""Draw samples from a network. A sample depends on its seed and index, however the work is split.

Samples are drawn in batches of fixed sizes, because the rounding of a matrix product depends on its number of rows. So
a sample is the same to the bit in every batch of one size. See `padded` for the batch that is not full.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from fastdit.config import SampleConfig
from fastdit.errors import UserError
from fastdit.evaluation.grids import grid
from fastdit.models import LatentDecoder
from fastdit.noise.sampling import PerSampleNoise, sample
from fastdit.run_parts import Shape

__all__ = ["BATCH", "balanced_labels", "draw", "grid", "padded", "precision_on", "prepare", "to_uint8"]

# Samples in a batch, by type of device. On a CPU it is small, so that a few samples are quick; larger batches are no
# faster there. It is not 8, because in MKL's AVX2 products of 8, 32 or 200 rows the rounding depends on a row's
# position. In those of 12, 16, 24, 48 or 192 rows it does not. On a GPU the number is large enough to fill it.
BATCH = {"cpu": 12, "cuda": 128}
LEAST = {"cpu": 12, "cuda": 8}  # smallest size to which a batch that is not full is filled up


def balanced_labels(n: int, classes: Sequence[int]) -> np.ndarray:
    """Return n class labels (int64) that cycle through `classes`, so that counts differ by at most one."""
    return np.asarray(classes, dtype=np.int64)[np.arange(n) % len(classes)]


def padded(count: int, batch: int, device: torch.device) -> int:
    """Return the size to which `count` samples, at most `batch`, are filled up: the next of a few fixed sizes.

    The sizes are LEAST times powers of two, and `batch` itself. So a small request does not pay for a full batch. With
    the default batch on a CPU, there is one size only, and a sample never depends on the number of samples.
    """
    size = LEAST[torch.device(device).type]
    while size < count:
        size *= 2
    return min(size, batch)


def precision_on(settings: SampleConfig, device: torch.device) -> str:
    """Return the arithmetic of sampling on `device`: bf16, tf32 or fp32. Raises UserError for tf32 without a GPU."""
    on_gpu = torch.device(device).type == "cuda"
    if settings.precision == "tf32" and not on_gpu:
        raise UserError("sample.precision: tf32 is for GPUs; take fp32 or bf16 on a CPU")
    return settings.precision if settings.precision != "auto" else "bf16" if on_gpu else "fp32"


def prepare(network: torch.nn.Module, settings: SampleConfig, device: torch.device) -> torch.nn.Module:
    """Move a network to `device`, in the dtype that sampling has there, and return it.

    In bf16, the network computes as in training: its weights are bf16, and its residual stream is what `model.stream`
    says. Raises UserError as `precision_on` does.
    """
    precision = precision_on(settings, device)
    return network.to(device, torch.bfloat16 if precision == "bf16" else torch.float32).eval()


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Let GPUs compute fp32 products and convolutions in TF32 within the block, unless `precision` is fp32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision != "fp32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@torch.no_grad()
def draw(
    network: torch.nn.Module,
    process,
    settings: SampleConfig,
    shape: Shape,
    labels: np.ndarray,
    *,
    indices: Sequence[int],
    seed: int,
    device: torch.device,
    decoder: LatentDecoder | None = None,
    progress=None,
    batch: int | None = None,
) -> torch.Tensor:
    """Return the samples `indices` of `network`, float32 (len(indices), C, H, W) on the CPU, about [-1, 1] for images.

    Sample i has the class label labels[i], and its noise depends on (seed, i) alone. A batch that is not full is filled
    up by repetition to one of the sizes of `padded`, and a sample's rounding depends on that size alone.

    network, decoder: on `device`, in eval mode; `prepare` gives the network the dtype of `settings.precision`. With a
    decoder, it returns the decoded images, (len(indices), 3, H, W).
    settings: steps, sampler, guidance, SDE and precision.
    progress: wraps the list of batches, as tqdm does.
    batch: samples in a batch; BATCH of the device by default.
    """
    # Split the indices into batches.
    decode = (lambda x: x) if decoder is None else decoder
    batch = batch or BATCH[torch.device(device).type]
    chunks = [list(indices[at : at + batch]) for at in range(0, len(indices), batch)]
    parts = []

    # Draw and decode each batch.
    for chunk in progress(chunks) if progress else chunks:
        filled = chunk + [chunk[-1]] * (padded(len(chunk), batch, device) - len(chunk))
        source = PerSampleNoise(seed, filled, device)
        with _products(precision_on(settings, device)):
            x = sample(
                process,
                network,
                source((len(filled), shape.channels, shape.height, shape.width)),
                torch.as_tensor(labels[filled], device=device),
                steps=settings.steps,
                sampler=settings.sampler,
                guidance=settings.guidance,
                guidance_interval=settings.interval,
                guided_channels=settings.guided_channels,
                null_label=shape.classes,
                sde=settings.sde,
                draw_noise=source,
            )
            parts.append(decode(x)[: len(chunk)].cpu())
    if not parts:
        parts = [decode(torch.empty(0, shape.channels, shape.height, shape.width, device=device)).cpu()]
    return torch.cat(parts)


def to_uint8(x: torch.Tensor) -> np.ndarray:
    """Return images (n, C, H, W) in [-1, 1] as uint8 (n, H, W, C), clamped and rounded to the nearest level."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
