"""Test psi_align: its targets and its loss in fp64, what it shares with SADM, and its runs."""

import shlex
import shutil

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import assert_exact
from launching import TINY, averages, checkpoint, forked, method_state, metrics
from sd_dit_reference import blocks, condition, embed, fp64, image_of, linear, norm, part, randomise
from test_config import complaint
from test_resume import assert_same_run
from torch.utils.flop_counter import FlopCounterMode

from fastdit import run_parts
from fastdit.config import CONFIG_FILE
from fastdit.errors import UserError
from fastdit.export import main as export
from fastdit.methods.denoising import Denoising
from fastdit.methods.psi_alignment import PsiAlign, PsiAlignment, shares_psi
from fastdit.methods.structure_game import SADM, StructureGame
from fastdit.models import AlignedDiT, DiT, LatentResNet, TokenTargets
from fastdit.models.structure_encoders import save_structure_encoder
from fastdit.noise import DDPM, EDM, Flow
from fastdit.parser import load, parse, presets

launch = pytest.mark.launch

CLASSES, CPU = 5, torch.device("cpu")
SIZES = {"input_size": (6, 10), "patch": 2, "channels": 2, "width": 36, "heads": 3, "classes": CLASSES}
STEPS = 6
ALIGN = shlex.split(f"{shlex.join(TINY)} --method psi_align --psi_align.psi_width 16 --psi_align.psi_features 12")
RUN = [*ALIGN, *shlex.split(f"--steps {STEPS} --grad_clip 0.5 --ema.decay 0.5 --save_every 3 --log_every 2")]
BOTH = [*RUN, *shlex.split("--method psi_align+sadm --sadm.psi_width 16 --sadm.psi_features 12 --sadm.start 0.2")]


def make(process=None, depth=3, block=2, **settings) -> tuple[PsiAlignment, AlignedDiT]:
    """Return a method and its module, with random values in every parameter."""
    process = process or EDM()
    network = DiT(**SIZES, depth=depth, out_channels=process.out_channels(2), attention_backend="math")
    module = AlignedDiT(network, block=block, hidden=20, features=64)
    randomise(module, seed=1)
    psi = LatentResNet(channels=2, features=7, width=16)
    method = PsiAlignment(Denoising(process, CLASSES, 0.3), PsiAlign(**settings), module, psi)
    method.to(CPU, torch.float32)
    return method, module


def batch(n: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 2, 6, 10, generator=generator) * 2 - 1, torch.randint(CLASSES, (n,), generator=generator)


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_inputs(n: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 2, 6, 10, generator=seeded())
    return x, torch.linspace(-2, 17, n), torch.arange(n)


@pytest.mark.parametrize("size", [(28, 28), (32, 32), (20, 12), (3, 5)])
@pytest.mark.parametrize("spectral_norm", [False, True])
def test_features_are_the_mean_of_the_last_map(size, spectral_norm):
    psi = LatentResNet(channels=2, features=7, width=16, spectral_norm=spectral_norm).eval()
    x = torch.randn(3, 2, *size, generator=seeded())
    features = psi.feature_map(x)
    assert features.shape[1] == psi.channels_of(4) == 64
    assert min(features.shape[2:]) <= 4
    assert torch.equal(psi.head(features.mean((2, 3))), psi(x))


def test_maps_of_all_stages():
    """Each map is what the norm that follows makes of the stream; its activation is part of it."""
    psi = LatentResNet(channels=2, features=7, width=16)
    norms = [psi.blocks[1].norm1, psi.blocks[2].norm1, psi.blocks[3].norm1, psi.norm]
    x = torch.randn(2, 2, 32, 32, generator=seeded())
    stream = psi.stem(x)
    for stage, (block, after, side) in enumerate(zip(psi.blocks, norms, (16, 8, 4, 4)), start=1):
        stream = block(F.avg_pool2d(stream, 2) if stream.shape[-1] > 4 else stream)
        got = psi.feature_map(x, stage)
        assert got.shape == (2, psi.channels_of(stage), side, side)
        groups = stream.unflatten(1, (-1, 16)).flatten(2)
        deviation = (groups.var(2, unbiased=False, keepdim=True) + after.eps).sqrt()
        normed = ((groups - groups.mean(2, keepdim=True)) / deviation).view_as(stream)
        torch.testing.assert_close(got, normed * normed.sigmoid(), atol=1e-5, rtol=1e-4)


class Given(torch.nn.Module):
    """An encoder whose map is its input."""

    def feature_map(self, x: torch.Tensor, stage: int) -> torch.Tensor:
        return x


