"""Test SADM's losses and gradients of both players against methods.md's formulas in fp64, and the players' steps."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_exact
from structure_game_helpers import (
    CHANNELS,
    CLASSES,
    Denoiser,
    Scripted,
    Silent,
    exact,
    first_gradients,
    game,
    gradients,
    sample_weights,
    samples,
    seeded,
    tiny_psi,
)
from torch import nn

from fastdit.methods.denoising import Denoising
from fastdit.methods.structure_game import StructureGame
from fastdit.models import LatentResNet
from fastdit.noise import DDPM, EDM, Flow

CASES = [
    (EDM(), {}),
    (Flow(), {"normalize": "mean"}),
    (DDPM(), {"sigma_data": 1.0}),
    (Flow(), {"distance": "squared", "penalty": "l1"}),
    (EDM(), {"distance": "cosine", "penalty": "huber", "huber_delta": 0.1}),
    (Flow(), {"normalize": "none", "penalty": "huber", "huber_delta": 0.05}),
    (DDPM(), {"distance": "cosine", "normalize": "none", "penalty": "l1"}),
]


def played(method: StructureGame, network: nn.Module, *batch, seed: int = 3):
    """Take one whole step without an update of the denoiser. Return the outcome and the signals of the step's end."""
    outcome = method.loss(network, *batch, seeded(seed))
    outcome.loss.backward()
    return outcome, method.end_step()


@pytest.mark.parametrize(("process", "settings"), CASES)
def test_both_players_play_the_papers_game(process, settings):
    network, batch = Denoiser(process.out_channels(CHANNELS)), samples()
    method = game(process, weight=0.7, **settings)
    reference = exact(method, network, tiny_psi(), *batch)
    outcome, signals = played(method, network, *batch)
    clamped = (reference.x0_hat.abs() >= batch[0].abs().max()).double().mean()
    assert (clamped > 0.05) == (process.name != "edm"), "both cases are tested"
    assert_exact(outcome.loss.detach(), 0.7 * reference.loss.detach())
    assert_exact(outcome.terms["structure_loss"], reference.loss.detach())
    for gradient, expected in zip(gradients(network), reference.gradients(reference.network), strict=True):
        assert_exact(gradient, 0.7 * expected)
    ascent = reference.gradients(reference.psi)
    for gradient, expected in zip(first_gradients(method), ascent, strict=True):
        assert_exact(gradient, expected)
    norm = math.sqrt(sum(float(g.square().sum()) for g in ascent))
    assert signals["psi_grad_norm"].item() == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("process", [EDM(), Flow()], ids=lambda p: p.name)
def test_the_loss_is_the_bases_and_the_structures(process):
    network, batch = Denoiser(), samples()
    base = Denoising(process, CLASSES, 0.3).loss(network, *batch, seeded())
    method = game(process, base=Denoising, weight=0.3)
    outcome = method.loss(network, *batch, seeded())
    assert torch.equal(outcome.loss, base.loss + 0.3 * outcome.terms["structure_loss"])
    assert outcome.terms["structure_loss"] > 1e-3
    assert torch.equal(outcome.terms["loss"], base.loss)
    assert torch.equal(outcome.x0_hat, base.x0_hat)
    params = list(network.parameters())
    reference = exact(method, network, tiny_psi(), *batch)
    total, alone = (torch.autograd.grad(loss, params) for loss in (outcome.loss, base.loss))
    for g, b, structure in zip(total, alone, reference.gradients(reference.network), strict=True):
        assert_exact(g, b.double() + 0.3 * structure)
    limit = batch[0].abs().max()
    features = method.psi(batch[0]), method.psi(outcome.x0_hat.clamp(-limit, limit))
    distances = torch.stack([torch.pdist(f.detach().double()) for f in features])
    sigma = process.noise_to_signal(outcome.level).double()
    pairs = torch.combinations(sample_weights(sigma, method.settings)).prod(1)
    means = (pairs * distances).sum(1) / pairs.sum()
    (a, b), (_, c) = torch.cov(distances, aweights=pairs, correction=0)
    for name, value in {
        "real_distance": means[0],
        "fake_distance": means[1],
        "distance_correlation": b / (a * c).sqrt(),
    }.items():
        assert outcome.terms[name].item() == pytest.approx(value.item(), rel=1e-5)
    for value in outcome.terms.values():
        assert (value.shape, value.dtype, value.requires_grad) == ((), torch.float32, False)


