"""What a record of the convergence benchmark says: by contender and seed; time to equal loss; health; a chart."""

import math
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import record as records
from matplotlib.figure import Figure

BASELINE = "dit"
COLUMNS = (
    "contender",
    "flags",
    "seed",
    "step_seconds",
    "step",
    "seconds",
    "images",
    "loss",
    "fd",
    "agreement",
    "health",
)
RESAMPLINGS = 2000  # where there are too many to take them all

Curve = list[tuple[float, float]]  # (seconds, loss), by time


def lines(record: dict) -> list[str]:
    """Markdown: each contender's metrics by seed, their mean and standard deviation; and the methods' health."""
    scales = [f"{scale:g}" for scale in record["settings"]["guidance"]]
    agreements = [f"agreement, guidance {scale}" for scale in scales]
    distances = [f"FD-lite0 of {fd:,}"] if (fd := record["settings"].get("fd")) else []
    heads = ("contender", "ms/step", "steps", "loss by seed", "mean", f"{BASELINE}'s time to it")
    cells = [(*heads, *distances, *agreements)]
    contenders = _by_contender(record)
    for name, runs in contenders.items():
        ends = [rows[-1] for rows in runs.values()]
        losses = [end["loss"] for end in ends]
        shares = [[end["agreement"][scale] for end in ends] for scale in scales]
        cells.append(
            (
                name,
                f"{ends[0]['step_seconds'] * 1e3:.0f}",
                str(ends[0]["step"]),
                " ".join(f"{loss:.4f}" for loss in losses),
                _spread(losses, ".4f"),
                _sooner(contenders, name),
                *([_distances([end["fd"] for end in ends])] if distances else []),
                *(" ".join(f"{s:.1%}" for s in by_seed) + f": {_spread(by_seed, '.1%')}" for by_seed in shares),
            )
        )
    found = records.aligned(cells)
    if health := _health(contenders):
        found += ["", "Least .. most, and last, of signals of the run:", "", *records.aligned(health)]
    return found


def _by_contender(record: dict) -> dict[str, dict[int, list[dict]]]:
    """Rows by contender and seed, in the order of steps."""
    found: dict[str, dict[int, list[dict]]] = {}
    for row in record["rows"]:
        found.setdefault(row["contender"], {}).setdefault(row["seed"], []).append(row)
    return found


def _sooner(contenders: dict, name: str) -> str:
    """How often the contender's time the baseline needs to a loss that both reach, with a 95 % interval."""
    curves, plain = (
        {seed: [(row["seconds"], row["loss"]) for row in rows] for seed, rows in contenders.get(which, {}).items()}
        for which in (name, BASELINE)
    )
    seeds = sorted(curves.keys() & plain.keys())
    if name == BASELINE or not seeds:
        return ""
    middle, low, high = time_ratio([plain[seed] for seed in seeds], [curves[seed] for seed in seeds])
    return f"{middle:.2f}x" + (f" ({low:.2f}-{high:.2f})" if len(seeds) > 1 else "")


def time_ratio(plain: Sequence[Curve], other: Sequence[Curve]) -> tuple[float, float, float]:
    """The baseline's time over the other's to the worse of the two final losses; above 1 the other is sooner.

    Curves by seed, in pairs, all of one contender at the same times. Losses are averaged over seeds. Returns the ratio
    and the ends of a 95 % bootstrap interval over pairs of seeds (percentiles; all resamplings up to five seeds).
    """
    n = len(plain)
    if n <= 5:
        picks = list(product(range(n), repeat=n))
    else:
        picks = np.random.default_rng(0).integers(n, size=(RESAMPLINGS, n)).tolist()

    def ratio(pick: Sequence[int]) -> float:
        ours, theirs = (_mean_curve([curves[at] for at in pick]) for curves in (plain, other))
        target = max(ours[-1][1], theirs[-1][1])
        return time_to(ours, target) / time_to(theirs, target)

    low, high = np.percentile([ratio(pick) for pick in picks], [2.5, 97.5])
    return ratio(range(n)), float(low), float(high)


def time_to(curve: Curve, target: float) -> float:
    """Seconds at which a curve first comes down to `target`: straight lines of log loss between its points.

    Returns infinity if it does not.
    """
    if curve[0][1] <= target:
        return curve[0][0]
    for (begin, above), (end, below) in pairwise(curve):
        if below <= target:
            share = math.log(above / target) / math.log(above / below)
            return begin + share * (end - begin)
    return math.inf


def _mean_curve(curves: Sequence[Curve]) -> Curve:
    return [(points[0][0], mean(loss for _, loss in points)) for points in zip(*curves, strict=True)]


def _health(contenders: dict) -> list[tuple[str, ...]]:
    """For each run of a method with signals of its own a line; none without such a method."""
    signals: dict[str, None] = {}
    for runs in contenders.values():
        for rows in runs.values():
            signals |= dict.fromkeys(rows[-1]["health"])
    if signals.keys() <= {"grad_norm"}:
        return []
    cells = [("contender", "seed", *(name.replace("_", " ") for name in signals))]
    for name, runs in contenders.items():
        for seed, rows in runs.items():
            health = rows[-1]["health"]
            cells.append((name, str(seed), *(_range(health.get(signal)) for signal in signals)))
    return cells


def _range(values: list[float] | None) -> str:
    if not values:
        return ""
    least, most, last = (f"{value:.3g}" for value in values)
    return f"{least}..{most}, {last}"


def _distances(found: list[dict[str, float]]) -> str:
    values = [one["value"] for one in found]
    return " ".join(f"{v:.1f}" for v in values) + f": {_spread(values, '.1f')} (floor {found[0]['floor']:.1f})"


def _spread(values: list[float], form: str) -> str:
    return f"{mean(values):{form}} ± {stdev(values) if len(values) > 1 else math.nan:{form}}"


def write_chart(record: dict, path: Path) -> None:
    """A PNG: loss against seconds of training and against images seen; a line the mean, a band all seeds."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, runs in _by_contender(record).items():
        seeds = list(runs.values())
        losses = np.array([[row["loss"] for row in rows[1:]] for rows in seeds])  # the first is of no training
        for axes, what in ((left, "seconds"), (right, "images")):
            at = [row[what] for row in seeds[0][1:]]
            (line,) = axes.plot(at, losses.mean(0), marker=".", label=name)
            axes.fill_between(at, losses.min(0), losses.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    left.set_yscale("log")
    left.set_ylabel("denoising loss")
    left.set_xlabel("seconds of training")
    right.set_xlabel("images seen")
    left.legend()
    figure.suptitle(record["device"])
    figure.savefig(path, format="png", dpi=100)


CONVERGENCE = records.Section(
    "convergence", ("<!-- convergence: begin -->\n", "<!-- convergence: end -->\n"), lines, write_chart
)
