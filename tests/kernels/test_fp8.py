"""Products in fp8: quantization, linear layers against fp64, and what does not change with the implementation."""

from functools import partial

import pytest
import torch
from kernel_checks import DEVICE, IMPLEMENTATIONS, normal
from torch.library import opcheck

from fastdit.kernels import fp8 as fp8_kernels
from fastdit.kernels import fp8_linear, gate_residual_modulate, gelu_linear, modulated_linear
from fastdit.kernels.adaln import adaln, adaln_backward, adaln_fp8
from fastdit.kernels.fp8 import (
    fp8_input_gradient,
    quantize,
    quantize_rows,
    quantize_transposed,
    scaled_mm,
    scaled_product,
    transpose_quantize,
)
from fastdit.kernels.linear import gelu, gelu_backward, gelu_fp8
from fastdit.models import use_fp8
from fastdit.models.dit import Block

NOT_FINITE = {"inf": float("inf"), "-inf": -float("inf"), "nan": float("nan")}


def allowed(x, scale):
    """The largest errors that quantization may make, by value.

    e4m3 has 3 fraction bits. Rounding to the nearest errs by 2^-4 of a value, or by half of 2^-9, the smallest number.
    """
    return torch.maximum(x.double().abs() * 2**-4, scale.double() * 2**-10)


def dequantized(q, scale):
    return q.double() * scale.double()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several chunks and tiles, the last of each ragged."""
    monkeypatch.setattr(fp8_kernels, "_CHUNK", 32)
    monkeypatch.setattr(fp8_kernels, "_TRANSPOSED", {"ROWS": 16, "COLS": 16})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (5, 48), (19, 144), (70, 33)])
@pytest.mark.parametrize("transposed", [False, True])
def test_quantization(implementation, dtype, shape, transposed):
    """Rows of very different size. The scale is the least power of two that fits 448 to the largest magnitude."""
    x = normal(*shape, seed=0, dtype=dtype)
    x = (x * torch.logspace(-8, 8, len(x), device=DEVICE)[:, None]).to(dtype)
    x = x.t() if transposed else x
    q, scale = (quantize_transposed if transposed else quantize_rows)(x, implementation=implementation)
    rows = x.t() if transposed else x
    assert (q.dtype, scale.dtype, q.shape, scale.shape) == (
        torch.float8_e4m3fn, torch.float32, rows.shape, (len(rows), 1),
    )  # fmt: skip
    assert q.is_contiguous()
    assert ((dequantized(q, scale) - rows.double()).abs() <= allowed(rows, scale)).all()
    needed = rows.double().abs().amax(1, keepdim=True) / 448
    assert (needed <= scale).all()
    assert (scale < 2 * needed).all()
    assert (scale.log2() == scale.log2().round()).all()


def test_implementations_have_the_same_bits():
    x = normal(19, 144, seed=0, dtype=torch.bfloat16)
    for function in (quantize_rows, quantize_transposed):
        (q, scale), (other, other_scale) = (function(x, implementation=name) for name in IMPLEMENTATIONS)
        assert torch.equal(scale, other_scale)
        assert torch.equal(q.view(torch.uint8), other.view(torch.uint8))


def test_every_number_rounds_to_the_nearest():
    """All of e4m3's numbers, the points half way between, where it rounds to an even last bit, and their neighbors."""
    numbers = torch.arange(127, dtype=torch.uint8, device=DEVICE).view(torch.float8_e4m3fn).double()
    middles = (numbers[1:] + numbers[:-1]) / 2
    points = torch.cat([numbers, middles, middles * (1 - 2**-20), middles * (1 + 2**-20)])
    row = torch.cat([points, -points]).float()[None]  # its largest number is 448, so that its scale is 1
    exact = torch.cat([numbers, numbers[1:], numbers[:-1], numbers[1:]])
    down = torch.arange(126, device=DEVICE) % 2 == 0
    exact[127 : 127 + 126] = torch.where(down, numbers[:-1], numbers[1:])
    for implementation in IMPLEMENTATIONS:
        q, scale = quantize_rows(row, implementation=implementation)
        assert scale.item() == 1
        assert torch.equal(q[0].double(), torch.cat([exact, -exact]))


