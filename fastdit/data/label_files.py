"""Read which image has which label from a file: `--data.labels labels.csv`.

    CSV, TSV or text    a path and a label on each line, apart by a comma, tab, semicolon or space, maybe with a header
    a list              a path on each line: these images alone, each in the class of the folder that holds it
    JSON                {"labels": [[path, label], ...]}, as StyleGAN's data sets have it, or {path: label}
    JSON Lines          an object with the two fields on each line, as metadata.jsonl of Hugging Face has it

Labels are class numbers if all of them are whole numbers; other labels are names, numbered in sorted order.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from fastdit.errors import UserError
from fastdit.files import printable

# Columns of paths, the most specific names first, of labels, and of what is never a label, in lower case.
_PATHS = ("path", "file_path", "filepath", "image_path", "file_name", "filename", "file", "image_name", "image", "img")
_PATHS += ("name", "image_id", "id")
_LABELS = {"label", "labels", "class", "class_id", "class_name", "category", "target", "y"}
_NO_LABELS = {"text", "caption", "prompt", "description", "additional_feature"}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_WHOLE = re.compile(r"[+-]?\d{1,18}(\.0*)?")
_JSON = 'write {"cat/1.png": 0, ...}'
_HOW = "write a path and a label on each line, such as cat/1.png,0"


class _Line(NamedTuple):
    """Hold the number of a line (of an entry, in JSON), the path that it names, and its label, if it has one."""

    number: int
    path: str
    label: str | None


class FileLabels(NamedTuple):
    """Hold the paths of each class's images, by its name or, if `named` is false, by its number as text."""

    classes: dict[str, list[str]]
    named: bool


def read_label_file(path: str, root: Path, images: Iterable[str]) -> FileLabels:
    """Return the labels in a file, sorted by class and by path.

    The file may name an image by its path below the source, with or without the source's own folders in front, by its
    absolute path, or by its bare name if only one image has it, and may leave out the suffix.

    root: the source. images: the paths of its images below `root`.

    Raises UserError for a file that cannot be read, a line without a path or label, an image that is not in the source,
    and an image with two labels.
    """
    found, missing, images = {}, [], _Images(root, images)
    lines = list(_read_lines(Path(path), images))
    for line in lines:
        image = images.find(line.path)
        if image is None:
            missing.append(line)
            continue
        label = os.path.dirname(image) if line.label is None else line.label.strip()
        if not label:
            lacks = "lies in no class folder" if line.label is None else "has no label"
            raise UserError(f"{path}: line {line.number}: {line.path!r} {lacks}; {_HOW}")
        if line.label is not None and printable(label) != label:
            problem = f"the label '{printable(label)}' is not UTF-8"
            raise UserError(f"{path}: line {line.number}: {problem}; save the file as UTF-8")
        if found.setdefault(image, label) != label:
            problem = f"{image!r} has the label {label!r} here and {found[image]!r} on an earlier line"
            raise UserError(f"{path}: line {line.number}: {problem}; keep one")
    if missing:
        first = f"{missing[0].path!r} on line {missing[0].number}"
        problem = f"{len(missing)} of the {len(lines)} images that it names are not in {root} (such as {first})"
        raise UserError(f"{path}: {problem}; mend these paths (a bare name must be unique), or take the lines out")
    if not found:
        raise UserError(f"{path}: names no images; {_HOW}")
    fractions = (label for label in found.values() if float(label) % 1)
    if all(map(_NUMBER.fullmatch, found.values())) and (fraction := next(fractions, None)):
        raise UserError(f"{path}: has the label {fraction!r}; labels must be whole numbers, or names")
    return _by_class(found)


def _by_class(labels: dict[str, str]) -> FileLabels:
    """Return images by class, for the label of each image."""
    named = not all(_WHOLE.fullmatch(label) for label in set(labels.values()))
    classes: dict[str, list[str]] = {}
    for image, label in sorted(labels.items()):
        classes.setdefault(label if named else str(int(label.partition(".")[0])), []).append(image)
    return FileLabels(dict(sorted(classes.items(), key=lambda item: item[0] if named else int(item[0]))), named)


class _Images:
    """Find images by what a file calls them."""

    def __init__(self, root: Path, images: Iterable[str]):
        self.paths = dict.fromkeys(images)
        # The folders that lead to the source, which the file may write in front of a path.
        parts = Path(os.path.realpath(root)).parts[1:]
        self._above = ["/".join(parts[-k:]) + "/" for k in range(1, len(parts) + 1)]

    @cached_property
    def _others(self) -> list[dict[str, str | None]]:
        """Name the images without the suffix, without the folders, and without both. None stands for several."""
        found: list[dict[str, str | None]] = [{}, {}, {}]
        for path in self.paths:
            stem, name = os.path.splitext(path)[0], os.path.basename(path)
            for names, other in zip(found, (stem, name, os.path.splitext(name)[0]), strict=True):
                names[other] = path if other not in names else None
        return found

    def find(self, text: str) -> str | None:
        """Return the path of the image that `text` names, or None if there is none or several."""
        if text in self.paths:
            return text
        plain = os.path.normpath(text.strip().replace("\\", "/")).lstrip("/")
        inside = (plain.removeprefix(above) for above in self._above if plain.startswith(above))
        for name in (plain, *inside):
            if name in self.paths:
                return name
            if path := next((names[name] for names in self._others if names.get(name)), None):
                return path
        return None


