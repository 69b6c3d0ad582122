"""Metrics, TensorBoard, and the running means they are made of."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from fastdit.rundir import metrics_log
from fastdit.rundir.commit import commit_file
from fastdit.rundir.metrics_log import Recorder, read_metrics, versions
from fastdit.rundir.run_files import BOARD, METRICS
from fastdit.training.meter import Meter

NAN, INF = float("nan"), float("inf")


def values(loss: float, **more: float) -> dict[str, float]:
    return {"loss": loss, "images_per_sec": 10.0, "seconds_per_step": 0.1, **more}


def write(folder, first: int, last: int, end: int = 10) -> None:
    recorder = Recorder(folder, first, end)
    for step in range(first + 1, last + 1):
        recorder.advance()
        recorder.log(step, values(step / 10))
    recorder.close()


def steps(folder) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def scalars(folder, key: str) -> list[tuple[int, float]]:
    board = EventAccumulator(str(folder / BOARD))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(key)]


def test_lines_are_what_was_logged(tmp_path):
    write(tmp_path, 0, 3)
    assert read_metrics(tmp_path) == [{"step": step, **values(step / 10)} for step in (1, 2, 3)]


def test_a_resumed_run_forgets_what_it_does_again(tmp_path):
    write(tmp_path, 0, 6)
    recorder = Recorder(tmp_path, 4, 10)
    recorder.log(5, values(50.0))
    recorder.log(6, values(60.0))
    recorder.close()
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.1, 0.2, 0.3, 0.4, 50.0, 60.0]
    shown = scalars(tmp_path, "loss")
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5, 6]
    assert [value for _, value in shown] == pytest.approx([0.1, 0.2, 0.3, 0.4, 50.0, 60.0])


def test_a_restart_from_nothing_forgets_everything(tmp_path):
    write(tmp_path, 0, 6)
    write(tmp_path, 0, 2)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize("tail", ['{"step": 4, "lo', '{"step": 4}', "{", "\x00\x00", '{"loss": 3}\n', "\n\n"])
def test_a_last_line_cut_short_by_a_crash_is_dropped(tmp_path, tail):
    write(tmp_path, 0, 3)
    with (tmp_path / METRICS).open("a") as file:
        file.write(tail)
    recorder = Recorder(tmp_path, 3, 10)
    recorder.log(4, values(0.4))
    recorder.close()
    assert read_metrics(tmp_path) == [{"step": step, **values(step / 10)} for step in (1, 2, 3, 4)]


def test_what_is_not_finite_is_null_in_valid_json(tmp_path):
    recorder = Recorder(tmp_path, 0, 10)
    recorder.log(1, values(NAN, grad_norm=INF, other=-INF))
    recorder.close()
    (line,) = (tmp_path / METRICS).read_text().splitlines()

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(line, parse_constant=refuse) == values(None, grad_norm=None, other=None) | {"step": 1}


def test_every_line_is_on_disk_when_it_is_logged(tmp_path):
    recorder = Recorder(tmp_path, 0, 10)
    recorder.log(1, values(0.5))
    assert steps(tmp_path) == [1]
    recorder.close()


def test_tensorboard_holds_scalars_and_pictures(tmp_path):
    recorder = Recorder(tmp_path, 0, 10)
    recorder.log(3, values(0.25, grad_norm=2.0))
    picture = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    recorder.image(3, picture)
    recorder.close()
    assert scalars(tmp_path, "loss") == [(3, 0.25)]
    assert scalars(tmp_path, "grad_norm") == [(3, 2.0)]
    board = EventAccumulator(str(tmp_path / BOARD))
    board.Reload()
    (event,) = board.Images("samples")
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(event.encoded_image_string))), picture)


def test_tensorboard_holds_settings_with_final_figures(tmp_path):
    recorder = Recorder(tmp_path, 0, 10)
    recorder.log(10, values(0.25))
    settings = {"lr": 0.001, "resume": False, "steps": 10, "out": "runs/x", "batch": None, "betas": [0.9, 0.99]}
    recorder.summarize(10, settings, {"loss": 0.25, "eval/FID": 3.0, "bad": NAN})
    recorder.close()
    (file,) = (tmp_path / BOARD).iterdir()
    assert file.name.startswith("events")
    assert scalars(tmp_path, "final/loss") == [(10, 0.25)]
    board = EventAccumulator(str(tmp_path / BOARD)).Reload()
    assert "final/bad" not in board.Tags()["scalars"]
    told = {}
    for tag in ("experiment", "session_start_info"):
        content = board.SummaryMetadata(f"_hparams_/{tag}").plugin_data.content
        told[tag] = plugin_data_pb2.HParamsPluginData.FromString(content)
    start = told["session_start_info"].session_start_info.hparams
    assert (start["lr"].number_value, start["resume"].bool_value, start["steps"].number_value) == (0.001, False, 10)
    assert (start["batch"].string_value, start["betas"].string_value) == ("None", "[0.9, 0.99]")
    metrics = {info.name.tag for info in told["experiment"].experiment.metric_infos}
    assert metrics == {"final/loss", "final/eval/FID"}


def test_without_a_terminal_each_record_is_a_line(tmp_path, capsys):
    recorder = Recorder(tmp_path, 0, 10)
    recorder.log(4, values(0.25, mfu=0.416))
    recorder.say("hello")
    recorder.close()
    assert capsys.readouterr().out == "step 4/10  loss 0.2500  img/s 10  MFU 41.6%  left 00:00\nhello\n"


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path) == []


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A small repository with one commit, which `versions` takes for the checkout that fastdit runs from."""
    root = tmp_path / "checkout"
    files = {"benchmarks/records/cpu.json": "{}", "README.md": "", "kernels/adaln.py": "", "pyproject.toml": ""}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    author = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    monkeypatch.setattr(metrics_log, "__file__", str(root / "fastdit/rundir/metrics_log.py"))
    monkeypatch.delenv("FASTDIT_COMMIT", raising=False)
    return root


