"""The report of one run: what it shows, what it needs, and that no damaged file and no odd name spoils it."""

import base64
import io
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_helpers import HOSTILE, Page, draw, line, make_run, outside

from fastdit.errors import UserError
from fastdit.rundir import report, report_plots
from fastdit.rundir.report import LiveReport, embedded, spread, write_report
from fastdit.rundir.report_data import differences, panels, read_run
from fastdit.rundir.report_plots import MOST_POINTS, thinned
from fastdit.rundir.run_files import CURVES, FACTS, GRID, LOCK, METRICS, PLOTLY, REAL, REPORT, VERSIONS
from fastdit.rundir.run_lock import RunLock, trains

NAN, INF = float("nan"), float("inf")
PLAIN = [line(step, 1 / step) for step in (1, 2, 3)]


def page_of(folder: Path, **how) -> Page:
    return Page(write_report(folder, **how).read_text())


def test_the_report_is_one_whole_page(tmp_path):
    folder = make_run(tmp_path / "<b>run & co", PLAIN, out=HOSTILE, steps=3)
    source = write_report(folder, {HOSTILE: HOSTILE, "loss": "0.3"}, {"torch": HOSTILE}).read_text()
    page = Page(source)
    assert page.text.count(HOSTILE) == 3 + 1, "facts, version and configuration, readable"
    assert "<b>run & co" in page.text
    assert "alert" not in "".join(page.scripts)
    assert "<b>" not in outside(source)
    assert "Finished: 3 steps in 00:01 of training" in page.text


def test_the_final_page_needs_nothing_else(tmp_path):
    folder = make_run(tmp_path / "run", PLAIN, grids=(1, 2), steps=3)
    draw(folder / REAL, 90)
    (folder / PLOTLY).write_text("left by the live page")
    source = write_report(folder).read_text()
    page = Page(source)
    assert all(link.startswith("data:") for link in page.links())
    assert not any(sign in outside(source) for sign in ("http:", "https:", "@import", "url("))
    assert "plotly.js v" in "".join(page.scripts)
    assert not (folder / PLOTLY).exists()
    real, last, shown, *strip = page.links("img")
    assert [pixel(picture) for picture in (real, last, shown, *strip)] == [90, 200, 2, 1, 2]
    assert "location.reload" not in source


def pixel(link: str) -> int:
    kind, _, data = link.partition(",")
    assert kind == "data:image/png;base64"
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))[0, 0, 0])


def test_the_page_of_a_running_run_is_small_and_loads_itself_anew(tmp_path):
    folder = make_run(tmp_path / "run", PLAIN, grids=(1, 2), final=False, steps=30)
    draw(folder / REAL, 90)
    source = write_report(folder, live=True).read_text()
    page = Page(source)
    assert "Training: step 3 of 30, 00:13 left" in page.text
    assert "location.reload()" in source
    assert len(source) < 40_000
    links = page.links("img", "script")
    assert links[:3] == [PLOTLY, "real.png", "samples/step-00000002.png"]
    assert all((folder / link).is_file() for link in links)
    assert not (folder / CURVES).exists(), "that picture takes a second"
    assert len(page.plots()) == 4


def test_a_run_without_pictures_or_finite_numbers(tmp_path):
    page = page_of(make_run(tmp_path / "run", [line(1, None, grad_norm=NAN, odd=INF)], final=False))
    assert page.links("img") == []
    assert "loss" not in [curve["name"] for plot in page.plots() for curve in plot]
    assert "Stopped after step 1 of 400,000" in page.text


def test_a_run_without_metrics(tmp_path):
    page = page_of(make_run(tmp_path / "run", [], final=False))
    assert "No metrics yet." in page.text
    (tmp_path / "run" / METRICS).unlink()
    assert "No metrics yet." in page_of(tmp_path / "run").text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: holds no run; name a folder with config.yaml"):
        write_report(tmp_path)


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', "x\n", "\0\0"])
def test_damaged_metrics_are_left_out_and_named(tmp_path, tail):
    folder = make_run(tmp_path / "run", PLAIN)
    good = (folder / METRICS).read_text().splitlines()
    (folder / METRICS).write_text("\n".join([good[0], "{half", "[]", good[1], '{"step": "x"}', good[2], tail]))
    page = page_of(folder)
    assert f"{folder / METRICS}: lines that cannot be read are left out: 2, 3, 5" in page.text
    cut = f"{folder / METRICS}: its last line is cut off, and left out"
    assert (cut in page.text) == (not tail.endswith("\n"))
    assert page.plots()[0][0]["x"] == [1, 2, 3]


