"""Encode images into latent shards: `python fastdit/encode.py --source DIR --autoencoder sd-vae --out latents`.

Under torchrun or deepspeed, the ranks share the shards. After an interruption, the same command continues.
"""

import os
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from fastdit import distributed
from fastdit.command_line import COLUMNS, SOURCE_FLAGS, OneLineParser, add_source_flags
from fastdit.commands import encoding
from fastdit.data import open_source
from fastdit.data.image_rules import Crop
from fastdit.data.sources import check_apart, check_classes
from fastdit.errors import UserError, run_command
from fastdit.files import prepare_folder
from fastdit.models import open_autoencoder


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-encode`. Exit with 0, or with 2 after a UserError."""
    run_command(_encode, argv)


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-encode", description="Encode images into latent shards.")
    parser.add_argument(
        "--source", type=str, required=True, help="images, as --data.source of a run, or a folder of images"
    )
    parser.add_argument(
        "--autoencoder", type=str, required=True, help="a name or path, as in --data.autoencoder of a run"
    )
    parser.add_argument("--out", type=str, required=True, help="folder for the shards")
    parser.add_argument(
        "--size", type=int | tuple[int, int], default=256, help="pixels: one number, or [height, width]"
    )
    parser.add_argument("--crop", type=Crop, default="center", help="as --data.crop of a run")
    add_source_flags(parser)
    parser.add_argument(
        "--mirrored", type=bool, default=True, help="store the latents of mirrored images too, for data.flip"
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float16", "float32", "uint8"],
        default="float16",
        help="type of the latents; uint8 stores only their means, each channel's range in 255 steps",
    )
    parser.add_argument("--per_shard", type=int, default=5000, help="samples in a shard")
    parser.add_argument("--batch", type=int, default=32, help="images that the autoencoder encodes at once")
    parser.add_argument(
        "--on_corrupt",
        type=Literal["stop", "skip"],
        default="stop",
        help="what to do about an image that cannot be decoded",
    )
    parser.add_argument("--threads", type=int, default=4, help="CPU threads per rank that decode images")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser


def _encode(argv: list[str]) -> None:
    """Encode by the flags `argv`. Raises UserError."""
    # Check the flags against the images and the autoencoder.
    args = _parser().parse(argv)
    for field in ("per_shard", "batch", "threads"):
        if getattr(args, field) < 1:
            raise UserError(f"--{field} {getattr(args, field)}: must be at least 1")
    source = open_source(args.source, **{field: getattr(args, field) for field in SOURCE_FLAGS}, flat=True)
    check_classes(source, args.classes, "--classes")
    autoencoder = open_autoencoder(args.autoencoder)
    if source.kind != "image":
        raise UserError(f"--source {args.source}: holds no images; give a folder of class folders, or shards of images")
    size = (args.size, args.size) if isinstance(args.size, int) else args.size
    if min(size) < 1 or any(side % autoencoder.factor for side in size):
        raise UserError(f"--size {args.size}: must be a multiple of {autoencoder.factor}, as {args.autoencoder} asks")
    out = Path(args.out)
    check_apart(source, out, "--out")
    prepare_folder(out, f"--out {out}")

    # Find out which shards this rank has to write.
    settings = encoding.Settings(
        source=args.source,
        samples=source.n,
        size=size,
        autoencoder={
            "name": autoencoder.name,
            "sha256": autoencoder.hash,
            "scale": autoencoder.scale,
            "shift": autoencoder.shift,
        },
        dtype=args.dtype,
        mirrored=args.mirrored,
        per_shard=args.per_shard,
        crop=args.crop,
        **{field: getattr(args, field) for field in COLUMNS},
    )
    device = distributed.choose_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cpu":
        distributed.keep_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shards = encoding.remaining(out, settings, rank, world)

    if rank == 0:
        print("".join(f"{note}\n" for note in source.notes), end="")

    # Write them. The last rank to end writes the manifest.
    with tqdm(total=sum(len(settings.ids(k)) for k in shards), desc="encoding", unit="image", disable=rank > 0) as bar:
        encoding.encode_shards(
            shards,
            source,
            autoencoder.to(device),
            out,
            settings,
            batch=args.batch,
            device=device,
            threads=args.threads,
            on_corrupt=args.on_corrupt,
            progress=bar.update,
        )
    if manifest := encoding.finish(out, settings, source):
        height, width = (side // autoencoder.factor for side in size)
        psnr = manifest["psnr"]
        exact, stored = ("no error" if db is None else f"{db:.2f} dB" for db in (psnr["autoencoder"], psnr["stored"]))
        print(f"PSNR of {psnr['pictures']} images decoded again: {stored}; of latents not rounded: {exact}")
        print(
            f"{manifest['encoded']} of {source.n} samples in {len(manifest['shards'])} shards; train on them with "
            f"--data.source {out} --data.channels {autoencoder.channels} "
            f"--data.size {height if height == width else f'[{height},{width}]'} "
            f"--data.latent_scale {autoencoder.scale} --data.latent_shift {autoencoder.shift} "
            f"--data.autoencoder {args.autoencoder}{'' if args.mirrored else ' --data.flip false'}"
            f"{'' if args.crop == 'center' else f' --data.crop {args.crop}'}"
        )
    else:
        print(f"rank {rank} is done; others are at work")


if __name__ == "__main__":
    main()
