"""Test the residual stream's precision, `model.stream`: its errors beside torch.autocast's, its dtype, and runs."""

import math
import shlex
import shutil

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, IMPLEMENTATIONS, assert_as_good_as, assert_exact, normal
from launching import TINY, checkpoint, forked, metrics
from sd_dit_reference import randomise
from test_grad_checkpoint import SIZES, aligned, dit, encoder_decoder, scaled_dit, split_dit
from test_resume import assert_same_run

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.kernels import modulated_linear
from fastdit.methods.denoising import Shape
from fastdit.models import DiT, EncoderDecoder, Student, Teacher
from fastdit.models.dit import Block
from fastdit.models.embeddings import PositionTable, sincos_positions
from fastdit.parser import parse

NETWORKS = [dit, scaled_dit, split_dit, encoder_decoder, aligned]


def inputs(dtype=torch.float32, size=6, channels=3, batch=3):
    x = normal(batch, channels, size, size, seed=100).bfloat16().to(dtype)
    return x, torch.tensor([0.0, 996.0, 416.0], device=DEVICE)[:batch], torch.tensor([0, 5, 3], device=DEVICE)[:batch]


# The error


def plain(network, x, t, y):
    """Compute a DiT as its published code does, which under torch.autocast keeps the stream in fp32."""
    w = dict(network.named_parameters())
    width, depth, heads, patch = network.width, network.depth, network.heads, network.patch

    def linear(name, value):
        return F.linear(value, w[f"{name}.weight"], w[f"{name}.bias"])

    def modulated(value, shift, scale):
        return F.layer_norm(value, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patches = F.conv2d(x, w["patch_embed.weight"], w["patch_embed.bias"], stride=patch)
    stream = patches.flatten(2).transpose(1, 2) + sincos_positions(network.grid, width).to(x)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) / 128 * torch.arange(128.0, device=x.device))
    features = torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype)
    c = linear("time_embed.fc2", F.silu(linear("time_embed.fc1", features))) + w["label_embed.weight"][y]
    vectors = linear("adaln", F.silu(c)).chunk(6 * depth + 2, 1)
    for i in range(depth):
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors[6 * i : 6 * i + 6]
        qkv = linear(f"blocks.{i}.qkv", modulated(stream, shift1, scale1)).unflatten(2, (3, heads, -1))
        mixed = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4)).transpose(1, 2).flatten(2)
        stream = stream + gate1[:, None] * linear(f"blocks.{i}.proj", mixed)
        hidden = F.gelu(linear(f"blocks.{i}.fc1", modulated(stream, shift2, scale2)), approximate="tanh")
        stream = stream + gate2[:, None] * linear(f"blocks.{i}.fc2", hidden)
    out = linear("head", modulated(stream, *vectors[-2:]))
    return out.unflatten(2, (patch, patch, -1)).unflatten(1, network.grid).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


def measured(network, call, *batch):
    """Return output and gradients in fp64, in one list."""
    network.zero_grad()
    out = call(*batch)
    (out.double() * normal(*out.shape, seed=9).double()).sum().backward()
    return [out.detach().double(), *(p.grad.double() for p in network.parameters())]


