"""Make known sets of images ready to train on: `fastdit-data fetch fashion-mnist|cifar10|imagenet-info`."""

import shutil
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fastdit.command_line import OneLineParser
from fastdit.data import UNFINISHED
from fastdit.data.manifest import read_manifest
from fastdit.data.sets.fetching import obtain
from fastdit.data.sets.image_sets import is_complete, write_split
from fastdit.data.sets.imagenet import INSTRUCTIONS
from fastdit.data.sets.known_sets import SETS, ImageSet
from fastdit.files import sha256_of


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-data fetch", description="Obtain a set of images, as shards.")
    parser.add_argument("name", type=Literal["fashion-mnist", "cifar10", "imagenet-info"])
    parser.add_argument("--out", type=str | None, default=None, help="folder for the shards; default: data/NAME")
    parser.add_argument("--from", type=str | None, default=None, help="file or folder to take instead of downloading")
    return parser


def run(argv: list[str]) -> None:
    """Run the command. Raises UserError if the files cannot be obtained or written."""
    args = _parser().parse(argv)
    if args.name == "imagenet-info":
        print(INSTRUCTIONS)
        return
    image_set, out = SETS[args.name], Path(args.out or f"data/{args.name}")
    user_path = None if args["from"] is None else Path(args["from"])
    settings = {"dataset": args.name}
    complete = [is_complete(out / split, settings) for split in image_set.splits]
    if all(complete):
        print(f"{out}: is complete already")
    else:
        _make(image_set, out, user_path, settings)
    _summarize(image_set, out)


def _make(image_set: ImageSet, out: Path, user_path: Path | None, settings: dict) -> None:
    """Obtain the files of a set and write its splits. Raises UserError if the files are not available."""
    # Obtain the files.
    recipes = [files for files, _ in image_set.recipes]
    number, files = obtain(recipes, out / UNFINISHED, user_path)

    # Write the splits that are not complete.
    about = settings | {
        "source": image_set.home,
        "files": {name: sha256_of(path) for name, path in files.items()},
        "licence": image_set.license,
        "citation": image_set.citation,
    }
    _, read = image_set.recipes[number]
    for split in read(files):
        if is_complete(out / split.name, settings):
            continue
        with tqdm(total=split.n, desc=split.name, unit="image") as bar:
            write_split(out / split.name, split, about, bar.update)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _summarize(image_set: ImageSet, out: Path) -> None:
    """Print the sizes of the splits, license, citation, and the flags to train on the set."""
    for name in image_set.splits:
        manifest = read_manifest(out / name)
        print(f"{out / name}: {sum(manifest['counts'])} images of {len(manifest['counts'])} classes")
    print(f"license: {image_set.license}\ncite: {image_set.citation}")
    train = out / image_set.splits[0]
    classes = len(read_manifest(train)["counts"])
    print(f"train on it: {image_set.flags} --data.source {train} --data.classes {classes}")
