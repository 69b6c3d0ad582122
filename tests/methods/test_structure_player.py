"""Test Psi as a player: when and how it steps, over ranks and restarts, and which networks it may be."""

import io
import math

import pytest
import torch
from kernel_checks import assert_exact
from launching import on_ranks
from structure_game_helpers import (
    CHANNELS,
    CLASSES,
    CPU,
    SIZE,
    Denoiser,
    Silent,
    exact,
    first_gradients,
    game,
    gradient_penalty,
    gradients,
    one_of_two_ranks,
    samples,
    scripted_step,
    seeded,
    tiny_psi,
)
from test_image_resnet import resnet18_weights

from fastdit.methods.denoising import Denoising
from fastdit.methods.structure_game import SADM
from fastdit.models import ImageResNet, LatentResNet, encoder_products
from fastdit.noise import EDM, Flow
from fastdit.parser import parse
from fastdit.run_parts import Shape, build_training


def weights(method) -> list[torch.Tensor]:
    return [p.detach().clone() for p in method.psi.parameters()]


def moved(method, before: list[torch.Tensor]) -> float:
    return max(float((p - b).abs().max()) for p, b in zip(method.psi.parameters(), before, strict=True))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list | tuple) else a == b


def step(method, network, seed: int = 3, batch=None) -> dict[str, torch.Tensor]:
    method.loss(network, *(batch or samples()), seeded(seed))
    return method.end_step()


def test_psi_steps_on_the_mean_of_all_micro_batches():
    network, method = Denoiser(), game(EDM())
    batches = [samples(5, seed) for seed in range(3)]
    for seed, batch in enumerate(batches):
        method.loss(network, *batch, seeded(seed))
    before = weights(method)
    method.end_step()
    references = [exact(method, network, tiny_psi(), *batch, seed=seed) for seed, batch in enumerate(batches)]
    for gradient, *parts in zip(first_gradients(method), *(one.gradients(one.psi) for one in references), strict=True):
        assert_exact(gradient, sum(parts) / 3)
    assert moved(method, before) > 0
    before = weights(method)
    step(method, network)
    assert len(method.optimizer.state) == len(before), "the next step knows nothing of those batches"
    (one,) = {float(state["step"]) for state in method.optimizer.state.values()}
    assert one == 2


