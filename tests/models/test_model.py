"""Test the DiT against an independent fp64 transcription of its formulas, and the facts that users rely on."""

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from fastdit.errors import UserError
from fastdit.kernels import gate_residual, gate_residual_modulate, modulate
from fastdit.models import SIZES, DiT, flops_per_image
from fastdit.models.embeddings import sincos_positions

SMALL = {"patch": 2, "channels": 3, "width": 72, "depth": 3, "heads": 3, "classes": 5}


def make_model(**changes):
    """Return a small DiT with random values instead of zeros in every parameter."""
    model = DiT(**({"input_size": 6} | SMALL | changes))
    randomise(model, seed=1)
    return model


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            fan_in = weight[0].numel() if weight.dim() > 1 else 4
            weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)


def make_batch(model, batch=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, model.channels, *model.input_size, generator=generator)
    t = torch.tensor([0.0, 999.0, 417.5, -0.3])[:batch]
    y = torch.tensor([0, model.classes if model.null_class else 1, 3, 2])[:batch]
    return x, t, y


def transcription(w, x, t, y, *, patch, heads, out_channels):
    """DiT's forward pass from the paper's formulas, with loops for everything. w: our state dict in fp64."""

    def linear(name, a):
        return a @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def silu(a):
        return a / (1 + torch.exp(-a))

    def gelu(a):
        return 0.5 * a * (1 + torch.tanh((2 / np.pi) ** 0.5 * (a + 0.044715 * a**3)))

    def norm(a):
        centred = a - a.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)

    batch, _, height, width = x.shape
    dim = w["head.weight"].shape[1]
    kernel = w["patch_embed.weight"].reshape(dim, -1)
    tokens = []
    for row in range(0, height, patch):
        for col in range(0, width, patch):
            piece = x[:, :, row : row + patch, col : col + patch].reshape(batch, -1)
            quarter = torch.arange(dim // 4, dtype=torch.float64) / (dim // 4)
            angles = [c / patch * 10000.0**-quarter for c in (col, row)]
            position = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)])
            tokens.append(piece @ kernel.T + w["patch_embed.bias"] + position)
    h = torch.stack(tokens, 1)

    freqs = torch.exp(-np.log(10000) * torch.arange(128, dtype=torch.float32) / 128)  # fp32, as the model states
    phases = t.float()[:, None] * freqs
    features = torch.cat([torch.cos(phases), torch.sin(phases)], 1).double()
    c = linear("time_embed.fc2", silu(linear("time_embed.fc1", features))) + w["label_embed.weight"][y]
    m = linear("adaln", silu(c))[:, None]

    depth = m.shape[-1] // dim // 6
    for i in range(depth):
        six = m[..., 6 * dim * i : 6 * dim * (i + 1)]
        shift1, scale1, gate1, shift2, scale2, gate2 = (six[..., dim * j : dim * (j + 1)] for j in range(6))
        qkv = linear(f"blocks.{i}.qkv", norm(h) * (1 + scale1) + shift1)
        size, mixed = dim // heads, []
        for head in range(heads):
            q, k, v = (qkv[..., dim * j + size * head : dim * j + size * (head + 1)] for j in range(3))
            mixed.append(torch.softmax(q @ k.transpose(1, 2) / size**0.5, -1) @ v)
        h = h + gate1 * linear(f"blocks.{i}.proj", torch.cat(mixed, -1))
        hidden = gelu(linear(f"blocks.{i}.fc1", norm(h) * (1 + scale2) + shift2))
        h = h + gate2 * linear(f"blocks.{i}.fc2", hidden)
    last = m[..., 6 * dim * depth :]
    out_tokens = linear("head", norm(h) * (1 + last[..., dim:]) + last[..., :dim])

    out = torch.empty(batch, out_channels, height, width, dtype=torch.float64)
    for n in range(out_tokens.shape[1]):
        row, col = divmod(n, width // patch)
        piece = out_tokens[:, n].reshape(batch, patch, patch, out_channels).permute(0, 3, 1, 2)
        out[:, :, row * patch : (row + 1) * patch, col * patch : (col + 1) * patch] = piece
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"input_size": (8, 4), "out_channels": 6},
        {"input_size": (4, 12), "patch": 4, "channels": 1, "width": 48, "heads": 2, "mlp_ratio": 2.5},
        {"patch": 1, "input_size": 3, "null_class": False, "depth": 1},
        {"grad_checkpoint": True},
    ],
    ids=["square", "tall-sigma", "wide-patch4", "pixels", "checkpointed"],
)
def test_values_and_every_gradient(changes):
    model = make_model(**changes)
    x, t, y = make_batch(model)
    x.requires_grad_()
    out = model(x, t, y)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(out, [x, *model.parameters()], upstream)

    w = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    sizes = {"patch": model.patch, "heads": model.heads, "out_channels": model.out_channels}
    out64 = transcription(w, x64, t, y, **sizes)
    grads64 = torch.autograd.grad(out64, [x64, *w.values()], upstream.double())
    torch.testing.assert_close(out.double(), out64, rtol=0, atol=1e-5)
    for name, got, exact in zip(["x", *w], grads, grads64):
        scale = exact.abs().max()
        assert scale > 0, name
        torch.testing.assert_close(
            got.double(), exact, rtol=1e-4, atol=1e-5 * scale.item(), msg=lambda m, n=name: n + m
        )


