"""Compare figures from features with closed forms, plain transcriptions, scipy and torch-fidelity, in any split."""

import threading
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from fidelity import torch_fidelity

from fastdit.metrics import precision_recall as precision_recall_module
from fastdit.metrics.inception_score import ScoreSums, splits_of
from fastdit.metrics.kernel_distance import kernel_distance
from fastdit.metrics.moments import Moments, frechet_distance
from fastdit.metrics.precision_recall import precision_recall, radii
from fastdit.metrics.summary import Collector, Output, Summary, compare


def features(n: int, d: int = 24, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Return features (n, d) like a network's: not negative, correlated, of very different sizes."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((n, d)) @ np.random.default_rng(99).standard_normal((d, d)) * np.logspace(-2, 0, d)
    return torch.from_numpy(np.maximum(mixed * scale + shift, 0)).float()


def logits(n: int, classes: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, classes)) * 4).float()


def on_ranks(world: int, work: Callable) -> list:
    """Run work(rank, total, gather) on threads that meet in `total` and `gather` as ranks do."""
    meeting, shared, results = threading.Barrier(world, timeout=20), [None] * world, [None] * world

    def all_of(rank: int, value) -> list:
        shared[rank] = value
        meeting.wait()
        values = list(shared)
        meeting.wait()
        return values

    def run(rank: int) -> None:
        def total(tensor):
            return torch.stack(all_of(rank, tensor)).sum(0)

        def gather(value):
            values = all_of(rank, value)
            return values if rank == 0 else None

        results[rank] = work(rank, total, gather)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# -- moments --

RAGGED = (1, 0, 7, 30, 2, 60)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_of_ragged_parts_are_those_of_the_whole(offset):
    x = features(sum(RAGGED)) + offset
    merged = Moments.of(x[:0])
    for part in x.split(RAGGED):
        merged = merged + Moments.of(part)
    assert merged.n == 100
    assert merged.scatter.dtype == torch.float64
    expected = x.double().numpy()
    np.testing.assert_allclose(merged.mean.numpy(), expected.mean(0), rtol=1e-12)
    exact = np.cov(expected, rowvar=False)
    np.testing.assert_allclose(merged.covariance.numpy(), exact, rtol=1e-9, atol=1e-11 * np.abs(exact).max())


