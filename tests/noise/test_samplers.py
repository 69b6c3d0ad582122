"""Samplers against exact solutions; guidance; noise of each sample's own."""

import math

import numpy as np
import pytest
import torch
from noise_helpers import SHAPE, SIGNS, level_of, marginal, randn, raw_output, wavy
from scipy import stats

from fastdit.errors import UserError
from fastdit.noise import DDPM, EDM, SDE, Flow, PerSampleNoise, sample

# ---------------------------------------------------------------- samplers on Gaussian data

MU, STD = 0.7, 0.4
PROCESSES = (EDM(), DDPM(), Flow())


def optimal_network(process, variance=None):
    """E[x0 | x_t] for x0 ~ N(MU, STD^2), as a raw network; `variance(t)` gives a DDPM's variance channels."""

    def network(x, t, y):
        level, x = level_of(process, t.double()), x.double()
        if process.name == "edm":
            x = x * (level**2 + process.sigma_data**2).sqrt()[:, None, None, None]
        signal, noise = marginal(process, level[:, None, None, None])
        gain = signal * STD**2 / (signal**2 * STD**2 + noise**2)
        if process.name == "flow":  # E[eps - x0 | x_t], at level 0 too
            eps_hat = noise * (x - signal * MU) / (signal**2 * STD**2 + noise**2)
            return SIGNS[process.convention] * (eps_hat - MU - gain * (x - signal * MU))
        out = raw_output(process, MU + gain * (x - signal * MU), x, level)
        if variance is not None:
            out[:, x.shape[1] :] = variance(int(t[0]))
        return out

    return network


def exact_ode(process, noise, first):
    """The probability-flow ODE keeps each point's number of standard deviations from the mean."""
    signal, sigma = (float(c) for c in marginal(process, torch.tensor([first], dtype=torch.float64)))
    start = sigma * noise if process.name != "ddpm" else noise
    return MU + STD * (start - signal * MU) / math.sqrt(signal**2 * STD**2 + sigma**2)


def ode_error(process, sampler, steps):
    noise, y = randn(*SHAPE, dtype=torch.float64), torch.zeros(SHAPE[0], dtype=torch.int64)
    result = sample(process, optimal_network(process), noise, y, steps=steps, sampler=sampler)
    first = float(process.ode_levels(2)[0]) if process.name != "ddpm" else 999.0
    return (result - exact_ode(process, noise, first)).abs().max().item()


@pytest.mark.parametrize(
    ("process", "sampler", "order"),
    [
        (EDM(), "heun", 2),
        (EDM(), "euler", 1),
        (Flow(), "heun", 2),
        (Flow(), "euler", 1),
        (Flow(), "full_heun", 2),
        (Flow(convention="sit"), "full_heun", 2),
        (Flow(convention="repa"), "euler", 1),
        (DDPM(), "ddim", 1),
    ],
    ids=["edm_heun", "edm_euler", "flow_heun", "flow_euler", "flow_full_heun", "sit_full_heun", "repa_euler", "ddim"],
)
def test_ode_samplers_converge_to_the_exact_solution_at_their_order(process, sampler, order):
    coarse, fine = ode_error(process, sampler, 40), ode_error(process, sampler, 80)
    assert abs(math.log2(coarse / fine) - order) < 0.2
    assert fine < (0.004 if order == 2 else 0.06)


@pytest.mark.parametrize(("process", "sampler"), [(p, s) for p in PROCESSES for s in p.samplers])
def test_samplers_reproduce_the_data_distribution(process, sampler):
    steps, n = 100, 1000
    chain = process.chain(steps) if process.name == "ddpm" else None

    def variance(t):
        """The optimal reverse variance: the posterior's and what x_t leaves open of x0 (as v in [-1, 1])."""
        i = chain.timestep.tolist().index(t)
        signal, noise_var, prev = chain.alpha_bar[i] ** 0.5, 1 - chain.alpha_bar[i], chain.alpha_bar_prev[i]
        left_open = STD**2 * noise_var / (signal**2 * STD**2 + noise_var)
        low = chain.beta[i] * (1 - prev) / noise_var
        best = low + (prev**0.5 * chain.beta[i] / noise_var) ** 2 * left_open
        return 2 * math.log(best / low) / math.log(chain.beta[i] / low) - 1 if i else 0.0

    network = optimal_network(process, variance if sampler == "ddpm" else None)
    fresh = PerSampleNoise(0, range(n), "cpu")
    y = torch.zeros(n, dtype=torch.int64)
    sde = SDE(last_step_size=0.01)  # which draws no noise, so that a long one takes variance away
    result = sample(process, network, fresh((n, 2, 3, 5)), y, steps=steps, sampler=sampler, sde=sde, draw_noise=fresh)
    assert result.dtype == torch.float32
    # 30,000 numbers: standard errors 0.0023 and 0.0016; 100 steps of a first-order ODE method leave some more
    assert abs(result.mean().item() - MU) < 0.005
    assert abs(result.std().item() - STD) < (0.013 if sampler in ("euler", "ddim") else 0.005)


