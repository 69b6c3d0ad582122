"""Bias gradients that are computed where a layer's output is read, against sums in fp64 and against the layers' own."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_as_good_as, assert_exact, normal
from torch.library import opcheck

from fastdit.kernels import gelu_linear, modulated_linear, split_qkv
from fastdit.kernels._native import load_native
from fastdit.kernels.adaln_triton import backward_options
from fastdit.kernels.column_sums import column_sums
from fastdit.kernels.packed import pack_gradients
from fastdit.models import AlignedDiT, DiT, Encoder, EncoderDecoder, SplitDiT, layers
from fastdit.models import dit as dit_module
from fastdit.models.dit import Block, keep_biases

CPP = DEVICE == "cpu" and load_native("cpu")[0] is not None
IMPLEMENTATIONS = ["reference", "triton", *(["cpp"] if CPP else [])]
ROWS = torch.tensor([[3, 0, 6], [1, 5, 2], [6, 4, 0]], device=DEVICE)


def tolerance(rows: int) -> float:
    """Return the error to allow an fp32 sum of `rows` numbers that each passed a layer, relative to the largest sum."""
    return 1e-5 + rows * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("rows", "width"), [(1, 5), (64, 32), (131, 72)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_sums(rows, width, dtype):
    partials, sums = normal(rows, width, seed=1), normal(width, seed=2, dtype=dtype)
    column_sums(partials, sums)
    exact = partials.double().sum(0)
    assert_exact(sums, exact, tolerance(rows) if dtype == torch.float32 else 2**-7)


# The bias of the layer before a modulated linear layer


def site(batch, tokens, width, out=24, dtype=torch.float32):
    """The input of the layer before (a, with its weight and bias), and what else a modulated linear layer takes."""
    a, x = normal(batch, tokens, 20, seed=0, dtype=dtype), normal(batch, tokens, width, seed=1, dtype=dtype)
    first, bias = normal(width, 20, seed=2, dtype=dtype) / 4, normal(width, seed=3, dtype=dtype)
    vectors = normal(batch, 5, width, seed=4, dtype=dtype).unbind(1)[1:4]
    second, second_bias = normal(out, width, seed=5, dtype=dtype) / width**0.5, normal(out, seed=6, dtype=dtype)
    return [t.detach().requires_grad_() for t in (a, first, bias, x, *vectors, second, second_bias)]


def passed_on(a, first, bias, x, gate, scale, shift, *second, **options):
    y = F.linear(a, first, bias.detach())
    return modulated_linear(x, y, gate, scale, shift, *second, y_bias=bias, **options)


def plain(a, first, bias, x, gate, scale, shift, weight, second_bias, rows=None):
    r = x + gate[:, None] * F.linear(a, first, bias)
    if rows is not None:
        r = r.gather(1, rows[:, :, None].expand(-1, -1, r.shape[2]))
    h = F.layer_norm(r, r.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return r, F.linear(h, weight, second_bias)


def gradients(call, leaves, used=(0, 1)):
    out = call(*leaves)
    out = [(out if isinstance(out, tuple) else (out,))[i] for i in used]
    upstream = [normal(*o.shape, seed=7 + i).to(o.dtype) for i, o in zip(used, out)]
    return [*out, *torch.autograd.grad(out, leaves, upstream, allow_unused=True)]


def double(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


SITES = {
    "odd": ((3, 7, 72), {}),
    "two chunks": ((2, 19, 136), {}),
    "visible tokens": ((3, 7, 72), {"rows": ROWS}),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("keep_x", [False, True])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "stream", "product"])
@pytest.mark.parametrize("name", SITES)
def test_bias_before_a_modulated_layer(implementation, keep_x, used, name):
    shape, options = SITES[name]
    if implementation == "cpp" and options:
        pytest.skip("C++ leaves this to the reference")
    leaves = site(*shape)
    call = partial(passed_on, keep_x=keep_x, implementation=implementation, **options)
    found = gradients(call, leaves, used)
    exact = gradients(partial(plain, **options), double(leaves), used)
    for got, want in zip(found, exact, strict=True):
        if want is None:
            assert got is None
        else:
            assert_exact(got, want, tolerance(shape[0] * shape[1]))


def test_chunks_of_a_modulated_layer_are_several():
    assert backward_options(136, 19)["CHUNK"] < 19


# The bias of the layer before a GELU


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize(("rows", "width"), [(7, 72), (70, 520), (130, 24), (1, 1032)])
def test_bias_before_a_gelu(implementation, rows, width):
    """Rows that are no multiple of a chunk's, and widths that are no multiple of a tile's."""
    a, first, bias, _, _, _, _, second, second_bias = site(1, rows, width)

    def call(a, first, bias, second, second_bias):
        u = F.linear(a, first, bias.detach())
        return gelu_linear(u, second, second_bias, input_bias=bias, implementation=implementation)

    def formula(a, first, bias, second, second_bias):
        return F.linear(F.gelu(F.linear(a, first, bias), approximate="tanh"), second, second_bias)

    leaves = [a, first, bias, second, second_bias]
    for got, want in zip(gradients(call, leaves, (0,)), gradients(formula, double(leaves), (0,)), strict=True):
        assert_exact(got, want, tolerance(rows))


# The bias of the qkv layer


def by_token(gradient):
    return gradient.contiguous()


def by_head(gradient):
    return gradient.transpose(1, 2).contiguous().transpose(1, 2)


def scattered(gradient):
    return gradient.repeat_interleave(2, -1)[..., ::2]


def same_for_all_tokens(gradient):
    return gradient[:, :1].expand_as(gradient)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("layout", [by_token, by_head, scattered, same_for_all_tokens])
@pytest.mark.parametrize(("batch", "tokens", "heads", "dim"), [(3, 7, 3, 24), (2, 67, 2, 72), (1, 64, 1, 20)])
def test_qkv(implementation, layout, batch, tokens, heads, dim):
    qkv = normal(batch, tokens, 3 * heads * dim, seed=0).requires_grad_()
    bias = normal(3 * heads * dim, seed=1).requires_grad_()
    parts = split_qkv(qkv, heads, bias, implementation=implementation)
    for part, want in zip(parts, qkv.view(batch, tokens, 3, heads, dim).unbind(2)):
        assert torch.equal(part, want)
        assert part.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    upstream = [layout(normal(batch, tokens, heads, dim, seed=seed)) for seed in (2, 3, 4)]
    packed, sums = torch.autograd.grad(parts, (qkv, bias), upstream)
    assert torch.equal(packed, torch.stack(upstream, 2).flatten(2))
    assert_exact(sums, packed.double().sum((0, 1)), tolerance(batch * tokens))


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_qkv_whose_parts_are_not_all_used(implementation):
    qkv, bias = normal(2, 5, 36, seed=0).requires_grad_(), normal(36, seed=1).requires_grad_()
    q, _, v = split_qkv(qkv, 3, bias, implementation=implementation)
    packed, sums = torch.autograd.grad(q.sum() + v.sum(), (qkv, bias))
    want = torch.tensor([1.0, 0.0, 1.0], device=DEVICE).repeat_interleave(12)
    assert torch.equal(packed, want.expand(2, 5, 36))
    assert torch.equal(sums, 10 * want)


def test_qkv_without_a_bias():
    qkv = normal(2, 5, 36, seed=0).requires_grad_()
    (packed,) = torch.autograd.grad([part.sum() for part in split_qkv(qkv, 3)], qkv)
    assert torch.equal(packed, torch.ones_like(qkv))


# All three


@pytest.mark.parametrize("bias_dtype", [torch.bfloat16, torch.float32])
def test_low_precision_is_as_good_as_the_layers_own_sums(bias_dtype):
    """The bias gradients of bf16 layers, and as under autocast those of an fp32 bias of a bf16 layer."""
    a, first, bias, *rest = site(3, 70, 72, dtype=torch.bfloat16)
    bias = bias.detach().to(bias_dtype).requires_grad_()

    def ours(bias):
        y = F.linear(a, first, bias.detach().to(a.dtype))
        r, out = modulated_linear(*rest[:1], y, *rest[1:], y_bias=bias, implementation="triton")
        q, k, v = split_qkv(y, 3, bias, implementation="triton")
        return r, out, gelu_linear(y, *rest[4:], input_bias=bias, implementation="triton"), q * k + v

    def theirs(bias, a=a, first=first, rest=rest):
        y = F.linear(a, first, bias.to(a.dtype))
        q, k, v = y.unflatten(2, (3, 3, -1)).unbind(2)
        return *plain(a, first, bias.to(a.dtype), *rest), F.linear(F.gelu(y, approximate="tanh"), *rest[4:]), q * k + v

    a64, first64, *rest64 = double((a, first, *rest))
    exact = partial(theirs, a=a64, first=first64, rest=rest64)
    for used in range(4):
        (_, got), (_, low) = (gradients(call, [bias], (used,)) for call in (ours, theirs))
        assert_as_good_as(got, low, gradients(exact, double([bias]), (used,))[1])


def test_same_bits_twice():
    """The sums have a fixed order."""
    results = []
    for _ in range(2):
        leaves = site(3, 70, 72)
        found = gradients(partial(passed_on, implementation="triton"), leaves)
        u = normal(3, 70, 72, seed=8).requires_grad_()
        bias = normal(72, seed=9).requires_grad_()
        out = gelu_linear(u, normal(24, 72, seed=5), input_bias=bias, implementation="triton")
        found += torch.autograd.grad(out.square().sum(), (u, bias))
        qkv = normal(3, 70, 72, seed=8).requires_grad_()
        q, k, v = split_qkv(qkv, 3, bias, implementation="triton")
        found += torch.autograd.grad((q * k + v).square().sum(), (qkv, bias))
        results.append(found)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_frozen_bias_gets_no_gradient(implementation):
    leaves = site(2, 5, 72)
    held = [t.detach().requires_grad_(i != 2) for i, t in enumerate(leaves)]
    r, out = passed_on(*held, implementation=implementation)
    (r.sum() + out.square().sum()).backward()
    assert [t.grad is None for t in held] == [i == 2 for i in range(len(held))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_trained_bias_of_a_frozen_layer(implementation):
    """Only the bias takes a gradient, as in DiffFit."""
    leaves = site(2, 5, 72)
    leaves = [t.detach().requires_grad_(i == 2) for i, t in enumerate(leaves)]
    exact = [t.detach().double().requires_grad_(i == 2) for i, t in enumerate(leaves)]
    r, out = passed_on(*leaves, implementation=implementation)
    r64, out64 = plain(*exact)
    (got,) = torch.autograd.grad(r.square().sum() + out.square().sum(), leaves[2])
    assert_exact(got, torch.autograd.grad(r64.square().sum() + out64.square().sum(), exact[2])[0], tolerance(10))


def test_operators():
    dq, dk, dv = normal(3, 2, 7, 3, 24, seed=0).unbind(0)
    opcheck(pack_gradients.op, (dq, by_head(dk), dv, normal(216, seed=1).bfloat16()))
    opcheck(pack_gradients.op, (dq, dk, dv, None))


def test_contracts():
    a, first, bias, x, *vectors, weight, _ = site(2, 5, 72)
    y = F.linear(a, first)
    refused = [
        (r"y_bias must be floating \(72,\), got torch.float32 \(71,\)",
         lambda: modulated_linear(x, y, *vectors, weight, y_bias=bias[:71])),
        ("y_bias is the bias of the layer that made y",
         lambda: modulated_linear(x, None, None, *vectors[1:], weight, y_bias=bias)),
        ("input_bias is on meta", lambda: gelu_linear(y, weight, input_bias=bias.to("meta"))),
        ("input_bias must be floating", lambda: gelu_linear(y, weight, input_bias=bias.long())),
        ("qkv must be", lambda: split_qkv(y, 5)),
        ("bias must be floating", lambda: split_qkv(y, 3, bias[:3])),
        ("implementation='cpp' cannot", lambda: split_qkv(y, 3, bias, implementation="cpp")),
    ]  # fmt: skip
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


# Whole networks


SIZES = {"input_size": 6, "patch": 2, "channels": 3, "width": 72, "depth": 3, "heads": 3, "classes": 5}
VISIBLE, HIDDEN = torch.tensor([0, 2, 3, 5, 7, 8]), torch.tensor([1, 4, 6])


def dit(**options):
    return DiT(**SIZES | options), lambda network, *inputs: [network(*inputs)]


def split_dit(**options):
    def call(network, x, t, y):
        out, stream = network.generate(x, t, y, tuple(ids.to(DEVICE).expand(3, -1) for ids in (VISIBLE, HIDDEN)))
        return [out, stream.normalize()]

    return SplitDiT(split=2, **SIZES | options), call


def encoder_decoder(**options):
    network = EncoderDecoder(Encoder(**SIZES | options), out_channels=3, width=36, depth=2, heads=3)
    return network, split_dit()[1]


def aligned(**options):
    def call(network, x, t, y):
        return network(x, t, y, normal(3, 9, 8, seed=3))

    return AlignedDiT(DiT(**SIZES | options), block=2, hidden=16, features=8), call


NETWORKS = [dit, split_dit, encoder_decoder, aligned]


def step(make, prepare=lambda network: None, **options):
    """Gradients of one batch by parameter, and how often each parameter got one."""
    network, call = make(**options)
    network.to(DEVICE)
    if getattr(network, "gradients", None):
        network.gradients.to(DEVICE)
    prepare(network)
    with torch.no_grad():
        for i, weight in enumerate(network.parameters()):
            fan_in = weight[0].numel() if weight.dim() > 1 else 4
            weight.copy_(normal(*weight.shape, seed=i) / fan_in**0.5)
    counts = Counter()
    for name, weight in network.named_parameters():
        if weight.requires_grad:
            weight.register_hook(lambda _, name=name: counts.update([name]))
    inputs = normal(3, 3, 6, 6, seed=100), torch.tensor([0.0, 999.0, 417.5]), torch.tensor([0, 5, 3])
    out = call(network, *(tensor.to(DEVICE) for tensor in inputs))
    sum((o * normal(*o.shape, seed=9)).sum() for o in out).backward()
    return {name: weight.grad for name, weight in network.named_parameters()}, counts


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        if want is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], want, rtol=0, atol=1e-4 * want.abs().max().item(), msg=name)


@pytest.mark.parametrize("grad_checkpoint", [False, True])
@pytest.mark.parametrize("make", NETWORKS)
def test_every_weight_gets_its_one_gradient(monkeypatch, make, grad_checkpoint):
    monkeypatch.setenv("FASTDIT_KERNELS", "reference")
    expected, counts = step(make)
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    found, found_counts = step(make, grad_checkpoint=grad_checkpoint)
    assert set(found_counts.values()) == {1}
    assert found_counts == counts
    assert_same(found, expected)


def freeze_biases(network):
    for name, weight in network.named_parameters():
        weight.requires_grad_(not name.endswith("bias"))


def train_biases_only(network):
    for name, weight in network.named_parameters():
        weight.requires_grad_(name.endswith("bias") and "blocks" in name)


@pytest.mark.parametrize("freeze", [freeze_biases, train_biases_only])
def test_some_weights_frozen(monkeypatch, freeze):
    monkeypatch.setenv("FASTDIT_KERNELS", "reference")
    expected, counts = step(dit, freeze)
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    found, found_counts = step(dit, freeze)
    assert found_counts == counts
    assert_same(found, expected)


def test_layers_compute_their_own_bias_gradients_under_zero_3(monkeypatch):
    """No bias leaves its module, and the results are the same."""
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    passed = []

    def spy(module, name, bias_of):
        original = getattr(module, name)

        def call(*args, **options):
            passed.append(bias_of(args, options) is not None)
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)

    spy(dit_module, "split_qkv", lambda args, options: args[2])
    spy(layers, "modulated_linear", lambda args, options: options["y_bias"])
    spy(layers, "gelu_linear", lambda args, options: options["input_bias"])
    found, _ = step(dit, keep_biases)
    assert (len(passed), sum(passed)) == (13, 0)  # four calls a block, and the head
    passed.clear()
    expected, _ = step(dit)
    assert (len(passed), sum(passed)) == (13, 11)  # the first branch has no layer, and the last block keeps its own
    assert_same(found, expected)


def test_on_cpus_without_triton_nothing_changes(monkeypatch):
    monkeypatch.setenv("FASTDIT_KERNELS", "reference")
    block = Block(72, 3, 288, "sdpa")
    assert not block.passes_biases(normal(1, 2, 72, seed=0))
    assert not block.passes_biases(normal(1, 2, 72, seed=0).double())