def test_fp64_agrees_to_fp64():
    model = make_model().double()
    x, t, y = make_batch(model)
    out64 = transcription(model.state_dict(), x.double(), t, y, patch=2, heads=3, out_channels=3)
    torch.testing.assert_close(model(x, t, y), out64, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_attention_backends_agree(backend):
    auto, forced = make_model(), make_model(attention_backend=backend)
    batch = make_batch(auto)
    torch.testing.assert_close(forced(*batch), auto(*batch), rtol=0, atol=1e-5)


def test_null_class():
    model = make_model()
    x, t, _ = make_batch(model)
    assert model.label_embed.weight.shape[0] == SMALL["classes"] + 1
    conditional, null = model(x, t, torch.tensor([0, 1, 2])), model(x, t, torch.full((3,), 5))
    assert ((conditional - null).abs().amax((1, 2, 3)) > 1e-3).all()
    bare = make_model(null_class=False)
    assert bare.label_embed.weight.shape[0] == SMALL["classes"]
    with pytest.raises(IndexError):
        bare(x, t, torch.full((3,), 5))


def test_a_sample_does_not_depend_on_its_batch():
    """Compare with the sample alone. Each result may be 1e-5 from the fp64 one: products order sums by shape."""
    model = make_model()
    x, t, y = make_batch(model, batch=4)
    out, order = model(x, t, y), torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order], t[order], y[order]), out[order], rtol=0, atol=2e-5)
    alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, out, rtol=0, atol=2e-5)


def test_bf16_weights():
    model = make_model()
    batch = make_batch(model)
    exact = model(*batch)
    low = model.bfloat16()(*batch)
    assert low.dtype == torch.bfloat16
    assert all(p.grad is None for p in model.parameters())
    assert (low - exact).abs().mean() < 0.02 * exact.abs().mean()
    low.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in model.parameters())


def test_time_features_stay_fp32_under_bf16():
    """Neighboring timesteps, which are equal when rounded to bf16, must have different embeddings."""
    model = make_model().bfloat16()
    x, _, y = make_batch(model)
    a, b = model(x, torch.full((3,), 998.0), y), model(x, torch.full((3,), 999.0), y)
    assert torch.tensor(998.0).bfloat16() == torch.tensor(999.0).bfloat16()
    assert (a - b).abs().max() > 0.05


def test_compiled_equals_eager():
    """Compile to one graph with the real compiler (needs a C++ compiler); one block, for it is slow.

    Each result may be 1e-5 from the fp64 one: the compiler and torch's own kernels order sums differently.
    """
    model = make_model(depth=1)
    batch = make_batch(model)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*batch), model(*batch), rtol=0, atol=2e-5)


