"""Noise processes and samplers, against float64 transcriptions of the papers, diffusers, exact solutions."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from scipy import stats

from fastdit.errors import UserError
from fastdit.noise import DDPM, EDM, Flow, PerSampleNoise, make_noise, sample

SHAPE = (5, 3, 3, 7)
PROCESSES = [EDM(), DDPM(), Flow(), Flow(law="uniform")]
BY_NAME = pytest.mark.parametrize("process", PROCESSES, ids=["edm", "ddpm", "flow", "flow_uniform"])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def batch(process, seed=0, scale=0.5):
    """out, x0, eps, level of a training step; the lowest timestep of a DDPM is among the levels."""
    level = process.draw(SHAPE[0], generator=torch.Generator().manual_seed(seed), device="cpu")
    if process.name == "ddpm":
        level[1] = 0
    channels = process.out_channels(SHAPE[1])
    out = randn(SHAPE[0], channels, *SHAPE[2:], seed=seed + 1)
    return out, scale * randn(*SHAPE, seed=seed + 2), randn(*SHAPE, seed=seed + 3), level


# ---------------------------------------------------------------- what every process owes


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
def test_a_step_reads_nothing_back_from_the_device(process):
    """Tensors without data: any branch on a value or transfer to the host raises."""
    out, x0, eps, level = (tensor.to("meta") for tensor in batch(process))
    process.network_input(process.add_noise(x0, eps, level), level)
    loss, _ = process.loss(out.requires_grad_(), x0, eps, level)
    loss.mean().backward()
    assert out.grad.shape == out.shape
    assert process.draw(3, generator=None, device="meta").shape == (3,)


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


# ---------------------------------------------------------------- DDPM


def linear_chain(steps=1000, start=1e-4, end=0.02):
    """betas, alpha_bar, alpha_bar_prev, posterior variance clipped at its second, by the book in float64."""
    betas = torch.tensor([start + i * (end - start) / (steps - 1) for i in range(steps)], dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0)
    prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    posterior = betas * (1 - prev) / (1 - alpha_bar)
    posterior[0] = posterior[1]
    return betas, alpha_bar, prev, posterior


def hybrid_loss(out, x0, eps, level, steps):
    """Nichol & Dhariwal's L_hybrid, term by term as the papers write them."""
    column = [values[level.long()][:, None, None, None] for values in linear_chain(steps)]
    beta, alpha_bar, prev, posterior = column
    out, x0, eps = out.double(), x0.double(), eps.double()
    eps_hat, v = out[:, : x0.shape[1]], out[:, x0.shape[1] :]
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    guess = (x_t - (1 - alpha_bar).sqrt() * eps_hat) / alpha_bar.sqrt()

    def posterior_mean(x):
        return (prev.sqrt() * beta * x + (1 - beta).sqrt() * (1 - prev) * x_t) / (1 - alpha_bar)

    true_mean, mean = posterior_mean(x0), posterior_mean(guess).detach()
    frac = (v + 1) / 2
    log_var = frac * beta.log() + (1 - frac) * posterior.log()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(true_mean, posterior.sqrt().expand_as(mean)),
        torch.distributions.Normal(mean, (log_var / 2).exp()),
    )
    law = torch.distributions.Normal(mean, (log_var / 2).exp())
    above, below = law.cdf(x0 + 1 / 255), law.cdf(x0 - 1 / 255)
    mass = torch.where(x0 > 0.999, 1 - below, torch.where(x0 < -0.999, above, above - below))
    term = torch.where(level[:, None, None, None] == 0, -mass.clamp(min=1e-12).log(), kl) / math.log(2)
    return ((eps_hat - eps) ** 2).mean((1, 2, 3)) + steps / 1000 * term.mean((1, 2, 3))


