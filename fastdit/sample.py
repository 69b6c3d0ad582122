"""Draw samples from a run: `python fastdit/sample.py --run runs/x --classes 0,3 --n 64 --guidance 2 --out grid.png`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastdit import run_parts
from fastdit.command_line import OneLineParser
from fastdit.config import Config
from fastdit.data.sources import read_class_names
from fastdit.distributed import choose_device
from fastdit.errors import UserError, run_command
from fastdit.evaluation import draw_samples
from fastdit.evaluation.open_run import add_run_flags, add_sampler_flags, open_run, settings_of
from fastdit.files import prepare_file, write_atomically


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-sample`. Exit with 0, or with 2 after a UserError."""
    run_command(_sample, argv)


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-sample", description="Draw samples with a run's EMA weights.")
    add_run_flags(parser)
    parser.add_argument(
        "--out",
        type=str,
        default="grid.png",
        help="file: .png for a grid, .npz for images uint8 (n, H, W, C) and labels (n,)",
    )
    parser.add_argument(
        "--classes",
        type=str | None,
        default=None,
        help="class labels or names, such as 0,3,7 or cat,dog; a number is a label; default: all in turn",
    )
    parser.add_argument("--n", type=int, default=64, help="number of samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise; sample i depends on it and on i alone")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, or one of several, such as cuda:1")
    add_sampler_flags(parser)
    return parser


def _sample(argv: list[str]) -> None:
    """Draw samples by the flags `argv`, and write them. Raises UserError."""
    # Check the flags.
    args = _parser().parse(argv)
    out, run = Path(args.out), Path(args.run)
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: must end in .png or .npz")
    if args.n < 1 or args.seed < 0:
        raise UserError(f"--n {args.n} --seed {args.seed}: take n from 1 and the seed from 0")

    # Open the run.
    config, device = settings_of(args), choose_device(args.device)
    prepare_file(out, f"--out {out}")
    opened = open_run(args, config)
    checkpoint, shape = opened.checkpoint, opened.shape
    decoder = run_parts.build_decoder(config, shape)
    if decoder is None and shape.channels not in (1, 3):
        raise UserError(
            f"{run}: samples are latents of {shape.channels} channels; a picture needs their autoencoder: give "
            "--autoencoder here, or --data.autoencoder to the run"
        )
    names = _names(run, config, shape.classes)
    classes = _classes(args.classes, names)

    # Draw the samples, and write them.
    labels = draw_samples.balanced_labels(args.n, classes)
    images = draw_samples.to_uint8(
        draw_samples.draw(
            opened.network.to(device),
            run_parts.build_noise(config),
            config.sample,
            shape,
            labels,
            indices=range(args.n),
            seed=args.seed,
            device=device,
            decoder=decoder.to(device) if decoder else None,
            progress=partial(tqdm, desc="sampling", unit="batch"),
        )
    )
    with write_atomically(out) as temporary, temporary.open("wb") as file:
        if out.suffix == ".npz":
            np.savez(file, images=images, labels=labels)
        else:
            draw_samples.grid(images, labels, names).save(file, format="png")
    print(f"{args.n} samples of {checkpoint} in {out}")


def _names(run: Path, config: Config, classes: int) -> Sequence[str]:
    """Return the names of the classes that the run keeps, else those of its data, else the classes' numbers."""
    try:
        names = read_class_names(run) or run_parts.open_data(config).class_names
    except UserError:
        names = ()
    return names if len(names) == classes else [str(label) for label in range(classes)]


def _classes(text: str | None, names: Sequence[str]) -> list[int]:
    """Return the class labels of `--classes`. Raises UserError if one is neither a label nor one of `names`."""
    if text is None:
        return list(range(len(names)))
    known = {name: label for label, name in enumerate(names)}
    if text in known and not text.isdecimal():  # a name may have a comma
        return [known[text]]
    return [_class(text, part.strip(), known) for part in text.split(",")]


def _class(text: str, part: str, known: dict[str, int]) -> int:
    """Return the class label of one part of `--classes`, a number or a name. Raises UserError if it is neither."""
    if part in known and not part.removeprefix("-").isdecimal():
        return known[part]
    try:
        label = int(part)
    except ValueError:
        few = ", ".join(list(known)[:10]) + (", ..." if len(known) > 10 else "")
        raise UserError(
            f"--classes {text}: must be numbers or names of classes with commas between, as 0,3,7; the run has {few}"
        ) from None
    if not 0 <= label < len(known):
        raise UserError(f"--classes {text}: {label} is out of range; the run has classes 0 to {len(known) - 1}")
    return label


if __name__ == "__main__":
    main()
