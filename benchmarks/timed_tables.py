"""Build the record of the timed runs from their journal, and its tables in Markdown."""

from collections.abc import Sequence
from dataclasses import dataclass

import record as records
from timed_plan import BASELINE, RATES, at_edge, chooser, choosing_figure

SHOWN = ("FD-lite0", "KID-lite0", "FD-PCA", "agreement")  # figures of samples, in the table's order
FORMS = {"FD-lite0": ".1f", "KID-lite0": ".4f", "FD-PCA": ".2f", "agreement": ".1%"}
DISTANCES = ("FD-lite0", "FD-PCA")  # that must both fall for a contender to pay
PAYS = 0.9  # of plain DiT's distance
UNEQUAL = 0.05  # share by which a run may miss its planned seconds before the table says so


def timed_record(lines: Sequence[dict]) -> dict:
    """Build the record from a journal's lines: a row for each finished run, with the points of its loss."""
    heads = [line for line in lines if line["what"] == "record" and line["benchmark"] == "timed runs"]
    rows: dict[str, dict] = {}
    for line in lines:
        if line["what"] == "run":
            points = [_point(other) for other in lines if other["what"] == "run point" and _same(other, line)]
            row = {key: value for key, value in line.items() if key not in ("what", "at", "asked")}
            rows[str(line["asked"])] = row | {"points": points}
    plans = [line["remaining"] for line in lines if line["what"] == "timed plan"]
    head = {key: value for key, value in (heads[-1] if heads else {}).items() if key not in ("what", "at")}
    prices = [{key: line[key] for key in ("contender", "price", "warm_up_s", "total_s", "machine")}
              for line in lines if line["what"] == "price"]  # fmt: skip
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

    def cell(self, row: dict) -> str:
        found = self.of(row)
        if found is None:
            return ""
        form = FORMS.get(self.name, ".4f")
        floor = f" ({found['floor']:{form}})" if "floor" in found else ""
        return f"{found['value']:{form}}{floor}"


def timed_lines(record: dict) -> list[str]:
    """Return Markdown: a line for each run, then what they say about learning rates and contenders."""
    rows = record["rows"]
    if not rows:
        return ["No run is finished yet."]
    columns = [Figure("loss"), *(Figure(name, scale) for name in SHOWN for scale in _scales(rows, name))]
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    heads = ("phase", "contender", "lr", "seed", "steps", "seconds (planned)", "images/s")
    cells = [(*heads, *(column.title for column in columns), *(["machine"] if len(machines) > 1 else []))]
    for row in rows:
        name = row["contender"] + (f": {row['failed']}" if "failed" in row else "")
        spent = f"{row['seconds']:.1f} ({row['planned_seconds']:g})"
        own = (row["phase"], name, f"{row['lr']:g}", str(row["seed"]), str(row["steps"]), spent)
        shown = (f"{row['images_per_s']:.4g}", *(column.cell(row) for column in columns))
        cells.append((*own, *shown, *([row["machine"]] if len(machines) > 1 else [])))
    said = [_setting(record), *_rate_notice(rows), *_verdicts(rows), *_skipped(rows), _spent(record)]
    missed = [abs(row["seconds"] / row["planned_seconds"] - 1) for row in rows if "failed" not in row]
    if any(share > UNEQUAL for share in missed):
        said.append(f"Time was not equal: a run missed its planned seconds by {max(missed):.0%}. The machine was busy.")
    if len(machines) > 1:
        said.append("Runs come from several machines. Each machine prices steps itself, so equal time is its own.")
    if record.get("remaining"):
        said.append(f"Not run yet: {'; '.join(record['remaining'])}.")
    return [*records.aligned(cells), "", *(f"- {sentence}" for sentence in said)]


def _scales(rows: list[dict], name: str) -> list[str]:
    found = (row["figures"].get(name, {}) for row in rows if "figures" in row)
    return list(dict.fromkeys(scale for figure in found if "skipped" not in figure for scale in figure))


def _setting(record: dict) -> str:
    settings = record.get("settings", {})
    if "model" not in settings:
        return "Values in brackets are floors: the same figure of real images."
    shape = "x".join(map(str, settings["shape"]))
    counts = {row["samples"] for row in record["rows"] if "samples" in row}
    samples = " or ".join(f"{count:,}" for count in sorted(counts))
    return (
        f"{settings['data']} as {shape}, {settings['model']}/{settings['patch']}, {samples} samples by "
        f"{settings['sample_steps']} sampler steps. Values in brackets are floors: the same figure of real images."
    )


def _rate_notice(rows: list[dict]) -> list[str]:
    """Say which learning rate came out best in the first phase, and whether it lies at an edge of those tried."""
    swept = [row for row in rows if row["phase"] == RATES]
    name = choosing_figure(swept)
    if name is None:
        return []
    best, rates = min(swept, key=chooser(swept))["lr"], sorted(row["lr"] for row in swept)
    tried = ", ".join(f"{rate:g}" for rate in rates)
    edge = " It lies at an edge of those tried: a better one may lie beyond." if at_edge(best, rates) else ""
    return [f"Best learning rate of {BASELINE} by {name}: {best:g} of {tried}.{edge}"]


def _verdicts(rows: list[dict]) -> list[str]:
    """Say of each contender by how much its distances differ from plain DiT's of the same phase and seed."""
    plain = {(row["phase"], row["seed"]): row for row in rows if row["contender"] == BASELINE and row["phase"] != RATES}
    names = dict.fromkeys(row["contender"] for row in rows if row["contender"] != BASELINE)
    return [_verdict(name, [row for row in rows if row["contender"] == name], plain) for name in names]


def _verdict(name: str, rows: list[dict], plain: dict[tuple, dict]) -> str:
    pairs = [(row, plain[row["phase"], row["seed"]]) for row in rows if (row["phase"], row["seed"]) in plain]
    told, ratios = [], []
    for distance in DISTANCES:
        for scale in _scales(rows, distance)[:1]:
            both = [(Figure(distance, scale).of(row), Figure(distance, scale).of(other)) for row, other in pairs]
            found = [own["value"] / base["value"] for own, base in both if own and base]
            ratios.append(found)
            told.append(f"{distance} " + " ".join(f"{ratio - 1:+.0%}" for ratio in found))
    if len(ratios) < len(DISTANCES) or not all(ratios) or any(len(found) < len(pairs) for found in ratios):
        verdict = "undecided, for not every distance of every run is known"
    elif all(ratio <= PAYS for found in ratios for ratio in found):
        verdict = f"pays: both distances are at least {1 - PAYS:.0%} lower for {_seeds(pairs)}"
    else:
        verdict = f"does not pay: that takes both distances at least {1 - PAYS:.0%} lower for {_seeds(pairs)}"
    return f"{name} against {BASELINE} at its best rate: {', '.join(told) or 'no distance'}; {verdict}."


def _seeds(pairs: list) -> str:
    return "every seed" if len(pairs) > 1 else "the only seed"


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
    parts = [
        f"training {sum(row['seconds'] for row in rows):.0f} s",
        f"building {sum(row['build_s'] for row in rows):.0f} s",
        f"pricing {sum(price['total_s'] for price in prices):.0f} s, "
        f"{sum(price['warm_up_s'] for price in prices):.0f} s of it warm-up and compiling",
        f"sampling {sampling:.0f} s for {flops / 1e15:.2g} PFLOP",
        f"judging {judging:.0f} s",
    ]
    return f"Time went to: {'; '.join(parts)}."


TIMED = records.Section("timed runs", ("<!-- timed: begin -->\n", "<!-- timed: end -->\n"), timed_lines)
