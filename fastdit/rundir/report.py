"""Write `report.html`, which shows a run in one page: pictures, curves, figures, settings and versions.

While a run trains, the page is small and is written again and again. It links the pictures and plotly.js, which lie
beside it in the run's folder, and loads itself anew. The page of a run that has ended holds everything, so that one
file can be sent to somebody. plotly.js alone is 4.8 MB of it.
"""

import base64
import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import jinja2
from markupsafe import Markup
from PIL import Image
from tqdm import tqdm

from fastdit.files import write_atomically, write_text
from fastdit.rundir import eval_log, report_plots
from fastdit.rundir.facts import PRESET, facts_and_versions, now
from fastdit.rundir.metrics_log import read_metrics
from fastdit.rundir.report_data import RunRecord, differences, panels, read_run
from fastdit.rundir.run_files import CURVES, FACTS, GRID, PLOTLY, REAL, REPORT

RELOAD_SECONDS = 15  # after which the page of a running run loads itself anew
LEAST_SECONDS = 5  # between two writes while a run trains
MOST_SHARE = 0.01  # of the time that writing may take while a run trains
MOST_GRIDS = 24  # sample grids on the page
MOST_BYTES = 400_000  # of a picture that the page holds as it is; larger ones are made smaller
MOST_PIXELS = 1_280  # on the longer side of a picture that is made smaller
T = TypeVar("T")


def write_report(
    folder: Path,
    facts: dict[str, str] | None = None,
    versions: dict[str, str] | None = None,
    *,
    path: Path | None = None,
    live: bool | None = None,
    status: str | None = None,
) -> Path:
    """Write the report of the run in `folder`, and with the final one curves.png. Return the path of the report.

    facts: lines about the run, which replace those in facts.json. versions: those of the run; none: of its files.
    path: where the page goes; none: into the run's folder. live: whether to write the page of a run that trains; None
    asks whether a process trains into the folder. status: how the run fares, in words; none: what its files tell.

    Raises UserError if the folder holds no run or the page cannot be written.
    """
    # Read the run.
    if facts is not None:
        write_text(folder / FACTS, json.dumps(facts, indent=1))
    record = read_run(folder)
    record = replace(record, training=record.training if live is None else live, versions=versions or record.versions)
    live = record.training and path is None
    shown = panels(record.lines)
    notes = list(record.notes)

    # Draw the curves, and find the pictures.
    script = report_plots.plotly_script()
    if live and script and not (folder / PLOTLY).exists():
        write_text(folder / PLOTLY, script)
    if not live and path is None and status is None:  # a run that is being stopped has no seconds to spare
        report_plots.draw_picture(shown, folder / CURVES)
    if script is None:
        notes.append(f"The curves are a picture, for the package plotly is not installed: {report_plots.INSTALL}")

    def picture(name: Path) -> str | None:
        return quote(str(name.relative_to(folder))) if live and name.exists() else embedded(name, notes)

    grids = [(step, source) for step, name in spread(record.grids, MOST_GRIDS) if (source := picture(name))]
    last = picture(folder / GRID) if record.finished or not grids else None

    # Fill in the page.
    compared, differing = differences(record)
    page = fill_in(
        "report.jinja",
        name=record.name,
        live=live,
        reload_seconds=RELOAD_SECONDS,
        status=status or describe_status(record),
        written=now(),
        script=Markup(script) if script and not live else None,
        script_file=PLOTLY if script and live else None,
        notes=notes,
        figures=key_figures(record),
        real=picture(folder / REAL),
        samples=last or (grids[-1][1] if grids else None),
        samples_step=record.last.get("step") if last else grids[-1][0] if grids else None,
        grids=grids,
        grids_of=len(record.grids),
        plots=[
            (title, Markup(report_plots.plot(report_plots.lines_of(curves), f"plot{k}")))
            for k, (title, curves) in enumerate(shown if script else [])
        ],
        curves=None if script else embedded(folder / CURVES, notes),
        titles=", ".join(title for title, _ in shown),
        most_points=report_plots.MOST_POINTS if is_thinned(shown) else None,
        evaluations=eval_log.table(record.evaluations),
        evaluated=list(dict.fromkeys(name for found in record.evaluations for name in found["figures"])),
        compared=compared,
        differing=differing,
        facts={name: text for name, text in record.facts.items() if name != PRESET},
        versions=record.versions,
        config=record.config,
    )
    written = path or folder / REPORT
    with write_atomically(written, many_writers=True) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    if not live and path is None:
        with suppress(OSError):
            (folder / PLOTLY).unlink(missing_ok=True)
    return written


def check_files(folder: Path) -> None:
    """Raise UserError if a file of a run that the report shows is damaged."""
    read_metrics(folder), eval_log.read(folder), facts_and_versions(folder)


