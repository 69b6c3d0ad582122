"""Read without DALI: torch's DataLoader with Pillow gives the same batches, and its workers end when they should."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from data_helpers import (
    encode,
    latent_source,
    levels,
    numbered,
    numbered_source,
    numbers_and_flips,
    picture,
    take,
)
from PIL import Image
from test_data_bad import BAD_IMAGES, GRAY, OTHER_CHANNELS, source_with

from fastdit.data import make_loader, open_source, read_in_order, write_shards
from fastdit.data.latents import quantize
from fastdit.data.order import Order
from fastdit.errors import UserError

READERS = ("dali", "torch")
CPU = torch.device("cpu")


def tree(folder: Path, files: dict[str, bytes]):
    """Return a source of one class of files, in the order of their names."""
    (folder / "a").mkdir()
    for name, file in files.items():
        (folder / "a" / name).write_bytes(file)
    return open_source(str(folder))


def both(source, count: int = 1, **options) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    return [take(count, source, reader=reader, **options) for reader in READERS]


def assert_equal(batches, others) -> None:
    assert len(batches) == len(others)
    for (x, y), (other, labels) in zip(batches, others):
        assert torch.equal(x, other)
        assert x.stride() == other.stride()
        assert torch.equal(y, labels)


def workers() -> list[psutil.Process]:
    """Return this process's forks, without a server that other tests have started."""
    parent = psutil.Process()
    living = [child for child in parent.children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if child.cmdline() == parent.cmdline()]


# -- the same stream --


@pytest.mark.parametrize("world", [1, 2])
def test_images_are_dalis_to_the_bit(tmp_path, world):
    """Read lossless images unscaled, over the ends of epochs, in shards of uneven sizes, for each rank."""
    source = numbered_source(tmp_path, 11)
    for rank in range(world):
        assert_equal(*both(source, 8, batch=3, seed=5, rank=rank, world=world, threads=3, **GRAY))


def test_the_shipped_set_is_dalis_to_the_bit():
    assert_equal(*both(open_source("fashion_mnist"), 4, batch=50, size=28, channels=1, seed=2))


@pytest.mark.parametrize("readers", [("torch", "torch"), ("dali", "torch"), ("torch", "dali")])
def test_resume_is_bit_equal_whatever_reads(tmp_path, readers):
    """Resume in the middle, into a loader that has prefetched, maybe with the other reader."""
    source = numbered_source(tmp_path, 11)
    options = {"batch": 4, "seed": 7, "prefetch": 3, **GRAY}
    whole = take(7, source, reader="dali", **options)
    first, second = (make_loader(source, reader=reader, **options) for reader in readers)
    with closing(first), closing(second):
        assert_equal([next(first) for _ in range(3)], whole[:3])
        next(second)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert_equal([next(second) for _ in range(4)], whole[3:])


@pytest.mark.parametrize("form", ["float16", "float32", "uint8"])
def test_latents_are_dalis_to_the_bit(tmp_path, form):
    posteriors = np.abs(np.random.default_rng(0).normal(size=(11, 4, 3, 5, 7)))
    source = latent_source(tmp_path, quantize(posteriors[:, ::2]) if form == "uint8" else posteriors.astype(form))
    options = {"batch": 4, "size": (5, 7), "channels": 3, "seed": 3, "latent_scale": 0.5, "latent_shift": 0.25}
    for rank in range(2):
        assert_equal(*both(source, 8, rank=rank, world=2, **options))
    with closing(make_loader(source, reader="torch", **options)) as loader:
        seen = [next(loader) for _ in range(3)]
        loader.load_state_dict(loader.state_dict())
        seen += [next(loader) for _ in range(3)]
        assert loader.reading == "read by 2 threads"
    assert_equal(seen, take(6, source, reader="dali", **options))


def test_batches_kept_stay_what_they_were(tmp_path):
    """Check that filling the workers' memory again does not touch the batches that were returned."""
    batches = take(30, numbered_source(tmp_path, 11), batch=4, seed=2, reader="torch", **GRAY)
    for step, (x, _) in enumerate(batches):
        assert numbers_and_flips(x)[0] == Order(11, 4, seed=2).request(4 * step).ids.tolist()


