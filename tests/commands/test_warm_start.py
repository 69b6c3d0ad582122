"""Test the warm start of SADM's encoder: the command, its file, and the same training on several ranks."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import latent_source, take
from launching import TINY, checkpoint, forked, method_state, metrics, on_ranks
from safetensors import safe_open

from fastdit.commands import warm_start
from fastdit.data import open_source
from fastdit.errors import UserError
from fastdit.methods.encoder_warm_start import Diverged, warm_start_encoder
from fastdit.methods.structure_game import SADM
from fastdit.models.structure_encoders import LatentResNet, load_structure_encoder

ROOT = Path(__file__).parents[2]
FASHION = "--data.source fashion_mnist --data.size 28 --data.channels 1 --data.flip false"
SMALL = "--device cpu --data.threads 1 --batch 32 --width 16 --features 20"


def run(out: Path, flags: str) -> None:
    warm_start._warm_start([*SMALL.split(), "--out", str(out), *flags.split()])


def accuracy(text: str) -> float:
    return float(re.search(r"accuracy ([\d.]+)%", text)[1]) / 100


def loaded(path: Path, **sizes) -> LatentResNet:
    encoder = LatentResNet(**{"channels": 1, "width": 16, "features": 20, "seed": 9} | sizes)
    load_structure_encoder(encoder, path)
    return encoder.eval()


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """Take sixty steps. Return the file, the encoder that was written to it, and the printed line."""
    out, saved = tmp_path_factory.mktemp("warm") / "new" / "psi.safetensors", []
    save, said = warm_start.save_structure_encoder, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_start, "save_structure_encoder", lambda net, path: (saved.append(net), save(net, path)))
        patch.setattr("builtins.print", lambda text: said.append(text))
        run(out, f"{FASHION} --batch 64 --steps 60")
    return out, saved[0].eval(), said[0]


def test_it_learns_the_shipped_images(learnt):
    out, _, said = learnt
    assert accuracy(said) > 0.45, said  # chance is 0.1
    assert "on the last 20 batches, each before it was trained on, in epoch 0.4" in said
    assert str(out) in said


def test_the_file_is_the_encoder(learnt):
    out, trained, _ = learnt
    x = torch.randn((5, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded(out)(x), trained(x))
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"channels": "1", "features": "20", "width": "16", "spectral_norm": "False"}
    with pytest.raises(UserError, match="width is 16 in this file, 32 in this run"):
        loaded(out, width=32)


def test_features_tell_classes_apart(learnt):
    """Compare nearest class means, on unseen images, with those of the untrained encoder."""
    source = open_source("fashion_mnist")
    options = {"batch": 1000, "size": 28, "channels": 1, "flip": False, "threads": 1}
    batches = take(10, source, **options)  # the order of seed 0: training took the first 3,840
    (x, y), (probe, labels) = batches[5], batches[8]

    def score(encoder) -> float:
        with torch.no_grad():
            f, g = encoder(x), encoder(probe)
        means = torch.stack([f[y == label].mean(0) for label in range(10)])
        return (torch.cdist(g, means).argmin(1) == labels).float().mean().item()

    untrained = LatentResNet(channels=1, width=16, features=20).eval()
    assert score(loaded(learnt[0])) > max(0.5, score(untrained) + 0.1)


def test_accuracy_is_that_of_unseen_batches(tmp_path, capsys):
    """In the first step the classifier is zero and says 0, which is right as often as the first batch holds a 0."""
    run(tmp_path / "psi.safetensors", f"{FASHION} --steps 1 --batch 50 --lr 0.1 --seed 3")
    options = {"batch": 50, "size": 28, "channels": 1, "flip": False, "threads": 1, "seed": 3}
    ((_, y),) = take(1, open_source("fashion_mnist"), **options)
    assert (y == 0).sum() > 0
    assert accuracy(capsys.readouterr().out) == pytest.approx((y == 0).float().mean().item(), abs=6e-4)


def test_it_depends_on_its_seed_alone(tmp_path):
    states = []
    for i, seed in enumerate((4, 4, 5)):
        torch.manual_seed(i)
        run(tmp_path / f"{i}.safetensors", f"{FASHION} --steps 3 --seed {seed}")
        states.append(loaded(tmp_path / f"{i}.safetensors").state_dict())
    one, again, other = states
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert not any(torch.equal(value, other[name]) for name, value in one.items())
    run(tmp_path / "still.safetensors", f"{FASHION} --steps 1 --lr 0 --seed 4")
    still = loaded(tmp_path / "still.safetensors").state_dict()
    initial = LatentResNet(channels=1, width=16, features=20, seed=4)
    assert all(torch.equal(value, still[name]) for name, value in initial.state_dict().items())


def test_spectral_norm_travels(tmp_path):
    run(tmp_path / "psi.safetensors", f"{FASHION} --steps 2 --spectral_norm true")
    with pytest.raises(UserError, match="spectral_norm is True in this file"):
        loaded(tmp_path / "psi.safetensors")
    loaded(tmp_path / "psi.safetensors", spectral_norm=True)


def test_latents(tmp_path):
    (tmp_path / "latents").mkdir()
    posteriors = np.random.default_rng(0).random((7, 2, 4, 9, 12), dtype=np.float32)
    latent_source(tmp_path / "latents", posteriors)
    flags = f"--data.source {tmp_path / 'latents'} --data.size [9,12] --data.channels 4 --steps 2 --batch 6"
    run(tmp_path / "psi.safetensors", f"{flags} --data.flip false")
    loaded(tmp_path / "psi.safetensors", channels=4)
    with pytest.raises(UserError, match="turn flip off"):
        run(tmp_path / "psi.safetensors", flags)


def test_a_preset_gives_what_is_not_given():
    from fastdit.parser import parse

    settings = parse(["--preset", "quickstart"])
    args = warm_start._parser(settings).parse(["--out", "x", "--steps", "1", "--data.threads", "1", "--width", "48"])
    assert (args.data.size, args.data.channels, args.data.flip, args.data.threads) == (28, 1, False, 1)
    assert (args.width, args.features) == (48, settings.sadm.psi_features)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (f"{FASHION} --steps 0", ["steps", "at least 1", "0"]),
        (f"{FASHION} --steps 1 --batch 0", ["batch", "at least 1", "0"]),
        (f"{FASHION} --steps 1 --lr -1", ["lr", "at least 0"]),
        (f"{FASHION} --steps 1 --seed -1", ["seed", "at least 0"]),
        (f"{FASHION} --steps 1 --width 17", ["width: 17", "multiple of 16"]),
        (f"{FASHION} --steps 1 --out psi.pt", ["--out psi.pt: must end in .safetensors"]),
        (f"{FASHION} --steps 9 --lr 1e30", ["--lr 1e+30", "not finite", "lower it"]),
        (f"{FASHION} --stepz 1 --steps 1", ["--stepz", "--steps?"]),
        (f"{FASHION} --steps x", ["steps", "expected a whole number", "x"]),
        (FASHION, ["--steps", "must be given"]),
        ("--preset nope --steps 1", ["--preset nope", "quickstart"]),
        ("--preset imagenet256 --steps 1", ["data/imagenet256: no such"]),
        (f"{FASHION} --steps 1 --data.channels 3", ["1 channels", "model takes 3"]),
        (f"{FASHION} --steps 1 --data.classes 3", ["label", "out of range for 3 classes"]),
    ],
)
def test_each_mistake_is_one_line_and_writes_nothing(tmp_path, flags, words):
    with pytest.raises(UserError) as caught:
        run(tmp_path / "psi.safetensors", flags)
    text = str(caught.value)
    assert "\n" not in text
    assert [word for word in words if word not in text] == [], text
    assert list(tmp_path.iterdir()) == []


def test_the_command_itself(tmp_path):
    """Run it as a file, as its docstring says; it is installed under its name too."""
    out = tmp_path / "psi.safetensors"
    command = [
        sys.executable,
        ROOT / "fastdit/commands/warm_start.py",
        *f"{SMALL} {FASHION} --steps 1 --out".split(),
        out,
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.startswith("accuracy ")
    assert said.endswith(f"on the last 1 batches, each before it was trained on, in epoch 0.0; encoder in {out}\n")
    assert out.is_file()
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["fastdit-warm-start"] == "fastdit.commands.warm_start:main"


# -- in a run --


def batches_of(part: slice):
    """Yield three batches; `part` is a rank's share of each."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
        yield x[part], y[part]