def test_psi_steps_once_in_psi_every():
    network, method, at = Denoiser(), game(EDM(), psi_every=3), []
    for number in range(1, 8):
        before = weights(method)
        signals = step(method, network, seed=number)
        assert ("psi_grad_norm" in signals) == (number % 3 == 0)
        if moved(method, before):
            at.append(number)
    assert at == [3, 6]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_psi_learns_at_its_own_rate(schedule):
    settings = SADM(psi_lr=1e-3, psi_warmup=0.2, psi_schedule=schedule, start=0)
    for number, constant in {0: 2.5e-4, 1: 5e-4, 3: 1e-3, 4: 1e-3, 12: 1e-3, 19: 1e-3}.items():
        expected = constant * (0.5 * (1 + math.cos(math.pi * number / 20)) if schedule == "cosine" else 1)
        assert settings.psi_lr_at(number, 20) == pytest.approx(expected, abs=1e-12)
        method = game(EDM(), psi_lr=1e-3, psi_warmup=0.2, psi_schedule=schedule, start=0)
        assert method.begin_step(number, 20) == {}
        before = weights(method)
        step(method, Denoiser())
        assert moved(method, before) == pytest.approx(expected, rel=1e-2, abs=1e-9)  # Adam's first step: lr * sign
    assert SADM(psi_lr=1e-3).psi_lr_at(0, 20) == 1e-3
    assert SADM(psi_lr=1e-3, psi_warmup=0.01, start=0).psi_lr_at(0, 20) == 1e-3, "less than a step is none"
    later = SADM(psi_lr=1e-3, psi_warmup=0.2, start=0.1)
    assert [later.psi_lr_at(2 + n, 20) for n in range(5)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


@pytest.mark.parametrize(("normalize", "distance"), [("rms", "euclidean"), ("none", "squared"), ("none", "cosine")])
def test_the_gradient_penalty(normalize, distance):
    network, batch = Denoiser(), samples()
    method = game(EDM(), gradient_penalty=0.4, normalize=normalize, distance=distance)
    reference, draws = exact(method, network, tiny_psi(), *batch), seeded()
    method.base.loss(network, *batch, draws)
    directions = torch.randn(7, 2, 4, generator=draws).transpose(0, 1).flatten(0, 1)
    method.loss(network, *batch, seeded()).loss.backward()
    for gradient, expected in zip(gradients(network), reference.gradients(reference.network), strict=True):
        assert_exact(gradient, expected)
    method.end_step()
    relative = (normalize, distance) != ("none", "squared")
    penalised = reference.loss - 0.4 * gradient_penalty(reference, directions, relative)
    for gradient, expected in zip(first_gradients(method), reference.gradients(reference.psi, penalised), strict=True):
        assert_exact(gradient, expected)


def test_shrinking_the_features_does_not_pay_the_gradient_penalty():
    network, batch, penalties = Denoiser(), samples(), []
    for scale in (1.0, 1e-3):
        psi = tiny_psi()
        with torch.no_grad():
            psi[-1].weight.mul_(scale)
        method = game(EDM(), psi=psi, gradient_penalty=0.4)
        step(method, network, batch=batch)
        *inner, head = first_gradients(method)
        penalties.append((*inner, scale * head))
    for a, b in zip(*penalties):
        assert_exact(a, b.double(), 1e-5)


def test_gradients_that_are_not_finite_change_nothing():
    network, method = Denoiser(), game(EDM())
    step(method, network)
    before, state = weights(method), torch.load(saved(method), weights_only=True)
    x0, y = samples()
    x0[2, 0, 1] = float("nan")
    signals = step(method, network, batch=(x0, y))
    assert not signals["psi_grad_norm"].isfinite()
    assert moved(method, before) == 0
    assert same(method.state_dict()["optimizer"], state["optimizer"])
    assert same(method.state_dict()["psi"], state["psi"])
    assert step(method, network)["psi_grad_norm"].isfinite()
    assert moved(method, before) > 0


def test_spectral_norms_move_in_psis_own_step_only():
    psi = LatentResNet(channels=CHANNELS, features=4, width=16, spectral_norm=True)
    x0, y = torch.rand(4, CHANNELS, 8, 8, generator=seeded()) * 2 - 1, torch.arange(4)
    method, network = game(EDM(), psi=psi, psi_lr=1e-3), Denoiser()
    for seed in range(20):
        before = {key: value.clone() for key, value in psi.named_buffers()}
        method.loss(network, x0, y, seeded(seed))
        assert same(dict(psi.named_buffers()), before)
        method.end_step()
        assert not same(dict(psi.named_buffers()), before)
    for block in psi.blocks:
        top = torch.linalg.matrix_norm(block.conv1.weight.detach().flatten(1), ord=2)
        assert 0.9 < top < 1.1


def saved(method) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    return file


def test_a_restarted_game_goes_on_to_the_bit():
    settings = {"psi_every": 2, "psi_schedule": "cosine", "gradient_penalty": 0.1, "spectral_norm": True}
    settings |= {"weight": "auto", "start": 0.2, "base": Denoising}

    def fresh(seed):
        psi = LatentResNet(channels=CHANNELS, features=4, width=16, spectral_norm=True, seed=seed)
        return game(EDM(), psi=psi, psi_lr=1e-2, **settings)

    x0, y = torch.rand(4, CHANNELS, 8, 8, generator=seeded()) * 2 - 1, torch.arange(4)
    straight, network = fresh(0), Denoiser()

    def play(method, numbers):
        results = []
        for number in numbers:
            method.begin_step(number, 10)
            results.append((method.loss(network, x0, y, seeded(number)).loss.detach(), method.end_step()))
        return results

    play(straight, range(3))
    resumed = fresh(1)
    resumed.load_state_dict(torch.load(saved(straight), weights_only=True))
    before = weights(straight)
    a, b = (play(method, range(3, 7)) for method in (straight, resumed))
    assert same(a, b)
    assert same(straight.state_dict(), resumed.state_dict())
    assert moved(straight, before) > 1e-3
    assert straight.step == 7


def test_channels_last_as_on_gpus():
    """The layout of Psi's weights changes neither its steps nor what a checkpoint means."""
    x0, y = torch.rand(4, CHANNELS, 8, 8, generator=seeded()) * 2 - 1, torch.arange(4)

    def fresh(layout: torch.memory_format):
        method = game(EDM(), psi=LatentResNet(channels=CHANNELS, features=4, width=16), psi_lr=1e-3)
        method.psi.to(memory_format=layout)
        return method

    network, layouts, states = Denoiser(), (torch.contiguous_format, torch.channels_last), []
    for layout in layouts:
        method = fresh(layout)
        step(method, network, batch=(x0, y))
        states.append(torch.load(saved(method), weights_only=True))
        assert method.psi.blocks[1].conv1.weight.is_contiguous(memory_format=layout)
    for value, other in zip(states[0]["psi"].values(), states[1]["psi"].values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
    for layout, state in zip(layouts, reversed(states), strict=True):
        method = fresh(layout)
        method.load_state_dict(state)
        for weight, moments in method.optimizer.state.items():
            assert moments["exp_avg"].stride() == weight.stride()
        assert step(method, network, batch=(x0, y))["psi_grad_norm"].isfinite()


# With one feature the gradient penalty does not depend on the random directions, which differ between ranks.
RANKS = [
    {"features": 4},
    {"features": 1, "gradient_penalty": 0.3},
    {"features": 3, "distance": "squared", "accumulation": 2},
]
TOGETHER = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7])  # accumulating, two ranks' first micro-batches come first
TERMS = CHANNELS * math.prod(SIZE)  # of the longest fp32 sum, in Psi's first layer


