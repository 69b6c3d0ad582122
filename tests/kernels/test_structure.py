"""Test the structure loss against its formula written out in fp64, and the properties that SADM relies on."""

import sys
from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from kernel_checks import DEVICE, IMPLEMENTATIONS, LargestTensor, assert_exact, normal

from fastdit.kernels import structure_loss
from fastdit.kernels.structure import DISTANCES, NORMALIZATIONS, PENALTIES

# Another order of an fp32 computation's sums, which a CPU's matrix products choose by shape and place, gives another
# result within `assert_exact`'s tolerance of the exact one. Two such results are at most twice as far apart.
REORDERED = 2e-5
DELTA = 0.1  # inside the range of the tests' errors, so that huber is on both of its sides
TRITON = sys.modules["fastdit.kernels.structure_triton"]


def naive(f, g, weight, distance="euclidean", normalize="rms", penalty="l2"):
    """Compute the loss from the whole (B, B, d) at once, in the inputs' precision."""
    size = len(f)
    off_diagonal = ~torch.eye(size, dtype=torch.bool, device=f.device)

    def distances(x):
        if distance == "cosine":
            x = x / x.norm(dim=1, keepdim=True)
            return (1 - x @ x.T)[off_diagonal]
        squares = (x[:, None] - x[None]).square().sum(2)[off_diagonal]
        return squares if distance == "squared" else squares.sqrt()

    p, q = distances(f), distances(g)
    w = (weight[:, None] * weight[None])[off_diagonal]
    if normalize == "rms":
        p, q = (x / ((w * x.square()).sum() / w.sum()).sqrt() for x in (p, q))
    if normalize == "mean":
        p, q = (x / ((w * x).sum() / w.sum()) for x in (p, q))
    e = p - q
    cost = {
        "l2": e**2,
        "l1": e.abs(),
        "huber": torch.where(e.abs() < DELTA, e**2 / 2, DELTA * (e.abs() - DELTA / 2)),
    }[penalty]
    return (w * cost).sum() / w.sum()


def features(size=21, width=7, seed=0):
    """Return real features away from the origin, generated ones near them, and weights from 0 to 1."""
    real = normal(size, width, seed=seed) + 3
    fake = real + 0.5 * normal(size, width, seed=seed + 1)
    weight = normal(size, seed=seed + 2).abs().clamp_max(1)
    weight[2] = 0
    return real, fake, weight


def loss_and_gradients(real, fake, weight, **choices):
    real, fake = real.detach().requires_grad_(), fake.detach().requires_grad_()
    result = structure_loss(real, fake, weight, huber_delta=DELTA, **choices)
    return result.loss.detach(), *torch.autograd.grad(result.loss, (real, fake))


def naive_gradients(real, fake, weight, *choices):
    real, fake = (x.detach().double().requires_grad_() for x in (real, fake))
    loss = naive(real, fake, weight.double(), *choices)
    return loss.detach(), *torch.autograd.grad(loss, (real, fake))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, request):
    """Several tiles, panels and chunks from few samples; the interpreter is slow."""
    if "gpu" in request.node.name:
        return
    monkeypatch.setattr(TRITON, "_ROWS", 8)
    monkeypatch.setattr(TRITON, "_COLS", 16)
    monkeypatch.setattr(TRITON, "_FEATURES", 8)
    monkeypatch.setattr(TRITON, "_PANEL", 16 * 32)
    monkeypatch.setattr(sys.modules["fastdit.kernels.structure"], "_REFERENCE_CHUNK", 5 * 21 * 7)


