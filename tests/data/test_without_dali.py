"""Run commands without NVIDIA DALI: they train, encode and check, name the reader, and agree with DALI."""

import re
from pathlib import Path

import pytest
from data_helpers import encode, numbered_source, picture
from launching import TIMES, TINY, Outcome, forked, metrics

from fastdit.data import write_shards

WITHOUT = "read by torch DataLoader with Pillow, 1 worker (NVIDIA DALI is not installed)"


def run(module: str, *flags, dali: bool) -> Outcome:
    """Run a command of fastdit, in a process with or without DALI."""
    return forked(*flags, program=module) if dali else forked(module, *flags, program="without_dali")


def untimed(folder: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in metrics(folder)]


@pytest.mark.launch
def test_training_from_images_says_so_and_is_the_same(tmp_path):
    """Train on unscaled images with equal losses, and continue a run with the other reader."""
    flags = [*TINY, "--steps", 4, "--save_every", 2]
    for dali in (True, False):
        out = tmp_path / f"{dali}"
        outcome = run("fastdit.train", *flags, "--out", out, dali=dali).succeeded()
        assert (WITHOUT in outcome.text, "28x28, read by DALI" in outcome.text) == (not dali, dali)
    assert untimed(tmp_path / "True") == untimed(tmp_path / "False")
    more = ["--resume", "--out", tmp_path / "False", "--steps", 6]
    assert "resumed" in run("fastdit.train", *more, "--data.reader", "torch", dali=True).succeeded().text
    assert len(metrics(tmp_path / "False")) == 6


@pytest.mark.launch
def test_dali_asked_for_is_refused_in_one_line(tmp_path):
    outcome = run("fastdit.train", *TINY, "--data.reader", "dali", "--out", tmp_path / "run", dali=False)
    assert outcome.code == 2
    assert "error: data.reader: NVIDIA DALI is not installed; pip install" in outcome.text
    assert "Traceback" not in outcome.text


@pytest.mark.launch
def test_images_become_latents_kept_in_memory(tmp_path):
    """Encode to the same bytes with and without DALI, train on latents in memory, and resume."""

    def samples():
        for i in range(30):
            yield f"s{i:02d}", {"png": encode(picture(28, 28, seed=i), "PNG"), "cls": str(i % 10).encode()}

    (tmp_path / "images").mkdir()
    write_shards(tmp_path / "images" / "i-%d.tar", samples(), 12)
    fixed = ["--source", tmp_path / "images", "--size", 28, "--autoencoder", "identity", "--device", "cpu"]
    fixed += ["--threads", 1, "--per_shard", 16]
    for dali in (True, False):
        outcome = run("fastdit.encode", *fixed, "--out", tmp_path / f"{dali}", dali=dali).succeeded()
        assert ("NVIDIA DALI is not installed" in outcome.text) == (not dali)
    written = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("True", "False")]
    assert len(written[0]) == 4
    assert written[0] == written[1]

    data = ["--data.source", tmp_path / "False", "--data.channels", 3, "--data.cache", "device"]
    flags = [*TINY, *data, "--save_every", 2, "--out", tmp_path / "run"]
    outcome = run("fastdit.train", *flags, "--steps", 2, dali=False).succeeded()
    assert "GB kept on cpu)" in outcome.text
    assert "read by" not in outcome.text
    run("fastdit.train", "--resume", "--out", tmp_path / "run", "--steps", 4, dali=False).succeeded()
    run("fastdit.train", *flags[:-1], tmp_path / "read", "--data.cache", "none", "--steps", 4, dali=True).succeeded()
    assert untimed(tmp_path / "run") == untimed(tmp_path / "read")


@pytest.mark.launch
def test_checking_decodes_with_pillow(tmp_path):
    numbered_source(tmp_path, 11)
    texts = [
        run("fastdit.commands.data_tools", "check", tmp_path, dali=dali).succeeded().text for dali in (True, False)
    ]
    assert "11 images decode (11 gray; 5 x 7 pixels)" in texts[0]
    assert texts[1] == texts[0].replace("images decode", "images decode by Pillow")
    with (tmp_path / "n-01.tar").open("r+b") as file:  # image 4's pixels
        file.seek(512 + 45)
        file.write(b"damaged")
    texts = [run("fastdit.commands.data_tools", "check", tmp_path, dali=dali).text for dali in (True, False)]
    assert "n-01.tar: byte 512: 's004': the image is corrupt and cannot be decoded" in texts[0]
    of_dali = re.compile("libpng |.* Pillow is tried on them$")
    lines = [[line for line in text.splitlines() if not of_dali.match(line)] for text in texts]
    assert lines[0] == lines[1]