class LiveReport:
    """Write the report of a run while it trains, on rank 0.

    The first page is written before the first step, since that takes longest. Later writes are at least LEAST_SECONDS
    apart, and so far that writing takes at most MOST_SHARE of the time.
    """

    def __init__(self, folder: Path, say: Callable[[str], None]):
        """Write the first page. Errors are told by `say`."""
        self.folder, self.final, self.next_time = folder, False, 0.0
        self._write(say, live=True)
        self.next_time = max(self.next_time, time.monotonic() + LEAST_SECONDS)

    def update(self, say: Callable[[str], None]) -> None:
        """Write the page if it is due. An error is told once, by `say`, and does not end the run."""
        begun = time.monotonic()
        if begun >= self.next_time:
            self._write(say, live=True)
            self.next_time = time.monotonic() + max(LEAST_SECONDS, (time.monotonic() - begun) / MOST_SHARE)

    def finish(self, facts: dict[str, str]) -> Path:
        """Write the page of a finished run, and return its path. Raises UserError."""
        self.final = True
        return write_report(self.folder, facts, live=False)

    def end(self, status: str, say: Callable[[str], None]) -> None:
        """Write the page of a run that ended before its last step; nothing if `finish` was called."""
        if not self.final:
            self._write(say, live=False, status=status)

    def _write(self, say: Callable[[str], None], **how) -> None:
        try:
            write_report(self.folder, **how)
        except Exception as error:  # a report is not worth a run
            text = " ".join(str(error).split()) or type(error).__name__
            if self.next_time < float("inf"):
                say(f"warning: {self.folder / REPORT}: cannot be written ({text}); the run goes on without it")
            self.next_time = float("inf")


def describe_status(record: RunRecord) -> str:
    """Return how far a run is, in words."""
    last, steps = record.last, record.steps
    done = last.get("step", 0)
    of = f" of {steps:,}" if steps is not None else ""
    if record.finished:
        return f"Finished: {done:,} steps in {_duration(last)} of training"
    if not record.training:
        return f"Stopped after step {done:,}{of}"
    left = (steps - done) * last["seconds_per_step"] if steps and last.get("seconds_per_step") else None
    return f"Training: step {done:,}{of}" + (f", {tqdm.format_interval(left)} left" if left is not None else "")


def key_figures(record: RunRecord) -> dict[str, str]:
    """Return the figures that a reader looks for first, by name."""
    last, found = record.last, {}
    if (loss := record.last_loss()) is not None:
        found["loss"] = f"{loss:.4g}"
    if (speed := last.get("images_per_sec")) is not None:
        found["images / s"] = f"{speed:,.0f}" if speed >= 10 else f"{speed:.3g}"
    if last.get("mfu") is not None:
        found["MFU"] = f"{last['mfu']:.1%}"
    if last.get("memory_gb") is not None:
        found["memory"] = f"{last['memory_gb']:.3g} GB"
    if last.get("seconds") is not None:
        found["training time"] = _duration(last)
    if record.evaluations:
        newest = record.evaluations[-1]["figures"]
        name = next((name for name in ("FID", "FD-lite0") if name in newest), next(iter(newest), None))
        if name:
            found[name] = f"{newest[name]['value']:.4g}"
    if agreement := record.facts.get("class agreement"):
        found["class agreement"] = agreement.partition(" ")[0]
    return found


def _duration(last: dict) -> str:
    """Return the training time at a line of metrics as text."""
    return tqdm.format_interval(last["seconds"]) if last.get("seconds") is not None else "unknown time"


def is_thinned(shown: list) -> bool:
    """Return whether a curve of these panels has more points than are drawn."""
    return any(len(points) > report_plots.MOST_POINTS for _, curves in shown for points in curves.values())


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(k * (len(items) - 1) / (most - 1))] for k in range(most)]


def embedded(path: Path, notes: list[str]) -> str | None:
    """Return a picture as a data URL, or None if it does not exist. A large one is made smaller.

    A file that is no picture is named in `notes`.
    """
    if not path.exists():
        return None
    try:
        data, kind = path.read_bytes(), "png"
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if len(data) > MOST_BYTES:
                image.thumbnail((MOST_PIXELS, MOST_PIXELS), Image.Resampling.LANCZOS)
                buffer, kind = io.BytesIO(), "webp"
                image.save(buffer, format="webp", quality=85)
                data = buffer.getvalue()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        notes.append(f"{path}: cannot be shown ({' '.join(str(error).split())})")
        return None
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def fill_in(template: str, **values) -> str:
    """Return a page of this folder's templates. Texts are escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("fastdit.rundir", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
