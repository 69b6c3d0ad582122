"""Test autoencoders: each kind against its definition, damaged files, and pictures of training latents."""

import builtins
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from autoencoder_helpers import diffusers_model, random_taef2, rewrite

from fastdit.errors import UserError
from fastdit.models import LatentDecoder, open_autoencoder
from fastdit.models.latent_decoder import AT_ONCE

KINDS = ("AutoencoderKL", "AutoencoderTiny")
REAL = os.environ.get("FASTDIT_TAEF2")


def pictures(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return smooth colors (n, 3, height, width) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.randn(n, 3, 4, 5, generator=generator), (height, width), mode="bicubic")
    return (x + 0.1 * torch.randn(x.shape, generator=generator)).tanh()


def refusal(name) -> str:
    with pytest.raises(UserError) as caught:
        open_autoencoder(str(name))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Save an autoencoder of each kind that has files, and return their folders."""
    home = tmp_path_factory.mktemp("autoencoders")
    for kind in KINDS:
        diffusers_model(kind).save_pretrained(home / kind)
    return {kind: home / kind for kind in KINDS} | {"taef2": random_taef2(home / "taef2")}


@pytest.fixture
def copies(folders, tmp_path):
    """Return copies(kind), which returns a copy of the folder of that kind, to damage."""
    return lambda kind: Path(shutil.copytree(folders[kind], tmp_path / kind))


# -- the functions --


def test_identity_and_space_to_depth():
    x = pictures(2, 12, 18)
    same, squares = open_autoencoder("identity"), open_autoencoder("space_to_depth:3")
    assert (same.channels, same.factor, squares.channels, squares.factor) == (3, 1, 27, 3)
    assert torch.equal(same.encode(x)[0], x)
    z, std = squares.encode(x)
    assert (z.shape, std.shape, std.abs().max()) == ((2, 27, 4, 6), (2, 27, 4, 6), 0)
    for b, c, i, j in np.ndindex(2, 3, 3, 3):
        assert torch.equal(z[b, 9 * c + 3 * i + j], x[b, c, i::3, j::3])
    assert torch.equal(squares.decode(z), x)
    assert (squares.name, squares.scale, squares.shift, squares.hash) == ("space_to_depth:3", 1, 0, None)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_to_the_bit(folders, kind):
    reference, ours = diffusers_model(kind), open_autoencoder(str(folders[kind]))
    x = pictures(2, 24, 20)
    mean, std = ours.encode(x)
    if kind == "AutoencoderKL":
        posterior = reference.encode(x).latent_dist
        assert torch.equal(mean, posterior.mean)
        assert torch.equal(std, posterior.std)
        assert (std > 0).all()
        assert (ours.channels, ours.factor, ours.scale, ours.shift) == (4, 4, 0.3611, 0.1159)
    else:
        assert torch.equal(mean, reference.encode(x).latents)
        assert (std == 0).all()
        assert (ours.channels, ours.factor, ours.scale, ours.shift) == (5, 2, 0.9, 0)
    assert mean.shape == std.shape == (2, ours.channels, 24 // ours.factor, 20 // ours.factor)
    assert torch.equal(ours.decode(mean), reference.decode(mean).sample)
    assert ours.decode(mean).shape == x.shape


def test_a_folder_of_an_older_diffusers(folders, copies):
    """Attention's projections had other names then, and the tensors were in a .bin file, in half precision."""
    folder, past = copies("AutoencoderKL"), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    new, state = folder / "diffusion_pytorch_model.safetensors", {}

    def renamed(stored):
        for key, value in stored.items():
            for now, then in past.items():
                key = key.replace(f"attentions.0.{now}.", f"attentions.0.{then}.")
            state[key] = value.half()

    rewrite(new, renamed)
    new.unlink()
    assert sum("proj_attn" in key for key in state) == 4
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    old, now, x = open_autoencoder(str(folder)), open_autoencoder(str(folders["AutoencoderKL"])), pictures(2, 16, 12)
    assert {p.dtype for p in old.parameters()} == {torch.float32}
    torch.testing.assert_close(old.encode(x)[0], now.encode(x)[0], rtol=0.01, atol=0.01)
    assert not torch.equal(old.encode(x)[0], now.encode(x)[0])
    assert old.hash != now.hash


