"""Compare a network's samples, or images made elsewhere, with real images. The ranks share the work.

Samples are drawn a batch at a time, and only their features are kept. Sample i depends on the seed and i, so that
figures do not depend on the number of ranks. Every rank draws the same number of batches, so that none waits long for
another.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fastdit import run_parts
from fastdit.config import Config
from fastdit.data import Source, open_source
from fastdit.data.folders import FOLDERS
from fastdit.distributed import Runtime
from fastdit.errors import UserError
from fastdit.evaluation import draw_samples, reference
from fastdit.evaluation.class_agreement import agreement, known_images
from fastdit.evaluation.given_samples import GivenSamples
from fastdit.metrics.class_agreement import class_agreement
from fastdit.metrics.feature_nets import feature_net
from fastdit.metrics.kernel_distance import SUBSET_SIZE, SUBSETS
from fastdit.metrics.precision_recall import NEIGHBORS
from fastdit.metrics.summary import Collector, compare
from fastdit.models import LatentDecoder
from fastdit.rundir import eval_log
from fastdit.rundir.checkpoint_files import RAW, SAMPLED_EMA
from fastdit.rundir.metrics_log import read_metrics, versions

KEPT = 50_000  # samples, at most, whose features are kept for kernel distance, precision and recall
JUDGED_PIXELS = 3 * 64 * 64  # largest image for class agreement, which compares raw pixels
JUDGED_LEAST = 10  # smallest number of real images, so that either half has five neighbors
JUDGED_HALF = 2_000  # real images, at most, that the floor of class agreement classifies


class Evaluator:
    """Evaluate networks of one run by `config.eval`, with the sampler of `config.sample`."""

    def __init__(
        self,
        config: Config,
        shape: run_parts.Shape,
        runtime: Runtime,
        *,
        decoder: LatentDecoder | None = None,
        opened: Source | None = None,
        live: bool = True,
        batch: int | None = None,
        weights: str = SAMPLED_EMA,
    ):
        """Open the real images and the feature network.

        decoder: decoder of the samples, on the device, if they are latents.
        opened: the run's training data, if it is open already.
        live: whether rank 0 shows progress.
        batch: samples in a batch; by default `draw_samples.BATCH` of the device.
        weights: the name of the weights that are evaluated, for the record.

        Raises UserError if anything that an evaluation needs is missing.
        """
        # Compare what the decoder makes of latents, or the samples themselves.
        settings = config.eval
        self.sampled, self.decoder = shape, decoder
        if decoder:
            factor = decoder.autoencoder.factor
            shape = run_parts.Shape(3, factor * shape.height, factor * shape.width, shape.classes)
            config = replace(config, data=replace(config.data, size=(shape.height, shape.width), channels=3))
        if settings.data:  # images from elsewhere are converted, as in encoding
            config = replace(config, data=replace(config.data, convert=True))
        self.config, self.settings, self.shape, self.runtime = config, settings, shape, runtime
        draw_samples.precision_on(config.sample, runtime.device)  # which checks it
        self.batch = batch or draw_samples.BATCH[runtime.device.type]
        self.live, self.weights = live and runtime.first, weights

        # Open the real images and the feature network.
        self.data = settings.data or config.data.source
        self.source = None if settings.data else opened
        if self.source is None and not self.data.endswith(".npz"):
            self.source = open_source(
                self.data,
                classes=None if settings.data else config.data.classes,
                labels=config.data.labels if config.data.labels in FOLDERS or not settings.data else "auto",
                flat=settings.data is not None,
                image_column=config.data.image_column,
                label_column=config.data.label_column,
            )
        if shape.channels not in (1, 3) or (self.source and self.source.kind == "latent"):
            remedy = "images, or an ADM reference .npz, as data" if decoder else "the autoencoder that decodes them"
            raise UserError(
                f"{self.data if self.source else config.out}: latents cannot be evaluated by themselves; give {remedy}"
            )
        self.n_real = self._count_real() if self.source else None
        self.net = feature_net(settings.features, settings.weights, runtime.device)

    def _count_real(self) -> int:
        """Return the number of real images to compare with. Raises UserError if it is below 4 or the data has fewer."""
        n = self.settings.n_real or self.source.n
        if not 4 <= n <= self.source.n:
            raise UserError(f"{self.data}: has {self.source.n} images, {n} are asked for (n_real); the least is 4")
        return n

    @cached_property
    def reference(self) -> reference.Reference | None:
        """Return the real images' side, on rank 0 only; None elsewhere. Making it is a collective. Raises UserError."""
        shared = (self.net, self.runtime, self.batch, lambda starts: self._shown(starts, "features of real images"))
        if self.source is None:
            return reference.of_archive(self.data, self.shape, *shared)
        return reference.of_source(self.source, self.config, self.n_real, *shared)

    def _shown(self, starts: range, title: str) -> Iterator[int]:
        """Yield the starts of batches of all ranks, and show the images done and the time left. Raises Stopped."""
        with tqdm(total=starts.stop, desc=title, unit="img", disable=not self.live, leave=False) as bar:
            for start in self.runtime.stoppable(starts):
                yield start
                bar.update(min(starts.step, starts.stop - start))

    @cached_property
    def known(self) -> tuple[Tensor, Tensor] | None:
        """Return real images and class labels for class agreement, or None if it cannot be computed.

        It needs a source with the run's classes, more than one, JUDGED_LEAST images, and at most JUDGED_PIXELS numbers
        an image.
        """
        source, pixels = self.source, self.shape.channels * self.shape.height * self.shape.width
        if (
            source is None
            or not 1 < source.classes == self.shape.classes
            or source.n < JUDGED_LEAST
            or pixels > JUDGED_PIXELS
        ):
            return None
        return known_images(self.config, self.source)

    def __call__(self, network: torch.nn.Module, step: int, checkpoint: str | None = None) -> dict | None:
        """Return the record of `network` on rank 0, and None elsewhere. A collective.

        network: in eval mode, on the device.
        step: the number of steps that it was trained for.
        checkpoint: folder of the checkpoint that it comes from, if any.
        """
        settings = self.settings
        network = draw_samples.prepare(network, self.config.sample, self.runtime.device)
        labels = draw_labels(settings.labels, settings.n, self.shape.classes, settings.seed)
        figures, nonfinite = self._compare(lambda ids: self._draw(network, labels, ids), settings.n, labels)
        return self._record(figures, step, checkpoint, nonfinite) if self.runtime.first else None

    def judge(self, samples: GivenSamples) -> dict | None:
        """Return the record of images made elsewhere on rank 0, and None elsewhere. A collective. Raises UserError."""

        def read(ids: np.ndarray) -> tuple[np.ndarray, int]:
            return samples.read(ids if len(ids) else np.zeros(1, np.int64)), 0

        same = self.source is not None and samples.class_names and samples.class_names == self.source.class_names
        figures, _ = self._compare(read, samples.n, samples.labels if same else None)
        if not self.runtime.first:
            return None
        record = self._record(figures, 0, samples.path, 0)
        return record | {"n": samples.n, "sampling": None}

    def _compare(
        self, read: Callable[[np.ndarray], tuple[np.ndarray, int]], n: int, labels: np.ndarray | None
    ) -> tuple[dict, int]:
        """Return the figures of n samples (rank 0; {} elsewhere), and how many are not finite. A collective.

        read: returns the samples of some ids, uint8 (b, H, W, C), and how many of them are not finite. Where this rank
            has none in a turn, it returns one, which is not counted.
        labels: the class labels that the samples were drawn for (n,), or None if there is no class agreement.
        """
        # Open the real side.
        runtime = self.runtime
        real, known = self.reference, self.known if labels is not None else None

        # Read samples a batch at a time, and keep their features.
        collected, tally = Collector(n, KEPT), _Tally()
        for start in self._shown(range(0, n, self.batch * runtime.world), "samples"):
            first = start + runtime.rank * self.batch
            ids = np.arange(first, min(first + self.batch, n))
            images, nonfinite = read(ids)
            # The network sees full batches, so that features do not depend on the number of samples.
            filled = torch.from_numpy(images).permute(0, 3, 1, 2)
            filled = torch.cat([filled, filled[-1:].expand(self.batch - len(filled), -1, -1, -1)])
            collected.add(self.net(filled.to(runtime.device)).take(slice(len(ids))), ids)
            if len(ids):
                tally.nonfinite += nonfinite
                if known:
                    tally.agreeing += round(agreement(images, labels[ids], known) * len(ids))

        # Combine the ranks' parts, and compare with the real images.
        samples = collected.summary().over_ranks(runtime.total, runtime.gather)
        agreeing, nonfinite = map(int, runtime.agree([tally.agreeing, tally.nonfinite], dist.ReduceOp.SUM))
        if not runtime.first:
            return {}, nonfinite
        figures = self.net.titled(_paired(compare(samples, real.summary), real.floor))
        if known:
            figures["class agreement"] = {"value": agreeing / n, "floor": _agreement_floor(known)}
        return figures, nonfinite

    def _draw(self, network: torch.nn.Module, labels: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Return the samples `ids`, or the first one if there are none, and how many of them are not finite."""
        x = draw_samples.draw(
            network,
            run_parts.build_noise(self.config),
            self.config.sample,
            self.sampled,
            labels,
            indices=ids if len(ids) else [0],
            seed=self.settings.seed,
            device=self.runtime.device,
            decoder=self.decoder,
            batch=self.batch,
        )
        nonfinite = int((~x.isfinite()).flatten(1).any(1).sum())
        return draw_samples.to_uint8(x.nan_to_num(0, 1, -1)), nonfinite

    def _record(self, figures: dict, step: int, checkpoint: str | None, nonfinite: int) -> dict:
        """Return the record of an evaluation: its figures, and the conditions that they depend on."""
        settings, sample = self.settings, self.config.sample
        return {
            "step": step,
            "checkpoint": checkpoint,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "figures": figures,
            "n": settings.n,
            "size": [self.shape.height, self.shape.width],
            "real": self._describe_real(),
            "features": {"name": self.net.name, "weights": self.net.weights, "resize": self.net.resize},
            "sampling": {
                "sampler": sample.describe_sampler(run_parts.build_noise(self.config)),
                "steps": sample.steps,
                "guidance": sample.guidance,
                "interval": list(sample.interval) if sample.interval else None,
                "guided_channels": sample.guided_channels,
                "labels": settings.labels,
                "seed": settings.seed,
                "ema": "none (raw weights)" if self.weights == RAW else self._describe_ema(),
                "precision": draw_samples.precision_on(sample, self.runtime.device),
            },
            "nonfinite": nonfinite,
            "protocol": f"KID is the mean over {SUBSETS} subsets of at most {SUBSET_SIZE:,}; precision and recall have "
            f"k = {NEIGHBORS}; both see at most {KEPT:,} samples and {reference.KEPT:,} real images",
            "versions": versions(),
        }

    def _describe_ema(self) -> str:
        """Return the law of the EMA that is evaluated, or its name if it is not the one that `ema` describes."""
        ema = self.config.ema
        law = f"{ema.kind} {ema.std if ema.kind == 'power' else ema.decay:g}"
        return law if self.weights == SAMPLED_EMA else self.weights

    def _describe_real(self) -> dict:
        """Return what the real images are; their crop only if they were cropped here."""
        real = {"data": self.reference.data, "n": self.reference.n, "floor_n": list(self.reference.floor_n)}
        return real | ({"crop": self.config.data.crop} if self.source else {})


def during_training(session) -> Callable[[int], None]:
    """Return a function that evaluates a session's EMA weights at a step and writes the figures. It is a collective.

    Raises UserError at once if anything that an evaluation needs is missing.
    """
    # Remove the evaluations that a resumed run repeats, and open what an evaluation needs.
    run, settings = session.run, session.config.eval
    if session.runtime.first and not session.config.dry_run:
        eval_log.truncate_after(run.folder, session.first_step)
        _complete_metrics(run, session.first_step)
    draw_samples.precision_on(session.config.sample, session.runtime.device)  # grids need it, too
    if not settings.every:
        return lambda step: None
    live = sys.stderr.isatty()
    shared = {"decoder": session.decoder, "opened": session.source, "live": live}
    evaluator = Evaluator(session.config, session.shape, session.runtime, **shared)

    def evaluate(step: int) -> None:
        """Evaluate the EMA weights after `step` steps."""
        record = evaluator(session.ema_network(), step)
        if record is not None:
            eval_log.append(run.folder, record)
            run.recorder.figures(step, eval_log.scalars(record))
            run.say(eval_log.line(record))

    return evaluate


def _complete_metrics(run, step: int) -> None:
    """Write the figures of the evaluation after `step` steps to the metrics, if the process ended before it had."""
    record = eval_log.find(run.folder, step)
    if record is not None:
        figures = eval_log.scalars(record)
        if not any(line["step"] == step and figures.keys() <= line.keys() for line in read_metrics(run.folder)):
            run.recorder.figures(step, figures)


@dataclass
class _Tally:
    """Count this rank's samples by two properties."""

    agreeing: int = 0  # samples that the classifier assigns to their class label
    nonfinite: int = 0  # samples with a NaN or an infinity


def draw_labels(kind: str, n: int, classes: int, seed: int) -> np.ndarray:
    """Return n class labels (int64), balanced or uniform at random. The first m are those of `n = m`."""
    if kind == "balanced":
        return draw_samples.balanced_labels(n, range(classes))
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(n)  # the same in every version of numpy
    return ((bits >> np.uint64(32)) * np.uint64(classes) >> np.uint64(32)).astype(np.int64)


def _paired(values: dict[str, float], floor: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return each figure with its value, and its standard deviation and floor if they exist."""
    return {
        key: {
            "value": value,
            **({"std": values[f"{key}_std"]} if f"{key}_std" in values else {}),
            **({"floor": floor[key]} if key in floor else {}),
        }
        for key, value in values.items()
        if not key.endswith("_std")
    }


def _agreement_floor(known: tuple[Tensor, Tensor]) -> float:
    """Return the class agreement of one half of the known images, if the classifier is fitted on the other half."""
    images, labels = known
    queries, query_labels = images[::2][:JUDGED_HALF], labels[::2][:JUDGED_HALF]
    return class_agreement(queries, query_labels, images[1::2], labels[1::2])