def test_traced_gradients_equal_eager_ones():
    """Trace forward and backward pass as torch.compile does, without generating code."""
    model = make_model(depth=2)
    batch, weights = make_batch(model), list(model.parameters())
    traced = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(traced(*batch).square().sum(), weights)
    expected = torch.autograd.grad(model(*batch).square().sum(), weights)
    for grad, exact in zip(got, expected):
        torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_modulation_vectors_are_views():
    """The network's one adaLN output is never copied on its way to the kernels."""
    model = make_model()
    seen = []
    model.adaln.register_forward_hook(lambda _module, _args, out: seen.append(out))
    model.blocks[1].register_forward_pre_hook(lambda _module, args: seen.extend(args[2:]))
    model(*make_batch(model))
    whole, *vectors = seen
    assert len(vectors) == 7
    assert {v.untyped_storage().data_ptr() for v in vectors} == {whole.untyped_storage().data_ptr()}
    expected = whole[:, 5 * 72 : 12 * 72].chunk(7, 1)  # 6 of each block, after the gate of the block before
    assert all(torch.equal(v, e) for v, e in zip(vectors, expected))


# Parameters in millions, GFLOP per training step and image, and table 1 of the paper (forward multiply-adds).
@pytest.mark.parametrize(
    ("size", "millions", "gflop", "paper_gmac"),
    [("S", 33, 36, 6.06), ("B", 130, 138, 23.01), ("L", 458, 484, 80.71), ("XL", 675, 712, 118.64)],
)
def test_sizes(size, millions, gflop, paper_gmac):
    with torch.device("meta"):
        model = DiT(input_size=32, patch=2, channels=4, classes=1000, out_channels=8, **SIZES[size])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    flops = flops_per_image(model)
    assert isinstance(flops, int)
    assert round(flops / 1e9) == gflop
    assert flops / 6e9 == pytest.approx(paper_gmac, rel=0.005)


def test_flops_are_those_torch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(input_size=(8, 4), out_channels=6, attention_backend="math")
    x, t, y = make_batch(model)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y)
    assert counter.get_total_flops() * 3 == flops_per_image(model) * len(x)


def test_initialisation():
    model = DiT(input_size=6, **(SMALL | {"classes": 400}))
    for name, weight in model.state_dict().items():
        if name.endswith("bias") or name.startswith(("adaln", "head")):
            assert not weight.any(), name
        elif name == "time_embed.freq_shift":
            assert weight == 0
        elif name.startswith(("time_embed", "label_embed")):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            fan_in, fan_out = weight[0].numel(), weight.shape[0]
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.06), name
    assert not model(*make_batch(model)).any()


def test_seed_decides_the_weights_and_the_global_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = (DiT(input_size=6, seed=seed, **SMALL).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["blocks.1.qkv.weight"], c["blocks.1.qkv.weight"])
    assert not torch.equal(a["blocks.0.proj.weight"], a["blocks.1.proj.weight"])