@pytest.mark.parametrize(
    ("sides", "grid"), [((4, 4), (4, 4)), ((8, 12), (4, 4)), ((4, 4), (7, 7)), ((8, 4), (4, 8)), ((1, 3), (2, 5))]
)
def test_targets_are_the_map_on_the_grid_of_the_tokens(sides, grid):
    """A longer side is averaged; in a shorter one the value at a token's center is interpolated, and held at edges."""
    x = torch.randn(2, 3, *sides, generator=seeded())

    def weights(cells: int, tokens: int) -> torch.Tensor:
        matrix = torch.zeros(tokens, cells, dtype=torch.float64)
        for token in range(tokens):
            if cells >= tokens:
                width = cells // tokens
                matrix[token, token * width : (token + 1) * width] = 1 / width
                continue
            center = min(max((token + 0.5) * cells / tokens - 0.5, 0), cells - 1)
            left = min(int(center), max(cells - 2, 0))
            matrix[token, left] += 1 - (center - left)
            matrix[token, min(left + 1, cells - 1)] += center - left
        return matrix

    rows, columns = (weights(*pair) for pair in zip(sides, grid))
    expected = torch.einsum("th,uw,bchw->btuc", rows, columns, x.double()).flatten(1, 2)
    assert_exact(TokenTargets(Given(), 4, grid)(x), expected)


@pytest.mark.parametrize("block", [1, 3])
def test_the_denoiser_is_the_plain_dit_to_the_bit(block):
    _, module = make(block=block)
    x, t, y = image_inputs()
    targets = torch.randn(3, 15, 64, generator=seeded())
    expected = module.network(x, t, y)
    assert torch.equal(module(x, t, y)[0], expected)
    out, cosine = module(x, t, y, targets)
    assert torch.equal(out, expected)
    assert -1 < cosine < 1
    with pytest.raises(ValueError, match="block=4"):
        AlignedDiT(module.network, block=4, hidden=8, features=8)


@pytest.mark.parametrize("process", [EDM(), DDPM(), Flow()], ids=lambda process: process.name)
@pytest.mark.parametrize("block", [1, 3])
def test_loss_and_gradients_are_the_formulas(process, block):
    method, module = make(process, block=block, weight=0.7)
    x0, y = batch()
    method.begin_step(0, 10)
    outcome = method.loss(module, x0, y, seeded())
    outcome.loss.backward()

    # The same in fp64, from the formulas.
    draws = seeded()
    level = process.draw(4, generator=draws, device="cpu").double()
    eps = torch.randn(x0.shape, generator=draws).double()
    labels = method.drop_labels(y, draws)
    x, t = process.network_input(process.add_noise(x0.double(), eps, level), level)
    w, network = fp64(module), module.network
    dit, projector = part(w, "network."), part(w, "projector.")
    c = condition(dit, t, labels, torch.float64)
    tokens, *_ = blocks(dit, embed(dit, network, x), c, network.heads, 0, block)
    rest, shift, scale = blocks(dit, tokens, c, network.heads, block)
    output = image_of(linear(dit, "head", norm(rest) * (1 + scale[:, None]) + shift[:, None]), (3, 5), 2)
    denoising = process.loss(output, x0.double(), eps, level)[0].mean()

    def silu(a: torch.Tensor) -> torch.Tensor:
        return a / (1 + torch.exp(-a))

    projected = linear(projector, "fc2", silu(linear(projector, "fc1", norm(tokens))))
    projected = linear(projector, "fc3", silu(projected))
    with torch.no_grad():
        features = method.psi.double().feature_map(x0.double())
        method.psi.float()
        assert features.shape[2:] == (3, 5), "the grid of the tokens, where nothing is interpolated"
    targets = features.flatten(2).transpose(1, 2)
    cosines = (projected * targets).sum(-1) / projected.norm(dim=-1) / targets.norm(dim=-1)
    total = denoising + 0.7 * (1 - cosines.mean())
    total.backward()

    assert_exact(outcome.loss, total.detach(), 1e-5)
    assert_exact(outcome.terms["loss"], denoising.detach(), 1e-5)
    torch.testing.assert_close(outcome.terms["alignment"].double(), cosines.mean().detach(), atol=1e-6, rtol=0)
    assert_exact(outcome.terms["alignment_loss"], 1 - cosines.mean().detach(), 1e-5)
    for name, p in module.named_parameters():
        assert w[name].grad.any(), name
        assert_exact(p.grad, w[name].grad, 3e-5)
    assert not any(p.requires_grad for p in method.psi.parameters())

    assert 0 < method.end_step()["alignment_gradient_ratio"] < 100


class OneSided:
    """A fork of which one side alone has a gradient, which is kept."""

    def __init__(self, side: int) -> None:
        self.side = side

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.tokens = x.detach().requires_grad_()
        sides = [x.detach(), x.detach()]
        sides[self.side] = self.tokens
        return tuple(sides)


