"""Random numbers of a training step follow from seed, position and draw: equal for any ranks and micro-batches."""

import json
import shlex
from dataclasses import fields
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from data_helpers import latent_source, take
from launching import TINY, averages, forked, metrics

from fastdit import run_parts
from fastdit.kernels import SampleGenerator
from fastdit.parser import parse

STEPS = 6
SMALL = [*TINY, "--steps", str(STEPS), "--eps", "1e-4"]  # a larger eps: some gradients are zero but for rounding
SD_DIT = shlex.split(
    "--sd_dit.head_width 40 --sd_dit.bottleneck 20 --sd_dit.prototypes 37 --sd_dit.mask_ratio 0.4 "
    "--sd_dit.teacher_noise relative:0.5"
)
SADM = shlex.split(
    "--sadm.psi_width 16 --sadm.psi_features 12 --sadm.start 0 --sadm.gradient_penalty 0.5 --sadm.psi_warm_steps 0"
)
PSI = shlex.split("--psi_align.psi_width 16 --psi_align.psi_features 12 --psi_align.psi_warm_steps 0")
METHODS = {"dit": [], "sd_dit": SD_DIT, "sadm": SADM, "psi_align": PSI, "sd_dit+sadm": [*SD_DIT, *SADM]}


def draws_of(flags, parts, monkeypatch, seed=3, position=2**32 - 6):
    """Return what a step draws for each micro-batch of 8 samples in `parts`, and the mean of the losses."""
    config = parse(flags)
    shape = run_parts.Shape(1, 28, 28, 10)
    network, method = run_parts.build_training(config, shape)
    method.to(torch.device("cpu"), torch.float32)
    method.begin_step(0, STEPS)
    seen, losses = [], []
    for kind in ("normal", "uniform", "integers"):
        plain = getattr(SampleGenerator, kind)

        def draw(self, *args, plain=plain):
            seen[-1].append(plain(self, *args))
            return seen[-1][-1]

        monkeypatch.setattr(SampleGenerator, kind, draw)
    x0, y = torch.randn(8, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.arange(8)
    for start, end in parts:
        seen.append([])
        generator = SampleGenerator(seed, position + start, "cpu")
        losses.append(method.loss(network, x0[start:end], y[start:end], generator).loss.item())
    monkeypatch.undo()
    return seen, sum(losses) / len(losses)


@pytest.mark.parametrize("noise", ["edm", "flow", "ddpm"])
@pytest.mark.parametrize("method", METHODS)
def test_two_micro_batches_draw_what_one_does(monkeypatch, method, noise):
    flags = [*TINY, "--method", method, "--noise.name", noise, *METHODS[method]]
    (whole,), loss = draws_of(flags, [(0, 8)], monkeypatch)
    halves, mean = draws_of(flags, [(0, 4), (4, 8)], monkeypatch)
    assert len(whole) == {"dit": 3, "sd_dit": 5, "sadm": 4, "psi_align": 3, "sd_dit+sadm": 6}[method]
    for one, *two in zip(whole, *halves, strict=True):
        torch.testing.assert_close(torch.cat(two), one, rtol=1e-6, atol=0)
        assert len(one.flatten(1).unique(dim=0) if one.dim() > 1 else one.unique()) > 6, "samples differ"
    if "sadm" not in method:  # which compares pairs within a micro-batch
        assert mean == pytest.approx(loss, rel=1e-5)


def test_a_part_of_the_micro_batch_draws_by_position(monkeypatch):
    """Half of the samples have a teacher: the first two of each four."""
    flags = [*TINY, "--method", "sd_dit", *SD_DIT, "--sd_dit.share", "0.5"]
    (whole,), _ = draws_of(flags, [(0, 8)], monkeypatch)
    halves, _ = draws_of(flags, [(0, 4), (4, 8)], monkeypatch)
    assert [len(draw) for draw in (whole[-1], halves[0][-1], halves[1][-1])] == [4, 2, 2]
    assert torch.equal(whole[-1][:2], halves[0][-1])
    assert not set(whole[-1].tolist()) & set(halves[1][-1].tolist())


def test_posterior_noise_does_not_depend_on_ranks(tmp_path):
    rng = np.random.default_rng(0)
    source = latent_source(tmp_path, rng.normal(size=(11, 2, 3, 5, 7)).astype(np.float32))
    options = {"size": (5, 7), "channels": 3, "flip": False, "seed": 4}
    alone = take(6, source, batch=8, **options)
    for world, batch in ((2, 4), (4, 2), (1, 4)):
        ranks = [
            take(12 if world == 1 else 6, source, batch=batch, rank=r, world=world, **options) for r in range(world)
        ]
        joined = torch.cat([x for step in zip(*ranks) for x, _ in step])
        torch.testing.assert_close(joined, torch.cat([x for x, _ in alone]), rtol=1e-6, atol=1e-6)


def test_posterior_noise_is_none_of_the_steps(tmp_path):
    """The loader and a step have one seed and the same positions, and draw other numbers."""
    stored = np.stack([np.zeros((4, 3, 5, 7)), np.ones((4, 3, 5, 7))], axis=1).astype(np.float32)
    source = latent_source(tmp_path, stored)
    ((noise, _),) = take(1, source, batch=4, size=(5, 7), channels=3, flip=False, seed=4)
    draws = SampleGenerator(4, 0, "cpu")
    for _ in range(3):
        assert not (draws.normal((4, 3, 5, 7)) == noise).any()


def test_an_older_state_with_generators_loads():
    """Checkpoints of earlier versions hold the states of torch's generators."""
    from fastdit.training.loop import Run

    run_state = Run(**{field.name: MagicMock() for field in fields(Run)})
    older = {"seconds": 1.5, "loader": {"position": 8}, "meter": {}}
    generators = {name: torch.get_rng_state() for name in ("generator", "torch", "cuda")}
    run_state.load_state(older | generators, {})
    assert run_state.seconds == 1.5
    run_state.loader.load_state_dict.assert_called_once_with({"position": 8})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Give `trained(method, ranks, accumulation)`, the folder of a run with a global batch of 8."""
    folders = {}

    def trained(method: str, ranks: int = 1, accumulation: int = 1):
        key = method, ranks, accumulation
        if key not in folders:
            base = tmp_path_factory.mktemp("draws")
            sizes = {"gradient_accumulation_steps": accumulation, "zero_optimization": {"stage": 1}}
            (base / "ds.json").write_text(json.dumps(sizes))
            flags = [*SMALL, "--method", method, *METHODS[method], "--ds_config", base / "ds.json"]
            forked(*flags, "--out", base / "run", ranks=ranks).succeeded()
            folders[key] = base / "run"
        return folders[key]

    return trained


@pytest.mark.launch
@pytest.mark.parametrize(
    ("method", "ranks", "accumulation"),
    [("dit", 2, 1), ("dit", 1, 2), ("sd_dit", 2, 1), ("sd_dit", 1, 2), ("sadm", 2, 1)],
)
def test_a_run_has_one_loss_curve(trained, method, ranks, accumulation):
    """fp32 on one rank, on two, and with half of the micro-batch."""
    expected, found = trained(method), trained(method, ranks, accumulation)
    lines = list(zip(metrics(expected), metrics(found), strict=True))
    assert len(lines) == STEPS
    for one, other in lines:
        for key in [key for key in one if key.endswith("loss")]:
            assert other[key] == pytest.approx(one[key], rel=1e-4), key
    for name, weight in averages(expected, STEPS).items():
        torch.testing.assert_close(averages(found, STEPS)[name], weight, rtol=0, atol=2e-5, msg=name)
