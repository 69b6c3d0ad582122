"""Test `fastdit-data weights` against a server on this machine that publishes small files of the same layouts."""

import errno
import fcntl
import hashlib
import os
import re
import shlex
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from autoencoder_helpers import diffusers_model
from fetch_helpers import Server, printed, refused
from safetensors.torch import load, save
from weights_helpers import diffusers_folder, dit, publish, reference_batch, saved, sit, small_networks

from fastdit.data.sets import download
from fastdit.models import open_autoencoder, weight_content
from fastdit.models.known_weights import KNOWN, verified_weights
from fastdit.parser import parse
from fastdit.sample import _parser as _draw_parser

DIT, WEIGHTS = "DiT-XL-2-256x256.pt", "diffusion_pytorch_model.safetensors"
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def original() -> bytes:
    return saved(dit())


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> dict[str, bytes]:
    """The files of a small AutoencoderKL with the channels, factor and scale of Stable Diffusion's."""
    folder = tmp_path_factory.mktemp("vae")
    four = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    scales = {"block_out_channels": (8, 8, 8, 16), "scaling_factor": 0.18215, "shift_factor": None}
    diffusers_model("AutoencoderKL", **four, **scales).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, "config.json")}


@pytest.fixture
def server():
    server = Server({})
    yield server
    server.close()


@pytest.fixture(autouse=True)
def world(tmp_path, monkeypatch):
    small_networks(monkeypatch)
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)


def weights(command: str = "") -> str:
    """Return the text that the command prints."""
    return printed("weights", *shlex.split(command))


def refusal(command: str) -> str:
    return refused("weights", *shlex.split(command))


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def user(name: str, content: bytes) -> Path:
    path = Path("user") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_without_a_name_it_lists_all():
    text = weights()
    for name, known in KNOWN.items():
        (line,) = re.findall(rf"^{re.escape(name)} .*", text, re.MULTILINE)
        assert known.license in line
        assert known.title in line
    assert re.search(r"^dit-xl-2-256 +2\.7 GB +CC BY-NC 4\.0 ", text, re.MULTILINE)
    assert re.search(r"^adm-imagenet512 +unknown ", text, re.MULTILINE)
    assert not list(Path().iterdir())


def test_a_download_is_verified_and_ends_with_commands_that_parse(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    text = weights("dit-xl-2-256")
    path = Path("models/dit-xl-2-256", DIT)
    assert path.read_bytes() == original
    assert f"{path}: verified, sha256 {sha(original)}" in text
    assert "license: CC BY-NC 4.0 (https://github.com/facebookresearch/DiT)" in text
    assert server.asked == [(DIT, None)]
    assert {file.name for file in path.parent.iterdir()} == {DIT, "verified.json"}
    assert verified_weights("dit-xl-2-256") == path
    obtain, draw, _, encode, train = (line.strip() for line in text.splitlines()[-5:])
    assert obtain == "fastdit-data weights sd-vae-ft-ema"
    words = shlex.split(draw)
    drawn = _draw_parser().parse(words[words.index("--weights") :])
    assert (drawn.weights, drawn.noise, drawn.autoencoder) == (str(path), "ddpm", "models/sd-vae-ft-ema")
    assert "--size 256 --autoencoder models/sd-vae-ft-ema --out data/latents" in encode
    words = shlex.split(train)
    config = parse(words[words.index("--preset") :])
    assert config.init_from == str(path)
    assert config.data.autoencoder == "models/sd-vae-ft-ema"
    # The second time nothing is asked of the server.
    assert f"{path}: verified" in weights("dit-xl-2-256")
    assert len(server.asked) == 1


def test_an_autoencoder_is_a_folder_that_opens(monkeypatch, server, vae):
    publish(monkeypatch, server, "sd-vae-ft-ema", vae)
    text = weights("sd-vae-ft-ema")
    assert text.splitlines()[-1].endswith("--autoencoder models/sd-vae-ft-ema --out data/latents")
    autoencoder = open_autoencoder("models/sd-vae-ft-ema")
    assert (autoencoder.channels, autoencoder.factor, autoencoder.scale) == (4, 8, 0.18215)
    assert verified_weights("sd-vae-ft-ema") == Path("models/sd-vae-ft-ema")
    # Other weights that need it no longer tell to obtain it.
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: saved(dit())})
    assert "fastdit-data weights" not in weights("dit-xl-2-256")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_cut_download_goes_on(monkeypatch, server, original, ranges):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    server.cuts, server.ranges = 2, ranges
    weights("dit-xl-2-256 --out w")
    assert [start is not None for _, start in server.asked] == [False, True, True]
    assert Path("w", DIT).read_bytes() == original


