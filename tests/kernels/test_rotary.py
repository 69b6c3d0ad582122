"""QK-norm and 2-D rotary positions against complex numbers in fp64."""

import sys

import pytest
import torch
from kernel_checks import DEVICE, IMPLEMENTATIONS, assert_as_good_as, assert_exact, normal

from fastdit.kernels import attention, norm_rotate, rope_table

MODULE = sys.modules["fastdit.kernels.rotary"]
GRID = (2, 2)


def rotated(x, grid, ids=None, theta=10000.0):
    """Pair j of a token at (row, col), as the complex number x_j + i x_{j + d/2}, times e^(i angle)."""
    batch, _, _, dim = x.shape
    quarter = dim // 4
    ids = torch.arange(grid[0] * grid[1], device=x.device).expand(batch, -1) if ids is None else ids
    frequency = torch.tensor([theta ** (-i / quarter) for i in range(quarter)], dtype=x.dtype, device=x.device)
    row, col = ids // grid[1], ids % grid[1]
    angle = torch.cat([row[..., None] * frequency, col[..., None] * frequency], -1)[:, :, None]
    z = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * torch.exp(1j * angle)
    return torch.cat([z.real, z.imag], -1)


def naive(q, k, norm, weights, grid, ids=None):
    out = []
    for x, weight in zip((q, k), weights or (1, 1)):
        if norm:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        out.append(x if grid is None else rotated(x, grid, ids))
    return out


def make(dim=8, tokens=4, heads=3, dtype=torch.float32):
    """q and k as views of a fused qkv leaf, and the norm's weights."""
    leaf = normal(2, tokens, 3, heads, dim, seed=0, dtype=dtype).requires_grad_()
    weights = tuple((1 + 0.3 * normal(dim, seed=seed)).to(dtype).requires_grad_() for seed in (1, 2))
    return leaf, weights


def upstream(out, seed=5):
    return [normal(*x.shape, seed=seed + index, dtype=x.dtype) for index, x in enumerate(out)]


