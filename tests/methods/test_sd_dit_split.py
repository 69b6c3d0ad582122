"""Test the split decoder: a plain DiT whose first blocks see the visible patches only."""

import dataclasses

import pytest
import torch
import yaml
from safetensors.torch import save_file
from sd_dit_reference import fp64, generate, randomise
from test_config import complaint
from test_encoder_decoder import SIZES, close, split_of
from test_pretrained import make_diffusers, make_official, same

from fastdit import run_parts
from fastdit.config import CONFIG_FILE
from fastdit.errors import UserError
from fastdit.methods.self_discrimination import SDDiT
from fastdit.models import (
    DiT,
    EncoderDecoder,
    GradientRatio,
    SplitDiT,
    add_block_scales,
    load_checkpoint,
    save_official,
)
from fastdit.models.dit import copy_blocks
from fastdit.models.pretrained import from_diffusers, from_official
from fastdit.parser import dump, load, parse

SHAPE = {**SIZES, "input_size": (6, 10), "out_channels": 6}


def make(split=1, hidden="noised_patch", **changes):
    """Return a split DiT with random values in every parameter, and the plain DiT of the same weights."""
    network, plain = SplitDiT(split=split, hidden_tokens=hidden, **(SHAPE | changes)), DiT(**(SHAPE | changes))
    randomise(network, seed=1)
    plain.load_state_dict(network.state_dict())
    return network, plain


def batch_for(network):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, *network.input_size, generator=generator)
    return x, torch.tensor([0.0, -1.5, 17.5]), torch.tensor([0, 7, 3])


def tokens_of(stream):
    return torch.addcmul(stream.x, stream.gate[:, None], stream.branch)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_with_nothing_hidden_it_is_the_plain_dit_to_the_bit(measured, grad_checkpoint):
    """This holds for the output and for all gradients, also where the encoder's tokens are asked for."""
    network, plain = make(grad_checkpoint=grad_checkpoint)
    if measured:
        network.gradients = GradientRatio()
    x, t, y = batch_for(network)
    up = torch.randn(3, 6, 6, 10, generator=torch.Generator().manual_seed(3))
    expected = plain(x, t, y)
    out, stream = network.generate(x, t, y, None)
    assert torch.equal(out, expected)
    assert torch.equal(network(x, t, y), expected)
    assert tokens_of(stream).shape == (3, 15, 72)
    expected.backward(up)
    (out * up).sum().backward()
    for (name, p), q in zip(network.named_parameters(), plain.parameters(), strict=True):
        assert q.grad.any(), name
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("hidden", ["noised_patch", "zeros"])
@pytest.mark.parametrize("split", [1, 2])
def test_some_hidden_against_a_transcription(split, hidden):
    network, _ = make(split, hidden)
    ids = split_of(network, 11)
    x, t, y = batch_for(network)
    weights, inner = fp64(network), x.double().requires_grad_()
    expected, expected_tokens = generate(weights, network, inner, t, y, ids)
    out, stream = network.generate(x.requires_grad_(), t, y, ids)
    tokens = tokens_of(stream)
    close(out, expected, 1e-5, "output")
    close(tokens, expected_tokens, 1e-5, "tokens")
    ups = [torch.randn(a.shape, generator=torch.Generator().manual_seed(4)) for a in (out, tokens)]
    ((out * ups[0]).sum() + (tokens * ups[1]).sum()).backward()
    ((expected * ups[0]).sum() + (expected_tokens * ups[1]).sum()).backward()
    close(x.grad, inner.grad, 1e-4, "x")
    for name, p in network.named_parameters():
        close(p.grad, weights[name].grad, 1e-4, name)


@pytest.mark.parametrize("hidden", ["noised_patch", "zeros"])
def test_hidden_tokens_skip_the_encoder(hidden):
    """They enter the first block of the decoder as their embedding, to the bit, and the encoder does not see them."""
    network, _ = make(2, hidden)
    entered = {}
    for i, block in enumerate(network.blocks):
        block.register_forward_pre_hook(lambda m, args, i=i: entered.update({i: args[:3]}))
    ids = split_of(network, 11)
    x, t, y = batch_for(network)
    _, stream = network.generate(x, t, y, ids)
    assert [entered[i][0].shape[1] for i in range(3)] == [11, 11, 15]
    embedded = network.patch_embed(x, network.pos_embed)
    if hidden == "zeros":
        embedded = network.pos_embed.expand_as(embedded)
    merged, branch, gate = entered[2]
    assert branch is gate is None
    for row, base, visible, skipped, encoded in zip(merged, embedded, *ids, tokens_of(stream)):
        assert torch.equal(row[skipped], base[skipped])
        torch.testing.assert_close(row[visible], encoded)
    places = torch.zeros(3, 15).scatter(1, ids[1], 1.0).view(3, 1, 3, 5)
    pixels = places.repeat_interleave(2, 2).repeat_interleave(2, 3).expand_as(x).bool()
    out, other = network.generate(torch.where(pixels, x + 1, x), t, y, ids)
    assert torch.equal(tokens_of(other), tokens_of(stream))
    assert torch.equal(out, network.generate(x, t, y, ids)[0]) == (hidden == "zeros")


