"""Turn the downloads of the sets that SD-DiT and SADM report on into shards, for `fastdit-data convert-set`.

Archives are read from their start to their end, once to list them and once for each split, and never unpacked.
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from fastdit.data.sets import official_layouts as layouts
from fastdit.data.sets.archives import Read, files_in
from fastdit.data.sets.official_layouts import Layout, Listing, Plan
from fastdit.data.sets.to_shards import extension, write_folder
from fastdit.data.shards import Sample
from fastdit.errors import UserError, a_few

Change = Callable[[bytes, str], bytes]  # makes the stored image from the content and the name of a file


@dataclass(frozen=True)
class OfficialSet:
    """Describe one set as it is published.

    Args:
        title: the set's own name.
        files: the files of the download, each with the names that it may have. The last may be an unpacked folder.
        lists: endings of the names of the files that are lists.
        layout: reads the lists.
        images: the number of images of each split.
        classes: the number of classes, 1 if there are none.
        home: the address that leads to the download.
        license: the terms of use, one line.
        citation: the publication to cite, one line.
        md5: published sums of the files, by name.
        train: flags to train on the set, besides --data.source; None if latents are made first.
    """

    title: str
    files: Sequence[Sequence[str]]
    lists: Sequence[str]
    layout: Layout
    images: Mapping[str, int]
    classes: int
    home: str
    license: str
    citation: str
    md5: Mapping[str, str]
    train: str | None = None


def find_files(name: str, known: OfficialSet, folder: Path) -> list[Path]:
    """Return the files of a set's download in `folder`. Raises UserError that says which to get from where."""
    found, missing = [], []
    for names in known.files:
        path = next((folder / each for each in names if (folder / each).exists()), None)
        found.append(path)
        if path is None:
            missing.append(names[0])
    if missing:
        problem = f"has no {' and no '.join(missing)}"
        raise UserError(f"--from {folder}: {problem}; download what {name} needs from {known.home}")
    return found


def wrong_sums(known: OfficialSet, files: Sequence[Path]) -> Iterator[str]:
    """Yield a line for each file whose MD5 sum is known and another one."""
    for path in files:
        if (expected := known.md5.get(path.name)) and path.is_file() and (found := _md5(path)) != expected:
            yield f"{path}: has md5 {found}, and the published file {expected}"


def _md5(path: Path) -> str:
    """Return the MD5 sum of a file, in hexadecimal digits."""
    found = hashlib.md5()
    with (
        path.open("rb") as file,
        tqdm(total=path.stat().st_size, desc=f"md5 of {path.name}", leave=False, unit="B", disable=None) as bar,
    ):
        while block := file.read(1 << 20):
            found.update(block)
            bar.update(len(block))
    return found.hexdigest()


def read_plan(name: str, known: OfficialSet, files: Sequence[Path]) -> tuple[Plan, dict[str, Path]]:
    """Return the plan for a download, and the archive of each of its images.

    Raises UserError if an archive or a list is damaged, or if images that the lists name are not there.
    """
    # List the archives.
    places, lists = {}, {}
    for path in files:
        for member, read in files_in(path):
            if member in places:
                raise UserError(f"{path}: '{member}' is there twice; download it again")
            places[member] = path
            if f"/{member}".endswith(tuple(f"/{ending}" for ending in known.lists)):
                lists[member] = read()

    # Read the lists.
    try:
        plan = known.layout(Listing(list(places), lists))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        problem = f"its lists are not as published ({type(error).__name__}: {error})"
        raise UserError(f"{name}: {problem}; download the files again from {known.home}") from error
    plan = plan._replace(class_names=_distinct(plan.class_names))
    for split, labels in plan.splits.items():
        for image, label in labels.items():
            if label < 0 or (plan.class_names and label >= len(plan.class_names)):
                problem = f"{image} has the label {label} of {len(plan.class_names)} classes"
                raise UserError(f"{name}: {problem}; download the files again from {known.home}")
        if not labels:
            raise UserError(f"{name}: no image of the split {split} is in {a_few(map(str, files))}; give other files")
        if missing := [image for image in labels if image not in places]:
            some = f"{len(missing):,} of the {len(labels):,} images of the split {split} (such as {missing[0]})"
            raise UserError(f"{name}: {some} are not in {a_few(map(str, files))}; download these files again")
    return plan, places


def _distinct(names: Sequence[str]) -> list[str]:
    """Return names of classes, with its label behind each that several classes have."""
    count = Counter(names)
    return [f"{name} ({label})" if count[name] > 1 else name for label, name in enumerate(names)]