def copy_without_git(root: Path) -> None:
    """Leave what a copied checkout has: no .git, and the COMMIT that a wheelhouse brought."""
    text = commit_file(root)
    shutil.rmtree(root / ".git")
    (root / "COMMIT").write_text(text)


def test_a_commit_is_dirty_by_code_alone(repository):
    """Measuring writes records and pages into the repository, and must not spoil the next measurement's commit."""
    clean = versions()["commit"]
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    for name, dirty in (("benchmarks/records/cpu.json", ""), ("README.md", ""), ("kernels/adaln.py", "-dirty")):
        (repository / name).write_text("changed")
        assert versions()["commit"] == clean + dirty


def test_without_git_the_variable_then_the_file_name_the_commit(repository, monkeypatch):
    commit = versions()["commit"]
    copy_without_git(repository)
    assert re.fullmatch("[0-9a-f]{40}", (repository / "COMMIT").read_text().splitlines()[1])
    assert versions()["commit"] == commit
    monkeypatch.setenv("FASTDIT_COMMIT", " v1-3-gabc\n")
    assert versions()["commit"] == "v1-3-gabc"
    monkeypatch.setenv("FASTDIT_COMMIT", "")
    (repository / "COMMIT").unlink()
    assert versions()["commit"] == "unknown"


def test_git_goes_before_the_variable_and_the_file(repository, monkeypatch):
    commit = versions()["commit"]
    monkeypatch.setenv("FASTDIT_COMMIT", "other")
    (repository / "COMMIT").write_text("another\n")
    assert versions()["commit"] == commit


@pytest.mark.parametrize("broken", ["an empty .git", "no git on this machine"])
def test_a_git_that_does_not_answer_is_passed_over(repository, monkeypatch, broken):
    """Nor may a repository around the checkout answer for it."""
    (repository / "COMMIT").write_text("abc\n")
    if broken == "an empty .git":
        subprocess.run(["git", "init", "-q"], cwd=repository.parent, check=True)
        shutil.rmtree(repository / ".git")
        (repository / ".git").mkdir()
    else:
        monkeypatch.setenv("PATH", str(repository))
    assert versions()["commit"] == "abc"