def test_the_ratio_is_that_of_both_gradients_at_the_tokens():
    method, module = make(weight=0.7)
    x0, y = batch()
    method.begin_step(0, 10)
    method.loss(module, x0, y, seeded()).loss.backward()
    ratio = method.end_step()["alignment_gradient_ratio"]
    norms = []
    for measured in (0, 1):
        fork = OneSided(measured)
        module.gradients.fork = fork
        method.loss(module, x0, y, seeded()).loss.backward()
        norms.append(fork.tokens.grad.norm())
    torch.testing.assert_close(ratio, norms[1] / norms[0], rtol=1e-4, atol=0)


def test_it_ends_after_a_share_of_the_run():
    method, module = make(until=0.5)
    x0, y = batch()
    for step, aligns in enumerate([True, True, False, False]):
        method.begin_step(step, 4)
        module.zero_grad()
        outcome = method.loss(module, x0, y, seeded())
        outcome.loss.backward()
        assert ("alignment" in outcome.terms) == aligns
        assert ("alignment_gradient_ratio" in method.end_step()) == aligns
        assert (method.flops(module)["projector"] > 0) == aligns
        assert all(p.grad is not None and p.grad.any() == aligns for p in module.projector.parameters())
    plain = Denoising(EDM(), CLASSES, 0.3).loss(module.network, x0, y, seeded())
    assert torch.equal(outcome.loss, plain.loss)


def test_a_target_is_that_of_its_sample_alone():
    """The alignment takes no random numbers, and the mean over samples does not depend on their order."""
    method, _ = make()
    x0, _ = batch()
    targets = method.targets_of(x0)
    assert not targets.requires_grad
    torch.testing.assert_close(method.targets_of(x0[2:3]), targets[2:3], atol=1e-5, rtol=1e-4)


def batches_for(psi: LatentResNet):
    while True:
        yield batch(8)


def test_beside_sadm_there_is_one_warm_psi():
    """Psi is warm-started once. What SADM makes of it later does not move the targets, and a checkpoint has both."""

    def pair():
        process = EDM()
        module = AlignedDiT(DiT(**SIZES, depth=2), block=1, hidden=20, features=64)
        randomise(module, seed=1)
        psi, copy = (LatentResNet(channels=2, features=7, width=16, seed=seed) for seed in (0, 1))
        settings = SADM(start=0.0, psi_warm_steps=3, psi_lr=1e-2)
        game = StructureGame(Denoising(process, CLASSES, 0.3), settings, psi)
        method = PsiAlignment(game, PsiAlign(), module, copy, shared=psi)
        method.to(CPU, torch.float32)
        return method, module

    (method, module), said = pair(), []
    method.prepare(batches_for(method.psi), 10, said.append)
    assert len(said) == 2
    assert all(line.startswith("sadm: ") for line in said)
    warm = {name: value.clone() for name, value in method.psi.state_dict().items()}
    x0, y = batch()
    for step in range(3):
        method.begin_step(step, 10)
        outcome = method.loss(module, x0, y, seeded())
        outcome.loss.backward()
        signals = method.end_step()
    assert {"alignment", "structure_loss"} <= outcome.terms.keys()
    assert {"alignment_gradient_ratio", "gradient_ratio", "psi_grad_norm"} <= signals.keys()
    played = method.base.psi.state_dict()
    assert all(torch.equal(warm[name], value) for name, value in method.psi.state_dict().items())
    assert not any(torch.equal(warm[name], played[name]) for name in warm if name.endswith("conv1.weight"))
    again, _ = pair()
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.targets_of(x0), method.targets_of(x0))
    assert torch.equal(again.base.psi(x0), method.base.psi(x0))


@pytest.mark.parametrize("preset", presets())
def test_every_preset_aligns(preset):
    config = parse(["--preset", preset, "--method", "psi_align"])
    settings, dims = config.psi_align, config.model.dims()
    assert settings.block_of(dims["depth"]) == {6: 2, 12: 4, 24: 8, 28: 9}[dims["depth"]]
    assert settings.hidden_of(dims["width"]) == min(2048, 2 * dims["width"])
    assert shares_psi(parse(["--preset", preset, "--method", "psi_align+sadm"]))


@pytest.mark.parametrize(("preset", "plain_steps"), [("quickstart", 1.11), ("imagenet256 --model.size S", 1.06)])
def test_a_step_costs_little_and_the_dit_is_sampled(preset, plain_steps):
    config = parse(["--preset", *preset.split(), "--method", "psi_align"])
    shape = run_parts.shape_of(config, 10)
    network = run_parts.build_network(config, shape)
    module, method = run_parts.build_training(config, shape)
    assert type(network) is type(method.sampled_network(module)) is DiT
    flops = method.flops(module)
    assert sum(flops.values()) / flops["network"] == pytest.approx(plain_steps, abs=0.01)
    x = torch.zeros(1, shape.channels, shape.height, shape.width)
    with FlopCounterMode(display=False) as counter:
        method.targets_of(x)
        module.projector(torch.zeros(1, network.grid[0] * network.grid[1], network.width))
    assert flops["psi"] + flops["projector"] / 3 == counter.get_total_flops()


