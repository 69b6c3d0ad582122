"""Write miniature downloads in the layouts of the official sets. An image of number i is gray of the level 4 * i."""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from data_helpers import encode
from scipy.io import savemat

STEP = 4  # levels between two images


@dataclass
class Download:
    """Hold what a download consists of, and what it must become.

    Args:
        folders: the files of each archive, by the archive's name; a file that is no archive holds one, of its own name.
        expected: the label of each image's number, by split.
        names: the names of the classes, () if there are none.
    """

    folders: dict[str, dict[str, bytes]]
    expected: dict[str, dict[int, int]]
    names: tuple[str, ...] = ()
    left_out: list[int] = field(default_factory=list)


def image(number: int, form: str = "JPEG", size: tuple[int, int] = (20, 24)) -> bytes:
    """Return an image of one gray, (height, width)."""
    options = {"quality": 95} if form == "JPEG" else {}
    return encode(np.full((*size, 3), STEP * number, np.uint8), form, **options)


def food101() -> Download:
    lists = {"train": {"pho": ["pho/11", "pho/12"], "apple_pie": ["apple_pie/7", "apple_pie/10"]}}
    lists["test"] = {"pho": ["pho/13"], "apple_pie": ["apple_pie/8", "apple_pie/9"]}
    paths = [
        "pho/11",
        "apple_pie/7",
        "pho/13",
        "apple_pie/8",
        "pho/12",
        "apple_pie/9",
        "apple_pie/10",
    ]  # as no list has them
    files = {f"food-101/images/{path}.jpg": image(i) for i, path in enumerate(paths)}
    files |= {f"food-101/meta/{split}.json": json.dumps(found).encode() for split, found in lists.items()}
    expected = {"train": {0: 1, 1: 0, 4: 1, 6: 0}, "test": {2: 1, 3: 0, 5: 0}}
    return Download({"food-101.tar.gz": files | {"food-101/README.txt": b"x"}}, expected, ("apple_pie", "pho"))


def sun397() -> Download:
    classes = ["/a/abbey", "/a/apartment_building/outdoor", "/z/zoo"]
    paths = ["a/abbey/sun_b", "z/zoo/sun_a", "a/apartment_building/outdoor/sun_c", "a/abbey/sun_a"]
    files = {f"SUN397/{path}.jpg": image(i) for i, path in enumerate(paths)}
    files["SUN397/ClassName.txt"] = "\n".join(classes).encode() + b"\n"
    expected = {"train": {0: 0, 1: 2, 2: 1, 3: 0}}
    return Download({"SUN397.tar.gz": files}, expected, ("abbey", "apartment_building/outdoor", "zoo"))


def df20_mini() -> Download:
    def table(rows: list[tuple[str, str, str]]) -> bytes:
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(["", "eventDate", "Habitat", "image_path", "class_id", "species"])
        writer.writerows((i, "2019", "wood, mixed", *row) for i, row in enumerate(rows))
        return text.getvalue().encode()

    train = [("2237-1.JPG", "1", "Russula rosea"), ("2237-2.JPG", "0", "Amanita fulva")]
    train += [("2238-1.JPG", "1.0", "Russula rosea"), ("2238-2.JPG", "1", "Russula rosea")]
    test = [("2239-1.JPG", "0", "Amanita fulva")]
    images = {f"DF20M/{name}": image(i) for i, (name, *_) in enumerate([*train, *test])}
    tables = {"DF20M-train_metadata_PROD.csv": table(train)}
    tables["DF20M-public_test_metadata_PROD.csv"] = table(test)
    folders = {"DF20M-images.tar.gz": images, "DF20M-metadata.zip": tables}
    return Download(folders, {"train": {0: 1, 1: 0, 2: 1, 3: 1}, "test": {4: 0}}, ("Amanita fulva", "Russula rosea"))


def caltech101() -> Download:
    paths = ["yin_yang/image_0001", "Faces/image_0001", "BACKGROUND_Google/image_0001", "yin_yang/image_0002"]
    paths.append("Faces/image_0002")
    inner = {f"101_ObjectCategories/{path}.jpg": image(i) for i, path in enumerate(paths)}
    outer = {"caltech-101/101_ObjectCategories.tar.gz": tar(inner, "w:gz"), "caltech-101/Annotations.tar": b"x"}
    outer["__MACOSX/caltech-101/._101_ObjectCategories.tar.gz"] = b"x"
    expected = {"train": {0: 1, 1: 0, 3: 1, 4: 0}}
    return Download({"caltech-101.zip": outer}, expected, ("Faces", "yin_yang"), left_out=[2])


def cub200() -> Download:
    paths = ["001.Albatross/A_1.jpg", "002.Auklet/B_1.jpg", "001.Albatross/A_2.jpg", "002.Auklet/B_2.jpg"]
    paths.append("002.Auklet/B_3.jpg")
    lists = {
        "images": "\n".join(f"{i} {path}" for i, path in enumerate(paths, 1)),
        "image_class_labels": "1 1\n2 2\n3 1\n4 2\n5 2\n",
        "train_test_split": "1 1\n2 1\n3 0\n4 1\n5 1\n",
        "classes": "1 001.Albatross\n2 002.Auklet\n",
    }
    files = {f"CUB_200_2011/images/{path}": image(i) for i, path in enumerate(paths)}
    files |= {f"CUB_200_2011/{name}.txt": text.encode() for name, text in lists.items()}
    files["attributes.txt"] = b"1 has_bill_shape::curved\n"
    names = ("001.Albatross", "002.Auklet")
    return Download({"CUB_200_2011.tgz": files}, {"train": {0: 0, 1: 1, 3: 1, 4: 1}, "test": {2: 0}}, names)