def test_torchs_random_numbers_are_left_alone(tmp_path):
    source = numbered_source(tmp_path, 5)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(2, source, batch=2, reader="torch", **GRAY)
    assert torch.equal(torch.rand(3), expected)


# -- the same pixels --


def test_every_orientation_is_turned_as_dali_does(tmp_path):
    files = {}
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for form, options in (("PNG", {}), ("JPEG", {"quality": 95, "subsampling": 0})):
            files[f"{orientation}-{form}.png"] = encode(Image.fromarray(picture(16, 24)), form, exif=exif, **options)
    source = tree(tmp_path, files)
    for size in ((16, 24), (24, 16)):
        (dali, _), (pillow, _) = (batches[0] for batches in both(source, batch=16, size=size, channels=3, flip=False))
        upright = slice(0, 8) if size == (16, 24) else slice(8, 16)  # those that nothing scales
        assert np.abs(levels(dali) - levels(pillow))[upright].max() < 3


def test_palettes_bits_and_depths(tmp_path):
    """Count a palette as RGB, also one with a transparent color, and round 16 bits to 8 instead of cutting them off."""
    color = Image.fromarray(picture(16, 16))
    deep = Image.fromarray((np.arange(256, dtype=np.uint16) * 257 - np.arange(256)).astype(np.uint16).reshape(16, 16))
    (tmp_path / "color").mkdir()
    (tmp_path / "gray").mkdir()
    palettes = {"a.png": encode(color.convert("P"), "PNG"), "b.png": encode(color.convert("P"), "PNG", transparency=3)}
    grays = {"a.png": encode(color.convert("1"), "PNG"), "b.png": encode(deep, "PNG")}
    grays["c.png"] = encode(color.convert("L"), "PNG", transparency=9)
    for name, files, channels in (("color", palettes, 3), ("gray", grays, 1)):
        options = {"batch": len(files), "size": 16, "channels": channels, "shuffle": False, "flip": False}
        assert_equal(*both(tree(tmp_path / name, files), **options))


@pytest.mark.parametrize(("channels", "file", "suffix", "message"), OTHER_CHANNELS)
def test_other_channels_are_refused_or_converted_alike(tmp_path, channels, file, suffix, message):
    source = tree(tmp_path, {f"odd.{suffix}": file})
    options = {"batch": 1, "size": 8, "channels": channels, "flip": False}
    texts = []
    for reader in READERS:
        with pytest.raises(UserError, match=message) as error:
            take(1, source, reader=reader, **options)
        texts.append(str(error.value))
    assert texts[0] == texts[1]
    (dali, _), (pillow, _) = (batches[0] for batches in both(source, convert=True, **options))
    assert np.abs(levels(dali) - levels(pillow)).max() < 12


@pytest.mark.parametrize("size", [(32, 32), (28, 41)])
def test_scaled_images_differ_by_a_few_levels_at_the_border(tmp_path, size):
    """Shrink and enlarge images; the last three have a scaled side of exactly k + 1/2 pixels."""
    extents = [(61, 83), (83, 61), (200, 133), (20, 33), (333, 101), (16, 17), (64, 101), (101, 64), (28 * 48, 54 * 28)]
    files = {f"{i}.png": encode(picture(*extent, seed=i), "PNG") for i, extent in enumerate(extents)}
    options = {"batch": len(files), "size": size, "channels": 3, "shuffle": False, "flip": False}
    (dali, _), (pillow, _) = (batches[0] for batches in both(tree(tmp_path, files), **options))
    difference = np.abs(levels(dali) - levels(pillow))
    assert difference[:, 6:-6, 6:-6].max() < 2.01
    assert difference.mean() < 0.5


def test_an_image_above_pillows_own_limit_is_read(tmp_path, recwarn):
    """Read 179 million pixels, which Pillow refuses as a bomb; the limit of all readers is 2^28."""
    source = tree(tmp_path, {"large.png": encode(Image.new("1", (13400, 13400), 1), "PNG")})
    x, _ = take(1, source, batch=1, threads=1, prefetch=0, reader="torch", size=8, channels=1)[0]
    assert (x == 1).all()
    assert not recwarn