# ---------------------------------------------------------------- guidance


class Recorder:
    """A network that keeps its calls; by default one linear in x and y, but for a DDPM's variance."""

    def __init__(self, process, function=None):
        self.process, self.function, self.calls = process, function or self.linear, []

    def linear(self, x, t, y):
        slope = (0.1 + 0.2 * y)[:, None, None, None]
        out = slope * x + 0.05 * y[:, None, None, None]
        return torch.cat([out, out.tanh()], dim=1)[:, : self.process.out_channels(x.shape[1])]

    def __call__(self, x, t, y):
        assert x.dtype == t.dtype == torch.float32
        assert len(x) == len(t) == len(y)
        self.calls.append((x, t, y))
        return self.function(x, t, y)


def run(process, network, sampler=None, steps=6, **settings):
    fresh = PerSampleNoise(1, range(SHAPE[0]), "cpu")
    y = torch.tensor([0, 1, 2, 0, 1])
    return sample(process, network, fresh(SHAPE), y, steps=steps, sampler=sampler, draw_noise=fresh, **settings)


EVERY_SAMPLER = pytest.mark.parametrize(("process", "sampler"), [(p, s) for p in PROCESSES for s in p.samplers])


@EVERY_SAMPLER
def test_guidance_of_one_is_no_guidance(process, sampler):
    plain, guided = Recorder(process, wavy(process)), Recorder(process, wavy(process))
    expected = run(process, plain, sampler)
    assert torch.equal(run(process, guided, sampler, guidance=1.0, null_label=3), expected)
    calls = {"heun": 11, "full_heun": 12}.get(sampler, 6)
    assert [len(x) for x, _, _ in guided.calls] == [SHAPE[0]] * calls


@EVERY_SAMPLER
def test_guidance_extrapolates_the_prediction(process, sampler):
    """A linear network guided by 2.5 is the network of the extrapolated label: 3 + 2.5 (y - 3)."""
    network = Recorder(process)

    def extrapolated(x, t, y):
        out = network.linear(x, t, 3 + 2.5 * (y - 3.0))
        if process.name == "ddpm":  # the variance is the conditional one
            out[:, 3:] = network.linear(x, t, y)[:, 3:]
        return out

    result = run(process, network, sampler, guidance=2.5, null_label=3)
    expected = run(process, Recorder(process, extrapolated), sampler)
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    x, t, y = network.calls[0]
    assert y.tolist() == [0, 1, 2, 0, 1, 3, 3, 3, 3, 3]
    assert torch.equal(x[:5], x[5:])
    assert torch.equal(t[:5], t[5:])


@EVERY_SAMPLER
def test_guided_channels(process, sampler):
    """Only the first two channels are guided: they are the guided run's, the third is the plain run's."""
    network = Recorder(process)  # acts on each channel by itself
    guided = run(process, network, sampler, guidance=3.0, null_label=3)
    plain = run(process, network, sampler)
    mixed = run(process, network, sampler, guidance=3.0, null_label=3, guided_channels=2)
    assert torch.equal(mixed[:, :2], guided[:, :2])
    assert torch.equal(mixed[:, 2:], plain[:, 2:])
    assert not torch.equal(guided[:, 2:], plain[:, 2:])


@EVERY_SAMPLER
def test_guidance_interval(process, sampler):
    network = Recorder(process, wavy(process))
    low, high = 0.3, 4.0
    run(process, network, sampler, steps=9, guidance=2.0, null_label=3, guidance_interval=(low, high))
    inside = 0
    for x, t, _ in network.calls:
        level = level_of(process, t)
        expected = bool(low < process.noise_to_signal(level)[0] <= high)
        assert len(x) == SHAPE[0] * (2 if expected else 1)
        inside += expected
    assert 0 < inside < len(network.calls)


