"""Test that one pass of Psi gives both players' gradients, against a pass for each player, and what stays in memory."""

import copy
import gc
import weakref

import pytest
import torch
from structure_game_helpers import (
    CHANNELS,
    CLASSES,
    CPU,
    Denoiser,
    Exact,
    clamped,
    first_gradients,
    game,
    gradient_penalty,
    gradients,
    sample_weights,
    samples,
    seeded,
    structure,
    tiny_psi,
)
from torch.nn.utils import parametrizations

from fastdit.methods.denoising import Denoising, Outcome
from fastdit.methods.structure_game import SADM, StructureGame
from fastdit.models import LatentResNet
from fastdit.noise import EDM

CASES = {
    "fixed": {"structure": "fixed"},
    "adversarial": {},
    "other distances": {"distance": "squared", "normalize": "none", "penalty": "l1"},
    "cosine": {"distance": "cosine", "normalize": "mean", "penalty": "huber"},
    "gradient penalty": {"gradient_penalty": 0.4},
    "spectral norm": {"spectral_norm": True},
    "every other step": {"psi_every": 2},
}


class Base(Denoising):
    """Compute the base's loss in the dtype of its samples. The generator gives levels and noise."""

    def loss(self, network, x0, y, generator):
        level = self.noise.draw(len(x0), generator=generator, device="cpu").to(x0.dtype)
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype)
        x0_hat = network(x0 + level[:, None, None, None] * eps, level, y)
        loss = (x0_hat - x0).square().mean()
        return Outcome(loss, {"loss": loss.detach()}, x0_hat, level, (x0_hat,))


class Double(StructureGame):
    """Play the game in fp64 throughout."""

    def _features(self, x):
        return self.psi(x)


def psi_of(settings: dict) -> torch.nn.Module:
    psi = tiny_psi().double()
    if settings.get("spectral_norm"):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            parametrizations.spectral_norm(psi[1])
    return psi.eval()


def two_passes(settings: SADM, network, psi, batches) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the gradients of the denoiser's loss, with Psi frozen, and of what Psi ascends, on detached predictions.

    Both are means over batches.
    """
    denoiser, ascent = [], []
    for seed, (x0, y) in enumerate(batches):
        draws = seeded(seed)
        outcome = Base(EDM(), CLASSES, 0.3).loss(network, x0, y, draws)
        weight = sample_weights(outcome.level, settings)
        limit = x0.abs().max()
        psi.requires_grad_(False)
        judged = structure(psi(x0), psi(clamped(outcome.x0_hat, limit)), weight, settings)
        loss = outcome.loss + settings.weight * judged
        denoiser.append(torch.autograd.grad(loss, list(network.parameters())))

        psi.requires_grad_(True)
        estimate = clamped(outcome.x0_hat.detach(), limit)
        climbed = structure(psi(x0), psi(estimate), weight, settings)
        if settings.gradient_penalty:
            directions = torch.randn(len(x0), 2, 4, generator=draws, dtype=x0.dtype).transpose(0, 1).flatten(0, 1)
            one = Exact(network, psi, x0, estimate, climbed)
            climbed = climbed - settings.gradient_penalty * gradient_penalty(one, directions, relative=True)
        ascent.append(torch.autograd.grad(climbed, list(psi.parameters())))
    return tuple([torch.stack(parts).mean(0) for parts in zip(*found, strict=True)] for found in (denoiser, ascent))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_pass_finds_what_two_find(monkeypatch, case):
    """Compare two micro-batches in fp64, and then those of the next step."""
    randn = torch.randn  # directions of the penalty are drawn in fp32 by the game
    monkeypatch.setattr(torch, "randn", lambda *a, dtype=None, **k: randn(*a, dtype=torch.float64, **k))
    settings, network, psi = SADM(weight=0.7, psi_lr=1e-2, **case), Denoiser().double(), psi_of(case)
    method = Double(Base(EDM(), CLASSES, 0.3), settings, psi)
    method.to(CPU, torch.float32)
    batches = [(x0.double(), y) for x0, y in (samples(5, seed) for seed in range(2))]
    for number in range(2):
        learns = settings.structure == "adversarial" and (number + 1) % settings.psi_every == 0
        expected, ascent = two_passes(settings, network, copy.deepcopy(psi), batches)
        before = [method.optimizer.state[p].get("exp_avg", 0 * p).clone() for p in psi.parameters()] if learns else []
        network.zero_grad()
        for seed, (x0, y) in enumerate(batches):
            (method.loss(network, x0, y, seeded(seed)).loss / 2).backward()
        for gradient, true in zip(gradients(network), expected, strict=True):
            torch.testing.assert_close(gradient, true, rtol=1e-10, atol=1e-12)
        assert method.end_step().keys() == {"gradient_ratio", *(["psi_grad_norm"] if learns else [])}
        beta = settings.psi_betas[0]
        for weight, moment, true in zip(psi.parameters(), before, ascent, strict=learns):
            climbed = (beta * moment - method.optimizer.state[weight]["exp_avg"]) / (1 - beta)
            assert true.abs().max() > 1e-4
            torch.testing.assert_close(climbed, true, rtol=1e-9, atol=1e-12)


def test_in_bf16_too():
    """In bf16, as on GPUs, the bits are those of a pass for each player, but for the order of a sum."""
    psi, network = LatentResNet(channels=CHANNELS, features=8, width=16), Denoiser()
    method = game(EDM(), psi=psi, base=Denoising)
    method.to(CPU, torch.bfloat16)
    x0, y = torch.rand(6, CHANNELS, 8, 8, generator=seeded()) * 2 - 1, torch.arange(6) % CLASSES
    base = method.base.loss(network, x0, y, seeded())
    psi.requires_grad_(False)
    x0_hat = base.x0_hat.clamp(-x0.abs().max(), x0.abs().max())
    frozen = method._compare(method._features(x0), method._features(x0_hat), base.level).loss
    expected = torch.autograd.grad(base.loss + frozen, list(network.parameters()))
    psi.requires_grad_(True)
    features = method._features(torch.cat([x0, x0_hat.detach()]))
    ascent = torch.autograd.grad(method._compare(*features.chunk(2), base.level).loss, list(psi.parameters()))

    outcome = method.loss(network, x0, y, seeded())
    outcome.loss.backward()
    method.end_step()
    assert torch.equal(outcome.terms["structure_loss"], frozen)
    for gradient, true in zip(gradients(network), expected, strict=True):
        torch.testing.assert_close(gradient, true, rtol=1e-5, atol=1e-7)
    for gradient, true in zip(first_gradients(method), ascent, strict=True):
        assert (gradient - true).norm() < 0.02 * true.norm()


@pytest.mark.parametrize("settings", [{}, {"gradient_penalty": 0.1}, {"structure": "fixed"}])
def test_psis_activations_are_gone_before_the_denoisers_backward_pass(settings):
    activations, psi = [], LatentResNet(channels=CHANNELS, features=4, width=16)
    for module in psi.modules():
        module.register_forward_hook(lambda _, inputs, made: activations.append(weakref.ref(made)))
    method, x0 = game(EDM(), psi=psi, base=Denoising, **settings), torch.rand(4, CHANNELS, 8, 8, generator=seeded())
    outcome = method.loss(network := Denoiser(), x0, torch.arange(4), seeded())
    gc.collect()
    assert len(activations) > 20
    assert all(made() is None for made in activations)
    outcome.loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
