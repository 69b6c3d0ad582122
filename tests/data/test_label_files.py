"""Labels from a file: each form that people have, and what is wrong with one, named by its line."""

import json
import os
import subprocess
import sys

import pytest
from launching import TINY, forked
from test_folders import listed, refusal, tree

from fastdit.data import open_source
from fastdit.encode import _encode

FILES = ["a.png", "b.png", "more/c.png"]  # loose images and folders, which have no classes by themselves
BY_NUMBER = ("0", "1", "2"), [("b.png", 0), ("a.png", 2), ("more/c.png", 2)]
BY_NAME = ("cat", "wild dog"), [("b.png", 0), ("a.png", 1), ("more/c.png", 1)]


@pytest.fixture
def root(tmp_path):
    return tree(tmp_path / "data" / "faces", *FILES)


def read(root, name: str, content: str | bytes):
    """Return what `listed` does for a file of labels beside the images."""
    path = root.parent / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    names, images = listed(root, labels=str(path))
    return names, sorted(images, key=lambda image: (image[1], image[0]))


def refused(root, name: str, content: str | bytes) -> str:
    path = root.parent / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    text = refusal(root, labels=str(path))
    assert text.startswith(f"{path}: ")
    return text


@pytest.mark.parametrize(
    "content",
    [
        "a.png,2\nb.png,0\nmore/c.png,2\n",
        "\ufeffFile_Name,Class\r\na.png,2\r\nb.png,0\r\n\r\nmore/c.png,2\r\n",
        "label,split,path\n2,train,a.png\n0,train,b.png\n2,val,more/c.png\n",
        "a.png\t2\nb.png\t0\nmore/c.png\t2",
        "image; target\na.png; 2\nb.png; 0\nmore/c.png; 2\n",
        "a.png 2\nb.png 0\nmore/c.png  2\n",
        "./a.png,2.0\nb.png,0.0\nmore\\c.png,2.\n",
        "id,breed\na,2\nb,0\nc,2\n",
        "id,filename,label\n0,a.png,2\n1,b.png,0\n2,c.png,2\n",
        "# my labels\n# of 3 images\na.png,2\nb.png,0\nmore/c.png,2\n",
        '"a.png","2"\n"b.png",+0\n"more/c.png",02\n',
        "faces/a.png,2\ndata/faces/b.png,0\nfaces/more/c.png,2\n",
        "a.png,2\nb.png,0\na.png,2\nc.png,2\n",
        "a.png,2\nb.png,0\nc.png,2\n".encode("utf-16"),
    ],
)
def test_tables_of_numbers(root, content):
    assert read(root, "labels.csv", content) == BY_NUMBER


def test_names_are_numbered_in_their_order(root):
    assert read(root, "labels.csv", "path,label,comment\na,wild dog,x\nb,cat,\nc,wild dog,\n") == BY_NAME
    source = open_source(str(root), labels=str(root.parent / "labels.csv"))
    assert source.own_classes == 2


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("dataset.json", {"labels": [["a.png", 2], ["b.png", 0], ["more/c.png", 2]]}),
        ("labels.json", {"a.png": 2, "b.png": 0, "c": 2}),
        ("labels.json", [{"image": "a.png", "label": 2}, {"image": "b.png", "label": 0}, {"label": 2, "image": "c"}]),
    ],
)
def test_json(root, name, content):
    assert read(root, name, json.dumps(content)) == BY_NUMBER


def test_json_lines(root):
    lines = [{"file_name": name, "label": "xy"[k % 2], "text": ""} for k, name in enumerate(FILES)]
    names, images = read(root, "metadata.jsonl", "\n".join(map(json.dumps, lines)))
    assert names == ("x", "y")
    assert images == [("a.png", 0), ("more/c.png", 0), ("b.png", 1)]


def test_a_list_chooses_images_of_class_folders(tmp_path):
    """Food-101's lists have no suffixes; other names have spaces, commas and bytes that are not UTF-8."""
    odd = os.fsdecode(b"\xff, 1.png")
    root = tree(tmp_path / "images", "apple pie/10.png", "apple pie/11.png", f"dog/{odd}", "dog/2.jpg", "owl/1.png")
    expected = ("apple pie", "dog"), [("apple pie/10.png", 0), ("dog/2.jpg", 1), (r"dog/\xff, 1.png", 1)]
    for first in ("apple pie/10\n", "apple pie/10.png\n", "path\napple pie/10.png\n"):
        assert read(root, "train.txt", os.fsencode(f"{first}dog/2.jpg\ndog/{odd}\n")) == expected
    note = open_source(str(root), labels=str(tmp_path / "train.txt")).notes[0]
    assert note == f"{root}: not taken: 2 images that train.txt does not name"


