"""Test Hugging Face data sets: parquet and Arrow files give the samples of the same images in class folders."""

import json
import shlex
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from data_helpers import take
from launching import TINY, averages, forked, metrics
from table_helpers import (
    IMAGE,
    NAMES,
    class_folders,
    class_label,
    labeled,
    on_the_hub,
    save_to_disk,
    shipped,
    table,
    write_arrow,
    write_parquet,
)

from fastdit.commands import data_check, data_convert
from fastdit.config import Config, DataConfig
from fastdit.data import open_source, tables
from fastdit.data.checking import check
from fastdit.encode import _encode
from fastdit.errors import UserError
from fastdit.run_parts import open_data

FORMS = {
    "a parquet file": lambda root: write_parquet(root / "a.parquet", labeled()),
    "parquet, zstd, with a dictionary": lambda root: write_parquet(root / "a.parquet", labeled(), compression="zstd"),
    "a folder of parquet files": lambda root: on_the_hub(root, labeled(), "train"),
    "numbered parquet files": lambda root: write_parquet(root / "plain_text/train/0000.parquet", labeled()).parent,
    "a pattern": lambda root: on_the_hub(root, labeled(), "train", "test") / "data/train-*.parquet",
    "a range": lambda root: on_the_hub(root, labeled(), "train", "test") / "data/train-{00000..00001}-of-00002.parquet",
    "an Arrow file": lambda root: write_arrow(root / "a.arrow", labeled()),
    "save_to_disk": lambda root: save_to_disk(root, labeled()),
    "a split of a DatasetDict": lambda root: dataset_dict(root, "train", "test") / "train",
    "a DatasetDict of one split": lambda root: dataset_dict(root, "train"),
}


def dataset_dict(root, *splits):
    for split in splits:
        save_to_disk(root / split, labeled())
    (root / "dataset_dict.json").write_text(json.dumps({"splits": splits}))
    return root


def contents(source) -> list[tuple[bytes, int]]:
    return [(source.read(i).tobytes(), int(source.labels[i])) for i in range(source.n)]


