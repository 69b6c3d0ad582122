"""`fastdit-report`: one run's report again, several runs on one page, and one line for each mistake."""

import os
from pathlib import Path

import pytest
from report_helpers import HOSTILE, Page, line, make_run

from fastdit.commands import report
from fastdit.errors import UserError
from fastdit.rundir.report_compare import unique_names


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Three runs: one that ended, one with more metrics and a name of markup, and one that has hardly begun."""
    home = tmp_path_factory.mktemp("runs")
    return [
        make_run(home / "a", [line(k, 1 / k) for k in (1, 2, 3)], steps=3, lr=0.5),
        make_run(home / "<b>", [line(k, 2, new_signal=0.0) for k in (2, 4)], grids=(2, 4), final=False, out=HOSTILE),
        make_run(home / "c", [], final=False),
    ]


def test_one_run(runs, capsys):
    report._report([str(runs[0])])
    assert capsys.readouterr().out == f"{runs[0] / 'report.html'}\n"
    assert "Finished: 3 steps" in Page((runs[0] / "report.html").read_text()).text


def test_several_runs_on_one_page(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    report._report([os.path.relpath(run) for run in runs])
    assert capsys.readouterr().out == "comparison.html\n"
    page = Page((tmp_path / "comparison.html").read_text())
    for text in ("3 runs compared", "Finished: 3 steps", "Stopped after step 4 of 400,000", "Stopped after step 0"):
        assert text in page.text
    assert all(link.startswith("data:") for link in page.links())
    assert len(page.links("img")) == 2, "the newest grid of each run that has one"
    plots = page.plots()
    assert [[curve["name"] for curve in plot] for plot in plots][:2] == [["a", "&lt;b&gt;"]] * 2
    assert [plot[0]["x"] for plot in plots[:1]] == [[1, 2, 3]]
    assert len({curve["line"]["color"] for plot in plots for curve in plot}) == 2, "a run has one color"
    assert [curve["name"] for curve in plots[-1]] == ["&lt;b&gt;"], "a signal of one run"
    rows = "".join(page.texts).split("Settings that differ")[1]
    assert "0.5" in rows
    assert HOSTILE not in rows, "the folder is no setting of the training"


def test_the_page_may_be_elsewhere(runs, tmp_path):
    before = (runs[1] / "report.html").exists()
    report._report([str(runs[1]), "--out", str(tmp_path / "new/page.html")])
    assert "Stopped after step 4" in (tmp_path / "new/page.html").read_text()
    assert (runs[1] / "report.html").exists() == before


def test_only_pages_of_this_command_are_replaced(runs, tmp_path):
    page, mine = tmp_path / "page.html", tmp_path / "mine.html"
    for _ in range(2):
        report._report([*map(str, runs), "--out", str(page)])
    mine.write_text("<!doctype html><p>mine")
    with pytest.raises(UserError, match=r"mine.html: is a file that was not made by this command; remove it"):
        report._report([*map(str, runs), "--out", str(mine)])
    assert mine.read_text() == "<!doctype html><p>mine"


def test_names_tell_runs_apart(tmp_path):
    assert unique_names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert unique_names([tmp_path / "one/run", tmp_path / "two/run"]) == ["one/run", "two/run"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "runs: must be given; --help tells what it is"),
        (["{home}/nowhere"], "nowhere: is no folder; name the folder of a run"),
        (["{home}"], "holds no run; name a folder with config.yaml and metrics.jsonl"),
        (["{a}", "{a}"], "a: is named more than once; name each run once"),
        (["{a}", "--out", "{a}/config.yaml/x.html"], "config.yaml"),
        (["{a}", "--out", "{a}/config.yaml"], "config.yaml: must end in .html"),
        (["{a}", "--outt", "x"], "--outt: no such setting; did you mean --out?"),
    ],
)
def test_each_mistake_is_one_line(runs, words, told):
    places = {"home": runs[0].parent, "a": runs[0]}
    with pytest.raises(UserError) as caught:
        report._report([word.format(**places) for word in words])
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
