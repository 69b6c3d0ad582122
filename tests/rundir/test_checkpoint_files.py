"""Checkpoints as files: every kind of damage is found and named, and the newest whole one is taken."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastdit.errors import UserError
from fastdit.rundir.checkpoint_files import (
    BUFFERS,
    FORMAT,
    MANIFEST,
    METHOD_FILE,
    OLDER_EMA_FILE,
    PROGRESS,
    SHARDS,
    checkpoints,
    choose,
    classes_of,
    damage,
    is_complete,
    manifest,
    newest_good,
    prune,
    publish,
    remedy,
    sampled_weights,
    seal,
    start_partial,
)
from fastdit.rundir.shards import Piece, write_pieces

WEIGHTS = {"network.blocks.0.qkv.weight": torch.arange(12.0).reshape(3, 4), "head.bias": torch.ones(2)}
SHARD = f"{SHARDS}/weights-00000-of-00002.safetensors"
EMAS = f"{SHARDS}/ema-00001-of-00002.safetensors"


def write(folder: Path, step: int) -> Path:
    """A checkpoint of two ranks that share each tensor."""
    path = folder / f"step-{step:08d}"
    (path / SHARDS).mkdir(parents=True)
    for kind, change in (("weights", 0), ("ema", step)):
        for rank in (0, 1):
            pieces = []
            for name, value in WEIGHTS.items():
                half = value.numel() // 2
                pieces.append(Piece(name, value.shape, rank * half, (value + change).flatten()[rank * half :][:half]))
            write_pieces(path / SHARDS, kind, rank, 2, pieces)
    count = Piece("network.freq_shift", (), 0, torch.full((1,), step))
    write_pieces(path / SHARDS, BUFFERS, 0, 2, [count])
    (path / PROGRESS).write_text(json.dumps({"step": step}))
    save_file({}, path / METHOD_FILE)
    seal(path, {"format": FORMAT, "step": step, "world": 2, "classes": 7, "sampled": "network."})
    return path


def write_older(folder: Path, step: int) -> Path:
    """A checkpoint as the first version wrote it."""
    path = folder / f"step-{step:08d}"
    path.mkdir(parents=True)
    torch.save({"step": step}, path / "rank-0.pt")
    save_file(WEIGHTS, path / OLDER_EMA_FILE)
    seal(path, {"step": step, "world": 1, "classes": 7})
    change(path, lambda content: content.pop("seal"))
    return path


def change(path: Path, edit) -> None:
    """Edit a manifest by hand."""
    content = json.loads((path / MANIFEST).read_text())
    edit(content)
    (path / MANIFEST).write_text(json.dumps(content))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_a_sealed_checkpoint_is_whole_and_tells_what_it_is(tmp_path):
    path = write(tmp_path, 20)
    assert damage(path) is None
    told = manifest(path)
    assert (told["step"], told["world"], told["classes"], classes_of(path)) == (20, 2, 7, 7)
    files = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert told["sha256"].keys() == files - {MANIFEST}
    assert len(files) == 8


@pytest.mark.parametrize("name", [SHARD, EMAS, METHOD_FILE, PROGRESS])
@pytest.mark.parametrize(
    ("harm", "words"),
    [(flip, "is not what was written"), (cut, "is not what was written"), (Path.unlink, "is missing")],
    ids=["flipped", "cut", "gone"],
)
def test_damage_of_any_file_is_named(tmp_path, name, harm, words):
    path = write(tmp_path, 20)
    harm(path / name)
    assert damage(path) == f"{name} {words}"


@pytest.mark.parametrize(
    "content", [None, b"", b"{", b"[]", b"3", b"{}", b'{"sha256": null}', b'{"sha256": ["x"]}', b"\xff\xfe"]
)
def test_a_missing_or_garbled_manifest_is_damage(tmp_path, content):
    path = write(tmp_path, 20)
    (path / MANIFEST).unlink()
    if content is not None:
        (path / MANIFEST).write_bytes(content)
    assert damage(path) == f"{MANIFEST} is missing or unreadable"


def test_a_file_or_an_empty_folder_in_its_place_is_damage(tmp_path):
    (tmp_path / "step-00000001").write_text("not a folder")
    (tmp_path / "step-00000002").mkdir()
    for path in checkpoints(tmp_path):
        assert damage(path) == f"{MANIFEST} is missing or unreadable"


def test_order_is_by_step_and_unfinished_ones_do_not_count(tmp_path):
    for step in (9, 100, 20):
        write(tmp_path, step)
    (tmp_path / ".step-00000200.partial").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000100", "step-00000020", "step-00000009"]
    assert checkpoints(tmp_path / "nowhere") == []


def test_the_newest_good_one_and_what_is_said_on_the_way(tmp_path):
    paths = {step: write(tmp_path, step) for step in (10, 20, 30, 40)}
    said = []
    assert newest_good(tmp_path, said.append) == paths[40]
    assert said == []
    flip(paths[40] / SHARD)
    (paths[30] / PROGRESS).unlink()
    assert newest_good(tmp_path, said.append) == paths[20]
    assert len(said) == 2
    assert said[0].startswith(f"{paths[40]}: {SHARD} is not what was written; falling back")
    assert said[1].startswith(f"{paths[30]}: {PROGRESS} is missing; falling back")


def test_no_checkpoint_is_none_but_all_damaged_is_an_error(tmp_path):
    assert newest_good(tmp_path) is None
    for step in (10, 20):
        flip(write(tmp_path, step) / EMAS)
    with pytest.raises(UserError, match=f"{tmp_path}: all 2 checkpoints are damaged; start a new run"):
        newest_good(tmp_path, lambda text: None)


def test_the_sampled_weights_come_back_exactly(tmp_path):
    weights = sampled_weights(write(tmp_path, 20))
    assert weights.keys() == {"blocks.0.qkv.weight", "freq_shift"}
    assert torch.equal(weights["blocks.0.qkv.weight"], WEIGHTS["network.blocks.0.qkv.weight"] + 20)
    assert torch.equal(weights["freq_shift"], torch.tensor(20.0).long())
    older = sampled_weights(write_older(tmp_path, 10))
    assert all(torch.equal(older[name], WEIGHTS[name]) for name in WEIGHTS)


@pytest.mark.parametrize("harm", [cut, Path.unlink, lambda path: path.write_bytes(b"junk")])
@pytest.mark.parametrize("older", [False, True])
def test_unreadable_weights_are_one_line(tmp_path, harm, older):
    path = (write_older if older else write)(tmp_path, 20)
    harm(path / (OLDER_EMA_FILE if older else EMAS))
    with pytest.raises(UserError, match=f"{path}.*; use another") as caught:
        sampled_weights(path)
    assert "\n" not in str(caught.value)


HAND_EDITS = {
    "another step": (lambda content: content.update(step=22), "is not what was written"),
    "a dropped file": (lambda content: content["sha256"].pop(EMAS), "is not what was written"),
    "a dropped seal": (lambda content: content.pop("seal"), "is missing or unreadable"),
    "a file outside": (lambda content: content["sha256"].update({"../secret": ""}), "is missing or unreadable"),
    "an absolute file": (lambda content: content["sha256"].update({"/dev/zero": ""}), "is missing or unreadable"),
    "no list": (lambda content: content.update(sha256=[]), "is missing or unreadable"),
}


@pytest.mark.parametrize("name", HAND_EDITS)
def test_a_manifest_edited_by_hand_is_damage(tmp_path, name):
    path = write(tmp_path, 20)
    change(path, HAND_EDITS[name][0])
    assert damage(path) == f"{MANIFEST} {HAND_EDITS[name][1]}"


@pytest.mark.parametrize("make", [write, write_older])
def test_a_renamed_checkpoint_is_damage(tmp_path, make):
    """Its step would be wrong, so that data and schedules would be."""
    path = make(tmp_path, 20).rename(tmp_path / "step-00000022")
    assert damage(path) == f"{MANIFEST} is of step 20"


def test_a_sealed_manifest_without_a_needed_file_is_damage(tmp_path):
    path = write(tmp_path, 20)
    (path / METHOD_FILE).unlink()
    (path / MANIFEST).unlink()
    seal(path, {"format": FORMAT, "step": 20, "world": 2, "classes": 7, "sampled": ""})
    assert damage(path) == f"{MANIFEST} does not list {METHOD_FILE}"


@pytest.mark.parametrize("name", [SHARD, MANIFEST, METHOD_FILE])
@pytest.mark.parametrize("kind", ["pipe", "device", "link", "folder"])
def test_only_regular_files_are_opened(tmp_path, name, kind):
    """Reading a named pipe or /dev/zero would never end, and a link may lead anywhere."""
    path = write(tmp_path, 20)
    target = (path / name).rename(tmp_path / "kept")
    if kind == "pipe":
        os.mkfifo(path / name)
    elif kind == "folder":
        (path / name).mkdir()
    else:
        (path / name).symlink_to("/dev/zero" if kind == "device" else target)
    fault = "is missing or unreadable" if name == MANIFEST else "is no regular file"
    assert damage(path) == f"{name} {fault}"
    assert not is_complete(path)


def test_a_manifest_nested_too_deep_is_damage(tmp_path):
    path = write(tmp_path, 20)
    (path / MANIFEST).write_text('{"step": ' + "[" * 200_000 + "]" * 200_000 + "}")
    assert damage(path) == f"{MANIFEST} is missing or unreadable"


def test_choosing_for_a_command(tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    old, new = write(folder, 10), write(folder, 20)
    assert choose(tmp_path, None) == new
    assert choose(tmp_path, str(old)) == old
    flip(new / SHARD)
    assert choose(tmp_path, None) == old
    assert f"{new}: {SHARD} is not what was written" in capsys.readouterr().out
    with pytest.raises(UserError, match=f"--checkpoint {new}: {SHARD} is not what was written"):
        choose(tmp_path, str(new))
    with pytest.raises(UserError, match=f"--checkpoint {tmp_path}: {MANIFEST} is missing .*; give a folder like"):
        choose(tmp_path, str(tmp_path))
    with pytest.raises(UserError, match="holds no checkpoint yet; train it first"):
        choose(tmp_path / "other", None)


def test_the_manifest_is_json_that_others_can_read(tmp_path):
    path = write(tmp_path, 20)
    assert json.loads((path / MANIFEST).read_text())["step"] == 20


def test_names_that_are_not_ours_are_ignored(tmp_path):
    for name in ("step-00000abc", "step-0000001", "step-00000003.bak", "step-latest!", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-100000000").mkdir()
    paths = [write(tmp_path, step) for step in (99999999, 7)]
    assert checkpoints(tmp_path) == [tmp_path / "step-100000000", *paths]
    newest = write(tmp_path, 99999999 + 5)
    prune(newest, 1)
    assert checkpoints(tmp_path) == [newest, tmp_path / "step-100000000"]
    assert len(list(tmp_path.iterdir())) == 7


def test_pruning_counts_complete_checkpoints_only_and_keeps_the_new_one(tmp_path):
    """Case R9: an empty folder of a later step does not push out the only good checkpoint."""
    paths = {step: write(tmp_path, step) for step in (10, 20, 30, 40, 60)}
    (tmp_path / "step-00000099").mkdir()
    (paths[30] / SHARD).unlink()
    prune(paths[40], 2)
    left = [int(path.name[5:]) for path in checkpoints(tmp_path)]
    assert left == [99, 60, 40, 30, 20], "30 lacks a file, so 20 counts; later ones are left"
    prune(paths[40], 1)
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [99, 60, 40, 30]
    assert damage(paths[40]) is None
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_replaces_one_of_its_name(tmp_path):
    for old in ("folder", "file"):
        partial, final = tmp_path / ".step-00000005.partial", tmp_path / "step-00000005"
        (tmp_path / ".step-00000004.partial").mkdir()
        start_partial(partial)
        (partial / "new").write_text(old)
        if old == "file":
            final.write_text("not a folder")
        else:
            final.mkdir()
        publish(partial, final)
        assert (final / "new").read_text() == old
        assert list(tmp_path.iterdir()) == [final]
        (final / "new").unlink()
        final.rmdir()


def test_the_remedy_names_a_checkpoint_from_before_the_trouble(tmp_path):
    paths = {step: write(tmp_path, step) for step in (10, 20, 30)}
    assert remedy(tmp_path, 32).startswith(f"last good checkpoint: {paths[30]}; go on with --resume")
    assert f"{paths[20]}; remove those after it, then go on" in remedy(tmp_path, 31), "step 31 failed with 30's weights"
    flip(paths[20] / SHARD)
    assert f"{paths[10]}; remove those after it" in remedy(tmp_path, 25)
    assert remedy(tmp_path, 11).startswith("no checkpoint is from before; start a new run")
    assert remedy(tmp_path / "nowhere", 5).startswith("no checkpoint is from before")


DAMAGES = ["flip", "cut", "grow", "empty", "remove", "swap", "replace"]


@pytest.mark.parametrize("seed", range(50))
def test_seeded_damage_of_any_file_is_found(tmp_path, seed):
    """Every file in turn, the manifest too, and every kind of damage."""
    rng = np.random.default_rng(seed)
    path = write(tmp_path, 20)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file, kind = files[seed % len(files)], DAMAGES[seed % len(DAMAGES)]
    data = bytearray(file.read_bytes())
    if kind == "flip":
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    elif kind == "cut":
        data = data[: rng.integers(len(data))]
    elif kind == "grow":
        data += rng.bytes(rng.integers(1, 100))
    elif kind == "empty":
        data.clear()
    elif kind == "swap":
        other = files[(files.index(file) + 1) % len(files)]
        other_data = other.read_bytes()
        other.write_bytes(data)
        data = other_data
    elif kind == "replace":
        data = bytearray(rng.bytes(len(data)))
    file.write_bytes(data)
    if kind == "remove":
        file.unlink()
    found = damage(path)
    assert found is not None
    assert "\n" not in found
