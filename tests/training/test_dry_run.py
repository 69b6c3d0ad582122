"""A dry run: its figures are those of the run that follows, and it leaves no trace."""

import hashlib
import os
import re
import shutil
import time
from collections import namedtuple
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from data_helpers import encode, picture
from launching import TINY, Outcome, checkpoint, deepspeed, forked, run

from fastdit import errors
from fastdit.errors import UserError
from fastdit.parser import dump, parse
from fastdit.rundir.shards import PieceReader
from fastdit.training import dry_run

launch = pytest.mark.launch
METHODS = {
    "dit": (),
    "sd_dit": ("--sd_dit.every", 2),
    "sadm": ("--sadm.psi_width", 16, "--sadm.psi_features", 16, "--sadm.psi_warm_steps", 3),
    "psi_align+sadm": ("--sadm.psi_width", 16, "--sadm.psi_features", 16, "--sadm.psi_warm_steps", 12),
}


def snapshot(folder: Path) -> dict[str, tuple]:
    """Mode, times and content of everything in a folder, and of the folder itself."""
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            path.stat().st_ctime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
        )
        for path in (folder, *folder.rglob("*"))
    }


def figures(text: str) -> dict[str, str]:
    """The figures that a dry run printed, by name. Each must be there once."""
    names = ("parameters", "data", "step", "time", "memory", "checkpoint", "disk")
    found = {name: re.findall(rf"^{name}: (.*)$", text, re.MULTILINE) for name in names}
    assert {len(lines) for lines in found.values()} == {1}, text
    assert "estimates from 20 steps" in text
    return {name: line for name, (line,) in found.items()}


def number(pattern: str, text: str) -> int:
    """The number, with commas in it, that a pattern's group matches."""
    return int(re.search(pattern, text)[1].replace(",", ""))


def written_bytes(path: Path) -> int:
    """Bytes of all tensors in a checkpoint: its safetensors without their headers and the 8 bytes before each."""
    files = list(path.rglob("*.safetensors"))
    return sum(file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files)


def check_against(shown: dict[str, str], out: Path, step: int) -> None:
    """Compare a dry run's figures with the checkpoint that the run wrote."""
    path = checkpoint(out, step)
    shapes = PieceReader(path / "shards").shapes("weights").values()
    assert number(r"^([\d,]+)$", shown["parameters"]) == sum(map(prod, shapes))
    assert number(r"\(([\d,]+) bytes", shown["checkpoint"]) == written_bytes(path)


@launch
@pytest.mark.parametrize("method", METHODS)
def test_shows_what_the_run_then_writes_and_leaves_no_trace(tmp_path, method):
    flags = [*TINY, "--method", method, *METHODS[method], "--steps", 6, "--save_every", 3, "--keep_checkpoints", 1]
    out = tmp_path / "missing" / "run"
    before = snapshot(tmp_path)
    text = forked(*flags, "--out", out, "--dry_run").succeeded().text
    assert snapshot(tmp_path) == before
    shown = figures(text)
    assert "10,000 samples; 6 steps are 0.0048 epochs" in shown["data"]
    assert "2 to write, of which 1 stay" in shown["checkpoint"]
    assert f"free in {tmp_path}" in shown["disk"]
    assert ("to prepare the method" in shown["time"]) == ("sadm" in method)
    assert f"steps 0 to 6 into {out} (a dry run: nothing is written)" in text
    forked(*flags, "--out", out).succeeded()
    check_against(shown, out, 6)


def launched(*flags, log: Path) -> Outcome:
    return run(deepspeed(*flags), log)


def beside(*flags, log: Path) -> Outcome:
    return forked(*flags, ranks=2)