# -- the same refusals --


def test_cut_files_are_refused_as_dali_refuses_them(tmp_path):
    image = picture(20, 20)
    files = [numbered(1)[0], encode(image, "PNG"), encode(image, "JPEG"), encode(image, "JPEG", progressive=True)]
    files += [encode(image, "WEBP"), encode(image, "WEBP", lossless=True)]
    cuts = {}
    for k, file in enumerate(files):
        for cut in (0, 1, 2, 4, 5, 8, 12, 13, 16, 17, 20, len(file) // 2, len(file) - 9):
            cuts[f"{k}-{cut:04d}.png"] = file[: len(file) - cut]
        damaged = bytearray(file)
        damaged[-15] ^= 4  # in a PNG, the checksum of its pixels
        cuts[f"{k}-flip.png"] = bytes(damaged)
    source = tree(tmp_path, cuts)
    corrupt = []
    for reader in READERS:
        options = {"size": (8, 8), "device": CPU, "on_corrupt": "skip", "reader": reader}
        intact = [ids for ids, _ in read_in_order(source, [np.arange(source.n)], **options)]
        corrupt.append(set(range(source.n)) - set(np.concatenate(intact).tolist()))
    assert corrupt[0] == corrupt[1]
    assert len(files) < len(corrupt[0]) < source.n


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_corrupt_images_stop_or_are_skipped_alike(tmp_path, name):
    bad = (name.partition(".")[2], BAD_IMAGES[name])
    source = source_with(tmp_path, {2: bad, 3: bad, 9: bad})
    options = {"batch": 3, "seed": 4, **GRAY}
    texts, states = [], []
    for reader in READERS:
        with pytest.raises(UserError) as error:
            take(4, source, reader=reader, **options)
        texts.append(str(error.value))
        with closing(make_loader(source, reader=reader, on_corrupt="skip", **options)) as loader:
            states.append(([next(loader) for _ in range(8)], loader.state_dict(), loader.skipped))
    assert texts[0] == texts[1]
    assert_equal(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:]
    assert states[0][2] == 3


def test_an_image_that_vanished_is_named(tmp_path):
    source = tree(tmp_path, {f"{i}.png": file for i, file in enumerate(numbered(4))})
    (tmp_path / "a" / "2.png").unlink()
    with closing(make_loader(source, batch=1, shuffle=False, flip=False, reader="torch", **GRAY)) as loader:
        for _ in range(2):
            next(loader)
        for _ in range(2):  # asked again, it says it again
            with pytest.raises(UserError, match=r"2\.png: cannot be read") as error:
                next(loader)
            assert "\n" not in str(error.value)
    assert workers() == []


# -- workers --


@pytest.fixture
def endless(tmp_path):
    """Yield a loader of 2 workers that have begun."""
    with closing(make_loader(numbered_source(tmp_path, 11), batch=4, threads=2, reader="torch", **GRAY)) as loader:
        next(loader)
        assert len(workers()) == 2
        yield loader


def test_closing_ends_the_workers(endless):
    handler = signal.getsignal(signal.SIGCHLD)
    endless.close()
    assert workers() == []
    assert signal.getsignal(signal.SIGCHLD) is handler is signal.SIG_DFL
    next(endless)
    assert len(workers()) == 2


def test_a_killed_worker_ends_in_one_line(endless):
    """Deliver the prepared batches. After the error the loader can start again at the same place."""
    workers()[0].kill()
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^data.threads: a process that decodes images ended unexpectedly") as error:
        deque(endless, maxlen=0)
    assert "\n" not in str(error.value)
    assert time.monotonic() - begin < 30
    assert workers() == []
    position = endless.position
    assert position > 4
    assert numbers_and_flips(next(endless)[0])[0] == Order(11, 4).request(position).ids.tolist()


def test_signals_to_all_processes_do_not_end_a_worker(endless):
    """Send Ctrl-C and a launcher's SIGTERM, while the run may still have a step to end and a checkpoint to save."""
    for _ in range(2):  # one batch of each worker: both have begun
        next(endless)
    for number in ("INT", "TERM"):
        subprocess.run(["kill", f"-{number}", *(str(worker.pid) for worker in workers())], check=True)
    time.sleep(1)
    assert len(workers()) == 2
    for _ in range(12):
        next(endless)


READING = """
import os, psutil, signal, sys, time
from fastdit.data import make_loader, open_source
loader = make_loader(open_source("fashion_mnist"), batch=64, size=28, channels=1, reader="torch")
next(loader)
print(*(child.pid for child in psutil.Process().children()), flush=True)
"""


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("end", ["killed", "returns", "exits"])
def test_workers_end_with_the_program(end):
    """End the program in several ways, without closing the loader."""
    last = {"killed": "time.sleep(600)", "returns": "", "exits": "os._exit(2)"}[end]
    with subprocess.Popen([sys.executable, "-c", READING + last], stdout=subprocess.PIPE, text=True) as program:
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2
        if end == "killed":
            os.kill(program.pid, signal.SIGKILL)
        program.wait(60)
        until = time.monotonic() + 30
        while not all(map(gone, pids)) and time.monotonic() < until:
            time.sleep(0.1)
        assert all(map(gone, pids))


# -- a machine without DALI --


def test_dali_missing_is_told_or_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delitem(sys.modules, "fastdit.data.pipeline", raising=False)
    source = numbered_source(tmp_path, 5)
    loader = make_loader(source, batch=2, threads=3, **GRAY)
    assert loader.reading == "read by torch DataLoader with Pillow, 3 workers (NVIDIA DALI is not installed)"
    assert make_loader(source, batch=2, threads=1, reader="torch", **GRAY).reading.endswith("Pillow, 1 worker")
    with pytest.raises(
        UserError, match=r"^data.reader: NVIDIA DALI is not installed; pip install .*--data.reader torch$"
    ):
        make_loader(source, batch=2, reader="dali", **GRAY)
    with pytest.raises(ValueError, match="reader='other'"):
        make_loader(source, batch=2, reader="other", **GRAY)


def test_a_dali_that_does_not_load_is_told(tmp_path, monkeypatch):
    """Import a DALI that lacks a library, as one for another CUDA version does."""
    (tmp_path / "nvidia" / "dali").mkdir(parents=True)
    (tmp_path / "nvidia" / "dali" / "__init__.py").write_text("raise OSError('libcudart.so.99: cannot open\\nmore')")
    code = f"""
import nvidia
nvidia.__path__ = [{str(tmp_path / "nvidia")!r}, *nvidia.__path__]
from fastdit.data.readers import choose_backend
print(choose_backend("auto").describe("image", 2))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason = "(NVIDIA DALI cannot be imported: libcudart.so.99: cannot open)"
    assert ended.stdout == f"read by torch DataLoader with Pillow, 2 workers {reason}\n"


def test_writing_shards_and_reading_them_in_order_agree(tmp_path):
    """Compare the readers of evaluation and encoding: equal images, and the same ones left out."""
    files = numbered(9)
    files[4] = BAD_IMAGES["cut.png"]
    write_shards(tmp_path / "s-%d.tar", ((f"{i}", {"png": f, "cls": b"0"}) for i, f in enumerate(files)), 4)
    source, found = open_source(str(tmp_path)), []
    for reader in READERS:
        batches = [np.array([0, 1, 2]), np.array([3, 4, 5]), np.array([8])]
        options = {"size": (5, 7), "device": CPU, "on_corrupt": "skip", "reader": reader}
        found.append(list(read_in_order(source, batches, **options)))
    assert [ids.tolist() for ids, _ in found[1]] == [[0, 1, 2], [3, 5], [8]]
    for (ids, x), (others, other) in zip(*found):
        assert ids.tolist() == others.tolist()
        assert x.shape == (len(ids), 3, 5, 7)
        assert torch.equal(x, other)