@launch
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, precision):
    """The alignment ends between the two checkpoints, and a resumed run needs no warm start."""
    flags = [*RUN, "--precision", precision, "--psi_align.until", 0.6]
    first = forked(*flags, "--out", tmp_path / "straight").succeeded().text
    assert "psi_align: 3 steps in which Psi learns to classify" in first
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path / "run", STEPS))
    again = forked("--resume", "--out", tmp_path / "run").succeeded().text
    assert "learns to classify" not in again
    assert_same_run(tmp_path / "run", tmp_path / "straight", STEPS)
    for line in metrics(tmp_path / "run"):
        assert ("alignment" in line) == ("alignment_gradient_ratio" in line) == (line["step"] <= 4)


@launch
def test_two_ranks_shard_and_export_a_plain_dit(tmp_path):
    """ZeRO-3 on two ranks gives ZeRO-1's weights; what is saved and exported has neither projector nor Psi."""
    for stage in (1, 3):
        out = tmp_path / f"zero{stage}"
        forked(*BOTH, "--ds_config", f"zero{stage}", "--out", out, ranks=2).succeeded()
    found = [averages(tmp_path / f"zero{stage}", STEPS) for stage in (1, 3)]
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-5)
    config = load(tmp_path / "zero3" / CONFIG_FILE)
    network = run_parts.build_network(config, run_parts.shape_of(config, 10))
    assert type(network) is DiT
    network.load_state_dict(found[1])
    with pytest.raises(SystemExit) as end:
        export(["--run", str(tmp_path / "zero3"), "--out", str(tmp_path / "dit.pt")])
    assert end.value.code in (0, None)
    assert "blocks.1.attn.qkv.weight" in torch.load(tmp_path / "dit.pt", weights_only=True)
    states = [method_state(tmp_path / f"zero{stage}", STEPS) for stage in (1, 3)]
    for name, value in states[0]["psi"].items():
        assert torch.equal(states[1]["psi"][name], value)
    assert not torch.equal(states[0]["psi"]["stem.weight"], states[0]["base"]["psi"]["stem.weight"]), (
        "SADM's has played"
    )


@launch
def test_another_alignment_is_not_resumed_and_weights_must_fit(tmp_path):
    forked(*RUN, "--steps", 1, "--out", tmp_path / "run").succeeded()
    outcome = forked("--resume", "--out", tmp_path / "run", "--steps", 2, "--psi_align.stage", 2)
    assert outcome.code == 2
    assert "was written with psi_align.stage 4, this run has 2" in outcome.text.splitlines()[-1]
    save_structure_encoder(LatentResNet(channels=1, features=12, width=32), tmp_path / "wide.safetensors")
    config = parse([*RUN, "--psi_align.psi_weights", str(tmp_path / "wide.safetensors")])
    with pytest.raises(UserError, match="width is 32 in this file, 16 in this run"):
        run_parts.build_training(config, run_parts.shape_of(config, 10))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("weight=-1", ["at least 0"]),
        ("depth=1.5", ["from 0 to 1"]),
        ("until=2", ["from 0 to 1"]),
        ("stage=5", ["from 1 to 4"]),
        ("projector_width=0", ["at least 1"]),
        ("psi_warm_steps=-1", ["at least 0"]),
        ("psi_width=24", ["multiple of 16"]),
        ("psi_features=0", ["at least 1"]),
        ("psi_widht=5", ["no such setting", "--psi_align.psi_width?"]),
    ],
)
def test_each_bad_setting_is_one_line(setting, words):
    text = complaint("--method", "psi_align", f"--psi_align.{setting}")
    assert [word for word in [f"psi_align.{setting.partition('=')[0]}", *words] if word not in text] == [], text


def test_what_does_not_go_together_is_one_line():
    text = complaint("--method", "psi_align+sadm", "--psi_align.psi_width", "32")
    assert "psi_align.psi_width: 32" in text
    assert "sadm.psi_width 96" in text
    assert "sd_dit and psi_align cannot be joined, for psi_align aligns" in complaint("--method", "sd_dit+psi_align")
    with pytest.raises(UserError, match="single class"):
        PsiAlign(psi_warm_steps=7).warm_steps(1000, 1)
    assert [PsiAlign().warm_steps(steps, 10) for steps in (9, 400_000)] == [5, 10_000]
    assert PsiAlign(psi_warm_steps=0).warm_steps(1000, 10) == PsiAlign(psi_weights="x").warm_steps(1000, 10) == 0
