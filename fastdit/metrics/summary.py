"""Summarize sets of images by their features, and compute figures from two summaries.

A `Summary` holds all that the figures need, and is small enough to send to another rank.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdit.metrics.inception_score import ScoreSums, splits_of
from fastdit.metrics.kernel_distance import kernel_distance
from fastdit.metrics.moments import Moments, Total, frechet_distance
from fastdit.metrics.precision_recall import precision_recall

_FOLD = 512  # images that are summarized at a time


@dataclass(frozen=True)
class Output:
    """Hold the output of a feature network for b images, float32.

    Args:
        features: (b, d).
        logits: (b, classes).
        spatial: spatial features (b, s), or None if the network has none.
    """

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None

    def take(self, rows) -> "Output":
        """Return the output for some of the images. `rows` is a slice, a mask or indices."""
        spatial = None if self.spatial is None else self.spatial[rows]
        return Output(self.features[rows], self.logits[rows], spatial)

    @staticmethod
    def cat(parts: list["Output"]) -> "Output":
        """Return the output for the images of all parts, in their order."""
        spatial = None if parts[0].spatial is None else torch.cat([part.spatial for part in parts])
        return Output(torch.cat([p.features for p in parts]), torch.cat([p.logits for p in parts]), spatial)


@dataclass(frozen=True)
class Summary:
    """Summarize images that were seen once each, in any order and split. Unknown parts are None.

    Kernel distance, precision and recall need the features themselves. So the features of the images with ids below a
    bound are kept.

    Args:
        moments: moments of the features.
        spatial: moments of the spatial features.
        scores: sums for the Inception score.
        kept: the features that are kept, float32 (m, d), on the CPU.
        ids: ids of the images that these belong to, int64 (m,).
        radii: `precision_recall.radii` of these features, float64 (m,), for a set that many others are compared with.
    """

    moments: Moments
    spatial: Moments | None = None
    scores: ScoreSums | None = None
    kept: Tensor | None = None
    ids: np.ndarray | None = None
    radii: Tensor | None = None

    @classmethod
    def of(cls, output: Output, ids: np.ndarray, n: int, keep: int) -> "Summary":
        """Return the summary of the images `ids` (b,) int64 of a set of `n`.

        keep: the features of the images with ids below this are kept.
        """
        return cls(
            moments=Moments.of(output.features),
            spatial=None if output.spatial is None else Moments.of(output.spatial),
            scores=ScoreSums.of(output.logits, torch.from_numpy(splits_of(n)[ids]).to(output.logits.device)),
            kept=output.features.cpu()[torch.from_numpy(ids < keep)],
            ids=ids[ids < keep],
        )

    def __add__(self, other: "Summary") -> "Summary":
        """Return the summary of both sets of images together."""
        return Summary(
            moments=self.moments + other.moments,
            spatial=None if self.spatial is None else self.spatial + other.spatial,
            scores=self.scores + other.scores,
            kept=torch.cat([self.kept, other.kept]),
            ids=np.concatenate([self.ids, other.ids]),
        )

    def over_ranks(self, total: Total, gather: Callable[[object], list | None]) -> "Summary":
        """Return the summary of all ranks' images together. Only the first rank gets the features, in order of ids.

        This is a collective. `gather` returns all ranks' objects on the first rank, None elsewhere.
        """
        # Add up moments and sums.
        parts = gather((self.ids, self.kept.numpy()))
        merged = replace(
            self,
            moments=self.moments.over_ranks(total),
            spatial=None if self.spatial is None else self.spatial.over_ranks(total),
            scores=self.scores.over_ranks(total),
        )

        # Sort the gathered features by id.
        if parts is None:
            return replace(merged, kept=None, ids=None)
        ids = np.concatenate([ids for ids, _ in parts])
        order = np.argsort(ids, kind="stable")
        features = torch.from_numpy(np.concatenate([part for _, part in parts])[order])
        return replace(merged, kept=features, ids=ids[order])


class Collector:
    """Summarize a set of `n` images that arrive in batches.

    Moments are computed for a few hundred images at a time, because computing them is the main cost.

    Args:
        n: the number of images of the set.
        keep: the features of the images with ids below this are kept.
    """

    def __init__(self, n: int, keep: int):
        self.n, self.keep = n, keep
        self._outputs: list[Output] = []
        self._ids: list[np.ndarray] = []
        self._summary: Summary | None = None

    def add(self, output: Output, ids: np.ndarray) -> None:
        """Add the images `ids` (b,) int64. Each image must be added once in all; b may be 0."""
        self._outputs.append(output)
        self._ids.append(ids)
        if sum(map(len, self._ids)) >= _FOLD:
            self._fold()

    def summary(self) -> Summary:
        """Return the summary of the images added so far, which must be at least one batch."""
        if self._outputs:
            self._fold()
        return self._summary

    def _fold(self) -> None:
        """Add the waiting outputs to the summary."""
        new = Summary.of(Output.cat(self._outputs), np.concatenate(self._ids), self.n, self.keep)
        self._summary = new if self._summary is None else self._summary + new
        self._outputs, self._ids = [], []


def compare(samples: Summary, real: Summary) -> dict[str, float]:
    """Return every figure that the two summaries allow, by plain names.

    A figure that is a mean of several values has its standard deviation beside it, with the suffix `_std`.
    """
    found = {"frechet": frechet_distance(samples.moments, real.moments)}
    if samples.spatial is not None and real.spatial is not None:
        found["spatial_frechet"] = frechet_distance(samples.spatial, real.spatial)
    if samples.scores is not None:
        found["score"], found["score_std"] = samples.scores.score()
    if samples.kept is not None and real.kept is not None:
        device = samples.moments.mean.device
        x, y = samples.kept.to(device), real.kept.to(device)
        found["kernel"], found["kernel_std"] = kernel_distance(x, y)
        radii = None if real.radii is None else real.radii.to(device)
        found["precision"], found["recall"] = precision_recall(x, y, real_radii=radii)
    return found
