"""Images to latent shards: `python fastdit/encode.py --source DIR --size 256 --autoencoder sd-vae --out latents`.

Under torchrun or deepspeed each rank writes shards of its own; interrupted, the same command goes on.
"""

import os
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from fastdit import distributed
from fastdit.command_line import OneLineParser
from fastdit.commands import encoding
from fastdit.data import open_source
from fastdit.errors import UserError, run_command
from fastdit.models import open_autoencoder


def main(argv: list[str] | None = None) -> None:
    """The command, also installed as `fastdit-encode`. Leaves the process: 0, or 2 after a UserError."""
    run_command(_encode, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="fastdit-encode", description="Encode images into latent shards.")
    parser.add_argument("--source", type=str, required=True, help="images: a folder of class folders, or shards")
    parser.add_argument("--autoencoder", type=str, required=True, help="as a run's data.autoencoder")
    parser.add_argument("--out", type=str, required=True, help="folder of the shards")
    parser.add_argument(
        "--size", type=int | tuple[int, int], default=256, help="pixels that are encoded: height, width"
    )
    parser.add_argument("--classes", type=int | None, default=None, help="number of classes; default: the source's")
    parser.add_argument("--mirrored", type=bool, default=True, help="store mirrored images' latents, for data.flip")
    parser.add_argument(
        "--dtype",
        type=Literal["float16", "float32", "uint8"],
        default="float16",
        help="of the latents; uint8: their means alone, each channel's range in 255 steps",
    )
    parser.add_argument("--per_shard", type=int, default=5000, help="samples of a shard")
    parser.add_argument("--batch", type=int, default=32, help="images that the autoencoder encodes at once")
    parser.add_argument("--on_corrupt", type=Literal["stop", "skip"], default="stop", help="images that do not decode")
    parser.add_argument("--threads", type=int, default=4, help="CPU threads that decode, per rank")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser


def _encode(argv: list[str]) -> None:
    args = _parser().parse(argv)
    for field in ("per_shard", "batch", "threads"):
        if getattr(args, field) < 1:
            raise UserError(f"--{field} {getattr(args, field)}: must be at least 1")
    source, autoencoder = open_source(args.source, classes=args.classes), open_autoencoder(args.autoencoder)
    if source.kind != "image":
        raise UserError(f"--source {args.source}: holds no images; give a folder of class folders, or shards of images")
    size = (args.size, args.size) if isinstance(args.size, int) else args.size
    if min(size) < 1 or any(side % autoencoder.factor for side in size):
        raise UserError(f"--size {args.size}: must be a multiple of {autoencoder.factor}, as {args.autoencoder} asks")
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
    )
    out, device = Path(args.out), _device(args.device)
    if device.type == "cpu":
        distributed.keep_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shards = encoding.remaining(out, settings, rank, world)
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
        told = manifest["psnr"]
        exact, stored = ("no error" if db is None else f"{db:.2f} dB" for db in (told["autoencoder"], told["stored"]))
        print(f"PSNR of {told['pictures']} images decoded again: {stored}; of latents not rounded: {exact}")
        print(
            f"{manifest['encoded']} of {source.n} samples in {len(manifest['shards'])} shards; train on them with "
            f"--data.source {out} --data.channels {autoencoder.channels} "
            f"--data.size {height if height == width else f'[{height},{width}]'} "
            f"--data.latent_scale {autoencoder.scale} --data.latent_shift {autoencoder.shift} "
            f"--data.autoencoder {args.autoencoder}{'' if args.mirrored else ' --data.flip false'}"
        )
    else:
        print(f"rank {rank} is done; others are at work")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


if __name__ == "__main__":
    main()
