"""Test that a new method is one file and one line of the registry: it trains, resumes, samples, and is measured."""

import json
import shutil
from pathlib import Path

import pytest
from launching import ROOT, TINY, Outcome, averages, checkpoint, metrics, python, run

from fastdit.methods.registry import METHODS

TOY = '''
"""A method that keeps the x0 prediction small."""

from dataclasses import dataclass

import torch

from fastdit.errors import check_ranges
from fastdit.methods.wrapper import Wrapper


@dataclass(frozen=True)
class Shrink:
    """Settings of shrink.

    Args:
        weight: weight of the mean square.
    """

    weight: float = 0.5

    def __post_init__(self):
        check_ranges(self, "shrink.", {"weight": (0, 9)})


class Shrinking(Wrapper):
    """Another method with the mean square of the x0 prediction, whose share of the loss grows by the step."""

    name = "shrink"
    summary = "small predictions"
    settings_type = Shrink
    panels = {"size of the predictions": {"shrink_size": "mean square"}}

    def __init__(self, base, weight):
        super().__init__(base)
        self.weight, self.growth = weight, torch.ones(())

    @classmethod
    def build(cls, config, shape, module, base, decoder=None):
        return module, cls(base, config.shrink.weight)

    @classmethod
    def checkpoint_signature(cls, config):
        return {"shrink.weight": config.shrink.weight}

    def loss(self, network, x0, y, generator):
        outcome = super().loss(network, x0, y, generator)
        size = outcome.x0_hat.square().mean()
        terms = outcome.terms | {"shrink_size": size.detach()}
        return outcome._replace(loss=outcome.loss + self.weight * self.growth * size, terms=terms)

    def end_step(self):
        self.growth = self.growth * 1.5
        return super().end_step()

    def state_dict(self):
        return super().state_dict() | {"growth": self.growth}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.growth = state["growth"]
'''
LINE = '    "fastdit.methods.shrinking:Shrinking",\n'
FLAGS = [*TINY, "--method", "shrink", "--shrink.weight", "2", "--steps", "4", "--save_every", "2"]

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Return a folder with a copy of the package that has a new method."""
    home = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastdit", home / "fastdit", ignore=ignored)
    shutil.copytree(ROOT / "kernels", home / "fastdit/kernels", ignore=ignored, dirs_exist_ok=True)
    methods = home / "fastdit/methods"
    (methods / "shrinking.py").write_text(TOY)
    lines = (methods / "registry.py").read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if line.startswith('    "fastdit.methods.'))
    (methods / "registry.py").write_text("".join([*lines[: last + 1], LINE, *lines[last + 1 :]]))
    return home


@pytest.fixture
def command(home, tmp_path, monkeypatch):
    """Return a function that runs a program of the copy, or of the benchmarks on top of it."""
    monkeypatch.setenv("PYTHONPATH", str(home))

    def command(script: str, *flags) -> Outcome:
        folder = home if script.startswith("fastdit") else ROOT
        return run(python(folder / script, *flags), tmp_path / "log")

    return command


@pytest.fixture(scope="module")
def trained(home, tmp_path_factory) -> Path:
    """Return the folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(home))
        run(python(home / "fastdit/train.py", *FLAGS, "--out", folder), folder.parent / "log").succeeded()
    return folder


def test_it_trains_and_appears_in_the_report(trained):
    assert [line["step"] for line in metrics(trained)] == [1, 2, 3, 4]
    assert all(line["shrink_size"] > 0 for line in metrics(trained))
    assert "size of the predictions" in (trained / "report.html").read_text()
    written = json.loads((checkpoint(trained, 4) / "manifest.json").read_text())
    assert (written["method"], written["shrink.weight"]) == ("shrink", 2.0)


def test_it_resumes_to_the_bit(trained, command, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    shutil.rmtree(checkpoint(copy, 4))
    command("fastdit/train.py", "--resume", "--out", copy).succeeded()
    assert metrics(copy, untimed=True) == metrics(trained, untimed=True)
    found, expected = averages(copy, 4), averages(trained, 4)
    assert all(found[name].equal(value) for name, value in expected.items())

    outcome = command("fastdit/train.py", "--resume", "--out", copy, "--steps", 5, "--shrink.weight", 3)
    assert outcome.code == 2
    assert "was written with shrink.weight 2.0, this run has 3.0" in outcome.text


def test_it_samples(trained, command, tmp_path):
    command("fastdit/sample.py", "--run", trained, "--n", 2, "--device", "cpu", "--out", tmp_path / "x.png").succeeded()
    assert (tmp_path / "x.png").is_file()


def test_its_flags_are_flags_and_it_joins_other_methods(command):
    help_text = command("fastdit/train.py", "--help", "all").succeeded().text
    assert "--shrink.weight (default:" in help_text
    assert "shrink, small predictions;" in " ".join(help_text.split())
    assert "shrink.weight: must be from 0 to 9, got 10.0" in command("fastdit/train.py", "--shrink.weight", 10).text
    unknown = command("fastdit/train.py", "--method", "gan")
    assert f"{', '.join(METHODS)}, shrink, or several joined by +" in unknown.text
    assert "each other method contains dit" in command("fastdit/train.py", "--method", "shrink+sd_dit+dit").text


def test_it_is_measured(command):
    """The benchmark times it beside a plain step. A method that nobody cuts into components has phases alone."""
    sizes = ["--size", 8, "--channels", 1, "--classes", 3, "--model.depth", 2, "--model.width", 32, "--model.heads", 2]
    flags = ["--model", "S/4", "--batch", 4, "--steps", 1, "--device", "cpu", "--threads", 1, *sizes]
    text = command("benchmarks/throughput.py", "--method", "sd_dit+shrink", *flags).succeeded().text
    assert "| sd_dit+shrink " in text
    assert "Parts of a step, ms:" in text
