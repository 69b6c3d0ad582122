"""Test the weight that keeps a term's gradient at a given ratio to the denoising loss's."""

import pytest
import torch
from structure_game_helpers import CLASSES, CPU, Denoiser, game, samples, seeded

from fastdit.methods.denoising import Denoising
from fastdit.methods.gradient_balance import MEMORY, GradientBalance
from fastdit.noise import DDPM, EDM, Flow


def step(balance: GradientBalance, denoising: float, term: float) -> float:
    """Take a step with gradients of these norms, in two micro-batches. Return the ratio."""
    for part in (0.6, 0.8):
        gradients = [(part * torch.tensor([norm, 0.0]), torch.zeros(3, 1)) for norm in (denoising, term)]
        balance.add(*gradients)
    return balance.end_step()["gradient_ratio"].item()


def test_the_weight_follows_earlier_steps():
    balance = GradientBalance("auto", ratio=0.2, floor=0.01, cap=10.0)
    assert balance.weight.item() == pytest.approx(0.01), "nothing is known before the first step"
    assert step(balance, 3.0, 0.5) == pytest.approx(0.01 * 0.5 / 3)
    assert balance.weight.item() == pytest.approx(0.2 * 3 / 0.5)
    assert step(balance, 3.0, 0.5) == pytest.approx(0.2)
    # A sudden growth of the term is damped within some ten steps.
    ratios = [step(balance, 3.0, 5.0) for _ in range(40)]
    assert ratios[0] == pytest.approx(2.0)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] == pytest.approx(0.2, rel=0.1)


def test_the_averages_are_emas_of_squared_norms():
    balance, denoising, term = GradientBalance("auto", cap=1e9), 0.0, 0.0
    for d, t in ((1.0, 2.0), (4.0, 0.5), (2.0, 3.0)):
        step(balance, d, t)
        denoising, term = MEMORY * denoising + (1 - MEMORY) * d**2, MEMORY * term + (1 - MEMORY) * t**2
    torch.testing.assert_close(balance.smoothed, torch.tensor([denoising, term]))
    assert balance.weight.item() == pytest.approx(0.1 * (denoising / term) ** 0.5)


@pytest.mark.parametrize(("norms", "bound"), [((1.0, 1e6), 0.02), ((1.0, 1e-6), 5.0), ((1.0, 0.0), 5.0)])
def test_floor_and_cap(norms, bound):
    balance = GradientBalance("auto", floor=0.02, cap=5.0)
    step(balance, *norms)
    assert balance.weight.item() == pytest.approx(bound)


def test_gradients_that_are_not_finite_leave_the_weight():
    balance = GradientBalance("auto", cap=1e9)
    step(balance, 1.0, 2.0)
    before, state = balance.weight.clone(), balance.state_dict()
    assert not step(balance, float("nan"), 1.0) >= 0
    assert torch.equal(balance.weight, before)
    assert torch.equal(balance.state_dict()["smoothed"], state["smoothed"])
    assert step(balance, 1.0, 2.0) == pytest.approx(0.1)


def test_a_fixed_weight_is_kept_and_its_ratio_told():
    balance = GradientBalance(0.5)
    assert step(balance, 2.0, 1.0) == pytest.approx(0.25)
    assert balance.weight == 0.5


def test_bf16_gradients_are_added_up_in_fp32():
    balance = GradientBalance(1.0)
    balance.add([torch.full((4096,), 0.01).bfloat16()], [torch.full((4096,), 0.01).bfloat16()])
    assert balance.end_step()["gradient_ratio"] == 1
    balance.add([torch.ones(3).bfloat16()], [torch.full((70_000,), 1.0).bfloat16()])
    assert balance.squares.tolist() == [3, pytest.approx(70_000, rel=1e-5)]


def test_it_resumes_to_the_bit():
    one, other = GradientBalance("auto"), GradientBalance("auto")
    step(one, 1.0, 2.0)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.weight, other.weight)
    assert [step(one, 3.0, 0.7), one.weight.item()] == [step(other, 3.0, 0.7), other.weight.item()]


@pytest.mark.parametrize("process", [EDM(), DDPM(), Flow()], ids=lambda process: process.name)
def test_the_ratio_is_that_at_the_networks_output(process):
    """Two micro-batches of a game, against gradients at the whole output of each."""
    network, outs = Denoiser(process.out_channels(2)), []
    network.register_forward_hook(lambda module, inputs, made: outs.append(made))
    method = game(process, base=Denoising, weight="auto", gradient_ratio=0.3, weight_cap=1e9)
    for number in range(2):
        outs.clear()
        squares, weight = torch.zeros(2, dtype=torch.float64), method.balance.weight.item()
        for seed in (number, number + 7):
            batch = samples(6, seed)
            base = Denoising(process, CLASSES, 0.3).loss(network, *batch, seeded(seed))
            (alone,) = torch.autograd.grad(base.loss, outs.pop())
            outcome = method.loss(network, *batch, seeded(seed))
            (both,) = torch.autograd.grad(outcome.loss, outs.pop())
            squares += torch.stack([alone.double().square().sum(), (both - alone).double().square().sum()])
        signals = method.end_step()
        ratio = (squares[1] / squares[0]).sqrt().item()
        assert signals["gradient_ratio"].item() == pytest.approx(ratio, rel=2e-2 if number == 0 else 1e-3)
        assert signals["structure_weight"].item() == pytest.approx(weight)
    assert 0.03 < ratio < 3, "the second step has a weight that the first one measured"


def test_before_its_start_there_is_no_game():
    network, method, calls = Denoiser(), game(EDM(), base=Denoising, start=0.25, weight="auto"), []
    method.psi.register_forward_hook(lambda *_: calls.append(1))
    for number in range(4):
        method.begin_step(number, 10)
        calls.clear()
        outcome = method.loss(network, *samples(), seeded(number))
        plain = Denoising(EDM(), CLASSES, 0.3).loss(network, *samples(), seeded(number))
        signals = method.end_step()
        if number < 2:
            assert calls == []
            assert torch.equal(outcome.loss, plain.loss)
            assert outcome.terms.keys() == {"loss"}
            assert signals == {}
        else:
            assert len(calls) == 2
            assert outcome.loss > plain.loss
            assert signals.keys() == {"gradient_ratio", "structure_weight", "psi_grad_norm"}


def test_an_older_checkpoint_is_taken():
    method = game(EDM(), base=Denoising, weight="auto")
    method.loss(Denoiser(), *samples(), seeded())
    method.end_step()
    state = method.state_dict()
    del state["balance"]
    fresh = game(EDM(), base=Denoising, weight="auto")
    fresh.to(CPU, torch.float32)
    fresh.load_state_dict(state)
    assert fresh.step == 1
    assert fresh.balance.weight.item() == pytest.approx(1e-4)