def taef2_transcription(w: dict[str, torch.Tensor], layers: list, x: torch.Tensor) -> torch.Tensor:
    """Run the network in the dtype of its arguments. `layers` gives the kind of each layer of the sequence."""

    def conv(name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def pool(name: str, x: torch.Tensor) -> torch.Tensor:
        x = conv(f"{name}.0", x)
        groups = x.reshape(len(x), 4, -1)
        groups = (groups - groups.mean(2, keepdim=True)) / (groups.var(2, correction=0, keepdim=True) + 1e-5).sqrt()
        x = groups.reshape(x.shape) * w[f"{name}.1.weight"][:, None, None] + w[f"{name}.1.bias"][:, None, None]
        return conv(f"{name}.3", x.relu())

    for i, layer in enumerate(layers):
        if layer == "block":
            x = x + pool(f"{i}.pool", x) if f"{i}.pool.0.weight" in w else x
            y = conv(f"{i}.conv.2", conv(f"{i}.conv.0", x).relu()).relu()
            x = (x + conv(f"{i}.conv.4", y)).relu()
        else:
            x = {
                "conv": lambda x, i=i: conv(str(i), x),
                "down": lambda x, i=i: conv(str(i), x, 2),
                "up": lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3),
                "relu": torch.relu,
                "clamp": lambda x: 3 * torch.tanh(x / 3),
            }[layer](x)
    return x


ENCODER = ["conv", "block", *["down", "block", "block", "block"] * 3, "conv"]
DECODER = ["clamp", "conv", "relu", *["block", "block", "block", "up", "conv"] * 3, "block", "conv"]


def taef2_folders() -> list:
    return ["random", pytest.param("real", marks=pytest.mark.skipif(not REAL, reason="FASTDIT_TAEF2 is not set"))]


@pytest.mark.parametrize("weights", taef2_folders())
def test_taef2(folders, weights):
    folder = folders["taef2"] if weights == "random" else Path(REAL)
    ours, x = open_autoencoder(str(folder)), pictures(2, 24, 16)
    w = [
        {key: value.double() for key, value in torch.load(file, weights_only=True).items()}
        for file in sorted(folder.glob("*.pth"), reverse=True)
    ]
    for state, pooled, unbiased in zip(w, ((11, 12, 13), (3, 4, 5)), ((2, 6, 10), (7, 12, 17))):
        assert {key.split(".")[0] for key in state if "pool" in key} == {str(i) for i in pooled}
        assert not any(f"{i}.bias" in state for i in unbiased)
    mean, std = ours.encode(x)
    expected = taef2_transcription(w[0], ENCODER, (x.double() + 1) / 2)
    assert (ours.channels, ours.factor, mean.shape) == (32, 8, (2, 32, 3, 2))
    torch.testing.assert_close(mean.double(), expected, rtol=1e-4, atol=1e-5)
    assert (std == 0).all()
    z = 4 * mean / mean.std()  # far into the soft clamp
    expected = taef2_transcription(w[1], DECODER, z.double())
    torch.testing.assert_close(ours.decode(z).double(), 2 * expected - 1, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not REAL, reason="FASTDIT_TAEF2 is not set")
def test_real_taef2_weights_give_pictures_back():
    from sklearn.datasets import load_sample_image

    photograph = torch.tensor(load_sample_image("flower.jpg")[100:356, 200:456]).permute(2, 0, 1)[None] / 127.5 - 1
    autoencoder = open_autoencoder(REAL)
    with torch.no_grad():
        back = autoencoder.decode(autoencoder.encode(photograph)[0]).clamp(-1, 1)
    assert -10 * torch.log10(((photograph - back) / 2).square().mean()) > 28


@pytest.mark.parametrize("kind", [*KINDS, "taef2"])
def test_it_is_frozen_and_gradients_reach_its_arguments(folders, kind):
    state = torch.get_rng_state()
    autoencoder = open_autoencoder(str(folders[kind])).train()
    assert torch.equal(torch.get_rng_state(), state), "no random number is drawn"
    assert not any(module.training for module in autoencoder.modules())
    x = pictures(2, 16, 16).requires_grad_()
    z = autoencoder.encode(x)[0]
    autoencoder.decode(z).square().sum().backward()
    assert (x.grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in autoencoder.parameters())