def test_a_weight_has_the_same_mantissas_in_both_passes():
    """Scales are powers of two, so that only numbers below e4m3's normal range depend on them."""
    weight = normal(32, 48, seed=0)
    rows, columns = dequantized(*quantize_rows(weight)), dequantized(*quantize_transposed(weight)).t()
    large = weight.abs() > 2**-6 * weight.abs().max()
    assert torch.equal(rows[large], columns[large])
    assert large.float().mean() > 0.9


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_rows_bits_do_not_depend_on_the_batch(implementation):
    x = normal(23, 144, seed=0, dtype=torch.bfloat16)
    q, scale = quantize_rows(x, implementation=implementation)
    for part in (slice(0, 1), slice(7, 20)):
        again, scale_again = quantize_rows(x[part], implementation=implementation)
        assert torch.equal(q[part].view(torch.uint8), again.view(torch.uint8))
        assert torch.equal(scale[part], scale_again)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("transposed", [False, True])
def test_zeros_and_extreme_rows(implementation, transposed):
    x = torch.zeros(6, 16, device=DEVICE)
    x[1] = 1e-38
    x[2, 3] = 448.0
    x[3, 3] = 448.0 * (1 + 2**-20)
    x[4] = 3e38
    x[5] = 2.0**-100
    call = partial(quantize_transposed, x.t().contiguous()) if transposed else partial(quantize_rows, x)
    q, scale = call(implementation=implementation)
    assert scale.flatten().tolist() == [1, 1, 1, 2, 2.0**120, 2.0**-108]
    assert not q[:2].float().any()
    assert (q[2, 3].item(), q[3, 3].item(), q[5, 0].item()) == (448, 224, 256)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_that_is_not_finite_is_marked_and_no_other(implementation, kind, transposed):
    x = normal(5, 16, seed=0).clone()
    x[2, 7] = NOT_FINITE[kind]
    call = partial(quantize_transposed, x.t().contiguous()) if transposed else partial(quantize_rows, x)
    _, scale = call(implementation=implementation)
    assert scale.isfinite().flatten().tolist() == [True, True, False, True, True]


def test_scaled_mm_is_the_product():
    """PyTorch's call, in the argument order of `scaled_product`, against the same fp8 numbers in fp64."""
    a, b = quantize_rows(normal(19, 64, seed=0)), quantize_rows(normal(48, 64, seed=1))
    bias = normal(48, seed=2, dtype=torch.bfloat16)
    try:
        got = scaled_mm(*a, *b, bias, True)
    except RuntimeError as error:
        if DEVICE == "cpu" and "per-tensor" in str(error):
            pytest.skip("this torch has row-wise fp8 products on GPUs only")
        raise
    exact = dequantized(*a) @ dequantized(*b).t()
    # Fast accumulation aligns the addends of a sum to the largest and keeps about 13 of their fraction bits.
    accumulation = 2**-9 * (dequantized(*a).abs() @ dequantized(*b).abs().t())
    for out in (got, scaled_product(*a, *b, bias, True)):
        assert out.dtype == torch.bfloat16
        assert ((out.double() - exact - bias.double()).abs() <= 2**-8 * out.double().abs() + accumulation).all()
    without = scaled_mm(*a, *b, None, False)
    assert ((without.double() - exact).abs() <= 2**-8 * exact.abs() + accumulation).all()


