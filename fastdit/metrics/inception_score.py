"""Compute the Inception score (Salimans et al. 2016) from sums, so that no class probabilities are kept."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fastdit.metrics.moments import Total

SPLITS = 10


@lru_cache(maxsize=4)
def splits_of(n: int, splits: int = SPLITS, seed: int = 2020) -> np.ndarray:
    """Return the split that each of `n` samples belongs to, int64 (n,), shuffled and cut as in torch-fidelity."""
    splits = min(splits, n)
    borders = np.arange(splits + 1) * n // splits
    found = np.empty(n, np.int64)
    found[np.random.RandomState(seed).permutation(n)] = np.repeat(np.arange(splits), np.diff(borders))
    found.flags.writeable = False
    return found


@dataclass(frozen=True)
class ScoreSums:
    """Hold sums over the samples of each split, float64.

    Args:
        counts: numbers of samples, (splits,).
        p: sums of the class probabilities p, (splits, c).
        p_log_p: sums of p log p over samples and classes, (splits,).
    """

    counts: Tensor
    p: Tensor
    p_log_p: Tensor

    @classmethod
    def of(cls, logits: Tensor, split: Tensor) -> "ScoreSums":
        """Return the sums for logits (b, c) of samples that belong to the splits `split` (b,) int64."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        member = torch.nn.functional.one_hot(split, SPLITS).double().T
        return cls(member.sum(1), member @ p, member @ (p * log_p).sum(1))

    def __add__(self, other: "ScoreSums") -> "ScoreSums":
        return ScoreSums(self.counts + other.counts, self.p + other.p, self.p_log_p + other.p_log_p)

    def over_ranks(self, total: Total) -> "ScoreSums":
        """Return the sums over the samples of all ranks. This is a collective."""
        return ScoreSums(total(self.counts), total(self.p), total(self.p_log_p))

    def score(self) -> tuple[float, float]:
        """Return mean and standard deviation over the splits of exp(mean KL(p || mean p)), which is at least 1."""
        used = self.counts > 0
        counts = self.counts[used]
        marginal = self.p[used] / counts[:, None]
        scores = (self.p_log_p[used] / counts + torch.special.entr(marginal).sum(1)).exp()
        return scores.mean().item(), scores.std(correction=0).item()