def test_files_changed_after_the_copy_make_it_dirty(repository):
    commit = versions()["commit"]
    copy_without_git(repository)
    (repository / "benchmarks/records/cpu.json").write_text("[]")
    (repository / "README.md").unlink()
    (repository / "results.json").write_text("new files are not compared")
    assert versions()["commit"] == commit
    kernel = repository / "kernels/adaln.py"
    kernel.write_text("changed")
    assert versions()["commit"] == f"{commit}-dirty"
    kernel.write_text("")
    assert versions()["commit"] == commit
    kernel.unlink()
    assert versions()["commit"] == f"{commit}-dirty"


def test_a_copy_of_changed_code_says_dirty_once(repository):
    (repository / "kernels/adaln.py").write_text("changed before the copy")
    commit = versions()["commit"]
    copy_without_git(repository)
    assert versions()["commit"] == commit
    assert commit.endswith("-dirty")
    (repository / "kernels/adaln.py").write_text("and after it")
    assert versions()["commit"] == commit
    assert commit_file(repository) == (repository / "COMMIT").read_text(), "a copy of a copy keeps the checksums"


@pytest.mark.parametrize("text", [b"", b"\n", b"\xff\xfe"])
def test_a_damaged_commit_file_is_no_commit(repository, text):
    copy_without_git(repository)
    (repository / "COMMIT").write_bytes(text)
    assert versions()["commit"] == "unknown"


def test_an_installed_wheel_reads_no_file_beside_it(repository):
    """Its folder is site-packages, where a file COMMIT would be somebody else's."""
    copy_without_git(repository)
    (repository / "pyproject.toml").unlink()
    assert versions()["commit"] == "unknown"


def test_versions_name_what_a_figure_depends_on():
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "fastdit", "deepspeed", "nvidia-dali-cuda130", "commit", "cuda", "device"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())
    json.dumps(found)


# -- the meter --


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_means_are_over_every_micro_batch_and_start_anew():
    meter = Meter(torch.device("cpu"), 1)
    for step, (first, second) in enumerate([(1.0, 2.0), (4.0, 9.0)]):
        meter.add({"loss": scalar(first), "extra": scalar(-first)})
        meter.add({"loss": scalar(second), "extra": scalar(-second)})
        meter.step(scalar(0.0), step + 1)
    told = meter.read()
    assert told["loss"] == pytest.approx(4.0)
    assert told["extra"] == pytest.approx(-4.0)
    assert (told["skipped"], told["worst_streak"]) == (0, 0)
    meter.add({"loss": scalar(7.0)})
    meter.step(scalar(0.0), 3)
    assert meter.read()["loss"] == 7.0


def streaks(pattern: str, meter: Meter | None = None, first: int = 1) -> dict[str, float]:
    """Read after steps that were skipped where `pattern` has an x."""
    meter = meter or Meter(torch.device("cpu"), 1)
    for step, mark in enumerate(pattern, first):
        meter.add({"loss": scalar(1.0)})
        meter.step(scalar(float(mark == "x")), step)
    return meter.read()


@pytest.mark.parametrize(
    ("pattern", "skipped", "worst", "first"),
    [
        (".x.", 1, 1, 2),
        ("x.xxx", 4, 3, 3),
        ("xxxx", 4, 4, 1),
        ("xx.x", 3, 2, 1),
        ("x.xx.x", 4, 2, 3),
    ],
)
def test_the_longest_streak_and_its_first_step(pattern, skipped, worst, first):
    told = streaks(pattern)
    assert (told["skipped"], told["worst_streak"], told["first_bad"]) == (skipped, worst, first)


def test_a_streak_goes_on_over_a_read_and_ends_with_a_good_step():
    meter = Meter(torch.device("cpu"), 1)
    assert streaks(".xx", meter)["worst_streak"] == 2
    told = streaks("x..", meter, first=4)
    assert (told["worst_streak"], told["first_bad"], told["skipped"]) == (3, 2, 3)
    assert streaks("..x", meter, first=7)["worst_streak"] == 1
