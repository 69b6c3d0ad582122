"""Attention on every backend usable here, against a softmax written out in fp64."""

import sys
from types import SimpleNamespace

import pytest
import torch
from kernel_checks import assert_as_good_as, assert_exact

from fastdit.kernels import attention, attention_backends, describe_attention
from fastdit.kernels.attention import BACKENDS, PRODUCTS_TOKENS, _flash_attn, _problem, _run

MODULE = sys.modules["fastdit.kernels.attention"]
CPU_BACKENDS = attention_backends("cpu")


def reference(q, k, v):
    """(B, N, H, d) in fp64, from the formula."""
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return torch.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdim=True), v)


def tolerance(dim: int, tokens: int) -> float:
    """Return the error to allow an fp32 output, relative to the largest one. Gradients get twice as much.

    A sum of n terms is off by at most n * eps of its partial sums, in whatever order a CPU adds them. An output passes
    one sum over channels and one over tokens, a gradient two of each.
    """
    return (dim + tokens) * torch.finfo(torch.float32).eps


def make_qkv(batch, tokens, heads, dim, *, fused, dtype=torch.float32, device="cpu", seed=0):
    """A leaf and its three (B, N, H, d) views: strided, of a fused projection, or each contiguous."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, tokens, 3, heads, dim) if fused else (3, batch, tokens, heads, dim)
    leaf = torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
    return leaf, leaf.unbind(2 if fused else 0)


def test_cpu_has_the_promised_backends():
    assert {"sdpa", "products", "math"} <= set(CPU_BACKENDS) <= set(BACKENDS)
    assert not {"flash_attn", "cudnn", "efficient"} & set(CPU_BACKENDS)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dim", [24, 64, 72])
@pytest.mark.parametrize("backend", ["auto", *CPU_BACKENDS])
def test_values_and_gradients(backend, dim, fused):
    leaf, qkv = make_qkv(3, 17, 2, dim, fused=fused)
    out = attention(*qkv, backend=backend)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad(out, leaf, upstream)

    leaf64 = leaf.detach().double().requires_grad_()
    out64 = reference(*leaf64.unbind(2 if fused else 0))
    (grad64,) = torch.autograd.grad(out64, leaf64, upstream.double())
    assert out.shape == (3, 17, 2, dim)
    assert out.dtype == torch.float32
    assert_exact(out, out64, tolerance(dim, 17))
    assert_exact(grad, grad64, 2 * tolerance(dim, 17))


def test_expanded_and_transposed_upstream_gradients():
    leaf, qkv = make_qkv(2, 9, 3, 24, fused=True)
    leaf64 = leaf.detach().double().requires_grad_()
    out, out64 = attention(*qkv), reference(*leaf64.unbind(2))
    (grad,) = torch.autograd.grad((out.transpose(1, 2) ** 2).sum() + out.sum(), leaf)
    (grad64,) = torch.autograd.grad((out64**2).sum() + out64.sum(), leaf64)
    torch.testing.assert_close(grad.double(), grad64, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bf16_error_is_that_of_bf16(backend):
    _, qkv = make_qkv(2, 33, 2, 72, fused=True, dtype=torch.bfloat16)
    out = attention(*qkv, backend=backend)
    assert out.dtype == torch.bfloat16
    exact = reference(*qkv)
    rounding = (exact.bfloat16().double() - exact).abs().max()
    assert (out.double() - exact).abs().max() <= 2 * rounding


def bf16_results(leaf, **options):
    """Return attention of a fused qkv, and the gradient of qkv for a fixed upstream gradient."""
    out = attention(*leaf.unbind(2), **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return out, torch.autograd.grad(out, leaf, upstream)[0]


@pytest.mark.parametrize("shape", [(5, 16, 2, 32), (2, 33, 2, 72), (1, PRODUCTS_TOKENS, 2, 64)])
def test_products_are_as_good_as_sdpa_in_bf16(shape):
    """The forward pass is sdpa's. Gradients have at most twice the error of sdpa's, plus a rounding, as on a GPU."""
    leaf, _ = make_qkv(*shape, fused=True, dtype=torch.bfloat16)
    leaf64 = leaf.detach().double().requires_grad_()
    out, got = bf16_results(leaf, backend="products")
    expected, low = bf16_results(leaf, backend="sdpa")
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().double()
    (exact,) = torch.autograd.grad(reference(*leaf64.unbind(2)), leaf64, upstream)
    assert torch.equal(out, expected)
    assert_as_good_as(got, low, exact, atol=2**-8 * exact.abs().max())
    assert (got.double() - exact).norm() <= 2 * (low.double() - exact).norm()


def test_auto_takes_products_for_short_bf16_sequences_on_a_cpu(monkeypatch):
    monkeypatch.setattr(MODULE, "PRODUCTS_TOKENS", 16)
    for dtype, tokens, name in ((torch.bfloat16, 16, "products"), (torch.bfloat16, 17, "sdpa"), (None, 16, "sdpa")):
        leaf, _ = make_qkv(2, tokens, 2, 32, fused=True, dtype=dtype or torch.float32)
        found, expected = bf16_results(leaf), bf16_results(leaf, backend=name)
        other = bf16_results(leaf, backend="sdpa" if name == "products" else "products")
        assert all(torch.equal(a, b) for a, b in zip(found, expected))
        assert not torch.equal(found[1], other[1])


def test_products_differentiate_twice():
    _, qkv = make_qkv(2, 3, 2, 4, fused=True, dtype=torch.float64)
    qkv = [x.detach().requires_grad_() for x in qkv]
    torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, backend="products"), qkv)
    torch.autograd.gradgradcheck(lambda q, k, v: attention(q, k, v, backend="products"), qkv)


def test_auto_compiles_with_its_backward_pass_at_any_length(monkeypatch):
    """torch.compile makes the length dynamic when it first changes."""
    monkeypatch.setattr(MODULE, "PRODUCTS_TOKENS", 16)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for tokens in (9, 12, 16, 25, 33):
        leaf, qkv = make_qkv(2, tokens, 2, 32, fused=True, dtype=torch.bfloat16)
        out, grad = bf16_results(leaf)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
        found = compiled(*qkv)
        assert torch.equal(found, out)
        assert torch.equal(torch.autograd.grad(found, leaf, upstream)[0], grad)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_compiles_without_a_graph_break(backend):
    _, qkv = make_qkv(2, 9, 2, 24, fused=True)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, backend=backend), fullgraph=True)
    assert_exact(compiled(*qkv), attention(*qkv, backend=backend).double(), 2 * tolerance(24, 9))


def test_backend_is_decided_in_inference_mode_too():
    _problem.cache_clear()
    _, qkv = make_qkv(2, 9, 2, 24, fused=True)
    with torch.inference_mode():
        out = attention(*qkv, backend="math")
        assert torch.equal(attention(*qkv, backend="products"), attention(*qkv, backend="sdpa"))
    assert_exact(out, reference(*qkv), tolerance(24, 9))


def test_shapes_are_checked():
    x = torch.zeros(2, 5, 3, 8)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 5, 3, 8\), \(2, 4, 3, 8\)"):
        attention(x, x[:, :4], x)
    with pytest.raises(ValueError, match="B, N, H, d"):
        attention(x[0], x[0], x[0])


@pytest.mark.parametrize("backend", ["flash_attn", "cudnn", "efficient"])
def test_an_unusable_choice_says_why(backend):
    x = torch.zeros(2, 5, 3, 8)
    with pytest.raises(ValueError, match=f"'{backend}' cannot be used: it needs a CUDA device"):
        attention(x, x, x, backend=backend)
    with pytest.raises(ValueError, match=f"'{backend}' cannot be used"):
        describe_attention(backend, "cpu", torch.float32, 8)


def test_what_a_kernel_refuses_becomes_a_reason(monkeypatch):
    def refuse(*args):
        raise RuntimeError("No available kernel. Aborting execution.\nmore")

    monkeypatch.setattr(MODULE, "_run", refuse)
    _problem.cache_clear()
    try:
        x = torch.zeros(2, 5, 3, 8)
        with pytest.raises(ValueError, match=r"'flash' cannot be used: No available kernel. Aborting execution.$"):
            attention(x, x, x, backend="flash")
    finally:
        _problem.cache_clear()


def test_an_unknown_choice_lists_the_known():
    x = torch.zeros(2, 5, 3, 8)
    with pytest.raises(ValueError, match="'xformers' is unknown; choose auto, flash_attn"):
        attention(x, x, x, backend="xformers")


def test_described_in_one_line():
    assert describe_attention("auto", "cpu", torch.float32, 64) == "attention: torch sdpa (cpu)"
    assert describe_attention("math", torch.device("cpu"), torch.float32, 72) == "attention: torch math (cpu)"
    described = describe_attention("products", "cpu", torch.bfloat16, 64)
    assert described == "attention: torch sdpa, backward by products (cpu)"
    described = describe_attention("auto", "cpu", torch.bfloat16, 64)
    assert described == f"attention: torch sdpa, backward by products up to {PRODUCTS_TOKENS} tokens (cpu)"


@pytest.mark.parametrize(
    ("module", "label", "with_lse"),
    [
        ("flash_attn_interface", "flash-attn 3", False),
        ("flash_attn_interface", "flash-attn 3", True),
        ("flash_attn.cute", "flash-attn 4", True),
        ("flash_attn", "flash-attn 2", False),
    ],
)
def test_each_flash_attn_package_is_called_as_it_expects(monkeypatch, module, label, with_lse):
    """A stand-in with the package's name and signature; some versions also return the log-sum-exp."""

    def flash_attn_func(q, k, v):
        out = reference(q, k, v).to(q.dtype)
        return (out, torch.zeros(())) if with_lse else out

    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, None)  # None: importing it raises ImportError
    monkeypatch.setitem(sys.modules, module.split(".")[0], SimpleNamespace())
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(flash_attn_func=flash_attn_func))
    _flash_attn.cache_clear()
    try:
        assert _flash_attn() == (label, flash_attn_func)
        _, qkv = make_qkv(2, 5, 3, 24, fused=True)
        torch.testing.assert_close(_run("flash_attn", *qkv).double(), reference(*qkv), rtol=0, atol=1e-6)
    finally:
        _flash_attn.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dim", [64, 72])
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_on_a_gpu(backend, dim):
    if backend not in ("auto", *attention_backends("cuda", torch.bfloat16, dim)):
        pytest.skip(f"{backend} is not usable here")
    leaf, qkv = make_qkv(3, 65, 4, dim, fused=True, dtype=torch.bfloat16, device="cuda")
    leaf64 = leaf.detach().double().requires_grad_()
    plain = leaf.detach().clone().requires_grad_()
    outs = [
        (attention(*qkv, backend=backend), leaf),
        (attention(*plain.unbind(2), backend="math"), plain),
        (reference(*leaf64.unbind(2)), leaf64),
    ]
    results = [(out, torch.autograd.grad(out.float().square().sum(), source)[0]) for out, source in outs]
    for got, low, exact in zip(*results):  # 2 x torch's own error in that precision, plus a rounding
        allowed = 2 * (low.double() - exact).abs().max() + 2**-8 * exact.abs().max()
        assert (got.double() - exact).abs().max() <= allowed
