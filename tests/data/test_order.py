"""Test the order of samples, a function of seed, epoch and ranks: each comes once an epoch, across resume."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from data_helpers import numbered, numbered_source, numbers_and_flips, take
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fastdit.data import make_loader, open_source, write_shard
from fastdit.data.order import Order, epoch_order

GRAY = {"size": (5, 7), "channels": 1}
EXAMPLES = {"deadline": None, "database": None, "derandomize": True}


def stream(seed: int, n: int, excluded: set[int]) -> Iterator[tuple[int, bool]]:
    """Yield (sample id, flip) of one rank that shows all, with the next good id in the place of an excluded one."""
    for epoch in count():
        ids, flips = epoch_order(seed, epoch, n)
        for i in ids.tolist():
            while i in excluded:
                i = (i + 1) % n
            yield i, bool(flips[i])


# Requests


@settings(max_examples=60, **EXAMPLES)
@given(
    n=st.integers(1, 40),
    world=st.integers(1, 3),
    batch=st.integers(1, 7),
    seed=st.integers(0, 2**32),
    start=st.integers(0, 5),
)
def test_every_sample_comes_once_an_epoch_over_the_ranks(n, world, batch, seed, start):
    epochs, stride = 3, world * batch
    steps = -(-epochs * n // stride) + 1
    orders = [Order(n, batch, seed, rank, world) for rank in range(world)]
    requests = [order.request(step * stride) for step in range(steps) for order in orders]
    ids = np.concatenate([request.ids for request in requests])
    flips = np.concatenate([request.flips for request in requests])
    for epoch in range(epochs):
        here = slice(epoch * n, (epoch + 1) * n)
        assert sorted(ids[here]) == list(range(n))
        assert (flips[here] == epoch_order(seed, epoch, n)[1][ids[here]]).all()
    # Another world, started anywhere, continues the same stream.
    start = min(start, steps * stride - 1)
    whole = Order(n, steps * stride - start, seed).request(start)
    assert (whole.ids == ids[start:]).all()
    assert (whole.flips == flips[start:]).all()


def test_the_order_is_pinned():
    """Pin the order: a change here changes every resumed run's data, so it must be on purpose."""
    first = Order(10, 10, seed=1).request(0)
    assert first.ids.tolist() == [2, 3, 0, 7, 4, 1, 8, 5, 9, 6]
    assert first.flips.astype(int).tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 1, 1]


def test_epochs_and_seeds_differ_and_flips_are_fair():
    ids = {(seed, epoch): epoch_order(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)}
    assert len({order.tobytes() for order, _ in ids.values()}) == 4
    assert len({flips.tobytes() for _, flips in ids.values()}) == 4
    assert all(440 < flips.sum() < 560 for _, flips in ids.values())
    assert (ids[0, 0][0] == epoch_order.__wrapped__(0, 0, 1000)[0]).all()


def test_flips_mirror_exactly_the_samples_the_order_names(tmp_path):
    source = numbered_source(tmp_path, 11)
    order = Order(11, 4, seed=3)
    mirrored = []
    for step, (x, y) in enumerate(take(9, source, batch=4, seed=3, **GRAY)):
        request = order.request(4 * step)
        ids, flips = numbers_and_flips(x)
        assert (ids, flips) == (request.ids.tolist(), request.flips.tolist())
        assert y.tolist() == [i % 3 for i in ids]
        mirrored += flips
    assert 0 < sum(mirrored) < len(mirrored)


