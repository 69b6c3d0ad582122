"""benchmarks/loaders.py: both loaders give the same batches, turns are counted whole, and records and tables agree."""

import csv
import json
import multiprocessing
import shlex
import time
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import encode, latent_source, picture
from PIL import Image

from fastdit import distributed, run_parts
from fastdit.data import write_shards
from fastdit.errors import UserError
from fastdit.parser import parse

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def surroundings():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import loaders

        patch.setattr(loaders, "SECONDS", 0.0)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Shards of 11 JPEGs around 256 pixels, portrait and landscape, one of them turned by EXIF."""
    folder = tmp_path_factory.mktemp("photos")
    turned = Image.Exif()
    turned[0x0112] = 6

    def samples():
        for i in range(11):
            image = Image.fromarray(picture(300 - 7 * i, 256 + 9 * i, seed=i))
            options = {"exif": turned} if i == 4 else {}
            yield f"p{i:02d}", {"jpg": encode(image, "JPEG", quality=95, **options), "cls": str(i % 3).encode()}

    write_shards(folder / "p-%02d.tar", samples(), 4)
    return folder


def config_of(source, size: int, channels: int, *flags: str):
    base = f"--data.size {size} --data.channels {channels} --batch 3 --model.patch 1 --data.threads 2"
    return parse(["--data.source", str(source), *shlex.split(base), *flags])


def batches(config, count: int) -> list[tuple[tuple, tuple]]:
    """Return batches of fastdit's loader with DALI and of the DataLoader."""
    from loaders import OURS, THEIRS, open_loaders

    with ExitStack() as stack:
        loaders = open_loaders(config, run_parts.open_data(config), CPU)
        theirs, ours = (stack.enter_context(closing(loaders[name])) for name in (THEIRS, OURS))
        return [(next(ours), next(theirs)) for _ in range(count)]


def compared(pairs) -> list[torch.Tensor]:
    """Differences of x, after checking all else."""
    for (x, y), (other, labels) in pairs:
        assert x.dtype == other.dtype == torch.float32
        assert y.dtype == labels.dtype == torch.int64
        assert x.shape == other.shape
        assert torch.equal(y, labels)
    return [(x - other).abs() for (x, _), (other, _) in pairs]


def test_lossless_images_are_the_same():
    pairs = batches(config_of("fashion_mnist", 28, 1), 4)
    assert max(x.max().item() for x in compared(pairs)) < 1e-6
    plain = batches(config_of("fashion_mnist", 28, 1, "--data.flip", "false"), 4)
    assert not all(torch.equal(x, other) for (_, (x, _)), (_, (other, _)) in zip(pairs, plain))  # some were mirrored


def test_photos_are_the_same_but_for_the_decoder(photos):
    """Across the end of an epoch. The edges of what Pillow and DALI scale differ by design, a few levels."""
    for difference in compared(batches(config_of(photos, 256, 3), 5)):
        levels = difference * 127.5
        assert levels.mean() < 0.5
        assert levels[..., 4:-4, 4:-4].max() < 8


@pytest.mark.parametrize("mirrored", [False, True])
def test_latents_are_the_same_to_the_bit(tmp_path, mirrored):
    rng = np.random.default_rng(0)
    posteriors = rng.normal(size=(7, 4 if mirrored else 2, 4, 6, 6)).astype(np.float16)
    latent_source(tmp_path, posteriors)
    flags = ("--data.flip", str(mirrored).lower(), "--data.latent_scale", "0.5", "--data.latent_shift", "0.25")
    pairs = batches(config_of(tmp_path, 6, 4, *flags), 4)
    assert all(not x.any() for x in compared(pairs))


def test_a_turn_counts_what_was_made_ahead(monkeypatch):
    """Rate over the timed batches alone, processor time over all that were taken between two rests."""
    import loaders

    calls = []
    monkeypatch.setattr(loaders.time, "perf_counter", lambda: 0.25 * calls.count("batch"))

    class Fake:
        def __next__(self) -> None:
            calls.append("batch")

        def settle(self) -> float:
            calls.append("rest")
            return {1: 10.0, 2: 16.0}[calls.count("rest")]

    taken = loaders.take_turn(Fake(), config_of("fashion_mnist", 28, 1), CPU, Fake())
    ahead, timed = 8, 16
    assert calls == ["rest", *["batch"] * (ahead + timed), "rest"]
    assert taken.images_per_s == 3 / 0.25
    assert taken.cpu_s_per_1000 == pytest.approx(6.0 / ((ahead + timed) * 3) * 1e3)


def _burn(seconds: float, end) -> None:
    while time.process_time() < seconds:
        pass
    end.wait()


def test_workers_count_and_are_waited_for():
    from loaders import Processors

    fork = multiprocessing.get_context("fork")
    end = fork.Event()
    worker = fork.Process(target=_burn, args=(1.0, end), daemon=True)
    worker.start()
    try:
        processors = Processors()
        assert worker.pid in [child.pid for child in processors.workers]
        own = time.process_time()
        assert processors.settle() - own >= 0.95  # a worker's time is in steps of 10 ms, and begins at the fork
    finally:
        end.set()
        worker.join()


@pytest.fixture(scope="module")
def measured(photos):
    from loaders import measure_loaders

    return measure_loaders(config_of(photos, 64, 3), CPU, 3, "command")


