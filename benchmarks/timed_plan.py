"""Derive what remains of the timed runs' plan from the runs that are finished. Imports neither torch nor DeepSpeed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

BASELINE = "dit"
RATES, CONTENDERS, SECOND_SEED = "rates", "contenders", "second seed"
CHOOSERS = ("FD-lite0", "FD-PCA", "loss")  # the first that all runs in question have decides


@dataclass(frozen=True)
class Planned:
    """One run of the plan. `lr` is None, and `contender` empty, while they depend on runs that are not finished."""

    phase: str
    contender: str
    flags: str
    lr: float | None
    seed: int
    seconds: float
    samples: int

    @property
    def known(self) -> bool:
        return self.lr is not None and bool(self.contender)

    def __str__(self) -> str:
        rate = "the best rate" if self.lr is None else f"lr {self.lr:g}"
        return f"{self.phase}: {self.contender or 'the best other contender'}, {rate}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """Describe what is to be run.

    Args:
        contenders: flags of fastdit/train.py by name; `BASELINE` is among them.
        rates: learning rates that the baseline tries.
        rate_seconds, seconds: training time of a run in the first phase, and in the others.
        rate_samples, samples: likewise, by which a run is judged.
        seeds: the first for the first two phases, each of the others for the baseline and the best other contender.
        settings: all else that a run depends on; a run of other settings is not taken for one of this plan.
    """

    contenders: dict[str, str]
    rates: tuple[float, ...]
    rate_seconds: float
    seconds: float
    rate_samples: int
    samples: int
    seeds: tuple[int, ...]
    settings: dict

    def asked(self, run: Planned) -> dict:
        """Return what identifies a run in the journal."""
        return {**asdict(run), "settings": self.settings}

    def finished(self, lines: Sequence[dict], run: Planned) -> dict | None:
        """Return the journal's line of a finished run."""
        asked = self.asked(run)
        return next((line for line in lines if line["what"] == "run" and line["asked"] == asked), None)

    def ended(self, lines: Sequence[dict], run: Planned) -> dict | None:
        """Return the line of a run that is finished, or that an exception ended: that one is tried again later."""
        asked = self.asked(run)
        failed = (line for line in lines if line["what"] == "run failed" and line["asked"] == asked)
        return self.finished(lines, run) or next(failed, None)

    def runs(self, lines: Sequence[dict]) -> list[Planned]:
        """Return all runs of the plan in their order, as far as the journal's lines decide what they are."""
        first, *others = self.seeds
        rates = [self._run(RATES, BASELINE, lr, first, self.rate_seconds, self.rate_samples) for lr in self.rates]
        lr = self._best([(run.lr, self.ended(lines, run)) for run in rates])
        second = [self._run(CONTENDERS, name, lr, first) for name in self.contenders]
        rivals = [(run.contender, self.ended(lines, run)) for run in second if run.contender != BASELINE]
        best = self._best(rivals) or ""
        names = [BASELINE, best] if rivals else [BASELINE]
        third = [self._run(SECOND_SEED, name, lr, seed) for seed in others for name in names]
        return rates + second + third

    def remaining(self, lines: Sequence[dict]) -> list[Planned]:
        """Return the runs that are not finished."""
        return [run for run in self.runs(lines) if self.finished(lines, run) is None]

    def _run(self, phase: str, name: str, lr: float | None, seed: int, *costs: float) -> Planned:
        seconds, samples = costs or (self.seconds, self.samples)
        return Planned(phase, name, self.contenders.get(name, ""), lr, seed, seconds, samples)

    @staticmethod
    def _best(candidates: list[tuple[object, dict | None]]):
        """Return the choice whose run came out best; None while one of the runs is missing, or when all failed."""
        if not candidates or any(line is None for _, line in candidates):
            return None
        score = chooser([line for _, line in candidates])
        choice, line = min(candidates, key=lambda candidate: score(candidate[1]))
        return choice if score(line) < math.inf else None


def chooser(lines: Sequence[dict]) -> Callable[[dict], float]:
    """Return the score by which runs are compared, lower is better; it is infinite for a run that failed."""
    name = choosing_figure(lines)

    def score(line: dict) -> float:
        if "failed" in line or name is None:
            return math.inf
        value = first_value(line["figures"][name])
        return math.inf if math.isnan(value) else value

    return score


def choosing_figure(lines: Sequence[dict]) -> str | None:
    """Return the figure that decides: the first of CHOOSERS that all runs that did not fail have."""
    whole = [line["figures"] for line in lines if "failed" not in line]
    return next((name for name in CHOOSERS if whole and all(_has(figures, name) for figures in whole)), None)


def _has(figures: dict, name: str) -> bool:
    return name in figures and "skipped" not in figures[name]


def first_value(figure: dict) -> float:
    """Return a figure's value; where it is one of samples, that of the first guidance scale."""
    return figure["value"] if "value" in figure else next(iter(figure.values()))["value"]


def at_edge(rate: float, rates: Sequence[float]) -> bool:
    """Return whether a rate is the lowest or the highest of a sweep, so that a better one may lie beyond."""
    return rate in (min(rates), max(rates))


def count_steps(seconds: float, price: float, fixed: float = 0.0) -> int:
    """Return how many steps a run of `seconds` has when it costs `fixed` seconds and `price` for each step."""
    return max(1, round((seconds - fixed) / price))
