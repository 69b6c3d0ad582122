"""Test latents in memory: equal batches to the bit, sharing among real ranks, choice by size, clear refusals."""

import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import cache_ranks
import numpy as np
import psutil
import pytest
import torch
from data_helpers import latent_source, numbered_source, take
from launching import TIMES, TINY, forked, metrics

from fastdit.data import cache, make_loader, open_source
from fastdit.data.latents import quantize
from fastdit.errors import UserError

CPU = torch.device("cpu")
SHAPE = {"size": (5, 7), "channels": 3}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def posteriors(n: int, kinds: int = 4, dtype=np.float32) -> np.ndarray:
    """Return posteriors (n, kinds, 3, 5, 7) in which all numbers differ."""
    values = np.random.default_rng(n).normal(size=(n, kinds, 3, 5, 7))
    values[:, 1::2] = np.abs(values[:, 1::2])
    return values.astype(dtype)


FORMS = {
    "float32": lambda n: posteriors(n),
    "float16": lambda n: posteriors(n, dtype=np.float16),
    "uint8": lambda n: quantize(posteriors(n)[:, ::2]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (2, 3)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
def test_what_is_kept_is_yielded_like_what_is_read(tmp_path, form, rank, world, device):
    """Compare noise, flips, scale and labels, also from the middle on. Without a group each rank keeps all latents."""
    source = latent_source(tmp_path, FORMS[form](11))
    options = {"batch": 4, "seed": 3, "rank": rank, "world": world, "latent_scale": (0.5, 2.0, 3.0), **SHAPE}
    options |= {"latent_shift": (0.0, -1.0, 0.25), "device": device}
    read = take(8, source, cache="none", **options)
    assert len({x.double().sum().item() for x, _ in read}) == 8
    for place in ("cpu", "device"):
        with closing(make_loader(source, cache=place, **options)) as loader:
            cached = [next(loader) for _ in range(5)]
            state = loader.state_dict()
            next(loader)
            loader.load_state_dict(state)
            cached += [next(loader) for _ in range(3)]
            assert loader.held.views.device.type == (device if place == "device" else "cpu")
            assert loader.held.bytes == 11 * 2 * source.samples.form.view_bytes
        for (x, y), (x_cached, y_cached) in zip(read, cached):
            assert torch.equal(x, x_cached)
            assert torch.equal(y, y_cached)


def test_without_mirrored_views(tmp_path):
    source = latent_source(tmp_path, posteriors(7, kinds=2))
    options = {"batch": 4, "flip": False, **SHAPE}
    for (x, _), (cached, _) in zip(take(5, source, **options), take(5, source, cache="device", **options)):
        assert torch.equal(x, cached)
    with pytest.raises(UserError, match="no latents of mirrored images"):
        make_loader(source, batch=4, cache="device", **SHAPE)


@pytest.mark.parametrize(("world", "n", "form"), [(2, 11, "float16"), (3, 10, "uint8"), (3, 2, "float32")])
def test_ranks_share_them_out(tmp_path, world, n, form):
    """Run real processes: each keeps a share, sends the others their samples, and yields what DALI reads."""
    (tmp_path / "shards").mkdir()
    source = latent_source(tmp_path / "shards", FORMS[form](n))
    script = [sys.executable, cache_ranks.__file__]
    common = [str(world), tmp_path / "meet", tmp_path / "shards", tmp_path]
    ranks = [subprocess.Popen([*script, str(rank), *common]) for rank in range(world)]
    assert [rank.wait(120) for rank in ranks] == [0] * world
    sizes = []
    for rank in range(world):
        found = torch.load(tmp_path / f"{rank}.pt")
        read = take(cache_ranks.STEPS, source, rank=rank, world=world, **cache_ranks.OPTIONS)
        for batches, expected in ((found["batches"], read), (found["resumed"], read[cache_ranks.STOP :])):
            assert len(batches) == len(expected)
            for (x, y), (x_read, y_read) in zip(batches, expected):
                assert torch.equal(x, x_read)
                assert torch.equal(y, y_read)
        sizes.append(found["bytes"])
    each = -(-n // world) * 2 * source.samples.form.view_bytes
    assert max(sizes) == each
    assert sum(sizes) == n * 2 * source.samples.form.view_bytes


# -- which place --


def test_the_place_is_chosen_by_size(tmp_path, monkeypatch):
    source = latent_source(tmp_path, posteriors(10))
    each = 4 * 3 * 5 * 7 * 4
    assert cache.bytes_per_rank(source, 1) == 10 * each
    assert cache.bytes_per_rank(source, 3) == 4 * each
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=300 * each))
    (tmp_path / "max").write_text(f"{100 * each}\n")
    (tmp_path / "none").write_text("max\n")
    monkeypatch.setattr(cache, "LIMITS", (tmp_path / "none", tmp_path / "max", tmp_path / "missing"))
    for share, ranks_here, chosen in [(0.1, 1, "cpu"), (0.0999, 1, "none"), (0.15, 2, "none"), (0.2, 2, "cpu")]:
        monkeypatch.setattr(cache, "HOST_SHARE", share)
        assert cache.choose_cache("auto", source, CPU, None, ranks_here) == chosen
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=50 * each))
    for share, chosen in [(0.2, "device"), (0.1999, "cpu")]:
        monkeypatch.setattr(cache, "DEVICE_SHARE", share)
        assert cache.choose_cache("auto", source, gpu, None) == chosen
    assert cache.choose_cache("none", source, gpu, None) == "none"
    assert cache.choose_cache("device", source, CPU, None) == "device"


