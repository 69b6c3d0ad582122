"""Test ImageResNet: against an fp64 transcription, in bf16, and its files of weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_structure_encoders import assert_as_good_as_bf16, bf16, exactly, noise, one_line

from fastdit.models.image_resnet import ImageResNet


def resnet18_weights() -> dict[str, torch.Tensor]:
    """Return random weights under torchvision's names."""
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7)}
    norms = {"bn1": 64}
    for layer, (before, after) in enumerate([(64, 64), (64, 128), (128, 256), (256, 512)], start=1):
        for i in range(2):
            name, inside = f"layer{layer}.{i}", before if i == 0 else after
            shapes |= {f"{name}.conv1.weight": (after, inside, 3, 3), f"{name}.conv2.weight": (after, after, 3, 3)}
            norms |= {f"{name}.bn1": after, f"{name}.bn2": after}
            if inside != after:
                shapes[f"{name}.downsample.0.weight"], norms[f"{name}.downsample.1"] = (after, inside, 1, 1), after
    state = {
        name: noise(*shape, seed=i) / math.prod(shape[1:]) ** 0.5 for i, (name, shape) in enumerate(shapes.items())
    }
    for i, (name, n) in enumerate(norms.items()):
        state |= {
            f"{name}.weight": 1 + 0.2 * noise(n, seed=3 * i),
            f"{name}.bias": 0.2 * noise(n, seed=3 * i + 1),
            f"{name}.running_mean": 0.3 * noise(n, seed=3 * i + 2),
            f"{name}.running_var": 0.5 + noise(n, seed=i).abs(),
            f"{name}.num_batches_tracked": torch.tensor(7),
        }
    return state | {"fc.weight": noise(1000, 512), "fc.bias": noise(1000)}


def resnet18(w: dict[str, torch.Tensor], x: torch.Tensor, stored=exactly) -> torch.Tensor:
    """Compute the features of images in [-1, 1] in fp64, with weights of products and all activations as `stored`."""
    w, colour = {name: value.double() for name, value in w.items()}, torch.float64
    mean, std = torch.tensor([0.485, 0.456, 0.406], dtype=colour), torch.tensor([0.229, 0.224, 0.225], dtype=colour)

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = stored(w[f"{name}.weight"])
        return stored(F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2))

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        slope = w[f"{name}.weight"] / (w[f"{name}.running_var"] + 1e-5).sqrt()
        shift = w[f"{name}.bias"] - w[f"{name}.running_mean"] * slope
        return stored(x * slope[:, None, None] + shift[:, None, None])

    x = (x.double().expand(-1, 3, -1, -1) + 1) / 2
    x = stored((x - mean[:, None, None]) / std[:, None, None])
    x = F.max_pool2d(norm("bn1", conv("conv1", x, 2)).relu(), 3, 2, 1)
    for layer in range(1, 5):
        for i in range(2):
            name, stride = f"layer{layer}.{i}", 2 if layer > 1 and i == 0 else 1
            y = norm(f"{name}.bn1", conv(f"{name}.conv1", x, stride)).relu()
            y = norm(f"{name}.bn2", conv(f"{name}.conv2", y))
            if stride == 2:
                x = norm(f"{name}.downsample.1", conv(f"{name}.downsample.0", x, 2))
            x = stored(x + y).relu()
    return x.mean((2, 3))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return resnet18_weights()


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("resnet") / "resnet18.pth"
    torch.save(weights, path)
    return str(path)


