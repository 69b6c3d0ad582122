"""One run at a time writes into a folder: the second is refused in one line, and a dead process holds nobody up."""

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
from launching import TINY, Launched, deepspeed, forked, metrics, python

from fastdit.errors import UserError
from fastdit.rundir import run_lock
from fastdit.rundir.run_files import LOCK
from fastdit.rundir.run_lock import RunLock

HOLD = "import os, time; from pathlib import Path; from fastdit.rundir.run_lock import RunLock\n"
HOLD += "lock = RunLock(Path({folder!r})); lock.acquire(); {then}"


def hold(folder, then: str) -> subprocess.Popen:
    """A process that locks the folder, and then runs `then`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD.format(folder=str(folder), then=then)])
    end = time.monotonic() + 60
    while not ((folder / ".lock").exists() and (folder / ".lock").read_text()) and time.monotonic() < end:
        time.sleep(0.01)
    return process


def test_a_second_process_is_told_who_holds_the_lock(tmp_path):
    process = hold(tmp_path, "time.sleep(60)")
    try:
        with pytest.raises(UserError) as caught:
            RunLock(tmp_path).acquire()
    finally:
        process.kill()
        process.wait()
    assert f"process {process.pid} on {socket.gethostname()} is training into it" in str(caught.value)
    assert "\n" not in str(caught.value)
    lock = RunLock(tmp_path)
    lock.acquire()  # the killed process is still named in the file
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    RunLock(tmp_path).acquire()


def test_a_child_that_outlives_the_owner_is_waited_for(tmp_path):
    process = hold(tmp_path, "time.sleep(1 if os.fork() == 0 else 0.3)")
    process.wait()
    begun = time.monotonic()
    RunLock(tmp_path).acquire()
    assert time.monotonic() - begun < run_lock.PATIENCE


def no_locks(*args) -> None:
    raise OSError(37, "No locks available")


def test_without_flock_the_life_of_the_owner_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.fcntl, "flock", no_locks)
    RunLock(tmp_path).acquire()
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
        RunLock(tmp_path).acquire()
    owner = json.loads((tmp_path / ".lock").read_text())
    (tmp_path / ".lock").write_text(json.dumps(owner | {"started": owner["started"] - 100}))  # a pid used again
    RunLock(tmp_path).acquire()
    (tmp_path / ".lock").write_text(json.dumps(owner | {"host": "elsewhere"}))
    with pytest.raises(UserError, match="on elsewhere is training into it"):
        RunLock(tmp_path).acquire()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3", "[" * 4096])
def test_a_garbled_file_is_nobodys(tmp_path, content):
    (tmp_path / ".lock").write_text(content)
    RunLock(tmp_path).acquire()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "x"):
        with pytest.raises(UserError, match=f"--out {path}: cannot write into"):
            RunLock(path).acquire()
    (tmp_path / ".lock").mkdir()
    with pytest.raises(UserError, match=r"\.lock: cannot be opened"):
        RunLock(tmp_path).acquire()


@pytest.mark.launch
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_run_ends_and_the_first_goes_on(tmp_path, ranks):
    """Case R3."""
    out = tmp_path / "run"
    slow = ["--sample_every", 1, "--sample.steps", 100, "--save_every", 1]
    command = deepspeed if ranks > 1 else lambda *flags: python("fastdit/train.py", *flags)
    with Launched(command(*TINY, *slow, "--steps", 3, "--out", out), tmp_path / "log") as launched:
        launched.until(lambda: "step 1/" in launched.text, "step 1")
        process = psutil.Process(launched.process.pid)
        first = [process, *process.children(recursive=True)]
        for each in first:
            each.suspend()
        second = forked(*TINY, "--steps", 9, "--resume", "--out", out, ranks=ranks)
        for each in first:
            each.resume()
        text = launched.wait().succeeded().text
    assert second.code == 2
    assert "Traceback" not in second.text
    (error,) = {line.removesuffix(" (rank 1)") for line in second.text.splitlines() if line.startswith("error: ")}
    assert f"on {socket.gethostname()} is training into it" in error
    assert "report:" in text
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]


def test_a_refused_start_leaves_no_trace(tmp_path):
    """And whoever waits for a lock that was withdrawn gets a new one, which excludes others."""
    lock = RunLock(tmp_path / "new")
    lock.acquire()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [LOCK]
    waiting = RunLock(tmp_path / "new")
    waiting._open()  # as one that has opened the file and not locked it yet
    lock.withdraw()
    assert not (tmp_path / "new").exists()
    assert not waiting._is_there()
    os.close(waiting.handle)

    (tmp_path / "mine").mkdir()
    lock = RunLock(tmp_path / "mine")
    lock.acquire()
    lock.withdraw()
    assert list((tmp_path / "mine").iterdir()) == []