@pytest.mark.parametrize("steps", [1000, 50])
def test_ddpm_loss_and_gradient_match_the_papers(steps):
    process = DDPM(steps=steps)
    out, x0, eps, _ = batch(process, scale=1.0)  # beyond [-1, 1] too: the decoder's open bins
    # an eps error small enough at timestep 0 for the mean to fall near x0's bin
    out[:, : SHAPE[1]] = eps + 0.3 * out[:, : SHAPE[1]]
    level = torch.tensor([0.0, 1.0, 0.0, steps // 2, steps - 1])
    out.requires_grad_()
    loss, _ = process.loss(out, x0, eps, level)
    expected = hybrid_loss(out, x0, eps, level, steps)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), out)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), out)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_ddpm_decoder_likelihood_is_a_distribution():
    """At timestep 0 the masses of the 256 pixel values add up to one."""
    process = DDPM()
    pixels = torch.arange(256) / 127.5 - 1
    x0 = pixels[:, None, None, None].expand(256, 1, 1, 2)
    x_t = torch.tensor([0.31, -0.99]).expand_as(x0)
    level = torch.zeros(256)
    ratio = process.noise_to_signal(level)[:, None, None, None]
    signal = process.add_noise(torch.ones_like(x0), torch.zeros_like(x0), level)
    eps = (x_t / signal - x0) / ratio  # the noise that would have led from each pixel value to x_t
    eps_hat = torch.full_like(x0, 0.4)
    out = torch.cat([eps_hat, torch.full_like(x0, 0.2)], dim=1)
    for column in (0, 1):  # one at a time: the loss is a mean over the dimensions
        cut = (..., slice(column, column + 1))
        loss, _ = process.loss(out[cut], x0[cut], eps[cut], level)
        bits = loss.double() - (eps_hat - eps)[cut].double().square().mean((1, 2, 3))
        assert abs((2**-bits).sum().item() - 1) < 1e-3


def test_ddpm_variational_term_trains_the_variance_alone():
    process = DDPM()
    out, x0, eps, level = batch(process)
    out.requires_grad_()
    loss, x0_hat = process.loss(out, x0, eps, level)
    (gradient,) = torch.autograd.grad(loss.sum(), out, retain_graph=True)
    c, dims = SHAPE[1], math.prod(SHAPE[1:])
    torch.testing.assert_close(gradient[:, :c], 2 * (out[:, :c] - eps).detach() / dims, rtol=1e-5, atol=1e-8)
    assert (gradient[:, c:] != 0).any(dim=(1, 2, 3)).all()
    (gradient,) = torch.autograd.grad(x0_hat.sum(), out)
    assert (gradient[:, :c] != 0).all()
    assert (gradient[:, c:] == 0).all()


def test_ddpm_chain_matches_diffusers():
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    process = DDPM()
    np.testing.assert_allclose(process.chain().alpha_bar, scheduler.alphas_cumprod.numpy(), rtol=2e-5)
    _, x0, eps, level = batch(process)
    expected = scheduler.add_noise(x0, eps, level.long())
    torch.testing.assert_close(process.add_noise(x0, eps, level), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1000, 36])
def test_ddpm_respacing_is_the_published_one(length):
    process = DDPM(steps=length)
    for count in range(2, length + 1):
        expected, position = set(), 0.0
        for _ in range(count):
            expected.add(round(position))
            position += (length - 1) / (count - 1)
        assert process.chain(count).timestep.tolist() == sorted(expected)
    assert process.chain(1).timestep.tolist() == [length - 1]


def test_ddpm_respaced_chain_keeps_the_marginals():
    chain, (_, alpha_bar, _, _) = DDPM().chain(25), linear_chain()
    np.testing.assert_allclose(chain.alpha_bar, alpha_bar[chain.timestep].numpy(), rtol=1e-12)
    np.testing.assert_allclose(np.cumprod(1 - chain.beta), chain.alpha_bar, rtol=1e-12)


def wavy(process):
    """A made-up network, unlike for every label and level."""

    def network(x, t, y):
        wave = torch.sin(3 * x + (y / 3 + t / 400)[:, None, None, None])
        return torch.cat([0.3 * x + 0.5 * wave, wave.cos()], 1)[:, : process.out_channels(x.shape[1])]

    return network


