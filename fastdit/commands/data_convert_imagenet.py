"""Convert ImageNet's official tar to shards: `fastdit-data convert-imagenet ILSVRC2012_img_train.tar --out DIR`."""

from pathlib import Path

from tqdm import tqdm

from fastdit.command_line import OneLineParser
from fastdit.data.sets.imagenet import CLASSES, IMAGES, convert, read_names
from fastdit.errors import UserError


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-data convert-imagenet", description="Convert ImageNet's tar to shards.")
    parser.add_argument("tar", type=str, help="ILSVRC2012_img_train.tar")
    parser.add_argument("--out", type=str, required=True, help="folder for the shards")
    parser.add_argument("--per_shard", type=int, default=5000, help="images in a shard")
    parser.add_argument("--names", type=str | None, default=None, help="file with lines `n01440764 name of the class`")
    return parser


def run(argv: list[str]) -> None:
    """Run the command. After an interruption, it continues where it was. Raises UserError if the tar is not usable."""
    args = _parser().parse(argv)
    if args.per_shard < 1:
        raise UserError(f"--per_shard {args.per_shard}: must be at least 1")
    tar, out = Path(args.tar), Path(args.out)
    names = read_names(Path(args.names)) if args.names else None
    if not tar.is_file():
        raise UserError(f"{tar}: no such file; fastdit-data fetch imagenet-info says where to get it")
    with tqdm(total=tar.stat().st_size, desc=tar.name, unit="B", unit_scale=True) as bar:
        manifest = convert(tar, out, per_shard=args.per_shard, names=names, progress=bar.update)
    counts = manifest["counts"]
    print(f"{sum(counts):,} images of {len(counts):,} classes in {len(manifest['shards'])} shards: {out}")
    if (sum(counts), len(counts)) != (IMAGES, CLASSES):
        print(f"warning: ImageNet has {IMAGES:,} images of {CLASSES:,} classes; is {tar} the file of step 2?")
    print(f"encode: python fastdit/encode.py --source {out} --size 256 --autoencoder models/sd-vae --out {out}-latents")