CASES = {
    "norm": (True, False, True, False),  # norm, weights, rope on dims, ids
    "norm-weights": (True, True, False, False),
    "rope": (False, False, True, False),
    "all": (True, True, True, False),
    "all-masked": (True, True, True, True),
    "only-norm": (True, False, False, False),
}


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    """Several parts of a sample in backward, the last ragged."""
    monkeypatch.setattr(MODULE, "_TOKENS", 3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradients(implementation, case):
    norm, weighted, with_rope, masked = CASES[case]
    leaf, weights = make(tokens=3 if masked else 4)
    ids = torch.tensor([[0, 2, 3], [3, 0, 0]], device=DEVICE) if masked else None
    rope = rope_table(GRID, 8, device=DEVICE) if with_rope else None
    q, k, _ = leaf.unbind(2)
    got = norm_rotate(q, k, norm=weights if weighted else norm, rope=rope, ids=ids, implementation=implementation)

    exact_leaves = [x.detach().double().requires_grad_() for x in (leaf, *weights)]
    q, k, _ = exact_leaves[0].unbind(2)
    exact = naive(q, k, norm, exact_leaves[1:] if weighted else None, GRID if with_rope else None, ids)
    for a, b in zip(got, exact):
        assert a.is_contiguous()
        assert_exact(a, b, 2e-6)
    used = 1 + 2 * weighted
    grads = torch.autograd.grad(got, (leaf, *weights)[:used], upstream(got))
    for a, b in zip(grads, torch.autograd.grad(exact, exact_leaves[:used], [x.double() for x in upstream(got)])):
        assert_exact(a, b, 5e-6)


@pytest.mark.parametrize("dim", [64, 72])
def test_head_dims_of_dit(dim):
    leaf, weights = make(dim, heads=2)
    q, k, _ = leaf.unbind(2)
    rope = rope_table(GRID, dim, device=DEVICE)
    got = norm_rotate(q, k, norm=weights, rope=rope, implementation="triton")
    exact_leaves = [x.detach().double().requires_grad_() for x in (leaf, *weights)]
    exact = naive(*exact_leaves[0].unbind(2)[:2], True, exact_leaves[1:], GRID)
    for a, b in zip(got, exact):
        assert_exact(a, b, 2e-6)
    grads = torch.autograd.grad(got, (leaf, *weights), upstream(got))
    for a, b in zip(grads, torch.autograd.grad(exact, exact_leaves, [x.double() for x in upstream(got)])):
        assert_exact(a, b, 5e-6)


def test_scores_depend_on_relative_positions_only():
    """The point of RoPE: q at one cell and k at another, moved together over a grid, keep their product."""
    table = rope_table((4, 5), 16, device=DEVICE)
    q, k = normal(1, 1, 1, 16, seed=0), normal(1, 1, 1, 16, seed=1)
    ids = torch.arange(20, device=DEVICE)[None]
    qs, ks = (x[0, :, 0] for x in norm_rotate(q.expand(1, 20, 1, 16), k.expand(1, 20, 1, 16), rope=table, ids=ids))
    for shift in ((0, 1), (1, 0), (-1, 2)):
        a, b = ((row * 5 + col for row in (1, 2) for col in (0, 1, 2)) for _ in range(2))
        scores = [qs[i] @ ks[j + 5 * shift[0] + shift[1]] for i, j in zip(a, b)]
        torch.testing.assert_close(torch.stack(scores), scores[0].expand(6), rtol=0, atol=1e-5)
    assert abs(qs[0] @ ks[0] - qs[0] @ ks[17]) > 0.1


def test_table():
    table = rope_table((3, 4), 12, theta=100.0)
    assert table.shape == (12, 12)
    assert table.dtype == torch.float32
    token, frequency = 2 * 4 + 3, 100.0 ** (-1 / 3)  # row 2, column 3; second pair of each axis
    assert table[token, 1] == torch.tensor(2 * frequency, dtype=torch.float64).cos().float()
    assert table[token, 6 + 3 + 1] == torch.tensor(3 * frequency, dtype=torch.float64).sin().float()
    with pytest.raises(ValueError, match="multiple of 4"):
        rope_table((3, 4), 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision(implementation, dtype):
    leaf, weights = make(dtype=dtype)
    rope = rope_table(GRID, 8, device=DEVICE)
    leaf64, *weights64 = (x.detach().double().requires_grad_() for x in (leaf, *weights))
    low, *low_weights = (x.detach().clone().requires_grad_() for x in (leaf, *weights))

    got = norm_rotate(*leaf.unbind(2)[:2], norm=weights, rope=rope, implementation=implementation)
    exact = naive(*leaf64.unbind(2)[:2], True, weights64, GRID)
    cos, sin = rope.to(dtype)[:, None].chunk(2, -1)
    torchs = []
    for x, weight in zip(low.unbind(2)[:2], low_weights):
        a, b = (torch.nn.functional.rms_norm(x, (8,), eps=1e-6) * weight).chunk(2, -1)
        torchs.append(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
    for a, b, c in zip(got, torchs, exact):
        assert_as_good_as(a.detach(), b.detach(), c.detach())
    ups = upstream(got)
    grads = torch.autograd.grad(got, (leaf, *weights), ups)
    lows = torch.autograd.grad(torchs, (low, *low_weights), ups)
    exacts = torch.autograd.grad(exact, (leaf64, *weights64), [x.double() for x in ups])
    for a, b, c in zip(grads, lows, exacts):
        assert_as_good_as(a, b, c)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_and_expanded(implementation):
    """Heads-first q, an expanded k, a table taken from a larger one, and gradients of other strides."""
    rope = rope_table(GRID, 8, device=DEVICE)
    q = normal(2, 3, 4, 8, seed=0).requires_grad_()
    k = normal(1, 4, 1, 8, seed=1).requires_grad_()
    wide = torch.cat([rope, torch.full_like(rope, torch.nan)], 1)[:, :8]
    got = norm_rotate(q.transpose(1, 2), k.expand(2, 4, 3, 8), norm=True, rope=wide, implementation=implementation)
    exact_leaves = [x.detach().double().requires_grad_() for x in (q, k)]
    exact = naive(exact_leaves[0].transpose(1, 2), exact_leaves[1].expand(2, 4, 3, 8), True, None, GRID)
    ups = [normal(2, 3, 4, 8, seed=3).transpose(1, 2), normal(8, 4, seed=4).T[:, None].expand(2, 4, 3, 8)]
    grads = torch.autograd.grad(got, (q, k), ups)
    for a, b in zip(grads, torch.autograd.grad(exact, exact_leaves, [x.double() for x in ups])):
        assert_exact(a, b, 5e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_bits_twice_and_at_any_place_of_the_batch(implementation):
    leaf, weights = make()
    rope = rope_table(GRID, 8, device=DEVICE)

    def run(leaf):
        leaf = leaf.detach().requires_grad_()
        got = norm_rotate(*leaf.unbind(2)[:2], norm=weights, rope=rope, implementation=implementation)
        return *got, *torch.autograd.grad(sum(x.square().sum() for x in got), (leaf, *weights))

    first, second, moved = run(leaf), run(leaf), run(leaf.flip(0))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(torch.equal(a.flip(0), b) for a, b in zip(first[:3], moved[:3]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_in_front_of_attention(implementation, monkeypatch):
    monkeypatch.setenv("FASTDIT_KERNELS", implementation)
    leaf, weights = make(24)
    rope = rope_table(GRID, 24, device=DEVICE)
    q, k, v = leaf.unbind(2)
    out = attention(q, k, v, qk_norm=weights, rope=rope)
    q, k = norm_rotate(q, k, norm=weights, rope=rope)
    assert torch.equal(out, attention(q, k, v))
    ids = torch.arange(4, device=DEVICE).flip(0).expand(2, 4)
    masked = attention(*leaf.unbind(2), rope=rope, rope_ids=ids)
    assert torch.equal(masked, attention(*norm_rotate(*leaf.unbind(2)[:2], rope=rope, ids=ids), v))


def test_fp64_by_finite_differences():
    rope = rope_table((1, 2), 4)
    q, k = normal(2, 2, 1, 4, seed=0, dtype=torch.float64), normal(2, 2, 1, 4, seed=1, dtype=torch.float64)
    weights = (normal(4, seed=2, dtype=torch.float64), normal(4, seed=3, dtype=torch.float64))
    torch.autograd.gradcheck(
        lambda q, k, *weights: norm_rotate(q, k, norm=weights, rope=rope.to(DEVICE)),
        [x.requires_grad_() for x in (q, k, *weights)],
    )


def test_operators_are_registered_soundly(monkeypatch):
    monkeypatch.setattr(MODULE, "_TOKENS", 1)
    leaf, weights = make(4, tokens=2, heads=1)
    q, k, _ = leaf.unbind(2)
    rope, ids = rope_table((1, 2), 4, device=DEVICE), torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    q, k = (x.detach().requires_grad_() for x in (q, k))
    torch.library.opcheck(MODULE._norm_rotate.op, (q, k, *weights, rope, ids, True, 1e-6))
    torch.library.opcheck(MODULE._norm_rotate.op, (q, k, None, None, rope, None, False, 1e-6))
    q, k, *weights = (x.detach() for x in (q, k, *weights))
    torch.library.opcheck(MODULE._norm_rotate_backward.op, (q, k, q, k, *weights, rope, ids, True, 1e-6))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled(implementation):
    leaf, weights = make()
    rope = rope_table(GRID, 8, device=DEVICE)

    def step(leaf):
        q, k, _ = leaf.unbind(2)
        return norm_rotate(q, k, norm=weights, rope=rope, implementation=implementation)

    got, plain = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf), step(leaf)
    for a, b in zip(got, plain):
        assert_exact(a, b.double(), 1e-6)
    grads = (torch.autograd.grad(out, (leaf, *weights), upstream(out)) for out in (got, plain))
    for a, b in zip(*grads):
        assert_exact(a, b.double(), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 6, 3, 4)}, "one shape"),
        ({"q": torch.zeros(2, 6, 3, 5), "k": torch.zeros(2, 6, 3, 5)}, "d even"),
        ({"k": torch.zeros(2, 6, 3, 8, dtype=torch.float64)}, "one floating dtype"),
        ({"norm": False}, "nothing to do"),
        ({"norm": (torch.ones(8), None)}, "weights go together"),
        ({"norm": (torch.ones(8), torch.ones(7))}, r"floating \(8,\)"),
        ({"rope": torch.zeros(6, 4)}, r"rope must be fp32 \(positions, 8\)"),
        ({"rope": torch.zeros(7, 8)}, "rope must have 6 rows"),
        ({"rope": torch.zeros(6, 8), "ids": torch.zeros(2, 5, dtype=torch.int64)}, "ids must be int64"),
        ({"ids": torch.zeros(2, 6, dtype=torch.int64)}, "with a rope"),
        ({"implementation": "cpp"}, "cpp"),
    ],
)
def test_contract(change, message):
    arguments = {"q": torch.zeros(2, 6, 3, 8), "k": torch.zeros(2, 6, 3, 8), "norm": True} | change
    q, k = arguments.pop("q"), arguments.pop("k")
    with pytest.raises(ValueError, match=message):
        norm_rotate(q, k, **arguments)
