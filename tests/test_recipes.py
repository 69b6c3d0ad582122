"""Go through the recipe of each set of docs/reproduce.md: convert, check, encode, train by the preset, evaluate.

The downloads are miniatures in the official layouts, and the networks are tiny; all else is the preset's.
"""

import contextlib
import hashlib
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from fetch_helpers import raw_files
from launching import forked, metrics
from official_downloads import image, tar, write_download

from fastdit.commands.data_tools import _data
from fastdit.data.sets.known_sets import SETS
from fastdit.data.sets.official_sets import OFFICIAL_SETS
from fastdit.encode import _encode
from fastdit.evaluate import _evaluate
from fastdit.evaluation import class_agreement, evaluator
from fastdit.metrics.feature_nets import FeatureNet
from fastdit.metrics.summary import Output
from fastdit.models import DiT, save_official

pytestmark = pytest.mark.launch
# Besides the preset: the network and the batch are small, and two steps are taken.
SMALL = shlex.split(
    "--device cpu --threads 1 --data.threads 1 --model.depth 2 --model.width 32 --model.heads 2 --batch 2 --steps 2 "
    "--log_every 1 --sample.steps 2 --sample.per_class 1 --sample.agreement 0"
)
SADM = shlex.split("--method sadm --sadm.psi_width 16")
LATENTS = "--data.source data-latents --data.size 16 --data.channels 3 --data.latent_scale 1"
WARM = ["--sadm.psi_warm_steps", "2"]  # of data with classes


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(autouse=True)
def cheap_features(monkeypatch) -> None:
    """A random projection of scaled pixels, in the place of a network."""
    matrix = torch.randn(3 * 8 * 8, 24, generator=torch.Generator().manual_seed(0)) / 255

    def run(images: torch.Tensor) -> Output:
        x = (F.adaptive_avg_pool2d(images.float(), 8).flatten(1) @ matrix).tanh()
        return Output(x[:, :8], x[:, 8:12], x[:, 12:])

    monkeypatch.setattr(evaluator, "feature_net", lambda *args: FeatureNet("cheap", "cheap", "none 0", "none", run))
    monkeypatch.setattr(class_agreement, "KNOWN_IMAGES", 400)


@pytest.fixture
def weights(home) -> str:
    """A DiT's weights of 1,000 classes in the original layout."""
    dit = DiT(input_size=16, patch=2, channels=3, out_channels=6, width=32, depth=2, heads=2, classes=1000)
    save_official(dit.state_dict(), home / "DiT.pt", grid=dit.grid)
    return "DiT.pt"


def printed(command, argv: str) -> str:
    """Return what a command prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        command(shlex.split(argv))
    return out.getvalue()


def train(*flags: str, out: str = "run") -> None:
    """Take two steps."""
    forked(*flags, *SMALL, "--out", out).succeeded()
    assert [line["step"] for line in metrics(Path(out))] == [1, 2]


def evaluate(data: str) -> None:
    """Compare the run's samples with images."""
    printed(_evaluate, f"--run run --n 6 --steps 2 --data {data}")
    assert json.loads(Path("run/eval.json").read_text())[-1]["figures"]["FD-cheap"]["value"] > 0


@pytest.mark.parametrize("name", [name for name, known in OFFICIAL_SETS.items() if not known.train])
def test_fine_tuning(name, weights):
    download = write_download(name, Path("from"))
    printed(_data, f"convert-set {name} --from from --out data")
    assert "checksums" in printed(_data, "check data/train")
    printed(_encode, "--source data/train --size 16 --autoencoder identity --out data-latents --threads 1")
    train("--preset", "finetune", "--init_from", weights, *shlex.split(LATENTS), *SADM, *WARM)
    assert json.loads(Path("run/classes.json").read_text()) == list(download.names or ("0", "1"))
    evaluate("data/train")


@pytest.mark.parametrize("name", ["celeba64", "ffhq64"])
def test_faces(name):
    write_download(name, Path("from"))
    printed(_data, f"convert-set {name} --from from")
    assert "checksums" in printed(_data, f"check data/{name}/train")
    train("--preset", name, *SADM)
    evaluate(f"data/{name}/train")


@pytest.mark.parametrize("preset", ["cifar10", "cifar10_uncond"])
def test_cifar10(preset, monkeypatch):
    """The recipe, with the checksum of a small file in the place of the official one."""
    (files, read), _ = SETS["cifar10"].recipes
    content = raw_files()[files[0].name]
    small = replace(files[0], sums=(hashlib.sha256(content).hexdigest(),))
    monkeypatch.setitem(SETS, "cifar10", replace(SETS["cifar10"], recipes=[([small], read)]))
    Path(files[0].name).write_bytes(content)
    printed(_data, f"fetch cifar10 --from {files[0].name}")
    train("--preset", preset, *SADM)
    evaluate("data/cifar10/train")


@pytest.mark.parametrize("preset", ["imagenet256_sd_dit", "sadm_imagenet256", "sadm_imagenet512"])
def test_imagenet(preset):
    classes = {wnid: {f"{wnid}_{i}.JPEG": image(10 * i + 1) for i in range(3)} for wnid in ("n01440764", "n01443537")}
    tars = {f"{wnid}.tar": tar(images, "w") for wnid, images in classes.items()}
    Path("ILSVRC2012_img_train.tar").write_bytes(tar(tars, "w"))
    printed(_data, "convert-imagenet ILSVRC2012_img_train.tar --out data/imagenet")
    printed(_encode, "--source data/imagenet --size 16 --autoencoder identity --out data-latents --threads 1")
    train("--preset", preset, *shlex.split(LATENTS), *(["--sadm.psi_width", "16", *WARM] if "sadm" in preset else []))
    assert json.loads(Path("run/classes.json").read_text()) == list(classes)
    evaluate("data/imagenet")
