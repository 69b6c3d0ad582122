"""The commands that a run suggests at its end: each is copied into a shell, and works."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from launching import SCRIPTS, TINY, Launched, forked

from fastdit.evaluation import next_commands as module
from fastdit.evaluation.next_commands import next_commands, picture_hint


def suggestions(text: str) -> list[str]:
    """Return the suggested commands in a run's output."""
    return re.findall(r"^  (\S.*?)   # ", text, re.MULTILINE)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run in a folder with spaces, started in another folder than the clone; and what it suggests."""
    folder = tmp_path_factory.mktemp("working folder") / "it's a run"
    outcome = forked(*TINY, "--sample.agreement", "0", "--steps", "2", "--out", folder).succeeded()
    return folder, suggestions(outcome.text)


def test_four_commands_are_suggested(run):
    folder, commands = run
    words = [[Path(word).name for word in shlex.split(command)] for command in commands]
    programs = [next(w for w in line if w.startswith(("sample", "evaluate", "train", "tensor"))) for line in words]
    assert programs == ["sample.py", "evaluate.py", "train.py", "tensorboard"]
    assert all(folder.name in line for line in words)


# Later flags win: the evaluation is made small.
@pytest.mark.launch
@pytest.mark.parametrize(
    ("number", "smaller"), [(0, "--n 2 --steps 2 --out {grid}"), (1, "--n 8 --n_real 20"), (2, "--steps 3")]
)
def test_a_copied_command_works(run, tmp_path, number, smaller):
    folder, commands = run
    smaller = smaller.format(grid=tmp_path / "grid.png")
    with Launched(["bash", "-c", f"{commands[number]} {smaller}"], tmp_path / "log") as started:
        text = started.wait().succeeded().text
    expected = ("2 samples of ", f"added to {folder / 'eval.json'}", "step 3/3")
    assert expected[number] in text


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The shell is in a folder that does not hold the code."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("active", [True, False])
def test_the_programs_exist_wherever_the_shell_is(elsewhere, monkeypatch, active):
    monkeypatch.setenv("PATH", f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}" if active else "/usr/bin:/bin")
    for command in next_commands(Path("runs/x"), 10, shows=True, images=50):
        program = shlex.split(command)[0]
        assert shutil.which(program), command
        assert Path(program).is_absolute() != active
        assert all(Path(word).exists() for word in shlex.split(command) if word.endswith(".py"))


def test_an_installed_package_has_its_own_commands(elsewhere, monkeypatch):
    """A wheel puts `fastdit-sample` beside the interpreter, and has no fastdit/ below the working directory."""
    for name in ("python", "fastdit-sample", "fastdit-evaluate", "deepspeed", "tensorboard"):
        (elsewhere / "bin" / name).parent.mkdir(exist_ok=True)
        (elsewhere / "bin" / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(elsewhere / "bin" / "python"))
    monkeypatch.setenv("PATH", str(elsewhere / "bin"))
    commands = [shlex.split(command) for command in next_commands(Path("x"), 10, shows=True, images=5)]
    assert [command[0] for command in commands] == ["fastdit-sample", "fastdit-evaluate", "deepspeed", "tensorboard"]
    assert Path(commands[2][1]) == Path(module.fastdit.__file__).parent / "train.py"


def test_no_more_real_images_are_compared_than_there_are():
    (compared,) = (c for c in next_commands(Path("x"), 10, shows=True, images=50) if "evaluate" in c)
    assert compared.endswith("--n 50 --n_real 50")


def test_without_the_weights_of_the_feature_network_no_evaluation_is_suggested(monkeypatch):
    monkeypatch.setattr(module, "FEATURES", "no_such_package")
    assert not any("evaluate" in command for command in next_commands(Path("x"), 10, shows=True, images=50))


def test_latents_without_an_autoencoder():
    """Their samples are no pictures, so nothing is suggested that would end with an error."""
    assert list(next_commands(Path("x"), 10, shows=False, images=0).values()) == ["train on", "curves"]
    assert picture_hint(Path("a run")).endswith("--run 'a run' --autoencoder FOLDER")


def test_a_run_on_latents_is_evaluated_by_other_images_only():
    assert list(next_commands(Path("x"), 10, shows=True, images=0).values()) == ["more pictures", "train on", "curves"]
