"""Write samples to files: one .npz, a folder of PNG files, or WebDataset shards.

An .npz is written as the samples come, in order, so that memory holds a few batches only. Folders and shards are
written by all ranks, each its own files. They go on after an interruption:

    out/.unfinished/settings.json   what was asked for, until all is written
    out/samples.json                the same, afterwards: beside a folder's pictures
    out/manifest.json               the same, and the checksums of the shards: beside shards

Files that this module did not write are never overwritten.
"""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from fastdit.data import UNFINISHED, write_shard
from fastdit.data.manifest import MANIFEST, check_same, write_json
from fastdit.errors import UserError
from fastdit.files import sha256_of, write_atomically

MARK = "fastdit samples"  # in files that may be overwritten: .npz comment, or text of a .png
RECORD = "samples.json"
_LONGEST_NAME = 100  # bytes of a class's folder
_RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(10))}


# -- one file --


def check_replaceable(path: Path, flag: str) -> None:
    """Raise UserError, which names `flag`, if a file that this module did not write is in the place of a result."""
    if not path.exists():
        return
    try:
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:
                ours = archive.comment == MARK.encode()
        else:
            with Image.open(path) as picture:
                ours = picture.info.get("Software") == MARK
    except (OSError, zipfile.BadZipFile, Image.DecompressionBombError):
        ours = False
    if not ours:
        raise UserError(f"{flag}: is a file that was not made by this command; remove it, or choose another name")


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a page of samples as PNG. It is whole whenever it is there."""
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", MARK)
    with write_atomically(path) as temporary:
        picture.save(temporary, format="png", pnginfo=text)


@contextmanager
def writing_npz(
    path: Path, labels: np.ndarray, size: tuple[int, int, int], names: tuple[str, str]
) -> Iterator[Callable[[np.ndarray], object]]:
    """Yield a function that appends images, uint8 (b, *size), to the first array of an .npz file.

    The block must append one image for each of `labels` (n,) int64, which are the second array. names: the arrays'
    names. The file appears when the block ends.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(labels), *size)}
    with write_atomically(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = MARK.encode()
        with archive.open(f"{names[0]}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            yield lambda images: member.write(np.ascontiguousarray(images).data)
        with archive.open(f"{names[1]}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, labels)


# -- many files --


@dataclass(frozen=True)
class Files:
    """Name the files of a request of n samples.

    Args:
        folder: the folder of all files.
        labels: class label of each sample, (n,).
        classes: names of the classes.
        stem: for shards, the part of their names before the number; None for a folder of PNG files.
        unit: number of samples that are written together: in a shard, or in a batch of PNG files.
    """

    folder: Path
    labels: np.ndarray
    classes: Sequence[str]
    stem: str | None
    unit: int

    @property
    def units(self) -> range:
        """Return the numbers of the units."""
        return range(-(-len(self.labels) // self.unit))

    def ids(self, unit: int) -> range:
        """Return the indices of the samples of a unit."""
        return range(unit * self.unit, min((unit + 1) * self.unit, len(self.labels)))

    def shard(self, unit: int) -> Path:
        """Return the path of a shard."""
        return self.folder / f"{self.stem}{unit:06d}.tar"

    def picture(self, i: int, folders: Sequence[str]) -> Path:
        """Return the path of a PNG file. folders: those of `folder_names`."""
        return self.folder / folders[self.labels[i]] / f"{i:08d}.png"

    def begin(self, settings: dict) -> bool:
        """Prepare the folder, and return whether everything is written already.

        Raises UserError if the folder holds other files, or samples that were asked for with other settings.
        """
        done = self.folder / (RECORD if self.stem is None else MANIFEST)
        begun = self.folder / UNFINISHED / "settings.json"
        settings = json.loads(json.dumps(settings))
        if found := next((path for path in (begun, done) if path.is_file()), None):
            check_same(found, settings)
            if found == done:
                return True
        elif foreign := self._foreign():
            raise UserError(f"--out {self.folder}: holds other files, such as {foreign.name}; choose another folder")
        begun.parent.mkdir(parents=True, exist_ok=True)
        write_json(begun, settings)
        return False

    def _foreign(self) -> Path | None:
        """Return a file in the folder that stands in the way, or None."""
        if not self.folder.is_dir():
            return None
        if self.stem is None:
            return next((path for path in sorted(self.folder.iterdir()) if path.name != UNFINISHED), None)
        present, fixed = sorted(self.folder.iterdir()), (MANIFEST, "classes.json")
        return next((path for path in present if path.suffix == ".tar" or path.name in fixed), None)

    def missing(self, rank: int, world: int) -> list[int]:
        """Return the units that this rank still has to write. A shard, and a picture, is whole if it is there."""
        folders = folder_names(self.classes)

        def written(unit: int) -> bool:
            if self.stem is not None:
                return self.shard(unit).is_file()
            return all(self.picture(i, folders).is_file() for i in self.ids(unit))

        return [unit for unit in self.units if unit % world == rank and not written(unit)]

    def write(self, unit: int, batches: Iterator[np.ndarray]) -> None:
        """Write a unit. batches: its images in order, uint8 (b, H, W, C) each."""
        images = zip(self.ids(unit), (image for batch in batches for image in batch), strict=True)
        if self.stem is not None:
            samples = ((f"{i:08d}", {"png": _png(image), "cls": str(self.labels[i]).encode()}) for i, image in images)
            write_shard(self.shard(unit), samples)
            return
        folders = folder_names(self.classes)
        for i, image in images:
            path = self.picture(i, folders)
            path.parent.mkdir(exist_ok=True)
            with write_atomically(path) as temporary:
                temporary.write_bytes(_png(image))

    def finish(self, settings: dict) -> None:
        """Write the record of what was asked for, when all ranks have written their units."""
        if self.stem is None:
            write_json(self.folder / RECORD, settings)
        else:
            write_json(self.folder / "classes.json", list(self.classes))
            counts = np.bincount(self.labels, minlength=len(self.classes)).tolist()
            shards = {
                path.name: {"samples": len(self.ids(unit)), "sha256": sha256_of(path)}
                for unit in self.units
                for path in [self.shard(unit)]
            }
            write_json(self.folder / MANIFEST, settings | {"counts": counts, "shards": shards})
        shutil.rmtree(self.folder / UNFINISHED, ignore_errors=True)


def folder_names(classes: Sequence[str]) -> list[str]:
    """Return a folder's name for each class, safe on every file system.

    The names sort as the labels do, so that a reader of class folders gives the classes the same numbers. Where the
    classes' own names do not, the label stands in front.
    """
    safe = [_safe(name) for name in classes]
    lower = [name.lower() for name in safe]
    if safe == sorted(safe) and len(set(lower)) == len(lower):
        return safe
    digits = len(str(len(classes) - 1))
    return [f"{label:0{digits}d} {name}" for label, name in enumerate(safe)]


def _safe(name: str) -> str:
    """Return a name without characters that file systems refuse, not hidden, not reserved, and not too long."""
    text = re.sub(r'[<>:"/\\|?*\x00-\x1f\x7f]', "_", name).encode("utf-8", "replace")[:_LONGEST_NAME]
    text = text.decode("utf-8", "ignore").strip(" ").rstrip(" .")
    if not text or text.startswith(".") or text.partition(".")[0].lower() in _RESERVED:
        text = f"_{text}"
    return text


def _png(image: np.ndarray) -> bytes:
    """Return an image, uint8 (H, W, 1 or 3), as the bytes of a PNG file."""
    out = io.BytesIO()
    Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(out, format="png")
    return out.getvalue()
