"""Learning rate and average decay against closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fastdit.config import Config, EMAConfig
from fastdit.parser import parse
from fastdit.training.schedules import ema_decay, learning_rate, power_gamma


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    config = Config(lr=3.0, warmup=5, steps=20, schedule=schedule)
    assert [learning_rate(config, step) for step in range(6)] == pytest.approx(
        [0.6, 1.2, 1.8, 2.4, 3.0, 3.0], rel=1e-15
    )


def test_constant_stays():
    assert {learning_rate(Config(lr=3.0, warmup=5, steps=20), step) for step in (5, 19, 10**6)} == {3.0}
    assert learning_rate(Config(lr=3.0), 0) == 3.0


def test_cosine_falls_to_zero_at_the_end():
    config = Config(lr=2.0, warmup=4, steps=104, schedule="cosine")
    for step in (4, 29, 54, 79, 103):
        expected = 2.0 * math.cos(math.pi / 2 * (step - 4) / 100) ** 2
        assert learning_rate(config, step) == pytest.approx(expected, rel=1e-12)
    rates = [learning_rate(config, step) for step in range(4, 105)]
    assert all(a > b for a, b in pairwise(rates))
    assert rates[0] == 2.0
    assert learning_rate(config, 104) == pytest.approx(0, abs=1e-15)
    assert learning_rate(config, 500) == pytest.approx(0, abs=1e-15), "past the end it does not rise again"


def test_cosine_with_a_warm_up_longer_than_the_run():
    config = Config(lr=2.0, warmup=10, steps=5, schedule="cosine")
    assert [learning_rate(config, step) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.15, 0.25, 0.28])
def test_gamma_gives_the_relative_width(std):
    """The relative std of the profile t^gamma on [0, 1], by its moments."""
    gamma = power_gamma(std)
    moment = [(gamma + 1) / (gamma + 1 + k) for k in (1, 2)]
    assert math.sqrt(moment[1] - moment[0] ** 2) == pytest.approx(std, rel=1e-9)
    assert gamma > 0


@pytest.mark.parametrize(("std", "published"), [(0.05, 16.97), (0.1, 6.94)])
def test_published_gammas(std, published):
    """Karras et al. 2024, section 3.1: 5 % and 10 % are gamma 16.97 and 6.94."""
    assert power_gamma(std) == pytest.approx(published, abs=5e-3)


def weights_of_the_average(config: EMAConfig, steps: int) -> np.ndarray:
    """(steps,) fp64: how much the weights after each step count in the average after the last."""
    share = np.zeros(steps)
    for step in range(steps):
        decay = ema_decay(config, step)
        share *= decay
        share[step] = 1 - decay
    return share


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_power_average_has_the_profile_it_claims(std):
    steps, gamma = 4000, power_gamma(std)
    share = weights_of_the_average(EMAConfig(kind="power", std=std), steps)
    assert share.sum() == pytest.approx(1, abs=1e-12)
    # Closed form of the recursion: what is left of step t is prod_{s > t} (1 - 1/s)^(gamma+1) = (t / T)^(gamma+1).
    time = np.arange(1, steps + 1) / steps
    closed = np.diff(np.concatenate([[0], time ** (gamma + 1)]))
    np.testing.assert_allclose(share, closed, atol=1e-13)
    mean = (share * time).sum()
    assert math.sqrt((share * (time - mean) ** 2).sum()) == pytest.approx(std, rel=1e-3)


def test_power_average_starts_at_the_first_weights():
    assert ema_decay(EMAConfig(kind="power", std=0.1), 0) == 0.0


def test_fixed_average_warms_up():
    config = EMAConfig(kind="fixed", decay=0.99)
    assert [ema_decay(config, step) for step in (0, 1, 90)] == [1 / 10, 2 / 11, 91 / 100]
    assert ema_decay(config, 890) == pytest.approx(0.99)
    assert ema_decay(config, 10**6) == 0.99
    assert weights_of_the_average(config, 50).sum() < 1, "the initial weights keep a share"


def test_constant_ema_has_no_warm_up():
    config = EMAConfig(kind="constant", decay=0.9999)
    assert [ema_decay(config, step) for step in (0, 1, 10**6)] == [0.9999] * 3


@pytest.mark.parametrize("preset", ["imagenet256", "imagenet256_sd_dit"])
def test_presets_of_published_settings_have_the_published_ema(preset):
    """The original DiT and MaskDiT update the EMA with 0.9999 from the first step on."""
    config = parse(["--preset", preset])
    assert [ema_decay(config.ema, step) for step in (0, 100, 400_000)] == [0.9999] * 3
