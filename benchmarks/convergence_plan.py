"""Derive what remains of a comparison from the runs that are finished. Imports neither torch nor DeepSpeed."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

BASELINE = "dit"
RATES, CONTENDERS, EQUAL_STEPS = "rates", "contenders", "equal steps"
CHOOSERS = ("FD-lite0", "FD-PCA", "loss")  # the first that all runs in question have decides


@dataclass(frozen=True)
class Planned:
    """One run of the plan. `lr` is None, and `contender` empty, while they depend on runs that are not finished.

    The budget is training time, in seconds or in steps of plain DiT (`Plan.settings["unit"]`).
    """

    phase: str
    contender: str
    flags: str
    lr: float | None
    seed: int
    budget: float
    samples: int

    @property
    def known(self) -> bool:
        return self.lr is not None and bool(self.contender)

    def __str__(self) -> str:
        rate = "the best rate" if self.lr is None else f"lr {self.lr:g}"
        return f"{self.phase}: {self.contender or 'one of the best others'}, {rate}, seed {self.seed}"


@dataclass(frozen=True)
class Plan:
    """Describe what is to be run.

    1. Plain DiT tries `rates`. While the best of them lies at an edge, the next one beyond is tried, `extend` times.
    2. Each other contender tries `contender_rates` rates, the middle one plain DiT's best, and extends them likewise.
       With 1 it takes plain DiT's best. A contender whose flags name a rate has that one.
    3. Plain DiT and all others run at their best rates with the first seed; with each other seed plain DiT and the
       `finalists` best others.
    4. With the first `equal_steps` seeds all others run for as many steps as plain DiT.

    Args:
        contenders: flags of fastdit/train.py by name; `BASELINE` is among them.
        rate_budget, budget: training time of a run in the first two steps, and in the others.
        rate_samples, samples: likewise, the samples by which a run is judged.
        settings: all else that a run depends on; a run of other settings is not taken for one of this plan.
    """

    contenders: dict[str, str]
    rates: tuple[float, ...]
    rate_budget: float
    budget: float
    rate_samples: int
    samples: int
    seeds: tuple[int, ...]
    settings: dict
    contender_rates: int = 1
    extend: int = 0
    finalists: int = 1
    equal_steps: int = 0

    def asked(self, run: Planned) -> dict:
        """Return what identifies a run in the journal."""
        return {**asdict(run), "settings": self.settings}

    def asked_price(self, contender: str) -> dict:
        """Return what identifies a contender's price in the journal."""
        return {"contender": contender, "flags": self.contenders[contender], "settings": self.settings}

    def price(self, lines: Sequence[dict], contender: str) -> dict | None:
        """Return the journal's line of a contender's price."""
        asked = self.asked_price(contender)
        return next((line for line in lines if line["what"] == "price" and line["asked"] == asked), None)

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
        first, *other_seeds = self.seeds
        others = [name for name in self.contenders if name != BASELINE]

        # Learning rates: plain DiT's sweep, then the others' around its best.
        runs, best = self._sweep(lines, BASELINE, self.rates)
        tried = [run.lr for run in runs if run.lr is not None]
        chosen = {BASELINE: best}
        for name in others:
            own = own_rate(self.contenders[name])
            if own is not None or self.contender_rates == 1:
                chosen[name] = best if own is None else own
                continue
            around = rates_around(best, tried, self.contender_rates) if best is not None else (None,)
            swept, chosen[name] = self._sweep(lines, name, around, otherwise=best)
            runs += swept

        # Equal time: all with the first seed, the best with the others.
        firsts = [self._run(CONTENDERS, name, chosen[name], first) for name in self.contenders]
        rivals = [(run.contender, self.ended(lines, run)) for run in firsts if run.contender != BASELINE]
        names = [BASELINE, *self._best(rivals, min(self.finalists, len(rivals)))]
        runs += firsts
        runs += [self._run(CONTENDERS, name, chosen.get(name), seed) for seed in other_seeds for name in names]

        # Equal steps.
        steps = [(name, seed) for seed in self.seeds[: self.equal_steps] for name in others]
        return runs + [self._run(EQUAL_STEPS, name, chosen[name], seed) for name, seed in steps]

    def remaining(self, lines: Sequence[dict]) -> list[Planned]:
        """Return the runs that are not finished."""
        return [run for run in self.runs(lines) if self.finished(lines, run) is None]

    def _sweep(
        self, lines: Sequence[dict], name: str, rates: Sequence[float | None], otherwise: float | None = None
    ) -> tuple[list[Planned], float | None]:
        """Return a contender's runs of the first phase, and the best rate; None while it is not known.

        If all runs failed, the best rate is `otherwise`.
        """
        rates = list(rates)
        while True:
            runs = [self._run(RATES, name, lr, self.seeds[0]) for lr in rates]
            ended = [(run.lr, self.ended(lines, run)) for run in runs]
            best = self._best(ended, 1)[0] or None
            if best is None:
                return runs, otherwise if all(line for _, line in ended) else None
            if len(rates) < 2 or len(rates) >= self._most_rates(name) or not at_edge(best, rates):
                return runs, best
            rates.append(next_beyond(best, rates))

    def _most_rates(self, name: str) -> int:
        return (len(self.rates) if name == BASELINE else self.contender_rates) + self.extend

    def _run(self, phase: str, name: str, lr: float | None, seed: int) -> Planned:
        costs = (self.rate_budget, self.rate_samples) if phase == RATES else (self.budget, self.samples)
        return Planned(phase, name, self.contenders.get(name, ""), lr, seed, *costs)

    @staticmethod
    def _best(candidates: list[tuple[object, dict | None]], count: int) -> list:
        """Return the `count` choices whose runs came out best; empty strings while one of all the runs is missing.

        Where fewer than `count` did not fail, the others are left out, but for one empty string if all failed.
        """
        if not candidates:
            return []
        if any(line is None for _, line in candidates):
            return [""] * count
        score = chooser([line for _, line in candidates])
        ranked = sorted(candidates, key=lambda candidate: score(candidate[1]))
        return [choice for choice, line in ranked[:count] if score(line) < math.inf] or [""]


def own_rate(flags: str) -> float | None:
    """Return the learning rate that a contender's flags name."""
    words = [part for word in shlex.split(flags) for part in word.split("=", 1)]
    return float(words[words.index("--lr") + 1]) if "--lr" in words[:-1] else None


def next_beyond(rate: float, rates: Sequence[float]) -> float:
    """Return the rate beyond the edge of a sweep at which `rate` lies, by the ratio of the two rates there."""
    ordered = sorted(rates)
    neighbor = ordered[1] if rate == ordered[0] else ordered[-2]
    return float(f"{rate * rate / neighbor:.3g}")


def rates_around(best: float, tried: Sequence[float], count: int) -> tuple[float, ...]:
    """Return `count` rates, an odd number, of which `best` is the middle one, as far as possible of those tried."""
    rates = sorted(tried)
    if len(rates) < 2:
        rates = [best / 2, best, best * 2]
    while rates.index(best) < count // 2:
        rates.insert(0, next_beyond(rates[0], rates))
    while len(rates) - 1 - rates.index(best) < count // 2:
        rates.append(next_beyond(rates[-1], rates))
    middle = rates.index(best)
    return tuple(rates[middle - count // 2 : middle + count // 2 + 1])


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
