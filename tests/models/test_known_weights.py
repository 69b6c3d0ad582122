"""Test the list of known weights, the paths of verified ones, and the comparison of files by their content."""

import hashlib
import json
import os
import re
import shlex
from pathlib import Path

import pytest
import torch
from test_pretrained import make_official
from weights_helpers import (
    CASE,
    SD_VAE_CONFIG,
    diffusers_folder,
    dit,
    inception,
    reference_batch,
    repa,
    saved,
    sit,
    small_networks,
)

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.files import sha256_of
from fastdit.models import autoencoders
from fastdit.models.known_weights import KNOWN, find_known, record_verified, verified_weights
from fastdit.models.weight_content import check_content, empty_network
from fastdit.parser import parse

NETWORKS = [name for name, known in KNOWN.items() if known.kind == "network"]
ORIGINAL = [name for name in NETWORKS if KNOWN[name].network.layout == "original"]


# The list


def test_every_entry_can_be_verified_and_named():
    for name, known in KNOWN.items():
        assert re.fullmatch("[a-z0-9-]+", name)
        assert known.license
        assert known.home.startswith("https://")
        assert (known.network is not None) == bool(known.flags) == (known.kind == "network")
        for file in known.files:
            assert all(address.startswith("https://") for address in file.addresses)
            assert file.sha256 is None or re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert file.size is None or file.sha256, "sizes are compared only where a sum is"
            assert Path(file.name).name == file.name


@pytest.mark.parametrize("name", NETWORKS)
def test_the_flags_build_the_network_that_the_file_fills(name):
    config = parse([*shlex.split(KNOWN[name].flags), "--init_from", "x.pt", "--data.source", "x"])
    with torch.device("meta"):
        built = run_parts.build_network(config, run_parts.shape_of(config, 1000))
    filled = empty_network(KNOWN[name].network)
    assert {key: value.shape for key, value in built.state_dict().items()} == {
        key: value.shape for key, value in filled.state_dict().items()
    }
    assert built.grid == filled.grid
    assert config.noise.process.spare_outputs == (KNOWN[name].network.outputs == "sit")


