"""Sets of images made ready to train on: `fastdit-data fetch fashion-mnist|cifar10|emoji|imagenet-info`."""

import shutil
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fastdit.command_line import OneLineParser
from fastdit.data import UNFINISHED
from fastdit.data.manifest import checksum, read_manifest
from fastdit.data.sets.fetching import obtain
from fastdit.data.sets.image_sets import is_complete, write_split
from fastdit.data.sets.imagenet import INSTRUCTIONS
from fastdit.data.sets.known_sets import SETS, ImageSet


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="fastdit-data fetch", description="Obtain a set of images, as shards.")
    parser.add_argument("name", type=Literal["fashion-mnist", "cifar10", "emoji", "imagenet-info"])
    parser.add_argument("--out", type=str | None, default=None, help="folder of the shards; default: data/NAME")
    parser.add_argument("--from", type=str | None, default=None, help="file or folder to take instead of downloading")
    parser.add_argument("--labels", type=Literal["group", "subgroup"], default="group", help="emoji: 9 or 99 classes")
    parser.add_argument("--any_version", action="store_true", help="take emoji as this distribution has them")
    return parser


def run(argv: list[str]) -> None:
    """The command. Raises UserError."""
    args = _parser().parse(argv)
    if args.name == "imagenet-info":
        print(INSTRUCTIONS)
        return
    image_set, out = SETS[args.name], Path(args.out or f"data/{args.name}")
    given = None if args["from"] is None else Path(args["from"])
    about = {"dataset": args.name} | ({"labels": args.labels} if args.name == "emoji" else {})
    complete = [is_complete(out / split, about) for split in image_set.splits]
    if all(complete):
        print(f"{out}: is complete already")
    else:
        _make(image_set, out, given, about, args.any_version)
    _tell(image_set, out)


def _make(image_set: ImageSet, out: Path, given: Path | None, about: dict, any_version: bool) -> None:
    recipes = [files for files, _ in image_set.recipes]
    number, files = obtain(recipes, out / UNFINISHED, given=given, any_version=any_version)
    told = about | {
        "source": image_set.home,
        "files": {name: checksum(path) for name, path in files.items()},
        "licence": image_set.licence,
        "citation": image_set.citation,
    }
    _, read = image_set.recipes[number]
    for split in read(files, about.get("labels", "")):
        if is_complete(out / split.name, about):
            continue
        with tqdm(total=split.n, desc=split.name or about["dataset"], unit="image") as bar:
            write_split(out / split.name, split, told, bar.update)
    shutil.rmtree(out / UNFINISHED, ignore_errors=True)


def _tell(image_set: ImageSet, out: Path) -> None:
    for name in image_set.splits:
        manifest = read_manifest(out / name)
        print(f"{out / name}: {sum(manifest['counts'])} images of {len(manifest['counts'])} classes")
    print(f"licence: {image_set.licence}\ncite: {image_set.citation}")
    train = out / image_set.splits[0]
    classes = len(read_manifest(train)["counts"])
    print(f"train on it: {image_set.flags} --data.source {train} --data.classes {classes}")
