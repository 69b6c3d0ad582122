"""Tell which file of a download belongs to which split and class, for well-known sets in the layouts they come in.

Each function takes the names of the files and the contents of the lists, and returns a Plan. The layouts are written
down where they are read; they are those that torchvision's and TensorFlow Datasets' readers of the same files expect,
and, for DF20-Mini and ArtBench-10, those of their authors' code. No reader's code is taken.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from fastdit.errors import UserError


class Listing(NamedTuple):
    """Hold the names of a download's files, in the archives' order, and the contents of those that are lists."""

    names: Sequence[str]
    lists: Mapping[str, bytes]

    def content(self, ending: str) -> bytes:
        """Return the content of the list whose name ends like this. Raises UserError if there is none."""
        found = next((content for name, content in self.lists.items() if f"/{name}".endswith(f"/{ending}")), None)
        if found is None:
            raise UserError(f"{ending}: is not in the download; give the official files")
        return found

    def lines(self, ending: str) -> list[list[str]]:
        """Return the words of each line of a list that is not empty. Raises UserError."""
        text = self.content(ending).decode("utf-8", errors="replace")
        return [line.split() for line in text.splitlines() if line.strip()]

    def matlab(self, ending: str) -> dict:
        """Return the variables of a list in MATLAB's format, dimensions of length 1 left out. Raises UserError."""
        try:
            from scipy.io import loadmat
        except ModuleNotFoundError:
            raise UserError(f"{ending}: scipy reads it, which is not installed; pip install scipy") from None
        content = self.content(ending)
        try:
            return loadmat(io.BytesIO(content), squeeze_me=True)
        except Exception as error:  # scipy's parser fails in many ways
            raise UserError(f"{ending}: is no MATLAB file that scipy reads ({error}); download it again") from None

    def matching(self, pattern: str) -> Iterator[re.Match]:
        """Yield the matches of the names that have the pattern from their start, or from a folder's, to their end."""
        compiled = re.compile(rf"(?:.*/)?{pattern}")
        return filter(None, map(compiled.fullmatch, self.names))


class Plan(NamedTuple):
    """Hold the names of the classes (empty without names), and for each split the label of each image by its name."""

    class_names: Sequence[str]
    splits: Mapping[str, Mapping[str, int]]

    @property
    def classes(self) -> int:
        """Return the number of classes of all splits."""
        return len(self.class_names) or 1 + max(max(labels.values(), default=0) for labels in self.splits.values())


Layout = Callable[[Listing], Plan]


def food101(listing: Listing) -> Plan:
    """Read `food-101/images/CLASS/ID.jpg`, split by `meta/train.json` and `test.json`: {CLASS: ["CLASS/ID", ...]}."""
    lists = {split: json.loads(listing.content(f"meta/{split}.json")) for split in ("train", "test")}
    names = sorted(lists["train"])
    splits = {
        split: {f"food-101/images/{path}.jpg": names.index(name) for name in found for path in found[name]}
        for split, found in lists.items()
    }
    return Plan(names, splits)


def sun397(listing: Listing) -> Plan:
    """Read `SUN397/a/abbey/sun_ID.jpg`; `ClassName.txt` lists the classes as `/a/abbey`, some of them one deeper.

    The set has ten partitions of 50 + 50 images a class, which are not read: all images are for training.
    """
    folders = [line[0] for line in listing.lines("ClassName.txt")]
    labels = {folder: label for label, folder in enumerate(folders)}
    found = {}
    for match in listing.matching(r"SUN397(/\w/.+)/[^/]+\.(?i:jpg)"):
        if match[1] not in labels:
            raise UserError(f"{match[0]}: its folder is not in ClassName.txt; give SUN397.tar.gz as it came")
        found[match[0]] = labels[match[1]]
    return Plan([folder[3:] for folder in folders], {"train": found})


