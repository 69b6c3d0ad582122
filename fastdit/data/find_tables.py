"""Find the files of a Hugging Face data set: parquet files, or the Arrow files that `datasets` saves.

    data/train-00000-of-00002.parquet ...      the hub's layout; so is CONFIG/SPLIT/0000.parquet
    dataset_dict.json, SPLIT/state.json ...    DatasetDict.save_to_disk
    state.json, data-00000-of-00001.arrow ...  Dataset.save_to_disk; state.json lists the files that belong to it

The files of one split form a set. A folder that holds several sets is refused, because training on a validation split
by mistake shows nowhere. The names of files come from `datasets` 4 (src/datasets/naming.py, arrow_dataset.py).
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastdit.data.folders import holds_images
from fastdit.data.shards import find_shards, is_leftover, matching, shards_in, shared_pattern
from fastdit.errors import UserError
from fastdit.files import read_json

_SUFFIXES = (".parquet", ".arrow")
_BESIDE = (".md", ".json", ".txt", "")  # suffixes of the files that describe a data set
_LEVELS = 2  # folders between the root and a table: CONFIG/SPLIT
_FEW = 200  # entries that are looked at before a folder counts as one without tables
# The number at the end of a name: train-00000-of-00002, train-00000-of-00002-0a1b2c3d4e5f, train_0, 0000.
_NUMBER = re.compile(r"(^|[-_.])(\d+[-_.]of[-_.]\d+([-_.][0-9a-f]{6,})?|\d+|\d+-[0-9a-f]{8}-[0-9a-f-]{27}\S*)$")


def is_table(path: str | os.PathLike) -> bool:
    """Return whether a file of this name is a table: its suffix is `.parquet` or `.arrow`."""
    return str(path).lower().endswith(_SUFFIXES)


def find_tables(path: str) -> list[Path]:
    """Return the tables that `path` names: one file, a pattern `train-*.parquet`, or a range `train-{0..3}.parquet`.

    Raises UserError if there is none.
    """
    if Path(path).is_file() or "{" in path:
        return find_shards(path)
    if not (found := matching(path)):
        raise UserError(f"{path}: there is no such file; check the path, or the pattern")
    return found


def tables_in(folder: Path) -> list[Path]:
    """Return the tables of the data set in `folder`, or an empty list if it holds none.

    Raises UserError if it holds several sets, such as the splits of one, or tables and other kinds of data.
    """
    # Take the files that `datasets` lists in a folder that it saved.
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(path.parent for path in folder.glob("*/state.json"))
        if len(splits) != 1:
            raise _several(folder, {str(split): [split] for split in splits})
        folder = splits[0]
    if saved := _saved(folder):
        return saved

    # Else look for tables by their names.
    sets: dict[str, list[Path]] = {}
    for path in sorted(_walk(folder, _LEVELS)):
        sets.setdefault(f"{path.parent / _NUMBER.sub('', path.stem)}{path.suffix.lower()}", []).append(path)
    if not sets:
        return []
    other = "shards" if shards_in(folder) else "images" if holds_images(folder) else None
    first = next(iter(sets.values()))
    if other:
        raise UserError(
            f"{folder}: holds tables (such as {first[0].relative_to(folder)}) and {other}; move one kind elsewhere, or "
            f"point --data.source at {shared_pattern(first)}"
        )
    if len(sets) > 1:
        raise _several(folder, sets)
    _check_whole(folder, first)
    return first


def _check_whole(folder: Path, paths: list[Path]) -> None:
    """Raise UserError if the names of a set's files, such as train-00000-of-00003, tell that some are missing."""
    counts = {int(found[1]) for path in paths if (found := re.search(r"[-_.]of[-_.](\d+)", path.stem))}
    if len(counts) == 1 and len(paths) < (whole := counts.pop()):
        raise UserError(
            f"{folder}: holds {len(paths)} of the {whole} files of its set (such as {paths[0].name}); fetch the "
            f"others, or take these alone: --data.source {shared_pattern(paths)}"
        )


def left_out(folder: Path) -> str:
    """Return a phrase that counts the files of a data set's folder that are no tables and do not describe them."""
    suffixes = (path.suffix.lower() for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    counts = Counter(suffix for suffix in suffixes if suffix not in (*_SUFFIXES, *_BESIDE))
    return ", ".join(f"{n} {suffix}" for suffix, n in counts.most_common(6))


def _saved(folder: Path) -> list[Path]:
    """Return the files that the `state.json` of `datasets` lists, or an empty list if there is no such file."""
    state = folder / "state.json"
    remedy = "save the data set again"
    listed = read_json(state, remedy) if state.is_file() else None
    if not isinstance(listed, dict) or "_data_files" not in listed:
        return []
    if listed.get("_indices_data_files") or listed.get("_indices_files"):
        raise UserError(f"{state}: the data set is a selection of rows (indices); call flatten_indices, and {remedy}")
    try:
        names = [file["filename"] for file in listed["_data_files"]]
    except (TypeError, KeyError):
        raise UserError(f"{state}: does not list the data's files by name; {remedy}") from None
    if not names:
        raise UserError(f"{state}: lists no files, so that the data set is empty; {remedy}")
    return [folder / name for name in names]


def _walk(folder: Path, levels: int) -> Iterator[Path]:
    """Yield the tables in `folder` and at most `levels` folders below it."""
    seen, relevant = 0, False
    with os.scandir(folder) as entries:
        for entry in entries:
            seen += 1
            if seen > _FEW and not relevant:  # a class folder may hold a million images
                return
            if is_leftover(entry.name):
                continue
            if entry.is_dir():
                relevant = True
                if levels:
                    yield from _walk(Path(entry.path), levels - 1)
            elif is_table(entry.name) and not entry.name.startswith(("metadata.", "cache-", "indices-")):
                relevant = True  # neither the labels of a folder of images, nor what `datasets` keeps of `map`
                yield Path(entry.path)


def _several(folder: Path, sets: dict[str, list[Path]]) -> UserError:
    """Return the refusal of a folder with several sets of tables, which names the path of one to type."""
    if not sets:
        return UserError(f"{folder}: lists splits in dataset_dict.json but holds none; save the data set again")
    names = [os.path.relpath(name, folder) for name in sets]
    chosen = next((paths for name, paths in zip(names, sets.values()) if "train" in name.lower()), None)
    listed = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    return UserError(
        f"{folder}: holds {len(sets)} sets of tables, such as splits ({listed}), which are not mixed; point "
        f"--data.source at one: {shared_pattern(chosen or next(iter(sets.values())))}"
    )