def test_ranks_share_each_epoch_and_worlds_agree(tmp_path):
    """Let three worlds read the same global batches of 6; n = 11 divides by nothing."""
    source, streams = numbered_source(tmp_path, 11), []
    for world in (1, 2, 3):
        options = {"batch": 6 // world, "world": world, "seed": 5, **GRAY}
        ranks = [take(11, source, rank=rank, **options) for rank in range(world)]
        streams.append([torch.cat([ranks[r][k][0] for r in range(world)]) for k in range(11)])
    assert all(torch.equal(a, b) for world in streams[1:] for a, b in zip(streams[0], world))
    ids = [i for x in streams[0] for i in numbers_and_flips(x)[0]]
    epochs = [ids[k : k + 11] for k in range(0, 66, 11)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_unshuffled_and_unflipped(tmp_path):
    batches = take(5, numbered_source(tmp_path, 11), batch=4, shuffle=False, flip=False, **GRAY)
    seen = [numbers_and_flips(x) for x, _ in batches]
    assert [i for ids, _ in seen for i in ids] == [k % 11 for k in range(20)]
    assert not any(flip for _, flips in seen for flip in flips)


@settings(max_examples=150, **EXAMPLES)
@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    excluded=st.sets(st.integers(0, 39), max_size=9),
    runs=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(0, 9)), min_size=1, max_size=4),
)
def test_requests_continue_the_stream_in_worlds_of_any_size(n, seed, excluded, runs):
    """Continue one run after the other; `runs` lists their ranks, batch and steps."""
    excluded = {i for i in excluded if i < n}
    assume(len(excluded) < n)
    position, seen = 0, []
    for world, batch, steps in runs:
        for _ in range(steps):
            for rank in range(world):
                request = Order(n, batch, seed, rank, world).request(position, excluded)
                assert request.position == len(seen)
                seen += zip(request.ids.tolist(), request.flips.tolist())
            position += world * batch
    assert seen == list(islice(stream(seed, n, excluded), position))


# The real loader, over shards of uneven sizes


def uneven_source(folder: Path, sizes: list[int], corrupt: set[int]):
    """Return a source of `numbered` images in shards of `sizes`, those in `corrupt` cut short."""
    images = numbered(sum(sizes))
    samples = [
        (f"s{i:03d}", {"png": image[: 30 if i in corrupt else None], "cls": str(i % 3).encode()})
        for i, image in enumerate(images)
    ]
    for k, size in enumerate(sizes):
        write_shard(folder / f"u-{k}.tar", samples[sum(sizes[:k]) :][:size])
    return open_source(str(folder))


@settings(max_examples=30, **EXAMPLES)
@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    corrupt=st.sets(st.integers(0, 27), max_size=3),
    runs=st.lists(
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 6), st.integers(0, 3)), min_size=2, max_size=3
    ),
)
def test_the_loader_shows_the_stream_across_resume_and_worlds(sizes, seed, corrupt, runs):
    """Resume all ranks of a run from any rank's state; `runs` lists ranks, batch, steps and prefetch."""
    n, corrupt, seen, state = sum(sizes), {i for i in corrupt if i < sum(sizes)}, [], None
    assume(len(corrupt) < n)
    with TemporaryDirectory() as folder:
        source = uneven_source(Path(folder), sizes, corrupt)
        for world, batch, steps, prefetch in runs:
            options = {"world": world, "batch": batch, "prefetch": prefetch, "on_corrupt": "skip", **GRAY}
            ranks, states = [], []
            for rank in range(world):
                with closing(make_loader(source, rank=rank, seed=seed, **options)) as loader:
                    if state:
                        loader.load_state_dict(json.loads(json.dumps(state)))
                    ranks.append([next(loader) for _ in range(steps)])
                    states.append(loader.state_dict())
            for x, y in (ranks[rank][step] for step in range(steps) for rank in range(world)):
                ids, flips = numbers_and_flips(x)
                assert y.tolist() == [i % 3 for i in ids]
                seen += zip(ids, flips)
            assert {state["position"] for state in states} == {len(seen)}
            state = states[len(seen) % world]
    assert seen == list(islice(stream(seed, n, corrupt), len(seen)))
    for epoch in range(len(seen) // n):
        shown = Counter(i for i, _ in seen[epoch * n : (epoch + 1) * n])
        assert shown.keys() == set(range(n)) - corrupt
        assert corrupt or set(shown.values()) == {1}