def rounding(structure_loss: float) -> float:
    """Return how far, relative to their size, a step's values may lie apart when its fp32 sums differ in their order.

    Two orders of a sum of n terms differ by at most n * eps of the terms' magnitudes, eps = 2^-23. Features are such
    sums, so the normalized distances P and Q, which are near 1, have that error each. L_str is the mean of (P - Q)^2
    and gradients have a factor P - Q, of root mean square sqrt(L_str): relative to it, the error of P - Q is
    2 n eps / sqrt(L_str), and that of its square is twice as large. Distances spread by more than P - Q, so that their
    correlation loses less.
    """
    return 4 * TERMS * torch.finfo(torch.float32).eps / math.sqrt(structure_loss)


def test_two_ranks_play_as_one_with_all_samples(tmp_path):
    both = on_ranks(2, one_of_two_ranks, RANKS, folder=tmp_path)
    for first, second, case in zip(*both, RANKS, strict=True):
        alone = scripted_step(TOGETHER, **case)
        tolerance = rounding(alone["terms"]["structure_loss"].item())
        names = ("structure_loss", "real_distance", "fake_distance", "distance_correlation", "psi_grad_norm")
        for name in (*names, "gradient_ratio"):
            assert torch.equal(first["terms"][name], second["terms"][name])
            assert first["terms"][name].item() == pytest.approx(alone["terms"][name].item(), rel=tolerance), name
        assert first["terms"]["loss"] != second["terms"]["loss"]
        for a, b, whole in zip(first["network"], second["network"], alone["network"], strict=True):
            assert_exact((a + b) / 2, whole.double(), tolerance)
        for a, b, whole in zip(first["psi"], second["psi"], alone["psi"], strict=True):
            assert torch.equal(a, b)
            assert_exact(a, whole.double(), tolerance)
        assert same(first["weights"], second["weights"])


TEACHING = (
    "--method sd_dit+sadm --sadm.structure fixed --sadm.psi teacher --batch 4 --data.size 8 --data.channels 2 "
    "--model.patch 2 --model.depth 1 --model.width 16 --model.heads 2 --sd_dit.decoder_width 16 "
    "--sd_dit.decoder_depth 1 --sd_dit.decoder_heads 2 --sd_dit.head_width 8 --sd_dit.bottleneck 4 "
    "--sd_dit.prototypes 16"
)


def test_the_teacher_as_psi():
    network, method = build_training(parse(TEACHING.split()), Shape(CHANNELS, 8, 8, CLASSES))
    assert list(method.psi.parameters()) == list(method.psi.buffers()) == []
    assert method.psi.state_dict() == {}
    method.to(CPU, torch.float32)
    x0, y = torch.rand(4, CHANNELS, 8, 8, generator=seeded()) * 2 - 1, torch.arange(4)
    outcome = method.loss(network, x0, y, seeded())
    assert outcome.terms["structure_loss"] > 0
    (reached,) = torch.autograd.grad(outcome.loss, outcome.x0_hat, retain_graph=True)
    assert (reached.flatten(1).norm(dim=1) > 0).all()
    outcome.loss.backward()
    assert all(p.grad is None for p in method.base.teacher.parameters())
    signals = method.end_step()
    assert "prototype_usage" in signals
    assert "psi_grad_norm" not in signals
    state = torch.load(saved(method), weights_only=True)
    assert state.keys() == {"base", "step", "psi", "balance"}
    method.load_state_dict(state)
    flops = method.flops(network)
    assert flops["structure"] == 3 * 2 * encoder_products(method.base.teacher.encoder, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_pretrained_resnet_as_psi(tmp_path, channels):
    torch.save(resnet18_weights(), tmp_path / "r18.pth")
    psi = ImageResNet(tmp_path / "r18.pth")
    before = {key: value.clone() for key, value in psi.state_dict().items()}
    x0 = (torch.rand(3, channels, 32, 32, generator=seeded()) * 2 - 1).requires_grad_()
    method = game(Flow(), base=ToClean, psi=psi)
    outcome = method.loss(None, x0, torch.arange(3), seeded())
    outcome.loss.backward()
    assert outcome.terms["structure_loss"] > 0
    assert (x0.grad.flatten(1).norm(dim=1) > 0).all()
    assert method.end_step()["psi_grad_norm"] > 0
    now = psi.state_dict()
    stored = {key for key in now if "running" in key}
    assert {key for key in now if torch.equal(now[key], before[key])} == stored


class ToClean(Silent):
    """A base that predicts half of the squared sample, so that the gradient reaches the sample."""

    def loss(self, network, x0, y, generator):
        outcome = super().loss(lambda x, t, y: torch.zeros_like(x), x0.detach(), y, generator)
        return outcome._replace(x0_hat=0.5 * x0.square(), outputs=())
