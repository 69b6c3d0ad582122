"""Test `model.qk_norm` and `model.rope`: values against a transcription, masking, checkpoints, training and errors."""

import json
import math
import shlex
import shutil

import pytest
import torch
from kernel_checks import DEVICE
from launching import TINY, averages, checkpoint, forked, metrics
from safetensors.torch import save_file
from sd_dit_reference import encode, fp64, generate, randomise
from test_encoder_decoder import close
from test_pretrained import assert_refused, make_official

from fastdit.errors import UserError
from fastdit.kernels import split_tokens
from fastdit.models import (
    AlignedDiT,
    DiT,
    Encoder,
    EncoderDecoder,
    SplitDiT,
    Student,
    Teacher,
    flops_per_image,
    freeze_for_diffit,
    load_checkpoint,
    save_official,
)
from fastdit.models.dit import copy_blocks, run_blocks
from fastdit.parser import parse
from fastdit.rundir.checkpoint_files import MANIFEST, manifest, seal

SIZES = {"input_size": (6, 10), "patch": 2, "channels": 3, "width": 72, "depth": 3, "heads": 3, "classes": 7}
SMALL = SIZES | {"input_size": (4, 6), "depth": 2}  # for the interpreter
OPTIONS = [{"qk_norm": True}, {"rope": True}, {"qk_norm": True, "rope": True}]
BOTH = OPTIONS[-1]


def dit(**options):
    return DiT(**SIZES, out_channels=6, **options)


def split_dit(sizes=SIZES, **options):
    return SplitDiT(split=sizes["depth"] - 1, **sizes, out_channels=6, **options)


def encoder_decoder(class_token=True, sizes=SIZES, **options):
    encoder = Encoder(**sizes, class_token=class_token, **options)
    return EncoderDecoder(encoder, out_channels=6, width=24, depth=sizes["depth"] - 1, heads=2)


def made(make, **options):
    network = make(**options)
    randomise(network, seed=1)
    return network.to(DEVICE)


def batch(sizes=SIZES):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, 3, *sizes["input_size"], generator=generator)
    return x, torch.tensor([0.0, -1.5, 17.5]), torch.tensor([0, 7, 3])