def test_positions_equal_an_independent_implementation():
    for side, width in ((7, 72), (16, 384)):
        table = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float()
        torch.testing.assert_close(sincos_positions((side, side), width), table, rtol=0, atol=1e-7)
    tall = sincos_positions((3, 2), 8)
    assert torch.equal(tall[1, 4:], tall[0, 4:])  # same row: same second half
    assert torch.equal(tall[2, :4], tall[0, :4])  # same column: same first half
    assert tall[1, 0] == torch.tensor(1.0).sin()
    assert tall[4, 4] == torch.tensor(2.0).sin()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 7}, "input_size: 7x7 is not a multiple of patch 2"),
        ({"input_size": (6, 9)}, "input_size: 6x9"),
        ({"input_size": 0}, "input_size: 0 must be at least 1"),
        ({"patch": 0}, "patch: 0"),
        ({"heads": 0}, "heads: 0"),
        ({"classes": 0}, "classes: 0"),
        ({"heads": 5}, "width: 72 must be a multiple of heads"),
        ({"width": 66}, "width: 66 must be a multiple of heads .3. and of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        DiT(**({"input_size": 6} | SMALL | changes))


def test_forward_contract():
    model = make_model()
    x, t, y = make_batch(model)
    for wrong in (x[:, :2], x[..., :4], x[0], torch.cat([x, x], 3)):
        with pytest.raises(ValueError, match=r"x must be \(B, 3, 6, 6\)"):
            model(wrong, t, y)
    with pytest.raises(ValueError, match=r"t must be \(B,\) = \(3,\)"):
        model(x, t[:2], y)
    with pytest.raises(ValueError, match="t must be"):
        model(x, t[0], y)
    with pytest.raises(ValueError, match="y must be"):
        model(x, t, y[:, None])
    with pytest.raises(ValueError, match="integer"):
        model(x, t, y.float())


# The adaLN family's contract; test against fp64 formulas.


def make_vectors(dtype, batch=3, tokens=7, width=72):
    generator = torch.Generator().manual_seed(4)
    x, y = torch.randn(2, batch, tokens, width, generator=generator).to(dtype)
    gate, scale, shift = torch.randn(batch, 3, width, generator=generator).to(dtype).unbind(1)  # strided
    return x, y, gate, scale, shift


def normed(x, scale, shift, eps=1e-6):
    x, scale, shift = x.double(), scale.double()[:, None], shift.double()[:, None]
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) / (variance + eps).sqrt() * (1 + scale) + shift


# bf16: half a unit in the last place, for only the result is rounded
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"),
    [(torch.float64, 0, 1e-12), (torch.float32, 0, 5e-6), (torch.bfloat16, 1.01 * 2**-8, 1e-6)],
)
def test_adaln_family(dtype, rtol, atol):
    x, y, gate, scale, shift = make_vectors(dtype)
    residual = x.double() + gate.double()[:, None] * y.double()
    r, h = gate_residual_modulate(x, y, gate, scale, shift)
    assert r.dtype == h.dtype == dtype
    torch.testing.assert_close(r.double(), residual, rtol=rtol, atol=atol)
    torch.testing.assert_close(h.double(), normed(r, scale, shift), rtol=rtol, atol=atol)
    torch.testing.assert_close(gate_residual(x, y, gate).double(), residual, rtol=rtol, atol=atol)
    assert torch.equal(h, modulate(r, scale, shift))
    loose = modulate(x, scale, shift, eps=0.5)
    torch.testing.assert_close(loose.double(), normed(x, scale, shift, eps=0.5), rtol=rtol, atol=atol)


def test_small_scales_survive_bf16():
    x, _, _, scale, _ = make_vectors(torch.bfloat16)
    small, zero = torch.full_like(scale, 2**-10), torch.zeros_like(scale)
    assert (1 + small == 1).all()  # formed in bf16 the scale would vanish
    assert (modulate(x, small, zero) != modulate(x, zero, zero)).float().mean() > 0.1


def test_fp32_residual_takes_bf16_updates():
    x, y, gate, scale, shift = make_vectors(torch.bfloat16)
    r, h = gate_residual_modulate(x.float(), y, gate, scale, shift)
    assert (r.dtype, h.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(r, x.float() + gate.float()[:, None] * y.float(), rtol=0, atol=1e-6)


def test_adaln_shapes_are_checked():
    x, y, gate, scale, shift = make_vectors(torch.float32)
    with pytest.raises(ValueError, match=r"x must be \(B, N, D\)"):
        modulate(x[0], scale, shift)
    with pytest.raises(ValueError, match=r"shift must be \(B, D\) = \(3, 72\), got \(1, 72\)"):
        modulate(x, scale, shift[:1])
    with pytest.raises(ValueError, match="scale must be"):
        gate_residual_modulate(x, y, gate, scale[:, :71], shift)
    with pytest.raises(ValueError, match="y must have x's shape"):
        gate_residual_modulate(x, y[:, :5], gate, scale, shift)
    with pytest.raises(ValueError, match="gate must be"):
        gate_residual(x, y, gate[0])