@launch
@pytest.mark.parametrize(
    ("start", "method", "ds_config"), [(launched, "sd_dit", "zero2"), (beside, "sadm", "zero3")], ids=["zero2", "zero3"]
)
def test_two_ranks_agree(tmp_path, tmp_path_factory, start, method, ds_config):
    log, out = tmp_path_factory.mktemp("logs") / "log", tmp_path / "run"
    flags = [*TINY, "--method", method, *METHODS[method], "--steps", 2, "--ds_config", ds_config, "--out", out]
    before = snapshot(tmp_path)
    shown = figures(start(*flags, "--dry_run", log=log).succeeded().text)
    assert snapshot(tmp_path) == before
    assert "of 2 ranks" in shown["memory"]
    assert " a rank; 1 to write, of which 1 stay" in shown["checkpoint"]
    start(*flags, log=log).succeeded()
    check_against(shown, out, 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps with two checkpoints."""
    out = tmp_path_factory.mktemp("trained") / "run"
    forked(*TINY, "--steps", 4, "--save_every", 2, "--out", out).succeeded()
    return out


@launch
def test_a_resumed_run_stays_as_it_is(trained):
    before = snapshot(trained)
    text = forked("--resume", "--out", trained, "--steps", 9, "--dry_run", ranks=2).succeeded().text
    assert snapshot(trained) == before
    shown = figures(text)
    assert f"resumed {checkpoint(trained, 4)}" in text
    assert "for steps 4 to 9" in shown["time"]
    assert "3 to write, of which 2 stay" in shown["checkpoint"]  # of steps 6, 8 and 9
    # A weight that is cut between two ranks has its count of steps, 4 bytes, in the files of both.
    assert 0 < number(r"\(([\d,]+) bytes", shown["checkpoint"]) - written_bytes(checkpoint(trained, 4)) <= 8


@launch
def test_refuses_what_the_run_would_refuse_and_a_finished_run(trained, tmp_path):
    before = snapshot(trained)
    refused = forked(*TINY, "--steps", 4, "--out", trained, "--dry_run")
    assert (refused.code, "already holds a run" in refused.text) == (2, True)
    refused = forked("--resume", "--out", trained, "--dry_run")
    assert refused.code == 2
    assert f"error: --dry_run: {trained} has all of its 4 steps; give more --steps" in refused.text
    assert snapshot(trained) == before
    refused = forked("--resume", "--out", tmp_path / "none", "--dry_run")
    assert (refused.code, "holds no run to resume" in refused.text) == (2, True)


@launch
def test_a_folder_that_nobody_may_write_into(tmp_path):
    parent = tmp_path / "parent"
    parent.mkdir(mode=0o555)
    before = snapshot(parent)
    text = forked(*TINY, "--steps", 1, "--out", parent / "run", "--dry_run").succeeded().text
    assert snapshot(parent) == before
    assert figures(text)["step"]
    assert ("cannot be written" in text) == (not os.access(parent, os.W_OK))


@launch
def test_a_corrupt_image_ends_it_as_it_ends_the_run(tmp_path):
    for i in range(12):
        path = tmp_path / "data" / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encode(picture(33, 41, seed=i), "PNG")
        path.write_bytes(data[: len(data) // 2] if i == 7 else data)
    flags = [*TINY, "--data.source", tmp_path / "data", "--data.size", 14, "--data.channels", 3, "--steps", 9, "--out"]
    ended = [forked(*flags, tmp_path / name, *dry) for name, dry in (("dry", ["--dry_run"]), ("wet", []))]
    assert [outcome.code for outcome in ended] == [2, 2]
    dry, wet = (re.findall("^error: .*", outcome.text, re.MULTILINE) for outcome in ended)
    assert dry == wet
    assert "07.png" in dry[0]
    assert not (tmp_path / "dry").exists()


@launch
def test_names_steps_that_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setenv("POISONED_STEPS", "3")
    out = tmp_path / "run"
    text = forked(*TINY, "--steps", 80, "--out", out, "--dry_run", program="poison_loss").succeeded().text
    assert "step 13 is skipped: the loss is not finite in the micro-batch of rank 0" in text
    assert not out.exists()


@launch
def test_ends_as_the_run_whose_every_step_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("POISONED_STEPS", ",".join(map(str, range(1, 21))))
    flags = [*TINY, "--steps", 80, "--log_every", 1, "--out"]
    ended = [
        forked(*flags, tmp_path / name, *dry, program="poison_loss")
        for name, dry in (("dry", ["--dry_run"]), ("wet", []))
    ]
    assert [outcome.code for outcome in ended] == [2, 2]
    dry, wet = (re.findall("^error: [^;]*", outcome.text, re.MULTILINE) for outcome in ended)
    assert dry == wet
    assert "step 1: loss or gradient not finite, and so for 3 steps in a row (all skipped)" in dry[0]
    assert not (tmp_path / "dry").exists()


@launch
def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    for out, reason in (("file", "File exists"), ("file/run", "Not a directory")):
        ended = [forked(*TINY, "--steps", 1, "--out", tmp_path / out, *dry) for dry in (["--dry_run"], [])]
        assert [outcome.code for outcome in ended] == [2, 2]
        dry, wet = (re.findall("^error: .*", outcome.text, re.MULTILINE) for outcome in ended)
        assert dry == wet
        assert f"cannot write into {tmp_path / out} ({reason})" in dry[0]


def test_is_for_one_command_line(tmp_path):
    config = parse(["--preset", "quickstart", "--dry_run"])
    assert config.dry_run
    assert "dry_run" not in dump(config)
    (tmp_path / "mine.yaml").write_text("dry_run: true\n")
    for flags, words in (
        (["--preset", str(tmp_path / "mine.yaml")], "mine.yaml: dry_run: is no setting of a run"),
        (["--preset", "quickstart", "--dry_run", "--print_config"], "give one of the two"),
    ):
        with pytest.raises(UserError, match=words):
            parse(flags)


def test_says_that_the_disk_is_too_small(tmp_path, monkeypatch):
    """Ten checkpoints of 1 GB are to come, and three are there while one of them is written."""
    config = parse(["--steps", "100", "--save_every", "10", "--keep_checkpoints", "2"])
    planned = SimpleNamespace(config=config, folder=tmp_path / "run", runtime=SimpleNamespace(world=1))
    usage = namedtuple("usage", "free")
    for free, warned in ((2_999_999_999, True), (3_000_000_000, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda place, free=free: usage(free))
        lines = dry_run._describe_disk(planned, 10**9, 10**9, 0)
        assert ("warning" in lines) == warned
        assert "10 to write, of which 2 stay, and 3.0 GB at most at a time" in lines["checkpoint"]


@pytest.mark.parametrize(("count", "seen"), [(3, 3), (100, 1 + dry_run.TIMED)])
def test_a_long_preparation_is_timed_on_a_few_batches(count, seen):
    batches_seen = []

    def prepare(batches, steps, say):
        for _, batch in zip(range(count), batches):
            time.sleep(0.01 if batches_seen else 1)  # the first one takes a second
            batches_seen.append(batch)

    runtime = SimpleNamespace(device=torch.device("cpu"), agree=lambda values: values)
    config, method = SimpleNamespace(steps=7), SimpleNamespace(prepare=prepare)
    planned = SimpleNamespace(loader=iter(range(1000)), runtime=runtime, config=config, method=method)
    assert 1 <= dry_run._preparation_seconds(planned, count) < 50
    assert batches_seen == list(range(seen))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"),
            ": 2.50 GiB more are not",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 640 bytes."),
            ": 640 bytes more",
        ),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "out of memory; end what else"),
    ],
)
def test_memory_that_runs_out_is_one_line(capsys, monkeypatch, error, words):
    def fail(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr(errors, "_leave", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    with pytest.raises(SystemExit) as end:
        errors.run_command(fail, [])
    assert end.value.code == errors.EXIT_CODE
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert words in line
    assert "lower --micro_batch" in line
