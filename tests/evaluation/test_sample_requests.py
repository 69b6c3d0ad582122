"""Test how places, numbers and classes are read from words."""

from pathlib import Path

import pytest

from fastdit.errors import UserError
from fastdit.evaluation.sample_files import folder_names
from fastdit.evaluation.sample_requests import Place, classes_of, numbers, place_of

NAMES = ["cat", "dog", "0-1", "a, b", "7"]


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (None, [0, 1, 2, 3, 4]),
        ("3", [3]),
        ("1-3", [1, 2, 3]),
        ("0,2 - 4", [0, 2, 3, 4]),
        ("dog,0", [1, 0]),
        ("0-1", [2]),  # a class has this name
        ("a, b", [3]),
    ],
)
def test_classes(text, labels):
    assert classes_of(text, NAMES) == labels


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3-1", "the range 3-1 is empty"),
        ("3-5", "5 is out of range; the run has classes 0 to 4"),
        ("7", "7 is out of range"),  # a number is a label
        ("cow", "the run has cat, dog"),
        ("1,", "must be numbers, ranges or names"),
    ],
)
def test_classes_that_are_not_there(text, words):
    with pytest.raises(UserError, match=words):
        classes_of(text, NAMES)


def test_numbers():
    assert numbers("seed", "0,1, 5", int) == [0, 1, 5]
    assert numbers("guidance", "[1,1.5]", float) == [1.0, 1.5]
    for text in ("", "a", "1,", "nan", "inf", "1;2"):
        with pytest.raises(UserError, match="guidance: expected a number, or several, such as"):
            numbers("guidance", text, float)
    with pytest.raises(UserError, match="seed: expected a whole number, or several"):
        numbers("seed", "1.5", int)
    with pytest.raises(UserError, match="twice"):
        numbers("seed", "1,1", int)


@pytest.mark.parametrize(
    ("out", "form", "place"),
    [
        ("x.png", "auto", Place("grid", Path("x.png"))),
        ("a/x.npz", "auto", Place("npz", Path("a/x.npz"))),
        ("x.npz", "adm", Place("adm", Path("x.npz"))),
        ("a/b", "auto", Place("png", Path("a/b"))),
        ("a/v1.5", "auto", Place("png", Path("a/v1.5"))),
        ("a/b", "shards", Place("shards", Path("a/b"), "samples-")),
        ("a/x-{000000..}.tar", "auto", Place("shards", Path("a"), "x-")),
        ("a/x-{000000..000009}.tar", "auto", Place("shards", Path("a"), "x-")),
        ("a/x-%06d.tar", "auto", Place("shards", Path("a"), "x-")),
        ("x.tar", "auto", Place("shards", Path(), "x-")),
    ],
)
def test_places(out, form, place):
    assert place_of(out, form) == place


@pytest.mark.parametrize(
    ("out", "form", "words"),
    [
        ("x.jpg", "auto", "must end in .png or .npz"),
        ("x.png", "npz", "let its name end in .npz"),
        ("folder", "grid", "let its name end in .png"),
        ("x.npz", "png", "name a folder"),
        ("x.png", "shards", "name a folder"),
        ("x-{0..1}-{0..9}.tar", "auto", "shards have one number"),
    ],
)
def test_places_that_contradict_the_format(out, form, words):
    with pytest.raises(UserError, match=words):
        place_of(out, form)


def test_names_of_folders():
    assert folder_names(["bird", "cat", "dog"]) == ["bird", "cat", "dog"]
    assert folder_names(["dog", "cat"]) == ["0 dog", "1 cat"], "sorted, they would have other labels"
    assert folder_names(["a/b", "..", "", "CON", "x" * 300 + "ä", "c:\\d."])[0] == "0 a_b"
    for name in folder_names(["a/b", "..", "", "CON", "\0", "é" * 99, "c:\\d.", "A_b", ".git"]):
        assert 0 < len(name.encode()) < 200
        assert not set(name) & set('/\\:*?"<>|\0')
        assert not name.startswith(".")
        assert not name.endswith((".", " "))
    alike = folder_names(["a/b", "a:b", "A_B"])
    assert len({name.lower() for name in alike}) == 3, "also where upper case does not count"
