"""Reports in headless Chromium: they draw their curves, and write no error to the console."""

import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_helpers import HOSTILE, draw, line, make_run, outside

from fastdit.rundir.report import write_report
from fastdit.rundir.report_compare import write_comparison
from fastdit.rundir.run_files import REAL

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, which would render the pages")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--virtual-time-budget=5000",
]  # fmt: skip
ERROR = re.compile(r":CONSOLE[:(].*")


def rendered(page: Path, folder: Path) -> str:
    """Return the page's DOM after its scripts have run, without them. The console must be empty."""
    folder.mkdir()
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "--dump-dom", page.as_uri()]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert ended.returncode == 0, ended.stderr
    assert ERROR.findall(ended.stderr) == []
    return outside(ended.stdout)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Two runs, one of whose names and settings are markup."""
    home, found = tmp_path_factory.mktemp("runs"), []
    for name, factor in (("plain", 1), ("<b>bold & co", 2)):
        lines = [line(k, factor * math.exp(-k / 30), teacher_entropy=2.0, grad_norm=1 / k) for k in range(1, 100)]
        folder = make_run(home / name, lines, grids=(20, 40, 60), steps=100 if factor == 1 else 99, out=HOSTILE)
        draw(folder / REAL, 90)
        found.append(folder)
    return found


@pytest.mark.parametrize("live", [True, False])
def test_the_report_draws_its_curves(runs, tmp_path, live):
    dom = rendered(write_report(runs[1], {"<i>": HOSTILE}, live=live), tmp_path / "profile")
    assert dom.count('js-plotly-plot"') == 6
    assert dom.count('class="js-line"') >= 6, "a curve in each"
    assert re.search(r'<img id="shown"[^>]* src="(data:|samples/step-00000060.png")', dom)
    assert "&lt;b&gt;bold &amp; co" in dom
    assert "<b>" not in dom


def test_the_comparison_draws_a_curve_for_each_run(runs, tmp_path):
    dom = rendered(write_comparison(runs, tmp_path / "page.html"), tmp_path / "profile")
    assert dom.count('class="js-line"') >= 12
    assert len(re.findall(r'class="legendtext"[^>]*>(?:plain|&lt;b&gt;bold &amp; co)<', dom)) == 12
    assert ">log<" in dom
    assert ">hours<" in dom


def test_an_error_would_be_noticed(tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<!doctype html><script>nowhere()</script>")
    with pytest.raises(AssertionError, match="nowhere is not defined"):
        rendered(page, tmp_path / "profile")