@pytest.mark.parametrize("kind", [*KINDS, "taef2"])
def test_other_shapes_are_refused(folders, kind):
    autoencoder = open_autoencoder(str(folders[kind]))
    for shape in ((2, 1, 16, 16), (3, 16, 16), (2, 3, 15, 16), (2, 3, 16, 17)):
        with pytest.raises(ValueError, match="x must be"):
            autoencoder.encode(torch.zeros(shape))
    for shape in ((2, 3, 4, 4), (autoencoder.channels, 4, 4)):
        with pytest.raises(ValueError, match="z must be"):
            autoencoder.decode(torch.zeros(shape))


# -- files --


def test_names_and_hashes(folders, copies):
    folder = folders["taef2"]
    files = [folder / "taef2_encoder.pth", folder / "taef2_decoder.pth"]
    expected = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    for name in (folder, *files):
        autoencoder = open_autoencoder(str(name))
        assert (autoencoder.name, autoencoder.hash) == (str(name), expected)
    copy = copies("AutoencoderKL")
    same = open_autoencoder(str(folders["AutoencoderKL"])).hash
    assert open_autoencoder(str(copy)).hash == same
    rewrite(copy / "diffusion_pytorch_model.safetensors", lambda state: state["quant_conv.bias"].add_(1e-3))
    assert open_autoencoder(str(copy)).hash != same


def test_it_keeps_its_weights_when_the_file_changes(copies):
    """Tensors of safetensors are the mapped file itself."""
    folder, x = copies("AutoencoderKL"), pictures(2, 8, 8)
    autoencoder = open_autoencoder(str(folder))
    before = autoencoder.encode(x)[0]
    with (folder / "diffusion_pytorch_model.safetensors").open("r+b") as file:
        file.seek(-20_000, 2)
        file.write(bytes(20_000))
    assert torch.equal(autoencoder.encode(x)[0], before)


def test_names_that_mean_nothing(tmp_path, copies):
    for side in ("", "0", "-2", "x", "2.5", "²"):
        assert f"space_to_depth:{side}:" in refusal(f"space_to_depth:{side}")
    assert "/nowhere: no such autoencoder; give identity" in refusal("/nowhere")
    assert "stabilityai/sd-vae-ft-ema: no such autoencoder" in refusal("stabilityai/sd-vae-ft-ema"), "no hub"
    assert f"{tmp_path}: holds no autoencoder" in refusal(tmp_path)
    folder = copies("taef2")
    for part in ("encoder", "decoder"):
        shutil.copy(folder / f"taef2_{part}.pth", folder / f"other_{part}.pth")
    assert "several autoencoders (other, taef2)" in refusal(folder)
    assert open_autoencoder(str(folder / "other_encoder.pth")).channels == 32


def test_spoiled_taef2_files(copies):
    folder = copies("taef2")
    decoder = folder / "taef2_decoder.pth"
    whole = decoder.read_bytes()
    decoder.unlink()
    assert f"{decoder}: no such file" in refusal(folder)
    decoder.write_bytes(whole[:5000])
    assert f"{decoder}: taef2_decoder.pth cannot be read" in refusal(folder)
    decoder.write_bytes(whole)
    rewrite(decoder, lambda state: state.pop("5.pool.1.bias"))
    assert f"{decoder}: 5.pool.1.bias is missing; give taef2's files" in refusal(folder)
    shutil.copy(folder / "taef2_encoder.pth", decoder)
    assert f"{decoder}: " in refusal(folder)


def test_spoiled_diffusers_folders(copies, monkeypatch):
    folder = copies("AutoencoderKL")
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    good, whole = json.loads(config.read_text()), weights.read_bytes()

    def message(changes: dict) -> str:
        config.write_text(json.dumps(good | changes))
        return refusal(folder)

    assert f"{config}: describes UNet2DModel; " in message({"_class_name": "UNet2DModel"})
    assert f"{config}: its pictures have 4 channels" in message({"in_channels": 4})
    assert f"{config}: diffusers cannot build it" in message({"down_block_types": ["NoBlock"] * 3})
    text = message({"latent_channels": 6})
    assert f"{weights}: " in text
    assert "config.json describes another AutoencoderKL" in text
    config.write_text("[1, 2")
    assert f"{config}: cannot be read" in refusal(folder)
    config.write_text(json.dumps(good))
    weights.write_bytes(whole[:-100])
    assert f"{weights}: {weights.name} cannot be read" in refusal(folder)
    weights.unlink()
    assert f"{folder}: it has neither {weights.name} nor diffusion_pytorch_model.bin" in refusal(folder)
    weights.write_bytes(whole)
    real_import = builtins.__import__

    def without_diffusers(name, *args, **kwargs):
        if name == "diffusers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    assert "pip install 'fastdit[autoencoder]'" in refusal(folder)


