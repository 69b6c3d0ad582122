"""List class-folder trees of images, `root/CLASS/**/*.{png,jpg,jpeg,webp}`. Labels number the sorted class names."""

import os
from pathlib import Path

import numpy as np

from fastdit.data.shards import IMAGE_EXTENSIONS, map_file
from fastdit.errors import UserError

_SUFFIXES = tuple(f".{e}" for e in IMAGE_EXTENSIONS)


class FolderSamples:
    """Number the images of a class-folder tree by class and then by path. `labels` is (n,) int64.

    Files and folders whose name starts with a dot are ignored, and so are files with other suffixes.
    """

    is_latent = False

    def __init__(self, root: Path):
        """List the tree without opening an image. Raises UserError that names a folder without classes or images."""
        self.root = root
        self.class_names = tuple(sorted(e.name for e in os.scandir(root) if e.is_dir() and e.name[0] != "."))
        if not self.class_names:
            raise UserError(f"{root}: holds neither .tar shards nor class folders; put images in {root}/CLASS/")
        paths, labels = [], []
        for label, name in enumerate(self.class_names):
            found = _images(root / name)
            if not found:
                raise UserError(f"{root / name}: the class folder holds no images ({' '.join(_SUFFIXES)})")
            paths += (os.fsencode(os.path.relpath(p, root)) for p in found)
            labels += [label] * len(found)
        self.labels = np.array(labels, dtype=np.int64)
        self._paths = np.array(paths)

    def read(self, i: int) -> np.ndarray:
        """Return the encoded bytes of image `i`, uint8 (size,)."""
        return map_file(self._path(i))

    def where(self, i: int) -> str:
        """Return the name of image `i` for error messages."""
        return str(self._path(i))

    def _path(self, i: int) -> Path:
        """Return the path of image `i`."""
        return self.root / os.fsdecode(self._paths[i])


def _images(folder: Path) -> list[str]:
    """Return the paths of all image files below `folder`, sorted."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [f for f in folders if f[0] != "."]
        found += (os.path.join(parent, f) for f in files if f[0] != "." and f.lower().endswith(_SUFFIXES))
    return sorted(found)
