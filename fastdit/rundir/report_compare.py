"""Write one page that compares runs: figures, overlaid curves, the settings that differ, and the last sample grids."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from fastdit.errors import UserError
from fastdit.files import write_atomically
from fastdit.rundir import report_plots
from fastdit.rundir.facts import now
from fastdit.rundir.report import describe_status, embedded, fill_in, key_figures
from fastdit.rundir.report_data import OWN, RunRecord, panels, plain, read_run
from fastdit.rundir.run_files import GRID

NO_VALUE = "–"


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page, which holds everything that it shows, to `path`, and return that.

    Raises UserError if a folder holds no run, if plotly is not installed, or if the page cannot be written.
    """
    # Read the runs.
    script = report_plots.plotly_script()
    if script is None:
        raise UserError(f"fastdit-report: a comparison needs the package plotly; {report_plots.INSTALL}")
    records = [read_run(folder) for folder in folders]
    names = unique_names([record.folder for record in records])
    notes = [note for record in records for note in record.notes]

    # Draw the curves of all runs in each panel.
    shown = overlaid(records, names)
    plots = [
        (title, Markup(report_plots.plot(lines, f"plot{k}", legend=True))) for k, (title, lines) in enumerate(shown)
    ]
    thinned = any(len(line.points) > report_plots.MOST_POINTS for _, lines in shown for line in lines)

    # Fill in the page.
    page = fill_in(
        "report_comparison.jinja",
        name=f"{len(records)} runs compared",
        script=Markup(script),
        written=now(),
        notes=notes,
        runs=[_row(name, record) for name, record in zip(names, records)],
        figures=list(dict.fromkeys(key for record in records for key in key_figures(record))),
        names=names,
        plots=plots,
        most_points=report_plots.MOST_POINTS if thinned else None,
        differing=differing_settings(records),
        grids=[(name, source) for name, record in zip(names, records) if (source := _last_grid(record, notes))],
    )
    with write_atomically(path, many_writers=True) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


def unique_names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the folders' paths, as many as it takes to tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise UserError(f"fastdit-report: {folders[0]}: is named more than once; name each run once")


def overlaid(records: Sequence[RunRecord], names: Sequence[str]) -> list[tuple[str, list[report_plots.Line]]]:
    """Return title and curves of the panels of all runs. A run has one color, and each metric of a panel one dash."""
    # Collect the curves of each panel, by metric and run.
    by_title: dict[str, dict[tuple[str, int], list]] = {}
    for k, record in enumerate(records):
        for title, curves in panels(record.lines):
            for label, points in curves.items():
                by_title.setdefault(title, {})[label, k] = points

    # Name a curve by its run alone where the panel has one metric.
    hours, found = [_hours(record) for record in records], []
    for title, curves in by_title.items():
        metrics, lines = list(dict.fromkeys(label for label, _ in curves)), []
        for (label, k), points in curves.items():
            name = names[k] if len(metrics) == 1 else f"{names[k]}: {label}"
            dash = report_plots.DASHES[metrics.index(label) % len(report_plots.DASHES)]
            color = report_plots.COLORS[k % len(report_plots.COLORS)]
            lines.append(report_plots.Line(name, points, color, dash, hours[k] and hours[k]([x for x, _ in points])))
        found.append((title, lines))
    return found


def _hours(record: RunRecord) -> Callable[[list[int]], list[float]] | None:
    """Return a function from steps to hours of training, or None if the metrics do not tell these."""
    known = [(line["step"], line["seconds"]) for line in record.lines if line.get("seconds") is not None]
    if not known:
        return None
    steps, seconds = zip(*known)
    return lambda at: (np.interp(at, steps, seconds) / 3600).round(5).tolist()


def differing_settings(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Return the flags whose values are not the same in all runs, with the text of each run's value."""
    flags = dict.fromkeys(flag for record in records for flag in record.settings if flag not in OWN)
    rows = [
        (flag, [plain(record.settings[flag]) if flag in record.settings else NO_VALUE for record in records])
        for flag in flags
    ]
    return [(flag, texts) for flag, texts in rows if len(set(texts)) > 1]


def _row(name: str, record: RunRecord) -> dict[str, object]:
    """Return what the first table tells of a run."""
    described = [record.facts[key] for key in ("method", "parameters") if key in record.facts]
    return {
        "name": name,
        "status": describe_status(record),
        "described": "; ".join(described) or NO_VALUE,
        "figures": key_figures(record),
    }


def _last_grid(record: RunRecord, notes: list[str]) -> str | None:
    """Return the newest sample grid of a run as a data URL, or None if it has none."""
    newest = record.grids[-1][1] if record.grids else record.folder / GRID
    final = record.folder / GRID
    return embedded(final if record.finished and final.exists() else newest, notes)
