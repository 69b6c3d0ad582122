"""Read what a user asks for in words: places for samples, lists of numbers, and classes."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastdit.errors import UserError

_RANGE = re.compile(r"(\d+)\s*-\s*(\d+)")
_SUFFIXES = {".png": "grid", ".npz": "npz", ".tar": "shards"}
_NAMED_BY = {"grid": (".png",), "npz": (".npz",), "adm": (".npz",), "png": (), "shards": (".tar",)}
_STEM = "samples-"  # of shards in a folder


@dataclass(frozen=True)
class Place:
    """Hold where samples are written, and in which form.

    Args:
        kind: a picture (grid), an .npz with our names of arrays or ADM's (npz, adm), PNG files, or shards.
        path: the file, or the folder.
        stem: the part of shards' names before the number.
    """

    kind: Literal["grid", "npz", "adm", "png", "shards"]
    path: Path
    stem: str = _STEM


def place_of(out: str, form: str) -> Place:
    """Return the place that `--out` and `--format` name. Raises UserError if they contradict each other.

    A name of shards holds a number in one of the forms `x-{000000..}.tar`, `x-{000000..000009}.tar`, `x-%06d.tar`;
    `x.tar` stands for `x-{000000..}.tar`.
    """
    path = Path(out)
    suffix = path.suffix.lower() if not path.is_dir() else ""
    if suffix and suffix not in _SUFFIXES and re.fullmatch(r"\.[a-z]{3,4}", suffix):
        raise UserError(
            f"--out {out}: must end in .png or .npz, be a name of shards such as x-{{000000..}}.tar, or be a folder"
        )
    kind = form if form != "auto" else _SUFFIXES.get(suffix, "png")
    if kind in ("grid", "npz", "adm") and suffix not in _NAMED_BY[kind]:
        raise UserError(f"--out {out}: --format {form} is one file; let its name end in {_NAMED_BY[kind][0]}")
    if kind in ("png", "shards") and suffix in _SUFFIXES and suffix not in _NAMED_BY[kind]:
        raise UserError(f"--out {out}: --format {form} is many files; name a folder")
    if kind != "shards" or suffix != ".tar":
        return Place(kind, path)
    stem = re.sub(r"(\{\d+\.\.\d*\}|%0?\d*d)$", "", path.stem)
    if re.search(r"[{}%*]", stem):
        raise UserError(f"--out {out}: shards have one number, at the end of their names, as in x-{{000000..}}.tar")
    return Place(kind, path.parent, stem if stem != path.stem else f"{stem}-")


def numbers(flag: str, text: str, kind: Callable[[str], float]) -> list:
    """Return the numbers in a list such as 1,1.5,2. kind: int or float. Raises UserError."""
    words = "a whole number, or several, such as 0,1,2" if kind is int else "a number, or several, such as 1,1.5,2"
    try:
        found = [kind(part) for part in text.strip("[]").split(",")]
        if not all(map(math.isfinite, found)):
            raise ValueError
    except ValueError:
        raise UserError(f"--{flag}: expected {words}; got {text}") from None
    if len(set(found)) < len(found):
        raise UserError(f"--{flag} {text}: has a number twice; give each once")
    return found


def classes_of(text: str | None, names: Sequence[str]) -> list[int]:
    """Return the class labels of `--classes`: numbers, ranges such as 0-9, or names, with commas between.

    Raises UserError if one is neither a label nor one of `names`.
    """
    if text is None:
        return list(range(len(names)))
    known = {name: label for label, name in enumerate(names)}
    if text in known and not text.isdecimal():  # a name may have a comma
        return [known[text]]
    return [label for part in text.split(",") for label in _labels(text, part.strip(), known)]


def _labels(text: str, part: str, known: dict[str, int]) -> list[int]:
    """Return the class labels of one part of `--classes`. Raises UserError if it is neither number, range nor name."""
    if part in known and not part.removeprefix("-").isdecimal():
        return [known[part]]
    if span := _RANGE.fullmatch(part):
        first, last = map(int, span.groups())
        if first > last:
            raise UserError(f"--classes {text}: the range {part} is empty; write the smaller label first")
    else:
        try:
            first = last = int(part)
        except ValueError:
            few = ", ".join(list(known)[:10]) + (", ..." if len(known) > 10 else "")
            raise UserError(
                f"--classes {text}: must be numbers, ranges or names of classes with commas between, as 0,3,7; the run "
                f"has {few}"
            ) from None
    for label in (first, last):
        if not 0 <= label < len(known):
            raise UserError(f"--classes {text}: {label} is out of range; the run has classes 0 to {len(known) - 1}")
    return list(range(first, last + 1))
