"""The adaLN family against its formulas written out in fp64, and what a training run relies on."""

from functools import partial

import pytest
import torch
from kernel_checks import DEVICE, assert_as_good_as, assert_exact, normal
from torch.library import opcheck

from fastdit.kernels import gate_residual, gate_residual_modulate, modulate
from fastdit.kernels._native import load_native
from fastdit.kernels.adaln import adaln, adaln_backward, choose_adaln, gate_residual_modulate_reference
from fastdit.kernels.adaln_triton import _adaln_sum_kernel

CPP = DEVICE == "cpu" and load_native("cpu")[0] is not None
IMPLEMENTATIONS = [
    "reference",
    "triton",
    pytest.param("cpp", marks=pytest.mark.skipif(not CPP, reason="C++ for CPU tensors, where it was built")),
]
KERNELS = IMPLEMENTATIONS[1:]
NAMES = ("x", "y", "gate", "scale", "shift")


def formulas(x, y, gate, scale, shift, *, norm="layer", rows=None, eps=1e-6):
    """Token by token, in the inputs' precision."""
    batch, tokens, width = x.shape
    rows = torch.arange(tokens).expand(batch, -1) if rows is None else rows
    gate, scale, shift = (v if v is None or v.dim() == 3 else v[:, None].expand(x.shape) for v in (gate, scale, shift))
    r, h = [], []
    for b in range(batch):
        for n in rows[b].tolist():
            value = x[b, n] if y is None else x[b, n] + gate[b, n] * y[b, n]
            r.append(value)
            if norm == "layer":
                value = value - value.sum() / width
            h.append(value * (value.square().sum() / width + eps) ** -0.5 * (1 + scale[b, n]) + shift[b, n])
    return torch.stack(r).view(batch, -1, width), torch.stack(h).view(batch, -1, width)


def inputs(batch, tokens, width, *, per_token=False, dtype=torch.float32):
    """x, y, gate, scale, shift, each with other strides, as a network's views have; the vectors in one matrix."""
    x = normal(tokens, batch, width, seed=0, dtype=dtype).transpose(0, 1)
    y = normal(batch, 2 * tokens, width, seed=1, dtype=dtype)[:, ::2]
    whole = (
        normal(batch, tokens, 5, width, seed=2, dtype=dtype)
        if per_token
        else normal(batch, 5, width, seed=2, dtype=dtype)
    )
    return [t.detach().requires_grad_() for t in (x, y, *whole.unbind(-2)[1:4])]


def upstream(out):
    """Gradients as they come: one with stride 0 along the tokens, one transposed in memory."""
    batch, tokens, width = out[0].shape
    dr = normal(batch, 1, width, seed=3, dtype=out[0].dtype).expand(batch, tokens, width)
    dh = normal(batch, width, tokens, seed=4, dtype=out[0].dtype).transpose(1, 2)
    return [dr, dh]


