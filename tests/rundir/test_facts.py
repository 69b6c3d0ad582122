"""Facts of a run: those of its start, and what stays of them when it resumes."""

import json

import pytest

from fastdit.parser import preset_names
from fastdit.rundir.facts import start_facts
from fastdit.rundir.run_files import FACTS


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], []),
        (["--lr", "1", "--preset", "quickstart"], ["quickstart"]),
        (["--preset=quickstart", "--preset", "imagenet256_b2"], ["quickstart", "imagenet256_b2"]),
    ],
)
def test_the_presets_of_a_command_line(argv, names):
    assert preset_names(argv) == names


def test_a_file_of_settings_is_named_for_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("lr: 1\n")
    assert preset_names(["--preset", "mine.yaml"]) == [str(tmp_path / "mine.yaml")]


def test_a_resumed_run_keeps_the_facts_of_its_first_start(tmp_path):
    argv = ["--local_rank=0", "--preset", "quickstart", "--out", "a b"]
    first = start_facts(tmp_path, argv, 0, 2, {"method": "dit"})
    assert first["command"] == "fastdit/train.py --preset quickstart --out 'a b'"
    assert (first["preset"], first["method"]) == ("quickstart", "dit")
    assert first["started"].endswith(", 2 ranks")
    (tmp_path / FACTS).write_text(json.dumps(first | {"trained": "all of it"}))

    second = start_facts(tmp_path, ["--resume", "--lr", "2"], 30, 1, {"method": "sd_dit"})
    assert {name: second[name] for name in ("command", "preset", "started")} == {
        name: first[name] for name in ("command", "preset", "started")
    }
    assert second["resumed"].startswith("after 30 steps, ")
    assert second["resumed"].endswith(", 1 rank: fastdit/train.py --resume --lr 2")
    assert second["method"] == "sd_dit"
    assert "trained" not in second
    assert start_facts(tmp_path, ["--resume", "--preset", "cifar10"], 30, 1, {})["preset"] == "cifar10"
