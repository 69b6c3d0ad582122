"""Test SADM on decoded latents: value and gradients against an fp64 composition, cost, and frozen parts."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from autoencoder_helpers import diffusers_model
from data_helpers import latent_source
from kernel_checks import assert_exact
from launching import TINY, forked, metrics
from structure_game_helpers import (
    CHANNELS,
    CPU,
    SIZE,
    Denoiser,
    exact,
    first_gradients,
    game,
    gradients,
    sample_weights,
    samples,
    seeded,
    structure,
    tiny_psi,
)
from test_config import complaint
from test_image_resnet import resnet18_weights
from test_structure_cost import Free, NoSync, Recorder
from torch.utils.flop_counter import FlopCounterMode

from fastdit import run_parts
from fastdit.methods.denoising import Denoising
from fastdit.methods.encoder_build import count_flops
from fastdit.methods.structure_game import SADM, StructureGame
from fastdit.models import LatentDecoder, LatentResNet, open_autoencoder
from fastdit.noise import EDM, Flow
from fastdit.parser import parse

SCALE, SHIFT = 0.4, 0.3
RESNET = ("--sadm.psi", "image_resnet", "--sadm.psi_weights")
PICTURE = (3, 4 * SIZE[0], 4 * SIZE[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vae")
    diffusers_model("AutoencoderKL", latent_channels=CHANNELS).save_pretrained(path)
    return str(path)


@pytest.fixture
def decoder(folder) -> LatentDecoder:
    return LatentDecoder(open_autoencoder(folder), scale=SCALE, shift=SHIFT)


def picture_psi() -> torch.nn.Module:
    return tiny_psi(values=np.prod(PICTURE).item())


class Plain(torch.nn.Module):
    """Psi of the decoded latents, in one expression."""

    def __init__(self, decoder: LatentDecoder, psi: torch.nn.Module):
        super().__init__()
        self.autoencoder, self.psi = decoder.autoencoder, psi

    def forward(self, x):
        return self.psi(self.autoencoder.decode(x / SCALE + SHIFT))


@pytest.mark.parametrize("process", [EDM(), Flow()], ids=["edm", "flow"])
def test_value_and_gradients_of_both_players(decoder, process):
    network, (x0, y) = Denoiser(), samples(7)
    before = copy.deepcopy(decoder.autoencoder.state_dict())
    method = game(process, psi=picture_psi(), decoder=decoder)
    reference = exact(method, network, Plain(decoder, picture_psi()), x0, y)
    outcome = method.loss(network, x0, y, seeded())
    outcome.loss.backward()
    assert outcome.terms["structure_loss"].item() == pytest.approx(reference.loss.item(), rel=1e-5)
    for gradient, true in zip(gradients(network), reference.gradients(reference.network), strict=True):
        assert_exact(gradient, true, 2e-5)
    assert method.end_step()["psi_grad_norm"] > 0
    for gradient, true in zip(first_gradients(method), reference.gradients(reference.psi.psi), strict=True):
        assert_exact(gradient, true, 2e-5)
    assert not any(p.requires_grad or p.grad is not None for p in decoder.parameters())
    assert all(torch.equal(value, before[name]) for name, value in decoder.autoencoder.state_dict().items())
    assert not any("autoencoder" in name or "decoder" in name for name in method.state_dict()["psi"])


def test_the_denoisers_gradient_without_the_decoders(decoder):
    """The value is as before; from the pictures back to the latents the gradient takes the linear map."""
    network, (x0, y) = Denoiser(), samples(7)
    reference = exact(method := game(EDM()), network, Plain(decoder, picture_psi()), x0, y)
    with torch.no_grad():
        pictures = reference.psi.autoencoder.decode(reference.x0_hat / SCALE + SHIFT)
        real = reference.psi(reference.x0)
    pictures.requires_grad_()
    level = EDM().draw(len(x0), generator=seeded(), device="cpu").double()
    weight = sample_weights(level, method.settings)
    (upstream,) = torch.autograd.grad(structure(real, reference.psi.psi(pictures), weight, method.settings), pictures)
    decoder.approximate_gradient()
    cells = upstream.unflatten(2, (SIZE[0], 4)).unflatten(4, (SIZE[1], 4)).sum((3, 5))
    to_latents = torch.einsum("ck,bcij->bkij", decoder.colors.double(), cells) / SCALE
    expected = torch.autograd.grad(
        reference.x0_hat, list(reference.network.parameters()), to_latents, retain_graph=True
    )

    method = game(EDM(), psi=picture_psi(), decoder=decoder, psi_decoder_gradient=False)
    outcome = method.loss(network, x0, y, seeded())
    outcome.loss.backward()
    assert outcome.terms["structure_loss"].item() == pytest.approx(reference.loss.item(), rel=1e-5)
    for gradient, true in zip(gradients(network), expected, strict=True):
        assert_exact(gradient, true, 2e-5)
    method.end_step()
    for gradient, true in zip(first_gradients(method), reference.gradients(reference.psi.psi), strict=True):
        assert_exact(gradient, true, 2e-5)


@pytest.mark.parametrize("exact_gradient", [True, False])
def test_autocast(decoder, exact_gradient):
    """In bf16, as on GPUs: near the fp32 value and gradient, and the decoder runs in it, forward and again."""
    if not exact_gradient:
        decoder.approximate_gradient()
    found, seen = [], []
    decoder.autoencoder.model.decoder.conv_in.register_forward_hook(lambda _, inputs, made: seen.append(made.dtype))
    for dtype in (torch.float32, torch.bfloat16):
        network, method = Denoiser(), game(EDM(), psi=picture_psi(), decoder=decoder)
        method.to(CPU, dtype)
        outcome = method.loss(network, *samples(7), seeded())
        outcome.loss.backward()
        method.end_step()
        found.append((outcome.terms["structure_loss"], torch.cat([g.flatten() for g in gradients(network)])))
    passes = 2 + 2 + 2 * exact_gradient  # seven samples are two parts: x0, x0_hat, and that once more
    assert seen == [torch.float32] * passes + [torch.bfloat16] * passes
    (exactly, slope), (roughly, rough) = found
    assert roughly.item() == pytest.approx(exactly.item(), rel=0.1)
    assert 0 < (rough - slope).norm() < 0.15 * slope.norm()


def test_the_gradient_penalty_is_in_pixels(decoder):
    """Both players see the pictures that were made: the penalty never passes the decoder."""
    network, (x0, y), calls = Denoiser(), samples(5), []
    method = game(EDM(), psi=picture_psi(), decoder=decoder, gradient_penalty=0.5)
    hook = decoder.register_forward_hook(lambda *_: calls.append(1))
    method.loss(network, x0, y, seeded())
    assert method.end_step()["psi_grad_norm"].isfinite()
    assert calls == [1, 1]
    hook.remove()
    without = game(EDM(), psi=picture_psi(), decoder=decoder)
    without.loss(network, x0, y, seeded())
    without.end_step()
    assert any((a != b).any() for a, b in zip(first_gradients(method), first_gradients(without), strict=True))


@pytest.mark.parametrize(
    ("settings", "passes", "decoded"),
    [
        ({}, 6, 4),
        ({"psi_decoder_gradient": False}, 6, 2),
        ({"structure": "fixed"}, 3, 4),
        ({"structure": "off"}, 0, 0),
    ],
)
def test_a_step_costs_what_it_says(decoder, settings, passes, decoded):
    """Compare the FLOPs of a step, and of the two networks, with those that torch counts."""
    psi, shape = LatentResNet(channels=3, features=8, width=16), run_parts.Shape(CHANNELS, *SIZE, 5)
    if not settings.get("psi_decoder_gradient", True):
        decoder.approximate_gradient()
    of_decoder, of_psi = count_flops(decoder, shape), count_flops(psi, run_parts.Shape(*PICTURE, 5))
    method = StructureGame(Free(EDM(), 5, 0.1), SADM(**settings), psi, of_psi, decoder, of_decoder)
    method.to(CPU, torch.float32)
    (x0, y), network = samples(4), Recorder()
    with FlopCounterMode(display=False) as counter:
        method.loss(network, x0, y, seeded()).loss.backward()
        method.end_step()
    assert of_decoder > of_psi > 0
    flops = method.flops(network)
    counted = flops.get("structure", 0.0)
    assert counted == passes * of_psi + decoded * of_decoder
    assert counter.get_total_flops() == pytest.approx(4 * counted, rel=0.04)


@pytest.mark.parametrize("exact_gradient", [True, False])
def test_no_step_waits_for_the_device(decoder, exact_gradient):
    if not exact_gradient:
        decoder.approximate_gradient()
    psi = LatentResNet(channels=3, features=4, width=16)
    method, network = game(EDM(), psi=psi, base=Denoising, decoder=decoder), Recorder()
    (x0, y), again = samples(4), samples(4, seed=1)
    with NoSync():
        for batch in ((x0, y), again):
            method.loss(network, *batch, seeded()).loss.backward()
        assert method.end_step().keys() == {"gradient_ratio", "psi_grad_norm"}


# -- runs --


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    """A run on latents of 4 x 8 x 8, decoded to 32 x 32 for a ResNet-18 with random weights."""
    home = tmp_path_factory.mktemp("latents")
    diffusers_model("AutoencoderKL").save_pretrained(home / "vae")
    torch.save(resnet18_weights(), home / "r18.pth")
    rng = np.random.default_rng(0)
    (home / "shards").mkdir()
    posteriors = np.stack([rng.normal(0, 2, (9, 4, 8, 8)), rng.uniform(0.1, 0.2, (9, 4, 8, 8))], axis=1)
    latent_source(home / "shards", posteriors.astype(np.float32))
    text = (
        f"--data.source {home}/shards --data.size 8 --data.channels 4 --data.flip false --data.latent_scale 0.4 "
        f"--data.autoencoder {home}/vae --model.patch 2 --method sadm --sadm.psi image_resnet "
        f"--sadm.psi_weights {home}/r18.pth --batch 4"
    )
    return [*TINY, *text.split()]


def test_what_is_built(flags):
    config = parse([str(flag) for flag in flags])
    shape = run_parts.shape_of(config, 2)
    decoder = run_parts.build_decoder(config, shape)
    assert (decoder.scale, decoder.shift) == (0.4, 0.0)
    for more, approximate in ((), False), (("--sadm.psi_decoder_gradient", "false"), True):
        decoder = run_parts.build_decoder(config, shape)
        _, method = run_parts.build_training(parse([str(flag) for flag in (*flags, *more)]), shape, decoder)
        assert method.decoder is decoder
        assert (decoder.colors is not None) == approximate
        assert method.psi_flops == count_flops(method.psi, run_parts.Shape(3, 32, 32, 2))
        assert method.decoder_flops == count_flops(decoder, shape) > 0
    latents = replace(config, sadm=replace(config.sadm, psi="latent_resnet", psi_weights=None))
    _, method = run_parts.build_training(latents, shape, decoder)
    assert method.decoder is None, "it sees the latents themselves"


@pytest.mark.launch
@pytest.mark.parametrize("gradient", ["true", "false"])
def test_a_run_plays_on_pictures_and_shows_them(flags, tmp_path, gradient):
    out = tmp_path / "run"
    more = ["--sadm.psi_decoder_gradient", gradient, "--sadm.weight", 1, "--out", out]
    forked(*flags, *more, "--steps", 2).succeeded()
    forked("--resume", "--out", out, "--steps", 3).succeeded()
    lines = metrics(out)
    assert len(lines) == 3
    assert all(line["structure_loss"] > 0 and line["psi_grad_norm"] > 0 for line in lines)
    assert (out / "samples.png").exists()


@pytest.mark.launch
def test_what_does_not_fit_is_one_line(flags, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    latent_source(small, np.ones((4, 2, 4, 6, 6), dtype=np.float32))
    outcome = forked(*flags, "--data.source", small, "--data.size", 6, "--steps", 1, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert "sadm.psi: image_resnet needs at least 32 rows and columns, it would see 24 x 24" in outcome.text


def test_without_an_autoencoder_it_is_refused():
    text = complaint("--method", "sadm", "--data.channels", "4", *RESNET, "x.pth")
    assert "--data.autoencoder" in text
