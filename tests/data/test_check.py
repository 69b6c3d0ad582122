"""Test `fastdit-data check`, and shards damaged in 200 seeded ways.

Each damage ends in a clear report, and never in a hang, a traceback or an unseen wrong label.
"""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from damage import DAMAGES, damaged, samples_held, time_limit, walk
from data_helpers import decode, encode, levels, picture, take
from PIL import Image
from test_data_bad import npy

from fastdit.commands import data_check
from fastdit.data import open_source, write_shards
from fastdit.data.manifest import build_manifest, write_json
from fastdit.data.shards import ShardSamples
from fastdit.data.tar_archives import tar_members
from fastdit.errors import UserError

CASES, CLASSES = 200, 4
FORMS = ("png", "jpg", "npy")
SHAPE = (4, 2, 3, 5)  # of a latent
MOST_CLASSES = 1_000_000
WHOLE_FILE = ("replaced by another shard", "removed")
KINDS = (*DAMAGES, *WHOLE_FILE)


def payload(form: str, i: int) -> bytes:
    if form == "npy":
        return npy(np.random.default_rng(i).uniform(0.1, 1, SHAPE).astype(np.float16))
    return encode(picture(9, 12, seed=i), "PNG" if form == "png" else "JPEG")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Make a folder for each of FORMS: 17 samples in 3 shards, with a manifest; the PNGs with class names."""
    root = tmp_path_factory.mktemp("whole")
    for form in FORMS:
        (root / form).mkdir()
        labels = [str(i % CLASSES).encode() for i in range(17)]
        texts = [b'{"label": %s, "caption": "a b"}' % label if form == "jpg" else label for label in labels]
        label = "json" if form == "jpg" else "cls"
        samples = [(f"{form}/s{i:03d}", {form: payload(form, i), label: text}) for i, text in enumerate(texts)]
        write_shards(root / form / "a-%d.tar", samples, 6)
        if form == "png":
            (root / form / "classes.json").write_text(json.dumps(list("abcd")))
        data_check.run([str(root / form), "--write_manifest", "true"])
    return root


def damage(whole: Path, folder: Path, case: int) -> Path:
    """Copy a set to `folder`, damage one shard of it, and return that shard's path."""
    rng = np.random.default_rng(case)
    kind, form = KINDS[case % len(KINDS)], FORMS[case // len(KINDS) % len(FORMS)]
    shutil.copytree(whole / form, folder)
    shards = sorted(folder.glob("*.tar"))
    k = int(rng.integers(len(shards)))
    if kind == "removed":
        shards[k].unlink()
    elif kind == "replaced by another shard":
        shutil.copy(shards[k - 1], shards[k])
    else:
        shards[k].write_bytes(damaged(kind, rng, shards[k].read_bytes()))
    return shards[k]


def problems(capsys, *arguments: str) -> list[str]:
    """Return the lines that `fastdit-data check` prints when it finds problems."""
    capsys.readouterr()
    with pytest.raises(UserError) as error:
        data_check.run([*arguments])
    lines = capsys.readouterr().out.splitlines()
    count, files = map(int, re.search(r": (\d+) problems? in (\d+) files?; ", str(error.value)).groups())
    assert count == len(lines)
    assert files == len({line.partition(": ")[0] for line in lines})
    return lines


@pytest.mark.parametrize("case", range(CASES))
def test_with_a_manifest_every_damage_is_reported(whole, tmp_path, capsys, case):
    shard = damage(whole, tmp_path / "x", case)
    with time_limit(10):
        lines = problems(capsys, str(tmp_path / "x"))
    assert any(line.startswith(f"{shard}: ") for line in lines)
    assert all(line.startswith(f"{tmp_path}/x/") and line.isprintable() and len(line) < 500 for line in lines)
    if shard.exists() and (broken := walk(shard.read_bytes())[1]) is not None:
        assert any(line.startswith(f"{shard}: byte {broken}: ") for line in lines)


# Changes that nobody can see without a manifest. Every other change is refused, or changes nothing that is read.
UNSEEN = {
    "flip_bits": {"labels", "contents"},
    "flip_label_bits": {"labels"},
    "flip_payload_bits": {"contents"},
    "flip_payload_head_bits": {"contents"},
    "overwrite": {"labels", "contents"},
    "overwrite_payload": {"contents"},
    "cut_out_blocks": {"missing", "labels"},  # a whole number of members, or from one label to the next
    "zero_blocks": {"contents", "missing"},
    "zero_the_end": {"missing"},
    "other_size": {"contents"},
    "swap_members": {"order"},
    "exchange_labels": {"labels"},
    "exchange_payloads": {"contents"},
    "remove_sample": {"missing"},
    "replaced by another shard": {"missing", "twice"},
    "removed": {"missing"},
}


def changes(before: list[tuple[str, int, bytes]], after: list[tuple[str, int, bytes]]) -> set[str]:
    """Return the ways in which two lists of samples (key, label, payload) differ."""
    old = {key: (label, content) for key, label, content in before}
    keys = [key for key, _, _ in after]
    found = {
        "missing": old.keys() - keys,
        "twice": len(keys) != len(set(keys)),
        "new": keys - old.keys(),
        "labels": any(key in old and label != old[key][0] for key, label, _ in after),
        "contents": any(key in old and content != old[key][1] for key, _, content in after),
        "order": set(keys) == old.keys() and keys != list(old),
    }
    return {name for name, so in found.items() if so}


def can_be_read(form: str, shards: list[list | None]) -> bool:
    """Return whether the shards hold whole samples with valid labels, and latents of one form."""
    if None in shards or not any(shards):
        return False
    samples = [sample for shard in shards for sample in shard]
    if not all(0 <= label < (CLASSES if form == "png" else MOST_CLASSES) for _, label, _ in samples):
        return False
    if form != "npy":
        return True
    whole = payload("npy", 0)
    return all(len(content) == len(whole) and content[:128] == whole[:128] for _, _, content in samples)


def attempt(call, *args, **options):
    """Return (result, None) of a call, or (None, line) if it ends in a UserError."""
    try:
        return call(*args, **options), None
    except UserError as error:
        line = str(error)
    assert line.isprintable()
    assert len(line) < 500
    return None, line


@pytest.mark.parametrize("case", range(CASES))
def test_without_a_manifest_nothing_is_read_but_what_the_tar_holds(whole, tmp_path, case):
    form, kind = FORMS[case // len(KINDS) % len(FORMS)], KINDS[case % len(KINDS)]
    shard = damage(whole, tmp_path / "x", case)
    (tmp_path / "x" / "manifest.json").unlink()
    shards = [samples_held(path) for path in sorted((tmp_path / "x").glob("*.tar"))]
    with time_limit(10):
        source, refusal = attempt(open_source, str(tmp_path / "x"))
        assert (refusal is None) == can_be_read(form, shards)
        if refusal:
            assert refusal.startswith(f"{shard}: ")
            broken = walk(shard.read_bytes())[1]
            assert broken is None or f": byte {broken}: " in refusal or "has two files" in refusal
            return
        samples = [sample for part in shards for sample in part]
        assert [source.where(i).split("'")[1] for i in range(source.n)] == [key for key, _, _ in samples]
        assert source.labels.tolist() == [label for _, label, _ in samples]
        original = [s for path in sorted((whole / form).glob("*.tar")) for s in samples_held(path)]
        unseen = changes(original, samples)
        assert unseen <= UNSEEN.get(kind if isinstance(kind, str) else kind.__name__, set())
        if form == "npy":
            read_latents(source, samples)
        else:
            read_images(source, samples, [content for _, _, content in original], form, shard)


def read_latents(source, samples: list) -> None:
    for i, (_, _, content) in enumerate(samples):
        assert np.array_equal(source.read(i), np.load(io.BytesIO(content)), equal_nan=True)
    _, y = take(1, source, batch=source.n, size=SHAPE[2:], channels=SHAPE[1], shuffle=False)[0]
    assert y.tolist() == source.labels.tolist()


def read_images(source, samples: list, known: list[bytes], form: str, shard: Path) -> None:
    """Assert that the loader refuses a damaged image, or yields the pixels and labels that the tar holds."""
    assert all(source.read(i).tobytes() == content for i, (_, _, content) in enumerate(samples))
    options = {"batch": source.n, "size": (9, 12), "channels": 3, "shuffle": False, "flip": False}
    batches, refusal = attempt(take, 1, source, **options)
    if refusal:
        assert refusal.startswith(f"{shard}: byte ")
        assert any(f": {key!r}: " in refusal for key, _, content in samples if content not in known)
        return
    x, y = batches[0]
    assert y.tolist() == source.labels.tolist()
    assert x.isfinite().all()
    for pixels, (_, _, content) in zip(levels(x), samples):
        if content in known or form == "png":  # decoders differ on damaged JPEGs
            assert np.abs(pixels - decode(content)).max() < (1e-4 if form == "png" else 2 + 1e-4)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_damaged(form):
    """Damage long names, which are members of their own before the member they name; no checksum covers them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name in ("a" * 120 + ".png", "é" * 70 + ".png"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
    rng, whole = np.random.default_rng(0), np.frombuffer(out.getvalue(), np.uint8)
    assert [n for _, _, n in tar_members(Path("x.tar"), whole)] == [700, 700]
    with time_limit(20):
        for _ in range(400):
            data = whole.copy()
            start = rng.integers(4000)
            data[start : start + rng.integers(1, 20)] = rng.integers(256, dtype=np.uint8)
            found: list[UserError] = []
            names = [name for name, _, _ in tar_members(Path("x.tar"), data, found.append)]
            assert all(str(error).startswith("x.tar: byte ") and str(error).isprintable() for error in found)
            assert found or len(names) == 2


# Other reports


def write(folder: Path, pattern: str, samples: list[tuple[str, dict[str, bytes]]], per_shard: int = 100) -> Path:
    folder.mkdir(exist_ok=True)
    write_shards(folder / pattern, samples, per_shard)
    return folder


def summary(capsys, *arguments: str) -> str:
    capsys.readouterr()
    data_check.run([*map(str, arguments)])
    line, *more = capsys.readouterr().out.splitlines()
    assert not more
    return line


def test_sets_that_are_whole(whole, capsys):
    assert summary(capsys, "fashion_mnist", "--decode", "false") == (
        "fashion_mnist: 10000 samples, 10 classes, 10 shards, 23.2 MB; images not decoded; "
        "shards, checksums and counts are manifest.json's"
    )
    line = summary(capsys, whole / "png")
    assert "17 samples, 4 classes, 3 shards, 61.4 kB; 17 images decode (17 color; 9 x 12 pixels)" in line
    assert "latents float16 (2, 3, 5) with mirrored ones are finite, none far out of range" in summary(
        capsys, whole / "npy"
    )
    assert ": 12 samples" in summary(capsys, f"{whole}/jpg/a-{{0..1}}.tar")  # a choice of shards: none is missing
    assert ": 5 samples, 9 classes (5 without samples), 1 shards" in summary(
        capsys, f"{whole}/jpg/a-2.tar", "--classes", "9"
    )


def test_kinds_and_sizes_of_images(tmp_path, capsys):
    for i, (mode, size) in enumerate((("L", (9, 7)), ("RGB", (30, 20)), ("RGBA", (8, 8)), ("LA", (9, 8)))):
        (tmp_path / f"c{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"c{i % 2}" / f"{i}.png").write_bytes(encode(Image.new(mode, size), "PNG"))
    line = summary(capsys, tmp_path)
    assert "4 samples, 2 classes; 4 images decode (1 gray, 1 gray with alpha, 1 color, 1 with alpha, or CMYK;" in line
    assert "7 x 9 to 20 x 30 pixels); class folders have no manifest" in line
    (tmp_path / "c1" / "bad.png").write_bytes(b"no image")
    (line,) = problems(capsys, str(tmp_path))
    assert line.startswith(f"{tmp_path}/c1/bad.png: the image is corrupt")
    assert "images not decoded" in summary(capsys, tmp_path, "--decode", "false")


def test_each_bad_image_of_many_is_named(tmp_path, capsys):
    """Put bad images into the first batch, twice into one batch, and into the last one, which is not full."""
    bad, good = (3, 40, 63, 69), encode(picture(9, 12), "JPEG")
    samples = [(f"s{i}", {"jpg": good[:60] if i in bad else good, "cls": b"0"}) for i in range(70)]
    lines = problems(capsys, str(write(tmp_path / "x", "a-%d.tar", samples, 50)))
    assert [re.search(r"(a-\d.tar): byte \d+: '(s\d+)': the image is corrupt", line).groups() for line in lines] == [
        (f"a-{i // 50}.tar", f"s{i}") for i in bad
    ]


def test_all_problems_of_samples_are_told(tmp_path, capsys):
    png, latent = payload("png", 0), payload("npy", 0)
    samples = [
        ("a", {"png": png, "cls": b"0"}),
        ("b", {"png": png}),
        ("c", {"cls": b"0"}),
        ("d", {"png": png, "cls": b"cat"}),
        ("e", {"png": png, "jpg": png, "cls": b"0"}),
        ("f", {"npy": latent, "cls": b"0"}),
        ("g", {"png": b"", "cls": b"0"}),
        ("h", {"png": png, "cls": b"7"}),
        ("i", {"png": png, "cls": b"1"}),
    ]
    folder = write(tmp_path / "x", "a-%d.tar", samples)
    write(folder, "b-%d.tar", [samples[0], ("j", samples[0][1]), samples[-1]])
    (folder / "classes.json").write_text('["x", "y"]')
    (folder / ".unfinished").mkdir()
    lines = problems(capsys, str(folder))
    patterns = [
        r"x: not all of its samples are written yet",
        r"a-0.tar: byte \d+: 'b' has no label",
        r"a-0.tar: byte \d+: 'c' has no image",
        r"a-0.tar: byte \d+: 'd.cls' holds no class number",
        r"a-0.tar: byte \d+: 'e' has 2 images",
        r"a-0.tar: byte \d+: 'f': mixes",
        r"b-0.tar: byte 512: 'a': a-0.tar has a sample of that key too \(2 such keys\)",
        r"a-0.tar: byte \d+: 'h': label 7 is out of range for 2 classes",
        r"a-0.tar: byte \d+: 'g': the image is corrupt",
    ]
    assert len(lines) == len(patterns)
    assert all(re.search(pattern, line) for pattern, line in zip(patterns, lines))
    tar = (folder / "a-0.tar").read_bytes()
    for line, content in ((lines[3], b"cat"), (lines[7], png)):
        offset = int(re.search(r"byte (\d+)", line).group(1))
        assert tar[offset : offset + len(content)] == content


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        ((0, 1), np.nan, "not finite"),
        ((3, 0), np.inf, "not finite"),
        ((1, 1), -0.5, "negative"),
        ((3, 1), -1, "negative"),
        ((2, 0), -1e30, r"has a value of 1e\+30, and the largest value of most is about 1;"),
        ((3, 1), 1e30, r"has a value of 1e\+30"),
        ((0, 0), 2000, r"has a value of 2e\+03"),
    ],
)
def test_values_of_latents(tmp_path, capsys, at, value, message):
    latents = np.random.default_rng(0).uniform(0.1, 1, (5, *SHAPE)).astype(np.float32)
    latents[0, 0] = -1  # a mean may be
    latents[3][at] = value
    folder = write(tmp_path / "x", "a-%d.tar", [(f"s{i}", {"npy": npy(z), "cls": b"0"}) for i, z in enumerate(latents)])
    manifest = build_manifest(ShardSamples(sorted(folder.glob("*.tar"))), 1)
    write_json(folder / "manifest.json", manifest | {"channel_mean": [0.5, 0.5], "channel_std": [0.3, 0.3]})
    (line,) = problems(capsys, str(folder))
    assert re.search(rf"a-0.tar: byte \d+: 's3': .* {message}", line)


def test_the_latent_that_is_stored_unlike_most_is_named(tmp_path, capsys):
    odd, usual = npy(np.zeros(SHAPE, np.float32)), npy(np.zeros(SHAPE, np.float16))
    samples = [(f"s{i}", {"npy": z, "cls": b"0"}) for i, z in enumerate((odd, usual, usual, b"none"))]
    lines = problems(capsys, str(write(tmp_path / "x", "a-%d.tar", samples)))
    assert [re.search(r"'(s\d)': (.*?latent)", line).groups() for line in lines] == [
        ("s3", "no latent"),
        ("s0", "the latent"),
    ]


def test_the_manifest_and_the_folder(whole, tmp_path, capsys):
    folder = shutil.copytree(whole / "png", tmp_path / "x")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "a-0.tar").rename(folder / "z.tar")
    manifest["counts"][2] += 1
    manifest["shards"]["a-1.tar"]["samples"] = 7
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert problems(capsys, str(folder)) == [
        f"{folder}/a-0.tar: the shard is missing; copy it from where the others came from",
        f"{folder}/a-1.tar: 6 samples can be read, manifest.json says 7; copy it again",
        f"{folder}/z.tar: is not in manifest.json; remove it, or make a manifest anew",
        f"{folder}/manifest.json: samples of a class are not as many as it says (2: 4, not 5); "
        "see which shards have changed",
    ]
    (folder / "manifest.json").write_text("{}")
    (line,) = problems(capsys, str(folder))
    assert line.startswith(f"{folder}/manifest.json: is no manifest")


def test_a_manifest_is_written_once_and_for_whole_sets(whole, tmp_path, capsys):
    for source, message in (
        (whole / "png", "manifest.json: is there already"),
        (f"{whole}/png/a-0.tar", "is there already"),
        (tmp_path, "holds no shards"),
        ("synthetic", "holds no shards"),
    ):
        with pytest.raises(UserError, match=message):
            data_check.run([str(source), "--write_manifest", "true"])
    folder = shutil.copytree(whole / "png", tmp_path / "x")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not all of its folder"):
        data_check.run([f"{folder}/a-0.tar", "--write_manifest", "true"])
    (folder / "a-0.tar").write_bytes((folder / "a-0.tar").read_bytes()[:3000])
    with pytest.raises(UserError, match="problem"):
        data_check.run([str(folder), "--write_manifest", "true"])
    assert not (folder / "manifest.json").exists()


def test_the_command(tmp_path, capsys):
    """Check the exit code, the one closing line, and the number of problems printed."""
    samples = [(f"s{i}", {"png": payload("png", 0)}) for i in range(9)]
    folder = write(tmp_path / "x", "a-%d.tar", [("s", {"png": payload("png", 0), "cls": b"0"}), *samples])
    command = [sys.executable, "-m", "fastdit.commands.data_tools", "check", folder]
    ended = subprocess.run([*command, "--most", "4"], capture_output=True, text=True)
    assert ended.returncode == 2
    assert [line.partition("x/")[2][:14] for line in ended.stdout.splitlines()] == ["a-0.tar: byte "] * 4 + [""]
    assert ended.stdout.endswith("\nand 5 more\n")
    assert ended.stderr.strip() == f"error: {folder}: 9 problems in 1 file; each is printed above, with what to do"
    for arguments, message in (
        (["synthetic"], "nothing to check"),
        ([str(tmp_path / "none")], "no such file"),
        ([str(folder), "--most", "-1"], "at least 0"),
        ([str(folder), "--classes", "0"], "at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            data_check.run(arguments)
