"""Build the record of a comparison from its journal, and its tables in Markdown and its chart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import record as records
from convergence_plan import BASELINE, CONTENDERS, EQUAL_STEPS, RATES, at_edge, chooser, choosing_figure, first_value

SHOWN = ("FD-lite0", "KID-lite0", "FD-PCA", "agreement")  # figures of samples, in the table's order
FORMS = {"FD-lite0": ".1f", "KID-lite0": ".4f", "FD-PCA": ".2f", "agreement": ".1%", "probe": ".1%"}
DISTANCES = ("FD-lite0", "FD-PCA")  # that must both fall for a contender to pay
PAYS = 0.9  # of plain DiT's distance
UNEQUAL = 0.05  # share by which a run may miss its planned seconds before the table says so
LEFT_OUT = ("what", "at", "asked")


def convergence_record(lines: Sequence[dict]) -> dict:
    """Build the record from a journal's lines: a row for each finished run, with the points of its loss."""
    heads = [line for line in lines if line["what"] == "record" and line["benchmark"] == "convergence"]
    rows: dict[str, dict] = {}
    for line in lines:
        if line["what"] == "run":
            points = [_point(other) for other in lines if other["what"] == "run point" and _same(other, line)]
            row = {key: value for key, value in line.items() if key not in LEFT_OUT}
            rows[str(line["asked"])] = row | {"points": points}
    plans = [line["remaining"] for line in lines if line["what"] == "plan"]
    head = {key: value for key, value in (heads[-1] if heads else {}).items() if key not in ("what", "at")}
    prices = [
        {key: value for key, value in line.items() if key not in LEFT_OUT} for line in lines if line["what"] == "price"
    ]
    return head | {"rows": list(rows.values()), "prices": prices, "remaining": plans[-1] if plans else None}


def _same(point: dict, run: dict) -> bool:
    return all(point[key] == run[key] for key in ("phase", "contender", "lr", "seed", "began"))


def _point(line: dict) -> dict:
    left_out = ("what", "at", "phase", "contender", "lr", "seed", "began")
    return {key: value for key, value in line.items() if key not in left_out}


@dataclass(frozen=True)
class Figure:
    """A column of the table: a figure, for one guidance scale if it is one of samples."""

    name: str
    scale: str | None = None

    @property
    def title(self) -> str:
        return self.name if self.scale is None else f"{self.name}, guidance {self.scale}"

    def of(self, row: dict) -> dict | None:
        """Return a row's figure; None where the run failed or the figure was skipped."""
        found = row.get("figures", {}).get(self.name)
        if found is None or "skipped" in found:
            return None
        return found if self.scale is None else found.get(self.scale)

    def cell(self, rows: Sequence[dict]) -> str:
        """Return the values of one contender's runs, by seed."""
        form = FORMS.get(self.name, ".4f")
        return " ".join("-" if self.of(row) is None else f"{self.of(row)['value']:{form}}" for row in rows)

    def heading(self, rows: Sequence[dict]) -> str:
        """Return the title, with the floor: the same figure of real images."""
        floors = [self.of(row)["floor"] for row in rows if self.of(row) and "floor" in self.of(row)]
        return self.title + (f" (floor {floors[0]:{FORMS.get(self.name, '.4f')}})" if floors else "")


def convergence_lines(record: dict) -> list[str]:
    """Return Markdown: a line for each contender with its values by seed, and what they say; then the sweeps."""
    rows = record["rows"]
    if not rows:
        return ["No run is finished yet."]
    names = list(dict.fromkeys(row["contender"] for row in rows))
    said = [_setting(record), *_verdicts(rows), *_edges(rows), *_failures(rows), *_skipped(rows), _spent(record)]
    missed = [abs(row["seconds"] / row["planned_seconds"] - 1) for row in rows if "failed" not in row]
    if any(share > UNEQUAL for share in missed):
        said.append(
            "Steps follow from prices that were measured in turns. A run's own seconds missed the planned ones by up "
            f"to {max(missed):.0%}: the machine did other work beside, or it was another machine."
        )
    if record.get("remaining"):
        said.append(f"Not run yet: {'; '.join(record['remaining'])}.")
    parts = [*_contender_table(rows, names), *_sweep_table(rows, names)]
    return [*parts, *(f"- {sentence}" for sentence in said)]


