"""Test encoder and decoder: values against an fp64 transcription, what each patch reaches, and checkpoints."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_dit_reference import fp64, generate, randomise
from test_pretrained import assert_refused, make_diffusers, make_official, same

from fastdit.errors import UserError
from fastdit.kernels import split_tokens
from fastdit.models import DiT, Encoder, EncoderDecoder, load_checkpoint
from fastdit.models.pretrained import from_diffusers, from_official

SIZES = {"patch": 2, "channels": 3, "width": 72, "depth": 3, "heads": 3, "classes": 7}
MODES = ("noised_patch", "mask_token", "zeros")


def make(hidden="noised_patch", class_token=True, seed=0, *, width=24, depth=2, heads=2, **changes):
    encoder = Encoder(**({"input_size": 12} | SIZES | changes), class_token=class_token)
    sizes = {"width": width, "depth": depth, "heads": heads}
    return EncoderDecoder(encoder, out_channels=6, **sizes, hidden_tokens=hidden, seed=seed)


def made(*args, **options):
    network = make(*args, **options)
    randomise(network, seed=1)
    return network


def batch_for(network, batch=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, 3, *network.encoder.input_size, generator=generator)
    return x, torch.tensor([0.0, -1.5, 17.5])[:batch], torch.tensor([0, 7, 3])[:batch]


def split_of(network, keep, batch=3):
    tokens = network.grid[0] * network.grid[1]
    return split_tokens(batch, tokens, keep, generator=torch.Generator().manual_seed(3), device="cpu")


def close(got, expected, tolerance, name=""):
    """Within `tolerance` of the expected values' root mean square."""
    atol = tolerance * expected.square().mean().sqrt().item()
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=atol, msg=lambda m: f"{name}: {m}")


def generated(network, *inputs):
    """Return the output, and the encoder's tokens as one tensor."""
    out, stream = network.generate(*inputs)
    return out, torch.addcmul(stream.x, stream.gate[:, None], stream.branch)


def check_function(network, split):
    x, t, y = batch_for(network)
    weights, inner = fp64(network), x.double().requires_grad_()
    expected, expected_stream = generate(weights, network, inner, t, y, split)
    x.requires_grad_()
    out, stream = generated(network, x, t, y, split)
    assert expected.std() > 0.1
    close(out, expected, 1e-5, "output")
    close(stream, expected_stream, 1e-5, "stream")
    up, up_stream = (torch.randn(a.shape, generator=torch.Generator().manual_seed(4)) for a in (out, stream))
    ((out * up).sum() + (stream * up_stream).sum()).backward()
    ((expected * up).sum() + (expected_stream * up_stream).sum()).backward()
    close(x.grad, inner.grad, 1e-4, "x")
    for name, p in network.named_parameters():
        assert weights[name].grad.any(), name
        close(p.grad, weights[name].grad, 1e-4, name)


@pytest.mark.parametrize("class_token", [True, False])
def test_nothing_hidden_is_encoder_bridge_and_decoder_over_all_tokens(class_token):
    network = made(class_token=class_token, input_size=(6, 10))
    check_function(network, None)
    x, t, y = batch_for(network)
    assert torch.equal(network(x, t, y), network.generate(x, t, y, None)[0])


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("hidden", MODES)
def test_some_hidden(hidden, class_token):
    network = made(hidden, class_token, input_size=(6, 10))
    check_function(network, split_of(network, 11))


