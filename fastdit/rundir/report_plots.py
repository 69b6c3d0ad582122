"""Draw curves for a report: interactive ones by plotly, and a picture of all panels by matplotlib."""

import html
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from fastdit.files import write_atomically
from fastdit.rundir.report_data import Curves

COLUMNS = 3  # of the picture
MOST_POINTS = 1_000  # of one curve
INSTALL = "pip install 'plotly>=6'"
COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f", "#475569", "#92400e")
DASHES = ("solid", "dash", "dot", "dashdot")
_STEPS = "~s"  # format of steps on an axis, such as 400k
_GRID, _TEXT = "#e5e7eb", "#4b5563"
_CONFIG = {"displayModeBar": False, "responsive": True}


def plotly_script() -> str | None:
    """Return plotly.js, or None if the package plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        return None
    return get_plotlyjs()


def thinned(values: Sequence[float]) -> list[int]:
    """Return at most MOST_POINTS + 2 of the indices of a curve's points, in their order.

    The curve is cut into equal parts by number of points. The lowest and the highest point of each part stay, as do the
    first and the last of the curve, so no spike is lost.
    """
    if len(values) <= MOST_POINTS:
        return list(range(len(values)))
    array = np.array(values)
    bounds = np.linspace(0, len(array), MOST_POINTS // 2 + 1).astype(int)
    chosen = {0, len(array) - 1}
    for first, end in pairwise(bounds):
        part = array[first:end]
        chosen |= {first + int(part.argmin()), first + int(part.argmax())}
    return sorted(chosen)


class Line(NamedTuple):
    """One curve of a panel.

    Args:
        label: its name, of any characters.
        points: (step, value).
        color, dash: how it is drawn, as plotly names them.
        hours: the hours of training at each point, if they are known.
    """

    label: str
    points: list[tuple[int, float]]
    color: str
    dash: str = "solid"
    hours: list[float] | None = None


def lines_of(curves: Curves) -> list[Line]:
    """Return the curves of one run's panel, each in a color of its own."""
    return [Line(label, points, COLORS[k % len(COLORS)]) for k, (label, points) in enumerate(curves.items())]


def plot(lines: Sequence[Line], name: str, *, legend: bool | None = None) -> str:
    """Return a panel as HTML for a page that holds plotly.js: curves against the step.

    Buttons choose a linear or logarithmic axis, and steps or hours where the hours of all curves are known. name: the
    id of the element. legend: whether to show the labels; None shows several.
    """
    import plotly.io

    # Draw the curves. Those of few points get markers, since a single point is invisible as a line.
    traces, hours = [], []
    for line in lines:
        kept = thinned([value for _, value in line.points])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines" if len(kept) > 60 else "lines+markers",
                "name": html.escape(line.label),
                "x": [line.points[k][0] for k in kept],
                "y": [line.points[k][1] for k in kept],
                "line": {"width": 1.8, "color": line.color, "dash": line.dash},
                "marker": {"size": 4},
            }
        )
        hours.append(line.hours and [line.hours[k] for k in kept])

    # Choose the axes and the buttons. A logarithmic axis is of use for positive values only.
    buttons = []
    if all(y > 0 for trace in traces for y in trace["y"]):
        kinds = {kind: [{"yaxis.type": kind}] for kind in ("linear", "log")}
        buttons.append(_buttons(kinds, "relayout", 1.0))
    if all(hours):
        by_step = [{"x": [trace["x"] for trace in traces]}, {"xaxis.tickformat": _STEPS}]
        by_hours = [{"x": hours}, {"xaxis.tickformat": "~g"}]
        buttons.append(_buttons({"step": by_step, "hours": by_hours}, "update", 0.72))
    axis = {"gridcolor": _GRID, "zeroline": False, "automargin": True, "exponentformat": "power"}
    layout = {
        "height": 280,
        "margin": {"l": 48, "r": 8, "t": 34, "b": 36},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": _TEXT},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "hovermode": "x unified",
        "hoverlabel": {"namelength": -1},
        "showlegend": len(traces) > 1 if legend is None else legend,
        "legend": {"orientation": "h", "y": -0.16, "x": 0},
        "xaxis": {**axis, "tickformat": _STEPS},
        "yaxis": axis,
        "updatemenus": buttons,
    }
    # Plotly's own check of a figure takes far longer than writing it.
    options = {"config": _CONFIG, "full_html": False, "include_plotlyjs": False, "include_mathjax": False}
    return plotly.io.to_html({"data": traces, "layout": layout}, **options, validate=False, div_id=name)


def _buttons(choices: dict[str, list], method: str, right: float) -> dict:
    """Return a row of plotly's buttons above a panel, whose right end is at the share `right` of the width."""
    return {
        "type": "buttons",
        "direction": "right",
        "x": right,
        "xanchor": "right",
        "y": 1.02,
        "yanchor": "bottom",
        "pad": {"r": 0, "t": 0, "b": 2},
        "font": {"size": 11},
        "bgcolor": "white",
        "bordercolor": _GRID,
        "showactive": True,
        "buttons": [{"label": label, "method": method, "args": args} for label, args in choices.items()],
    }


def draw_picture(panels: list[tuple[str, Curves]], path: Path) -> None:
    """Plot every panel against the step, COLUMNS in a row, into a PNG file."""
    # Plot each panel, and remove the empty places of the last row.
    shown = panels or [("no metrics yet", {})]
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
    for axis, (title, curves) in zip(axes.flat, shown):
        for label, points in curves.items():
            kept = [points[k] for k in thinned([value for _, value in points])]
            axis.plot(*zip(*kept), linewidth=1.2, label=label)
        if len(curves) > 1:
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
