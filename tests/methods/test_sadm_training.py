"""Test SADM under DeepSpeed: against a reference that plays all ranks itself, its resumption, and what is refused."""

import shlex
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from fp64_reference import MasterWeights, rank_inputs
from launching import TINY, averages, forked, method_state, metrics
from test_config import complaint
from test_image_resnet import resnet18_weights
from test_resume import assert_same_run

from fastdit import run_parts
from fastdit.kernels import SampleGenerator
from fastdit.methods.denoising import Denoising
from fastdit.methods.structure_game import StructureGame, build_psi
from fastdit.models import LatentResNet
from fastdit.models.structure_encoders import save_structure_encoder
from fastdit.parser import parse, presets

launch = pytest.mark.launch

STEPS = 12
SMALL = shlex.split(f"{shlex.join(TINY)} --method sadm --sadm.psi_width 16 --sadm.psi_features 12")
# Every schedule acts, the game begins in step 2, and a log interval and a cycle of the players span a checkpoint.
RECIPE = shlex.split(
    f"{shlex.join(SMALL)} --steps {STEPS} --warmup 3 --schedule cosine --weight_decay 0.1 --eps 1e-4 --grad_clip 0.5 "
    "--ema.decay 0.8 --log_every 5 --save_every 5 --sadm.psi_every 2 --sadm.psi_lr 3e-4 "
    "--sadm.psi_warmup 0.3 --sadm.psi_schedule cosine --sadm.start 0.15 --sadm.psi_warm_steps 3"
)
BOTH = shlex.split(
    f"{shlex.join(RECIPE)} --method sd_dit+sadm --sd_dit.decoder_width 24 --sd_dit.decoder_depth 1 "
    "--sd_dit.decoder_heads 2 --sd_dit.head_width 40 --sd_dit.bottleneck 20 --sd_dit.prototypes 37 "
    "--sadm.gradient_penalty 0.5 --sadm.spectral_norm true "
    "--model.patch 4"  # every weight divides among two ranks: ZeRO-3 never sets the padding that others need
)
RUNS = {"sadm": [*RECIPE, "--ds_config", "zero1"], "sd_dit+sadm": [*BOTH, "--ds_config", "zero3"]}
PLAYED = STEPS - 2  # steps of the game
SIGNALS = (
    "structure_loss", "real_distance", "fake_distance", "distance_correlation", "gradient_ratio", "structure_weight",
    "psi_grad_norm",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return `trained(method)`, which returns the folder of the method's run on 2 ranks, without a stop.

    What it printed is in the file `log` beside the folder.
    """
    folders: dict[str, Path] = {}

    def trained(method: str) -> Path:
        if method not in folders:
            base = tmp_path_factory.mktemp("straight")
            (base / "log").write_text(forked(*RUNS[method], "--out", base / "run", ranks=2).succeeded().text)
            folders[method] = base / "run"
        return folders[method]

    return trained


def joined(ranks) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the batches of all ranks as one."""
    while True:
        x0, y, _ = zip(*(next(inputs) for inputs in ranks))
        yield torch.cat(x0), torch.cat(y)


@cache
def reference() -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """Return the metrics of every step of RECIPE on two ranks, and its final EMA (float64)."""
    config = parse(RECIPE)
    source = run_parts.open_data(config)
    shape = run_parts.shape_of(config, source.classes)
    network, _ = run_parts.build_training(config, shape)
    base = Denoising(run_parts.build_noise(config), shape.classes, config.label_drop)
    method = StructureGame(base, config.sadm, build_psi(config, shape, base))
    method.to(torch.device("cpu"), torch.float32)
    with rank_inputs(config, source, 2) as ranks:
        method.prepare(joined(ranks), STEPS, lambda text: None)
    master, lines = MasterWeights(network, warmup=3, steps=STEPS), []
    with rank_inputs(config, source, 2) as ranks:
        for t, batch in zip(range(STEPS), joined(ranks)):
            method.begin_step(t, STEPS)
            outcome = method.loss(network, *batch, SampleGenerator(config.seed, t * config.batch, "cpu"))
            norm = master.step([g.double() for g in torch.autograd.grad(outcome.loss, master.params)])
            terms = outcome.terms | method.end_step()
            lines.append({key: value.item() for key, value in terms.items()} | {"grad_norm": norm})
    return lines, master.averages["ema"]


@launch
def test_two_ranks_train_as_the_reference(trained):
    folder = trained("sadm")
    lines, ema = reference()
    assert sum(line["grad_norm"] > 0.5 for line in lines) > 3, "clipping must have acted"
    logged = metrics(folder)
    assert [line["step"] for line in logged] == [5, 10, 12]
    for line, since in zip(logged, (0, 5, 10)):
        for key in ("loss", *SIGNALS):
            expected = np.mean([one[key] for one in lines[since : line["step"]] if key in one])
            assert line[key] == pytest.approx(expected, rel=5e-4), key
        assert line["grad_norm"] == pytest.approx(lines[line["step"] - 1]["grad_norm"], rel=5e-4)
        assert line["skipped"] == 0
    found = averages(folder, STEPS)
    for name, expected in ema.items():
        torch.testing.assert_close(found[name].double(), expected, rtol=0, atol=4e-6, msg=name)


@launch
def test_two_ranks_killed_after_a_checkpoint(trained, tmp_path, monkeypatch):
    method, folder = "sd_dit+sadm", tmp_path / "run"  # whose checkpoints hold those of sadm
    flags = [*RUNS[method], "--out", folder]
    monkeypatch.setenv("CUT_AT", "step 7")
    assert forked(*flags, ranks=2, program="cut_short").code == -signal.SIGKILL
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000005"]
    outcome = forked(*flags, "--resume", ranks=2).succeeded()
    assert "steps 5 to 12" in outcome.text
    assert_same_run(folder, trained(method), STEPS)
    state = method_state(folder, STEPS)
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {PLAYED // 2}
    assert outcome.text.count("learns to classify") == 0, "Psi's warm start is over"
    first = (trained(method).parent / "log").read_text()
    assert first.count("sadm: 3 steps in which Psi learns to classify the data") == 1
    assert first.count("which count as training") == 1
    for line in metrics(folder):
        assert all(isinstance(line[key], float) for key in SIGNALS), "JSON has no number for what is not finite"
        assert line["structure_loss"] > 0
        assert line["psi_grad_norm"] > 0
        assert "discriminative_loss" in line


@launch
@pytest.mark.parametrize("psi", ["latent_resnet", "teacher"])
def test_bf16(tmp_path, psi):
    flags = [*BOTH, "--sadm.psi", psi, "--sadm.structure", "fixed" if psi == "teacher" else "adversarial"]
    flags += ["--sadm.start", 0]
    forked(*flags, "--steps", 4, "--precision", "bf16", "--log_every", 2, "--out", tmp_path / "run").succeeded()
    for line in metrics(tmp_path / "run"):
        assert all(isinstance(line[key], float) for key in SIGNALS if psi != "teacher" or key != "psi_grad_norm")
        assert 0 < line["structure_loss"] < 2
    state = method_state(tmp_path / "run", 4)
    assert all(value.dtype == torch.float32 for value in state["psi"].values())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    forked(*SMALL, "--steps", 2, "--out", folder).succeeded()
    return folder


@launch
@pytest.mark.parametrize(
    ("flag", "value"),
    [("method", "dit"), ("sadm.psi_width", 32), ("sadm.psi_features", 8), ("sadm.structure", "fixed")],
)
def test_another_game_is_not_resumed(finished, flag, value):
    outcome = forked("--resume", "--out", finished, "--steps", 3, f"--{flag}", value)
    assert outcome.code == 2
    assert f"was written with {flag} " in outcome.text.splitlines()[-1]
    assert f"this run has {value}" in outcome.text.splitlines()[-1]
    assert "Traceback" not in outcome.text


@launch
@pytest.mark.parametrize("name", ["width", "batch", "size", "file"])
def test_what_a_run_finds_is_one_line(tmp_path, name):
    save_structure_encoder(LatentResNet(channels=1, features=12, width=32), tmp_path / "w32.safetensors")
    torch.save(resnet18_weights(), tmp_path / "r18.pth")
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    resnet = ["--sadm.psi", "image_resnet", "--sadm.psi_weights"]
    flags, words = {
        "width": (["--sadm.psi_weights", tmp_path / "w32.safetensors"], ["w32.safetensors", "width", "32", "16"]),
        "batch": (["--batch", 1], ["batch", "sadm", "at least two"]),
        "size": ([*resnet, tmp_path / "r18.pth"], ["sadm.psi", "image_resnet", "32", "28"]),
        "file": ([*resnet, tmp_path / "other.pth", "--data.size", 35], ["other.pth", "resnet18"]),
    }[name]
    outcome = forked(*SMALL, "--steps", 1, *flags, "--out", tmp_path / "run")
    assert outcome.code == 2
    assert "Traceback" not in outcome.text
    line = outcome.text.splitlines()[-1]
    assert line.startswith("error: ")
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("method", ["sadm", "sd_dit+sadm"])
@pytest.mark.parametrize("preset", presets())
def test_every_preset_plays(preset, method):
    config = parse(["--preset", preset, "--method", method])
    assert config.uses("sadm")
    shape = run_parts.shape_of(config, 10)
    psi = build_psi(config, shape, None)
    features = psi(torch.zeros(2, shape.channels, shape.height, shape.width))
    assert features.shape == (2, config.sadm.psi_features)
    assert 1e6 < sum(p.numel() for p in psi.parameters()) < 11e6 or preset == "quickstart"


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("structure=on", ["off", "fixed", "adversarial"]),
        ("weight=-1", ["at least 0", "got -1"]),
        ("weight=car", ["auto", "got car"]),
        ("gradient_ratio=-1", ["at least 0"]),
        ("weight_floor=2", ["above sadm.weight_cap"]),
        ("weight_cap=-1", ["at least 0"]),
        ("start=1.5", ["from 0 to 1"]),
        ("clamp=0", ["at least 1e-06"]),
        ("psi_warm_steps=-1", ["at least 0"]),
        ("psi=resnet", ["latent_resnet", "image_resnet", "teacher"]),
        ("psi=image_resnet", ["sadm.psi_weights"]),
        ("psi=teacher", ["sd_dit+sadm"]),
        ("psi_width=0", ["at least 1"]),
        ("psi_width=24", ["multiple of 16"]),
        ("psi_features=0", ["at least 1"]),
        ("gradient_penalty=-1", ["at least 0"]),
        ("psi_lr=-1", ["at least 0"]),
        ("psi_warmup=2", ["from 0 to 1"]),
        ("psi_schedule=linear", ["constant", "cosine"]),
        ("psi_betas=[0.5,2]", ["from 0 to 0.999999"]),
        ("psi_every=0", ["at least 1"]),
        ("distance=manhattan", ["euclidean", "squared", "cosine"]),
        ("normalize=max", ["mean", "none"]),
        ("penalty=l3", ["l2", "l1", "huber"]),
        ("huber_delta=0", ["at least 1e-06"]),
        ("sigma_data=0", ["at least 1e-06"]),
        ("psi_widht=5", ["no such setting", "--sadm.psi_width?"]),
    ],
)
def test_each_bad_setting_is_one_line(setting, words):
    text = complaint("--method", "sadm", "--data.channels", "3", f"--sadm.{setting}")
    assert [word for word in [f"sadm.{setting.partition('=')[0]}", *words] if word not in text] == [], text


def test_the_teacher_is_no_player_but_may_be_switched_off():
    both = ("--method", "sd_dit+sadm", "--sadm.psi", "teacher")
    assert "--sadm.structure fixed" in complaint(*both)
    for structure in ("fixed", "off"):
        assert parse([*both, "--sadm.structure", structure]).sadm.psi == "teacher"