def ids_of(sizes=SIZES):
    patches = math.prod(sizes["input_size"]) // 4
    return split_tokens(3, patches, patches * 3 // 5, generator=torch.Generator().manual_seed(3), device="cpu")


# Values


@pytest.mark.parametrize(
    ("kernels", "options", "hides"),
    [*(("reference", options, hides) for options in OPTIONS for hides in (False, True)), ("triton", BOTH, True)],
)
@pytest.mark.parametrize("make", [split_dit, encoder_decoder])
def test_values_and_every_gradient(monkeypatch, make, hides, kernels, options):
    """With nothing hidden, a split DiT is the plain one. Each sample hides other patches."""
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    sizes = SMALL if kernels == "triton" else SIZES
    network, (x, t, y), ids = made(make, sizes=sizes, **options), batch(sizes), ids_of(sizes) if hides else None
    weights = {name: w.detach().cpu().double().requires_grad_() for name, w in network.named_parameters()}
    expected, _ = generate(weights, network, x.double(), t, y, ids)
    on_device = ids and tuple(part.to(DEVICE) for part in ids)
    out, _ = network.generate(x.to(DEVICE), t.to(DEVICE), y.to(DEVICE), on_device)
    close(out.cpu(), expected, 1e-5, "output")
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
    (out.cpu() * up).sum().backward()
    (expected * up).sum().backward()
    for name, p in network.named_parameters():
        close(p.grad.cpu(), weights[name].grad, 1e-4, name)
    norms = [name for name in weights if name.endswith("_norm")]
    blocks = sizes["depth"] + (sizes["depth"] - 1 if make is encoder_decoder else 0)
    assert len(norms) == (2 * blocks if options.get("qk_norm") else 0)
    assert all(weights[name].grad.any() for name in norms)


def test_each_option_changes_the_output():
    """The same weights give another output with each."""
    x, t, y = batch()
    outs = [made(dit)(x.to(DEVICE), t.to(DEVICE), y.to(DEVICE))]
    for options in OPTIONS:
        network = made(dit, **options)
        network.load_state_dict(made(dit).state_dict(), strict=False)
        outs.append(network(x.to(DEVICE), t.to(DEVICE), y.to(DEVICE)))
    for i, out in enumerate(outs):
        assert all((out - other).abs().max() > 1e-3 for other in outs[:i])


@pytest.mark.parametrize("class_token", [False, True])
def test_masked_equals_gathered_to_the_bit(class_token):
    """Masking gives the bits of blocks that run on the gathered tokens with gathered rows of the rotation table."""
    network = made(encoder_decoder, class_token=class_token, **BOTH).encoder.cpu()
    (x, t, y), visible = batch(), ids_of()[0]
    masked = network(x, t, y, visible)
    _, vectors = network.condition(t, y)
    tokens = network.patch_embed(x, network.pos_embed, visible)
    if class_token:
        tokens = torch.cat([network.class_token(3, 1), tokens], 1)
    table, none = network.rotation()
    assert none is None
    assert table.shape == (15 + class_token, 24)
    rows = torch.cat([torch.zeros(3, 1, dtype=torch.int64), visible + 1], 1) if class_token else visible
    gathered = table[rows].flatten(0, 1)
    order = torch.arange(len(gathered)).view(3, -1)
    x, branch, _ = run_blocks(network.blocks, tokens, vectors, rotation=(gathered, order))
    assert torch.equal(masked.x, x)
    assert torch.equal(masked.branch, branch)


def test_a_class_token_has_no_position():
    """It is rotated by nothing, and patches by their rows and columns behind it."""
    with_token = made(encoder_decoder, class_token=True, rope=True).encoder.rotation()[0].cpu()
    without = made(encoder_decoder, class_token=False, rope=True).encoder.rotation()[0].cpu()
    assert torch.equal(with_token[0], torch.tensor([1.0] * 12 + [0.0] * 12))
    assert torch.equal(with_token[1:], without)


def test_the_order_of_visible_patches_does_not_matter():
    network, (x, t, y) = made(encoder_decoder, **BOTH).encoder.cpu(), batch()
    visible = ids_of()[0]
    shuffled = visible.flip(1)
    tokens, again = (
        torch.addcmul(e.x, e.gate[:, None], e.branch) for e in (network(x, t, y, visible), network(x, t, y, shuffled))
    )
    torch.testing.assert_close(again[:, 1:].flip(1), tokens[:, 1:])


def test_bf16_keeps_the_angles():
    """A cast to bf16 leaves the rotation table in fp32."""
    network = made(dit, **BOTH)
    table = network.rotation()[0].clone()
    x, t, y = (tensor.to(DEVICE) for tensor in batch())
    exact = network(x, t, y)
    network.to(torch.bfloat16)
    assert torch.equal(network.rotation()[0], table)
    out = network(x, t, y)
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_gradient_checkpointing_changes_no_bit(monkeypatch):
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    results = []
    for grad_checkpoint in (False, True):
        network = made(encoder_decoder, sizes=SMALL, grad_checkpoint=grad_checkpoint, **BOTH)
        x, t, y = (tensor.to(DEVICE) for tensor in batch(SMALL))
        out, _ = network.generate(x, t, y, tuple(part.to(DEVICE) for part in ids_of(SMALL)))
        out.square().sum().backward()
        results.append([out, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_teacher_computes_the_transcription():
    network = made(encoder_decoder, **BOTH).cpu()
    student = Student(network, head_width=16, bottleneck=8, prototypes=12)
    teacher, (x, t, y) = Teacher(student), batch()
    tokens, *_ = encode(fp64(teacher.encoder), teacher.encoder, x.double(), t, y)
    encoded = teacher.encoder(x, t, y)
    close(torch.addcmul(encoded.x, encoded.gate[:, None], encoded.branch), tokens, 1e-5)
    first = copy_blocks(network.encoder, 1)
    assert torch.equal(first.blocks[0].q_norm, network.encoder.blocks[0].q_norm)
    assert len(teacher.sources(student)) == len(list(teacher.parameters()))


def test_the_aligned_dit_is_the_dit():
    network = AlignedDiT(dit(**BOTH), block=2, hidden=16, features=8)
    randomise(network, seed=1)
    (x, t, y), targets = batch(), torch.randn(3, 15, 8, generator=torch.Generator().manual_seed(5))
    assert torch.equal(network(x, t, y, targets)[0], network.network(x, t, y))


# Weights


def test_initial_weights_are_those_without_the_options():
    plain, network = (make.state_dict() for make in (dit(seed=3), dit(seed=3, **BOTH)))
    assert all(torch.equal(network.pop(name), value) for name, value in plain.items())
    assert int(network.pop("rope.theta")) == 10000
    assert len(network) == 6
    assert all(torch.equal(weight, torch.ones(24)) for weight in network.values())


def test_counts():
    """A block has two norms more of one head's channels, and no matrix product more."""
    plain, network = dit(), dit(**BOTH)
    counts = [sum(p.numel() for p in model.parameters()) for model in (plain, network)]
    assert counts[1] - counts[0] == 3 * 2 * 24
    assert flops_per_image(plain) == flops_per_image(network)


def test_diffit_trains_the_norms():
    network = dit(**BOTH)
    freeze_for_diffit(network)
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    assert {"blocks.0.q_norm", "blocks.2.k_norm"} <= trained
    assert "blocks.0.qkv.weight" not in trained


def test_checkpoints_of_other_attention_are_refused(tmp_path):
    """This holds for the original layout and for ours, in both directions. Those of the same attention load."""
    sizes = SIZES | {"input_size": 12, "out_channels": 6}
    torch.save(make_official(sizes), tmp_path / "official.pt")
    load_checkpoint(DiT(**sizes), tmp_path / "official.pt")
    for options, words in (({"qk_norm": True}, "model.qk_norm rms"), ({"rope": True}, "model.rope true")):
        network = DiT(**sizes, **options)
        randomise(network, seed=1)
        assert_refused(network, tmp_path / "official.pt", f"trained without {words}")
        save_file(network.state_dict(), tmp_path / "ours.safetensors")
        assert_refused(DiT(**sizes), tmp_path / "ours.safetensors", f"trained with {words}")
        again = DiT(**sizes, **options)
        load_checkpoint(again, tmp_path / "ours.safetensors")
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), network.parameters(), strict=True))
        encoder = Encoder(
            **{key: size for key, size in sizes.items() if key != "out_channels"}, class_token=True, **options
        )
        load_checkpoint(
            EncoderDecoder(encoder, out_channels=6, width=24, depth=1, heads=2), tmp_path / "ours.safetensors"
        )
        assert torch.equal(encoder.blocks[1].qkv.weight, network.blocks[1].qkv.weight)
        with pytest.raises(UserError, match=f"{words}: the original DiT's layout has no place for it; export safe"):
            save_official(network.state_dict(), tmp_path / "out.pt", grid=network.grid)
        assert not (tmp_path / "out.pt").exists()


