"""`report.html`: one file that shows a run, with nothing to fetch: pictures, curves, figures, settings, versions."""

import base64
import io
from importlib.resources import files
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fastdit.config import CONFIG_FILE
from fastdit.engine.layout import CURVES, GRID, REPORT
from fastdit.engine.records import read_metrics


def write_report(folder: Path, facts: dict[str, str], versions: dict[str, str]) -> Path:
    """Write curves.png and report.html of the run in `folder`. `facts` are the figures at the top, in order."""
    metrics = read_metrics(folder)
    _curves(metrics, folder / CURVES)
    template = jinja2.Template(files("fastdit.engine").joinpath("report.jinja").read_text(), autoescape=True)
    page = template.render(
        name=folder.resolve().name,
        facts=facts,
        versions=versions,
        grid=_embedded(folder / GRID),
        curves=_embedded(folder / CURVES),
        config=(folder / CONFIG_FILE).read_text(),
    )
    path = folder / REPORT
    path.write_text(page)
    return path


def _embedded(path: Path) -> str | None:
    return base64.b64encode(path.read_bytes()).decode() if path.exists() else None


def _curves(metrics: list[dict], path: Path) -> None:
    """Loss, gradient norm and speed against the step, all from metrics.jsonl."""
    panels = (("loss", "loss"), ("grad_norm", "gradient norm"), ("images_per_sec", "images / s"))
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels):
        points = [(line["step"], line[key]) for line in metrics if line.get(key) is not None]
        axis.plot(*zip(*points) if points else ((), ()), linewidth=1.2)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    path.write_bytes(buffer.getvalue())
