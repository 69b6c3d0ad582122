"""Test the gradient of SADM's structure loss at samples of different noise levels, and what the clamp does."""

import pytest
import torch
from data_helpers import take
from structure_game_helpers import CPU, Silent, seeded

from fastdit.data import open_source
from fastdit.methods.structure_game import SADM, StructureGame
from fastdit.models import LatentResNet
from fastdit.noise import DDPM, EDM, Flow

SIGMAS = torch.logspace(-2, 2.15, 64).tolist()  # noise to signal from 0.01 to 141


class FixedNoise(Silent):
    """A base whose samples have the noise levels SIGMAS."""

    def draw(self, x0, y, generator):
        level = torch.cat([self.noise.level_at(sigma, 1, "cpu") for sigma in SIGMAS])
        return level, torch.randn(x0.shape, generator=generator), y


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    ((x0, _),) = take(1, open_source("fashion_mnist"), batch=len(SIGMAS), size=28, channels=1, flip=False, threads=1)
    return x0


def exact_output(process, x0: torch.Tensor, eps: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Return the network's output whose x0 prediction is x0."""
    if process.name == "edm":
        s, sd = level[:, None, None, None], process.sigma_data
        return (s * x0 - sd**2 * eps) / (sd * (s**2 + sd**2).sqrt())
    if process.name == "flow":
        return eps - x0
    return torch.cat([eps, torch.zeros_like(eps)], dim=1)


def pulls(process, x0: torch.Tensor, error: float, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the samples' noise to signal and the norms of L_str's gradient at outputs that are wrong by `error`."""
    base = FixedNoise(process, 10, 0.0)
    psi = LatentResNet(channels=1, features=32, width=16)
    method = StructureGame(base, SADM(structure="fixed", weight=1.0, **settings), psi)
    method.to(CPU, torch.float32)
    level, eps, _ = base.draw(x0, None, seeded())
    exact = exact_output(process, x0, eps, level)
    scale = exact.flatten(1).square().mean(1).sqrt()[:, None, None, None]
    out = (exact + error * scale * torch.randn(exact.shape, generator=seeded(5))).requires_grad_()
    outcome = method.loss(lambda x, t, y: out, x0, torch.zeros(len(x0), dtype=torch.int64), seeded())
    (gradient,) = torch.autograd.grad(outcome.loss, out)
    return process.noise_to_signal(level), gradient.flatten(1).norm(dim=1)


@pytest.mark.parametrize("process", [DDPM(), EDM(), Flow()], ids=lambda process: process.name)
def test_noise_is_not_pulled_harder_than_clean_samples(process, images):
    sigma, wrong = pulls(process, images, 0.1)
    assert (sigma > 20).sum() > 8
    assert (sigma < 1).sum() > 8
    assert wrong[sigma < 1].mean() > 0
    assert wrong[sigma > 20].mean() <= wrong[sigma < 1].mean()
    assert ((wrong == 0) == (sigma > 5)).all(), "max_noise leaves out those above it"
    assert wrong[(sigma > 1) & (sigma < 5)].mean() < 6 * wrong[(sigma > 0.1) & (sigma < 1)].mean()
    assert pulls(process, images, 0.0)[1].mean() < 1e-3 * wrong.mean()


@pytest.mark.parametrize("process", [DDPM(), EDM(), Flow()], ids=lambda process: process.name)
def test_predictions_outside_the_range_get_no_gradient(process, images):
    """With the smallest possible range, everything Psi sees is on its edge, and it pulls at nothing."""
    assert images.abs().max() == 1
    narrow, batch, stated, wide = (pulls(process, images, 0.1, clamp=clamp)[1] for clamp in (1e-6, None, 1.0, 9.0))
    assert torch.equal(batch, stated), "by default the batch gives the range"
    assert not torch.equal(batch, wide)
    assert narrow.max() <= 0.01 * batch.max()