def test_off_is_the_base_to_the_bit_and_fixed_never_moves_psi():
    network, batch = Denoiser(), samples()
    plain = Denoising(EDM(), CLASSES, 0.3).loss(network, *batch, seeded())
    off = game(EDM(), base=Denoising, structure="off")
    outcome, signals = played(off, network, *batch)
    assert torch.equal(outcome.loss, plain.loss)
    assert outcome.terms.keys() == {"loss"}
    assert signals == {}

    psi = LatentResNet(channels=CHANNELS, features=4, width=16, spectral_norm=True)
    fixed, before = game(EDM(), psi=psi, structure="fixed"), {k: v.clone() for k, v in psi.state_dict().items()}
    x0 = torch.rand(4, CHANNELS, 8, 8, generator=seeded())
    for seed in range(3):
        outcome, signals = played(fixed, network, x0, batch[1][:4], seed=seed)
        assert outcome.terms["structure_loss"] > 0
        assert signals.keys() == {"gradient_ratio"}
    fixed.loss(network, x0, batch[1][:4], seeded())
    assert all(p.grad is None for p in psi.parameters()), "nothing is kept for a step that never comes"
    assert all(torch.equal(value, before[key]) for key, value in psi.state_dict().items())


class Perfect(Silent):
    def compute_loss(self, out, x0, eps, level):
        outcome = super().compute_loss(out, x0, eps, level)
        return outcome._replace(x0_hat=x0 + 0 * outcome.x0_hat)


@pytest.mark.parametrize("settings", [{}, {"distance": "cosine", "normalize": "none"}])
def test_nothing_is_lost_where_the_estimate_is_the_sample(settings):
    network = Denoiser()
    method = game(EDM(), base=Perfect, **settings)
    outcome, signals = played(method, network, *samples())
    assert outcome.loss == 0
    assert all((g == 0).all() for g in gradients(network))
    assert signals["psi_grad_norm"] < 1e-5


def test_the_order_of_the_batch_does_not_matter():
    network, (x0, _), order = Denoiser(), samples(), torch.tensor([3, 6, 0, 5, 1, 4, 2])
    losses = []
    for index in (torch.arange(7), order):
        method = game(EDM(), base=Scripted)
        outcome, _ = played(method, network, x0[index], index)
        losses.append((outcome.terms["structure_loss"], *gradients(network), *first_gradients(method)))
        network.zero_grad()
    for a, b in zip(*losses):
        assert_exact(a, b.double(), 2e-6)


def test_the_scale_of_the_features_does_not_matter():
    network, batch = Denoiser(), samples()
    found = []
    for scale in (1.0, 37.0):
        psi = tiny_psi()
        with torch.no_grad():
            psi[-1].weight.mul_(scale)
        method = game(EDM(), psi=psi)
        outcome, _ = played(method, network, *batch)
        inner, head = first_gradients(method)[:2], first_gradients(method)[2]
        found.append((outcome.loss.detach(), *gradients(network), *inner, head * scale))
        network.zero_grad()
    for a, b in zip(*found):
        assert_exact(a, b.double(), 1e-5)


def test_psi_climbs_what_the_denoiser_descends():
    network, batch = Denoiser(), samples()
    method = game(EDM(), psi_lr=1e-3)
    climbed = [played(method, network, *batch)[0].terms["structure_loss"] for _ in range(12)]
    assert all(b > a for a, b in pairwise(climbed))
    assert climbed[-1] > 1.05 * climbed[0]

    method = game(EDM(), structure="fixed")
    optimizer, fell = torch.optim.SGD(network.parameters(), lr=2.0), []
    for _ in range(12):
        optimizer.zero_grad()
        fell.append(played(method, network, *batch)[0].terms["structure_loss"])
        optimizer.step()
    assert all(b < a for a, b in pairwise(fell))
    assert fell[-1] < 0.95 * fell[0]


def test_no_gradient_crosses_over():
    network, batch, seen = Denoiser(), samples(), []
    method = game(Flow(), base=Denoising)
    psi = method.psi
    psi.register_forward_hook(lambda m, inputs, out: seen.append((m.training, out.requires_grad, len(out))))
    outcome = method.loss(network, *batch, seeded())
    assert seen == [(False, True, 7), (False, True, 7)], "one pass for both players"
    assert all(p.grad is None for p in network.parameters())
    assert not any(p.requires_grad for p in psi.parameters())
    ascent = gradients(psi)
    outcome.loss.backward()
    assert all(map(torch.equal, gradients(psi), ascent))
    before = gradients(network)
    method.end_step()
    assert (len(seen), network.calls) == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(network), before))
    assert all(p.grad is None for p in psi.parameters())
    assert not any(module.training for module in psi.modules())


def test_equal_and_constant_images_trouble_neither_player():
    x0, _ = samples(8)
    x0 = F.interpolate(x0, (8, 8))
    x0[1] = x0[2] = x0[0]
    x0[4], x0[5] = 0.25, -1.0
    for images in (x0, x0[:1].expand(8, -1, -1, -1), torch.zeros_like(x0)):
        for base in (Denoising, Perfect):
            network = Denoiser()
            method = game(EDM(), base=base, psi=LatentResNet(channels=CHANNELS, features=4, width=16))
            for seed in range(2):
                outcome, signals = played(method, network, images, torch.arange(8) % CLASSES, seed=seed)
                assert all(value.isfinite() for value in [outcome.loss, *outcome.terms.values(), *signals.values()])
                assert all(g.isfinite().all() for g in gradients(network))
                assert all(p.isfinite().all() for p in method.psi.parameters())
