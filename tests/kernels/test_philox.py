"""kernels/philox.py: known answers, equal bits on every implementation, and laws of the numbers."""

import math

import pytest
import torch
from kernel_checks import DEVICE, IMPLEMENTATIONS
from scipy import stats

from fastdit.kernels import philox, philox_bits, philox_integers, philox_normal, philox_uniform
from fastdit.kernels import sample_generator as sampling

BUILT = philox._built()
ALL = [*IMPLEMENTATIONS, pytest.param("cpp", marks=pytest.mark.skipif(not BUILT, reason="csrc is not built"))]
PLACES = [(5, 2**32 - 2, 3), (2**63 + 12345, 2**40, 2**32 - 1), (-1, 2**62, 0)]


def place(seed=0, position=0, draw=0, implementation="reference"):
    device = "cpu" if implementation == "cpp" else DEVICE
    return {"seed": seed, "position": position, "draw": draw, "device": device, "implementation": implementation}


def encrypt(counter, key) -> list[int]:
    """Philox4x32-10 by its definition, in Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = right >> 32 ^ c1 ^ k0, right % 2**32, left >> 32 ^ c3 ^ k1, left % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


KNOWN = [  # Random123's kat_vectors for philox4x32-10: counter, key, answer
    ((0,) * 4, (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert encrypt(counter, key) == [int(word, 16) for word in answer.split()]


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize(("seed", "position", "draw"), PLACES)
def test_words_are_those_of_the_definition(implementation, seed, position, draw):
    got = philox_bits(3, 10, **place(seed, position, draw, implementation))
    key = (seed % 2**32, seed >> 32 & 2**32 - 1)
    for sample, row in enumerate(got.tolist()):
        at = position + sample
        quads = [encrypt((quad, at % 2**32, at >> 32, draw), key) for quad in range(3)]
        assert row == [word for quad in quads for word in quad][:10]


@pytest.mark.parametrize("implementation", ALL[1:])
@pytest.mark.parametrize(("seed", "position", "draw"), PLACES)
def test_implementations_agree(monkeypatch, implementation, seed, position, draw):
    """Over several blocks and a ragged last one: numbers to the bit, normal numbers to rounding."""
    monkeypatch.setattr(philox, "_BLOCK", 32)
    here, there = place(seed, position, draw, implementation), place(seed, position, draw)
    for count, numel in ((3, 301), (5, 1), (2, 512)):
        assert torch.equal(philox_bits(count, numel, **here), philox_bits(count, numel, **there).to(here["device"]))
        uniform = philox_uniform(count, numel, **there)
        assert torch.equal(philox_uniform(count, numel, **here), uniform.to(here["device"]))
        integers = philox_integers(1000, count, numel, **there)
        assert torch.equal(philox_integers(1000, count, numel, **here), integers.to(here["device"]))
        normal = philox_normal(count, numel, **there)
        torch.testing.assert_close(philox_normal(count, numel, **here), normal.to(here["device"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", ALL)
def test_numbers_follow_from_the_words(implementation):
    here = place(1, 2, 3, implementation)
    words = philox_bits(2, 8, **here).cpu()
    assert torch.equal(philox_uniform(2, 8, **here).cpu().double(), (words // 256).double() / 2**24)
    assert torch.equal(philox_integers(77, 2, 8, **here).cpu(), words * 77 // 2**32)
    u, v = ((words // 256).double() / 2**24).unflatten(1, (4, 2)).unbind(2)
    r, angle = (-2 * (1 - u).log()).sqrt(), 2 * math.pi * v
    expected = torch.stack([r * angle.cos(), r * angle.sin()], 2).flatten(1)
    torch.testing.assert_close(philox_normal(2, 8, **here).cpu().double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("implementation", ["reference", ALL[-1]])
def test_laws(implementation):
    """Kolmogorov and Smirnov's test at the 0.1 % level, moments to five standard errors, and chi squared."""
    here, n = place(11, 0, 0, implementation), 256 * 1024
    uniform = philox_uniform(256, 1024, **here).flatten().double()
    assert stats.kstest(uniform.numpy(), "uniform").pvalue > 1e-3
    normal = philox_normal(256, 1024, **here).flatten().double()
    assert stats.kstest(normal.numpy(), "norm").pvalue > 1e-3
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((normal**power).mean() - expected) < 5 * math.sqrt(variance / n)
    counts = torch.bincount(philox_integers(1000, 256, 1024, **here).flatten(), minlength=1000)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3
    assert len(counts) == 1000