@pytest.mark.parametrize("name", ["eval.json", FACTS, VERSIONS, "config.yaml", GRID, REAL, "samples/step-00000002.png"])
def test_any_other_damaged_file_is_named_and_the_rest_is_shown(tmp_path, name):
    folder = make_run(tmp_path / "run", PLAIN, grids=(1, 2, 3), steps=3)
    (folder / name).write_bytes(b"{half \xff\xfe")
    page = page_of(folder)
    assert f"{folder / name}: " in page.text
    assert page.plots()[0][0]["x"] == [1, 2, 3]
    assert len(page.links("img")) >= 3


def test_a_run_of_an_older_version(tmp_path):
    """Its settings are fewer, or have other names; no file tells its command."""
    folder = make_run(tmp_path / "run", [{"step": 2, "loss": 1.0, "centre_norm": 3.0}], final=False)
    (folder / "config.yaml").write_text("lr: 0.5\nsteps: 2\nno_longer: 3\nmodel: {size: S, gone: [1, 2]}\n")
    page = page_of(folder)
    assert "Finished: 2 steps in unknown time" in page.text
    assert "What differs from the defaults" in page.text
    _, found = differences(read_run(folder))
    assert found == [
        ("lr", "0.0001", "0.5"), ("steps", "400000", "2"), ("no_longer", "none", "3"), ("model.gone", "none", "[1, 2]"),
    ]  # fmt: skip
    assert [plot[0]["name"] for plot in page.plots()] == ["loss", "patches"]


def test_what_differs_from_the_preset(tmp_path):
    from fastdit.parser import dump, parse

    folder = make_run(tmp_path / "run", PLAIN)
    (folder / "config.yaml").write_text(dump(parse(["--preset", "quickstart", "--lr", "0.5", "--out", "elsewhere"])))
    (folder / FACTS).write_text(json.dumps({"preset": "quickstart"}))
    assert differences(read_run(folder)) == ("preset quickstart", [("lr", "0.008", "0.5")])
    (folder / FACTS).write_text(json.dumps({"preset": "gone.yaml"}))
    where, found = differences(read_run(folder))
    assert where.startswith("the defaults, for --preset gone.yaml: no such preset")
    assert ("lr", "0.0001", "0.5") in found


def test_every_signal_has_a_panel_and_no_other_is_empty():
    plain = [{"step": step, "loss": step / 10, "images_per_sec": 10.0, "images": 3, "skipped": 0} for step in (1, 2)]
    assert panels(plain) == [
        ("loss", {"loss": [(1, 0.1), (2, 0.2)]}),
        ("images / s", {"images / s": [(1, 10), (2, 10)]}),
    ]
    own = {"discriminative_loss": 5.0, "teacher_entropy": 2.0, "cls_teacher_entropy": 3.0, "prototype_usage": 0.5}
    own |= {"new_signal": 1.0, "eval/new": 2.0, "skipped": 1}
    lines = [plain[0], plain[1] | own, {"step": 3, **own, "teacher_entropy": None}]
    found = dict(panels(lines))
    assert list(found)[2:] == [
        "discriminative loss", "teacher entropy (nats)", "share of prototypes in use", "new_signal", "new",
        "skipped steps",
    ]  # fmt: skip
    assert found["teacher entropy (nats)"] == {"patches": [(2, 2.0)], "class": [(2, 3.0), (3, 3.0)]}


def test_a_long_curve_keeps_its_extremes(tmp_path):
    values = np.random.default_rng(0).normal(size=7_777)
    values[[4_000, 5_000]] = 99, -99
    kept = thinned(values.tolist())
    assert MOST_POINTS / 2 < len(kept) <= MOST_POINTS + 2
    assert kept == sorted(set(kept))
    assert {0, 4_000, 5_000, 7_776} <= set(kept)
    assert thinned([3.0] * MOST_POINTS) == list(range(MOST_POINTS))
    page = page_of(make_run(tmp_path / "run", [line(k + 1, float(value)) for k, value in enumerate(values)]))
    assert "Curves of more than 1,000 points show the lowest and the highest point of each of 500 parts." in page.text
    assert max(page.plots()[0][0]["y"]) == 99


