"""What measures structure: both networks against fp64 transcriptions, the batch's influence, spectral norm, files."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from torch.utils.flop_counter import FlopCounterMode

from fastdit.errors import UserError
from fastdit.models import DiT, flops_per_image
from fastdit.models.image_resnet import ImageResNet
from fastdit.models.structure_encoders import LatentResNet, load_structure_encoder, save_structure_encoder

SMALL = {"channels": 3, "width": 16, "features": 24}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every weight of a product as it is used, (out, the rest)."""
    return {
        name: module.weight.detach().flatten(1)
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }


def weights_in_use(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every module's weight and bias in fp64. Weights with a spectral norm are divided by it."""
    parts = [(name, module, part) for name, module in net.named_modules() for part in ("weight", "bias")]
    found = {f"{name}.{part}": getattr(module, part, None) for name, module, part in parts}
    return {name: value.detach().double() for name, value in found.items() if isinstance(value, torch.Tensor)}


def power_state(net: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for name, value in net.named_buffers() if name.endswith(("_u", "_v"))]


def one_line(call, *args) -> str:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Tolerances in bf16. Autocast stores activations and weights of products in bf16. Products of two such values are exact
# in fp32, and their sums are fp32, whose unit roundoff is 2^16 times smaller than bf16's. So on every CPU the error is
# that of storing, and the fp64 transcriptions below, when they round the same tensors, have the same roundings. How a
# CPU orders its sums only decides which way a few of them go. The tests allow twice the transcription's error.


def bf16(x: torch.Tensor) -> torch.Tensor:
    """Round to bf16, keeping the dtype."""
    return x.bfloat16().to(x.dtype)


def exactly(x: torch.Tensor) -> torch.Tensor:
    """Return x itself: round nothing."""
    return x


def assert_as_good_as_bf16(got: torch.Tensor, rounded: torch.Tensor, exact: torch.Tensor) -> None:
    """Demand at most twice the error of `rounded`, in the norm of all features, and some error."""
    assert 0 < (got.double() - exact).norm() <= 2 * (rounded - exact).norm()


# -- the function --


def halved(x: torch.Tensor) -> torch.Tensor:
    """Means of what is there of each 2x2 square."""
    rows, cols = (math.ceil(side / 2) for side in x.shape[2:])
    squares = [
        x[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].flatten(2).mean(2) for i in range(rows) for j in range(cols)
    ]
    return torch.stack(squares, 2).unflatten(2, (rows, cols))


def transcription(w: dict[str, torch.Tensor], x: torch.Tensor, stored=exactly) -> torch.Tensor:
    """Compute LatentResNet's features in the dtype of its arguments, all but the head's tensors as `stored`."""

    def act(name: str, x: torch.Tensor) -> torch.Tensor:
        groups = x.reshape(x.shape[0], -1, 16 * x.shape[2] * x.shape[3])
        centred = groups - groups.mean(2, keepdim=True)
        normed = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(x.shape)
        scale, shift = (stored(w[f"{name}.{part}"])[:, None, None] for part in ("weight", "bias"))
        y = stored(normed * scale + shift)
        return stored(y / (1 + (-y).exp()))

    def conv(name: str, x: torch.Tensor) -> torch.Tensor:
        weight = stored(w[f"{name}.weight"])
        return stored(F.conv2d(x, weight, padding=weight.shape[-1] // 2))

    def block(i: int, x: torch.Tensor) -> torch.Tensor:
        y = conv(f"blocks.{i}.conv1", act(f"blocks.{i}.norm1", x))
        y = conv(f"blocks.{i}.conv2", act(f"blocks.{i}.norm2", y))
        return stored(y + (conv(f"blocks.{i}.skip", x) if f"blocks.{i}.skip.weight" in w else x))

    x, last = conv("stem", stored(x)), 3
    order = [0, 1, 2, last]
    while order:
        x = stored(halved(x)) if min(x.shape[2:]) > 4 else x
        x = block(order.pop(0), x)
        if not order and min(x.shape[2:]) > 4:
            order = [last]
    return act("norm", x).mean((2, 3)) @ w["head.weight"].T


def stirred(net: LatentResNet) -> LatentResNet:
    """With norms that scale and shift."""
    for i, (name, weight) in enumerate(net.named_parameters()):
        if "norm" in name:
            weight.data += 0.3 * noise(*weight.shape, seed=i)
    return net


@pytest.mark.parametrize(
    ("channels", "size"),
    [(1, (28, 28)), (4, (32, 32)), (3, (8, 8)), (4, (9, 13)), (3, (8, 41)), (3, (33, 17)), (4, (3, 6)), (1, (70, 67))],
)
def test_the_function(channels, size):
    net = stirred(LatentResNet(channels=channels, width=32, features=40))
    x = noise(3, channels, *size)
    features = net(x)
    assert (features.shape, features.dtype) == ((3, 40), torch.float32)
    expected = transcription({name: value.double() for name, value in net.state_dict().items()}, x.double())
    torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=2e-5)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_every_pixel_counts():
    x = noise(2, 3, 15, 21).requires_grad_()
    LatentResNet(**SMALL)(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).all()


def test_gradients_of_a_gradient_penalty():
    """Of |d (v . features) / d x|^2, by the weights: what the game's penalty needs."""
    net = stirred(LatentResNet(**SMALL))
    copies = {name: value.detach().double().requires_grad_() for name, value in net.named_parameters()}
    x, v = noise(2, 3, 11, 9), noise(2, 24, seed=1)

    def penalty(function, x, v):
        (slope,) = torch.autograd.grad((function(x.requires_grad_()) * v).sum(), x, create_graph=True)
        return slope.square().sum()

    penalty(net, x, v).backward()
    expected = torch.autograd.grad(
        penalty(lambda x: transcription(copies, x), x.detach().double(), v.double()), [*copies.values()]
    )
    for (name, weight), grad in zip(net.named_parameters(), expected):
        scale = grad.abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(weight.grad.double(), grad, rtol=0, atol=1e-4 * scale, msg=name)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_features_do_not_depend_on_the_batch(spectral_norm):
    net = LatentResNet(**SMALL, spectral_norm=spectral_norm).eval()
    x, others = noise(4, 3, 19, 14), 100 * noise(4, 3, 19, 14, seed=1)
    mixed = others.clone()
    mixed[[2, 0]] = x[[1, 3]]
    with torch.no_grad():
        features, among_others = net(x), net(mixed)
        alone = net(x[:1])
    assert torch.equal(among_others[[2, 0]], features[[1, 3]])
    torch.testing.assert_close(alone, features[:1], rtol=1e-5, atol=1e-5)


def test_channels_last():
    net, x = LatentResNet(**SMALL), noise(2, 3, 17, 12)
    expected = net(x)
    net = net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.to(memory_format=torch.channels_last)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_autocast(spectral_norm):
    """Check dtypes, the features' error, and that spectral norms survive: activations are bf16, features fp32."""
    net, x = LatentResNet(**SMALL, spectral_norm=spectral_norm).eval(), noise(3, 3, 16, 16).requires_grad_()
    seen = []
    for module in (net.blocks[1].norm1, net.blocks[3].norm2, net.norm):
        module.register_forward_hook(lambda _, given, made: seen.append((given[0].dtype, made.dtype)))
    norms = [module for name, module in net.named_modules() if name.endswith("parametrizations.weight.0")]
    lowered: list[bool] = []  # on GPUs autocast would lower a part of their arithmetic, and the rest not take it
    for module in norms:
        module.register_forward_pre_hook(lambda *_: lowered.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        features = net(x)
    features.sum().backward()
    assert lowered == [False] * 12 * spectral_norm
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 3
    assert features.dtype == torch.float32
    assert (features != features.bfloat16().float()).any(), "the head is not rounded"
    w = weights_in_use(net)
    exact, rounded = (transcription(w, x.detach().double(), stored) for stored in (exactly, bf16))
    assert_as_good_as_bf16(features.detach(), rounded, exact)
    assert x.grad.isfinite().all()
    net.train()
    with torch.autocast("cpu", torch.bfloat16):
        net(x)
    assert all(value.dtype == torch.float32 for value in power_state(net))
    assert net.bfloat16()(x).dtype == torch.float32, "weights stored in bf16"


# -- size and cost --


@pytest.mark.parametrize("channels", [3, 4])
def test_parameters(channels):
    assert 3e6 < sum(p.numel() for p in LatentResNet(channels=channels).parameters()) < 11e6


def test_cost_is_as_stated_and_small_beside_a_dit():
    net, x = LatentResNet(channels=4), torch.zeros(2, 4, 32, 32)

    def gflop(to_input: bool, to_weights: bool) -> float:
        net.requires_grad_(to_weights)
        with FlopCounterMode(display=False) as counter:
            features = net(x.detach().requires_grad_(to_input))
            if to_input or to_weights:
                features.sum().backward()
        return counter.get_total_flops() / 2 / 1e9

    forward, estimate, own = gflop(False, False), gflop(True, False), gflop(False, True)
    assert [round(forward, 2), round(estimate, 2), round(own, 2)] == [0.31, 0.62, 0.92]
    with torch.device("meta"):
        dit = DiT(input_size=32, patch=2, channels=4, width=1152, depth=28, heads=16, classes=1000)
    game = forward + estimate + 2 * own
    assert round(game, 1) == 2.8
    assert game < 0.1 * flops_per_image(dit) / 1e9


@pytest.mark.parametrize(
    ("change", "words"),
    [({"width": 24}, "width: 24 must be a multiple of 16"), ({"width": 0}, "width: 0"), ({"features": 0}, "features")],
)
def test_impossible_sizes(change, words):
    assert words in one_line(lambda: LatentResNet(**SMALL | change))


@pytest.mark.parametrize("shape", [(2, 4, 16, 16), (3, 16, 16)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="x must be"):
        LatentResNet(**SMALL)(torch.zeros(shape))


# -- seeds --


@pytest.mark.parametrize("spectral_norm", [False, True])
def test_weights_depend_on_the_seed_alone(spectral_norm):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = LatentResNet(**SMALL, spectral_norm=spectral_norm, seed=5).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = LatentResNet(**SMALL, spectral_norm=spectral_norm, seed=5).state_dict()
    other = LatentResNet(**SMALL, spectral_norm=spectral_norm, seed=6).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in one.items())
    assert all(not torch.equal(value, other[name]) for name, value in one.items() if "norm" not in name)


# -- spectral norm --


@pytest.fixture
def bounded() -> LatentResNet:
    return LatentResNet(**SMALL, spectral_norm=True)


def test_spectral_norm_bounds_every_product(bounded):
    free = matrices(LatentResNet(**SMALL))
    assert len(free) == 1 + 4 * 2 + 2 + 1, "stem, four blocks, two of them widen, head"
    assert min(torch.linalg.matrix_norm(w, 2) for w in free.values()) > 1.5, "else there is nothing to bound"
    x = noise(2, 3, 8, 8)
    for _ in range(60):
        bounded(x)
    bounded.eval()
    norms = {name: torch.linalg.matrix_norm(w, 2).item() for name, w in matrices(bounded).items()}
    assert norms.keys() == free.keys()
    assert all(norm == pytest.approx(1, abs=0.02) for norm in norms.values()), norms


def test_spectral_norm_moves_in_training_mode_only(bounded):
    x = noise(2, 3, 9, 8)
    before = power_state(bounded)
    assert len(before) == 2 * len(matrices(LatentResNet(**SMALL)))
    bounded.eval()
    assert torch.equal(bounded(x), bounded(x))
    assert all(torch.equal(a, b) for a, b in zip(before, power_state(bounded)))
    bounded.train()
    bounded(x)
    assert all(not torch.equal(a, b) for a, b in zip(before, power_state(bounded)))


def test_spectral_norm_goes_on_exactly_from_its_state(bounded, tmp_path):
    def steps(net: LatentResNet) -> torch.Tensor:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            net(noise(2, 3, 9, 8, seed=seed)).square().mean().backward()
            optimizer.step()
        return net(noise(2, 3, 9, 8, seed=9))

    steps(bounded)
    torch.save(bounded.state_dict(), tmp_path / "state.pt")
    save_structure_encoder(bounded, tmp_path / "psi.safetensors")
    by_torch, by_us = (LatentResNet(**SMALL, spectral_norm=True, seed=seed) for seed in (1, 2))
    by_torch.load_state_dict(torch.load(tmp_path / "state.pt"))
    load_structure_encoder(by_us, tmp_path / "psi.safetensors")
    expected = steps(bounded)
    assert torch.equal(steps(by_torch), expected)
    assert torch.equal(steps(by_us), expected)


# -- files --


def test_a_file_gives_equal_features(tmp_path):
    net, x = stirred(LatentResNet(**SMALL, seed=3)), noise(2, 3, 10, 11)
    path = tmp_path / "psi.safetensors"
    save_structure_encoder(net.to(memory_format=torch.channels_last), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    other = LatentResNet(**SMALL)
    assert not torch.equal(other(x), net(x))
    load_structure_encoder(other, path)
    assert torch.equal(other(x), net.to(memory_format=torch.contiguous_format)(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": 4}, "channels is 3 in this file, 4 in this run"),
        ({"width": 32}, "width is 16 in this file, 32 in this run"),
        ({"features": 25}, "features is 24 in this file, 25 in this run"),
        ({"spectral_norm": True}, "spectral_norm is False in this file, True in this run"),
    ],
)
def test_a_file_of_another_network(tmp_path, change, words):
    path = tmp_path / "psi.safetensors"
    save_structure_encoder(LatentResNet(**SMALL), path)
    assert one_line(load_structure_encoder, LatentResNet(**SMALL | change), path).startswith(f"{path}: {words}")


def test_bad_files(tmp_path):
    net, path = LatentResNet(**SMALL), tmp_path / "psi.safetensors"
    assert f"{path}: cannot be read" in one_line(load_structure_encoder, net, path)
    assert f"{tmp_path}: cannot be read" in one_line(load_structure_encoder, net, tmp_path)
    save_structure_encoder(net, path)
    whole, state, header = path.read_bytes(), load(path.read_bytes()), net.settings()
    for damaged in (b"", whole[:100], whole[:-4], pickle.dumps({})):
        path.write_bytes(damaged)
        assert f"{path}: cannot be read" in one_line(load_structure_encoder, net, path)
    save_file(state, path)
    assert f"{path}: does not name its channels" in one_line(load_structure_encoder, net, path)
    save_file({name: value for name, value in state.items() if name != "head.weight"}, path, metadata=header)
    assert f"{path}: head.weight is missing" in one_line(load_structure_encoder, net, path)
    save_file(state | {"extra": torch.zeros(1)}, path, metadata=header)
    assert f"{path}: extra is not part" in one_line(load_structure_encoder, net, path)
    save_file(state | {"stem.weight": torch.zeros(2)}, path, metadata=header)
    assert f"{path}: stem.weight is (2,), this model needs (16, 3, 3, 3)" in one_line(load_structure_encoder, net, path)


# -- ImageResNet --


def resnet18_weights() -> dict[str, torch.Tensor]:
    """Random ones, under torchvision's names."""
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
    theirs = models.resnet18().eval()
    theirs.load_state_dict(weights)
    theirs.fc = torch.nn.Identity()
    x = noise(2, 3, 64, 50).tanh()
    mean, std = (torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    torch.testing.assert_close(ImageResNet(path)(x), theirs((x / 2 + 0.5 - mean) / std), rtol=1e-5, atol=1e-5)


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
    """safetensors, half precision, without what is not read: the same network. No random number is drawn."""
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
    """safetensors maps files."""
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
