"""Write `report.html`, which shows a run in one file: samples, curves, figures, settings and versions."""

import base64
import io
import json
import math
from importlib.resources import files
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastdit.config import CONFIG_FILE
from fastdit.errors import UserError
from fastdit.files import read_json, write_atomically, write_text
from fastdit.methods.denoising import Panels
from fastdit.methods.registry import METHODS
from fastdit.rundir import eval_log
from fastdit.rundir.metrics_log import read_metrics
from fastdit.rundir.run_files import CURVES, FACTS, GRID, REPORT, VERSIONS

COLUMNS = 3
# Title of each panel, and the label of each metric in it. A panel without data is left out.
_OF_RUNS: Panels = {
    "loss": {"loss": "loss"},
    "gradient norm": {"grad_norm": "gradient norm"},
    "images / s": {"images_per_sec": "images / s"},
}
_OF_EVALUATIONS: Panels = {
    "FID": {"eval/FID": "FID", "eval/sFID": "sFID"},
    "FD-lite0": {"eval/FD-lite0": "FD-lite0"},
    "KID": {"eval/KID": "KID", "eval/KID-lite0": "KID-lite0"},
    "class agreement": {"eval/class agreement": "class agreement"},
}


def _all_panels() -> Panels:
    """Return the panels of every run, of each registered method and of evaluations. Methods may share a panel."""
    found: Panels = {}
    for part in (_OF_RUNS, *(method.panels for method in METHODS.values()), _OF_EVALUATIONS):
        for title, labels in part.items():
            found[title] = found.get(title, {}) | labels
    return found


def write_report(folder: Path, facts: dict[str, str], versions: dict[str, str]) -> Path:
    """Write curves.png and report.html of the run in `folder`. Return the path of the report.

    facts: the lines at the top, in order, which are also kept in facts.json.
    """
    # Write the facts and the curves.
    write_text(folder / FACTS, json.dumps(facts, indent=1))
    metrics = read_metrics(folder)
    _curves(metrics, folder / CURVES)

    # Fill in the page, with its images embedded.
    template = jinja2.Template(files("fastdit.rundir").joinpath("report.jinja").read_text(), autoescape=True)
    page = template.render(
        name=folder.resolve().name,
        facts=facts,
        evaluations=eval_log.table(eval_log.read(folder)),
        versions=versions,
        grid=_embedded(folder / GRID),
        curves=_embedded(folder / CURVES),
        titles=", ".join(title for title, _ in panels(metrics)),
        config=(folder / CONFIG_FILE).read_text(),
    )
    path = folder / REPORT
    write_text(path, page)
    return path


def refresh_report(folder: Path) -> Path:
    """Write the report again with the evaluations made since. Facts exist only after training has ended."""
    return write_report(folder, *_described(folder))


def check_files(folder: Path) -> None:
    """Raise UserError if a file of a run that the report shows is damaged."""
    read_metrics(folder), eval_log.read(folder), _described(folder)


def _described(folder: Path) -> list[dict[str, str]]:
    """Return the facts and the versions that a run has written, each empty if it has not. Raises UserError."""
    found = []
    for path in (folder / FACTS, folder / VERSIONS):
        found.append(read_json(path, "remove it") if path.exists() else {})
        if not isinstance(found[-1], dict) or not all(isinstance(text, str) for text in found[-1].values()):
            raise UserError(f"{path}: is no list of names and texts; remove it")
    return found


def _embedded(path: Path) -> str | None:
    """Return a file in base64, or None if it does not exist."""
    return base64.b64encode(path.read_bytes()).decode() if path.exists() else None


def panels(metrics: list[dict]) -> list[tuple[str, dict[str, list[tuple[int, float]]]]]:
    """Return title and curves of the panels that have data; curves are (step, value) points by label."""
    found = []
    for title, keys in _all_panels().items():
        lines = {
            label: points
            for key, label in keys.items()
            if (points := [(line["step"], line[key]) for line in metrics if line.get(key) is not None])
        }
        if lines:
            found.append((title, lines))
    return found


def _curves(metrics: list[dict], path: Path) -> None:
    """Plot every panel against the step, COLUMNS in a row, into a PNG file."""
    # Plot each panel, and remove the empty places of the last row.
    shown = panels(metrics) or [("no metrics yet", {})]
    rows = math.ceil(len(shown) / COLUMNS)
    height = 3.2 * rows
    # Fixed margins, in shares of the figure. A layout that matplotlib computes draws every panel twice.
    margins = {
        "left": 0.055,
        "right": 0.99,
        "wspace": 0.2,
        "bottom": 0.5 / height,
        "top": 1 - 0.3 / height,
        "hspace": 0.36,
    }
    figure, axes = plt.subplots(rows, COLUMNS, figsize=(12, height), gridspec_kw=margins, squeeze=False)
    for axis, (title, lines) in zip(axes.flat, shown):
        for label, points in lines.items():
            axis.plot(*zip(*points), linewidth=1.2, label=label)
        if len(lines) > 1:
            axis.legend(frameon=False)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(shown) :]:
        axis.remove()

    # Write the file in one piece, so that an error while plotting leaves the old one.
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    with write_atomically(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
