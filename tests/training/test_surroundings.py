"""A full disk, a folder that is removed, odd names and damaged files end in one line that names the file."""

import errno
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from launching import TINY, Launched, checkpoint, forked, metrics, python

from fastdit.errors import UserError, explain
from fastdit.files import plain_path, write_atomically, writing
from fastdit.parser import load
from fastdit.rundir import eval_log
from fastdit.rundir.checkpoint_files import damage
from fastdit.rundir.metrics_log import Recorder, read_metrics
from fastdit.rundir.report import check_files

QUICK = [*TINY, "--sample.agreement", "0", "--sample.max_classes", 1, "--save_every", 2]
DEEP = "[" * 100_000
BOMB = "a0: &a0 [1, 1]\n" + "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]\n" for k in range(1, 20))


def one_line(outcome) -> str:
    """The error of a command that ended with code 2 and without a traceback."""
    assert outcome.code == 2, outcome.text
    assert "Traceback" not in outcome.text, outcome.text
    (line,) = (line for line in outcome.text.splitlines() if line.startswith("error: "))
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps, in a folder whose name is a pattern."""
    folder = tmp_path_factory.mktemp("trained") / "glob[1]*?"
    forked(*QUICK, "--steps", 2, "--out", folder).succeeded()
    return folder


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 450 kB, where this process may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=450k", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.launch
def test_a_name_with_characters_of_patterns(trained, tmp_path):
    """Case R12."""
    folder = shutil.copytree(trained, tmp_path / trained.name)
    forked("--resume", "--out", folder, "--steps", 3).succeeded()
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    forked("--run", folder, "--out", tmp_path / "x.pt", program="fastdit.export").succeeded()


@pytest.mark.launch
def test_a_full_disk_while_a_checkpoint_is_written(small_disk):
    """Case R5."""
    flags = ["--model.width", 16, "--model.depth", 1, "--save_every", 1, "--keep_checkpoints", 9, "--steps", 9]
    error = one_line(forked(*QUICK, *flags, "--out", small_disk / "run"))
    assert str(small_disk / "run") in error
    assert "(No space left on device); free some space, and run the command again" in error
    left = sorted((small_disk / "run/checkpoints").iterdir())
    assert left
    assert [damage(path) for path in left] == [None] * len(left)


@pytest.mark.launch
def test_a_folder_that_is_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("CUT_AT", "step 1")
    monkeypatch.setenv("CUT_BY", "REMOVE")
    folder = tmp_path / "run"
    flags = [*QUICK, "--steps", 3, "--log_every", 9, "--out", folder]
    error = one_line(forked(*flags, program="cut_short"))
    assert error.startswith(f"error: {folder}: was removed or renamed while the run trained into it; move it back")
    assert not folder.exists()


def test_metrics_on_a_full_disk(tmp_path):
    recorder = Recorder(tmp_path, 0, 1)
    recorder.file.close()
    recorder.file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match=rf"{tmp_path}/metrics.jsonl: .* \(No space left on device\); free some space"):
        recorder.figures(1, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        recorder.file.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_the_old_file_stays_when_the_new_one_cannot_be_written(tmp_path, number):
    path = tmp_path / "eval.json"
    path.write_text("old")

    def fail() -> None:
        with write_atomically(path) as temporary:
            temporary.write_text("half")
            raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=rf"{path}: .*{os.strerror(number)}"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_mistakes_in_the_code_are_not_explained(tmp_path):
    for mistake in (FileNotFoundError(errno.ENOENT, "no", str(tmp_path / "x")), OSError("what"), RuntimeError("shape")):
        with pytest.raises(type(mistake)), writing(tmp_path / "y"):
            raise mistake
    assert explain(PermissionError(errno.EACCES, "no")) is None
    assert "ports" in str(explain(PermissionError(errno.EACCES, "no", "ports")))
    with pytest.raises(UserError, match="its folder was removed"), writing(tmp_path / "gone" / "x"):
        (tmp_path / "gone" / "x").write_text("")
    with pytest.raises(UserError, match="its folder was removed"), writing(tmp_path / "gone" / "x"):
        torch.save({}, tmp_path / "gone" / "x")


def test_a_path_without_characters_of_patterns(tmp_path):
    with plain_path(tmp_path) as path:
        assert path == tmp_path
    (tmp_path / "a[1]*").mkdir()
    with plain_path(tmp_path / "a[1]*") as path:
        assert path.samefile(tmp_path / "a[1]*")
        assert not set("[]*?") & set(str(path))
    assert not path.exists()


@pytest.mark.parametrize(
    "text",
    ["x", DEEP, "[1]", '{"step": "1"}', '{"step": 1, "loss": "high"}', '{"step": 1, "a": [1]}', "\0\xff", "{}"],
)
def test_damaged_metrics(tmp_path, text):
    good = '{"step": 1, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(f"{good}{text}\n{good}", encoding="latin-1")
    with pytest.raises(UserError, match=r"metrics.jsonl: line 2 is no line of metrics; remove that line"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(good + text, encoding="latin-1")
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]  # what a crash may leave


RECORD = {"step": 1, "checkpoint": None, "figures": {"FID": {"value": 1.0}}}


@pytest.mark.parametrize("text", ["", DEEP, "{}", "[1]", "[{}]", json.dumps([RECORD]), "\xff\xfe", "[null]"])
def test_damaged_evaluations(tmp_path, text):
    (tmp_path / "eval.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"eval.json: .*; move it away"):
        eval_log.read(tmp_path)


@pytest.mark.parametrize("text", ["", DEEP, "[]", '{"torch": 2}', '{"torch": {"a": 1}}', "\xff\xfe", '{"torch": "2'])
@pytest.mark.parametrize("name", ["versions.json", "facts.json"])
def test_damaged_facts(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=rf"{name}: .*; remove it"):
        check_files(tmp_path)


@pytest.mark.parametrize(
    "text", ["", DEEP, BOMB, "a: &a [*a]", "\xff\xfe", "\0", "steps: {a: 1}", "[1]", "steps: " + DEEP]
)
def test_damaged_settings(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text, encoding="latin-1")
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(tmp_path / "config.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/config.yaml: ")
    assert len(str(caught.value)) < 1000
    assert time.monotonic() - begun < 10


@pytest.mark.launch
@pytest.mark.parametrize(
    ("command", "name", "text"),
    [
        ("train", "metrics.jsonl", "x\n{}\n"),
        ("train", "eval.json", DEEP),
        ("evaluate", "versions.json", "[]"),
        ("sample", "config.yaml", BOMB),
        ("export", "config.yaml", DEEP),
    ],
)
def test_commands_name_the_damaged_file(trained, tmp_path, command, name, text):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / name).write_text(text)
    flags = ["--resume", "--steps", 4, "--out", folder] if command == "train" else ["--run", folder]
    flags += {"evaluate": ["--n", 4, "--device", "cpu"], "export": ["--out", tmp_path / "x.pt"]}.get(command, [])
    assert f"{folder / name}: " in one_line(forked(*flags, program=f"fastdit.{command}"))
    assert damage(checkpoint(folder, 2)) is None


@pytest.mark.launch
def test_ctrl_c_while_modules_are_imported(tmp_path):
    with Launched(python("fastdit/train.py", *QUICK, "--out", tmp_path / "run"), tmp_path / "log") as launched:
        maps = f"/proc/{launched.process.pid}/maps"
        launched.until(lambda: "libtorch_python" in open(maps).read(), "torch")  # noqa: SIM115
        launched.process.send_signal(signal.SIGINT)
        outcome = launched.wait()
    assert (outcome.code, outcome.text) == (130, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.launch
def test_ctrl_c_while_the_run_is_built(tmp_path, monkeypatch):
    monkeypatch.setenv("CUT_AT", "build 0")
    monkeypatch.setenv("CUT_BY", "SIGINT")
    outcome = forked(*QUICK, "--out", tmp_path / "run", program="cut_short")
    assert outcome.code == 130
    assert "Traceback" not in outcome.text
    assert not (tmp_path / "run").exists()