def test_the_next_command_goes_on_with_a_download_that_was_cut_for_good(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    server.cuts = 3
    text = refusal("dit-xl-2-256")
    assert "repeated, it goes on" in text
    assert not Path("models/dit-xl-2-256", DIT).exists()
    weights("dit-xl-2-256")
    size = len(original)
    assert server.asked[-1] == (DIT, f"bytes={size - -(-size // 8)}-")
    assert Path("models/dit-xl-2-256", DIT).read_bytes() == original


def test_wrong_bytes_from_the_server_are_not_kept(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    server.files[DIT] = wrong = original[:-1] + b"?"
    text = refusal("dit-xl-2-256")
    assert f"has sha256 {sha(wrong)}, expected {sha(original)}" in text
    place = Path("models/dit-xl-2-256")
    assert not [path for path in place.rglob("*") if path.is_file() and path.stat().st_size]
    server.files[DIT] = original
    weights("dit-xl-2-256")
    assert (place / DIT).read_bytes() == original


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"<!DOCTYPE html><html>Sign in</html>", "the answer is an HTML page; download the file itself"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "the answer is a Git LFS pointer"),
    ],
)
def test_an_answer_that_is_not_the_file(monkeypatch, server, original, answer, words):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    server.files[DIT] = answer
    assert words in refusal("dit-xl-2-256")
    path = user("x.pt", answer)
    assert words.removeprefix("the answer ") in refusal(f"dit-xl-2-256 --from {path}")
    assert path.read_bytes() == answer, "a user's file stays"


def test_a_disk_that_is_too_small_is_told_before_the_server_is_asked(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 1234))
    text = refusal("dit-xl-2-256")
    assert f"{len(original) / 1000:.1f} kB are to come, and models/dit-xl-2-256/.unfinished has 1.2 kB free" in text
    assert server.asked == []