# -- training latents to pictures --


def latents(n: int, channels: int = 4, seed: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, 4, 3, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def autoencoder(folders):
    return open_autoencoder(str(folders["AutoencoderKL"]))


def test_the_standardisation_is_undone(autoencoder):
    z = latents(3)
    decoder = LatentDecoder(autoencoder, scale=0.25, shift=-0.5)
    torch.testing.assert_close(decoder((z + 0.5) * 0.25), autoencoder.decode(z), rtol=1e-5, atol=1e-5)


def test_a_picture_depends_on_its_latent_alone(autoencoder):
    decoder, x = LatentDecoder(autoencoder), latents(2 * AT_ONCE)
    assert torch.equal(decoder(x), torch.cat([autoencoder.decode(part) for part in x.split(AT_ONCE)]))
    assert torch.equal(decoder(x.flip(0)), decoder(x).flip(0))
    assert decoder(x[:0]).shape == (0, 3, 16, 12)


def test_the_decoders_gradient(autoencoder):
    x, upstream = latents(2 * AT_ONCE + 1).requires_grad_(), torch.linspace(-1, 1, 12)
    decoder = LatentDecoder(autoencoder, scale=0.3, shift=0.2)
    (gradient,) = torch.autograd.grad((decoder(x) * upstream).sum(), x)
    (expected,) = torch.autograd.grad((autoencoder.decode(x / 0.3 + 0.2) * upstream).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_memory_does_not_grow_with_the_batch(autoencoder):
    """For the backward pass autograd saves latents and pictures, and none of the activations between."""
    decoder = LatentDecoder(autoencoder)

    def saved_bytes(decode, n: int) -> int:
        sizes = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            sizes[value.data_ptr()] = value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            decode(latents(n).requires_grad_())
        return sum(sizes.values())

    weight_bytes = sum(p.nbytes for p in autoencoder.parameters())
    assert saved_bytes(decoder, 3 * AT_ONCE) < 3 * AT_ONCE * 4 * (3 * 16 * 12 + 2 * 4 * 4 * 3)
    assert saved_bytes(autoencoder.decode, 3 * AT_ONCE) - weight_bytes > 20 * saved_bytes(decoder, 3 * AT_ONCE)


def test_the_approximate_gradient(autoencoder):
    """Pictures stay the same. The gradient is that of blocks of color W z, with W a least-squares fit."""
    decoder = LatentDecoder(autoencoder, scale=0.3, shift=0.2)
    x, upstream = latents(AT_ONCE + 1).requires_grad_(), pictures(AT_ONCE + 1, 16, 12)
    expected = decoder(x.detach())
    decoder.approximate_gradient()
    assert decoder.colors.shape == (3, 4)
    shown = decoder(x)
    assert torch.equal(shown, expected)
    (gradient,) = torch.autograd.grad((shown * upstream).sum(), x)
    cells = upstream.unflatten(2, (4, 4)).unflatten(4, (3, 4)).sum((3, 5))
    expected = torch.einsum("ck,bcij->bkij", decoder.colors, cells) / 0.3
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


def test_the_approximate_gradient_is_exact_for_pixels():
    """Their decoder is linear in a cell: W is the identity, or the mean over a cell."""
    decoder = LatentDecoder(open_autoencoder("identity"))
    decoder.approximate_gradient()
    torch.testing.assert_close(decoder.colors, torch.eye(3), rtol=0, atol=1e-6)
    decoder = LatentDecoder(open_autoencoder("space_to_depth:2"))
    decoder.approximate_gradient()
    torch.testing.assert_close(decoder.colors, torch.eye(3).repeat_interleave(4, 1) / 4, rtol=0, atol=1e-6)
