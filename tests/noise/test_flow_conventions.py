"""Test flow matching as SiT and REPA define it: time, velocity, loss, ODE and SDE samplers, beside their formulas.

The reference here is transcribed from the papers: in SiT's time s, 0 at noise, x_s = s x1 + (1 - s) eps.
"""

import math
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from noise_helpers import SHAPE, SIGNS, level_of, randn

from fastdit.config import SampleConfig
from fastdit.errors import UserError
from fastdit.noise import SDE, DiffusionForm, Flow, PerSampleNoise, sample

FORMS = get_args(DiffusionForm)
CONVENTIONS = list(SIGNS)
CONVENTION = pytest.mark.parametrize("convention", CONVENTIONS)
ZEROS = torch.zeros(SHAPE[0], dtype=torch.int64)


# ---------------------------------------------------------------- training


def test_sits_task():
    """SiT draws s, gives the network x_s and s, and wants d x_s / d s = x1 - eps."""
    process, x1, eps = Flow(convention="sit"), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    s = torch.rand(SHAPE[0], generator=torch.Generator().manual_seed(3))
    at = s[:, None, None, None]
    x, t = process.network_input(process.add_noise(x1, eps, 1 - s), 1 - s)
    torch.testing.assert_close(x, at * x1 + (1 - at) * eps)
    torch.testing.assert_close(t, s)
    out = randn(*SHAPE, seed=4)
    loss, x1_hat = process.loss(out, x1, eps, 1 - s)
    torch.testing.assert_close(loss, ((out - (x1 - eps)) ** 2).mean((1, 2, 3)))
    torch.testing.assert_close(x1_hat, x + (1 - at) * out)


def test_repas_task():
    """REPA draws t, gives the network x_t = (1 - t) x + t eps and t, and wants eps - x."""
    process, x0, eps = Flow(convention="repa"), randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    t = torch.rand(SHAPE[0], generator=torch.Generator().manual_seed(3))
    at = t[:, None, None, None]
    x, time = process.network_input(process.add_noise(x0, eps, t), t)
    torch.testing.assert_close(x, (1 - at) * x0 + at * eps)
    assert torch.equal(time, t)
    out = randn(*SHAPE, seed=4)
    torch.testing.assert_close(process.loss(out, x0, eps, t)[0], ((out - (eps - x0)) ** 2).mean((1, 2, 3)))


@CONVENTION
@pytest.mark.parametrize("sampler", Flow.samplers)
def test_one_velocity_gives_the_same_samples_in_every_convention(convention, sampler):
    def network(process):
        def predict(x, t, y):
            level = level_of(process, t)[:, None, None, None]
            return SIGNS[process.convention] * (torch.sin(2 * x + level) - 0.3 * x)

        return predict

    def drawn(process):
        fresh = PerSampleNoise(0, range(SHAPE[0]), "cpu")
        return sample(process, network(process), fresh(SHAPE), ZEROS, steps=7, sampler=sampler, draw_noise=fresh)

    torch.testing.assert_close(drawn(Flow(convention=convention)), drawn(Flow()), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- the SDE on Gaussian data

MU, STD = 0.7, 0.4


def best_velocity(x, s):
    """E[x1 - eps | x_s] for x1 ~ N(MU, STD^2)."""
    var = s**2 * STD**2 + (1 - s) ** 2
    return MU + (s * STD**2 - (1 - s)) / var * (x - s * MU)


def best_score(x, s):
    return -(x - s * MU) / (s**2 * STD**2 + (1 - s) ** 2)


def coefficient(form, s, norm):
    """SiT's table of diffusion coefficients, in its own time."""
    return {
        "constant": norm,
        "SBDM": norm * ((1 - s) ** 2 / s + (1 - s)) if s else None,
        "sigma": norm * (1 - s),
        "linear": norm * (1 - s),
        "decreasing": 0.25 * (norm * math.cos(math.pi * s) + 1) ** 2,
        "increasing-decreasing": norm * math.sin(math.pi * s) ** 2,
    }[form]


def forward_euler_maruyama(form, norm, last, draws):
    """SiT's SDE, forward in its time, with the last step's drift alone."""
    times = [*np.linspace(0.001 if form == "SBDM" else 0, 1 - last, len(draws)), 1]
    x = draws[0].double()
    for i, (now, then) in enumerate(pairwise(times)):
        w, step = coefficient(form, now, norm), then - now
        x = x + step * (best_velocity(x, now) + w * best_score(x, now))
        if i + 1 < len(draws):
            x = x + math.sqrt(2 * w * step) * draws[i + 1]
    return x


def best_network(x, t, y):
    """The optimal network in SiT's convention."""
    return best_velocity(x.double(), t.double()[:, None, None, None])


@pytest.mark.parametrize("norm", [1.0, 0.6])
@pytest.mark.parametrize("form", FORMS)
def test_euler_maruyama_is_the_forward_sde(form, norm):
    draws = [randn(*SHAPE, seed=seed) for seed in range(25)]
    fresh = iter(draws[1:])
    x = sample(
        Flow(convention="sit"),
        best_network,
        draws[0],
        ZEROS,
        steps=25,
        sampler="euler_maruyama",
        sde=SDE(form, norm, 0.03),
        draw_noise=lambda shape: next(fresh),
    )
    expected = forward_euler_maruyama(form, norm, 0.03, draws)
    torch.testing.assert_close(x.double(), expected, rtol=1e-5, atol=1e-5)
    assert next(fresh, None) is None, "one draw for each step but the last"


@pytest.mark.parametrize("form", FORMS)
def test_the_sde_reproduces_the_data_distribution(form):
    n, sde = 1000, SDE(form, last_step_size=0.002)
    fresh = PerSampleNoise(0, range(n), "cpu")
    noise, y = fresh((n, 2, 3, 5)), torch.zeros(n, dtype=torch.int64)
    settings = {"steps": 250, "sampler": "euler_maruyama", "sde": sde, "draw_noise": fresh}
    x = sample(Flow(convention="sit"), best_network, noise, y, **settings)
    # 30,000 numbers: standard errors 0.0023 and 0.0016; the method and its last step leave some more
    assert abs(x.mean().item() - MU) < 0.006
    assert abs(x.std().item() - STD) < 0.01


def test_a_norm_of_zero_is_eulers_method_for_the_ode():
    settings = {"steps": 25, "draw_noise": lambda shape: torch.ones(shape)}
    process, start, sde = Flow(convention="sit"), randn(*SHAPE), SDE("sigma", 0.0, 1 / 25)
    drawn = sample(process, best_network, start, ZEROS, sampler="euler_maruyama", sde=sde, **settings)
    torch.testing.assert_close(drawn, sample(process, best_network, start, ZEROS, sampler="euler", **settings))


def test_one_step_is_refused():
    """It would be the last, and an SDE's drift does not lead from noise to data without its noise."""
    message = r"sample\.steps: 1; euler_maruyama takes at least 2"
    with pytest.raises(UserError, match=message):
        sample(Flow(), best_network, randn(*SHAPE), ZEROS, steps=1, sampler="euler_maruyama", draw_noise=torch.randn)
    with pytest.raises(UserError, match=message):
        SampleConfig(sampler="euler_maruyama", steps=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"diffusion_form": "cosine"}, r"sample.diffusion_form: unknown form 'cosine'; choose one of constant, SBDM, "),
        ({"diffusion_norm": -1.0}, r"sample.diffusion_norm: must be at least 0, got -1.0"),
        ({"last_step_size": 0.0}, r"sample.last_step_size: must be from 0.0001 to 0.9999, got 0.0"),
        ({"last_step_size": 1.0}, r"sample.last_step_size: must be from 0.0001 to 0.9999, got 1.0"),
    ],
)
def test_impossible_sdes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        SDE(**settings)