def test_a_file_overrules_class_folders_and_splits(tmp_path):
    root = tree(tmp_path / "x", "train/cat/1.png", "train/dog/2.png", "val/cat/3.png")
    names, images = read(root, "train.csv", "train/cat/1.png 7\ntrain/dog/2.png 3\n")
    assert images == [("train/dog/2.png", 3), ("train/cat/1.png", 7)]
    assert len(names) == 8
    assert "6 of 8 classes have no samples" in open_source(str(root), labels=str(tmp_path / "train.csv")).notes[1]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("x.csv", "", ["names no images", "cat/1.png,0"]),
        ("x.csv", "path,label\n", ["names no images"]),
        ("x.csv", "a.png,0\nz.png,1\n", ["1 of the 2 images", "'z.png' on line 2", "take the lines out"]),
        ("x.csv", "a.png,0\nb.png,\n", ["line 2", "'b.png' has no label"]),
        ("x.csv", "a.png,0\nb.png\n", ["line 2", "1 columns", "first line 2"]),
        ("x.csv", "a.png,0\nb.png,0\na.png,1\n", ["line 3", "'a.png' has the label '1' here and '0'", "keep one"]),
        ("x.csv", "a.png,0,1\n", ["3 columns and no header", "path and label"]),
        ("x.csv", "path,breed,color\na.png,0,1\n", ["path, breed, color", "none is called label"]),
        ("x.csv", "path,Caption\na.png,a cat\n", ["path, caption", "none is called label"]),
        ("x.csv", "filename,id\na.png,1\n", ["filename, id", "none is called label"]),
        ("x.csv", "image,name\na.png,a\n", ["image, name", "none is called label"]),
        ("x.jsonl", '{"file_name": "a.png", "text": "a cat"}\n', ["file_name, text", "none is called label"]),
        ("x.csv", "a.png,0.5\nb.png,1\n", ["the label '0.5'", "whole numbers, or names"]),
        ("x.csv", "a.png,caf\u00e9\nb.png,dog\n".encode("latin-1"), ["line 1", "'caf\\xe9'", "save the file as UTF-8"]),
        ("x.csv", "path,class,label\na.png,0,1\n", ["several may be the label"]),
        ("x.txt", "a.png\nb.png\n", ["line 1", "'a.png' lies in no class folder"]),
        ("x.mat", b"MATLAB 5.0 MAT-file\0\0", ["is no text"]),
        ("x.json", "{", ["is not JSON"]),
        ("x.json", '{"labels": null}', ["holds no labels"]),
        ("x.json", '{"a.png": 1.5}', ["entry 1 is no path and label"]),
        ("x.json", '{"a.png": true}', ["entry 1 is no path and label"]),
        ("x.json", '[["a.png", 1], ["b.png"]]', ["entry 2 is no path and label"]),
        ("x.json", '[{"a": 1}]', ["fields a", "name one of them path"]),
        ("x.jsonl", '{"file_name": "a.png"}\n', ["entry 1 is no path and label"]),
    ],
)
def test_files_that_are_no_labels(root, name, content, parts):
    text = refused(root, name, content)
    for part in parts:
        assert part in text


def test_a_name_of_an_image_may_begin_like_a_comment(tmp_path):
    root = tree(tmp_path / "faces", "#1.png", "2.png")
    assert read(root, "labels.csv", "#1.png,1\n2.png,0\n") == (("0", "1"), [("2.png", 0), ("#1.png", 1)])


def test_a_bare_name_must_be_unique(tmp_path):
    root = tree(tmp_path / "x", "a/1.png", "b/1.png")
    assert "a bare name must be unique" in refused(root, "x.csv", "1.png,0\n")
    assert read(root, "x.csv", "a/1.png,0\n")[1] == [("a/1.png", 0)]


def test_where_a_file_is_no_choice(root):
    text = refusal(root, labels="deepst")
    assert text == "--data.labels deepst: no such file; give auto, first, deepest, or a file of labels"
    for source in ("fashion_mnist", "synthetic:3x4x4:2:9"):
        assert "labels of its own" in refusal(source, labels="labels.csv")
    with pytest.raises(Exception, match="label -1 is out of range"):
        read(root, "x.csv", "a.png,-1\nb.png,0\n")


def test_a_run_from_anywhere(root, monkeypatch, tmp_path):
    """A relative path is kept as an absolute one: the run goes on from another folder."""
    (root.parent / "labels.csv").write_text("a,cat\nb,dog\nc,cat\n")
    monkeypatch.chdir(root.parent)
    flags = [*TINY, "--data.source", "faces", "--data.labels", "labels.csv", "--data.size", "14", "--batch", "2"]
    flags += ["--data.channels", "3", "--out", tmp_path / "run"]
    text = forked(*flags, "--steps", "2").succeeded().text
    assert ", 2 classes" in text
    assert json.loads((tmp_path / "run" / "classes.json").read_text()) == ["cat", "dog"]
    monkeypatch.chdir(tmp_path)
    forked("--resume", "--out", "run", "--steps", "3").succeeded()


def test_encode_and_check(root, tmp_path):
    path = root.parent / "labels.csv"
    path.write_text("a,1\nb,0\nc,1\n")
    flags = ["--source", str(root), "--labels", str(path), "--autoencoder", "identity", "--size", "8"]
    _encode([*flags, "--out", str(tmp_path / "latents")])
    assert sorted(open_source(str(tmp_path / "latents")).labels) == [0, 1, 1]
    command = [sys.executable, "-m", "fastdit.commands.data_tools", "check", str(root), "--labels", str(path)]
    assert "3 samples, 2 classes" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
