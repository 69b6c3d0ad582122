"""List class-folder trees of images, `root/CLASS/**/*.{png,jpg,...}`. Labels number the sorted class names.

Labels may come from a file instead (label_files.py).

A tree that may mean two things is refused with the ways to say which one is meant: folders that look like splits
(train, val), class folders that hold only folders, images beside class folders, and one file in two classes.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdit.data.label_files import read_label_file
from fastdit.data.shards import COMPRESSED, IMAGE_EXTENSIONS, SPLIT_WORDS, is_leftover, map_file
from fastdit.errors import UserError, a_few
from fastdit.files import printable

FOLDERS = ("auto", "first", "deepest", "none")  # choices of folders as classes; another text is a file of labels
_SUFFIXES = tuple(f".{e}" for e in IMAGE_EXTENSIONS)
_THUMBNAILS = {"thumbnails", "thumbnail", "thumbs", "_thumbs"}
_MOST = 6  # kinds of files that a message lists


class _Image(NamedTuple):
    """Hold the path of an image below the root, and its real path if a link leads to it, else None."""

    path: str
    real: str | None


class FolderSamples:
    """Number the images of a class-folder tree by class and then by path.

    Attributes:
        class_names: the names of the classes, in the order of their labels; empty if a file labels by numbers.
        labels: class labels, (n,) int64.
        left_out: a phrase that counts the files that are not taken, by suffix; empty if there are none.
    """

    is_latent = False

    def __init__(self, root: Path, labels: str = "auto", flat: bool = False):
        """List the tree without opening an image.

        labels: "first" names a class by the folder below `root`, "deepest" by the path of the folder that holds the
            image. "auto" is "first", but refuses folders named like splits and class folders that hold only folders.
            "none" puts all images below `root` into one class. Another text is the path of a file that labels images,
            as in label_files.py; others are not taken.
        flat: whether a folder of images without class folders is taken, as one class.

        Raises UserError that names a folder without classes or images, or a tree that may mean two things, or a line of
        the file.
        """
        self.root = root
        walk = _Walk(str(root))
        if labels in FOLDERS:
            self.class_names, found = _by_folder(root, walk, labels, flat)
            numbers = range(len(found))
        else:
            images = [image.path for image in walk.below("", walk.real, False, (walk.real,))]
            by_file = read_label_file(labels, root, images)
            found = list(by_file.classes.values())
            self.class_names = tuple(by_file.classes) if by_file.named else ()
            numbers = range(len(found)) if by_file.named else map(int, by_file.classes)
            if more := len(images) - sum(map(len, found)):
                walk.left_out[f"images that {os.path.basename(labels)} does not name"] += more

        # Bytes that are not UTF-8 can be neither printed nor written to JSON.
        self.class_names = tuple(map(printable, self.class_names))

        # Keep paths and labels in arrays, which take less memory than lists.
        self.labels = np.repeat(np.fromiter(numbers, np.int64), [len(paths) for paths in found])
        self._paths = np.array([os.fsencode(path) for paths in found for path in paths])
        self.left_out = walk.describe()

    def read(self, i: int) -> np.ndarray:
        """Return the encoded bytes of image `i`, uint8 (size,)."""
        return map_file(self._path(i))

    def where(self, i: int) -> str:
        """Return the name of image `i` for error messages."""
        return printable(str(self._path(i)))

    def _path(self, i: int) -> Path:
        """Return the path of image `i`."""
        return self.root / os.fsdecode(self._paths[i])


class _Walk:
    """Walk the folders below `root`, follow links without running in circles, and count what is not taken."""

    def __init__(self, root: str):
        self.root, self.real = root, os.path.realpath(root)
        self.left_out: Counter[str] = Counter()

    def top(self) -> tuple[dict[str, str], list[_Image]]:
        """Return the folders below the root, {name: real path} sorted by name, and the images beside them."""
        folders, loose = {}, []
        for entry, real, _ in self._entries("", self.real, False, (self.real,)):
            if entry.is_dir():
                folders[entry.name] = real
            else:
                loose.append(_Image(entry.name, real if entry.is_symlink() else None))
        return dict(sorted(folders.items())), sorted(loose)

    def images(self, name: str, real: str) -> list[_Image]:
        """Return the images below the folder `name` of the root, whose real path is `real`, sorted by path."""
        linked = real != os.path.join(self.real, name)
        return sorted(self.below(name, real, linked, (self.real, real)))

    def below(self, folder: str, real: str, linked: bool, chain: tuple[str, ...]) -> Iterator[_Image]:
        """Yield the images below `folder`. `chain` holds the real paths of the folders that lead to it."""
        for entry, target, by_link in self._entries(folder, real, linked, chain):
            path = os.path.join(folder, entry.name)
            if entry.is_dir():
                yield from self.below(path, target, by_link, (*chain, target))
            else:
                yield _Image(path, target if by_link else None)

    def _entries(
        self, folder: str, real: str, linked: bool, chain: tuple[str, ...]
    ) -> Iterator[tuple[os.DirEntry, str, bool]]:
        """Yield the folders and images in `folder`, each with its real path and whether a link leads to it."""
        with os.scandir(os.path.join(self.root, folder)) as entries:
            for entry in entries:
                if is_leftover(entry.name):
                    continue
                by_link = entry.is_symlink()
                target = os.path.realpath(entry.path) if by_link else os.path.join(real, entry.name)
                if entry.is_dir():
                    if entry.name.lower() in _THUMBNAILS:
                        self.left_out["thumbnail folders"] += 1
                    elif by_link and any(f"{above}/".startswith(f"{target.rstrip('/')}/") for above in chain):
                        self.left_out["links to a folder above them"] += 1
                    else:
                        yield entry, target, linked or by_link
                elif not entry.is_file():
                    self.left_out["broken links" if by_link else "special files"] += 1
                elif not entry.name.lower().endswith(_SUFFIXES):
                    self.left_out[os.path.splitext(entry.name)[1].lower() or "without a suffix"] += 1
                else:
                    yield entry, target, linked or by_link

    def describe(self) -> str:
        """Return the counts of what is not taken, the largest first, or an empty text."""
        listed = [f"{n} {kind}" for kind, n in self.left_out.most_common(_MOST)]
        more = len(self.left_out) - len(listed)
        return ", ".join(listed) + (f", and {more} more kinds" if more else "")


def holds_images(folder: Path) -> bool:
    """Return whether an image lies below `folder`, whose listing ends at the first one."""
    walk = _Walk(str(folder))
    return next(walk.below("", walk.real, False, (walk.real,)), None) is not None


def _by_folder(root: Path, walk: _Walk, labels: str, flat: bool) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return the names of the classes, and the paths of each one's images. Raises UserError as `FolderSamples`."""
    folders, loose = walk.top()
    found = {name: walk.images(name, real) for name, real in folders.items()}
    if labels == "none":
        images = [*loose, *(image for images in found.values() for image in images)]
        _check_unlabeled(root, found, images)
        names, found = (root.resolve().name,), {"": images}
    elif loose and flat and not any(found.values()):
        names, found = (root.resolve().name,), {"": loose}
    else:
        _check_tree(root, found, loose, labels, walk)
        found = _by_parent(root, found) if labels == "deepest" else found
        names = tuple(found)
    found = _each_file_once(root, found, walk)
    return names, [[image.path for image in images] for images in found.values()]