# ---------------------------------------------------------------- numbers of SiT's and REPA's own code

# Drawn by transport/ of github.com/willisma/SiT (947f95b) and samplers.py of github.com/sihyun-yu/REPA (67f7145) from
# START, for the network below in their conventions. Draw i of the SDE is (-1)^i NOISE. In SiT's code, SBDM was given
# sample_eps = 0.001 (its own default, 0, divides by zero), and the norm was a tensor (its constant form fails else).
START, NOISE = ([-1.5, 0.25, 2.0], [0.5, -1.0, 0.8])
SIT_ODE = {"euler": [-1.434597, 0.548808, 2.216192], "full_heun": [-1.438478, 0.654666, 2.289411]}
SIT_SDE = {
    "constant": [0.148708, 0.935323, 0.766114],
    "SBDM": [3.508559, -0.5587, -4.198947],
    "sigma": [-0.723387, 0.779649, 1.127871],
    "decreasing": [-0.885139, 0.709856, 1.340888],
    "increasing-decreasing": [-0.509801, 0.566963, 1.098406],
}
REPA_ODE = {"euler": [-1.569627, -0.104285, 1.535366], "heun": [-1.561591, -0.050572, 1.594922]}
REPA_SDE = [-0.656617, 0.052448, 0.07894]


def small(x, t, y):
    t = t[:, None, None, None]
    return torch.tanh(x * (0.3 + t)) - 0.4 * x + 0.5 * t


def draw(convention, **settings):
    start, noise = (torch.tensor(numbers).reshape(1, 1, 1, 3) for numbers in (START, NOISE))
    signed = ((-1) ** i * noise for i in range(1, 99))
    x = sample(Flow(convention=convention), small, start, ZEROS[:1], draw_noise=lambda shape: next(signed), **settings)
    return x.flatten().tolist()


def test_numbers_of_their_code():
    for sampler, expected in SIT_ODE.items():
        assert draw("sit", steps=5, sampler=sampler) == pytest.approx(expected, abs=2e-6)
    for form, expected in SIT_SDE.items():
        drawn = draw("sit", steps=6, sampler="euler_maruyama", sde=SDE(form, 0.8))
        assert drawn == pytest.approx(expected, abs=5e-6), form
    for sampler, expected in REPA_ODE.items():
        assert draw("repa", steps=5, sampler=sampler) == pytest.approx(expected, abs=2e-6)
    assert draw("repa", steps=6, sampler="euler_maruyama") == pytest.approx(REPA_SDE, abs=2e-6)
