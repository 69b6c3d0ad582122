"""DDPM against float64 transcriptions of the papers and diffusers: the loss, the chain, both samplers."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from noise_helpers import SHAPE, batch, randn, wavy

from fastdit.noise import DDPM, sample


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