def _read_lines(path: Path, images: _Images) -> Iterator[_Line]:
    """Yield the lines of a file. Raises UserError if it holds no paths and labels."""
    try:
        content = path.read_bytes()
    except OSError as error:
        problem = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        choices = "auto, first, deepest, or a file of labels"
        raise UserError(f"--data.labels {path}: {problem}; give {choices}") from error
    utf16 = content[:2] in (b"\xff\xfe", b"\xfe\xff")
    if not utf16 and b"\0" in content:
        raise UserError(f"{path}: is no text; {_HOW}")
    # Names of files may have any bytes, which os.fsdecode keeps in the same way.
    text = content.decode("utf-16" if utf16 else "utf-8-sig", errors="surrogateescape")
    if path.suffix.lower() in (".json", ".jsonl"):
        yield from _read_json(path, text)
    else:
        yield from _read_table(path, _rows(path, text, images), images)


def _rows(path: Path, text: str, images: _Images) -> Iterator[tuple[int, list[str]]]:
    """Yield the number and the cells of each line that is not empty."""
    lines = text.splitlines()
    while _is_comment(first := next((line for line in lines if line.strip()), ""), images):
        text = text.replace(first, "", 1)
        lines = text.splitlines()
    mark = next((mark for mark in "\t,;" if mark in first and images.find(first) is None), None)
    if mark is None:
        for number, line in enumerate(lines, 1):
            if line.strip():
                whole = images.find(line) is not None or " " not in line.strip()
                yield number, [line.strip()] if whole else line.rsplit(maxsplit=1)
        return
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=mark, skipinitialspace=True)
    try:
        yield from ((reader.line_num, row) for row in reader if any(cell.strip() for cell in row))
    except csv.Error as error:
        raise UserError(f"{path}: line {reader.line_num}: {error}; {_HOW}") from error


def _is_comment(line: str, images: _Images) -> bool:
    """Return whether a line begins with # and names no image."""
    if not line.lstrip().startswith("#"):
        return False
    return not any(map(images.find, (line, re.split(r"[\t,;]", line)[0], line.rsplit(maxsplit=1)[0])))


def _read_table(path: Path, rows: Iterator[tuple[int, list[str]]], images: _Images) -> Iterator[_Line]:
    """Yield the lines of a table whose first row may be a header. Raises UserError that names a line."""
    start, first = next(rows, (0, []))
    if not first:
        return
    names = [cell.strip().lower() for cell in first]
    if set(_PATHS).intersection(names) and not any(images.find(cell) for cell in first):
        place, label = _columns(path, names)
    elif len(first) > 2:
        remedy = "write a header that calls two of them path and label"
        raise UserError(f"{path}: has {len(first)} columns and no header; {remedy}")
    else:
        place, label = 0, 1 if len(first) == 2 else None
        rows = chain([(start, first)], rows)
    for number, row in rows:
        if len(row) != len(first):
            raise UserError(f"{path}: line {number}: has {len(row)} columns, and the first line {len(first)}; {_HOW}")
        yield _Line(number, row[place], None if label is None else row[label])


def _columns(path: Path, names: list[str]) -> tuple[int, int | None]:
    """Return the places of the columns of paths and labels; the latter is None if there is one column.

    Raises UserError if it is not clear which column holds the labels.
    """
    place = names.index(next(name for name in _PATHS if name in names))
    others = [k for k in range(len(names)) if k != place]
    known = [k for k in others if names[k] in _LABELS]
    if len(known) != 1 and (len(others) > 1 or any(names[k] in _NO_LABELS | set(_PATHS) for k in others)):
        which = "none is called label" if not known else "several may be the label"
        raise UserError(f"{path}: has the columns {', '.join(names)}, and {which}; keep a path and a label")
    return place, (known or others or [None])[0]


def _read_json(path: Path, text: str) -> Iterator[_Line]:
    """Yield the entries of a JSON or JSON Lines file, or a list of objects. Raises UserError if they are no labels."""
    try:
        if path.suffix.lower() == ".jsonl":
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not JSON ({error}); mend it, or {_HOW}") from error
    if isinstance(found, dict):
        found = found.get("labels", list(found.items()))
    if not isinstance(found, list) or not found:
        raise UserError(f"{path}: holds no labels; {_JSON}")
    fields = list(found[0]) if isinstance(found[0], dict) else []
    if fields and not set(_PATHS).intersection(map(str.lower, fields)):
        raise UserError(f"{path}: its fields {', '.join(fields)} hold no path that is called so; name one of them path")
    place, label = _columns(path, [field.lower() for field in fields]) if fields else (0, 1)
    for number, entry in enumerate(found, 1):
        try:
            name, value = (entry[fields[place]], entry[fields[label]]) if fields else entry
        except (TypeError, KeyError, ValueError):
            name = value = None
        if type(name) is not str or type(value) not in (int, str):
            raise UserError(f"{path}: entry {number} is no path and label; {_JSON}")
        yield _Line(number, name, str(value))