def test_guidance_interval_is_open_below_and_closed_above():
    process = EDM()
    levels = process.ode_levels(6)
    network = Recorder(process, wavy(process))
    run(process, network, "euler", guidance=2.0, null_label=3, guidance_interval=(levels[4], levels[2]))
    assert [len(x) // SHAPE[0] for x, _, _ in network.calls] == [1, 1, 2, 2, 1, 1]


@EVERY_SAMPLER
def test_the_sampler_state_is_float64(process, sampler):
    noise, y = randn(*SHAPE), torch.tensor([0, 1, 2, 0, 1])
    settings = {"steps": 9, "sampler": sampler}
    single, double = (
        sample(process, wavy(process), start, y, draw_noise=PerSampleNoise(0, range(5), "cpu"), **settings)
        for start in (noise, noise.double())
    )
    assert single.dtype == torch.float32
    assert torch.equal(single, double)


def test_an_interval_over_everything_is_plain_guidance():
    network = wavy(Flow())
    everywhere = run(Flow(), network, guidance=2.0, null_label=3, guidance_interval=(0, math.inf))
    assert torch.equal(everywhere, run(Flow(), network, guidance=2.0, null_label=3))


# ---------------------------------------------------------------- per-sample noise, progress, refusals


@EVERY_SAMPLER
def test_a_sample_does_not_depend_on_its_batch(process, sampler):
    indices, y = [4, 0, 11, 7, 2], torch.tensor([0, 1, 2, 0, 1])

    def samples(rows):
        fresh = PerSampleNoise(3, [indices[row] for row in rows], "cpu")
        noise = fresh((len(rows), *SHAPE[1:]))
        return sample(process, wavy(process), noise, y[rows], steps=5, sampler=sampler, draw_noise=fresh)

    whole = samples([0, 1, 2, 3, 4])
    torch.testing.assert_close(samples([3, 1]), whole[[3, 1]], rtol=1e-6, atol=1e-6)


def test_per_sample_noise():
    shape = (2, 1, 3, 5)
    fresh = PerSampleNoise(7, [3, 8], "cpu")
    first, second = fresh(shape), fresh(shape)
    other = PerSampleNoise(7, [9, 8, 3], "cpu")((3, 1, 3, 5))
    assert first.dtype == torch.float32
    assert torch.equal(other[[2, 1]], first)
    assert len({row.numpy().tobytes() for row in [*first, *second, other[0]]}) == 5
    assert not torch.equal(PerSampleNoise(8, [3, 8], "cpu")(shape), first)
    # seeds that agree in their low 32 bits, and (seed, index) exchanged
    assert not torch.equal(PerSampleNoise(7 + 2**32, [3, 8], "cpu")(shape), first)
    assert not torch.equal(PerSampleNoise(3, [7, 8], "cpu")(shape)[0], first[0])
    many = PerSampleNoise(0, range(2000), "cpu")((2000, 2, 2, 3)).double()
    assert stats.kstest(many.flatten().numpy(), "norm").pvalue > 0.01
    assert abs(np.corrcoef(many[1:].flatten(), many[:-1].flatten())[0, 1]) < 0.02
    with pytest.raises(ValueError, match="2 sample indices"):
        fresh((3, 1, 3, 5))


@EVERY_SAMPLER
def test_progress_wraps_the_steps(process, sampler):
    seen = []

    def progress(order):
        assert len(order) == 6
        for item in order:
            yield item
            seen.append(item)

    assert torch.equal(run(process, wavy(process), sampler, progress=progress), run(process, wavy(process), sampler))
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("process", "settings", "message"),
    [
        (EDM(), {"sampler": "ddim"}, "edm has no sampler 'ddim'; choose one of heun, euler"),
        (EDM(), {"steps": 0}, "at least 1"),
        (DDPM(steps=20), {"steps": 21}, "1 to 20 steps"),
        (Flow(), {"guidance": 2.0}, "no null class"),
        (Flow(), {"guidance": 2.0, "null_label": 3, "guided_channels": 4}, "samples have 3 channels"),
        (Flow(), {"guidance": 2.0, "null_label": 3, "guidance_interval": (2, 1)}, "lo < hi"),
    ],
)
def test_unusable_sampling_is_refused(process, settings, message):
    with pytest.raises(UserError, match=message):
        run(process, wavy(process), **settings)


def test_ill_fitting_arguments_are_refused():
    noise, y = randn(*SHAPE), torch.zeros(SHAPE[0], dtype=torch.int64)
    with pytest.raises(ValueError, match="needs draw_noise"):
        sample(DDPM(), wavy(DDPM()), noise, y, steps=2)
    with pytest.raises(ValueError, match="needs draw_noise"):
        sample(Flow(), wavy(Flow()), noise, y, steps=2, sampler="euler_maruyama")
    with pytest.raises(ValueError, match="labels for noise"):
        sample(DDPM(), wavy(DDPM()), noise, y[:2], steps=2, sampler="ddim")