@pytest.mark.parametrize("world", [1, 3])
def test_moments_over_ranks_are_those_of_the_whole(world):
    x = features(50) + 1e3
    parts = [x[rank : 50 : world + 1] for rank in range(world)]  # the last rank's share is not the others'
    parts[-1] = torch.cat([parts[-1], x[world : 50 : world + 1]])
    found = on_ranks(world, lambda rank, total, gather: Moments.of(parts[rank]).over_ranks(total))
    whole = Moments.of(x)
    for moments in found:
        assert moments.n == 50
        torch.testing.assert_close(moments.mean, whole.mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(moments.scatter, whole.scatter, rtol=1e-9, atol=1e-9)


def test_a_rank_without_vectors_and_a_covariance_of_one():
    x = features(20)
    parts = [x, x[:0]]
    found = on_ranks(2, lambda rank, total, gather: Moments.of(parts[rank]).over_ranks(total))
    torch.testing.assert_close(found[1].scatter, Moments.of(x).scatter)
    with pytest.raises(ValueError, match="1 vectors"):
        _ = Moments.of(x[:1]).covariance


# -- Frechet distance --


def gaussian(mean, covariance) -> Moments:
    return Moments.given(1000, torch.as_tensor(mean), torch.as_tensor(covariance))


def test_frechet_distance_of_known_gaussians():
    identity = np.eye(3)
    assert frechet_distance(gaussian([0.0, 0, 0], identity), gaussian([1.0, 2, 2], identity)) == pytest.approx(
        9, rel=1e-12
    )
    # covariances that commute: the sum of (sqrt a - sqrt b)^2
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    a, b = turn @ np.diag([1.0, 4, 9]) @ turn.T, turn @ np.diag([16.0, 4, 1]) @ turn.T
    assert frechet_distance(gaussian([0.0] * 3, a), gaussian([0.0] * 3, b)) == pytest.approx(9 + 0 + 4, rel=1e-12)
    # one dimension against none: rank-deficient
    assert frechet_distance(
        gaussian([0.0, 0], np.diag([4.0, 0])), gaussian([0.0, 0], np.diag([0.0, 9]))
    ) == pytest.approx(13)


def scipy_frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    """Compute the distance as in the paper, through the matrix square root itself."""
    x, y = x.double().numpy(), y.double().numpy()
    a, b = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(a @ b)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(a + b - 2 * root.real)


@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
def test_frechet_distance_agrees_with_scipy(shift):
    x, y = features(300, seed=1), features(200, seed=2, shift=shift)
    distance = frechet_distance(Moments.of(x), Moments.of(y))
    assert distance == pytest.approx(scipy_frechet(x, y), rel=1e-6)
    assert distance == pytest.approx(frechet_distance(Moments.of(y), Moments.of(x)), rel=1e-9)


def test_fewer_samples_than_features():
    """Use singular covariances. Tr (A B)^1/2 is the sum of singular values of the centered data's product."""
    x, y = features(30, d=64, seed=1).double(), features(40, d=64, seed=2, shift=0.2).double()
    a, b = x - x.mean(0), y - y.mean(0)
    cross = torch.linalg.svdvals(a @ b.T / (29 * 39) ** 0.5).sum()
    exact = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() / 29 + b.square().sum() / 39 - 2 * cross
    assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(exact.item(), rel=1e-9)
    assert abs(frechet_distance(Moments.of(x), Moments.of(x))) < 1e-9 * (a.square().sum() / 29)


def test_frechet_distance_agrees_with_torch_fidelity():
    fid = torch_fidelity("metric_fid")
    for n, m in ((300, 200), (20, 300)):  # the second: singular
        x, y = features(n, seed=1), features(m, seed=2, shift=0.3)
        expected = fid.fid_statistics_to_metric(
            *(fid.fid_features_to_statistics(z.double()) for z in (x, y)), verbose=False
        )["frechet_inception_distance"]
        assert frechet_distance(Moments.of(x), Moments.of(y)) == pytest.approx(expected, rel=1e-5)


# -- kernel distance --


def plain_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Compute the unbiased estimate term by term."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n, m = len(x), len(y)
    xx = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * np.mean([[kernel(a, b) for b in y] for a in x])


def test_kernel_distance_of_whole_sets_is_the_plain_sum():
    x, y = features(17, seed=1), features(17, seed=2, shift=0.5)
    mean, std = kernel_distance(x, y, subsets=3)
    assert mean == pytest.approx(plain_mmd(x.double().numpy(), y.double().numpy()), rel=1e-10)
    assert std == pytest.approx(0, abs=1e-12), "every subset is the whole"


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_kernel_distance_agrees_with_torch_fidelity(shift):
    kid = torch_fidelity("metric_kid")
    x, y = features(80, seed=1), features(120, seed=2, shift=shift)
    expected = kid.kid_features_to_metric(
        x.double(), y.double(), kid_subsets=10, kid_subset_size=50, kid_kernel="poly", verbose=False, rng_seed=2020
    )
    mean, std = kernel_distance(x, y, subsets=10, size=50)
    assert mean == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert std == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)


def test_kernel_distance_is_unbiased_and_bounded_below_by_chance_alone():
    same = [kernel_distance(features(40, seed=s), features(40, seed=s + 50), subsets=1)[0] for s in range(40)]
    assert min(same) < 0 < max(same)
    assert abs(np.mean(same)) < 3 * np.std(same) / 40**0.5
    with pytest.raises(ValueError, match="1 and 9"):
        kernel_distance(features(1), features(9))


# -- Inception score --


def summed(x: torch.Tensor, parts) -> ScoreSums:
    split = torch.from_numpy(splits_of(len(x)).copy())
    sums = [ScoreSums.of(a, b) for a, b in zip(x.split(parts), split.split(parts))]
    return sum(sums[1:], start=sums[0])


@pytest.mark.parametrize("n", [7, 10, 103])
def test_inception_score_agrees_with_torch_fidelity_in_any_split(n):
    x = logits(n)
    whole, ragged = summed(x, n).score(), summed(x, [2, 0, n - 5, 3]).score()
    assert ragged == pytest.approx(whole, rel=1e-12)
    expected = torch_fidelity("metric_isc").isc_features_to_metric(x, splits=min(10, n))
    assert whole[0] == pytest.approx(expected["inception_score_mean"], rel=1e-9)
    assert whole[1] == pytest.approx(expected["inception_score_std"], rel=1e-9, abs=1e-12)


def test_inception_score_of_known_predictions():
    """Expect c for sure predictions of c equally frequent classes, and 1 for equal predictions."""
    sure = torch.eye(5, 6).repeat(40, 1) * 2000
    split = torch.arange(200) // 5 % 10
    assert ScoreSums.of(sure, split).score() == pytest.approx((5, 0), abs=1e-9)
    assert ScoreSums.of(logits(1).expand(200, -1), split).score() == pytest.approx((1, 0), abs=1e-9)