def _contender_table(rows: list[dict], names: list[str]) -> list[str]:
    """Return the table of the runs of equal time, with those of equal steps beside."""
    timed = [row for row in rows if row["phase"] == CONTENDERS]
    if not timed:
        return []
    stepped = [row for row in rows if row["phase"] == EQUAL_STEPS]
    columns = [Figure(name, scale) for name in SHOWN for scale in _scales(timed, name)]
    beside = [column for column in columns if column.name in DISTANCES] if stepped else []
    heads = ["contender", "lr", "steps", *(column.heading(timed) for column in columns)]
    heads += [f"{column.title}, equal steps" for column in beside]
    cells = [(*heads, "loss", "probe (block)", "gradient ratio")]
    for name in names:
        own = [row for row in timed if row["contender"] == name]
        same_steps = [row for row in stepped if row["contender"] == name]
        if not own:
            continue
        rates = [row["lr"] for row in rows if row["phase"] == RATES and row["contender"] == name]
        edge = "*" if len(rates) > 1 and at_edge(own[0]["lr"], rates) else ""
        head = (name, f"{own[0]['lr']:g}{edge}", str(own[0]["steps"]))
        figures = (*(column.cell(own) for column in columns), *(column.cell(same_steps) for column in beside))
        cells.append((*head, *figures, Figure("loss").cell(own), _probe(own[0]), _ratios(own)))
    return [*records.aligned(cells), ""]


def _probe(row: dict) -> str:
    """Return a run's best block by the linear probe."""
    found = Figure("probe").of(row)
    if found is None:
        return ""
    return f"{found['value']:.1%} ({1 + found['blocks'].index(found['value'])} of {len(found['blocks'])})"


def _ratios(rows: list[dict]) -> str:
    """Return the gradient ratios of a contender's terms to its denoising loss, means over its runs."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("gradient_ratios", {})))
    means = {name: [row["gradient_ratios"][name] for row in rows if name in row["gradient_ratios"]] for name in names}
    titles = {name: name.removesuffix("gradient_ratio").strip("_") or "structure" for name in names}
    return ", ".join(f"{titles[name]} {sum(values) / len(values):.2g}" for name, values in means.items())


def _sweep_table(rows: list[dict], names: list[str]) -> list[str]:
    """Return a table of the learning rates that each contender tried, with the figure that decides."""
    swept = [row for row in rows if row["phase"] == RATES]
    figure = choosing_figure(swept)
    if figure is None:
        return []
    rates = sorted({row["lr"] for row in swept})
    cells = [(f"{figure} at learning rate", *(f"{rate:g}" for rate in rates))]
    form = FORMS.get(figure, ".4f")
    for name in names:
        own = {row["lr"]: row for row in swept if row["contender"] == name}
        if own:
            shown = [
                "" if rate not in own
                else "failed" if "failed" in own[rate]
                else f"{first_value(own[rate]['figures'][figure]):{form}}"
                for rate in rates
            ]  # fmt: skip
            cells.append((name, *shown))
    return [*records.aligned(cells), ""]


def _scales(rows: list[dict], name: str) -> list[str]:
    found = (row["figures"].get(name, {}) for row in rows if "figures" in row)
    return list(dict.fromkeys(scale for figure in found if "skipped" not in figure for scale in figure))


def _setting(record: dict) -> str:
    settings = record.get("settings", {})
    explained = "Values are by seed. A floor is the same figure of other real images."
    if "shape" not in settings:
        return explained
    shape = "x".join(map(str, settings["shape"]))
    network = ", ".join(f"{name} {value}" for name, value in settings["network"].items())
    unit = "s" if settings["unit"] == "seconds" else "plain steps"
    budget = f"{settings['seconds']:g} {unit}, in sweeps {settings['rate_seconds']:g}"
    counts = sorted({row["samples"] for row in record["rows"] if "samples" in row})
    samples = " or ".join(f"{count:,}" for count in counts)
    return (
        f"{settings['data']} as {shape}; {network}; batch {settings['batch']}; the time of {budget}; {samples} samples "
        f"by {settings['sample_steps']} sampler steps. {explained}"
    )


def _edges(rows: list[dict]) -> list[str]:
    """Say for whom the best learning rate lies at an edge of those tried."""
    names = []
    for name in dict.fromkeys(row["contender"] for row in rows):
        swept = [row for row in rows if row["phase"] == RATES and row["contender"] == name]
        if len(swept) > 1 and choosing_figure(swept) is not None:
            best = min(swept, key=chooser(swept))["lr"]
            if at_edge(best, [row["lr"] for row in swept]):
                names.append(f"{name} ({best:g})")
    if not names:
        return []
    where = ", ".join(names)
    return [f"* The best learning rate lies at an edge of those tried, a better one may lie beyond: {where}."]


def _verdicts(rows: list[dict]) -> list[str]:
    """Say of each contender by how much its distances differ from plain DiT's of the same seed at equal time."""
    rows = [row for row in rows if row["phase"] == CONTENDERS]
    plain = {row["seed"]: row for row in rows if row["contender"] == BASELINE}
    names = dict.fromkeys(row["contender"] for row in rows if row["contender"] != BASELINE)
    return [_verdict(name, [row for row in rows if row["contender"] == name], plain) for name in names]