@pytest.mark.parametrize("steps", [25, 100])
def test_ddpm_sampler_matches_diffusers(steps):
    """Ancestral steps with the learned variance on the respaced chain."""
    process = DDPM()
    scheduler = DDPMScheduler(
        beta_schedule="linear", variance_type="learned_range", clip_sample=False, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == process.chain(steps).timestep.tolist()[::-1]
    network, y = wavy(process), torch.arange(SHAPE[0])
    x = noise = randn(*SHAPE, dtype=torch.float64)
    theirs = torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        out = network(x.float(), t.expand(SHAPE[0]).float(), y).double()
        x = scheduler.step(out, t, x, generator=theirs).prev_sample
    ours = torch.Generator().manual_seed(5)
    draw_noise = lambda shape: torch.randn(shape, generator=ours, dtype=torch.float64)  # noqa: E731
    result = sample(process, network, noise, y, steps=steps, draw_noise=draw_noise)
    # diffusers keeps its schedule in float32
    torch.testing.assert_close(result, x.float(), rtol=1e-3, atol=1e-3)


def test_ddpm_sampler_matches_a_transcription():
    process, steps = DDPM(), 11
    timesteps = process.chain(steps).timestep
    kept = linear_chain()[1][timesteps]
    network, y = wavy(process), torch.arange(SHAPE[0])
    fresh = randn(steps, *SHAPE, seed=9, dtype=torch.float64)
    x = noise = randn(*SHAPE, dtype=torch.float64)
    for i in reversed(range(steps)):
        alpha_bar, prev = kept[i], kept[i - 1] if i else torch.tensor(1.0, dtype=torch.float64)
        beta = 1 - alpha_bar / prev
        out = network(x.float(), torch.full((SHAPE[0],), float(timesteps[i])), y).double()
        guess = (x - (1 - alpha_bar).sqrt() * out[:, :3]) / alpha_bar.sqrt()
        mean = (prev.sqrt() * beta * guess + (1 - beta).sqrt() * (1 - prev) * x) / (1 - alpha_bar)
        low = beta * (1 - prev) / (1 - alpha_bar)
        frac = (out[:, 3:] + 1) / 2
        x = mean if i == 0 else mean + (beta**frac * low ** (1 - frac)).sqrt() * fresh[i]
    numbers = iter(fresh.flip(0))
    result = sample(process, network, noise, y, steps=steps, draw_noise=lambda shape: next(numbers))
    torch.testing.assert_close(result, x.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [10, 20])
def test_ddim_sampler_matches_diffusers(steps):
    """On a respaced chain, which diffusers is given as betas of its own."""
    process = DDPM()
    chain = process.chain(steps)
    scheduler = DDIMScheduler(
        num_train_timesteps=steps, trained_betas=chain.beta, clip_sample=False, set_alpha_to_one=True
    )
    scheduler.set_timesteps(steps)
    network, y = wavy(process), torch.arange(SHAPE[0])
    x = noise = randn(*SHAPE, dtype=torch.float64)
    for i in scheduler.timesteps.tolist():
        out = network(x.float(), torch.full((SHAPE[0],), float(chain.timestep[i])), y).double()
        x = scheduler.step(out[:, :3], i, x, eta=0.0).prev_sample
    result = sample(process, network, noise, y, steps=steps, sampler="ddim")
    torch.testing.assert_close(result, x.float(), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- samplers on Gaussian data

MU, STD = 0.7, 0.4


def marginal(process, level):
    """signal and noise coefficients at `level`, a float64 tensor."""
    one = torch.ones(level.numel(), 1, 1, 1, dtype=level.dtype)
    flat = level.reshape(-1)
    return (
        process.add_noise(one, 0 * one, flat).reshape(level.shape),
        process.add_noise(0 * one, one, flat).reshape(level.shape),
    )


def raw_output(process, x0_hat, x_t, level):
    """What the network must return for its clean estimate to be x0_hat (DDPM's variance channels: zeros)."""
    level = level[:, None, None, None]
    if process.name == "edm":
        total, sd = level**2 + process.sigma_data**2, process.sigma_data
        return (x0_hat - sd**2 / total * x_t) * total.sqrt() / (level * sd)
    if process.name == "flow":
        return (x_t - x0_hat) / level
    signal, noise = marginal(process, level)
    eps = (x_t - signal * x0_hat) / noise
    return torch.cat([eps, torch.zeros_like(eps)], dim=1)


def optimal_network(process, variance=None):
    """E[x0 | x_t] for x0 ~ N(MU, STD^2), as a raw network; `variance(t)` gives a DDPM's variance channels."""

    def network(x, t, y):
        level = {"edm": (4 * t.double()).exp(), "flow": t.double() / 1000, "ddpm": t.double()}[process.name]
        x = x.double()
        if process.name == "edm":
            x = x * (level**2 + process.sigma_data**2).sqrt()[:, None, None, None]
        signal, noise = marginal(process, level[:, None, None, None])
        gain = signal * STD**2 / (signal**2 * STD**2 + noise**2)
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
    [(EDM(), "heun", 2), (EDM(), "euler", 1), (Flow(), "heun", 2), (Flow(), "euler", 1), (DDPM(), "ddim", 1)],
    ids=["edm_heun", "edm_euler", "flow_heun", "flow_euler", "ddim"],
)
def test_ode_samplers_converge_to_the_exact_solution_at_their_order(process, sampler, order):
    coarse, fine = ode_error(process, sampler, 40), ode_error(process, sampler, 80)
    assert abs(math.log2(coarse / fine) - order) < 0.2
    assert fine < (0.004 if order == 2 else 0.06)


@pytest.mark.parametrize(("process", "sampler"), [(p, s) for p in (EDM(), DDPM(), Flow()) for s in p.samplers])
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
    result = sample(process, network, fresh((n, 2, 3, 5)), y, steps=steps, sampler=sampler, draw_noise=fresh)
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


EVERY_SAMPLER = pytest.mark.parametrize(
    ("process", "sampler"), [(p, s) for p in (EDM(), DDPM(), Flow()) for s in p.samplers]
)


@EVERY_SAMPLER
def test_guidance_of_one_is_no_guidance(process, sampler):
    plain, guided = Recorder(process, wavy(process)), Recorder(process, wavy(process))
    expected = run(process, plain, sampler)
    assert torch.equal(run(process, guided, sampler, guidance=1.0, null_label=3), expected)
    calls = 11 if sampler == "heun" else 6
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
        level = {"edm": (4 * t).exp(), "flow": t / 1000, "ddpm": t}[process.name]
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


def test_make_noise():
    assert make_noise("edm", sigma_data=1.0) == EDM(sigma_data=1.0)
    assert make_noise("ddpm", steps=50) == DDPM(steps=50)
    assert make_noise("flow", law="uniform") == Flow(law="uniform")
    assert [process.out_channels(4) for process in (EDM(), DDPM(), Flow())] == [4, 8, 4]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("vp", {}, "unknown process 'vp'; choose one of edm, ddpm, flow"),
        ("edm", {"steps": 3}, "noise.steps: edm has no such field; it has p_mean"),
        ("edm", {"sigma_min": 90.0}, "noise.sigma_min"),
        ("edm", {"sigma_data": 0.0}, "noise.sigma_data"),
        ("ddpm", {"steps": 1}, "noise.steps"),
        ("ddpm", {"beta_end": 1.0}, "noise.beta_end"),
        ("flow", {"law": "cosine"}, "choose one of logit_normal, uniform"),
        ("flow", {"std": 0.0}, "noise.std"),
    ],
)
def test_unusable_processes_are_refused(name, settings, message):
    with pytest.raises(UserError, match=message):
        make_noise(name, **settings)


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
    with pytest.raises(ValueError, match="labels for noise"):
        sample(DDPM(), wavy(DDPM()), noise, y[:2], steps=2, sampler="ddim")