@pytest.mark.parametrize("hidden", MODES)
def test_what_a_hidden_patch_reaches(hidden):
    """The encoder sees the visible patches only; the decoder a hidden one's pixels in one mode only."""
    network = made(hidden)
    x, t, y = batch_for(network)
    split = split_of(network, 25)
    places = torch.zeros(3, 36).scatter(1, split[1], 1.0).view(3, 1, 6, 6)
    pixels = places.repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(x).bool()
    x.requires_grad_()
    out, stream = generated(network, x, t, y, split)
    assert stream.shape == (3, 1 + 25, 72)
    with torch.no_grad():
        other, other_stream = generated(network, torch.where(pixels, x + 1, x), t, y, split)
        seen, seen_stream = generated(network, torch.where(pixels, x, x + 1), t, y, split)
    assert torch.equal(other_stream, stream)
    assert not torch.equal(seen_stream, stream)
    assert not torch.equal(seen, out)
    reaches = hidden == "noised_patch"
    assert torch.equal(other, out) != reaches
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    assert (x.grad[pixels] != 0).all() if reaches else (x.grad[pixels] == 0).all()
    assert (x.grad[~pixels] != 0).all()
    if hidden == "mask_token":
        assert (network.mask_token.weight.grad != 0).all()
    else:
        assert network.mask_token is None
    x.grad = None
    generated(network, x, t, y, split)[1].square().sum().backward()
    assert (x.grad[pixels] == 0).all(), "the encoder does not see them"


def test_each_sample_has_its_own_hidden_patches():
    network = made()
    x, t, y = batch_for(network)
    split = split_of(network, 20)
    assert not torch.equal(split[0][0], split[0][1])
    whole, _ = network.generate(x, t, y, split)
    for i in range(3):
        alone, _ = network.generate(x[i : i + 1], t[i : i + 1], y[i : i + 1], tuple(ids[i : i + 1] for ids in split))
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-5)


