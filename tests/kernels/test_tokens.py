"""Visible tokens: which, what they become, and back to their places."""

import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, IMPLEMENTATIONS, assert_exact, normal

from fastdit.kernels import embed_tokens, scatter_tokens, visible_tokens
from fastdit.models import DiT

MODULE = sys.modules["fastdit.kernels.tokens"]


def seeded(seed):
    return torch.Generator(DEVICE).manual_seed(seed)


def draw(batch, tokens, keep, seed=0):
    return visible_tokens(batch, tokens, keep, generator=seeded(seed), device=DEVICE)


def test_ids_are_distinct_sorted_and_the_samples_own():
    ids = draw(64, 21, 13)
    assert ids.shape == (64, 13)
    assert ids.dtype == torch.int64
    assert (ids.diff(dim=1) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < 21
    assert len({tuple(row) for row in ids.tolist()}) > 60


def test_every_token_is_as_likely():
    """Each token is kept by Binomial(4000, 5/12) samples: standard deviation 31."""
    counts = torch.bincount(draw(4000, 12, 5).flatten(), minlength=12)
    assert (counts - 4000 * 5 / 12).abs().max() < 5 * 31


def test_ids_are_a_function_of_the_seed_alone():
    state = torch.get_rng_state()
    assert torch.equal(draw(5, 9, 4, seed=3), draw(5, 9, 4, seed=3))
    assert not torch.equal(draw(5, 9, 4, seed=3), draw(5, 9, 4, seed=4))
    assert torch.equal(torch.get_rng_state(), state)


def test_all_tokens_come_in_order():
    assert torch.equal(draw(3, 16, 16), torch.arange(16, device=DEVICE).expand(3, 16))


@pytest.mark.parametrize("keep", [0, 10])
def test_keep_is_checked(keep):
    with pytest.raises(ValueError, match=r"keep must be in 1\.\.9"):
        draw(2, 9, keep)


def embedding(dtype=torch.float32):
    """Images on a 3 x 5 grid of 2-pixel patches with 3 channels; weight, bias, positions for width 7."""
    shapes = ((4, 3, 6, 10), (7, 3, 2, 2), (7,), (15, 7))
    return [normal(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def convolve(x, weight, bias, positions, ids):
    tokens = F.conv2d(x, weight, bias, stride=weight.shape[-1]).flatten(2).mT + positions
    return torch.stack([sample[rows] for sample, rows in zip(tokens, ids)])


@pytest.mark.parametrize("keep", [1, 6, 15])
def test_embedding_and_every_gradient(keep):
    ids = draw(4, 15, keep)
    inputs = [x.requires_grad_() for x in embedding()]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    got, exact = embed_tokens(*inputs, ids), convolve(*exact_inputs, ids)
    assert_exact(got, exact)
    upstream = normal(*got.shape, seed=9)
    grads = torch.autograd.grad(got, inputs, upstream)
    for a, b in zip(grads, torch.autograd.grad(exact, exact_inputs, upstream.double())):
        assert_exact(a, b)
    again = torch.autograd.grad(embed_tokens(*inputs, ids), inputs, upstream)
    assert all(torch.equal(a, b) for a, b in zip(grads, again))


def test_embedding_is_the_models():
    """With nothing masked, what DiT itself makes of its patches."""
    model = DiT(input_size=(6, 10), patch=2, channels=3, width=16, depth=1, heads=2, classes=3).to(DEVICE)
    x = normal(4, 3, 6, 10, seed=0)
    whole = model.patch_embed(x, model.pos_embed)
    part = model.patch_embed
    arguments = (x, part.weight, part.bias, model.pos_embed)
    assert torch.equal(embed_tokens(*arguments, draw(4, 15, 15)), whole)
    ids = draw(4, 15, 6)
    expected = whole.gather(1, ids[:, :, None].expand(-1, -1, 16))
    torch.testing.assert_close(embed_tokens(*arguments, ids), expected, rtol=0, atol=1e-6)


def test_embedding_in_bf16_and_without_bias():
    x, weight, _, positions = embedding(torch.bfloat16)
    ids = draw(4, 15, 6)
    expected = convolve(x.double(), weight.double(), None, positions.double(), ids)
    for table in (positions, positions.float()):
        got = embed_tokens(x.float(), weight, None, table, ids)
        assert got.dtype == table.dtype
        assert_exact(got, expected, 2**-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 2, 6, 10)}, "weight"),
        ({"x": torch.zeros(4, 3, 6, 9)}, "positions"),
        ({"positions": torch.zeros(14, 7)}, "positions"),
        ({"ids": torch.zeros(3, 2, dtype=torch.int64)}, r"ids must be int64 \(4, 1\.\.15\)"),
        ({"ids": torch.zeros(4, 2, dtype=torch.int32)}, "ids must be int64"),
        ({"ids": torch.zeros(4, 16, dtype=torch.int64)}, "ids must be int64"),
    ],
)
def test_embedding_contract(change, message):
    names = ("x", "weight", "bias", "positions")
    arguments = dict(zip(names, (x.cpu() for x in embedding()))) | {"ids": torch.zeros(4, 2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        embed_tokens(**(arguments | change))


def scatter_loop(x, ids, base):
    out = base.clone()
    for sample, rows in enumerate(ids):
        out[sample, rows] = x[sample]
    return out


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(MODULE, "_block", lambda width: 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [1, 5, 8])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scatter_and_both_gradients_are_copies(implementation, keep, dtype, small_blocks):
    ids = draw(3, 8, keep)
    x, base = (normal(3, n, 7, seed=n, dtype=dtype).requires_grad_() for n in (keep, 8))
    got, expected = scatter_tokens(x, ids, base, implementation=implementation), scatter_loop(x, ids, base)
    assert torch.equal(got, expected)
    upstream = normal(3, 8, 7, seed=4, dtype=dtype)
    grads = torch.autograd.grad(got, (x, base), upstream)
    for a, b in zip(grads, torch.autograd.grad(expected, (x, base), upstream)):
        assert a.dtype == dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scatter_strided_and_expanded(implementation):
    """An expanded mask token, transposed inputs, an expanded upstream gradient."""
    ids = draw(3, 8, 5)
    x, token = normal(5, 3, 7, seed=0).requires_grad_(), normal(7, seed=1).requires_grad_()
    got = scatter_tokens(x.transpose(0, 1), ids, token.expand(3, 8, 7), implementation=implementation)
    assert torch.equal(got, scatter_loop(x.transpose(0, 1), ids, token.expand(3, 8, 7)))
    dx, dtoken = torch.autograd.grad(got, (x, token), normal(7, seed=2).expand(3, 8, 7))
    assert torch.equal(dx, normal(7, seed=2).expand(5, 3, 7))
    assert_exact(dtoken, 3 * (8 - 5) * normal(7, seed=2).double())
    transposed = normal(7, 8, 3, seed=3).permute(2, 1, 0)
    got = scatter_tokens(x.transpose(0, 1), ids, transposed, implementation=implementation)
    assert torch.equal(got, scatter_loop(x.transpose(0, 1), ids, transposed))
    (only_x,) = torch.autograd.grad(got.square().sum(), x)
    assert torch.equal(only_x, 2 * x)


def test_scatter_undoes_the_choice():
    ids = draw(3, 8, 5)
    base = normal(3, 8, 72, seed=0)
    picked = base.gather(1, ids[:, :, None].expand(-1, -1, 72))
    assert torch.equal(scatter_tokens(picked, ids, base, implementation="triton"), base)


def test_operators_are_registered_soundly():
    ids = draw(2, 4, 2)
    slots = MODULE._slots(ids, 4)
    x, base = normal(2, 2, 3, seed=0).requires_grad_(), normal(2, 4, 3, seed=1).requires_grad_()
    torch.library.opcheck(MODULE._scatter.op, (x, slots, base))
    torch.library.opcheck(MODULE._scatter_backward.op, (base.detach(), slots, 2, True))
    torch.library.opcheck(MODULE._scatter_backward.op, (base.detach(), slots, 2, False))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled(implementation):
    def step(x, weight, bias, positions, ids, base):
        tokens = embed_tokens(x, weight, bias, positions, ids)
        return scatter_tokens(tokens, ids, base, implementation=implementation)

    inputs = (*(x.requires_grad_() for x in embedding()), draw(4, 15, 6), normal(4, 15, 7, seed=5).requires_grad_())
    leaves = [x for x in inputs if x.requires_grad]
    got, plain = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), step(*inputs)
    assert_exact(got, plain.double(), 1e-6)
    grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (got, plain))
    for a, b in zip(*grads):
        assert_exact(a, b.double(), 1e-6)


def test_reference_gradient_by_finite_differences():
    ids = draw(2, 4, 2)
    x, base = normal(2, 2, 3, seed=0, dtype=torch.float64), normal(2, 4, 3, seed=1, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, base: scatter_tokens(x, ids, base), (x.requires_grad_(), base.requires_grad_()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 2, 4)}, r"base \(B, N, D\)"),
        ({"base": torch.zeros(2, 4, 3, dtype=torch.float64)}, "one floating dtype"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, r"ids must be \(B, keep\) = \(2, 2\)"),
        ({"ids": torch.zeros(2, 2)}, "ids must be int64"),
        ({"implementation": "cpp"}, "cpp"),
    ],
)
def test_scatter_contract(change, message):
    arguments = {"x": torch.zeros(2, 2, 3), "ids": torch.zeros(2, 2, dtype=torch.int64), "base": torch.zeros(2, 4, 3)}
    with pytest.raises(ValueError, match=message):
        scatter_tokens(**(arguments | change))
