"""Test that the number and the names of classes come from the data, and are said when they look odd."""

import json
import re
import shutil

import numpy as np
import pytest
from data_helpers import encode, picture
from launching import forked
from test_data_bad import write_tar

from fastdit.data import open_source
from fastdit.data.sources import check_classes
from fastdit.encode import _encode
from fastdit.errors import UserError
from fastdit.parser import parse, presets
from fastdit.sample import _sample

PNG = encode(picture(8, 8), "PNG")
NAMES = ("cat", "dog", "owl, barn")
SMALL = "--model.depth 1 --model.width 32 --model.heads 2 --sample.per_class 1 --sample.steps 2 --steps 2 --batch 2"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a tree of three classes of two images each."""
    root = tmp_path_factory.mktemp("photos")
    for name in NAMES:
        (root / name).mkdir()
        for i in range(2):
            (root / name / f"{i}.png").write_bytes(PNG)
    return root


def test_no_preset_says_how_many_classes_there_are():
    assert [name for name in presets() if parse(["--preset", name]).data.classes is not None] == []
    assert parse(["--preset", "cifar10", "--data.classes", "7"]).data.classes == 7


@pytest.mark.launch
def test_a_preset_trains_the_classes_of_the_data_and_keeps_their_names(photos, tmp_path, capsys):
    flags = ["--preset", "cifar10", *SMALL.split(), "--threads", "1", "--data.threads", "1", "--log_every", "1"]
    flags += ["--data.source", str(photos), "--save_every", "2"]
    outcome = forked(*flags, "--data.classes", "10", "--out", tmp_path / "no")
    assert outcome.code == 2
    assert outcome.text.splitlines()[-1] == (
        f"error: data.classes: 10, but {photos} has 3 classes (cat, dog, owl, barn); leave data.classes out"
    )
    assert ", 3 classes" in forked(*flags, "--out", tmp_path / "run").succeeded().text

    # The names go with the run.
    run = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "run", run)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(photos), "/gone"))
    assert json.loads((run / "classes.json").read_text()) == list(NAMES)
    for asked, labels in (("dog,cat", [1, 0]), ("owl, barn", [2]), ("2, dog", [2, 1])):
        out = tmp_path / "x.npz"
        _sample(["--run", str(run), "--device", "cpu", "--n", str(len(labels)), "--classes", asked, "--out", str(out)])
        assert np.load(out)["labels"].tolist() == labels
    with pytest.raises(UserError, match=r"cow: must be numbers, ranges or names .* the run has cat, dog, owl, barn"):
        _sample(["--run", str(run), "--device", "cpu", "--classes", "cow", "--out", str(out)])


@pytest.mark.launch
def test_classes_of_other_names_are_not_resumed_nor_started_from(photos, tmp_path):
    """Labels would change their meaning. Names that are only numbers, as of shards, say nothing."""
    flags = ["--preset", "cifar10", *SMALL.split(), "--threads", "1", "--data.threads", "1", "--log_every", "1"]
    out = tmp_path / "run"
    forked(*flags, "--data.source", photos, "--save_every", "2", "--out", out).succeeded()
    others, numbered = tmp_path / "others", tmp_path / "numbered"
    for name in ("ape", "cat", "dog"):
        shutil.copytree(photos / "cat", others / name)
    numbered.mkdir()
    write_tar(
        numbered / "a.tar", [(f"{i}.{e}", c) for i in range(6) for e, c in (("png", PNG), ("cls", b"%d" % (i % 3)))]
    )

    refused = forked("--resume", "--out", out, "--steps", 4, "--data.source", others)
    assert refused.code == 2
    words = (
        f"classes.json: the run's classes are cat, dog, owl, barn, and {others} has ape, cat, dog; give the run's data"
    )
    assert words in refused.text
    assert json.loads((out / "classes.json").read_text()) == list(NAMES)
    forked("--resume", "--out", out, "--steps", 3, "--data.source", numbered).succeeded()
    assert json.loads((out / "classes.json").read_text()) == list(NAMES)

    weights = tmp_path / "x.safetensors"
    forked("--run", out, "--out", weights, program="fastdit.export").succeeded()
    start = [*flags, "--data.source", others, "--init_from", weights, "--out", tmp_path / "again"]
    refused = forked(*start)
    assert refused.code == 2
    assert "trained on the classes cat, dog, owl, barn, and the data has ape, cat, dog; take --finetune" in refused.text
    forked(*start, "--finetune", "all").succeeded()


@pytest.mark.launch
def test_training_without_classes(tmp_path):
    """Train by the recipe of the README on a folder of images."""
    for i in range(4):
        (tmp_path / "faces").mkdir(exist_ok=True)
        (tmp_path / "faces" / f"{i}.png").write_bytes(PNG)
    with pytest.raises(
        UserError,
        match=r"holds 4 images but no class folders; .* --data.labels labels.csv, .* --data.labels none --label_drop 0",
    ):
        open_source(str(tmp_path / "faces"))
    (tmp_path / "faces" / "list.txt").write_text("0.png")
    flags = ["--preset", "cifar10", *SMALL.split(), "--threads", "1", "--data.threads", "1", "--log_every", "1"]
    flags += ["--data.source", str(tmp_path / "faces"), "--data.labels", "none", "--label_drop", "0"]
    out = tmp_path / "run"
    text = forked(*flags, "--sample.guidance", "1", "--save_every", "2", "--out", out).succeeded().text
    assert "faces: not taken: 1 .txt" in text
    assert "4 samples" in text
    assert ", 1 classes" in text
    _sample(["--run", str(out), "--device", "cpu", "--n", "2", "--out", str(tmp_path / "x.npz")])
    assert np.load(tmp_path / "x.npz")["labels"].tolist() == [0, 0]


def test_labels_are_dropped_from_any_source(photos, tmp_path):
    """Classes of folders, of shards, of a shipped set and of artificial images become one class with all samples."""
    nested = tmp_path / "nested"
    shutil.copytree(photos, nested / "a" / "deep")
    shutil.copy(photos / "cat" / "0.png", nested / "loose.png")
    for source, n in ((photos, 6), (nested, 7), ("fashion_mnist", 10_000), ("synthetic:3x8x8:5:20", 20)):
        opened = open_source(str(source), labels="none")
        assert (opened.n, len(opened.class_names), opened.labels.tolist()) == (n, 1, [0] * n)
        assert opened.notes == ()


def test_unlabeled_splits_are_not_mixed(photos, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(photos, tmp_path / "set" / split)
    with pytest.raises(UserError, match=r"its folders \(train, val\) look like splits; point --data.source at one"):
        open_source(str(tmp_path / "set"), labels="none")
    (tmp_path / "empty" / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=r"empty: holds no images"):
        open_source(str(tmp_path / "empty"), labels="none")


def test_a_number_that_disagrees_stops(photos, tmp_path):
    check_classes(open_source(str(photos)), None, "data.classes")
    check_classes(open_source(str(photos), classes=3), 3, "data.classes")
    flags = ["--source", str(photos), "--classes", "4", "--autoencoder", "identity", "--out", str(tmp_path / "latents")]
    with pytest.raises(UserError, match=r"--classes: 4, but .* has 3 classes \(cat, dog, owl, barn\)"):
        _encode(flags)
    with pytest.raises(UserError, match="label 2 is out of range for 2 classes"):
        open_source(str(photos), classes=2)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ((0, 1, 2), None),
        ((1, 2, 3), "labels start at 1, so that class 0 has no samples"),
        ((0, 1, 9), r"7 of 10 classes have no samples \(2, 3, 4, 5, 6, ...\)"),
        ((0, 3), r"2 of 4 classes have no samples \(1, 2\)"),
    ],
)
def test_labels_that_look_odd_are_said(tmp_path, labels, words):
    members = [(f"{i}.{e}", c) for i, label in enumerate(labels) for e, c in (("png", PNG), ("cls", b"%d" % label))]
    source = open_source(write_tar(tmp_path / "a.tar", members))
    if words is None:
        assert source.notes == ()
    else:
        (note,) = source.notes
        assert re.search(words, note)
        assert source.own_classes is None