def trained(part: slice) -> tuple[dict[str, torch.Tensor], float]:
    encoder = LatentResNet(channels=1, features=4, width=16, spectral_norm=True)
    accuracy = warm_start_encoder(encoder, 3, batches_of(part), steps=3, lr=1e-3)
    return {name: value.clone() for name, value in encoder.state_dict().items()}, accuracy


def train_half(rank: int) -> tuple[dict[str, torch.Tensor], float]:
    """Return what one of two ranks ends with."""
    return trained(slice(4 * rank, 4 * rank + 4))


def test_two_ranks_train_one_encoder(tmp_path):
    (first, accuracy), (second, other) = on_ranks(2, train_half, folder=tmp_path)
    whole, expected = trained(slice(8))
    assert accuracy == other == pytest.approx(expected)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        torch.testing.assert_close(value, whole[name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "classes", "expected"),
    [
        ({}, 10, 500),
        ({"structure": "fixed"}, 10, 500),
        ({}, 1, 0),
        ({"structure": "off"}, 10, 0),
        ({"psi_weights": "psi.safetensors", "psi_warm_steps": 7}, 10, 0),
        ({"psi": "image_resnet", "psi_weights": "r18.pth"}, 10, 0),
        ({"psi_warm_steps": 7}, 10, 7),
        ({"psi_warm_steps": 0}, 10, 0),
    ],
)
def test_how_long_a_run_warms_psi_up(settings, classes, expected):
    assert SADM(**settings).warm_steps(1000, classes) == expected
    assert SADM().warm_steps(400_000, 10) == 10_000
    with pytest.raises(UserError, match=r"sadm\.psi_warm_steps: the data has a single class"):
        SADM(psi_warm_steps=7).warm_steps(1000, 1)