def test_images_are_not_kept(tmp_path):
    for source in (numbered_source(tmp_path, 5), open_source("synthetic")):
        assert cache.choose_cache("auto", source, CPU, None) == "none"
        for place in ("cpu", "device"):
            with pytest.raises(UserError, match=f"data.cache: {place} keeps latents"):
                cache.choose_cache(place, source, CPU, None)


def test_what_does_not_fit_says_so(tmp_path, monkeypatch):
    def full(*size, **options):
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    source = latent_source(tmp_path, posteriors(10))
    monkeypatch.setattr(cache.torch, "empty", full)
    with pytest.raises(
        UserError, match=r"^data.cache: device: 0.0 GB of latents do not fit there \(CUDA out .*\); set"
    ):
        make_loader(source, batch=4, cache="device", **SHAPE)


# -- in a run --


@pytest.mark.launch
def test_a_run_is_the_same_with_and_without(tmp_path):
    """Train on two ranks, which share the latents if these are kept in memory."""
    (tmp_path / "shards").mkdir()
    latent_source(tmp_path / "shards", FORMS["uint8"](30), labels=[i % 10 for i in range(30)])
    flags = ["--data.source", tmp_path / "shards", "--data.size", "[5,7]", "--data.channels", 3, "--data.classes", 10]
    runs = {}
    for place in ("none", "device"):
        out = tmp_path / place
        outcome = forked(
            *TINY, "--model.patch", 1, *flags, "--data.cache", place, "--steps", 6, "--out", out, ranks=2
        ).succeeded()
        assert ("GB a rank kept on cpu" in outcome.text) == (place == "device")
        runs[place] = [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(out)]
    assert runs["none"] == runs["device"]
    assert len(runs["none"]) == 6
    assert Path(tmp_path / "device/config.yaml").read_text().count("cache: device") == 1


def test_synthetic_and_kept_data_do_without_dali(tmp_path):
    """Read where DALI cannot be imported; threads read latents that are not in memory."""
    latent_source(tmp_path, posteriors(7))
    program = f"""
import sys
sys.modules["nvidia.dali"] = None
from fastdit.data import make_loader, open_source
for name, options in [("synthetic:3x5x7:2:9", {{}}), ({str(tmp_path)!r}, {{"cache": "cpu"}})]:
    x, y = next(make_loader(open_source(name), batch=4, size=(5, 7), channels=3, **options))
    assert x.shape == (4, 3, 5, 7), x.shape
loader = make_loader(open_source({str(tmp_path)!r}), batch=4, size=(5, 7), channels=3)
assert next(loader)[0].shape == (4, 3, 5, 7)
print(loader.reading)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "read by 2 threads (NVIDIA DALI is not installed)\n", done.stderr
