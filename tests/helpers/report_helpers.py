"""Look into pages that fastdit writes, and make the folder of a run without training one."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from fastdit.config import Config
from fastdit.parser import dump
from fastdit.rundir.run_files import GRID, METRICS, grid_file

HOSTILE = "<script>alert(1)</script>&amp; \"q\" 'x' </script>"
CLOSED = ("html", "head", "body", "style", "script", "table", "pre", "h1", "h2", "h3", "title", "div", "figure")


class Page(HTMLParser):
    """Hold the texts, attributes and scripts of a page, and check that every tag that must be closed is."""

    def __init__(self, source: str):
        super().__init__()
        self.texts, self.attributes, self.scripts, self.open = [], [], [], []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag in CLOSED:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in CLOSED:
            assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if "script" in self.open else self.texts).append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def links(self, *tags: str) -> list[str]:
        """Return all that the page loads, or only what tags of these names load."""
        return [
            value
            for tag, key, value in self.attributes
            if key in ("src", "href", "data", "action", "srcset") and (not tags or tag in tags)
        ]

    def plots(self) -> list[list[dict]]:
        """Return the curves of each panel, as plotly gets them."""
        found = []
        for script in self.scripts:
            if "Plotly.newPlot(" in script and "plotly.js v" not in script:
                start = script.index("[{", script.index("Plotly.newPlot("))
                found.append(json.JSONDecoder().raw_decode(script[start:])[0])
        return found


def line(step: int, loss: float | None, **more: float) -> dict:
    """Return a line of metrics."""
    rates = {"images_per_sec": 10.0, "seconds_per_step": 0.5, "seconds": step / 2, "lr": 0.1, "memory_gb": 1.5}
    return {"step": step, "loss": loss, **rates, **more}


def make_run(folder: Path, lines: list[dict], *, grids: tuple[int, ...] = (), final: bool = True, **settings) -> Path:
    """Write the folder of a run with these lines of metrics, sample grids and settings, and return it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(Config(**settings)))
    (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in grids:
        grid_file(folder, step).parent.mkdir(exist_ok=True)
        draw(grid_file(folder, step), step)
    if final:
        draw(folder / GRID, 200)
    return folder


def draw(path: Path, level: int) -> None:
    """Write a gray picture, 5x6."""
    Image.fromarray(np.full((5, 6, 3), level % 256, np.uint8)).save(path)


def outside(source: str) -> str:
    """Return a page without the content of its scripts and pictures."""
    return re.sub(r"<script>.*?</script>", "", re.sub(r"base64,[A-Za-z0-9+/=]+", "", source), flags=re.DOTALL)