def _verdict(name: str, rows: list[dict], plain: dict[int, dict]) -> str:
    pairs = [(row, plain[row["seed"]]) for row in rows if row["seed"] in plain]
    told, ratios = [], []
    for distance in DISTANCES:
        for scale in _scales(rows, distance)[:1]:
            found = distance_ratios(pairs, Figure(distance, scale))
            ratios.append(found)
            told.append(f"{distance} " + " ".join(f"{ratio - 1:+.0%}" for ratio in found))
    if len(ratios) < len(DISTANCES) or not all(ratios) or any(len(found) < len(pairs) for found in ratios):
        verdict = "undecided, for not every distance of every run is known"
    elif all(ratio <= PAYS for found in ratios for ratio in found):
        verdict = f"pays: both distances are at least {1 - PAYS:.0%} lower for {_seeds(pairs)}"
    else:
        verdict = f"does not pay: that takes both distances at least {1 - PAYS:.0%} lower for {_seeds(pairs)}"
    return f"{name} against {BASELINE}: {', '.join(told) or 'no distance'}; {verdict}."


def distance_ratios(pairs: list[tuple[dict, dict]], figure: Figure) -> list[float]:
    """Return the ratios of a figure in pairs of runs, one of a contender and one of plain DiT, where both have it."""
    both = [(figure.of(row), figure.of(other)) for row, other in pairs]
    return [own["value"] / base["value"] for own, base in both if own and base]


def _seeds(pairs: list) -> str:
    return f"all {len(pairs)} seeds" if len(pairs) > 1 else "the only seed"


def _failures(rows: list[dict]) -> list[str]:
    failed = [
        f"{row['contender']} at {row['lr']:g}, seed {row['seed']} ({row['failed']})" for row in rows if "failed" in row
    ]
    return [f"Failed: {'; '.join(failed)}."] if failed else []


def _skipped(rows: list[dict]) -> list[str]:
    """Say which figures are missing and why."""
    reasons = {
        f"{name} was not measured: {figure['skipped']}."
        for row in rows
        for name, figure in row.get("figures", {}).items()
        if "skipped" in figure
    }
    return sorted(reasons)


def _spent(record: dict) -> str:
    """Say where the time went, training apart from all else."""
    rows, prices = record["rows"], record.get("prices", [])
    judged = [row for row in rows if "figures" in row]
    sampling, flops, judging = (
        sum(row[key] for row in judged) for key in ("sampling_s", "sampling_flops", "judging_s")
    )
    plain = [price["price"] for price in prices if price["contender"] == BASELINE]
    ratios = ", ".join(f"{price['contender']} {price['price'] / plain[0]:.2f}" for price in prices) if plain else ""
    parts = [
        f"training {sum(row['seconds'] for row in rows):.0f} s",
        f"building {sum(row['build_s'] for row in rows):.0f} s",
        f"pricing {sum(price['total_s'] for price in prices):.0f} s, "
        f"{sum(price['warm_up_s'] for price in prices):.0f} s of it warm-up and compiling",
        f"sampling {sampling:.0f} s for {flops / 1e15:.2g} PFLOP",
        f"judging {judging:.0f} s",
    ]
    priced = f"A step costs, in plain steps: {ratios}; plain, {plain[0] * 1e3:.1f} ms. " if plain else ""
    return f"{priced}Time went to: {'; '.join(parts)}."


def _best_of_sweeps(rows: list[dict]) -> list[dict]:
    """Return each contender's best run of the first phase, which is all that there is before the second."""
    best: dict[str, dict] = {}
    score = chooser(rows)
    for row in rows:
        best[row["contender"]] = min(row, best.get(row["contender"], row), key=score)
    return list(best.values())


def write_chart(record: dict, path: Path) -> None:
    """Draw each contender's two distances at equal time over plain DiT's, a dot for each seed.

    Before there are runs of all contenders at their best rates, the best runs of the sweeps are shown.
    """
    from matplotlib.figure import Figure as Canvas

    rows = [row for row in record["rows"] if row["phase"] == CONTENDERS] or _best_of_sweeps(record["rows"])
    plain = {row["seed"]: row for row in rows if row["contender"] == BASELINE}
    names = [name for name in dict.fromkeys(row["contender"] for row in rows) if name != BASELINE]
    canvas = Canvas(figsize=(9, 1.2 + 0.35 * max(1, len(names))), layout="constrained")
    for axes, distance in zip(canvas.subplots(1, 2, sharey=True), DISTANCES):
        for scale in _scales(rows, distance)[:1]:
            for place, name in enumerate(names):
                own = [row for row in rows if row["contender"] == name and row["seed"] in plain]
                ratios = distance_ratios([(row, plain[row["seed"]]) for row in own], Figure(distance, scale))
                axes.plot(ratios, [place] * len(ratios), "o", color=f"C{place % 10}", alpha=0.7)
        axes.axvline(1, color="black", linewidth=0.8)
        axes.axvline(PAYS, color="black", linewidth=0.8, linestyle=":")
        axes.set_xlabel(f"{distance} over plain DiT's, lower is better")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    canvas.suptitle(f"equal training time, {record['device']}")
    canvas.savefig(path, format="png", dpi=100)


CONVERGENCE = records.Section(
    "convergence", ("<!-- convergence: begin -->\n", "<!-- convergence: end -->\n"), convergence_lines, write_chart
)