# Settings


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model.rope true --model.width 24 --model.heads 4", ["model.heads: 4", "6 channels", "model.rope", "of 4"]),
        ("--model.qk_norm rms --model.width 12 --model.heads 4", ["model.heads: 4", "3 channels", "model.qk_norm"]),
        ("--model.qk_norm layer", ["model.qk_norm", "layer"]),
        (
            "--model.rope true --method sd_dit --sd_dit.decoder extra --sd_dit.decoder_width 24 "
            "--sd_dit.decoder_heads 4",
            ["sd_dit.decoder_heads: 4", "sd_dit.decoder_width 24", "model.rope"],
        ),
    ],
)
def test_sizes_that_do_not_fit(capsys, flags, words):
    try:
        parse(shlex.split(flags))
    except (UserError, SystemExit) as error:
        text = f"{error} {capsys.readouterr().err}"
    assert [word for word in words if word not in text] == []


# Runs

RUN = [*TINY, *shlex.split("--steps 4 --save_every 2 --ema.decay 0.5 --model.qk_norm rms --model.rope true")]
CASES = {
    "dit": "",
    "bf16": "--precision bf16 --ds_config zero2",
    "sd_dit, split": "--method sd_dit",
    "sd_dit, extra": "--method sd_dit --sd_dit.decoder extra --sd_dit.cls token --sd_dit.decoder_width 16 "
    "--sd_dit.decoder_heads 2 --sd_dit.decoder_depth 1",
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_to_the_bit(tmp_path, case):
    flags = [*RUN, *shlex.split(CASES[case])]
    forked(*flags, "--out", tmp_path / "straight").succeeded()
    # Resume a copy from its first checkpoint. A run of fewer steps would have other schedules.
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path / "run", 4))
    forked("--resume", "--out", tmp_path / "run").succeeded()
    assert metrics(tmp_path / "straight", untimed=True) == metrics(tmp_path / "run", untimed=True)
    ema, again = (averages(tmp_path / name, 4) for name in ("straight", "run"))
    assert all(torch.equal(ema[name], again[name]) for name in ema)
    norms = [value for name, value in ema.items() if name.endswith("_norm")]
    assert norms
    assert all((value != 1).any() for value in norms)


