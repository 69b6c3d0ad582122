"""Weights & Biases, by the real library: what it keeps, and that no trouble with it reaches training."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import wandb_files
from log_to_wandb import START_SECONDS

from fastdit.errors import UserError
from fastdit.rundir import wandb_run
from fastdit.wandb_settings import WandbSettings

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "tests/programs/log_to_wandb.py"
KEY = "0123456789" * 4  # of the form that the library asks for


def log_lines(folder: Path, trouble: str = "none", **variables: str) -> dict:
    """Return what the program tells. Nothing else may be on its stderr, and no process may be left."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("WANDB_")}
    variables = {"HOME": str(folder), "PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, PROGRAM, folder, trouble]
    ended = subprocess.run(command, env=kept | variables, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    *others, told = ended.stdout.splitlines()
    assert others == []
    assert not left_processes(folder), "wandb-core is left"
    return json.loads(told)


def left_processes(folder: Path) -> list:
    """Return the processes of the library whose home is this test's folder, after some seconds to end."""
    end = time.monotonic() + 15
    while True:
        found = []
        for process in psutil.process_iter(["name"]):
            try:
                if process.info["name"] == "wandb-core" and process.environ().get("HOME") == str(folder):
                    found.append(process)
            except psutil.Error:
                continue
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def test_an_offline_run_is_kept_on_disk(tmp_path):
    told = log_lines(tmp_path, WANDB_MODE="offline")
    assert told["handlers"]
    assert told["longest"] < START_SECONDS, "no call waits for W&B"
    first, last = told["messages"]
    assert first == f"W&B: offline, into {tmp_path / 'wandb'}"
    assert last.startswith(
        f"W&B: the run is kept on disk; upload it later with: wandb sync {tmp_path}/wandb/offline-run"
    )
    assert Path(last.split()[-1]).is_dir()
    (records,) = wandb_files.sessions(tmp_path)
    assert [line["step"] for line in wandb_files.history(records)] == list(range(50))
    assert wandb_files.history(records)[1]["loss"] == 0.5
    run = wandb_files.run_of(records)
    assert (run.project, run.entity, run.display_name) == ("project", "", tmp_path.name)
    config = {item.key: item.value_json for item in run.config.update}
    assert (config["lr"], config["model.depth"]) == ("0.1", "2")


@pytest.mark.parametrize("trouble", ["SIGTERM", "SIGSTOP"])
def test_trouble_with_the_librarys_process(tmp_path, trouble):
    """Its death, as by a launcher that is stopped: nothing is lost. Or a wandb-core that never answers again."""
    told = log_lines(tmp_path, trouble, WANDB_MODE="offline")
    assert told["longest"] < START_SECONDS, "no call waits for W&B"
    assert told["end"] < 30
    assert told["handlers"]
    warnings = [line for line in told["messages"] if line.startswith("warning: W&B")]
    assert bool(warnings) == (trouble == "SIGSTOP"), told
    if trouble == "SIGTERM":
        sessions = wandb_files.sessions(tmp_path)
        runs = {record.run.run_id for records in sessions for record in records if record.HasField("run")}
        assert len(runs) == 1
        lines = [line for records in sessions for line in wandb_files.history(records)]
        assert {line["step"] for line in lines} == set(range(50))


@contextmanager
def silent_server():
    """Yield the address of a server that takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("answers", [False, True])
def test_a_server_that_cannot_be_reached(tmp_path, answers):
    """The run goes on at once, and is kept on disk."""
    with silent_server() as address:
        place = address if answers else "http://127.0.0.1:9"
        told = log_lines(tmp_path, WANDB_BASE_URL=place, WANDB_API_KEY=KEY, WANDB_NAME="mine")
    assert told["longest"] < START_SECONDS, "no call waits for W&B"
    assert told["end"] < 20
    assert len(told["messages"]) == 2, told["messages"]
    first, last = told["messages"]
    assert first.startswith("warning: W&B cannot be reached (")
    assert first.endswith(f"); the run goes on, and its files for W&B go into {tmp_path / 'wandb'}")
    assert last.startswith("W&B: the run is kept on disk; upload it later with: wandb sync")
    records = wandb_files.sessions(tmp_path)[-1]
    assert [line["step"] for line in wandb_files.history(records)] == list(range(50))
    assert wandb_files.run_of(records).display_name == "mine"


def test_a_missing_login_is_told_at_once(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    command = [sys.executable, "-c", CHECK]
    environment = dict(os.environ) | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert "wandb: no login is found on this machine; run `wandb login`, set WANDB_API_KEY, or" in ended.stdout
    ended = subprocess.run(command, env=environment | {"WANDB_MODE": "offline"}, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("fine\n", "")


CHECK = """
from fastdit.errors import UserError
from fastdit.rundir.wandb_run import check
from fastdit.wandb_settings import WandbSettings
try:
    check(WandbSettings("project"))
    print("fine")
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("folder", [False, True])
def test_a_missing_package_is_told_with_the_command(tmp_path, monkeypatch, folder):
    """A folder of that name, such as the library makes, can be imported as a package without content."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    if folder:
        (tmp_path / "wandb").mkdir()
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
        monkeypatch.setattr(sys, "path_importer_cache", {})
    else:
        monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"package wandb is not installed; pip install 'fastdit\[wandb\]', or leave"):
        wandb_run.check(WandbSettings("project"))
    wandb_run.check(WandbSettings())


@pytest.mark.parametrize("name", ["", "a/b/c", "/a", "a/", "a b?", "x" * 129, "a\nb", " "])
def test_a_project_that_cannot_be(name):
    with pytest.raises(UserError, match=r"^wandb: .* names no project; give PROJECT or ENTITY/PROJECT"):
        WandbSettings(name).check_wandb()


def test_a_damaged_id_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run.WandbRun, "_work", lambda self, config: None)
    for text in ("", "[]", "{", '{"id": 3, "entity": null, "project": "p"}', "[" * 100_000):
        (tmp_path / "wandb.json").write_text(text)
        made = wandb_run.WandbRun(tmp_path, WandbSettings("p"), {})
        assert json.loads((tmp_path / "wandb.json").read_text())["id"] == made.identity
        assert wandb_run.WandbRun(tmp_path, WandbSettings("p"), {}).identity == made.identity
    assert wandb_run.WandbRun(tmp_path, WandbSettings("team/p"), {}).identity != made.identity


def test_a_full_queue_leaves_lines_out(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_run.WandbRun, "_work", lambda self, config: time.sleep(1))
    monkeypatch.setattr(wandb_run, "MOST_WAITING", 3)
    run = wandb_run.WandbRun(tmp_path, WandbSettings("p"), {})
    for step in range(5):
        run.log(step, {"loss": 1.0})
    run._queue.get()
    run.close()
    assert run.take_messages() == ["warning: W&B was too slow; 2 entries are missing there"]
