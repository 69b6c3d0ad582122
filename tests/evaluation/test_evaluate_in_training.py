"""Evaluation during training: when it happens, what it leaves behind, and that training does not notice it."""

import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import TINY, checkpoint, forked, metrics
from report_helpers import Page
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastdit.config import Config, EvalConfig
from fastdit.rundir import eval_log
from fastdit.training import loop

pytestmark = pytest.mark.launch
TINY = [*TINY, "--sample.agreement", "0"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Path:
    """Four steps, an evaluation after every second; a checkpoint after each."""
    folder = tmp_path_factory.mktemp("watched") / "run"
    flags = ["--eval.every", 2, "--eval.n", 9, "--eval.n_real", 10, "--save_every", 1, "--keep_checkpoints", 9]
    forked(*TINY, "--steps", 4, *flags, "--out", folder).succeeded()
    return folder


def test_training_evaluates_at_its_interval(watched):
    records = eval_log.read(watched)
    assert [record["step"] for record in records] == [2, 4]
    assert records[0]["figures"]["FD-lite0"]["value"] != records[1]["figures"]["FD-lite0"]["value"]
    lines = [line for line in metrics(watched) if "eval/FD-lite0" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line, record in zip(lines, records):
        assert {k: v for k, v in line.items() if k != "step"} == eval_log.scalars(record)
    board = EventAccumulator(str(watched / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("eval/KID-lite0")] == [2, 4]
    page = Page((watched / "report.html").read_text())
    for text in ("floor: two halves of the real images", "last loss"):
        assert text in page.text
    (curve,) = next(plot for plot in page.plots() if plot[0]["name"] == "FD-lite0")
    assert curve["x"] == [2, 4]


def test_evaluating_leaves_training_as_it_was(watched, tmp_path):
    forked(*TINY, "--steps", 4, "--out", tmp_path / "run").succeeded()
    plain = metrics(tmp_path / "run", untimed=True)
    assert [line for line in metrics(watched, untimed=True) if "loss" in line] == plain


def test_a_resumed_run_evaluates_what_was_lost_and_nothing_twice(watched, tmp_path):
    folder = Path(shutil.copytree(watched, tmp_path / "run"))
    for step in (3, 4):
        shutil.rmtree(checkpoint(folder, step))
    mine = eval_log.read(folder)[-1] | {"checkpoint": "by hand"}
    eval_log.append(folder, mine)
    forked("--resume", "--out", folder).succeeded()
    before, after = eval_log.read(watched), eval_log.read(folder)
    assert [(record["step"], record["checkpoint"]) for record in after] == [(2, None), (4, "by hand"), (4, None)]
    assert after[2]["figures"] == before[1]["figures"]
    assert [line["step"] for line in metrics(folder) if "eval/FD-lite0" in line] == [2, 4]


def test_when_it_is_called_and_that_its_time_is_not_counted(monkeypatch):
    asked, seconds = [], []

    def evaluate(step: int) -> None:
        asked.append(step)
        time.sleep(0.2)

    monkeypatch.setattr(loop, "_prepare", lambda run: None)
    monkeypatch.setattr(loop, "train_step", lambda run, step: None)
    monkeypatch.setattr(loop, "_record", lambda run, clock, step: seconds.append(clock.read()[0]) or 1)
    monkeypatch.setattr(loop, "_save", lambda run, step: None)
    monkeypatch.setattr(loop, "StopRequest", lambda runtime: SimpleNamespace(granted=lambda: False))
    config = Config(steps=5, log_every=1, eval=EvalConfig(every=2))
    run = SimpleNamespace(config=config, runtime=None, recorder=None, report=None)
    assert loop.train(run, 0, None, evaluate)
    assert asked == [2, 4, 5]
    assert len(seconds) == 5
    assert sum(seconds) < 0.2


def test_training_says_at_once_what_an_evaluation_would_miss(tmp_path):
    ended = forked(*TINY, "--steps", 2, "--eval.every", 1, "--eval.weights", "/no.pth", "--out", tmp_path / "run")
    assert ended.code == 2
    assert "error: /no.pth: does not hold the network's weights" in ended.text
    assert not (tmp_path / "run/checkpoints").exists()