def test_zero_3_gathers_the_norms(tmp_path):
    """Sharded weights train as whole ones do, up to rounding."""
    path = tmp_path / "sharded.json"
    path.write_text(
        '{"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, '
        '"stage3_gather_16bit_weights_on_model_save": true}}'
    )
    forked(*RUN, "--out", tmp_path / "whole").succeeded()
    forked(*RUN, "--out", tmp_path / "sharded", "--ds_config", path, "--model.grad_checkpoint", "blocks").succeeded()
    whole, sharded = (averages(tmp_path / name, 4) for name in ("whole", "sharded"))
    for name in whole:
        torch.testing.assert_close(sharded[name], whole[name], rtol=1e-3, atol=1e-4)


def test_checkpoints_of_other_attention_are_not_resumed_nor_exported(tmp_path):
    run = tmp_path / "run"
    forked(*RUN, "--steps", 2, "--out", run).succeeded()
    for flags, words in (("--model.rope false", "model.rope"), ("--model.qk_norm none", "model.qk_norm")):
        outcome = forked("--resume", "--out", run, "--steps", 4, *shlex.split(flags))
        assert outcome.code == 2
        assert words in outcome.text
        assert "Traceback" not in outcome.text
    outcome = forked("--run", run, "--out", tmp_path / "dit.pt", program="fastdit.export")
    assert outcome.code == 2
    assert "no place for it; export safetensors" in outcome.text
    assert "Traceback" not in outcome.text
    forked("--run", run, "--out", tmp_path / "dit.safetensors", program="fastdit.export").succeeded()
    flags = ("--run", run, "--n", 2, "--steps", 2, "--out", tmp_path / "grid.png", "--device", "cpu")
    forked(*flags, program="fastdit.sample").succeeded()


def test_manifests_from_before_the_settings(tmp_path):
    """Such checkpoints have neither, and stay readable."""
    forked(*TINY, "--steps", 1, "--out", tmp_path).succeeded()
    path = checkpoint(tmp_path, 1)
    written = json.loads((path / MANIFEST).read_text())
    assert (written.pop("model.qk_norm"), written.pop("model.rope")) == ("none", False)
    seal(path, {key: value for key, value in written.items() if key not in ("sha256", "seal")})
    assert manifest(path)["model.qk_norm"] == "none"
    assert manifest(path)["model.rope"] is False
    forked("--resume", "--out", tmp_path, "--steps", 2).succeeded()