def test_errors_of_a_deep_network_are_at_most_autocasts(monkeypatch):
    """Against fp64, with weights that bf16 holds: the output's error, and the median over the weights' gradients."""
    monkeypatch.setenv("FASTDIT_KERNELS", "auto" if DEVICE == "cuda" else "cpp")
    x, t, y = inputs(size=8, channels=4)

    def made(**options):
        sizes = {"input_size": 8, "patch": 2, "channels": 4, "width": 64, "depth": 28, "heads": 2, "classes": 5}
        network = DiT(**sizes, **options).to(DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(1)
        with torch.no_grad():
            for name, weight in network.named_parameters():
                if name.startswith(("adaln", "head", "label")):
                    weight.normal_(std=0.1, generator=generator)
                weight.copy_(weight.bfloat16())
        return network

    network = made().double()
    exact = measured(network, network, x.double(), t, y)
    network = made()
    with torch.autocast(DEVICE, torch.bfloat16):
        results = {"autocast": measured(network, lambda *batch: plain(network, *batch), x, t, y)}
    for stream in ("fp32", "bf16"):
        network = made(fp32_stream=stream == "fp32").bfloat16()
        results[stream] = measured(network, network, x, t, y)

    def errors(found):
        all_errors = [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]
        return all_errors[0], torch.tensor(all_errors[1:]).median().item()

    (output, gradients), *others = (errors(results[name]) for name in ("autocast", "fp32", "bf16"))
    assert others[0][0] < 1.1 * output
    assert others[0][1] < 1.1 * gradients
    assert others[1][0] > 1.4 * others[0][0]
    assert others[1][1] > 1.4 * others[0][1]


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "cpp"])
@pytest.mark.parametrize("options", [{}, {"keep_x": True}, {"norm": "rms"}])
def test_a_modulated_layer_on_an_fp32_stream(implementation, options):
    """The new stream and its gradient have fp32's error; all else is as good as torch's operations."""
    if implementation == "cpp" and DEVICE == "cuda":
        pytest.skip("C++ takes CPU tensors")
    shapes = (3, 7, 72), (3, 7, 72), (3, 72), (3, 72), (3, 72), (24, 72), (24,), (72,)
    dtypes = torch.float32, *[torch.bfloat16] * 7
    leaves = [normal(*s, seed=i, dtype=d).requires_grad_() for i, (s, d) in enumerate(zip(shapes, dtypes))]

    def ours(*leaves):
        y_bias = leaves[-1]
        return modulated_linear(*leaves[:-1], y_bias=y_bias, implementation=implementation, **options)

    def torchs(x, y, gate, scale, shift, weight, bias, y_bias):
        r = x + gate[:, None].to(x.dtype) * (y + y_bias - y_bias.detach())
        norm = F.rms_norm if "norm" in options else F.layer_norm
        h = norm(r, r.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
        return r, F.linear(h.to(weight.dtype), weight, bias)

    coming = normal(3, 7, 72, seed=20), normal(3, 7, 24, seed=21, dtype=torch.bfloat16)
    results = []
    for call, tensors in ((ours, leaves), (torchs, leaves), (torchs, [leaf.detach().double() for leaf in leaves])):
        tensors = [tensor.detach().requires_grad_() for tensor in tensors]
        out = call(*tensors)
        grads = torch.autograd.grad(out, tensors, [g.to(o.dtype) for g, o in zip(coming, out)])
        results.append([*out, *grads])
    assert [o.dtype for o in results[0]] == [torch.float32, torch.bfloat16, *dtypes]
    assert_exact(results[0][0], results[2][0])
    truncated = 2**-7 if implementation == "triton" and DEVICE == "cpu" else 0.0  # by Triton's interpreter
    for got, low, exact in zip(*results):
        assert_as_good_as(got, low, exact, atol=1e-6 + truncated * exact.abs().max().item())


# The dtype


@pytest.mark.parametrize("fp32_stream", [False, True])
@pytest.mark.parametrize("make", NETWORKS)
@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_only_the_stream_is_fp32(monkeypatch, make, fp32_stream, kernels):
    """In every block; gradient checkpointing changes no bit."""
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    streams, branches, results = set(), set(), []

    def watch(block, args, out):
        streams.update(tensor.dtype for tensor in (args[0], out[0]))
        branches.update(tensor.dtype for tensor in (*args[1:9], out[1]) if tensor is not None)

    for grad_checkpoint in (False, True):
        network, call = make(fp32_stream=fp32_stream, grad_checkpoint=grad_checkpoint)
        randomise(network, seed=1)
        network.to(DEVICE).bfloat16()
        for module in network.modules():
            if isinstance(module, Block):
                module.register_forward_hook(watch)
        out = call(network, *inputs())
        sum(o.float().square().sum() for o in out).backward()
        results.append([*out, *(p.grad for p in network.parameters())])
        assert out[0].dtype == torch.bfloat16
    assert streams == {torch.float32 if fp32_stream else torch.bfloat16}
    assert branches == {torch.bfloat16}
    assert all(grad.dtype == torch.bfloat16 and grad.isfinite().all() for grad in results[0][len(out) :])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("make", NETWORKS)
def test_a_network_in_fp32_is_the_same_with_both(make):
    results = []
    for fp32_stream in (False, True):
        network, call = make(fp32_stream=fp32_stream)
        randomise(network, seed=1)
        out = call(network.to(DEVICE), *inputs())
        sum(o.square().sum() for o in out).backward()
        results.append([*out, *(p.grad for p in network.parameters())])
        assert all(o.dtype == torch.float32 for o in out)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("fp32_stream", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_teacher_has_the_students_stream(fp32_stream, frozen):
    """Also where it skips its blocks, because they are the identity."""
    network, _ = encoder_decoder(fp32_stream=fp32_stream)
    teacher = Teacher(Student(network, head_width=16, bottleneck=8, prototypes=12), frozen).to(DEVICE, torch.bfloat16)
    assert teacher.skips_blocks == frozen
    stream = teacher._encode(*inputs())
    assert stream.x.dtype == (torch.float32 if fp32_stream else torch.bfloat16)
    assert {stream.branch.dtype, stream.gate.dtype, stream.normalize().dtype} == {torch.bfloat16}
    assert teacher(*inputs(), None).dtype == torch.bfloat16


def test_positions_survive_a_cast_to_bf16():
    network = DiT(**SIZES)
    table = network.pos_embed.clone()
    assert torch.equal(network.bfloat16().pos_embed, table)
    assert torch.equal(DiT(**SIZES, fp32_stream=False).bfloat16().pos_embed, table.bfloat16())
    assert not any("positions" in name for name in network.state_dict())


# The setting


@pytest.mark.parametrize("flags", ["", "--method sd_dit", "--method sd_dit --sd_dit.decoder extra"])
def test_the_setting_reaches_every_stream(flags):
    sizes = "--model.width 32 --model.heads 2 --model.depth 2"
    for choice in ("fp32", "bf16"):
        config = parse(shlex.split(f"{sizes} --model.stream {choice} {flags}"))
        network = run_parts.build_network(config, Shape(1, 8, 8, 3))
        tables = [module for module in network.modules() if isinstance(module, PositionTable)]
        assert {table.fp32_stream for table in tables} == {choice == "fp32"}
        assert len(tables) == (2 if isinstance(network, EncoderDecoder) else 1)


@pytest.mark.parametrize("value", ["fp16", "float32", "", "true"])
def test_another_value_is_refused(value):
    with pytest.raises(UserError, match="stream") as caught:
        parse(["--model.stream", value])
    assert "\n" not in str(caught.value)
    assert "fp32" in str(caught.value)


# Runs

RUN = [*TINY, "--ema.decay", 0.5, "--precision", "bf16"]
METHODS = {
    "dit": "--grad_clip 0.5",
    "sd_dit, split": "--method sd_dit",
    "sd_dit, extra": "--method sd_dit --sd_dit.decoder extra --sd_dit.cls token",
    "sadm": "--method sadm --sadm.psi_width 16 --sadm.psi_features 16 --sadm.psi_warm_steps 1 --sadm.start 0",
    "psi_align": "--method psi_align --psi_align.psi_width 16 --psi_align.psi_features 16 --psi_align.psi_warm_steps 1",
}


@pytest.mark.launch
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stream", ["fp32", "bf16"])
def test_a_run_resumes_to_the_bit(tmp_path, method, stream):
    flags = [*RUN, *shlex.split(METHODS[method]), "--model.stream", stream]
    forked(*flags, "--steps", 4, "--save_every", 2, "--out", tmp_path / "straight").succeeded()
    shutil.copytree(tmp_path / "straight", tmp_path / "run")
    shutil.rmtree(checkpoint(tmp_path / "run", 4))  # as a crash after step 2 leaves it
    outcome = forked("--resume", "--out", tmp_path / "run").succeeded()  # the run's own config.yaml
    assert "steps 2 to 4" in outcome.text
    assert_same_run(tmp_path / "run", tmp_path / "straight", 4)


@pytest.mark.launch
def test_a_run_goes_on_with_the_other_stream_and_is_sampled(tmp_path):
    flags = [*RUN, "--out", tmp_path / "run"]
    forked(*flags, "--model.stream", "bf16", "--steps", 2).succeeded()
    forked(*flags, "--model.stream", "fp32", "--steps", 4, "--resume").succeeded()
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    out = tmp_path / "grid.png"
    forked("--run", tmp_path / "run", "--n", 2, "--out", out, "--device", "cpu", program="fastdit.sample").succeeded()
    assert out.exists()
