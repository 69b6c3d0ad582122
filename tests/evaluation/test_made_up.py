"""A run that was killed or stopped between a checkpoint and what follows it makes up for that when it resumes."""

import shutil
import signal
from pathlib import Path

import pytest
from launching import TINY, checkpoint, forked, metrics

from fastdit.rundir import eval_log
from fastdit.rundir.run_files import grid_file

pytestmark = pytest.mark.launch
FLAGS = [*TINY, "--sample.agreement", "0", "--sample.max_classes", 2, "--steps", 4, "--save_every", 2]
FLAGS += ["--sample_every", 2, "--eval.every", 2, "--eval.n", 14, "--eval.n_real", 10, "--keep_checkpoints", 9]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of the run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    forked(*FLAGS, "--out", folder).succeeded()
    return folder


def assert_same_results(mine: Path, whole: Path) -> None:
    """Metrics, evaluations and pictures are equal; dates and times apart."""
    assert metrics(mine, untimed=True) == metrics(whole, untimed=True)
    a, b = ([{k: v for k, v in record.items() if k != "date"} for record in eval_log.read(x)] for x in (mine, whole))
    assert a == b
    assert len(a) == 2
    for path in (grid_file(whole, 2), whole / "samples.png"):
        assert (mine / path.relative_to(whole)).read_bytes() == path.read_bytes()
    assert "location.reload" not in (mine / "report.html").read_text()


@pytest.mark.parametrize("moment", ["grid 2", "figures 2", "evaluation 4"])
def test_a_kill_after_a_checkpoint(whole, tmp_path, monkeypatch, moment):
    """Case R10."""
    monkeypatch.setenv("CUT_AT", moment)
    folder = tmp_path / "run"
    assert forked(*FLAGS, "--out", folder, program="cut_short").code == -signal.SIGKILL
    assert checkpoint(folder, int(moment.split()[1])).is_dir()
    assert "location.reload" in (folder / "report.html").read_text(), "the page of a run that trains"
    forked("--resume", "--out", folder).succeeded()
    assert_same_results(folder, whole)


@pytest.mark.parametrize(("moment", "ranks"), [("batch 2", 1), ("evaluation 2", 2)])
def test_a_stop_in_the_middle_of_them(whole, tmp_path, monkeypatch, moment, ranks):
    """SIGTERM is noticed between two batches, and the checkpoint of the step is there."""
    monkeypatch.setenv("CUT_AT", moment)
    monkeypatch.setenv("CUT_BY", "SIGTERM")
    folder = tmp_path / "run"
    text = forked(*FLAGS, "--out", folder, ranks=ranks, program="cut_short").succeeded().text
    assert f"stopped by SIGTERM after step 2; saved {checkpoint(folder, 2)}; go on with --resume" in text
    assert eval_log.read(folder) == []
    assert grid_file(folder, 2).exists()
    text = forked("--resume", "--out", folder, ranks=ranks).succeeded().text
    assert [record["step"] for record in eval_log.read(folder)] == [2, 4]
    if ranks == 1:
        assert_same_results(folder, whole)


def test_what_was_not_due_is_not_made(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    forked("--resume", "--out", folder, "--steps", 5, "--eval.every", 3, "--sample_every", 3).succeeded()
    assert [record["step"] for record in eval_log.read(folder)] == [2, 4, 5]
    assert [path.name for path in (folder / "samples").iterdir()] == ["step-00000002.png"]