def fingerprint(path: Path) -> list[int]:
    """Return the number of files of a download, or of an unpacked folder, their bytes, and the newest one's time."""
    files = [file.stat() for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path.stat()]
    return [len(files), sum(file.st_size for file in files), max((int(file.st_mtime) for file in files), default=0)]


def convert(
    out: Path,
    plan: Plan,
    places: Mapping[str, Path],
    split: str,
    settings: dict,
    change: Change | None,
    progress: Callable[[int], object],
) -> dict:
    """Write one split to shards, what `out` has of them left as it is, and return their manifest.

    settings: fields of the manifest, which must be those that an earlier call had. change: applied to each image.

    Raises UserError if an archive is damaged, or if `out` holds other shards.
    """
    labels = plan.splits[split]
    archives = list(dict.fromkeys(places[image] for image in labels))
    stream = _Stream(archives, labels, split, change)
    settings = settings | {"split": split, "samples": len(labels)}
    return write_folder(out, settings, plan.class_names, plan.classes, stream.samples, progress)


class _Stream:
    """Number the images of a split in the archives' order, and read them forward."""

    def __init__(self, archives: Sequence[Path], labels: Mapping[str, int], split: str, change: Change | None):
        self.labels, self.split, self.change = labels, split, change
        self.images = ((name, read) for path in archives for name, read in files_in(path) if name in labels)
        self.at = 0

    def samples(self, ids: range) -> Iterator[Sample]:
        """Yield the samples of a range, which must not begin before the end of the last one."""
        chosen: Iterator[tuple[str, Read]] = islice(self.images, ids.start - self.at, ids.stop - self.at)
        for i, (name, read) in zip(ids, chosen, strict=True):
            image = read() if self.change is None else self.change(read(), name)
            yield f"{self.split}-{i:06d}", {extension(image): image, "cls": str(self.labels[name]).encode()}
        self.at = ids.stop