def df20_mini(listing: Listing) -> Plan:
    """Read `DF20M/*.JPG`; two CSV files have the columns image_path, class_id and scientificName."""
    names: dict[int, str] = {}
    splits = {}
    for split, file in (("train", "DF20M-train_metadata_PROD.csv"), ("test", "DF20M-public_test_metadata_PROD.csv")):
        splits[split] = {}
        text = listing.content(file).decode("utf-8", errors="replace")
        for row in csv.DictReader(io.StringIO(text, newline="")):
            try:
                image, label = row["image_path"], int(float(row["class_id"]))
            except (KeyError, TypeError, ValueError, OverflowError):
                raise UserError(f"{file}: a row has no image_path and class_id; download it again") from None
            splits[split][f"DF20M/{image}"] = label
            names.setdefault(label, row.get("scientificName") or row.get("species") or str(label))
    return Plan([names.get(label, str(label)) for label in range(max(names, default=-1) + 1)], splits)


def caltech101(listing: Listing) -> Plan:
    """Read `101_ObjectCategories/CLASS/image_0001.jpg`, without `BACKGROUND_Google`, which is no class. No split."""
    found = listing.matching(r"101_ObjectCategories/([^/]+)/[^/]+\.(?i:jpg)")
    matches = [match for match in found if match[1] != "BACKGROUND_Google"]
    names = sorted({match[1] for match in matches})
    return Plan(names, {"train": {match[0]: names.index(match[1]) for match in matches}})


def cub200(listing: Listing) -> Plan:
    """Read `CUB_200_2011/images/001.Name/*.jpg`.

    `images.txt` numbers the images, `image_class_labels.txt` and `classes.txt` give classes from 1, and
    `train_test_split.txt` has 1 for training.
    """
    labels = {image: int(label) - 1 for image, label in listing.lines("CUB_200_2011/image_class_labels.txt")}
    training = dict(listing.lines("CUB_200_2011/train_test_split.txt"))
    splits: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    for image, path in listing.lines("CUB_200_2011/images.txt"):
        splits["train" if training[image] == "1" else "test"][f"CUB_200_2011/images/{path}"] = labels[image]
    return Plan([name for _, name in listing.lines("CUB_200_2011/classes.txt")], splits)


def artbench10(listing: Listing) -> Plan:
    """Read `artbench-10-imagefolder-split/train/CLASS/*.jpg` and `test`."""
    matches = list(listing.matching(r"artbench-10-imagefolder-split/(train|test)/([^/]+)/[^/]+\.(?i:jpg)"))
    names = sorted({match[2] for match in matches})
    splits: dict[str, dict[str, int]] = {"train": {}, "test": {}}
    for match in matches:
        splits[match[1]][match[0]] = names.index(match[2])
    return Plan(names, splits)


def flowers102(listing: Listing) -> Plan:
    """Read `jpg/image_00001.jpg`; `imagelabels.mat` has labels from 1, `setid.mat` the numbers of each split's images.

    The files name no classes.
    """
    labels = listing.matlab("imagelabels.mat")["labels"]
    ids = listing.matlab("setid.mat")
    splits = {
        split: {f"jpg/image_{i:05d}.jpg": int(labels[i - 1]) - 1 for i in ids[field].ravel().tolist()}
        for split, field in (("train", "trnid"), ("val", "valid"), ("test", "tstid"))
    }
    return Plan((), splits)


def stanford_cars(listing: Listing) -> Plan:
    """Read `cars_train/00001.jpg` and `cars_test`; annotations in MATLAB files have fname, and class from 1."""
    splits = {}
    for split, file in (("train", "cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = listing.matlab(file)["annotations"].ravel()
        splits[split] = {f"cars_{split}/{row['fname']}": int(row["class"]) - 1 for row in rows}
    names = listing.matlab("cars_meta.mat")["class_names"].ravel()
    return Plan([str(name) for name in names], splits)


def celeba(listing: Listing) -> Plan:
    """Read `img_align_celeba/000001.jpg`; `list_eval_partition.txt` has 0, 1 or 2 for train, val and test."""
    splits: dict[str, dict[str, int]] = {"train": {}, "val": {}, "test": {}}
    for image, part in listing.lines("list_eval_partition.txt"):
        splits[{"0": "train", "1": "val", "2": "test"}[part]][f"img_align_celeba/{image}"] = 0
    return Plan((), splits)


def ffhq(listing: Listing) -> Plan:
    """Read `thumbnails128x128/00000/00000.png`, 1,000 in a folder. All are for training, as in the paper of the set."""
    return Plan((), {"train": {match[0]: 0 for match in listing.matching(r"thumbnails128x128/(?:\d+/)?\d+\.(?i:png)")}})
