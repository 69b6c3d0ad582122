"""All that the figures need of a set of images, small enough to send: `Summary`; and the figures of two: `compare`."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdit.metrics.inception_score import ScoreSums, splits_of
from fastdit.metrics.kernel_distance import kernel_distance
from fastdit.metrics.manifolds import precision_recall
from fastdit.metrics.moments import Moments, Total, frechet_distance

_FOLD = 512  # images


@dataclass(frozen=True)
class Output:
    """What a feature network says of b images: `features` (b, d), `logits` (b, classes) and, where it has them, the
    `spatial` features (b, s). float32."""

    features: Tensor
    logits: Tensor
    spatial: Tensor | None = None

    def take(self, rows) -> "Output":
        """Of some of the images: `rows` is a slice or a mask."""
        spatial = None if self.spatial is None else self.spatial[rows]
        return Output(self.features[rows], self.logits[rows], spatial)

    @staticmethod
    def cat(parts: list["Output"]) -> "Output":
        spatial = None if parts[0].spatial is None else torch.cat([part.spatial for part in parts])
        return Output(torch.cat([p.features for p in parts]), torch.cat([p.logits for p in parts]), spatial)


@dataclass(frozen=True)
class Summary:
    """Of images seen once each, in any order and split. What is not known is None.

    `kept` are features (m, d) float32 on the CPU, and `ids` (m,) the numbers of their images: kernel distance,
    precision and recall need features themselves, so of the images numbered below a bound they are kept.
    """

    moments: Moments
    spatial: Moments | None = None
    scores: ScoreSums | None = None
    kept: Tensor | None = None
    ids: np.ndarray | None = None

    @classmethod
    def of(cls, output: Output, ids: np.ndarray, n: int, keep: int) -> "Summary":
        """Of the images `ids` (b,) int64 out of a set of `n`, of which the first `keep` keep their features."""
        return cls(
            moments=Moments.of(output.features),
            spatial=None if output.spatial is None else Moments.of(output.spatial),
            scores=ScoreSums.of(output.logits, torch.from_numpy(splits_of(n)[ids]).to(output.logits.device)),
            kept=output.features.cpu()[torch.from_numpy(ids < keep)],
            ids=ids[ids < keep],
        )

    def __add__(self, other: "Summary") -> "Summary":
        """Of both sets of images together."""
        return Summary(
            moments=self.moments + other.moments,
            spatial=None if self.spatial is None else self.spatial + other.spatial,
            scores=self.scores + other.scores,
            kept=torch.cat([self.kept, other.kept]),
            ids=np.concatenate([self.ids, other.ids]),
        )

    def over_ranks(self, total: Total, gather: Callable[[object], list | None]) -> "Summary":
        """Of every rank's images together; the kept features, by the numbers of their images, on the first rank only.

        A collective. `gather` returns every rank's object on the first rank, None elsewhere.
        """
        parts = gather((self.ids, self.kept.numpy()))
        merged = replace(
            self,
            moments=self.moments.over_ranks(total),
            spatial=None if self.spatial is None else self.spatial.over_ranks(total),
            scores=self.scores.over_ranks(total),
        )
        if parts is None:
            return replace(merged, kept=None, ids=None)
        ids = np.concatenate([ids for ids, _ in parts])
        order = np.argsort(ids, kind="stable")
        kept = torch.from_numpy(np.concatenate([kept for _, kept in parts])[order])
        return replace(merged, kept=kept, ids=ids[order])


class Collector:
    """Makes the summary of a set of `n` images out of batches, a few hundred at a time: that is what costs."""

    def __init__(self, n: int, keep: int):
        self.n, self.keep = n, keep
        self._outputs: list[Output] = []
        self._ids: list[np.ndarray] = []
        self._summary: Summary | None = None

    def add(self, output: Output, ids: np.ndarray) -> None:
        """The images `ids` (b,) int64, each of them once in all; b may be 0."""
        self._outputs.append(output)
        self._ids.append(ids)
        if sum(map(len, self._ids)) >= _FOLD:
            self._fold()

    def summary(self) -> Summary:
        """Of what was added so far, at least one batch."""
        if self._outputs:
            self._fold()
        return self._summary

    def _fold(self) -> None:
        new = Summary.of(Output.cat(self._outputs), np.concatenate(self._ids), self.n, self.keep)
        self._summary = new if self._summary is None else self._summary + new
        self._outputs, self._ids = [], []


def compare(samples: Summary, real: Summary) -> dict[str, float]:
    """Every figure that the two summaries allow, by plain names; `_std` beside those that are means of several."""
    found = {"frechet": frechet_distance(samples.moments, real.moments)}
    if samples.spatial is not None and real.spatial is not None:
        found["spatial_frechet"] = frechet_distance(samples.spatial, real.spatial)
    if samples.scores is not None:
        found["score"], found["score_std"] = samples.scores.score()
    if samples.kept is not None and real.kept is not None:
        device = samples.moments.mean.device
        x, y = samples.kept.to(device), real.kept.to(device)
        found["kernel"], found["kernel_std"] = kernel_distance(x, y)
        found["precision"], found["recall"] = precision_recall(x, y)
    return found
