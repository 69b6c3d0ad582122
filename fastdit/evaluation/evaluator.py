"""Figures of a network's samples against real images, the work shared by the ranks; in training and by the command.

    settings -> Evaluator (feature network, reference) -> draw, look at, forget, a batch at a time -> one record

Sample i depends on the seed and i alone, and every rank draws as many batches: figures do not depend on the number
of ranks, and no rank waits for another's.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from fastdit import run_parts
from fastdit.config import Config
from fastdit.data import Source, open_source
from fastdit.distributed import Runtime
from fastdit.errors import UserError
from fastdit.evaluation import draw_samples, reference
from fastdit.evaluation.class_agreement import agreement, known_images
from fastdit.metrics.class_agreement import class_agreement
from fastdit.metrics.feature_nets import feature_net
from fastdit.metrics.summary import Collector, compare
from fastdit.models import LatentDecoder
from fastdit.rundir import eval_log
from fastdit.rundir.metrics_log import versions

KEPT = 50_000  # samples whose features are kept for kernel distance, precision and recall
JUDGED_PIXELS = 3 * 64 * 64  # class agreement compares raw pixels: up to this size
JUDGED_LEAST = 10  # real images, so that either half has five neighbours
JUDGED_HALF = 2_000  # real images that the floor of class agreement takes


class Evaluator:
    """Evaluates networks of one run by `config.eval`, with the sampler of `config.sample`."""

    def __init__(
        self,
        config: Config,
        shape: run_parts.Shape,
        runtime: Runtime,
        *,
        decoder: LatentDecoder | None = None,
        opened: Source | None = None,
        live: bool = True,
    ):
        """Opens all it needs, so that what is missing shows at once. Raises UserError.

        decoder: on the device, where samples are latents. opened: the run's own data, where that is open already.
        live: show progress.
        """
        settings = config.eval
        self.sampled, self.decoder = shape, decoder
        if decoder:  # from here on, what is compared
            factor = decoder.autoencoder.factor
            shape = run_parts.Shape(3, factor * shape.height, factor * shape.width, shape.classes)
            config = replace(config, data=replace(config.data, size=(shape.height, shape.width), channels=3))
        self.config, self.settings, self.shape, self.runtime = config, settings, shape, runtime
        self.batch = draw_samples.BATCH[runtime.device.type]
        self.live = live and runtime.first
        self.data = settings.data or config.data.source
        self.source = None if settings.data else opened
        if self.source is None and not self.data.endswith(".npz"):
            self.source = open_source(self.data, classes=None if settings.data else config.data.classes)
        if shape.channels not in (1, 3) or (self.source and self.source.kind == "latent"):
            missing = "images, or an ADM reference .npz, as data" if decoder else "the autoencoder that decodes them"
            raise UserError(
                f"{self.data if self.source else config.out}: latents cannot be evaluated by themselves; give {missing}"
            )
        self.n_real = self._count_real() if self.source else None
        self.net = feature_net(settings.features, settings.weights, runtime.device)

    def _count_real(self) -> int:
        n = self.settings.n_real or self.source.n
        if not 4 <= n <= self.source.n:
            raise UserError(f"{self.data}: has {self.source.n} images, {n} are asked for (n_real); the least is 4")
        return n

    @cached_property
    def reference(self) -> reference.Reference | None:
        """A collective; None but on rank 0."""
        progress = partial(tqdm, desc="real images", unit="batch", disable=not self.live, leave=False)
        shared = (self.net, self.runtime, self.batch, progress)
        if self.source is None:
            return reference.of_archive(self.data, self.shape, *shared)
        return reference.of_source(self.source, self.config, self.n_real, *shared)

    @cached_property
    def known(self) -> tuple[Tensor, Tensor] | None:
        """Real images and labels for class agreement; None where it cannot be judged."""
        source, pixels = self.source, self.shape.channels * self.shape.height * self.shape.width
        if source is None or source.classes != self.shape.classes or source.n < JUDGED_LEAST or pixels > JUDGED_PIXELS:
            return None
        return known_images(self.config, self.source)

    def __call__(self, network: torch.nn.Module, step: int, checkpoint: str | None = None) -> dict | None:
        """The record of `network`, in eval mode on the device, trained for `step` steps. A collective; None but on
        rank 0. `checkpoint` names where the weights lie, if they do."""
        settings, runtime = self.settings, self.runtime
        real, known = self.reference, self.known
        labels = draw_labels(settings.labels, settings.n, self.shape.classes, settings.seed)
        collected, tally = Collector(settings.n, KEPT), _Tally()
        with tqdm(total=settings.n, desc="samples", unit="img", disable=not self.live, leave=False) as bar:
            for start in range(0, settings.n, self.batch * runtime.world):
                first = start + runtime.rank * self.batch
                ids = np.arange(first, min(first + self.batch, settings.n))
                x = self._draw(network, labels, ids)
                images = draw_samples.to_uint8(x.nan_to_num(0, 1, -1))
                output = self.net(torch.from_numpy(images).permute(0, 3, 1, 2).to(runtime.device))
                collected.add(output.take(slice(len(ids))), ids)
                tally.nonfinite += int((~x[: len(ids)].isfinite()).flatten(1).any(1).sum())
                if known and len(ids):
                    tally.right += round(agreement(images[: len(ids)], labels[ids], known) * len(ids))
                bar.update(min(self.batch * runtime.world, settings.n - start))
        samples = collected.summary().over_ranks(runtime.total, runtime.gather)
        right, nonfinite = map(int, runtime.agree([tally.right, tally.nonfinite], dist.ReduceOp.SUM))
        if not runtime.first:
            return None
        figures = self.net.titled(_paired(compare(samples, real.summary), real.floor))
        if known:
            figures["class agreement"] = {"value": right / settings.n, "floor": _agreement_floor(known)}
        return self._record(figures, step, checkpoint, nonfinite)

    def _draw(self, network: torch.nn.Module, labels: np.ndarray, ids: np.ndarray) -> Tensor:
        """A whole batch, as pixels in [-1, 1]: the samples `ids`, then what fills it up."""
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
        )
        return torch.cat([x, x[-1:].expand(self.batch - len(x), -1, -1, -1)])

    def _record(self, figures: dict, step: int, checkpoint: str | None, nonfinite: int) -> dict:
        config, settings, sample = self.config, self.settings, self.config.sample
        ema = config.ema
        return {
            "step": step,
            "checkpoint": checkpoint,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "figures": figures,
            "n": settings.n,
            "size": [self.shape.height, self.shape.width],
            "real": {"data": self.reference.data, "n": self.reference.n, "floor_n": list(self.reference.floor_n)},
            "features": {"name": self.net.name, "weights": self.net.weights, "resize": self.net.resize},
            "sampling": {
                "sampler": sample.sampler or run_parts.build_noise(config).samplers[0],
                "steps": sample.steps,
                "guidance": sample.guidance,
                "interval": list(sample.interval) if sample.interval else None,
                "guided_channels": sample.guided_channels,
                "labels": settings.labels,
                "seed": settings.seed,
                "ema": f"{ema.kind} {ema.std if ema.kind == 'power' else ema.decay:g}",
            },
            "nonfinite": nonfinite,
            "versions": versions(),
        }


def during_training(session) -> Callable[[int], None]:
    """What evaluates a session's averaged weights at a step, and records the figures. It is a collective.

    Raises UserError at once for what an evaluation would miss.
    """
    run, settings = session.run, session.config.eval
    if session.runtime.first:
        eval_log.forget_after(run.folder, session.first_step)
    if not settings.every:
        return lambda step: None
    live = sys.stderr.isatty()
    shared = {"decoder": session.decoder, "opened": session.source, "live": live}
    evaluator = Evaluator(session.config, session.shape, session.runtime, **shared)

    def evaluate(step: int) -> None:
        record = evaluator(session.averaged_network(), step)
        if record is not None:
            eval_log.append(run.folder, record)
            run.recorder.figures(step, eval_log.scalars(record))
            run.say(eval_log.line(record))

    return evaluate


@dataclass
class _Tally:
    right: int = 0  # samples that the judge finds in the class asked for
    nonfinite: int = 0  # samples that are not all numbers


def draw_labels(kind: str, n: int, classes: int, seed: int) -> np.ndarray:
    """n labels (int64): balanced, or uniform at random; the first m are those of `n = m`."""
    if kind == "balanced":
        return draw_samples.balanced_labels(n, range(classes))
    bits = np.random.Philox(np.random.SeedSequence(seed)).random_raw(n)  # the same in every version of numpy
    return ((bits >> np.uint64(32)) * np.uint64(classes) >> np.uint64(32)).astype(np.int64)


def _paired(values: dict[str, float], floor: dict[str, float]) -> dict[str, dict[str, float]]:
    """Each figure's value, standard deviation and floor, together."""
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
    """Share of one half of the known images that the judge, knowing the other half, finds in their class."""
    images, labels = known
    queries, asked = images[::2][:JUDGED_HALF], labels[::2][:JUDGED_HALF]
    return class_agreement(queries, asked, images[1::2], labels[1::2])
