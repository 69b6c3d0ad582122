"""Convert images to shards: `fastdit-data convert SOURCE --out DIR`, such as a Hugging Face data set in parquet."""

from pathlib import Path

from tqdm import tqdm

from fastdit.command_line import SOURCE_FLAGS, OneLineParser, add_source_flags
from fastdit.data import open_source
from fastdit.data.sets.to_shards import convert
from fastdit.data.sources import check_apart, check_classes
from fastdit.errors import UserError
from fastdit.files import prepare_folder


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-data convert", description="Write the images of a source to shards.")
    parser.add_argument("source", type=str, help="path or name, as in --data.source")
    parser.add_argument("--out", type=str, required=True, help="folder for the shards")
    parser.add_argument("--per_shard", type=int, default=5000, help="images in a shard")
    add_source_flags(parser)
    return parser


def run(argv: list[str]) -> None:
    """Run the command. After an interruption, it continues where it was. Raises UserError."""
    # Check the flags and the source.
    args = _parser().parse(argv)
    if args.per_shard < 1:
        raise UserError(f"--per_shard {args.per_shard}: must be at least 1")
    options = {field: getattr(args, field) for field in SOURCE_FLAGS}
    source, out = open_source(args.source, **options), Path(args.out)
    check_classes(source, args.classes, "--classes")
    if source.kind != "image":
        raise UserError(f"{args.source}: holds no images; give class folders or a Hugging Face data set")
    check_apart(source, out, "--out")
    prepare_folder(out, f"--out {out}")

    # Write the shards.
    settings = {"source": args.source} | options
    with tqdm(total=source.n, desc="shards", unit="image", disable=None) as bar:
        manifest = convert(source, out, settings, args.per_shard, bar.update)
    print(f"{out}: {source.n:,} images of {source.classes:,} classes in {len(manifest['shards'])} shards")
    print(f"train on it: --data.source {out}")