# -- precision and recall --


def plain_precision(samples: np.ndarray, real: np.ndarray, k: int) -> float:
    def radius(i: int) -> float:
        return sorted(np.linalg.norm(real[i] - real[j]) for j in range(len(real)) if j != i)[k - 1]

    radii = [radius(i) for i in range(len(real))]
    return np.mean([any(np.linalg.norm(s - r) <= radius for r, radius in zip(real, radii)) for s in samples])


@pytest.mark.parametrize("elements", [1 << 25, 100])
def test_precision_and_recall_are_the_plain_ones_in_any_blocks(monkeypatch, elements):
    monkeypatch.setattr(precision_recall_module, "_ELEMENTS", elements)
    x, y = features(45, d=5, seed=1, shift=0.2), features(33, d=5, seed=2)
    precision, recall = precision_recall(x, y)
    assert precision == pytest.approx(plain_precision(x.double().numpy(), y.double().numpy(), 3), abs=1e-12)
    assert recall == pytest.approx(plain_precision(y.double().numpy(), x.double().numpy(), 3), abs=1e-12)
    assert 0.1 < precision < 0.95
    assert 0.1 < recall < 0.95
    assert abs(precision - recall) > 0.01, "so that one cannot pass for the other"


def test_precision_and_recall_agree_with_torch_fidelity():
    x, y = features(300, d=6, seed=1, shift=0.2), features(200, d=6, seed=2)
    prc = torch_fidelity("metric_prc")
    expected = prc.prc_features_to_metric(
        x.double(), y.double(), prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=True, verbose=False
    )
    assert precision_recall(x, y) == pytest.approx((expected["precision"], expected["recall"]), abs=1e-6)


def test_precision_and_recall_of_equal_distant_and_tiny_sets():
    x = features(20)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 1e3) == (0, 0)
    few = torch.tensor([[0.0], [1.0]])
    assert precision_recall(few, few) == (1, 1)
    # samples on one real point: precise, and of no recall but that point
    assert precision_recall(x[:1].repeat(20, 1), x) == (1, 1 / 20)


# -- summaries --


def output(n: int, seed: int = 0, spatial: bool = True) -> Output:
    return Output(features(n, seed=seed), logits(n, seed=seed), features(n, d=9, seed=seed + 7) if spatial else None)


def collect(whole: Output, order: np.ndarray, parts, keep: int) -> Summary:
    collector = Collector(len(whole.features), keep)
    for ids in np.split(order, np.cumsum(parts)):
        collector.add(whole.take(torch.from_numpy(ids)), ids)
    return collector.summary()


@pytest.mark.parametrize("spatial", [True, False])
def test_figures_do_not_depend_on_split_order_or_ranks(spatial, monkeypatch):
    monkeypatch.setattr("fastdit.metrics.summary._FOLD", 20)
    whole, real = output(90, spatial=spatial), collect(output(70, seed=3), np.arange(70), [], 60)
    straight = compare(collect(whole, np.arange(90), [], 80), real)
    shuffled = np.random.default_rng(0).permutation(90)

    def share(rank, total, gather):
        return collect(whole, shuffled[rank::3], [1, 1, 19], 80).over_ranks(total, gather)

    first, *others = on_ranks(3, share)
    assert first.ids.tolist() == list(range(80)), "in order, and bounded"
    assert torch.equal(first.kept, whole.features[:80])
    assert all(other.kept is None for other in others)
    spread = compare(first, real)
    assert spread == pytest.approx(straight, rel=1e-9)
    expected = {"frechet", "score", "score_std", "kernel", "kernel_std", "precision", "recall"}
    assert spread.keys() == expected | ({"spatial_frechet"} if spatial else set())


def test_statistics_alone_give_the_distances_that_need_no_more():
    samples = collect(output(40), np.arange(40), [], 40)
    known = Summary(Moments.given(2, torch.zeros(24), torch.eye(24)))
    assert compare(samples, known).keys() == {"frechet", "score", "score_std"}
    assert compare(samples, known)["frechet"] == pytest.approx(
        frechet_distance(Moments.of(features(40)), Moments.given(50, torch.zeros(24), torch.eye(24)))
    )


def test_known_radii_change_nothing():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 6, generator=generator), torch.randn(70, 6, generator=generator) * 1.2
    assert precision_recall(x, y, real_radii=radii(y)) == precision_recall(x, y)
    assert precision_recall(x, y, real_radii=2 * radii(y)) != precision_recall(x, y)
