"""Noise processes against float64 transcriptions of the papers. DDPM's own tests: test_ddpm.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from noise_helpers import SHAPE, batch, randn, raw_output
from scipy import stats

from fastdit.errors import UserError
from fastdit.noise import DDPM, EDM, Flow

PROCESSES = [EDM(), DDPM(), Flow(), Flow(law="uniform"), EDM(weighting="x0"), Flow(weighting="x0")]
PROCESSES += [Flow(convention="sit"), Flow(convention="repa", weighting="x0")]
IDS = ["edm", "ddpm", "flow", "flow_uniform", "edm_x0", "flow_x0", "flow_sit", "flow_repa_x0"]
BY_NAME = pytest.mark.parametrize("process", PROCESSES, ids=IDS)


# ---------------------------------------------------------------- the interface, for every process


@BY_NAME
def test_clean_agrees_with_the_estimate_of_the_loss(process):
    out, x0, eps, level = batch(process)
    _, x0_hat = process.loss(out, x0, eps, level)
    clean = process.clean(out, process.add_noise(x0, eps, level), level)
    assert x0_hat.shape == SHAPE
    # float32 rounding of x_t is multiplied by noise / signal on the way back
    bound = 4e-6 * (1 + process.noise_to_signal(level))[:, None, None, None]
    assert ((clean - x0_hat).abs() <= bound).all()


@BY_NAME
def test_add_noise_has_the_stated_noise_to_signal(process):
    _, x0, eps, level = batch(process)
    signal = process.add_noise(torch.ones(SHAPE), torch.zeros(SHAPE), level)
    noise = process.add_noise(torch.zeros(SHAPE), torch.ones(SHAPE), level)
    ratio = process.noise_to_signal(level)
    assert ratio.shape == level.shape
    torch.testing.assert_close((noise / signal).amax((1, 2, 3)), ratio, rtol=1e-6, atol=0)
    torch.testing.assert_close(process.add_noise(x0, eps, level), signal * x0 + noise * eps, rtol=0, atol=1e-5)


@BY_NAME
def test_a_perfect_network_gets_x0_back(process):
    _, x0, eps, level = batch(process)
    x_t = process.add_noise(x0.double(), eps.double(), level.double())
    perfect = raw_output(process, x0.double(), x_t, level.double())
    _, x0_hat = process.loss(perfect.float(), x0, eps, level)
    bound = 2e-6 * (1 + process.noise_to_signal(level))[:, None, None, None]
    assert ((x0_hat - x0).abs() <= bound).all()


@BY_NAME
def test_loss_is_float32_and_per_sample_for_bfloat16_outputs(process):
    out, x0, eps, level = batch(process)
    low = out.bfloat16()
    loss, x0_hat = process.loss(low, x0, eps, level)
    assert loss.shape == level.shape
    assert loss.dtype == x0_hat.dtype == process.clean(low, x0, level).dtype == torch.float32
    expected, expected_x0_hat = process.loss(low.float(), x0, eps, level)
    assert torch.equal(loss, expected)
    assert torch.equal(x0_hat, expected_x0_hat)
    alone, _ = process.loss(low[2:3], x0[2:3], eps[2:3], level[2:3])
    torch.testing.assert_close(alone, loss[2:3], rtol=1e-6, atol=0)


@BY_NAME
def test_loss_and_estimate_have_the_dtype_of_the_level(process):
    out, x0, eps, level = batch(process)
    for out_dtype in (torch.float32, torch.float64):
        loss, x0_hat = process.loss(out.to(out_dtype), x0, eps, level.double())
        assert loss.dtype == x0_hat.dtype == torch.float64


@BY_NAME
def test_a_step_reads_nothing_back_from_the_device(process):
    """Tensors without data: any branch on a value or transfer to the host raises."""
    out, x0, eps, level = (tensor.to("meta") for tensor in batch(process))
    process.network_input(process.add_noise(x0, eps, level), level)
    loss, _ = process.loss(out.requires_grad_(), x0, eps, level)
    loss.mean().backward()
    assert out.grad.shape == out.shape
    assert process.draw(3, generator=None, device="meta").shape == (3,)
    assert process.level_at(0.5, 3, "meta").is_meta


@BY_NAME
@pytest.mark.parametrize("n", [1, 3])
def test_level_at_is_the_inverse_of_noise_to_signal(process, n):
    for ratio in (0.013, 0.5, 1, 7.3, 100):
        level = process.level_at(ratio, n, "cpu")
        assert (level.dtype, level.shape) == (torch.float32, (n,))
        assert (level == level[0]).all()
        back = process.noise_to_signal(level.double())
        if process.name == "ddpm":  # timesteps have few ratios: no other is nearer in its logarithm
            every = process.noise_to_signal(torch.arange(process.steps).double())
            gap = (every / ratio).log().abs()
            assert (back / ratio).log().abs()[0] == gap.min()
        else:
            torch.testing.assert_close(back, torch.full_like(back, ratio), rtol=1e-5, atol=0)


@BY_NAME
def test_level_at_returns_the_levels_that_are_there(process):
    levels = torch.arange(0, 1000, 37).float() if process.name == "ddpm" else torch.tensor([0.1, 0.5, 0.875])
    for level, ratio in zip(levels, process.noise_to_signal(levels).tolist()):
        torch.testing.assert_close(process.level_at(ratio, 2, "cpu"), level.expand(2), rtol=1e-6, atol=0)


def test_the_level_of_a_ratio_beyond_a_ddpm_is_its_first_or_last():
    assert DDPM(steps=20).level_at(1e-9, 2, "cpu").tolist() == [0, 0]
    assert DDPM(steps=20).level_at(1e9, 2, "cpu").tolist() == [19, 19]


@BY_NAME
@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan, math.inf])
def test_no_level_has_a_ratio_that_is_not_positive_and_finite(process, ratio):
    with pytest.raises(ValueError, match="noise_to_signal"):
        process.level_at(ratio, 2, "cpu")


@BY_NAME
def test_draw_is_a_function_of_the_generator(process):
    def draw(seed):
        return process.draw(100, generator=torch.Generator().manual_seed(seed), device="cpu")

    assert draw(3).dtype == torch.float32
    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@pytest.mark.parametrize(
    ("process", "law"),
    [
        (EDM(), stats.lognorm(s=1.2, scale=math.exp(-1.2))),
        (EDM(p_mean=0.4, p_std=2.0), stats.lognorm(s=2.0, scale=math.exp(0.4))),
        (Flow(law="uniform"), stats.uniform()),
    ],
)
def test_draw_follows_its_law(process, law):
    level = process.draw(20_000, generator=torch.Generator().manual_seed(0), device="cpu").double()
    assert stats.kstest(level.numpy(), law.cdf).pvalue > 0.01


@pytest.mark.parametrize("process", [Flow(), Flow(mean=-0.5, std=1.7)])
def test_logit_normal_times(process):
    t = process.draw(20_000, generator=torch.Generator().manual_seed(1), device="cpu").double()
    law = stats.norm(process.mean, process.std)
    assert stats.kstest(torch.logit(t).numpy(), law.cdf).pvalue > 0.01


def test_flow_times_stay_inside_the_open_interval():
    for mean in (-200.0, 200.0):
        t = Flow(mean=mean).draw(9, generator=torch.Generator().manual_seed(0), device="cpu")
        assert ((t > 0) & (t < 1)).all()


def test_ddpm_timesteps_are_uniform_integers():
    process = DDPM(steps=7)
    level = process.draw(21_000, generator=torch.Generator().manual_seed(0), device="cpu")
    counts = np.bincount(level.numpy().astype(int), minlength=7)
    assert torch.equal(level, level.round())
    assert len(counts) == 7
    assert stats.chisquare(counts).pvalue > 0.01


# ---------------------------------------------------------------- EDM


def test_edm_matches_karras():
    process = EDM(sigma_data=0.7)
    out, x0, eps, sigma = batch(process)
    sigma = torch.tensor([0.002, 0.03, 0.7, 5.0, 80.0])
    loss, x0_hat = process.loss(out, x0, eps, sigma)
    net_x, net_t = process.network_input(process.add_noise(x0, eps, sigma), sigma)

    s, sd = sigma.double()[:, None, None, None], 0.7
    x_t = x0.double() + s * eps.double()
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    c_in, weight = 1 / (s**2 + sd**2).sqrt(), (s**2 + sd**2) / (s * sd) ** 2
    denoised = c_skip * x_t + c_out * out.double()
    expected = (weight * (denoised - x0.double()) ** 2).mean((1, 2, 3))

    torch.testing.assert_close(weight * c_out**2, torch.ones_like(weight))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(x0_hat.double(), denoised, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(net_x.double(), c_in * x_t, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(net_t.double(), sigma.double().log() / 4, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("sigma", [0.002, 0.1, 0.5, 3.0, 80.0])
def test_edm_inputs_and_targets_have_unit_variance(sigma):
    """For data of standard deviation sigma_data; so a network that returns 0 has loss 1 at every level."""
    process, n = EDM(), 50_000
    x0, eps = 0.5 * randn(n, 1, 1, 1, seed=1), randn(n, 1, 1, 1, seed=2)
    level = torch.full((n,), sigma)
    net_x, _ = process.network_input(process.add_noise(x0, eps, level), level)
    loss, _ = process.loss(torch.zeros_like(x0), x0, eps, level)
    assert abs(net_x.var().item() - 1) < 0.03
    assert abs(loss.mean().item() - 1) < 0.03


def test_edm_sampling_levels():
    levels = EDM().ode_levels(18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)] + [0]
    np.testing.assert_allclose(levels, expected, rtol=1e-12)
    assert EDM().ode_levels(1) == pytest.approx([80, 0])


# ---------------------------------------------------------------- flow matching


def test_flow_target_and_time():
    process = Flow()
    out, x0, eps, t = batch(process)
    loss, _ = process.loss(out, x0, eps, t)
    expected = (out.double() - (eps.double() - x0.double())).square().mean((1, 2, 3))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    net_x, net_t = process.network_input(x0, t)
    assert net_x is x0
    assert torch.equal(net_t, 1000 * t)
    assert process.loss(eps - x0, x0, eps, t)[0].abs().max() == 0


# ---------------------------------------------------------------- weighting

WEIGHTED = pytest.mark.parametrize(
    "process",
    [
        EDM(weighting="x0"),
        EDM(sigma_data=0.7, weighting="x0"),
        Flow(weighting="x0"),
        Flow(law="uniform", weighting="x0"),
    ],
    ids=["edm", "edm_wide_data", "flow", "flow_uniform"],
)


def x0_error(process, out, x0, eps, level):
    """Return mean((x0_hat - x0)^2) of each sample as the papers define x0_hat, from x_t."""
    level = level[:, None, None, None]
    if isinstance(process, EDM):
        c_skip = process.sigma_data**2 / (level**2 + process.sigma_data**2)
        c_out = level * process.sigma_data / (level**2 + process.sigma_data**2).sqrt()
        x0_hat = c_skip * (x0 + level * eps) + c_out * out
    else:
        x0_hat = (1 - level) * x0 + level * eps - level * out
    return ((x0_hat - x0) ** 2).mean((1, 2, 3))


@WEIGHTED
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_x0_weighting_is_the_squared_error_of_the_x0_prediction(process, out_dtype):
    out, x0, eps, level = batch(process)
    out = out.to(out_dtype).requires_grad_()
    upstream = torch.linspace(-1, 2, len(level))
    loss, x0_hat = process.loss(out, x0, eps, level)
    (gradient,) = torch.autograd.grad(loss, out, upstream)

    exact = out.detach().double().requires_grad_()
    expected = x0_error(process, exact, x0.double(), eps.double(), level.double())
    (expected_gradient,) = torch.autograd.grad(expected, exact, upstream.double())
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    rounding = 4e-3 if out_dtype == torch.bfloat16 else 2e-6
    bound = 1e-6 * expected_gradient.abs().amax((1, 2, 3), keepdim=True)
    assert ((gradient.double() - expected_gradient).abs() <= rounding * expected_gradient.abs() + bound).all()

    default, default_x0_hat = replace(process, weighting="output").loss(out, x0, eps, level)
    assert torch.equal(x0_hat, default_x0_hat), "the weighting is of the loss alone"
    assert not torch.allclose(loss, default)


@WEIGHTED
def test_x0_weighting_in_float64(process):
    out, x0, eps, level = (tensor.double() for tensor in batch(process))
    loss, x0_hat = process.loss(out, x0, eps, level)
    torch.testing.assert_close(loss, (x0_hat - x0).square().mean((1, 2, 3)), rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, x0_error(process, out, x0, eps, level), rtol=1e-9, atol=0)


@pytest.mark.parametrize("process", [EDM(), Flow()], ids=["edm", "flow"])
def test_output_weighting_is_the_default_and_multiplies_by_one(process):
    """Compare with the plain PyTorch implementation and no weight at all, to the bit."""
    out, x0, eps, level = batch(process)
    assert process == type(process)(weighting="output")
    if isinstance(process, EDM):
        inv_total = (level.square() + process.sigma_data**2).rsqrt()
        of_x0, of_eps = level / process.sigma_data * inv_total, -process.sigma_data * inv_total
    else:
        of_x0, of_eps = -torch.ones_like(level), torch.ones_like(level)
    target = of_x0[:, None, None, None] * x0 + of_eps[:, None, None, None] * eps
    loss, _ = process.loss(out, x0, eps, level)
    assert torch.equal(loss, (out - target).square().flatten(1).mean(1))


# ---------------------------------------------------------------- settings


def test_a_ddpm_predicts_the_variance_too():
    assert [process.out_channels(4) for process in (EDM(), DDPM(), Flow())] == [4, 8, 4]


def test_data_std_is_the_deviation_that_the_process_is_made_for():
    assert [process.data_std for process in (EDM(), EDM(sigma_data=0.7), DDPM(), Flow())] == [0.5, 0.7, 1.0, 1.0]


def test_only_a_ddpm_limits_the_sampling_steps():
    for process in (EDM(), Flow(), DDPM(steps=5000)):
        process.check_sampling_steps(5000)
    with pytest.raises(UserError, match=r"sample.steps: 51; noise.ddpm.steps allows at most 50"):
        DDPM(steps=50).check_sampling_steps(51)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (EDM, {"sigma_min": 90.0}, "noise.edm.sigma_min, noise.edm.sigma_max: 90.0 and 80.0"),
        (EDM, {"sigma_data": 0.0}, "noise.edm.sigma_data: 0.0"),
        (EDM, {"weighting": "eps"}, "noise.edm.weighting: unknown weighting 'eps'; choose one of output, x0"),
        (DDPM, {"steps": 1}, "noise.ddpm.steps: must be from 2 to 16777216, got 1"),
        (DDPM, {"steps": 2**24 + 1}, "noise.ddpm.steps: must be from 2 to 16777216, got 16777217"),
        (DDPM, {"beta_end": math.nan}, "noise.ddpm.beta_end: must be a finite number, got nan"),
        (EDM, {"p_mean": math.inf}, "noise.edm.p_mean: must be a finite number, got inf"),
        (Flow, {"mean": math.nan}, "noise.flow.mean: must be a finite number, got nan"),
        (DDPM, {"beta_end": 1.0}, "noise.ddpm.beta_start, noise.ddpm.beta_end"),
        (Flow, {"law": "cosine"}, "noise.flow.law: unknown law 'cosine'; choose one of logit_normal, uniform"),
        (Flow, {"std": 0.0}, "noise.flow.std: 0.0"),
        (Flow, {"convention": "sd3"}, "noise.flow.convention: unknown convention 'sd3'; choose one of own, sit, repa"),
        (Flow, {"weighting": "eps"}, "noise.flow.weighting: unknown weighting 'eps'; choose one of output, x0"),
    ],
)
def test_unusable_settings_are_refused(kind, settings, message):
    with pytest.raises(UserError, match=message):
        kind(**settings)
