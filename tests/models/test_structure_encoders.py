"""Test LatentResNet: against an fp64 transcription, the batch's influence, cost, spectral norm, files."""

import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save_file
from torch.utils.flop_counter import FlopCounterMode

from fastdit.errors import UserError
from fastdit.models import DiT, flops_per_image
from fastdit.models.structure_encoders import LatentResNet, load_structure_encoder, save_structure_encoder

SMALL = {"channels": 3, "width": 16, "features": 24}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return every weight of a product as it is used, as a matrix (out, the rest)."""
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
    """Return means over each 2x2 square, or over the part of it that lies in the grid."""
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
    """Check outputs with norms that scale and shift."""
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
    """The game's penalty needs the gradient of |d (v . features) / d x|^2 in the weights."""
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
        module.register_forward_hook(lambda _, inputs, made: seen.append((inputs[0].dtype, made.dtype)))
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

    forward, estimate, to_weight = gflop(False, False), gflop(True, False), gflop(False, True)
    assert [round(forward, 2), round(estimate, 2), round(to_weight, 2)] == [0.31, 0.62, 0.92]
    with torch.device("meta"):
        dit = DiT(input_size=32, patch=2, channels=4, width=1152, depth=28, heads=16, classes=1000)
    game = forward + estimate + 2 * to_weight
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