def test_without_plotly_the_curves_are_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(report_plots, "plotly_script", lambda: None)
    page = page_of(make_run(tmp_path / "run", PLAIN, steps=3))
    assert "The curves are a picture, for the package plotly is not installed: pip install 'plotly>=6'" in page.text
    assert page.plots() == []
    assert len(page.links("img")) == 2
    assert page_of(tmp_path / "run", live=True).links("script") == []


def test_grids_are_spread_and_large_pictures_made_smaller(tmp_path):
    assert spread(list(range(100)), 4) == [0, 33, 66, 99]
    assert spread([1, 2], 4) == [1, 2]
    noise = np.random.default_rng(0).integers(0, 256, (1500, 3000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    kind, _, data = embedded(tmp_path / "large.png", []).partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (report.MOST_PIXELS, report.MOST_PIXELS // 2)
    folder = make_run(tmp_path / "run", PLAIN, grids=tuple(range(1, 41)))
    page = page_of(folder)
    assert "24 of 40 grids, evenly spread" in page.text
    assert len(page.links("img")) == 1 + 1 + 24


def test_a_run_in_the_current_folder_has_a_name_too(tmp_path, monkeypatch):
    make_run(tmp_path / "mine", PLAIN)
    monkeypatch.chdir(tmp_path / "mine")
    assert "<h1>mine</h1>" in write_report(Path(".")).read_text()


def test_the_lock_tells_whether_a_run_trains(tmp_path):
    folder = make_run(tmp_path / "run", PLAIN, steps=30)
    assert not trains(folder)
    lock = RunLock(folder)
    lock.acquire()
    assert trains(folder)
    assert "Training: step 3 of 30" in page_of(folder).text
    elsewhere = page_of(folder, path=tmp_path / "copy.html")
    assert all(link.startswith("data:") for link in elsewhere.links()), "a page elsewhere holds everything"
    lock.release()
    assert "Stopped after step 3 of 30" in page_of(folder).text
    (folder / LOCK).write_text("[1]")
    assert not trains(folder)


@pytest.fixture
def writes(monkeypatch) -> list[dict]:
    """Record how the report is written, and let each write take a fifth of a second."""
    found = []

    def write(folder, *facts, **how):
        found.append(how)
        time.sleep(0.2)

    monkeypatch.setattr(report, "write_report", write)
    return found


def test_a_live_report_takes_a_small_share_of_the_time(tmp_path, writes, monkeypatch):
    monkeypatch.setattr(report, "LEAST_SECONDS", 0.5)
    live = LiveReport(tmp_path, print)
    assert writes == [{"live": True}]
    live.update(print)
    assert len(writes) == 1, "the first page has just been written"
    time.sleep(0.5)
    begun = time.monotonic()
    live.update(print)
    assert len(writes) == 2
    assert live.next_time - begun >= 20, "a hundred times as long as a write"
    live.update(print)
    assert len(writes) == 2
    live.end("Stopped", print)
    assert writes[2:] == [{"live": False, "status": "Stopped"}]


def test_the_final_page_is_not_written_over(tmp_path, writes):
    live = LiveReport(tmp_path, print)
    live.finish({"loss": "1"})
    live.end("Stopped", print)
    assert writes == [{"live": True}, {"live": False}]


def test_a_report_that_cannot_be_written_does_not_end_the_run(tmp_path):
    said = []
    live = LiveReport(tmp_path / "gone", said.append)
    live.update(said.append)
    live.end("Stopped", said.append)
    assert len(said) == 1
    assert said[0].startswith(f"warning: {tmp_path / 'gone' / REPORT}: cannot be written (")
    assert said[0].endswith("; the run goes on without it")


def test_how_a_run_ended_is_told(tmp_path):
    folder = make_run(tmp_path / "run", PLAIN, steps=30)
    LiveReport(folder, print).end("Stopped by an error: step 3: <no>", print)
    page = Page((folder / REPORT).read_text())
    assert "Stopped by an error: step 3: <no>" in page.text
    assert not (folder / PLOTLY).exists()
    assert not [name for name in os.listdir(folder) if name.startswith(".report")]
