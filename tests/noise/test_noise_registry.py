"""The registry of noise processes: the interface, the settings, and a new process in one file and one line."""

import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import yaml

import fastdit.noise
from fastdit.config import NoiseConfig
from fastdit.errors import UserError
from fastdit.noise import DDPM, EDM, PROCESSES, Flow, NoiseProcess
from fastdit.parser import dump, load, parse

FOLDER = Path(fastdit.noise.__file__).parent


@pytest.mark.parametrize("name", PROCESSES)
def test_a_registered_process_has_the_interface_and_defaults(name):
    process = PROCESSES[name]()
    assert isinstance(process, NoiseProcess), "a member is missing"
    assert is_dataclass(process)
    assert process.name == name
    assert NoiseConfig(name=name).process == process
    hash(process)  # frozen


def test_the_settings_have_one_field_for_each_process():
    assert NoiseConfig() == NoiseConfig(name="edm", edm=EDM(), ddpm=DDPM(), flow=Flow())
    assert list(yaml.safe_load(dump(parse([])))["noise"]) == ["name", "edm", "ddpm", "flow"]
    assert NoiseConfig(name="flow", flow=Flow(std=2.0)).process == Flow(std=2.0)


def test_an_unknown_name_is_refused_with_the_registered_names():
    with pytest.raises(UserError, match=r"^noise.name: unknown process 'vp'; choose one of edm, ddpm, flow$"):
        NoiseConfig(name="vp")
    with pytest.raises(UserError, match=r"^noise.name: expected one of 'edm', 'ddpm', 'flow', got vp$"):
        parse(["--noise.name", "vp"])


@pytest.mark.parametrize("name", ["edm", "flow"])
def test_the_weighting_is_a_flag_of_edm_and_flow(name, tmp_path):
    flag = f"--noise.{name}.weighting"
    assert parse(["--noise.name", name]).noise.process.weighting == "output"
    config = parse(["--noise.name", name, flag, "x0"])
    assert config.noise.process == PROCESSES[name](weighting="x0")
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config
    with pytest.raises(UserError, match=rf"^noise.{name}.weighting: expected one of 'output', 'x0', got eps$"):
        parse([flag, "eps"])


def test_a_ddpm_has_no_weighting():
    with pytest.raises(UserError, match=r"noise.ddpm.weighting: no such setting"):
        parse(["--noise.ddpm.weighting", "x0"])