def test_a_disk_that_is_too_small_for_a_file_of_unknown_size(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-512", {"DiT-XL-2-512x512.pt": original}, summed=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 1234))
    assert "has 1.2 kB free; free some space, or choose another place with --out" in refusal("dit-xl-2-512")
    assert len(server.asked) == 1
    assert not [path for path in Path("models").rglob("*") if path.is_file() and path.stat().st_size]


def test_without_a_network_one_line_says_which_file_to_put_where(monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    address = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-256x256.pt"
    text = refusal("dit-xl-2-256")
    assert text.startswith(f"{DIT}: {address}: ")
    assert text.endswith(
        f"download {address} as models/dit-xl-2-256/{DIT} and run the command again, or add --from FILE_OR_FOLDER"
    )


def test_a_file_that_was_put_there_by_hand(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    place = Path("models/dit-xl-2-256", DIT)
    place.parent.mkdir(parents=True)
    place.write_bytes(original[:-9])
    text = refusal("dit-xl-2-256")
    assert f", and {len(original) - 9:,} bytes where {len(original):,} are expected; copy or download it again" in text
    assert text.endswith("remove it, or choose another folder with --out")
    assert place.stat().st_size == len(original) - 9, "it stays"
    place.write_bytes(original)
    weights("dit-xl-2-256")
    assert server.asked == []


def test_a_users_file_may_have_another_name_and_is_linked(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    path = user("mine.pt", original)
    weights(f"dit-xl-2-256 --from {path}")
    place = Path("models/dit-xl-2-256", DIT)
    assert place.samefile(path)
    assert server.asked == []
    assert refusal("dit-xl-2-256 --out other --from user") == (
        f"{DIT}: is not in user; the published file is {server.address}/x/{DIT}"
    )
    assert refusal("dit-xl-2-256 --out other --from nowhere") == "--from nowhere: no such file or folder"


def test_a_users_file_on_another_disk_is_copied(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    path = user(DIT, original)

    def refuse(*arguments):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 1234))
        assert "and 1.2 kB are free; free some space" in refusal("dit-xl-2-256 --from user")
    weights("dit-xl-2-256 --from user")
    place = Path("models/dit-xl-2-256", DIT)
    assert not place.samefile(path)
    assert place.read_bytes() == original


def test_without_a_published_sum_the_tensors_are_compared(monkeypatch, server):
    name, content = "DiT-XL-2-512x512.pt", saved(dit(64))
    publish(monkeypatch, server, "dit-xl-2-512", {name: content}, summed=False)
    text = weights("dit-xl-2-512")
    assert f"{name}: unknown, sha256 not published" in text
    assert f"sha256 {sha(content)}, none is published to compare it with; pin it with --sha256 {sha(content)}" in text
    assert "tensors with the names and shapes of a DiT-XL/2, all finite" in text
    assert "--size 512" in text
    # A pin holds from then on.
    assert f"has the sha256 that you gave, {sha(content)}" in weights(f"dit-xl-2-512 --sha256 {sha(content).upper()}")
    assert f"has sha256 {sha(content)}, --sha256 is {'0' * 64}" in refusal(f"dit-xl-2-512 --sha256 {'0' * 64}")
    assert "must be 64 hexadecimal digits" in refusal("dit-xl-2-512 --sha256 12")


@pytest.mark.parametrize(
    ("content", "words"),
    [(dit(32), "it was trained on 16x16 patches"), (sit(), "the second half of its outputs is zero, as in SiT's")],
    ids=["other resolution", "other noise process"],
)
def test_weights_of_another_network_are_refused(monkeypatch, server, content, words):
    name = "DiT-XL-2-512x512.pt"
    publish(monkeypatch, server, "dit-xl-2-512", {name: saved(content)}, summed=False)
    text = refusal("dit-xl-2-512")
    assert text.startswith(f"{server.address}/x/{name}: what came from there is not dit-xl-2-512 ({words}")
    assert [path.name for path in Path("models").rglob("*") if path.is_file()] == [".lock"]
    path = user("x.pt", saved(content))
    text = refusal(f"dit-xl-2-512 --from {path}")
    assert text.startswith(f"{path}: is not dit-xl-2-512 ({words}")
    assert path.exists()


def test_a_folder_of_diffusers_alone_or_in_the_whole_pipeline(monkeypatch, server):
    folder = diffusers_folder(Path("pipeline/transformer"))
    contents = {name: (folder / name).read_bytes() for name in ("diffusion_pytorch_model.bin", "config.json")}
    publish(monkeypatch, server, "dit-xl-2-256-diffusers", contents, summed=False)
    for out, flags in (("downloaded", ""), ("found", f"--from {folder}"), ("inside", "--from pipeline")):
        assert f"--init_from {out} " in weights(f"dit-xl-2-256-diffusers --out {out} {flags}")
        assert verified_weights("dit-xl-2-256-diffusers", out) == Path(out)
    assert len(server.asked) == 2


def test_an_autoencoder_that_was_saved_again_takes_a_pin(monkeypatch, server, vae):
    publish(monkeypatch, server, "sd-vae-ft-mse", vae)
    sizes = {"block_out_channels": [8, 8, 8, 16], "layers_per_block": 1}
    monkeypatch.setattr(weight_content, "SD_VAE", weight_content.SD_VAE | sizes)
    content = save({name: value * 2 for name, value in load(vae[WEIGHTS]).items()})
    user(WEIGHTS, content)
    config = vae["config.json"] + b" \n"
    user("config.json", config)
    text = refusal("sd-vae-ft-mse --from user")
    assert f"if you trust it, add --sha256 {sha(content)}, and its tensors are compared instead" in text
    text = weights(f"sd-vae-ft-mse --from user --sha256 {sha(content)}")
    assert f"has the sha256 that you gave, {sha(content)}, not the published one" in text
    assert f"config.json: sha256 {sha(config)}, another than the published one" in text
    assert verified_weights("sd-vae-ft-mse") == Path("models/sd-vae-ft-mse")
    # A pin does not make another network pass.
    user("config.json", vae["config.json"].replace(b"0.18215", b"0.5"))
    text = refusal(f"sd-vae-ft-mse --from user --out other --sha256 {sha(content)}")
    assert text.startswith(f"user/{WEIGHTS}: is not sd-vae-ft-mse (scaling_factor is 0.5 in config.json, not")
    user("config.json", vae["config.json"].replace(b'"layers_per_block": 1', b'"layers_per_block": 2'))
    text = refusal(f"sd-vae-ft-mse --from user --out other --sha256 {sha(content)}")
    assert f"user/{WEIGHTS}: is not sd-vae-ft-mse ({WEIGHTS}: " in text


def test_a_mirror_follows_an_address_that_fails(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    known = KNOWN["dit-xl-2-256"]
    addresses = (f"{server.address}/x/gone.pt", *known.files[0].addresses)
    monkeypatch.setitem(KNOWN, "dit-xl-2-256", replace(known, files=(replace(known.files[0], addresses=addresses),)))
    weights("dit-xl-2-256")
    assert [name for name, _ in server.asked] == ["gone.pt", DIT]


def test_the_environment_names_a_mirror_of_the_hub(monkeypatch, server, original):
    known = KNOWN["sit-s-2-256"]
    name = known.files[0].name
    server.files[name] = saved(sit())
    monkeypatch.setenv("HF_ENDPOINT", f"{server.address}/")
    text = weights("sit-s-2-256")
    assert f"{server.address}/nyu-visionx/SiT-collections/resolve/main/{name}" in text
    assert "--model.size S --noise.name flow --noise.flow.convention sit" in text
    assert Path("models/sit-s-2-256", name).is_file()


def test_a_second_command_does_not_touch_the_first_ones_download(monkeypatch, server, original):
    publish(monkeypatch, server, "dit-xl-2-256", {DIT: original})
    lock = Path("models/dit-xl-2-256/.unfinished/.lock")
    lock.parent.mkdir(parents=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another fastdit-data is at work there" in refusal("dit-xl-2-256")
    weights("dit-xl-2-256")


def test_a_reference_batch_and_what_it_is_for(monkeypatch, server):
    name = "VIRTUAL_imagenet512.npz"
    publish(monkeypatch, server, "adm-imagenet512", {name: reference_batch()}, summed=False)
    *_, obtain, evaluate = weights("adm-imagenet512").splitlines()
    assert obtain == "  fastdit-data weights inception-2015"
    assert evaluate.endswith(
        "--features inception --weights models/inception-2015/weights-inception-2015-12-05-6726825d.pth "
        f"--data models/adm-imagenet512/{name}"
    )


def test_an_unknown_name_and_a_place_that_cannot_be():
    assert refusal("dit-xl-256").startswith("dit-xl-256: no weights of that name; did you mean dit-xl-2-256? ")
    Path("file").touch()
    assert refusal("dit-xl-2-256 --out file").startswith("--out file: cannot write into file (")