def test_the_published_settings_of_the_autoencoder(tmp_path):
    (tmp_path / "config.json").write_text(SD_VAE_CONFIG)
    published = {file.sha256 for name in ("sd-vae-ft-ema", "sd-vae-ft-mse") for file in KNOWN[name].files[1:]}
    assert {sha256_of(tmp_path / "config.json")} == published
    assert {file.size for name in ("sd-vae-ft-ema",) for file in KNOWN[name].files[1:]} == {len(SD_VAE_CONFIG)}
    model = autoencoders._empty("AutoencoderKL", json.loads(SD_VAE_CONFIG), tmp_path / "config.json")
    assert model.config["scaling_factor"] == 0.18215
    stored = 4 * sum(value.numel() for value in model.state_dict().values())
    # A safetensors file is the tensors and a header, which has about 100 bytes for each.
    assert 0 < KNOWN["sd-vae-ft-ema"].files[0].size - stored < 200 * len(model.state_dict())


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_sizes_are_those_of_the_tensors(name):
    known = KNOWN[name]
    stored = sum(value.numel() for value in empty_network(known.network).state_dict().values())
    width = {"S": 384, "B": 768, "XL": 1152}[known.network.size]
    stored += (known.network.latents // 2) ** 2 * width  # the position table
    stored += 16 * (width + 1) if known.network.outputs == "sit" else 0  # the second half of the outputs
    if known.network.outputs == "repa":
        stored += (1152 + 1) * 2048 + (2048 + 1) * 2048 + (2048 + 1) * 768  # the projector
    assert known.bytes == pytest.approx(4 * stored, rel=1e-3)


# Paths


@pytest.fixture
def verified(tmp_path):
    """A folder with a verified file."""
    name = KNOWN["inception-2015"].files[0].name
    (tmp_path / name).write_bytes(b"weights")
    record_verified("inception-2015", tmp_path, {name: hashlib.sha256(b"weights").hexdigest()})
    return tmp_path / name


def refusal(name, folder):
    with pytest.raises(UserError) as caught:
        verified_weights(name, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_path_of_verified_weights(verified, monkeypatch):
    assert verified_weights("inception-2015", verified.parent) == verified
    os.utime(verified, (1, 1))  # written again with the same bytes
    assert verified_weights("inception-2015", verified.parent) == verified
    monkeypatch.chdir(verified.parent)
    assert refusal("inception-2015", None) == (
        "models/inception-2015: holds no verified weights; run: fastdit-data weights inception-2015"
    )


def test_weights_that_are_not_those_that_were_verified(verified):
    folder = verified.parent
    remedy = f"run: fastdit-data weights inception-2015 --out {folder}"
    verified.write_bytes(b"other weights")
    assert refusal("inception-2015", folder) == f"{verified}: is not the file that was verified; {remedy}"
    verified.unlink()
    assert refusal("inception-2015", folder) == f"{verified}: no such file any more; {remedy}"
    assert "verified.json: does not say that dit-xl-2-256 is verified" in refusal("dit-xl-2-256", folder)
    for text in ("{}", "[]", '{"name": "inception-2015", "files": {"x": 1}}', "\udcff", '{"files": 3'):
        (folder / "verified.json").write_bytes(text.encode(errors="surrogateescape"))
        assert "does not say that inception-2015 is verified; run: " in refusal("inception-2015", folder)
    with pytest.raises(UserError, match="did you mean inception-2015"):
        find_known("inception")


# Content


def check(folder: Path, name: str, content: object) -> str:
    (folder / KNOWN[name].files[0].name).write_bytes(content if isinstance(content, bytes) else saved(content))
    return check_content(KNOWN[name], folder)


RIGHT = {
    "dit-xl-2-256": dit,
    "dit-xl-2-512": lambda: dit(64),
    "sit-xl-2-256": sit,
    "repa-sit-xl-2-256": repa,
    "inception-2015": inception,
    "adm-imagenet512": reference_batch,
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_content(name, tmp_path, monkeypatch):
    small_networks(monkeypatch)
    assert check(tmp_path, name, RIGHT[name]())
    if KNOWN[name].kind == "network":
        assert check(tmp_path, name, {"model": RIGHT[name](), "ema": RIGHT[name](), "opt": {}})


@pytest.mark.parametrize("name", [name for name in RIGHT if KNOWN[name].kind == "network"])
@pytest.mark.parametrize("other", [name for name in RIGHT if KNOWN[name].kind == "network"])
def test_no_network_passes_for_another(name, other, tmp_path, monkeypatch):
    small_networks(monkeypatch)
    if name != other:
        with pytest.raises(ValueError, match=r"patches|second half|its weights are|projectors|needs|is missing"):
            check(tmp_path, name, RIGHT[other]())


def damaged(change) -> dict:
    state = dit()
    change(state)
    return state


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: damaged(lambda state: state.pop("blocks.1.mlp.fc2.bias")), r"blocks\.1\.mlp\.fc2\.bias is missing"),
        (lambda: make_official(CASE | {"depth": 3, "out_channels": 8}), "is not part of this model"),
        (lambda: make_official(CASE | {"out_channels": 8, "classes": 999}), r"label_embed\.weight is \(1000, 48\)"),
        (lambda: damaged(lambda state: state["blocks.0.mlp.fc1.bias"].fill_(torch.nan)), "not finite"),
        (lambda: damaged(lambda state: state["pos_embed"].zero_()), "no sin-cos table"),
        (lambda: saved(dit())[:-5000], "cut short or damaged"),
        (lambda: {"a": torch.zeros(3)}, "not a DiT checkpoint"),
        (lambda: {"model": print}, "builtins"),
    ],
)
def test_wrong_content(content, words, tmp_path, monkeypatch):
    small_networks(monkeypatch)
    with pytest.raises(ValueError, match=words):
        check(tmp_path, "dit-xl-2-256", content())


def test_diffusers_folder_of_another_resolution(tmp_path, monkeypatch):
    small_networks(monkeypatch)
    diffusers_folder(tmp_path, 64)
    assert check_content(KNOWN["dit-xl-2-512-diffusers"], tmp_path)
    with pytest.raises(ValueError, match=r"sample_size is 64 in config\.json, not 32"):
        check_content(KNOWN["dit-xl-2-256-diffusers"], tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        check_content(KNOWN["dit-xl-2-512-diffusers"], tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("inception-2015", {"fc.weight": torch.zeros(1000, 2048)}, "it has no Conv2d_1a_3x3"),
        ("inception-2015", b"PK\x03\x04", "cut short or damaged"),
        ("adm-imagenet256", reference_batch(mu=[1.0]), r"no finite mu of shape \(2048,\)"),
        ("adm-imagenet256", reference_batch()[:-100], "no .npz file, or a damaged one"),
        ("adm-imagenet256", b"something", "no .npz file, or a damaged one"),
    ],
)
def test_wrong_content_of_other_kinds(name, content, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        check(tmp_path, name, content)
