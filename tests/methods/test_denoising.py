"""Test the plain method: the network's inputs and the loss, against fp64 and plain torch."""

import math

import pytest
import torch

from fastdit.methods.denoising import Denoising
from fastdit.noise import DDPM, EDM, Flow

CLASSES = 5
PROCESSES = [EDM(), DDPM(), Flow()]


def batch(n=6, channels=2, size=(5, 7)):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(n, channels, *size, generator=generator) * 2 - 1
    return x0, torch.randint(CLASSES, (n,), generator=generator)


class Toy(torch.nn.Module):
    """A mean over channels with a bias for each label and the level, in the shape that `out_channels` asks for."""

    def __init__(self, out_channels: int):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.linspace(-0.3, 0.3, CLASSES + 1))
        self.out_channels = out_channels
        self.seen = []

    def forward(self, x, t, y):
        self.seen.append((x, t, y))
        level = torch.tanh(t / 100)[:, None, None, None]
        out = x.mean(1, keepdim=True) * (0.5 + level) + self.bias[y][:, None, None, None]
        return out.repeat(1, self.out_channels, 1, 1)


def fp64_loss(process, out, x0, eps, level) -> torch.Tensor:
    """Return losses (B,) in the papers' form: weighted errors of the x0 prediction, unlike the code's form."""
    out, x0, eps, level = (tensor.double() for tensor in (out, x0, eps, level))
    level = level[:, None, None, None]
    if isinstance(process, EDM):
        sd, total = process.sigma_data, level**2 + process.sigma_data**2
        clean = sd**2 / total * (x0 + level * eps) + level * sd / total.sqrt() * out
        return (total / (level * sd) ** 2 * (clean - x0) ** 2).mean((1, 2, 3))
    if isinstance(process, Flow):
        return ((out - (eps - x0)) ** 2).mean((1, 2, 3))
    eps_hat, v = out.chunk(2, 1)
    beta = torch.linspace(process.beta_start, process.beta_end, process.steps, dtype=torch.float64)
    bar = torch.cumprod(1 - beta, 0)
    prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
    posterior = beta * (1 - prev) / (1 - bar)
    posterior[0] = posterior[1]
    t = level.long().flatten()
    b, a, p, var = (c[t][:, None, None, None] for c in (beta, bar, prev, posterior))
    x_t = a.sqrt() * x0 + (1 - a).sqrt() * eps

    def mean_of(clean):
        return p.sqrt() * b / (1 - a) * clean + (1 - b).sqrt() * (1 - p) / (1 - a) * x_t

    log_var = (v + 1) / 2 * b.log() + (1 - v) / 2 * var.log()
    gap = mean_of(x0) - mean_of((x_t - (1 - a).sqrt() * eps_hat) / a.sqrt())
    kl = 0.5 * (log_var - var.log() - 1 + (var + gap**2) / log_var.exp()) / math.log(2)
    assert (t > 0).all(), "timestep 0 has the decoder's likelihood: tests/noise/test_noise.py"
    return ((eps_hat - eps) ** 2 + process.steps / 1000 * kl).mean((1, 2, 3))


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_loss_is_that_of_the_paper(process):
    x0, y = batch()
    network = Toy(process.out_channels(2))
    loss, terms, *_ = Denoising(process, CLASSES, 0.3).loss(network, x0, y, torch.Generator().manual_seed(3))
    ((net_in, net_t, labels),) = network.seen

    replay = torch.Generator().manual_seed(3)
    level = process.draw(len(x0), generator=replay, device="cpu")
    eps = torch.randn(x0.shape, generator=replay)
    expected_in, expected_t = process.network_input(process.add_noise(x0, eps, level), level)
    assert torch.equal(net_in, expected_in)
    assert torch.equal(net_t, expected_t)
    out = Toy(process.out_channels(2))(net_in, net_t, labels)
    assert loss.item() == pytest.approx(fp64_loss(process, out, x0, eps, level).mean().item(), rel=2e-5)
    assert terms.keys() == {"loss"}
    assert torch.equal(terms["loss"], loss.detach())
    assert not terms["loss"].requires_grad
    assert loss.shape == ()


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_the_generator_alone_decides(process):
    x0, y = batch()
    method = Denoising(process, CLASSES, 0.5)

    def value(seed):
        torch.manual_seed(torch.randint(10**6, ()).item())  # whatever the global state is
        return method.loss(Toy(process.out_channels(2)), x0, y, torch.Generator().manual_seed(seed))[0]

    assert torch.equal(value(1), value(1))
    assert not torch.equal(value(1), value(2))
    before = torch.get_rng_state()
    value_generator = torch.Generator().manual_seed(0)
    method.loss(Toy(process.out_channels(2)), x0, y, value_generator)
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_gradients_reach_the_network_only(process):
    x0, y = batch()
    x0.requires_grad_(False)
    network = Toy(process.out_channels(2))
    loss, *_ = Denoising(process, CLASSES, 0.0).loss(network, x0, y, torch.Generator().manual_seed(0))
    loss.backward()
    used = torch.zeros(CLASSES + 1, dtype=torch.bool).index_fill(0, y, True)
    assert torch.equal(network.bias.grad != 0, used)
    assert not any(tensor.requires_grad for tensor in network.seen[0])


def test_labels_are_dropped_at_the_rate_asked_for():
    y = torch.arange(40_000) % CLASSES
    generator = torch.Generator().manual_seed(0)
    for rate in (0.1, 0.5):
        dropped = Denoising(EDM(), CLASSES, rate).drop_labels(y, generator)
        gone = dropped == CLASSES
        assert torch.equal(dropped[~gone], y[~gone])
        spread = 4 * math.sqrt(rate * (1 - rate) / len(y))
        assert abs(gone.float().mean().item() - rate) < spread
        shares = torch.stack([gone[y == label].float().mean() for label in range(CLASSES)])
        assert (shares - rate).abs().max() < spread * math.sqrt(CLASSES), "every label alike"
    assert torch.equal(Denoising(EDM(), CLASSES, 0.0).drop_labels(y, generator), y)
    assert (Denoising(EDM(), CLASSES, 1.0).drop_labels(y, generator) == CLASSES).all()
    assert dropped.dtype == torch.int64