def _check_unlabeled(root: Path, found: dict[str, list[_Image]], images: list[_Image]) -> None:
    """Raise UserError if there are no images, or if those of several splits would be mixed."""
    if not images:
        raise UserError(f"{root}: holds no images (.{' .'.join(IMAGE_EXTENSIONS)})")
    if found and all(name.lower() in SPLIT_WORDS for name in found):
        raise UserError(f"{root}: its folders ({a_few(found)}) look like splits; point --data.source at one of them")


def _check_tree(root: Path, found: dict[str, list[_Image]], loose: list[_Image], labels: str, walk: _Walk) -> None:
    """Raise UserError unless the folders `found` are class folders with images and no image is `loose` beside them."""
    # Refuse folders without classes.
    if loose and not any(found.values()):
        raise UserError(
            f"{root}: holds {len(loose)} images but no class folders; put them in {root}/CLASS/, name their "
            "labels in a file: --data.labels labels.csv, or train without classes: --data.labels none --label_drop 0"
        )
    if not found:
        rest = f" (only {walk.describe()})" if walk.left_out else ""
        packed = any(name.endswith((*COMPRESSED, ".zip")) for name in os.listdir(root))
        remedy = "unpack its archives, or " if packed else ""
        raise UserError(
            f"{root}: holds neither .tar shards nor class folders{rest}; {remedy}put images in {root}/CLASS/"
        )
    if loose:
        raise UserError(
            f"{root}: {len(loose)} images (such as {loose[0].path}) lie beside the class folders ({a_few(found)}); "
            "move them into a class folder, or elsewhere"
        )
    for name, images in found.items():
        if not images:
            raise UserError(
                f"{root / name}: the class folder holds no images (.{' .'.join(IMAGE_EXTENSIONS)}); remove it, or move "
                "it elsewhere"
            )

    # Refuse folders that look like splits, or that hold only folders.
    nested = [name for name, images in found.items() if all(os.path.dirname(image.path) != name for image in images)]
    splits = all(name.lower() in SPLIT_WORDS for name in found)
    if splits and (labels == "auto" or (labels == "deepest" and nested)):
        first = next((name for name in found if name.lower().startswith("train")), next(iter(found)))
        raise UserError(
            f"{root}: its folders ({a_few(found)}) look like splits, not classes; point --data.source at "
            f"{root / first}, or set --data.labels first if they are classes"
        )
    if labels == "auto" and nested:
        raise UserError(
            f"{root}: its folders ({a_few(nested)}) hold only folders; point --data.source at one (as "
            f"{root / nested[0]}), or set --data.labels deepest (their folders are classes) or first (they are)"
        )