def bound(a, b):
    """How far a @ b^T may be off: sums of |a| |db| + |da| |b| + |da| |db|, and of the result's rounding to bf16.

    da and db are the largest errors of quantization. The result's rounding and the errors of fp32 or fast accumulation
    are together below 2^-8 of the magnitudes' product.
    """
    (_, a_scale), (_, b_scale) = quantize_rows(a), quantize_rows(b)
    a, b, da, db = a.double(), b.double(), allowed(a, a_scale), allowed(b, b_scale)
    total = (a.abs() + da) @ (b.abs() + db).t()
    return total - a.abs() @ b.abs().t() + total * 2**-8, a @ b.t()


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [(1,), (19,), (3, 7), (32,)])
def test_linear_layer_against_fp64(monkeypatch, kernels, rows):
    """Forward and all gradients, with any number of rows. Normal inputs err by less than the worst case, too."""
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    x, dout = normal(*rows, 96, seed=0, dtype=torch.bfloat16), normal(*rows, 64, seed=1, dtype=torch.bfloat16)
    weight, bias = normal(64, 96, seed=2, dtype=torch.bfloat16) / 8, normal(64, seed=3, dtype=torch.bfloat16)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
    out = fp8_linear(*leaves)
    dx, dweight, dbias = torch.autograd.grad(out, leaves, dout)
    assert {t.dtype for t in (out, dx, dweight, dbias)} == {torch.bfloat16}
    assert (out.shape, dx.shape) == (dout.shape, x.shape)

    flat, upstream = x.flatten(0, -2), dout.flatten(0, -2)
    for got, a, b, shift in (
        (out, flat, weight, bias.double()),
        (dx, upstream, weight.t().contiguous(), torch.zeros((), device=DEVICE)),
    ):
        most, exact = bound(a, b)
        error = (got.flatten(0, -2).double() - exact - shift).abs()
        assert (error <= most + 2**-8 * shift.abs()).all()
        # Rounding errors are even within 2^-4 of a value: their deviation is 2^-4 / sqrt(3), and two operands err.
        assert error.square().mean().sqrt() <= 1.1 * 2**-4 * (2 / 3) ** 0.5 * exact.square().mean().sqrt()

    # The gradients of weight and bias are PyTorch's.
    assert torch.equal(dweight, upstream.t() @ flat)
    assert torch.equal(dbias, upstream.sum(0))