def test_rows(measured):
    from loaders import COLUMNS, MEASURES

    ours, theirs = measured["rows"]
    assert (ours["loader"], theirs["loader"]) == ("fastdit", "DataLoader")
    for row in (ours, theirs):
        assert tuple(row) == COLUMNS
        assert row["turns"] == 3
        for measure in MEASURES:
            assert 0 < row[f"{measure}_p20"] <= row[f"{measure}_p50"] <= row[f"{measure}_p80"]
    assert [theirs[f"ratio_{q}"] for q in ("p20", "p50", "p80")] == [1, 1, 1]
    assert 0 < measured["settings"]["difference"] < 0.02
    assert measured["settings"]["shape"] == [3, 64, 64]
    assert measured["settings"]["samples"] == 11


def test_latents_are_kept_too(tmp_path):
    from loaders import KEPT, OURS, THEIRS, THREADS, measure_loaders

    latent_source(tmp_path, np.random.default_rng(0).normal(size=(7, 4, 4, 6, 6)).astype(np.float16))
    record = measure_loaders(config_of(tmp_path, 6, 4), CPU, 1, "command")
    assert [row["loader"] for row in record["rows"]] == [OURS, THREADS, KEPT, THEIRS]
    assert record["settings"]["difference"] == 0


def test_ratios_are_turn_by_turn():
    from loaders import Taken, _row

    ours, theirs = ([Taken(rate, 1.0) for rate in rates] for rates in ((10.0, 30.0, 40.0), (5.0, 10.0, 40.0)))
    row = _row("fastdit", "DALI", ours, theirs)
    assert (row["ratio_p50"], row["images_per_s_p50"]) == (2.0, 30.0)


def test_the_tables_come_from_the_records(measured, tmp_path):
    from loaders import LOADER, loader_lines
    from record import RECORDS, read, write_json, write_results

    page, (begin, end) = ROOT / "benchmarks" / "RESULTS.md", LOADER.markers
    copy = tmp_path / "README.md"
    copy.write_text(page.read_text())
    write_results(RECORDS, copy, LOADER)
    assert copy.read_text() == page.read_text()
    write_json(measured, tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps(measured | {"benchmark": "kernels"}))
    write_results(tmp_path, copy, LOADER)
    head, rest = copy.read_text().split(begin)
    body, tail = rest.split(end)
    assert body.count("\n".join(loader_lines(read(tmp_path / "a.json")))) == 1
    assert page.read_text().startswith(head + begin)
    assert page.read_text().endswith(end + tail)


def test_a_damaged_image_is_one_line(tmp_path):
    from loaders import THEIRS, open_loaders

    (tmp_path / "a").mkdir()
    for i in range(3):
        (tmp_path / "a" / f"{i}.jpg").write_bytes(encode(picture(20, 20), "JPEG")[: 300 if i == 1 else None])
    config = config_of(tmp_path, 16, 3)
    loaders = open_loaders(config, run_parts.open_data(config), CPU)
    with closing(loaders[THEIRS]) as loader, pytest.raises(UserError) as caught:
        next(loader)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / "a" / "1.jpg"))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--data synthetic", "nothing to decode"]),
        (["--data", "synthetic:3x8x8:2:9"], ["--data synthetic:3x8x8:2:9", "nothing to decode"]),
        (["--data", "fashion_mnist", "--against", "eager"], ["--loader_only", "--against"]),
        (["--data", "fashion_mnist", "--method", "sd_dit"], ["--loader_only", "--method"]),
        (["--data", "fashion_mnist", "--steps", "0"], ["--steps 0"]),
    ],
)
def test_bad_input_is_one_line(argv, words):
    from throughput import _benchmark

    with pytest.raises(UserError) as caught:
        _benchmark(["--loader_only", "--device", "cpu", *argv])
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_several_ranks_are_refused(monkeypatch):
    from throughput import _benchmark

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        _benchmark(["--loader_only", "--device", "cpu", "--data", "fashion_mnist"])


def test_the_command(tmp_path, monkeypatch, capsys):
    """The printed lines, the record and its rows hold the same figures."""
    import throughput
    from loaders import loader_lines

    monkeypatch.setattr(throughput.distributed, "start", lambda config: distributed.Runtime(0, 1, 0, CPU))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    flags = "--loader_only --data fashion_mnist --size 28 --channels 1 --batch 16 --device cpu --steps 1"
    files = ("--json", str(tmp_path / "r.json"), "--csv", str(tmp_path / "r.csv"))
    throughput._benchmark([*shlex.split(flags), "--data.threads", "1", *files])
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["benchmark"] == "loader"
    assert record["kind"] == "cpu"
    assert record["command"].startswith(f"python benchmarks/throughput.py {flags} --data.threads 1")
    assert record["settings"]["threads"] == 1
    assert "\n".join(loader_lines(record)) in capsys.readouterr().out
    with (tmp_path / "r.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{name: str(value) for name, value in row.items()} for row in record["rows"]]


@pytest.mark.parametrize(
    ("name", "shape"), [("photos", (3, 256, 256)), ("latents", (4, 32, 32)), ("latents8", (4, 32, 32))]
)
def test_data_made_when_asked_for(monkeypatch, name, shape):
    """It is what training reads, the same each time, and gone afterwards."""
    import made_data

    monkeypatch.setattr(made_data, "PHOTOS", 5)
    monkeypatch.setattr(made_data, "LATENTS", 5)
    seen = []
    for _ in range(2):
        with made_data.at_hand(name) as folder:
            config = config_of(folder, shape[1], shape[0])
            source = run_parts.open_data(config)
            assert source.labels.tolist() == [0, 1, 2, 3, 4]
            seen.append([source.read(i).tobytes() for i in range(5)])
            (pair,) = batches(config, 1)
            assert pair[0][0].shape == (3, *shape)
            (difference,) = compared([pair])
            assert difference.mean() < 0.01
        assert not Path(folder).exists()
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 5
    with made_data.at_hand("elsewhere") as path:
        assert path == "elsewhere"
