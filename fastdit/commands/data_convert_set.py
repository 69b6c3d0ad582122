"""Convert the download of a well-known set to shards: `fastdit-data convert-set food101 --from DOWNLOADS`."""

import shlex
from functools import partial
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fastdit.command_line import OneLineParser
from fastdit.data.sets.celeba_crops import BOXES, face
from fastdit.data.sets.official_sets import (
    OFFICIAL_SETS,
    OfficialSet,
    convert,
    find_files,
    fingerprint,
    read_plan,
    wrong_sums,
)
from fastdit.errors import UserError
from fastdit.files import prepare_folder


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-data convert-set", description="Write a well-known set's download to shards.")
    parser.add_argument("name", type=Literal[tuple(OFFICIAL_SETS)])
    parser.add_argument("--from", type=str, default=".", help="folder with the downloaded files, as they came")
    parser.add_argument("--out", type=str | None, default=None, help="folder for the splits; default: data/NAME")
    parser.add_argument("--per_shard", type=int, default=5000, help="images in a shard")
    parser.add_argument(
        "--crop",
        type=Literal[tuple(BOXES)] | None,
        default=None,
        help="part of CelebA's images: ddim (128 x 128 around the face, the default) or score_sde (the central 140)",
    )
    return parser


def run(argv: list[str]) -> None:
    """Run the command. After an interruption, it continues where it was. Raises UserError for other files."""
    # Check the flags, and find the files.
    args = _parser().parse(argv)
    known, out = OFFICIAL_SETS[args.name], Path(args.out or f"data/{args.name}")
    if args.per_shard < 1:
        raise UserError(f"--per_shard {args.per_shard}: must be at least 1")
    if args.crop and args.name != "celeba64":
        raise UserError(f"--crop {args.crop}: is for celeba64 alone; leave it out")
    crop = (args.crop or "ddim") if args.name == "celeba64" else None
    files = find_files(args.name, known, Path(args["from"]))
    prepare_folder(out, f"--out {out}")

    # Write the splits.
    for warning in wrong_sums(known, files):
        print(f"warning: {warning}", flush=True)
    warnings = []
    plan, places = read_plan(args.name, known, files)
    settings = {"dataset": args.name, "per_shard": args.per_shard, "crop": crop, "source": known.home}
    settings |= {"files": {path.name: fingerprint(path) for path in files}}
    settings |= {"licence": known.license, "citation": known.citation}
    for split, labels in plan.splits.items():
        prepare_folder(out / split, f"--out {out / split}")
        with tqdm(total=len(labels), desc=split, unit="image", disable=None) as bar:
            change = partial(face, crop=crop) if crop else None
            manifest = convert(out / split, plan, places, split, settings, change, bar.update)
        found, expected = _count(len(labels), plan.classes), _count(known.images[split], known.classes)
        print(f"{out / split}: {found} in {len(manifest['shards'])} shards")
        if found != expected:
            warnings.append(f"{split} of {known.title} has {expected}; is all of it here?")
    _summarize(known, out, warnings)


def _count(images: int, classes: int) -> str:
    """Return a number of images, and of their classes if there are any."""
    return f"{images:,} images" + (f" of {classes:,} classes" if classes > 1 else "")


def _summarize(known: OfficialSet, out: Path, warnings: list[str]) -> None:
    """Print what is suspicious, license, citation, and what to run next."""
    for warning in warnings:
        print(f"warning: {warning}")
    train, latents = shlex.quote(str(out / "train")), shlex.quote(f"{out}-latents")
    print(f"license: {known.license}\ncite: {known.citation}")
    if known.train:
        print(f"train on it: {known.train} --data.source {train}")
    else:
        encode = f"python fastdit/encode.py --source {train} --size 256 --autoencoder models/sd-vae-ft-ema"
        print(f"encode: {encode} --out {latents}")
        print(f"then fine-tune: --preset finetune --data.source {latents}")
