"""Test tables that cannot be found or read: splits that may mix, damaged files, and files that stand in for others."""

import json
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_helpers import encode, picture, take
from table_helpers import class_folders, labeled, on_the_hub, save_to_disk, shipped, table, write_arrow, write_parquet
from test_data_bad import write_tar
from test_tables import dataset_dict, refusal

from fastdit.commands import data_check
from fastdit.data import open_source, tables
from fastdit.data.checking import check, place_of_manifest
from fastdit.errors import UserError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


# Splits and other files in a folder


def test_splits_are_not_mixed(tmp_path):
    on_the_hub(tmp_path, labeled(), "test", "train", "validation")
    for folder in (tmp_path, tmp_path / "data"):
        text = refusal(folder)
        assert "holds 3 sets of tables" in text
        assert f"point --data.source at one: '{tmp_path}/data/train-*.parquet'" in text
    assert open_source(f"{tmp_path}/data/train-*.parquet").n == 12
    assert "there is no such file" in refusal(f"{tmp_path}/data/nope-*.parquet")


@pytest.mark.parametrize(
    ("names", "sets"),
    [
        (["train.parquet", "test.parquet"], 2),
        (["a/0000.parquet", "b/0000.parquet"], 2),
        (["config/train/0000.parquet", "config/test/0000.parquet"], 2),
        (["cifar10-train-00000-of-00002.arrow", "cifar10-train-00001-of-00002.arrow", "cifar10-test.arrow"], 2),
        (["cifar10.parquet", "cifar100.parquet"], 2),
        (["a.parquet", "a.arrow"], 2),
        (["train-00000-of-00002-0a1b2c3d4e5f6a7b.parquet", "train-00001-of-00002-b7a6f5e4d3c2b1a0.parquet"], 1),
        (["train_0.parquet", "train_1.parquet"], 1),
        (["part-00000-0a1b2c3d-0a1b-0a1b-0a1b-0a1b2c3d4e5f-c000.snappy.parquet", "part-00001-0a1b2c3d-0a1b-0a1b-0a1b-"
          "0a1b2c3d4e5f-c000.snappy.parquet"], 1),
        (["data-00000-of-00001.arrow", "cache-0a1b2c3d4e5f.arrow", ".hidden.parquet"], 1),
    ],
)  # fmt: skip
def test_names_tell_which_files_belong_together(tmp_path, names, sets):
    for name in names:
        write = write_arrow if name.endswith(".arrow") else write_parquet
        write(tmp_path / name, labeled(3))
    if sets > 1:
        text = refusal(tmp_path)
        assert f"holds {sets} sets of tables" in text
        path = text.rpartition("at one: ")[2].strip("'")
        assert open_source(path).n == 3 * sum("train" in name for name in names) or not path.count("train")
    else:
        taken = [name for name in names if not name.startswith((".", "cache"))]
        assert open_source(str(tmp_path)).n == 3 * len(taken)


def test_a_dataset_dict_of_two_splits(tmp_path):
    assert f"point --data.source at one: {tmp_path / 'train'}" in refusal(dataset_dict(tmp_path, "test", "train"))


def test_a_saved_set_is_what_its_state_lists(tmp_path):
    saved = save_to_disk(tmp_path, labeled())
    write_arrow(saved / "cache-0123456789abcdef.arrow", labeled())
    write_arrow(saved / "other.arrow", labeled())
    assert open_source(str(saved)).n == 12
    state = json.loads((saved / "state.json").read_text())
    for change, message in (
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, "call flatten_indices"),
        ({"_data_files": [{"filename": "gone.arrow"}]}, "gone.arrow: no such file"),
        ({"_data_files": []}, "the data set is empty"),
        ({"_data_files": [3]}, "does not list the data's files"),
    ):
        (saved / "state.json").write_text(json.dumps(state | change))
        assert message in refusal(saved)
    (saved / "state.json").write_text("{")
    assert "it is no JSON" in refusal(saved)


def test_tables_beside_other_data_are_refused(tmp_path):
    images, labels = shipped(3)
    write_parquet(tmp_path / "mixed/a.parquet", labeled(3))
    class_folders(tmp_path / "mixed", images, labels)
    text = refusal(tmp_path / "mixed")
    assert "holds tables (such as a.parquet) and images" in text
    assert f"point --data.source at {tmp_path}/mixed/a.parquet" in text
    write_parquet(tmp_path / "shards/a.parquet", labeled(3))
    write_tar(tmp_path / "shards/a.tar", [("0.png", images[0]), ("0.cls", b"0")])
    assert "and shards" in refusal(tmp_path / "shards")


def test_what_describes_images_in_folders_is_no_table(tmp_path):
    images, labels = shipped(3)
    write_parquet(class_folders(tmp_path, images, labels) / "metadata.parquet", pa.table({"file_name": ["x"]}))
    source = open_source(str(tmp_path))
    assert source.n == 3
    assert source.notes == (f"{tmp_path}: not taken: 1 .parquet",)


def test_files_that_are_not_taken_are_counted(tmp_path):
    hub = on_the_hub(tmp_path, labeled(), "train")
    for name in ("a.zip", "b.zip", "load.py", ".gitattributes", "LICENSE"):
        (hub / name).write_bytes(b"x")
    assert open_source(str(hub)).notes == (f"{hub}: not taken: 2 .zip, 1 .py",)


def test_tables_have_no_manifest(tmp_path):
    with pytest.raises(UserError, match="a manifest is for shards"):
        place_of_manifest(str(write_parquet(tmp_path / "a.parquet", labeled(3))))