# The last layers of 33 rows and 32 columns are 2x1: where torch 2.13's strided convolution fails on CPUs with AMX.
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (3, (45, 61)), (1, (33, 32)), (3, (70, 32))])
def test_resnet18(path, weights, channels, size):
    x = noise(3, channels, *size).tanh()
    net = ImageResNet(path)
    features = net(x)
    assert (features.shape, features.dtype, net.features) == ((3, 512), torch.float32, 512)
    exact = resnet18(weights, x)
    torch.testing.assert_close(features.double(), exact, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(x)
    assert rough.dtype == torch.float32
    assert_as_good_as_bf16(rough, resnet18(weights, x, bf16), exact)


def test_resnet18_is_torchvisions(path, weights):
    models = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    reference = models.resnet18().eval()
    reference.load_state_dict(weights)
    reference.fc = torch.nn.Identity()
    x = noise(2, 3, 64, 50).tanh()
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(ImageResNet(path)(x), reference((x / 2 + 0.5 - mean) / std), rtol=1e-5, atol=1e-5)


def test_resnet18_norms_are_frozen(path):
    net, x, others = ImageResNet(path), noise(3, 3, 40, 32).tanh(), noise(3, 3, 40, 32, seed=1).tanh()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    expected = net.eval()(x)
    net.train()
    others[2] = x[0]
    assert torch.equal(net(x), expected)
    assert torch.equal(net(others)[2], expected[0]), "whatever shares the batch"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_resnet18_gradients(path):
    net, x = ImageResNet(path), noise(2, 1, 32, 35).tanh().requires_grad_()
    net(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).float().mean() > 0.9
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


def test_resnet18_files(path, weights, tmp_path):
    """Half precision in safetensors, without the classifier, gives the same network. No random number is drawn."""
    x, before = noise(2, 3, 32, 32).tanh(), torch.get_rng_state()
    expected = ImageResNet(path)(x)
    assert torch.equal(torch.get_rng_state(), before)
    trunk = {name: value for name, value in weights.items() if "fc." not in name and "num_b" not in name}
    save_file(trunk, tmp_path / "trunk.safetensors")
    assert torch.equal(ImageResNet(tmp_path / "trunk.safetensors")(x), expected)
    save_file({name: value.half() for name, value in trunk.items()}, tmp_path / "half.safetensors")
    half = ImageResNet(tmp_path / "half.safetensors")
    assert {value.dtype for value in half.state_dict().values()} == {torch.float32}
    torch.testing.assert_close(half(x), expected, rtol=0.01, atol=0.01)


def test_resnet18_keeps_its_weights_when_the_file_changes(weights, tmp_path):
    """Tensors of safetensors are the mapped file itself."""
    file, x = tmp_path / "trunk.safetensors", noise(2, 3, 32, 32).tanh()
    save_file(weights, file)
    net = ImageResNet(file)
    expected = net(x)
    with file.open("r+b") as out:
        out.seek(-4_000_000, 2)
        out.write(bytes(2_000_000))
    assert torch.equal(net(x), expected)
    assert not torch.equal(ImageResNet(file)(x), expected)


def test_bad_resnet18_files(weights, tmp_path):
    def saved(state: object, name: str = "x.pth") -> str:
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    gone = tmp_path / "gone.pth"
    assert f"{gone}: no such file; give" in one_line(ImageResNet, gone)
    assert f"{tmp_path}: no such file; give" in one_line(ImageResNet, tmp_path)
    assert "does not hold a dict of tensors" in one_line(ImageResNet, saved([1, 2]))
    for name in ("junk.pth", "junk.safetensors"):
        (tmp_path / name).write_bytes(b"nonsense")
        assert f"{tmp_path / name}: {name} cannot be read" in one_line(ImageResNet, tmp_path / name)
    fewer = {name: value for name, value in weights.items() if name != "layer3.0.bn2.running_var"}
    assert "x.pth: layer3.0.bn2.running_var is missing; give the weights" in one_line(ImageResNet, saved(fewer))
    deeper = weights | {"layer1.2.conv1.weight": torch.zeros(64, 64, 3, 3)}  # a ResNet-34
    assert "x.pth: layer1.2.conv1.weight is not part of this model" in one_line(ImageResNet, saved(deeper))
    wider = weights | {"layer4.0.conv1.weight": torch.zeros(1024, 256, 3, 3)}
    assert "is (1024, 256, 3, 3), this model needs (512, 256, 3, 3)" in one_line(ImageResNet, saved(wider))


@pytest.mark.parametrize("shape", [(2, 2, 32, 32), (3, 32, 32), (2, 3, 31, 32), (2, 3, 32, 31)])
def test_other_images_are_refused(path, shape):
    with pytest.raises(ValueError, match="x must be"):
        ImageResNet(path)(torch.zeros(shape))
