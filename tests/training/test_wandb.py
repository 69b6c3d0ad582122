"""Training with Weights & Biases: what is sent, that a resumed run goes on with the same one, and how it is stopped."""

import json
import signal

import pytest
import wandb_files
from launching import TINY, Launched, deepspeed, forked, metrics, run
from test_stop import stopped, to_group

from fastdit.rundir.run_lock import trains

pytestmark = pytest.mark.launch
FLAGS = [*TINY, "--sample.agreement", 0, "--sample_every", 4, "--sample.max_classes", 2, "--wandb", "team/project"]
FLAGS += ["--eval.every", 40, "--eval.n", 8, "--eval.n_real", 10, "--save_every", 1000, "--steps", 40]


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """Keep what the library would send, and its settings, in the test's folder."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))


def test_a_run_that_is_stopped_and_resumed_is_one_run(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    with Launched(deepspeed(*FLAGS, "--out", folder), log) as launched:
        launched.until(lambda: "W&B: offline" in launched.text, "the library's start")
        stopped(launched, folder, 6, to_group(signal.SIGTERM))
    assert not trains(folder)
    assert "Stopped; --resume goes on" in (folder / "report.html").read_text()
    text = run(deepspeed("--resume", "--out", folder), log).succeeded().text
    assert "wandb: " not in text, "the library says nothing itself"

    # The launcher ended wandb-core, which was started once more to keep what it had lost.
    records = [record for session in wandb_files.sessions(folder) for record in session]
    runs = [record.run for record in records if record.HasField("run")]
    assert len({run.run_id for run in runs}) == 1
    assert (runs[0].entity, runs[0].project, runs[0].display_name) == ("team", "project", "run")
    assert json.loads((folder / "wandb.json").read_text())["id"] == runs[0].run_id
    config = {item.key: item.value_json for item in runs[0].config.update}
    assert (config["model.width"], config["data.source"]) == ("32", '"fashion_mnist"')

    lines = wandb_files.history(records)
    sent = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert sent == {line["step"]: line["loss"] for line in metrics(folder) if "loss" in line}
    assert [line["step"] for line in lines if "eval/FD-lite0" in line] == [40]
    assert {line["step"] for line in lines if "samples._type" in line} == set(range(4, 41, 4))
    assert {line["step"] for line in lines if "training images._type" in line} == {0}
    assert len(list(folder.glob("wandb/offline-run-*/files/media/images/*.png"))) >= 11
    summary = [record.summary for record in records if record.WhichOneof("record_type") == "summary"]
    assert {"final/loss", "final/eval/FD-lite0"} <= {item.key for part in summary for item in part.update}


def test_a_missing_package_ends_the_run_before_it_begins(tmp_path):
    ended = forked(*FLAGS, "--out", tmp_path / "run", program="without_wandb")
    assert ended.code == 2
    (error,) = [line for line in ended.text.splitlines() if line.startswith("error: ")]
    assert error == (
        "error: wandb: the package wandb is not installed; pip install 'fastdit[wandb]', or leave out --wandb"
    )
    assert not (tmp_path / "run").exists()
    forked(*TINY, "--steps", 1, "--out", tmp_path / "run", program="without_wandb").succeeded()