def test_bf16():
    network = made()
    x, t, y = batch_for(network)
    split = split_of(network, 25)
    expected, _ = network.generate(x, t, y, split)
    out, stream = generated(network.bfloat16(), x, t, y, split)
    assert (out.dtype, stream.dtype) == (torch.bfloat16, torch.float32)
    assert (out.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_what_does_not_fit_is_refused():
    network = made()
    x, t, y = batch_for(network)
    visible, hidden = split_of(network, 25)
    for bad in (x[:, :2], x[..., :10], x[0]):
        with pytest.raises(ValueError, match="x must be"):
            network(bad, t, y)
    for bad in (visible[:2], visible.int(), visible[:, :0]):
        with pytest.raises(ValueError, match="ids must be"):
            network.generate(x, t, y, (bad, hidden))
    with pytest.raises(ValueError, match="ids must be"):
        network.generate(x, t, y, (visible, hidden[:2]))
    with pytest.raises(ValueError, match="noised_patch, mask_token, zeros"):
        make("mask")
    for changes in ({"width": 26}, {"width": 24, "heads": 5}):
        with pytest.raises(UserError, match=f"^decoder_width: {changes['width']} must be a multiple") as refused:
            make(**changes)
        assert "\n" not in str(refused.value)


def test_initialisation():
    before = torch.get_rng_state()
    network = make("mask_token")
    assert torch.equal(before, torch.get_rng_state()), "the global generator is left alone"
    x, t, y = batch_for(network)
    assert torch.equal(network(x, t, y), torch.zeros(3, 6, 12, 12))
    assert torch.equal(network.generate(x, t, y, split_of(network, 25))[0], torch.zeros(3, 6, 12, 12))
    state = network.state_dict()
    assert same(make("mask_token").state_dict(), state)
    other = make("mask_token", seed=1).state_dict()
    zero = {"adaln", "head"}
    for name, value in state.items():
        if set(name.split(".")) & zero or name.endswith(("bias", "freq_shift")):
            assert not value.any(), name
        else:
            assert value.std() > 0.01, name
            assert not torch.equal(value, other[name]), name
    for name in ("encoder.class_token.weight", "mask_token.weight"):
        assert state[name].std() < 0.03


def test_a_published_size_costs_nothing_to_lay_out():
    with torch.device("meta"):
        encoder = Encoder(input_size=32, patch=2, channels=4, width=1152, depth=28, heads=16, classes=1000)
        network = EncoderDecoder(encoder, out_channels=4, width=512, depth=8, heads=16)
    assert all(p.is_meta for p in network.parameters())
    published, positions, last = 675_129_632, 256 * 1152, 32 * 1152 + 32
    assert sum(p.numel() for p in network.encoder.parameters()) == published - positions - last
    assert network.decoder.blocks[7].fc2.weight.shape == (512, 2048)


# Checkpoints


def filled_by(network, path):
    """Return the tensors after loading `path`, and by name whether each is as it was before."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    load_checkpoint(network, path)
    after = network.state_dict()
    return after, {name: torch.equal(before[name], after[name]) for name in before}


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("layout", ["official", "ours", "diffusers"])
def test_a_dit_fills_the_encoder(tmp_path, layout, class_token):
    case = {"input_size": 12, **SIZES, "out_channels": 6}
    path = tmp_path / {"official": "dit.pt", "ours": "dit.safetensors", "diffusers": "folder"}[layout]
    if layout == "diffusers":
        source = make_diffusers(case)
        source.save_pretrained(path)
        expected = from_diffusers(source.state_dict())
    else:
        expected = from_official(make_official(case))
        torch.save(make_official(case), path) if layout == "official" else save_file(expected, path)
    network = made(class_token=class_token)
    after, unchanged = filled_by(network, path)
    loaded = {name.removeprefix("encoder.") for name, unmoved in unchanged.items() if not unmoved}
    assert loaded <= {name for name in expected if not name.startswith("head.")}
    for name, value in expected.items():
        if not name.startswith("head."):
            assert torch.equal(after[f"encoder.{name}"], value), name
    assert all(unchanged[name] for name in unchanged if not name.startswith("encoder."))
    assert unchanged.get("encoder.class_token.weight", True)


def test_the_dit_may_have_other_outputs(tmp_path):
    """The official ones predict a variance too; the decoder's own head stays."""
    torch.save(make_official({"input_size": 12, **SIZES, "out_channels": 3}), tmp_path / "dit.pt")
    load_checkpoint(made(), tmp_path / "dit.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 48, "heads": 3}, "width is 72 in this file, 48 in this model"),
        ({"depth": 2}, "depth is 3 in this file, 2 in this model"),
        ({"channels": 4}, "channels is 3 in this file, 4 in this model"),
        ({"classes": 10}, "number of classes, the null class included, is 8 in this file, 11 in this model"),
    ],
)
def test_another_size_is_refused(tmp_path, changes, message):
    encoder = Encoder(**({"input_size": 12} | SIZES | changes), class_token=True)
    network = EncoderDecoder(encoder, out_channels=6, width=24, depth=2, heads=2)
    case = {"input_size": 12, **SIZES, "out_channels": 6}
    torch.save(make_official(case), tmp_path / "dit.pt")
    make_diffusers(case).save_pretrained(tmp_path / "folder")
    save_file(make().state_dict(), tmp_path / "whole.safetensors")
    for name in ("dit.pt", "folder", "whole.safetensors"):
        assert_refused(network, tmp_path / name, message)


def test_a_whole_one_loads_back_exactly(tmp_path):
    for hidden in ("noised_patch", "mask_token"):
        source, path = made(hidden), tmp_path / f"{hidden}.safetensors"
        save_file(source.state_dict(), path)
        network = make(hidden)
        load_checkpoint(network, path)
        assert same(network.state_dict(), load_file(path))
        assert same(network.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: DiT(input_size=12, **SIZES, out_channels=6),
            "no plain DiT; take --method sd_dit --sd_dit.decoder extra",
        ),
        (lambda: make(class_token=False), "encoder.class_token.weight is not part of this model"),
        (lambda: make("mask_token"), "mask_token.weight is missing"),
        (lambda: make(depth=1), "decoder.blocks.1.fc1.bias is not part of this model"),
        (lambda: make(width=32), r"bridge.weight is \(24, 72\), this model needs \(32, 72\)"),
    ],
    ids=["a DiT", "no class token", "a mask token", "a shorter decoder", "a wider decoder"],
)
def test_another_network_is_refused(tmp_path, network, message):
    save_file(made().state_dict(), tmp_path / "whole.safetensors")
    assert_refused(network(), tmp_path / "whole.safetensors", message)