def test_bf16():
    network, _ = make()
    x, t, y = batch_for(network)
    expected, _ = network.generate(x, t, y, split_of(network, 11))
    for hidden in ("noised_patch", "zeros"):
        half, _ = make(hidden=hidden)
        out, stream = half.bfloat16().generate(x, t, y, split_of(network, 11))
        assert (out.dtype, stream.x.dtype) == (torch.bfloat16, torch.float32)
        if hidden == "noised_patch":
            assert (out.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("gains", [False, True])
def test_a_copy_of_the_first_blocks(gains):
    network, _ = make(2)
    if gains:
        add_block_scales(network)
        randomise(network, seed=4)
    part = copy_blocks(network, 2)
    assert part.depth == len(part.blocks) == 2
    x, t, y = batch_for(network)
    _, stream = network.generate(x, t, y, None)
    encoded = part(x, t, y)
    assert all(map(torch.equal, encoded[:3], stream))


# Checkpoints


@pytest.mark.parametrize("layout", ["official", "ours", "diffusers"])
def test_a_dits_checkpoint_fills_it(tmp_path, layout):
    case = {"input_size": 12, **SIZES, "out_channels": 6}
    path = tmp_path / {"official": "dit.pt", "ours": "dit.safetensors", "diffusers": "folder"}[layout]
    if layout == "diffusers":
        reference = make_diffusers(case)
        reference.save_pretrained(path)
        expected = from_diffusers(reference.state_dict())
    else:
        expected = from_official(make_official(case))
        torch.save(make_official(case), path) if layout == "official" else save_file(expected, path)
    network = SplitDiT(split=2, **case)
    load_checkpoint(network, path)
    assert same(network.state_dict(), expected)


def test_the_official_layout_round_trip(tmp_path):
    network, plain = make()
    save_official(network.state_dict(), tmp_path / "dit.pt", grid=network.grid)
    again = DiT(**SHAPE)
    load_checkpoint(again, tmp_path / "dit.pt")
    assert same(again.state_dict(), plain.state_dict())
    x, t, y = batch_for(network)
    assert torch.equal(again(x, t, y), network(x, t, y))


def test_initial_weights_are_those_of_the_plain_dit():
    assert same(SplitDiT(split=1, **SHAPE).state_dict(), DiT(**SHAPE).state_dict())


def test_what_does_not_fit_is_refused():
    for split in (0, 3):
        with pytest.raises(UserError, match=f"^sd_dit.split: {split} blocks of model.depth") as refused:
            SplitDiT(split=split, **SHAPE)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="noised_patch, zeros"):
        SplitDiT(split=1, hidden_tokens="mask_token", **SHAPE)


# Settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["decoder_width=64", "decoder=split"], ["sd_dit.decoder_width", "leave it out", "--sd_dit.decoder extra"]),
        (["hidden_tokens=mask_token"], ["sd_dit.hidden_tokens", "mask_token", "--sd_dit.decoder extra"]),
        (["cls=token"], ["sd_dit.cls", "token", "--sd_dit.decoder extra"]),
        (["split=12"], ["sd_dit.split", "12", "model.depth (12)", "--sd_dit.decoder extra"]),
        (["split=1.5"], ["sd_dit.split", "1.5", "whole number"]),
        (["split=0"], ["sd_dit.split", "at least 0.01"]),
        (["decoder=none"], ["sd_dit.decoder", "split", "extra"]),
        (["every=0"], ["sd_dit.every", "at least 1"]),
        (["share=0"], ["sd_dit.share", "0.001"]),
        (["until=2"], ["sd_dit.until", "from 0 to 1"]),
        (["momentum_share=0"], ["sd_dit.momentum_share", "0.001"]),
        (["teacher_noise=0"], ["sd_dit.teacher_noise", "0.0001", "got 0"]),
        (["teacher_noise=low"], ["sd_dit.teacher_noise", "quantile:SHARE", "got low"]),
        (["teacher_noise=quantile:1"], ["sd_dit.teacher_noise", "got quantile:1"]),
        (["teacher_noise=quantile:x"], ["sd_dit.teacher_noise", "got quantile:x"]),
        (["teacher_noise=relative:2"], ["sd_dit.teacher_noise", "relative:SHARE", "got relative:2"]),
        (["teacher_noise=share:0.1"], ["sd_dit.teacher_noise", "got share:0.1"]),
    ],
)
def test_each_bad_setting_is_one_line(flags, words):
    text = complaint("--method", "sd_dit", *(f"--sd_dit.{flag}" for flag in flags))
    assert [word for word in words if word not in text] == [], text


