"""Test what a step of SADM costs: passes of both networks, in FLOPs, and no wait for the device."""

import pytest
import torch
from structure_game_helpers import CHANNELS, CLASSES, CPU, game, seeded
from torch.utils.flop_counter import FlopCounterMode

from fastdit.kernels import structure_loss
from fastdit.methods import structure_game
from fastdit.methods.denoising import Denoising
from fastdit.methods.structure_game import SADM, StructureGame
from fastdit.models import LatentResNet
from fastdit.noise import EDM


class Free(Denoising):
    """A base that costs nothing and makes the same x0 predictions with any network."""

    def flops(self, module):
        return {}


class Recorder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.calls = torch.nn.Parameter(torch.tensor(0.5)), 0

    def forward(self, x, t, y):
        self.calls += 1
        return self.scale * x


@pytest.mark.parametrize(
    ("settings", "steps", "passes"),
    [({"structure": "fixed"}, 1, 3), ({}, 1, 6), ({"psi_every": 2}, 2, 9), ({"structure": "off"}, 1, 0)],
)
def test_a_step_costs_what_it_says(monkeypatch, settings, steps, passes):
    """The denoiser passes once; Psi as often, in forward passes, as its documentation counts."""
    compared = []

    def spy(real, fake, *args, **options):
        compared.append((real.requires_grad, fake.requires_grad))
        return structure_loss(real, fake, *args, **options)

    monkeypatch.setattr(structure_game, "structure_loss", spy)
    psi, x0, y = LatentResNet(channels=CHANNELS, features=8, width=16), torch.rand(4, CHANNELS, 16, 16), torch.arange(4)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        psi(x0[:1])
    one, network, calls = counter.get_total_flops(), Recorder(), []
    psi.register_forward_hook(lambda _, inputs, made: calls.append((len(made), made.requires_grad)))
    method = StructureGame(Free(EDM(), CLASSES, 0.1), SADM(**settings), psi, one)
    method.to(CPU, torch.float32)
    with FlopCounterMode(display=False) as counter:
        for number in range(steps):
            method.loss(network, x0, y, seeded(number)).loss.backward()
            method.end_step()
    assert network.calls == steps
    assert counter.get_total_flops() == pytest.approx(passes * len(x0) * one, rel=0.03)
    assert method.flops(network) == ({"structure": passes / steps * one} if passes else {})
    expected = {0: [], 3: [False], 6: [True], 9: [False, True]}[passes]  # whether weights need gradients, by step
    assert compared == [(learns, True) for learns in expected]
    assert calls == [(4, needed) for learns in expected for needed in (learns, True)], "clean samples, estimates"


class NoSync(torch.utils._python_dispatch.TorchDispatchMode):
    """Fail where the host would wait for a value."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::").partition(".")[0]
        assert name not in ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal"), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_no_step_waits_for_the_device(implementation):
    psi = LatentResNet(channels=CHANNELS, features=4, width=16, spectral_norm=True)
    method, network = game(EDM(), psi=psi, gradient_penalty=0.1, base=Denoising, weight="auto"), Recorder()
    method.optimizer.implementation = implementation
    x0 = torch.rand(4, CHANNELS, 8, 8, generator=seeded())
    with NoSync():
        method.loss(network, x0, torch.arange(4), seeded()).loss.backward()
        signals = method.end_step().keys()
    assert signals == {"structure_weight", "gradient_ratio", "psi_grad_norm"}
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoSync():
        bool(x0.sum() > 0)