def _by_parent(root: Path, found: dict[str, list[_Image]]) -> dict[str, list[_Image]]:
    """Return the images by the folder that holds them. Raises UserError for a deepest folder without images."""
    parents: dict[str, list[_Image]] = {}
    for image in (image for images in found.values() for image in images):
        parents.setdefault(os.path.dirname(image.path), []).append(image)
    for name in found:
        for parent, folders, _ in os.walk(root / name):
            folders[:] = [f for f in folders if not is_leftover(f) and f.lower() not in _THUMBNAILS]
            if not folders and os.path.relpath(parent, root) not in parents:
                raise UserError(f"{parent}: the class folder holds no images; remove it, or move it elsewhere")
    return dict(sorted(parents.items()))


def _each_file_once(root: Path, found: dict[str, list[_Image]], walk: _Walk) -> dict[str, list[_Image]]:
    """Return the images without links to a file that the class has already.

    Raises UserError for a file that two classes have.
    """
    if all(image.real is None for images in found.values() for image in images):
        return found
    owner: dict[str, tuple[str, str]] = {}
    kept: dict[str, list[_Image]] = {name: [] for name in found}
    # Files come before links to them.
    for linked in (False, True):
        for name, images in found.items():
            for image in images:
                if (image.real is not None) != linked:
                    continue
                real = image.real or os.path.join(walk.real, image.path)
                first, path = owner.setdefault(real, (name, image.path))
                if path == image.path:
                    kept[name].append(image)
                elif first == name:
                    walk.left_out["links to files of the same class"] += 1
                else:
                    raise UserError(
                        f"{root / image.path}: is the same file as {root / path}, in two classes; remove one of them"
                    )
    return {name: sorted(images) for name, images in kept.items()}