def test_a_dit_of_one_block_cannot_be_split():
    assert "sd_dit.split" in complaint("--method", "sd_dit", "--model.depth", "1")
    assert parse(["--model.depth", "1"]).method == "dit"
    assert parse(["--method", "sd_dit", "--model.depth", "1", "--sd_dit.decoder", "extra"]).sd_dit.decoder == "extra"


def test_which_decoder_is_chosen():
    """An extra decoder's size asks for it; the file of a run names it."""
    assert parse(["--method", "sd_dit"]).sd_dit.decoder == "split"
    assert parse(["--method", "sd_dit", "--sd_dit.decoder_depth", "2"]).sd_dit.decoder == "extra"
    for size in ("S", "B", "XL"):
        preset = ["--preset", "imagenet256_sd_dit", "--model.size", size]
        assert parse(preset).sd_dit.decoder == "extra"
        assert parse([*preset, "--sd_dit.decoder", "split"]).sd_dit.decoder == "split"


def test_settings_of_before_the_choice_mean_the_extra_decoder(tmp_path):
    """Such a run's config.yaml has all sizes of the decoder, and no `decoder`."""
    config = parse(["--method", "sd_dit", "--sd_dit.decoder_width", "512", "--sd_dit.decoder_depth", "8"])
    old = yaml.safe_load(dump(config))
    for recent in ("decoder", "split", "every", "share", "until", "momentum_share"):
        del old["sd_dit"][recent]
    old["sd_dit"]["teacher_noise"] = 0.002
    (tmp_path / CONFIG_FILE).write_text(yaml.safe_dump(old))
    loaded = load(tmp_path / CONFIG_FILE)
    assert loaded == dataclasses.replace(config, sd_dit=dataclasses.replace(config.sd_dit, teacher_noise=0.002))
    assert loaded.sd_dit.decoder == "extra"
    assert loaded.sd_dit.teacher_law == ("fixed", 0.002)


def test_sizes_follow_the_encoder():
    """XL has the published sizes; the others have the same proportions."""
    assert SDDiT().sizes_for(1152, 28) == (2048, 256, 8192, 512, 8, 16)
    assert SDDiT().sizes_for(384, 12) == (704, 96, 2816, 192, 3, 6)
    assert SDDiT().sizes_for(768, 12) == (1344, 160, 5376, 320, 3, 10)
    assert SDDiT(head_width=7, prototypes=5).sizes_for(384, 12)[:3] == (7, 96, 5)
    assert SDDiT(decoder_width=100).sizes_for(384, 12).decoder_heads == 2
    assert SDDiT().sizes_for(16, 2) == (64, 32, 256, 64, 1, 2)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
@pytest.mark.parametrize(("decoder", "most"), [("split", 1.15), ("extra", 1.25)])
def test_a_step_costs_little_more_than_a_plain_one(size, decoder, most):
    """It is counted at 256 tokens with the default settings; less is compared at less cost."""
    shape = run_parts.Shape(4, 32, 32, 1000)

    def cost(*flags):
        with torch.device("meta"):
            module, method = run_parts.build_training(parse(["--model.size", size, *flags]), shape)
        return sum(method.flops(module).values())

    plain = cost()
    method_flags = ["--method", "sd_dit", "--sd_dit.decoder", decoder]
    assert 1 < cost(*method_flags) / plain < most
    for fewer in (["--sd_dit.every", "4"], ["--sd_dit.share", "0.25"]):
        assert cost(*method_flags, *fewer) < cost(*method_flags) - 0.1 * plain
    if decoder == "split":
        assert cost(*method_flags, "--sd_dit.every", "4") < plain


def test_networks_of_both_decoders():
    shape = run_parts.Shape(1, 28, 28, 10)
    tiny = [
        "--method",
        "sd_dit",
        "--model.depth",
        "4",
        "--model.width",
        "32",
        "--model.heads",
        "2",
        "--data.size",
        "28",
    ]
    network = run_parts.build_network(parse(tiny), shape)
    assert isinstance(network, SplitDiT)
    assert network.split == 2
    assert run_parts.build_network(parse([*tiny, "--sd_dit.split", "3"]), shape).split == 3
    assert run_parts.build_network(parse([*tiny, "--sd_dit.split", "0.01"]), shape).split == 1
    assert isinstance(run_parts.build_network(parse([*tiny, "--sd_dit.decoder", "extra"]), shape), EncoderDecoder)