def refusal(path, **options) -> str:
    with pytest.raises(UserError) as error:
        open_source(str(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_samples_of_class_folders(tmp_path, form):
    images, labels = shipped(12)
    source = open_source(str(FORMS[form](tmp_path / "set")))
    assert contents(source) == contents(open_source(str(class_folders(tmp_path / "tree", images, labels))))
    assert source.class_names == NAMES
    assert source.own_classes == 3
    assert source.kind == "image"
    assert source.notes == ()


@pytest.mark.parametrize("reader", ["dali", "torch"])
@pytest.mark.parametrize("large", [False, True])
def test_batches_are_those_of_class_folders(tmp_path, monkeypatch, reader, large):
    """Also of a set that is too large for memory, of which few row groups are kept."""
    monkeypatch.setattr(tables, "_DECODED_BYTES", 0 if large else 1 << 20)
    images, labels = shipped(40)
    source = open_source(str(on_the_hub(tmp_path / "set", table(images, label=labels), "train")))
    tree = open_source(str(class_folders(tmp_path / "tree", images, labels)))
    options = {"batch": 8, "size": 28, "channels": 1, "reader": reader}
    for (x, y), (other, other_y) in zip(take(12, source, **options), take(12, tree, **options)):
        assert torch.equal(x, other)
        assert torch.equal(y, other_y)
    assert (len(source.samples._images) <= tables._KEPT) == large
    assert any("fastdit-data convert" in note for note in source.notes) == large


@pytest.mark.launch
@pytest.mark.parametrize(("ranks", "form"), [(1, "save_to_disk"), (2, "a pattern")])
def test_a_run_and_its_continuation_are_those_of_class_folders(tmp_path, ranks, form):
    run, other = tmp_path / "run", tmp_path / "other"
    sources = {run: FORMS[form](tmp_path / "set"), other: class_folders(tmp_path / "tree", *shipped(12))}
    for out, source in sources.items():
        flags = [*TINY, "--batch", 4, "--data.source", source, "--out", out, "--save_every", 3, "--steps", 6]
        forked(*flags, "--steps", 3 if out == run else 6, ranks=ranks).succeeded()
    assert "resumed" in forked("--resume", "--out", run, "--steps", 6, ranks=ranks).succeeded().text
    assert metrics(run, untimed=True) == metrics(other, untimed=True)
    expected = averages(other, 6)
    assert all(torch.equal(value, expected[key]) for key, value in averages(run, 6).items())
    assert json.loads((run / "classes.json").read_text()) == list(NAMES)


@pytest.mark.launch
def test_commands_take_tables(tmp_path):
    """Encode, check, convert to shards, and evaluate a run against a split with the same columns."""
    images, labels = shipped(24)
    columns = {"fine_label": labels, "coarse_label": [0] * 24}
    hub = on_the_hub(tmp_path / "hub", table(images, **columns), "train", "test")
    train, flag = f"{hub}/data/train-*.parquet", ["--label_column", "fine_label"]
    data_check.run([train, *flag])
    data_convert.run([train, *flag, "--out", f"{tmp_path}/shards", "--per_shard", "10"])
    source = open_source(train, label_column="fine_label")
    assert contents(open_source(f"{tmp_path}/shards")) == contents(source)
    assert check(f"{tmp_path}/shards").problems.lines == []
    _encode([*shlex.split(f"--source '{train}' --autoencoder identity --size 28 --out {tmp_path}/latents"), *flag])
    assert open_source(f"{tmp_path}/latents").labels.tolist() == labels
    run = tmp_path / "run"
    flags = [*TINY, "--data.source", train, "--data.label_column", "fine_label", "--steps", 1, "--out", run]
    forked(*flags).succeeded()
    flags = ["--run", run, "--data", f"{hub}/data/test-*.parquet", "--n", 12, "--device", "cpu", "--steps", 2]
    assert "FD-lite0" in forked(*flags, program="fastdit.evaluate").succeeded().text


def test_a_conversion_goes_on_where_it_was(tmp_path, monkeypatch):
    source = str(write_parquet(tmp_path / "a.parquet", labeled(12)))
    arguments = [source, "--out", f"{tmp_path}/out", "--per_shard", "5"]
    read = tables.TableSamples.read

    def fail(self, i):
        if i == 7:
            raise KeyboardInterrupt
        return read(self, i)

    monkeypatch.setattr(tables.TableSamples, "read", fail)
    with pytest.raises(KeyboardInterrupt):
        data_convert.run(arguments)
    assert "not all of its samples" in refusal(tmp_path / "out")
    first = (tmp_path / "out/images-00000.tar").stat().st_mtime_ns
    monkeypatch.undo()
    with pytest.raises(UserError, match="was begun with per_shard 5"):
        data_convert.run([*arguments[:-1], "6"])
    data_convert.run(arguments)
    data_convert.run(arguments)
    assert (tmp_path / "out/images-00000.tar").stat().st_mtime_ns == first
    assert contents(open_source(f"{tmp_path}/out")) == contents(open_source(source))
    assert open_source(f"{tmp_path}/out").class_names == NAMES


# Labels


@pytest.mark.parametrize(
    ("labels", "expected", "names"),
    [
        (["dog", "cat", "dog", "ant"], [2, 1, 2, 0], ("ant", "cat", "dog")),
        (pa.array(["dog", "cat", "dog", "ant"]).dictionary_encode(), [2, 1, 2, 0], ("ant", "cat", "dog")),
        (pa.array(["b", "a", "b", "a"], pa.large_string()), [1, 0, 1, 0], ("a", "b")),
        (pa.array([1, 0, 2, 2], pa.uint8()), [1, 0, 2, 2], ("0", "1", "2")),
        (pa.array([True, False, True, True]), [1, 0, 1, 1], ("0", "1")),
    ],
)
def test_labels_are_numbers_or_text(tmp_path, labels, expected, names):
    source = open_source(str(write_parquet(tmp_path / "a.parquet", table(shipped(4)[0], labels=labels), group=2)))
    assert source.labels.tolist() == expected
    assert source.class_names == names
    assert source.labels.dtype == np.int64


def test_text_is_numbered_over_all_files(tmp_path):
    for k, name in enumerate(("wren", "auk")):
        write_parquet(tmp_path / f"{k}.parquet", table(shipped(2)[0], label=[name, name]))
    source = open_source(str(tmp_path))
    assert (source.class_names, source.labels.tolist()) == (("auk", "wren"), [1, 1, 0, 0])


def test_a_label_without_a_class_is_refused(tmp_path):
    rows = table(shipped(3)[0], {"label": class_label(("a", "b"))}, label=[0, 1, 2])
    assert "row 2: label 2 is out of range for 2 classes" in refusal(write_parquet(tmp_path / "a.parquet", rows))


@pytest.mark.parametrize("missing", [-1, None])
def test_rows_without_a_label(tmp_path, missing):
    """Refuse them, but take a set without any label as one class where images alone are asked for."""
    images = shipped(3)[0]
    some = write_parquet(tmp_path / "some.parquet", table(images, label=pa.array([0, missing, missing])))
    assert f"{some}: row 1: has no label" in refusal(some)
    assert [line.partition(": has")[0] for line in check(str(some)).problems.lines] == [
        f"{some}: row 1",
        f"{some}: row 2",
    ]
    none = write_parquet(tmp_path / "none.parquet", table(images, label=pa.array([missing] * 3, pa.int64())))
    assert "row 0: has no label" in refusal(none)
    for options in ({"flat": True}, {"classes": 1}):
        source = open_source(str(none), **options)
        assert source.labels.tolist() == [0, 0, 0]
        assert "taken as one class, since it has no labels (column label is null or -1)" in source.notes[0]


def test_a_set_without_a_column_of_labels(tmp_path):
    path = write_parquet(tmp_path / "faces.parquet", table(shipped(3)[0], caption=["a", "b", "c"]))
    text = refusal(path)
    assert "columns: image, caption" in text
    assert "--data.labels none --label_drop 0" in text
    source = open_source(str(path), classes=1)
    assert source.class_names == ("faces",)
    assert "(no column of labels; --data.label_column names one)" in source.notes[0]
    assert open_source(str(path), label_column="caption").classes == 3


# Columns


def test_columns_are_for_tables(tmp_path):
    config = Config(data=DataConfig(label_column="label"))
    with pytest.raises(UserError, match=r"data\.label_column: fashion_mnist is no Hugging Face data set"):
        open_data(config)


def test_of_several_columns_one_must_be_chosen(tmp_path):
    images, labels = shipped(4)
    rows = table(images, {"fine_label": class_label(), "coarse_label": class_label()}, image="img", fine_label=labels)
    rows = rows.append_column("coarse_label", pa.array([0] * 4))
    path = write_parquet(tmp_path / "cifar100.parquet", rows)
    text = refusal(path)
    assert "2 columns may hold the labels (fine_label, coarse_label)" in text
    assert "--data.label_column fine_label" in text
    assert open_source(str(path), label_column="fine_label").labels.tolist() == labels
    assert "has no column fin (but img, fine_label" in refusal(path, label_column="fin")
    assert "holds no images but string" in refusal(
        write_parquet(tmp_path / "t.parquet", table(images, text=["x"] * 4)), image_column="text", classes=1
    )


def test_of_several_images_one_must_be_chosen(tmp_path):
    images, labels = shipped(4)
    rows = table(images, label=labels).append_column("mask", table(images[::-1]).column("image"))
    path = write_parquet(tmp_path / "a.parquet", rows)
    assert "2 columns may hold the images (image, mask); choose one with --data.image_column" in refusal(path)
    assert open_source(str(path), image_column="mask").read(0).tobytes() == images[-1]


def test_plain_bytes_are_images(tmp_path):
    images, labels = shipped(4)
    rows = pa.table({"embedding": [b"\0"] * 4, "jpg": pa.array(images, pa.large_binary()), "cls": labels})
    for path in (write_parquet(tmp_path / "a.parquet", rows), write_arrow(tmp_path / "a.arrow", rows)):
        assert contents(open_source(str(path))) == list(zip(images, labels))


BAD_ROWS = {
    "addresses only": (lambda: pa.table({"url": ["https://x/1.jpg"], "label": [0]}), "fastdit downloads nothing"),
    "no images": (lambda: pa.table({"text": ["x"], "label": [0]}), "has no column of images (its columns: text, la"),
    "several labels": (lambda: table(shipped(1)[0], label=[[0, 1]]), "several labels a sample"),
    "fractions": (lambda: table(shipped(1)[0], label=[0.5]), "labels are whole numbers or text"),
    "no rows": (lambda: table([], label=pa.array([], pa.int64())), "hold no rows"),
    "an image that is null": (lambda: table([*shipped(6)[0], None], label=[0] * 7), "row 6: column image holds no"),
    "numbers beyond int64": (lambda: table(shipped(1)[0], label=pa.array([2**64 - 1], pa.uint64())), "beyond 64 bits"),
}


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_refused(tmp_path, case, write):
    rows, message = BAD_ROWS[case]
    path = write(tmp_path / ("a.parquet" if write is write_parquet else "a.arrow"), rows())
    assert message in (text := refusal(path))
    assert str(path) in text


def test_null_rows_have_no_image(tmp_path):
    """Also where the struct itself is null, and where only a large set's row groups tell."""
    rows = pa.table({"image": pa.array([{"bytes": b"x", "path": None}, None], IMAGE), "label": [0, 0]})
    for path in (write_parquet(tmp_path / "a.parquet", rows), write_arrow(tmp_path / "a.arrow", rows)):
        assert "row 1: column image holds no image" in refusal(path)
        assert len(check(str(path), decode=False).problems.lines) == 1


def test_without_pyarrow_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", labeled(3))
    for name in ("pyarrow", "fastdit.data.table_files", "fastdit.data.table_columns"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("fastdit.data.table_files", raising=False)
    monkeypatch.delattr("fastdit.data.table_columns", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install 'fastdit[parquet]'" in refusal(path)