# Files


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    for name in ("a.parquet", "a.arrow"):
        (tmp_path / name).write_bytes(POINTER)
        assert "git lfs pull" in refusal(tmp_path / name)
    on_the_hub(tmp_path / "hub", labeled(), "train")
    second, first = (tmp_path / f"hub/data/train-0000{k}-of-00002.parquet" for k in (1, 0))
    second.write_bytes(POINTER)
    assert f"{second}: is a Git LFS pointer" in refusal(tmp_path / "hub")
    found = check(str(tmp_path / "hub"))
    assert len(found.problems.lines) == 1
    assert len(found.samples.labels) == 6
    first.write_bytes(POINTER)
    with pytest.raises(UserError, match="hold no rows that can be read"):
        check(str(tmp_path / "hub"))


@pytest.mark.parametrize("content", [b"", b"PAR1", b"hello parquet", b"<!doctype html><html>"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_other_files_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(tmp_path / name)


def test_no_cut_passes_unnoticed(tmp_path):
    """Cut a file anywhere: it is refused in one line."""
    for path in (write_parquet(tmp_path / "a.parquet", labeled()), write_arrow(tmp_path / "a.arrow", labeled())):
        whole = path.read_bytes()
        for size in np.linspace(1, len(whole) - 1, 60).astype(int):
            path.write_bytes(whole[:size])
            assert str(path) in refusal(path)


def test_no_damage_ends_the_process(tmp_path):
    """Overwrite bytes anywhere: the set is read, or refused in one line."""
    random = np.random.default_rng(0)
    for path in (write_parquet(tmp_path / "a.parquet", labeled()), write_arrow(tmp_path / "a.arrow", labeled())):
        whole = bytearray(path.read_bytes())
        for _ in range(150):
            damaged = whole.copy()
            at = int(random.integers(len(whole)))
            damaged[at : at + 4] = random.bytes(len(damaged[at : at + 4]))
            path.write_bytes(damaged)
            with suppress(UserError):
                source = open_source(str(path))
                assert sum(len(source.read(i)) for i in range(source.n)) > 0


def damaged_group(folder, **options):
    """Return a parquet file whose second row group of three cannot be decoded."""
    noise = [encode(picture(30, 30, seed=i), "PNG") for i in range(12)]
    path = write_parquet(folder / "a.parquet", table(noise, label=[0, 1] * 6), group=4, **options)
    column = pq.read_metadata(path).row_group(1).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset + (column.total_compressed_size // 2 if options else 0))
        file.write(b"\xff" * 64)
    return path


def test_a_damaged_row_group_is_named(tmp_path, monkeypatch, capsys):
    path = damaged_group(tmp_path)
    expected = f"{path}: row group 1 cannot be read, perhaps truncated or damaged"
    assert refusal(path).startswith(expected)
    found = check(str(path))
    assert [line.partition(" (")[0] for line in found.problems.lines] == [expected]
    assert len(found.samples.labels) == 8
    monkeypatch.setattr(tables, "_DECODED_BYTES", 0)
    source = open_source(str(path))
    assert len(source.read(3)) > 0
    with pytest.raises(UserError, match="row group 1 cannot be read"):
        source.read(4)
    with pytest.raises(UserError, match="1 problem in 1 file"):
        data_check.run([str(path)])
    assert expected in capsys.readouterr().out


def test_a_compressed_arrow_file_is_refused(tmp_path):
    path = write_arrow(tmp_path / "a.arrow", labeled(), options=pa.ipc.IpcWriteOptions(compression="zstd"))
    assert "is compressed, and Arrow files are read in place" in refusal(path)


def test_tables_of_two_sets_are_refused(tmp_path):
    images, labels = shipped(3)
    write_parquet(tmp_path / "0.parquet", labeled(3))
    write_parquet(tmp_path / "1.parquet", table(images, label=labels))
    assert "1.parquet: differs from 0.parquet in the classes" in refusal(tmp_path)
    write_parquet(tmp_path / "1.parquet", table(images, other=labels))
    assert "1.parquet: differs from 0.parquet in the type of column label" in refusal(tmp_path)


def test_a_damaged_image_is_named_with_its_row(tmp_path):
    images, labels = shipped(6)
    path = write_parquet(tmp_path / "a.parquet", table([*images[:5], b"no image"], label=labels))
    assert check(str(path)).problems.lines == [f"{path}: row 5: the image is corrupt and cannot be decoded; replace it"]


@pytest.mark.parametrize("reader", ["dali", "torch"])
def test_damage_that_a_run_meets_is_named(tmp_path, monkeypatch, reader):
    """Read a set whose row groups are decoded only when an image of theirs is asked for."""
    monkeypatch.setattr(tables, "_DECODED_BYTES", 0)
    path = damaged_group(tmp_path)
    source = open_source(str(path))
    with pytest.raises(UserError, match="row group 1 cannot be read"):
        take(6, source, batch=2, size=30, channels=3, reader=reader)


def test_page_checksums_are_compared(tmp_path):
    """Some writers store them; then damage that a codec does not notice is found."""
    path = damaged_group(tmp_path, compression="none", use_dictionary=False, write_page_checksum=True)
    assert "row group 1 cannot be read" in refusal(path)


def test_a_folder_with_a_part_of_its_set(tmp_path):
    for k in (0, 2):
        (tmp_path / f"train-0000{k}-of-00003.parquet").touch()
    with pytest.raises(UserError, match="holds 2 of the 3 files of its set") as error:
        open_source(str(tmp_path))
    assert str(error.value).endswith(f"'{tmp_path}/train-*.parquet'")