@pytest.mark.parametrize(
    "choices",  # every normalization with every distance and every penalty
    [(d, NORMALIZATIONS[(i + j) % 3], p) for (i, d), (j, p) in product(enumerate(DISTANCES), enumerate(PENALTIES))],
    ids="-".join,
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_loss_and_both_gradients(implementation, choices):
    inputs = features()
    named = dict(zip(("distance", "normalize", "penalty"), choices))
    got = loss_and_gradients(*inputs, implementation=implementation, **named)
    for value, exact in zip(got, naive_gradients(*inputs, *choices)):
        assert_exact(value, exact)


@pytest.mark.parametrize(("size", "width"), [(4, 1), (5, 9)])
def test_with_the_tiles_of_a_gpu(size, width):
    inputs = features(size, width)
    got = loss_and_gradients(*inputs, implementation="triton")
    for value, exact in zip(got, naive_gradients(*inputs)):
        assert_exact(value, exact)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_statistics(implementation):
    real, fake, weight = features()
    result = structure_loss(real, fake, weight, implementation=implementation)
    r, s = (torch.pdist(x.double().cpu()) for x in (real, fake))
    w = torch.combinations(weight.double().cpu()).prod(1)
    torch.testing.assert_close(result.real_distance.cpu(), (w * r).sum() / w.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(result.fake_distance.cpu(), (w * s).sum() / w.sum(), rtol=1e-6, atol=0)
    covariance = torch.cov(torch.stack([r, s]), aweights=w, correction=0)
    correlation = covariance[0, 1] / (covariance[0, 0] * covariance[1, 1]).sqrt()
    torch.testing.assert_close(result.correlation.cpu(), correlation, rtol=1e-4, atol=0)
    assert not any(x.requires_grad for x in result)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_sample_of_weight_zero_has_no_influence(implementation, normalize):
    """Its features may be anything, as those of pure noise: neither loss nor scale nor statistics depend on them."""
    real, fake, weight = features(13, 5)  # weight[2] is zero
    choices = {"normalize": normalize, "implementation": implementation}
    without = [i for i in range(13) if i != 2]
    expected = loss_and_gradients(real[without], fake[without], weight[without], **choices)
    real[2], fake[2] = 1e4, -1e3
    loss, df, dg = loss_and_gradients(real, fake, weight, **choices)
    for got, other in zip((loss, df[without], dg[without]), expected):
        assert_exact(got, other.double(), 1e-6)
    assert (df[2] == 0).all()
    assert (dg[2] == 0).all()
    moments = [structure_loss(*x, implementation=implementation).moments for x in
               ((real, fake, weight), (real[without], fake[without], weight[without]))]  # fmt: skip
    torch.testing.assert_close(*moments, rtol=1e-6, atol=0)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_coincident_points(implementation, distance):
    """Three equal real samples and two equal generated ones are at distance exactly 0 and do not pull at each other."""
    real, fake, weight = features(13, 5)
    real[4], real[9], fake[7] = real[1], real[1], fake[3]
    alike = structure_loss(
        real[[1, 4, 9]], fake[:3], distance=distance, normalize="none", implementation=implementation
    )
    assert alike.real_distance == 0
    got = loss_and_gradients(real, fake, weight, distance=distance, implementation=implementation)
    # the formula's gradient is the mean of those of two displaced sets: the pull between them cancels
    exact = []
    for sign in (-1, 1):
        r, s = real.double(), fake.double()
        r[4] += sign * 1e-8
        r[9] -= sign * 1e-8
        s[7] += sign * 1e-8
        exact.append(naive_gradients(r, s, weight, distance))
    for value, *pair in zip(got, *exact):
        assert_exact(value, (pair[0] + pair[1]) / 2)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_near_points_keep_their_digits(implementation):
    """Pairs 1e-4 apart at norm 30: through the gram matrix nothing of such a distance would be left in fp32."""
    base = 30 * torch.nn.functional.normalize(normal(1, 24, seed=3))
    real, fake = base + 1e-4 * normal(9, 24, seed=4), base + 1e-4 * normal(9, 24, seed=5)
    weight = torch.ones(9, device=DEVICE)
    for value, exact in zip(
        loss_and_gradients(real, fake, weight, implementation=implementation), naive_gradients(real, fake, weight)
    ):
        assert_exact(value, exact, 2e-5)
    norms = (real.square().sum(1), real @ real.T)
    gram = (norms[0][:, None] + norms[0] - 2 * norms[1]).clamp_min(0).sqrt()
    true = torch.cdist(real.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert (gram - true).abs().max() > 0.5 * true.max()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_compare_is_zero_and_finite(implementation):
    real, fake, weight = features(6, 4)
    for inputs in ((real, fake, 0 * weight), (real[:1].expand(6, 4), fake[:1].expand(6, 4), weight)):
        got = loss_and_gradients(*inputs, implementation=implementation)
        assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("normalize", ["rms", "mean"])
def test_order_and_scale_do_not_matter(implementation, normalize):
    real, fake, weight = features(13)
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    choices = {"implementation": implementation, "normalize": normalize}
    loss, df, dg = loss_and_gradients(real, fake, weight, **choices)
    permuted = loss_and_gradients(real[order], fake[order], weight[order], **choices)
    scaled = loss_and_gradients(7 * real, 0.3 * fake, 5 * weight, **choices)
    for got, expected in zip((*permuted, *scaled), (loss, df[order], dg[order], loss, df / 7, dg / 0.3)):
        assert_exact(got, expected.double(), REORDERED)


def test_the_most_that_can_be_won():
    """Each side holds one sample apart and all others together, but not the same one."""
    for size in (8, 64):
        real, fake = torch.zeros(2, size, 3, device=DEVICE)
        real[0], fake[1] = 1, 5
        most = {name: structure_loss(real, fake, normalize=name).loss.item() for name in ("rms", "mean")}
        assert most["rms"] == pytest.approx(2 - 2 / (size - 1), rel=1e-5)
        assert most["mean"] == pytest.approx(size - size / (size - 1), rel=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_expanded_and_upstream(implementation):
    real, fake, weight = features(10, 6)
    _, df, dg = naive_gradients(real, fake[:, :1].expand(10, 6), weight)
    real_t = real.T.contiguous().T.requires_grad_()
    column = fake[:, :1].clone().requires_grad_()
    spread = torch.stack([weight, weight], 1)[:, 1]
    loss = structure_loss(real_t, column.expand(10, 6), spread, implementation=implementation).loss
    got = torch.autograd.grad(loss.expand(3), (real_t, column), torch.ones(1, device=DEVICE).expand(3))
    assert_exact(got[0], 3 * df)
    assert_exact(got[1], 3 * dg.sum(1, keepdim=True))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_player_at_a_time(implementation):
    """The denoiser's step needs the generated side only, the encoder's may hold either fixed."""
    real, fake, weight = features(9, 4)
    _, df, dg = loss_and_gradients(real, fake, weight, implementation=implementation)
    for index, expected in enumerate((df, dg)):
        inputs = [real.clone(), fake.clone()]
        inputs[index].requires_grad_()
        structure_loss(*inputs, weight, implementation=implementation).loss.backward()
        assert torch.equal(inputs[index].grad, expected)
        assert inputs[1 - index].grad is None
    with torch.no_grad():
        assert not structure_loss(real, fake, weight, implementation=implementation).loss.requires_grad


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_features_are_taken_exactly(implementation, dtype):
    real, fake, weight = features(9, 5)
    low = loss_and_gradients(real.to(dtype), fake.to(dtype), weight.to(dtype), implementation=implementation)
    full = loss_and_gradients(
        real.to(dtype).float(), fake.to(dtype).float(), weight.to(dtype).float(), implementation=implementation
    )
    assert low[0].dtype == torch.float32
    for a, b in zip(low, full):
        assert torch.equal(a, b.to(a.dtype))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_twice_the_same_bits(implementation):
    inputs = features()
    first, second = (loss_and_gradients(*inputs, implementation=implementation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_default_weights_are_ones():
    real, fake, _ = features(8, 3)
    ones = torch.ones(8, device=DEVICE)
    assert torch.equal(structure_loss(real, fake).loss, structure_loss(real, fake, ones).loss)


@pytest.mark.parametrize("distance", DISTANCES)
def test_reference_gradient_by_finite_differences(distance, monkeypatch):
    monkeypatch.setattr(sys.modules["fastdit.kernels.structure"], "_REFERENCE_CHUNK", 2 * 5 * 3)
    real, fake, weight = (x.double() for x in features(5, 3))
    for penalty in PENALTIES:
        torch.autograd.gradcheck(
            lambda f, g, penalty=penalty: structure_loss(f, g, weight, distance=distance, penalty=penalty).loss,
            (real.requires_grad_(), fake.requires_grad_()),
        )


def test_memory_of_the_reference_is_a_chunk(monkeypatch):
    """B = 300, d = 16: (B, B) would be 90,000 elements; chunks of 7 rows are 2,100, the features 4,800."""
    monkeypatch.setattr(sys.modules["fastdit.kernels.structure"], "_REFERENCE_CHUNK", 7 * 300 * 16)
    real, fake, weight = (x.clone() for x in features(300, 16))
    with LargestTensor() as largest:
        structure_loss(real.requires_grad_(), fake, weight, implementation="reference").loss.backward()
    assert largest.bytes == 4 * real.numel()


def test_memory_of_the_kernels_is_a_panel():
    """B = 40 in panels of 16 rows: the largest tensor holds 2 x 48 x 16 coefficients, where (B, B) has 1,600."""
    real, fake, weight = (x.clone() for x in features(40, 3))
    with LargestTensor() as largest:
        saved = TRITON.structure.function(real, fake, weight, "euclidean", "rms", "l2", 1.0)
        one = torch.ones((), device=DEVICE)
        choices = ("euclidean", "rms", "l2", 1.0, True, True)
        TRITON.structure_backward.function(one, real, fake, weight, *saved[1:], *choices)
    assert largest.bytes == 4 * 2 * 48 * 16


def test_every_pair_is_in_one_tile():
    """The tiles of the linear program index, for six blocks of columns."""

    @triton.jit
    def count(out, ROWS: tl.constexpr, COLS: tl.constexpr):
        rows, cols = TRITON._upper_tile(ROWS, COLS)
        at = out + rows[:, None] * 96 + cols[None, :]
        tl.store(at, tl.load(at) + 1)

    seen = torch.zeros(96, 96, dtype=torch.int32, device=DEVICE)
    count[(6 * 7 // 2 * 4,)](seen, ROWS=4, COLS=16)
    upper = torch.ones_like(seen).triu(1).bool()
    assert (seen[upper] == 1).all()
    assert (seen <= 1).all()


def test_operators_are_registered_soundly():
    real, fake, weight = features(11, 5)
    choices = ("euclidean", "rms", "huber", DELTA)
    inputs = (real.requires_grad_(), fake.requires_grad_(), weight)
    torch.library.opcheck(TRITON.structure.op, (*inputs, *choices))
    loss, *saved = TRITON.structure(*inputs, *choices)
    detached = [x.detach() for x in (torch.ones_like(loss), *inputs, *saved)]
    torch.library.opcheck(TRITON.structure_backward.op, (*detached, *choices, True, False))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled(implementation):
    inputs = features(11, 5)

    def step(real, fake, weight):
        result = structure_loss(real, fake, weight, distance="cosine", implementation=implementation)
        return result.loss, result.correlation

    real, fake = (x.requires_grad_() for x in inputs[:2])
    loss, correlation = torch.compile(step, fullgraph=True, backend="aot_eager")(real, fake, inputs[2])
    got = (loss, correlation, *torch.autograd.grad(loss, (real, fake)))
    loss, correlation = step(real, fake, inputs[2])
    for a, b in zip(got, (loss, correlation, *torch.autograd.grad(loss, (real, fake)))):
        assert_exact(a, b.double(), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fake": torch.zeros(4, 2)}, "one shape"),
        ({"real": torch.zeros(4, 3, 1)}, r"\(B, d\)"),
        ({"fake": torch.zeros(4, 3, dtype=torch.float64)}, "one floating dtype"),
        ({"real": torch.zeros(1, 3), "fake": torch.zeros(1, 3)}, "two samples"),
        ({"weight": torch.ones(3)}, r"weight must be floating \(B,\) = \(4,\)"),
        ({"weight": torch.ones(4, dtype=torch.int64)}, "weight must be floating"),
        ({"distance": "manhattan"}, "distance='manhattan' is unknown; choose one of euclidean"),
        ({"normalize": "max"}, "normalize='max'"),
        ({"penalty": "l3"}, "penalty='l3'"),
        ({"huber_delta": 0.0}, "must be positive"),
        ({"implementation": "cpp"}, "cpp"),
    ],
)
def test_contract(change, message):
    arguments = {"real": torch.zeros(4, 3), "fake": torch.zeros(4, 3)} | change
    with pytest.raises(ValueError, match=message):
        structure_loss(**arguments)