def test_the_settings_of_a_run_before_the_weighting_still_load(tmp_path):
    settings = yaml.safe_load(dump(parse(["--noise.name", "flow", "--noise.flow.mean", "0.3"])))
    for name in ("edm", "flow"):
        del settings["noise"][name]["weighting"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    assert load(tmp_path / "config.yaml").noise == NoiseConfig(name="flow", flow=Flow(mean=0.3))


# ---------------------------------------------------------------- a new process

TOY = '''
"""A toy process: x_t = x0 + level * eps at uniform levels; the network predicts x0."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from fastdit.errors import UserError
from fastdit.kernels import draw_uniform


@dataclass(frozen=True)
class Toy:
    """Train at levels that are uniform on (0, highest).

    Args:
        highest: the highest level.
    """

    highest: float = 3.0

    name: ClassVar[str] = "toy"
    summary: ClassVar[str] = "a toy process"
    samplers: ClassVar[tuple[str, ...]] = ("euler", "heun")
    network_settings: ClassVar[tuple[str, ...]] = ()
    data_std: ClassVar[float] = 0.25
    spare_outputs: ClassVar[bool] = False

    def __post_init__(self):
        if not self.highest > 0:
            raise UserError(f"noise.toy.highest: {self.highest}; must be positive")

    def out_channels(self, channels):
        return channels

    def check_sampling_steps(self, steps):
        if steps > 7:
            raise UserError(f"sample.steps: {steps}; a toy takes at most 7")

    def draw(self, n, *, generator, device):
        return self.highest * draw_uniform((n,), generator=generator, device=device)

    def add_noise(self, x0, eps, level):
        return x0 + level[:, None, None, None] * eps

    def network_input(self, x_t, level):
        return x_t, level

    def loss(self, out, x0, eps, level):
        x0_hat = out.to(level.dtype)
        return (x0_hat - x0).square().mean((1, 2, 3)), x0_hat

    def clean(self, out, x_t, level):
        return out.to(level.dtype)

    def noise_to_signal(self, level):
        return level

    def level_at(self, noise_to_signal, n, device):
        return torch.full((n,), float(noise_to_signal), device=device)

    def at_quantile(self, share):
        return self.highest * share

    def quantile_of(self, level):
        return level / self.highest

    def ode_levels(self, steps):
        return np.linspace(self.highest, 0.0, steps + 1)
'''

USE = """
import sys
from pathlib import Path

import fastdit

fastdit.__path__.insert(0, sys.argv[1])  # the folder with the copy of fastdit/noise

import torch

from fastdit.config import Config, NoiseConfig
from fastdit.parser import dump, load, parse
from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.kernels import SampleGenerator
from fastdit.noise import PROCESSES, NoiseProcess, sample
from fastdit.noise.toy import Toy

assert list(PROCESSES) == ["edm", "ddpm", "flow", "toy"]
assert isinstance(Toy(), NoiseProcess)


def refusal(*argv):
    try:
        parse([*argv])
    except UserError as error:
        return str(error)


# Select the process by flags, and write and read its settings.
sizes = "--model.depth 1 --model.width 16 --model.heads 2 --data.size 4 --sample.steps 5"
config = parse([*sizes.split(), "--noise.name", "toy", "--noise.toy.highest", "2"])
assert config.noise == NoiseConfig(name="toy", toy=Toy(highest=2.0))
path = Path(sys.argv[1]) / "config.yaml"
path.write_text(dump(config))
assert load(path) == config
assert refusal("--noise.name", "x") == "noise.name: expected one of 'edm', 'ddpm', 'flow', 'toy', got x"
assert refusal("--noise.toy.highest", "-1") == "noise.toy.highest: -1.0; must be positive"
assert refusal("--noise.toy.highest", "abc") == "noise.toy.highest: expected a number, got abc"
assert refusal("--noise.name", "toy", "--sample.steps", "8") == "sample.steps: 8; a toy takes at most 7"
assert "euler, heun" in refusal("--noise.name", "toy", "--sample.steps", "7", "--sample.sampler", "ddim")

# Train one step.
shape = run_parts.shape_of(config, classes=3)
network, method = run_parts.build_training(config, shape)
assert method.noise == run_parts.build_noise(config) == Toy(highest=2.0)
optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
x0, y = torch.full((4, 3, 4, 4), 0.5), torch.tensor([0, 1, 2, 0])


def loss():
    return method.loss(network, x0, y, SampleGenerator(0, 0, "cpu")).loss


before = loss()
before.backward()
optimizer.step()
assert loss() < before

# Draw samples, all of which are the constant that a perfect network predicts.
drawn = sample(method.noise, lambda x, t, y: torch.full_like(x, 0.5), torch.randn(3, 3, 4, 4), torch.arange(3), steps=5)
torch.testing.assert_close(drawn, torch.full_like(drawn, 0.5))
drawn = sample(method.noise, network, torch.randn(3, 3, 4, 4), torch.arange(3), steps=5, guidance=2.0, null_label=3)
assert drawn.shape == (3, 3, 4, 4) and drawn.isfinite().all()
parse(["--help", "all"])
"""


def test_a_new_process_is_one_file_and_one_line(tmp_path):
    """Add it to a copy of fastdit/noise; then select it by flags, train one step, and draw samples."""
    copy = tmp_path / "noise"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "toy.py").write_text(TOY)
    registry = (copy / "registry.py").read_text()
    line = '    "fastdit.noise.flow:Flow",\n'
    assert line in registry
    (copy / "registry.py").write_text(registry.replace(line, line + line.replace("flow", "toy").replace("Flow", "Toy")))
    ended = subprocess.run([sys.executable, "-c", USE, tmp_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for text in ("--noise.name {edm,ddpm,flow,toy}", "edm, ddpm, flow or toy.", "a toy process", "the highest level"):
        assert text in ended.stdout
