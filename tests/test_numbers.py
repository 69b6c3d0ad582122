"""Test that every number among the settings either trains a network or is refused in one line that names its flag."""

import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import get_args, get_type_hints

import pytest
import torch

from fastdit import run_parts
from fastdit.config import Config, DataConfig, EMAConfig, EvalConfig, ModelConfig, SampleConfig
from fastdit.errors import UserError
from fastdit.kernels import AdamWEMA
from fastdit.methods.registry import METHODS
from fastdit.noise import PROCESSES
from fastdit.parser import parse
from fastdit.training import schedules
from fastdit.training.deepspeed_config import make_deepspeed_config

BASE = shlex.split(
    "--data.source synthetic:1x8x8:3:9 --data.size 8 --data.channels 1 --model.patch 4 --model.width 16 "
    "--model.depth 2 --model.heads 2 --batch 4 --device cpu --sadm.psi_width 16 --sadm.start 0 --psi_align.psi_width 16"
)
# A number counts only in a run that uses it.
USED = {name: f"--method {name}" for name in METHODS}
USED |= {f"sd_dit.decoder_{size}": "--method sd_dit --sd_dit.decoder extra" for size in ("width", "depth", "heads")}
USED |= {f"noise.{name}": f"--noise.name {name}" for name in PROCESSES}
USED |= {"ema.std": "--ema.kind power"}
VALUES = (-1, 0, math.nan, math.inf, 1e30)


@dataclass(frozen=True)
class Number:
    """A numeric setting.

    Args:
        flag: its name with dots.
        whole: whether it is an int.
        numbers: how many numbers the flag takes; 0: one, and no list.
    """

    flag: str
    whole: bool
    numbers: int


def numbers(kind: type, prefix: str = "") -> Iterator[Number]:
    """Yield every numeric field of the dataclass `kind`, and of the dataclasses in it."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        flag, hint = prefix + field.name, hints[field.name]
        if is_dataclass(hint):
            yield from numbers(hint, f"{flag}.")
            continue
        choices = get_args(hint) or (hint,)
        pair = getattr(hint, "__origin__", None) is tuple
        pairs = [choices] if pair else [get_args(choice) for choice in choices if get_args(choice)]
        pairs = [inner for inner in pairs if inner[0] in (int, float)]
        if pair and pairs:
            yield Number(flag, pairs[0][0] is int, len(choices))
        elif int in choices or float in choices:
            yield Number(flag, float not in choices, 0)
        elif pairs:
            yield Number(flag, pairs[0][0] is int, len(pairs[0]))


NUMBERS = list(numbers(Config))


def train_one_step(config: Config) -> None:
    """Build what a run with this configuration is made of, without DeepSpeed, and take its first step."""
    # Build the network, the method and the optimizer.
    make_deepspeed_config(config, 1, False)
    shape = run_parts.shape_of(config, 3)
    module, method = run_parts.build_training(config, shape)
    method.to(torch.device("cpu"), torch.float32)
    rules = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
    decays = {"ema": schedules.ema_decay(config.ema, 0), **method.begin_step(0, config.steps)}
    optimizer = AdamWEMA(module.parameters(), emas=decays, max_norm=config.grad_clip or None, **rules)
    schedules.learning_rate(config, config.steps - 1)

    # Take a step, whose loss may be infinite: training stops after some of those.
    generator = torch.Generator().manual_seed(config.seed)
    x0 = torch.randn(4, shape.channels, shape.height, shape.width, generator=generator)
    method.loss(module, x0, torch.arange(4) % shape.classes, generator).loss.backward()
    optimizer.step()
    method.end_step()
    method.flops(module)


def test_the_walk_finds_numbers_of_every_type():
    found = {number.flag: number for number in NUMBERS}
    assert found["lr"] == Number("lr", False, 0)
    assert found["batch"] == Number("batch", True, 0)
    assert found["betas"] == Number("betas", False, 2)
    assert found["sample.interval"] == Number("sample.interval", False, 2)
    assert found["data.size"] == Number("data.size", True, 0)
    assert found["sadm.weight"] == Number("sadm.weight", False, 0)
    assert found["sd_dit.teacher_noise"] == Number("sd_dit.teacher_noise", False, 0)
    assert {"noise.edm.rho", "model.mlp_ratio", "psi_align.stage"} < found.keys()
    assert not {"resume", "out", "data.flip", "sd_dit.cls"} & found.keys()


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.flag)
def test_a_number_works_or_is_refused(number):
    flag = number.flag
    used = USED.get(flag) or USED.get(flag.rpartition(".")[0], "")
    for value in VALUES:
        text = str(int(value)) if number.whole and math.isfinite(value) else repr(value)
        for words in [f"[{text}, 0.5]", f"[0.5, {text}]"] if number.numbers == 2 else [text]:
            try:
                train_one_step(parse([*BASE, *shlex.split(used), f"--{flag}={words}"]))
            except UserError as error:
                message = str(error)
                assert "\n" not in message
                assert "Traceback" not in message
                assert flag in message, f"{words}: {message}"
            except BaseException as error:
                pytest.fail(f"--{flag} {words}: {type(error).__name__}: {error}")


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.flag)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_class_refuses_what_is_not_finite(number, value):
    """The parser refuses these already; a program that builds a `Config` has the classes alone."""
    *groups, name = number.flag.split(".")
    group = Config()
    for part in groups:
        group = getattr(group, part)
    with pytest.raises(UserError, match=number.flag.replace(".", r"\.")):
        replace(group, **{name: (value, value) if number.numbers else value})


@pytest.mark.parametrize(
    ("make", "flag"),
    [
        (lambda: DataConfig(size=0), "data.size"),
        (lambda: DataConfig(channels=3, latent_scale=(1.0, 1.0)), "data.latent_scale"),
        (lambda: ModelConfig(mlp_ratio=-1), "model.mlp_ratio"),
        (lambda: ModelConfig(mlp_ratio=0.01, width=16, heads=2), "model.mlp_ratio"),
        (lambda: ModelConfig(width=10, heads=3), "model.width"),
        (lambda: EMAConfig(std=1), "ema.std"),
        (lambda: SampleConfig(interval=(2, 1)), "sample.interval"),
        (lambda: EvalConfig(n=1), "eval.n"),
        (lambda: Config(lr=-1), "lr"),
    ],
)
def test_each_group_checks_itself(make, flag):
    with pytest.raises(UserError, match=rf"^{flag}: "):
        make()


def test_the_largest_seed_works():
    train_one_step(parse([*BASE, f"--seed={2**63 - 1}"]))
    with pytest.raises(UserError, match="seed: must be at most 9223372036854775807"):
        Config(seed=2**63)