def double(tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def some_rows(batch, tokens, dtype=torch.int64):
    """Two thirds of the tokens, in any order, others for each sample."""
    order = torch.stack([torch.randperm(tokens, generator=torch.Generator().manual_seed(b)) for b in range(batch)])
    return order[:, : 2 * tokens // 3].to(DEVICE, dtype)


# Odd sizes; several chunks of tokens in the sums; widths that fill a power of two and that do not.
CASES = {
    "72": ((3, 7, 72), {}),
    "384-chunks": ((2, 19, 384), {}),
    "760": ((2, 3, 760), {}),
    "1128": ((3, 3, 1128), {}),
    "1152": ((2, 5, 1152), {}),
    "4104": ((2, 3, 4104), {}),
    "rms": ((3, 7, 72), {"norm": "rms"}),
    "tokens": ((3, 7, 72), {"per_token": True}),
    "rows": ((3, 7, 72), {"rows": torch.int64}),
    "rows-chunks-rms": ((2, 19, 136), {"rows": torch.int32, "norm": "rms"}),
    "rows-tokens": ((3, 7, 72), {"rows": torch.int64, "per_token": True}),
}


def make_case(name, implementation):
    shape, options = CASES[name]
    options = dict(options)
    per_token = options.pop("per_token", False)
    if implementation == "cpp" and (per_token or "rows" in options):
        pytest.skip("C++ leaves this to the reference")
    if "rows" in options:
        options["rows"] = some_rows(*shape[:2], options["rows"])
    return inputs(*shape, per_token=per_token), options


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_every_gradient(case, implementation):
    tensors, options = make_case(case, implementation)
    out = gate_residual_modulate(*tensors, **options, implementation=implementation)
    grads = torch.autograd.grad(out, tensors, upstream(out))
    exact = double(tensors)
    out64 = formulas(*exact, **options)
    grads64 = torch.autograd.grad(out64, exact, [g.double() for g in upstream(out)])
    for got, want in zip([*out, *grads], [*out64, *grads64]):
        assert_exact(got, want)


def test_sums_of_more_chunks_than_are_read_at_once():
    """A long sample has 37 chunks, read in sixteens, and a width that is not a multiple of the blocks'."""
    partials = normal(2, 37, 4, 200, seed=1)
    sums = [torch.empty(2, 200, device=DEVICE) for _ in range(4)]
    _adaln_sum_kernel[(4,)](partials, *sums, 37, 2, D=200, BLOCK=128, ROWS=16, SUMS=4, num_warps=1)
    for got, want in zip(sums, partials.double().sum(1).unbind(1)):
        assert_exact(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("rows", [False, True])
def test_modulate_and_residual_alone(implementation, rows):
    x, y, gate, scale, shift = tensors = inputs(3, 7, 72)
    options = {"rows": some_rows(3, 7)} if rows and implementation != "cpp" else {}
    h = modulate(x, scale, shift, **options, implementation=implementation)
    r = gate_residual(x, y, gate, implementation=implementation)
    dr, dh = upstream([r])[0], upstream([h])[1]
    grads = [*torch.autograd.grad(h, (x, scale, shift), dh), *torch.autograd.grad(r, (x, y, gate), dr)]
    exact = x64, y64, gate64, scale64, shift64 = double(tensors)
    h64 = formulas(x64, None, None, scale64, shift64, **options)[1]
    r64 = formulas(*exact)[0]
    grads64 = [
        *torch.autograd.grad(h64, (x64, scale64, shift64), dh.double()),
        *torch.autograd.grad(r64, (x64, y64, gate64), dr.double()),
    ]
    for got, want in zip([h, r, *grads], [h64, r64, *grads64]):
        assert_exact(got, want)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("rows", [False, True])
def test_one_output_unused(implementation, used, rows):
    """Its gradient is absent, not zero; parameters that only it needs get none."""
    tensors = inputs(3, 7, 72)
    options = {"rows": some_rows(3, 7)} if rows and implementation != "cpp" else {}
    grads, exact = [], double(tensors)
    for call, leaves in ((partial(gate_residual_modulate, implementation=implementation), tensors), (formulas, exact)):
        out = call(*leaves, **options)[used]
        grads.append(torch.autograd.grad(out, leaves, upstream([out])[used].to(out.dtype), allow_unused=True))
    for got, want in zip(*grads):
        if want is None:
            assert got is None
        else:
            assert_exact(got, want)


@pytest.mark.parametrize("implementation", KERNELS)
def test_stream_without_update(implementation):
    """y and gate None: r is x itself, or its rows."""
    x, _, _, scale, shift = inputs(3, 7, 72)
    r, h = gate_residual_modulate(x, None, None, scale, shift, implementation=implementation)
    assert r is x
    assert torch.equal(h, modulate(x, scale, shift, implementation=implementation))
    if implementation == "cpp":
        return
    rows = some_rows(3, 7)
    out = gate_residual_modulate(x, None, None, scale, shift, rows=rows, implementation=implementation)
    exact = x64, scale64, shift64 = double((x, scale, shift))
    out64 = formulas(x64, None, None, scale64, shift64, rows=rows)
    grads = torch.autograd.grad(out, (x, scale, shift), upstream(out))
    grads64 = torch.autograd.grad(out64, exact, [g.double() for g in upstream(out)])
    for got, want in zip([*out, *grads], [*out64, *grads64]):
        assert_exact(got, want)


def test_rows_may_be_shared_by_all_samples():
    """Expanded: stride 0 along the batch."""
    tensors = inputs(3, 7, 72)
    rows = torch.tensor([4, 0, 5], device=DEVICE)[None].expand(3, -1)
    got = gate_residual_modulate(*tensors, rows=rows, implementation="triton")
    for one, all_tokens in zip(got, gate_residual_modulate(*tensors, implementation="triton")):
        assert torch.equal(one, all_tokens[:, [4, 0, 5]])


def test_a_wrong_row_reaches_no_other_memory():
    x, y, gate, scale, shift = inputs(3, 7, 72)
    rows = torch.tensor([[3, 7, 0], [-1, 2, 5], [6, 100000, 4]], device=DEVICE)
    kept = (rows >= 0) & (rows < 7)
    r, _ = gate_residual_modulate(x, y, gate, scale, shift, rows=rows, implementation="triton")
    (dx,) = torch.autograd.grad(r, x, torch.ones_like(r))
    whole = gate_residual(x, y, gate, implementation="triton")
    for b in range(3):
        valid = rows[b][kept[b]]
        assert torch.equal(r[b][kept[b]], whole[b][valid])
        assert torch.equal(dx[b].any(1), torch.zeros(7, dtype=bool, device=DEVICE).index_fill(0, valid, True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    """Against PyTorch's own operations in that precision."""
    tensors = inputs(3, 7, 360, dtype=dtype)

    def unfused(x, y, gate, scale, shift):
        r = x + gate[:, None] * y
        return r, torch.nn.functional.layer_norm(r, r.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    calls = (
        (partial(gate_residual_modulate, implementation="triton"), tensors),
        (unfused, tensors),
        (formulas, double(tensors)),
    )
    results = []
    for call, leaves in calls:
        out = call(*leaves)
        grads = torch.autograd.grad(out, leaves, [g.to(one.dtype) for g, one in zip(upstream(out), out)])
        results.append([*out, *grads])
    for got, low, exact in zip(*results):
        assert_as_good_as(got, low, exact)


MIXED = ["72", "384-chunks", "1152", "rms", "tokens", "rows-chunks-rms", "rows-tokens"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", MIXED)
def test_an_fp32_stream_with_bf16_branches(case, implementation):
    """r and dx have fp32's error. h, and each gradient in its tensor's dtype, are rounded once."""
    (x, *others), options = make_case(case, implementation)
    tensors = [x, *(t.detach().bfloat16().requires_grad_() for t in others)]
    out = gate_residual_modulate(*tensors, **options, implementation=implementation)
    coming = [g.to(o.dtype) for g, o in zip(upstream(out), out)]
    grads = torch.autograd.grad(out, tensors, coming)
    exact = double(tensors)
    out64 = formulas(*exact, **options)
    grads64 = torch.autograd.grad(out64, exact, [g.double() for g in coming])
    assert [o.dtype for o in out] == [torch.float32, torch.bfloat16]
    assert [g.dtype for g in grads] == [t.dtype for t in tensors]
    for got, want in ((out[0], out64[0]), (grads[0], grads64[0])):
        assert_exact(got, want)
    for got, want in zip((out[1], *grads[1:]), (out64[1], *grads64[1:])):
        assert_exact(got, want, tolerance=2**-7)  # Triton's interpreter truncates
    # Alone, both operations give the same bits.
    if "rows" not in options:
        r = gate_residual(*tensors[:3], implementation=implementation)
        options = {name: value for name, value in options.items() if name == "norm"}
        h = modulate(r, *tensors[3:], **options, implementation=implementation)
        assert torch.equal(r, out[0])
        assert torch.equal(h, out[1])


@pytest.mark.parametrize("implementation", KERNELS)
def test_a_large_common_offset(implementation):
    """The variance is of differences from the mean, not a difference of large squares."""
    x, y, gate, scale, shift = inputs(2, 5, 72)
    x = x.detach() + 300
    out = gate_residual_modulate(x, y, gate, scale, shift, implementation=implementation)
    assert_exact(out[1], formulas(*double((out[0], y, gate.detach() * 0, scale, shift)))[1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_equals_separate_calls_to_the_bit(implementation, dtype):
    if implementation == "cpp" and dtype != torch.float32:
        pytest.skip("C++ takes fp32")
    x, y, gate, scale, shift = inputs(3, 7, 72, dtype=dtype)
    r, h = gate_residual_modulate(x, y, gate, scale, shift, implementation=implementation)
    assert torch.equal(r, gate_residual(x, y, gate, implementation=implementation))
    assert torch.equal(h, modulate(r, scale, shift, implementation=implementation))


def everything(tensors, order=None, **options):
    """Outputs and gradients of samples `order`, at their own places again."""
    place = torch.arange(len(tensors[0]), device=DEVICE) if order is None else torch.tensor(order, device=DEVICE)
    leaves = [t.detach()[place].requires_grad_() for t in tensors]
    out = gate_residual_modulate(*leaves, **options)
    shape = torch.empty(len(tensors[0]), *out[0].shape[1:])
    grads = torch.autograd.grad(out, leaves, [g[place] for g in upstream([shape, shape])])
    return dict(zip(place.tolist(), zip(*out, *grads)))


@pytest.mark.parametrize("implementation", KERNELS)
def test_bits_do_not_depend_on_the_run_or_the_batch(implementation):
    """Again, in another order, in a smaller batch and alone: the same bits in outputs and all gradients."""
    tensors = inputs(3, 19, 72)
    first = everything(tensors, implementation=implementation)
    for order in (None, [2, 0, 1], [1]):
        for sample, results in everything(tensors, order, implementation=implementation).items():
            assert all(torch.equal(a, b) for a, b in zip(results, first[sample])), (order, sample)


@pytest.mark.skipif(not CPP, reason="C++ for CPU tensors, where it was built")
def test_bits_do_not_depend_on_the_threads():
    tensors, threads = inputs(3, 19, 72), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(everything(tensors, implementation="cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for sample in other for a, b in zip(other[sample], results[0][sample]))


@pytest.mark.parametrize("implementation", KERNELS)
def test_inner_strides(implementation):
    """Neither values nor upstream gradients need lie in one piece: a sum's gradient has no stride at all."""
    tensors = inputs(3, 7, 72)
    scattered = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in tensors]
    grads = []
    for leaves in (tensors, scattered):
        r, h = gate_residual_modulate(*leaves, implementation=implementation)
        grads.append(torch.autograd.grad(r.sum() + (h * h.detach()).sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_gradients_of_the_reference():
    x, y, gate, scale, shift = (t.double() for t in inputs(2, 5, 12))
    rows, per_token = some_rows(2, 5), normal(2, 5, 12, seed=5).double()
    for norm in ("layer", "rms"):
        for vector in (scale, per_token):
            leaves = [t.detach().requires_grad_() for t in (x, y, gate, vector, shift)]
            call = partial(gate_residual_modulate_reference, norm=norm, rows=rows)
            assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("implementation", KERNELS)
def test_operators(implementation):
    """PyTorch's own checks: schema, shapes without data, autograd, tracing."""
    x, y, gate, scale, shift = inputs(3, 7, 72)
    rows = some_rows(3, 7) if implementation == "triton" else None
    options = (1e-6, False, True, implementation)
    opcheck(adaln.op, (x, y, gate, scale, shift, None, *options))
    opcheck(adaln.op, (x, y, gate, None, None, None, *options))
    opcheck(adaln.op, (x, None, None, scale, shift, rows, 1e-6, True, False, implementation))
    r, h, stats = (t.detach() for t in adaln(x, y, gate, scale, shift, rows, *options))
    saved, y_bias = [t.detach() for t in (y, gate, scale, shift)], normal(72, seed=9)
    opcheck(adaln_backward.op, (r, h, r, *saved, rows, stats, y_bias, 7, False, False, True, implementation))
    opcheck(adaln_backward.op, (None, h, x.detach(), *saved, rows, stats, None, 7, False, True, False, implementation))
    without_norm = (r, None, None, *saved[:2], None, None, rows, None)
    for bias in (None, y_bias.bfloat16()):
        opcheck(adaln_backward.op, (*without_norm, bias, 7, False, False, False, implementation))
    # With an fp32 stream and bf16 branches.
    mixed = [x, *(t.detach().bfloat16().requires_grad_() for t in (y, gate, scale, shift))]
    opcheck(adaln.op, (*mixed, None, *options))
    r, h, stats = (t.detach() for t in adaln(*mixed, None, *options))
    saved = [t.detach() for t in mixed[1:]]
    opcheck(adaln_backward.op, (r, h, r, *saved, None, stats, saved[1][0], 7, False, False, True, implementation))


@pytest.mark.parametrize("implementation", KERNELS)
def test_compiled(implementation):
    """Forward and backward as torch.compile traces them, in one graph."""
    tensors = inputs(3, 7, 72)

    def call(x, y, gate, scale, shift):
        h = modulate(x, scale, shift, implementation=implementation)
        r, h = gate_residual_modulate(x, h * y, gate, scale, shift, implementation=implementation)
        return gate_residual(r, h, gate, implementation=implementation)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, want = (f(*tensors) for f in (compiled, call))
    assert torch.equal(got, want)
    grads = [torch.autograd.grad(out.square().sum(), tensors) for out in (got, want)]
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_contracts():
    x, y, gate, scale, shift = inputs(3, 7, 72)
    rows = some_rows(3, 7)
    refused = [
        ("x must be", lambda: modulate(x[0], scale, shift)),
        (r"shift must be \(B, D\) = \(3, 72\), got \(1, 72\)", lambda: modulate(x, scale, shift[:1])),
        ("y must have x's shape", lambda: gate_residual(x, y[:, :3], gate)),
        ("gate must be", lambda: gate_residual(x, y, gate[0])),
        ("gate must be", lambda: gate_residual(x, y, x[:, :3])),
        ("y and gate go together", lambda: gate_residual_modulate(x, y, None, scale, shift)),
        ("scale must be floating", lambda: modulate(x, scale.long(), shift)),
        ("shift is on meta", lambda: modulate(x, scale, shift.to("meta"))),
        ("norm='batch'", lambda: modulate(x, scale, shift, norm="batch")),
        ("rows must be", lambda: modulate(x, scale, shift, rows=rows[:2])),
        ("rows must be", lambda: modulate(x, scale, shift, rows=rows.float())),
        ("rows is on meta", lambda: modulate(x, scale, shift, rows=rows.to("meta"))),
        ("implementation='cuda' is unknown", lambda: modulate(x, scale, shift, implementation="cuda")),
    ]
    for message, call in refused:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_order_that_cannot_be_followed_is_refused_and_a_wish_is_not(monkeypatch):
    x, _, _, scale, shift = inputs(2, 3, 72)
    wide = torch.ones(2, 1, 8193, device=DEVICE)
    cases = [
        ("triton", (x.double(), scale, shift), {}),
        ("triton", (wide, wide[:, 0], wide[:, 0]), {}),
        ("cpp", (x.bfloat16(), scale, shift), {}),
        ("cpp", (x, x, x), {}),
        ("cpp", (x, scale, shift), {"rows": some_rows(2, 3)}),
    ]
    for implementation, args, options in cases:
        with pytest.raises(ValueError, match=f"implementation='{implementation}' cannot"):
            modulate(*args, **options, implementation=implementation)
        monkeypatch.setenv("FASTDIT_KERNELS", implementation)
        reference = modulate(*args, **options, implementation="reference")
        assert torch.equal(modulate(*args, **options), reference)
    monkeypatch.setenv("FASTDIT_KERNELS", "fast")
    with pytest.raises(ValueError, match="FASTDIT_KERNELS='fast' is unknown"):
        modulate(x, scale, shift)


@pytest.mark.skipif(not CPP, reason="C++ for CPU tensors, where it was built")
def test_a_residual_alone_takes_cpp_only_when_asked(monkeypatch):
    x, y, gate, scale, shift = inputs(2, 3, 72)
    alone = (x, y, gate, None, None, None)
    monkeypatch.delenv("FASTDIT_KERNELS", raising=False)
    assert choose_adaln(*alone, None) == "reference"
    assert choose_adaln(*alone, "cpp") == "cpp"
    assert choose_adaln(x, y, gate, scale, shift, None, None) == "cpp"
    assert torch.equal(gate_residual(x, y, gate), gate_residual(x, y, gate, implementation="reference"))
    monkeypatch.setenv("FASTDIT_KERNELS", "cpp")
    assert choose_adaln(*alone, None) == "cpp"
    assert torch.equal(gate_residual(x, y, gate), gate_residual(x, y, gate, implementation="cpp"))


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_nothing_to_do(monkeypatch, kernels):
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    tensors = inputs(2, 3, 72)
    r, h = gate_residual_modulate(*(t[:0] for t in tensors))
    assert r.shape == h.shape == (0, 3, 72)
    r, h = gate_residual_modulate(*tensors, rows=torch.empty(2, 0, dtype=torch.int64, device=DEVICE))
    assert r.shape == h.shape == (2, 0, 72)