PLAY = [*TINY, "--method", "sadm", "--sadm.psi_width", 16, "--sadm.psi_features", 12, "--steps", 2]


@pytest.mark.launch
def test_a_run_warms_psi_up_once_and_starts_again_after_a_kill(tmp_path):
    """A run whose folder has no checkpoint yet was killed early: it does everything again, to the bit."""
    warm = [*PLAY, "--sadm.psi_warm_steps", 40, "--save_every", 1]
    straight = forked(*warm, "--out", tmp_path / "straight").succeeded().text
    assert "40 steps in which Psi learns to classify the data" in straight
    (tmp_path / "killed").mkdir()
    forked(*warm, "--resume", "--out", tmp_path / "killed").succeeded()
    shutil.rmtree(checkpoint(tmp_path / "killed", 2))
    text = forked(*warm, "--resume", "--out", tmp_path / "killed").succeeded().text
    assert "learns to classify" not in text
    one, other = (method_state(tmp_path / name, 2)["psi"] for name in ("straight", "killed"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    untrained = LatentResNet(channels=1, width=16, features=12).state_dict()
    assert not any(torch.equal(value, untrained[name]) for name, value in one.items())
    seconds = float(re.search(r"after ([\d.]+) s, which count", straight)[1])
    assert metrics(tmp_path / "straight")[0]["seconds"] > seconds > 0


@pytest.mark.launch
def test_the_warm_start_does_not_change_the_data(tmp_path):
    """Until the game begins, a run with a warm start is the plain run, to the bit."""
    flags = ["--sadm.start", 1, "--steps", 3]
    forked(*PLAY, *flags, "--sadm.psi_warm_steps", 5, "--out", tmp_path / "sadm").succeeded()
    forked(*TINY, "--steps", 3, "--out", tmp_path / "dit").succeeded()
    assert metrics(tmp_path / "sadm", untimed=True) == metrics(tmp_path / "dit", untimed=True)


def test_a_warm_start_that_diverges_is_noticed():
    encoder = LatentResNet(channels=1, features=12, width=16)
    bad = ((torch.full((4, 1, 8, 8), float("nan")), torch.zeros(4, dtype=torch.int64)) for _ in range(30))
    with pytest.raises(Diverged, match="20"):
        warm_start_encoder(encoder, 3, bad, steps=30)