def inputs(batch=3, tokens=7, width=48, out=64):
    x, y = normal(2, batch, tokens, width, seed=0, dtype=torch.bfloat16)
    vectors = normal(batch, 3, width, seed=1, dtype=torch.bfloat16).unbind(1)
    weight, bias = normal(out, width, seed=2, dtype=torch.bfloat16) / 7, normal(out, seed=3, dtype=torch.bfloat16)
    return [t.detach().clone().requires_grad_() for t in (x, y, *vectors, weight, bias)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("keep_x", [False, True])
def test_fused_layers_equal_their_parts(monkeypatch, implementation, keep_x):
    """To the bit, but for the recomputed input of a weight's gradient.

    On a GPU, two kernels may compute a row's statistics in another order, and a value next to the middle of two fp8
    numbers may then round to the other.
    """
    monkeypatch.setenv("FASTDIT_KERNELS", implementation)
    leaves = inputs()
    weight2 = (normal(32, 64, seed=5, dtype=torch.bfloat16) / 8).requires_grad_()
    upstream = [normal(3, 7, n, seed=n, dtype=torch.bfloat16) for n in (48, 32)]
    results = []
    for fused in (True, False):
        *stream, weight, bias = leaves
        if fused:
            r, u = modulated_linear(*leaves, keep_x=keep_x, fp8=True)
            out = gelu_linear(u, weight2, fp8=True)
        else:
            r, h = gate_residual_modulate(*stream)
            u = fp8_linear(h, weight, bias)
            out = fp8_linear(_Gelu.apply(u, implementation), weight2)
        results.append([r, u, out, *torch.autograd.grad([r, out], [*leaves, weight2], upstream)])
    weight_gradients = (3 + 5, 3 + 7)
    for place, (got, want) in enumerate(zip(*results)):
        assert torch.equal(got, want) or place in weight_gradients or DEVICE == "cuda"
        assert (got - want).abs().max() <= (2**-4 if DEVICE == "cuda" else 2**-6) * want.abs().max()


class _Gelu(torch.autograd.Function):
    """Apply a GELU by the implementation."""

    @staticmethod
    def forward(ctx, u, implementation):
        ctx.save_for_backward(u)
        ctx.implementation = implementation
        return gelu(u) if implementation == "triton" else torch.nn.functional.gelu(u, approximate="tanh")

    @staticmethod
    def backward(ctx, dg):
        (u,) = ctx.saved_tensors
        if ctx.implementation == "triton":
            return gelu_backward(dg, u, None)[0], None
        return torch.ops.aten.gelu_backward(dg, u, approximate="tanh"), None


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("where", ["x", "weight", "dout"])
def test_what_is_not_finite_reaches_the_results(monkeypatch, kernels, kind, where):
    """The optimizer skips a step whose gradients are not finite."""
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    tensors = {"x": normal(5, 32, seed=0), "weight": normal(16, 32, seed=1), "dout": normal(5, 16, seed=2)}
    tensors = {name: t.bfloat16() for name, t in tensors.items()}
    tensors[where][3, 2] = NOT_FINITE[kind]
    x, weight = tensors["x"].requires_grad_(), tensors["weight"].requires_grad_()
    out = fp8_linear(x, weight)
    dx, dweight = torch.autograd.grad(out, (x, weight), tensors["dout"])
    if where == "x":
        assert not out[3].isfinite().any()
        assert out[[0, 1, 2, 4]].isfinite().all()
    elif where == "weight":
        assert not out[:, 3].isfinite().any()
        assert not dx[:, 2].isfinite().any()
    else:
        assert not dx[3].isfinite().any()
    assert where == "weight" or not dweight.isfinite().all()


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_the_same_bits_twice(monkeypatch, kernels):
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    results = []
    for _ in range(2):
        leaves = inputs(tokens=19)
        r, u = modulated_linear(*leaves, fp8=True)
        out = fp8_linear(gelu_linear(u, normal(48, 64, seed=8, dtype=torch.bfloat16), fp8=True), leaves[5])
        results.append([r, u, out, *torch.autograd.grad(out.float().square().sum() + r.float().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_frozen_parameters(frozen):
    tensors = {"x": normal(5, 32, seed=0), "weight": normal(16, 32, seed=1), "bias": normal(16, seed=2)}
    results = []
    for freeze in (False, True):
        leaves = [t.bfloat16().requires_grad_(not (freeze and name == frozen)) for name, t in tensors.items()]
        fp8_linear(*leaves).float().square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for name, free, held in zip(tensors, *results):
        assert held is None if name == frozen else torch.equal(free, held)


def test_operators():
    x = normal(5, 48, seed=0, dtype=torch.bfloat16)
    # Schema and fake results; nothing differentiates these operators.
    for tensor in (x, x.t()):
        opcheck(quantize.op, (tensor,), test_utils=("test_schema", "test_faketensor"))
        opcheck(transpose_quantize.op, (tensor,), test_utils=("test_schema", "test_faketensor"))


def test_a_blocks_layers_do_without_the_dispatcher(monkeypatch):
    def refuse(*args):
        raise AssertionError("the dispatcher was asked")

    for op in (quantize, transpose_quantize, adaln_fp8, gelu_fp8, gelu_backward, adaln_backward):
        monkeypatch.setattr(op, "op", refuse)
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    leaves = inputs()
    _, u = modulated_linear(*leaves, fp8=True)
    fp8_linear(gelu_linear(u, leaves[5].detach().t().contiguous(), fp8=True), leaves[5]).sum().backward()
    assert leaves[0].grad.isfinite().all()


def test_fused_operators():
    x, y, *vectors = (t.detach() for t in inputs()[:5])
    ids = torch.tensor([[3, 0, 6], [1, 5, 2], [6, 4, 0]], device=DEVICE)
    only = ("test_schema", "test_faketensor")
    opcheck(adaln_fp8.op, (x, y, *vectors, ids, 1e-6, True, True), test_utils=only)
    opcheck(adaln_fp8.op, (x, None, None, *vectors[1:], None, 1e-6, False, False), test_utils=only)
    opcheck(gelu_fp8.op, (x.transpose(1, 2),), test_utils=only)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("rows", [False, True])
def test_fused_quantization_equals_that_of_the_stored_input(norm, rows):
    """Both round to bf16 first, so that they have the same bits if rows have the same statistics."""
    x, y, *vectors = (t.detach() for t in inputs(tokens=13)[:5])
    ids = torch.tensor([[3, 0, 6], [1, 5, 2], [6, 4, 12]], device=DEVICE) if rows else None
    r, q, scale, stats = adaln_fp8(x, y, *vectors, ids, 1e-6, norm == "rms", True)
    expected_r, h, expected_stats = adaln(x, y, *vectors, ids, 1e-6, norm == "rms", True, "triton")
    assert torch.equal(r, expected_r)
    torch.testing.assert_close(stats, expected_stats, rtol=1e-5, atol=1e-6)
    u = normal(3, 7, 72, seed=5, dtype=torch.bfloat16)
    for (got, got_scale), stored in (((q, scale), h), (gelu_fp8(u), gelu(u))):
        expected, expected_scale = quantize_rows(stored.flatten(0, 1), implementation="triton")
        assert got.shape == stored.shape
        got, got_scale = got.flatten(0, 1), got_scale.flatten(0, 1)
        # A GPU's statistics may differ in the last bit, and h then by a rounding to bf16.
        slack = 2**-8 * stored.flatten(0, 1).double().abs()
        error = (dequantized(got, got_scale) - stored.flatten(0, 1).double()).abs()
        assert (error <= allowed(stored.flatten(0, 1), got_scale) + slack).all()
        if DEVICE == "cpu":
            assert torch.equal(got.view(torch.uint8), expected.view(torch.uint8))
            assert torch.equal(got_scale, expected_scale)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_compiled(monkeypatch, kernels):
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    torch.compiler.reset()

    def step(*leaves):
        r, u = modulated_linear(*leaves, fp8=True)
        return r, fp8_linear(u, leaves[5].t())

    results = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = inputs()
        outputs = call(*leaves)
        results.append([*outputs, *torch.autograd.grad(sum(o.float().square().sum() for o in outputs), leaves)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=2**-6 * eager.abs().max().item())


def test_contracts():
    x, y, gate, scale, shift, weight, bias = inputs()
    with pytest.raises(ValueError, match=r"weight must be bf16 for fp8 products, got torch.float32"):
        fp8_linear(x, weight.float(), bias.float())
    with pytest.raises(ValueError, match=r"weight must have multiples of 16 for fp8 products, got \(60, 48\)"):
        modulated_linear(x, y, gate, scale, shift, weight[:60], bias[:60], fp8=True)
    with pytest.raises(ValueError, match=r"weight must have multiples of 16 .*, got \(64, 40\)"):
        gelu_linear(x[..., :40], weight[:, :40], bias, fp8=True)
    with pytest.raises(ValueError, match=r"x must be a floating matrix, got torch.bfloat16 \(3, 7, 48\)"):
        quantize_rows(x)
    with pytest.raises(ValueError, match="implementation='cpp' cannot"):
        quantize_transposed(weight, implementation="cpp")
    assert fp8_input_gradient(normal(2, 3, 64, seed=0, dtype=torch.bfloat16), weight.detach()).shape == (2, 3, 48)


def test_a_block_passes_its_biases_on(monkeypatch):
    """The biases that other kernels sum up get the gradients that the layers themselves compute."""
    monkeypatch.setenv("FASTDIT_KERNELS", "triton")
    block = Block(32, 2, 64, "sdpa").to(DEVICE, torch.bfloat16)
    with torch.no_grad():
        for i, weight in enumerate(block.parameters()):
            weight.copy_(normal(*weight.shape, seed=i) / 8)
    use_fp8(block)
    x, y = (normal(2, 9, 32, seed=seed, dtype=torch.bfloat16) for seed in (0, 1))
    vectors = normal(2, 7, 32, seed=2, dtype=torch.bfloat16).unbind(1)
    found = []
    for keeps in (False, True):
        block.keeps_biases = keeps
        out = block(x, y, *vectors)
        found.append(torch.autograd.grad(out, list(block.parameters()), [torch.ones_like(each) for each in out]))
    for got, want in zip(*found, strict=True):
        assert (got - want).abs().max() <= 2**-7 * want.abs().max()