_CALTECH = "https://data.caltech.edu"
_FUNGI = "http://ptak.felk.cvut.cz/plants/DanishFungiDataset"
_ON_ITS_PAGE = "not repeated here; see the set's page"
OFFICIAL_SETS = {
    "food101": OfficialSet(
        "Food-101",
        files=[("food-101.tar.gz", "food-101")],
        lists=("meta/train.json", "meta/test.json"),
        layout=layouts.food101,
        images={"train": 75_750, "test": 25_250},
        classes=101,
        home="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        license=_ON_ITS_PAGE,
        citation="Bossard, Guillaumin, Van Gool: Food-101 - Mining Discriminative Components with Random Forests. ECCV "
        "2014",
        md5={"food-101.tar.gz": "85eeb15f3717b99a5da872d97d918f87"},
    ),
    "sun397": OfficialSet(
        "SUN397",
        files=[("SUN397.tar.gz", "SUN397")],
        lists=("SUN397/ClassName.txt",),
        layout=layouts.sun397,
        images={"train": 108_754},
        classes=397,
        home="https://vision.princeton.edu/projects/2010/SUN/",
        license=_ON_ITS_PAGE,
        citation="Xiao, Hays, Ehinger, Oliva, Torralba: SUN Database: Large-scale Scene Recognition from Abbey to Zoo. "
        "CVPR 2010",
        md5={"SUN397.tar.gz": "8ca2778205c41d23104230ba66911c7a"},
    ),
    "df20-mini": OfficialSet(
        "DF20 - Mini",
        files=[("DF20M-images.tar.gz", "DF20M"), ("DF20M-metadata.zip", "DF20M-metadata")],
        lists=("DF20M-train_metadata_PROD.csv", "DF20M-public_test_metadata_PROD.csv"),
        layout=layouts.df20_mini,
        images={"train": 32_753, "test": 3_640},
        classes=182,
        home=f"{_FUNGI}/ (DF20M-images.tar.gz and DF20M-metadata.zip)",
        license="non-commercial research",
        citation="Picek et al.: Danish Fungi 2020 - Not Just Another Image Recognition Dataset. WACV 2022",
        md5={},
    ),
    "caltech101": OfficialSet(
        "Caltech-101",
        files=[("caltech-101.zip", "101_ObjectCategories.tar.gz", "101_ObjectCategories")],
        lists=(),
        layout=layouts.caltech101,
        images={"train": 8_677},
        classes=101,
        home=f"{_CALTECH}/records/mzrjq-6wc02",
        license=_ON_ITS_PAGE,
        citation="Li, Andreeto, Ranzato, Perona: Caltech 101. CaltechDATA, 2022",
        md5={"101_ObjectCategories.tar.gz": "b224c7392d521a49829488ab0f1120d9"},
    ),
    "cub200": OfficialSet(
        "CUB-200-2011",
        files=[("CUB_200_2011.tgz", "CUB_200_2011")],
        lists=tuple(
            f"CUB_200_2011/{name}.txt" for name in ("images", "image_class_labels", "train_test_split", "classes")
        ),
        layout=layouts.cub200,
        images={"train": 5_994, "test": 5_794},
        classes=200,
        home=f"{_CALTECH}/records/65de6-vp158",
        license=_ON_ITS_PAGE,
        citation="Wah, Branson, Welinder, Perona, Belongie: The Caltech-UCSD Birds-200-2011 Dataset. CNS-TR-2011-001",
        md5={"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78"},
    ),
    "artbench10": OfficialSet(
        "ArtBench-10",
        files=[("artbench-10-imagefolder-split.tar", "artbench-10-imagefolder-split")],
        lists=(),
        layout=layouts.artbench10,
        images={"train": 50_000, "test": 10_000},
        classes=10,
        home="https://artbench.eecs.berkeley.edu/files/artbench-10-imagefolder-split.tar",
        license=_ON_ITS_PAGE,
        citation="Liao, Li, Liu, Keutzer: The ArtBench Dataset: Benchmarking Generative Models with Artworks. 2022",
        md5={},
    ),
    "flowers102": OfficialSet(
        "Oxford Flowers 102",
        files=[("102flowers.tgz", "jpg"), ("imagelabels.mat",), ("setid.mat",)],
        lists=("imagelabels.mat", "setid.mat"),
        layout=layouts.flowers102,
        images={"train": 1_020, "val": 1_020, "test": 6_149},
        classes=102,
        home="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        license=_ON_ITS_PAGE,
        citation="Nilsback, Zisserman: Automated Flower Classification over a Large Number of Classes. ICVGIP 2008",
        md5={
            "102flowers.tgz": "52808999861908f626f3c1f4e79d11fa",
            "imagelabels.mat": "e0620be6f572b9609742df49c70aed4d",
            "setid.mat": "a5357ecc9cb78c4bef273ce3793fc85c",
        },
    ),
    "cars": OfficialSet(
        "Stanford Cars",
        files=[
            ("cars_train.tgz", "cars_train"),
            ("cars_test.tgz", "cars_test"),
            ("car_devkit.tgz", "devkit"),
            ("cars_test_annos_withlabels.mat",),
        ],
        lists=("cars_train_annos.mat", "cars_test_annos_withlabels.mat", "cars_meta.mat"),
        layout=layouts.stanford_cars,
        images={"train": 8_144, "test": 8_041},
        classes=196,
        home="https://ai.stanford.edu/~jkrause/cars/car_dataset.html (no longer there; mirrors have the files)",
        license=_ON_ITS_PAGE,
        citation="Krause, Stark, Deng, Fei-Fei: 3D Object Representations for Fine-Grained Categorization. 3dRR 2013",
        md5={
            "cars_train.tgz": "065e5b463ae28d29e77c1b4b166cfe61",
            "cars_test.tgz": "4ce7ebf6a94d07f1952d94dd34c4d501",
            "car_devkit.tgz": "c3b158d763b6e2245038c8ad08e45376",
            "cars_test_annos_withlabels.mat": "b0a2b23655a3edd16d84508592a98d10",
        },
    ),
    "celeba64": OfficialSet(
        "CelebA",
        files=[("img_align_celeba.zip", "img_align_celeba"), ("list_eval_partition.txt",)],
        lists=("list_eval_partition.txt",),
        layout=layouts.celeba,
        images={"train": 162_770, "val": 19_867, "test": 19_962},
        classes=1,
        home="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
        license="non-commercial research",
        citation="Liu, Luo, Wang, Tang: Deep Learning Face Attributes in the Wild. ICCV 2015",
        md5={
            "img_align_celeba.zip": "00d2c5bc6d35e252742224ab0c1e8fcb",
            "list_eval_partition.txt": "d32c9cbf5e040fd4025c592c306e6668",
        },
        train="--preset celeba64",
    ),
    "ffhq64": OfficialSet(
        "FFHQ",
        files=[("thumbnails128x128.zip", "thumbnails128x128")],
        lists=(),
        layout=layouts.ffhq,
        images={"train": 70_000},
        classes=1,
        home="https://github.com/NVlabs/ffhq-dataset",
        license="CC BY-NC-SA 4.0",
        citation="Karras, Laine, Aila: A Style-Based Generator Architecture for Generative Adversarial Networks. CVPR "
        "2019",
        md5={},
        train="--preset ffhq64",
    ),
}