def test_neighbors_are_independent():
    """Correlations of positions, draws, seeds and numbers of a pair are within five standard errors of zero."""
    base = philox_normal(65, 4096, **place())
    others = {
        "position": (base[:-1], base[1:]),
        "draw": (base, philox_normal(65, 4096, **place(draw=1))),
        "seed": (base, philox_normal(65, 4096, **place(seed=1))),
        "high half of the seed": (base, philox_normal(65, 4096, **place(seed=2**32))),
        "high half of the position": (base, philox_normal(65, 4096, **place(position=2**32))),
        "pair": (base[:, ::2], base[:, 1::2]),
        "quad": (base[:, :-4], base[:, 4:]),
    }
    for name, (a, b) in others.items():
        for x, y in ((a, b), (a.square() - 1, b.square() - 1)):
            bound = 5 * float(x.std() * y.std()) / math.sqrt(a.numel())
            assert abs((x.double() * y.double()).mean()) < bound, name


@pytest.mark.parametrize("implementation", ALL)
def test_a_sample_has_its_numbers_in_any_batch(implementation):
    whole = philox_normal(6, 301, **place(1, 10, 2, implementation))
    assert torch.equal(whole[4:], philox_normal(2, 301, **place(1, 14, 2, implementation)))
    assert torch.equal(whole[:, :77], philox_normal(6, 77, **place(1, 10, 2, implementation)))


@pytest.mark.skipif(not BUILT, reason="csrc is not built")
def test_threads_do_not_matter():
    threads, results = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        results.append(philox_normal(16, 1000, **place(implementation="cpp")))
    torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("missing", ["module", "function"])
def test_without_the_compiled_kernel_the_reference_serves(monkeypatch, missing):
    """The C++ module may be absent, or older than this kernel."""
    kernels = None if missing == "module" else object()
    monkeypatch.setattr(philox, "load_native", lambda device: (kernels, ""))
    here = place() | {"device": "cpu"}
    auto = here | {"implementation": None}
    assert torch.equal(philox_normal(2, 5, **auto), philox_normal(2, 5, **here))
    with pytest.raises(ValueError, match="cpp"):
        philox_normal(2, 5, **here | {"implementation": "cpp"})


def test_operators_are_registered_soundly():
    device = torch.device(DEVICE)
    torch.library.opcheck(philox._philox.op, (2, 0, 3, 10, 1, 2, 3, device))
    torch.library.opcheck(philox._philox.op, (3, 7, 3, 10, 1, 2, 3, device))
    if BUILT:
        torch.library.opcheck(philox._philox_cpp.op, (2, 0, 3, 10, 1, 2, 3))


@pytest.mark.parametrize("implementation", ALL)
def test_compiled(implementation):
    here = place(1, 2, 3, implementation)
    compiled = torch.compile(lambda: philox_uniform(3, 10, **here), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), philox_uniform(3, 10, **here))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"high": 0}, r"high must be in \[1, 2\^31\), got 0"),
        ({"high": 2**31}, "high must be"),
        ({"count": -1}, "count and numel must not be negative, got -1"),
        ({"position": -1}, r"position must be in \[0, 2\^63\), got -1"),
        ({"position": 2**63}, "position must be"),
        ({"draw": 2**32}, r"draw must be in \[0, 2\^32\), got 4294967296"),
    ],
)
def test_contract(change, message):
    arguments = {"high": 3, "count": 2, "numel": 3, **place()}
    with pytest.raises(ValueError, match=message):
        philox_integers(**(arguments | change))


def test_empty():
    assert philox_normal(0, 5, **place()).shape == (0, 5)
    assert philox_bits(2, 0, **place()).shape == (2, 0)


def test_sample_generator_counts_its_draws():
    draws = sampling.SampleGenerator(seed=3, position=7, device=DEVICE)
    options = {"generator": draws, "device": DEVICE}
    assert torch.equal(
        sampling.draw_normal((4, 2, 3), **options),
        philox_normal(4, 6, seed=3, position=7, draw=0, device=DEVICE).view(4, 2, 3),
    )
    uniform = philox_uniform(4, 1, seed=3, position=7, draw=1, device=DEVICE).flatten()
    assert torch.equal(sampling.draw_uniform((4,), **options), uniform)
    integers = philox_integers(9, 2, 5, seed=3, position=7, draw=2, device=DEVICE)
    assert torch.equal(sampling.draw_integers(9, (2, 5), **options), integers)
    assert draws.draws == 3


def test_a_torch_generator_draws_as_torch_does():
    def seeded():
        return torch.Generator(DEVICE).manual_seed(3)

    ours, theirs = ({"generator": seeded(), "device": DEVICE} for _ in range(2))
    assert torch.equal(sampling.draw_normal((4, 3), **ours), torch.randn(4, 3, **theirs))
    assert torch.equal(sampling.draw_uniform((5,), **ours), torch.rand(5, **theirs))
    assert torch.equal(sampling.draw_integers(9, (5,), **ours), torch.randint(9, (5,), **theirs))