def artbench10() -> Download:
    paths = [
        "train/ukiyo_e/a",
        "train/baroque/b",
        "test/ukiyo_e/c",
        "train/ukiyo_e/d",
        "test/baroque/e",
        "train/baroque/f",
    ]
    files = {f"artbench-10-imagefolder-split/{path}.jpg": image(i) for i, path in enumerate(paths)}
    expected = {"train": {0: 1, 1: 0, 3: 1, 5: 0}, "test": {2: 1, 4: 0}}
    return Download({"artbench-10-imagefolder-split.tar": files}, expected, ("baroque", "ukiyo_e"))


def flowers102() -> Download:
    files = {f"jpg/image_{i + 1:05d}.jpg": image(i) for i in range(8)}
    labels = mat(labels=np.array([[2, 1, 1, 2, 2, 1, 1, 2]], np.uint8))
    ids = mat(trnid=np.array([[2, 4, 7, 8]], np.uint16), valid=np.array([[1, 6]]), tstid=np.array([[5, 3]]))
    folders = {"102flowers.tgz": files, "imagelabels.mat": {"": labels}, "setid.mat": {"": ids}}
    return Download(folders, {"train": {1: 0, 3: 1, 6: 0, 7: 1}, "val": {0: 1, 5: 0}, "test": {2: 0, 4: 1}})


def cars() -> Download:
    def annotations(labels: list[int]) -> bytes:
        boxes = [(name, "uint8") for name in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")]
        rows = np.zeros((1, len(labels)), [*boxes, ("class", "uint8"), ("fname", object)])
        rows["class"], rows["fname"] = labels, [f"{i:05d}.jpg" for i in range(1, len(labels) + 1)]
        return mat(annotations=rows)

    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], object)
    devkit = {"devkit/cars_train_annos.mat": annotations([2, 1, 2, 1]), "devkit/cars_meta.mat": mat(class_names=names)}
    folders = {
        "cars_train.tgz": {f"cars_train/{i + 1:05d}.jpg": image(i) for i in range(4)},
        "cars_test.tgz": {f"cars_test/{i + 1:05d}.jpg": image(4 + i) for i in range(2)},
        "car_devkit.tgz": devkit,
        "cars_test_annos_withlabels.mat": {"": annotations([1, 2])},
    }
    return Download(folders, {"train": {0: 1, 1: 0, 2: 1, 3: 0}, "test": {4: 0, 5: 1}}, tuple(names[0]))


def celeba64() -> Download:
    files = {f"img_align_celeba/{i + 1:06d}.jpg": image(i, size=(218, 178)) for i in range(6)}
    parts = "".join(f"{i + 1:06d}.jpg {part}\n" for i, part in enumerate([0, 2, 0, 1, 0, 0]))
    folders = {"img_align_celeba.zip": files, "list_eval_partition.txt": {"": parts.encode()}}
    return Download(folders, {"train": {0: 0, 2: 0, 4: 0, 5: 0}, "val": {3: 0}, "test": {1: 0}})


def ffhq64() -> Download:
    numbers = [0, 1, 999, 1000, 69999]
    files = {
        f"thumbnails128x128/{n // 1000 * 1000:05d}/{n:05d}.png": image(i, "PNG", (128, 128))
        for i, n in enumerate(numbers)
    }
    return Download({"thumbnails128x128.zip": files}, {"train": dict.fromkeys(range(5), 0)})


DOWNLOADS: Mapping[str, Callable[[], Download]] = {
    "food101": food101,
    "sun397": sun397,
    "df20-mini": df20_mini,
    "caltech101": caltech101,
    "cub200": cub200,
    "artbench10": artbench10,
    "flowers102": flowers102,
    "cars": cars,
    "celeba64": celeba64,
    "ffhq64": ffhq64,
}


def write_download(name: str, folder: Path) -> Download:
    """Write a set's files to `folder`, and return what they hold."""
    download = DOWNLOADS[name]()
    folder.mkdir(parents=True, exist_ok=True)
    for file, files in download.folders.items():
        (folder / file).write_bytes(pack(file, files))
    return download


def pack(file: str, files: dict[str, bytes]) -> bytes:
    """Return the archive that a file's name promises, or the file itself."""
    if file.endswith(".zip"):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as opened:
            for name, content in files.items():
                opened.writestr(name, content)
        return out.getvalue()
    return tar(files, "w" if file.endswith(".tar") else "w:gz") if "tar" in file or "tgz" in file else files[""]


def tar(files: dict[str, bytes], mode: str) -> bytes:
    """Return a tar of files, with entries for their folders."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as opened:
        for folder in sorted({str(Path(name).parent) for name in files} - {"."}):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            opened.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return out.getvalue()


def mat(**variables) -> bytes:
    """Return a MATLAB file of variables."""
    out = io.BytesIO()
    savemat(out, variables)
    return out.getvalue()
