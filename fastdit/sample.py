"""Draw samples from a run: `python fastdit/sample.py --run runs/x --classes 0,3 --n 64 --guidance 2 --out grid.png`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from fastdit.command_line import OneLineParser
from fastdit.config import CONFIG_FILE, Config, load
from fastdit.data import open_source
from fastdit.engine import build, drawing
from fastdit.engine.checkpoint_files import choose, classes_of, manifest, sampled_weights
from fastdit.errors import UserError, run_command


def main(argv: list[str] | None = None) -> None:
    """The command, also installed as `fastdit-sample`. Leaves the process: 0, or 2 after a UserError."""
    run_command(_sample, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="fastdit-sample", description="Draw samples with a run's averaged weights.")
    parser.add_argument("--run", type=str, required=True, help="folder of the run")
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="one checkpoint folder; default: the newest good one",
    )
    parser.add_argument(
        "--out",
        type=str,
        default="grid.png",
        help=".png: a grid; .npz: images uint8 (n, H, W, C), labels (n,)",
    )
    parser.add_argument("--classes", type=str | None, default=None, help="labels, as 0,3,7; default: all in turn")
    parser.add_argument("--n", type=int, default=64, help="number of samples")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; sample i depends on the seed and i alone")
    parser.add_argument("--device", type=str, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--steps",
        type=int | None,
        default=None,
        help="sampler steps; these five default to the run's settings",
    )
    parser.add_argument("--sampler", type=str | None, default=None, help="edm, flow: heun, euler; ddpm: ddpm, ddim")
    parser.add_argument("--guidance", type=float | None, default=None, help="classifier-free guidance scale; 1 is off")
    parser.add_argument(
        "--interval",
        type=tuple[float, float] | None,
        default=None,
        help="noise-to-signal range of guidance, [lo, hi]",
    )
    parser.add_argument(
        "--guided_channels", type=int | None, default=None, help="guide only the first so many channels"
    )
    parser.add_argument(
        "--autoencoder", type=str | None, default=None, help="what decodes latents; default: the run's data.autoencoder"
    )
    return parser


def _sample(argv: list[str]) -> None:
    args = _parser().parse(argv)
    out, run = Path(args.out), Path(args.run)
    if out.suffix not in (".png", ".npz"):
        raise UserError(f"--out {out}: must end in .png or .npz")
    if args.n < 1 or args.seed < 0:
        raise UserError(f"--n {args.n} --seed {args.seed}: take n from 1 and the seed from 0")
    config = load(run / CONFIG_FILE)
    chosen = {key: getattr(args, key) for key in ("steps", "sampler", "guidance", "interval", "guided_channels")}
    chosen = {key: value for key, value in chosen.items() if value is not None}
    model = replace(config.model, attention="auto")  # the one it was trained with may not run here
    config = replace(config, model=model, sample=replace(config.sample, **chosen))
    if args.autoencoder is not None:
        config = replace(config, data=replace(config.data, autoencoder=args.autoencoder))
    device = _device(args.device)
    checkpoint = choose(run, args.checkpoint)
    shape = build.shape_of(config, classes_of(checkpoint))
    written = manifest(checkpoint)
    for field, value in build.identity(config, shape).items():
        if written[field] != value:
            raise UserError(f"{checkpoint}: has {field} {written[field]}, {run} has {value}; give one of that run")
    decoder = build.build_decoder(config, shape)
    if decoder is None and shape.channels not in (1, 3):
        raise UserError(
            f"{run}: samples are latents of {shape.channels} channels; a picture needs their autoencoder: give "
            "--autoencoder here, or --data.autoencoder to the run"
        )
    classes = _classes(args.classes, shape.classes)

    network = build.build_network(config, shape)
    network.load_state_dict(sampled_weights(checkpoint))
    labels = drawing.balanced_labels(args.n, classes)
    images = drawing.to_uint8(
        drawing.draw(
            network.to(device).eval(),
            build.build_noise(config),
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
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        np.savez(out, images=images, labels=labels)
    else:
        drawing.grid(images, labels, _names(config, shape.classes)).save(out)
    print(f"{args.n} samples of {checkpoint} in {out}")


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such kind; a torch built without it
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: cannot be used here ({reason}); give cpu or cuda") from None


def _names(config: Config, classes: int) -> Sequence[str]:
    """Of the classes; just their numbers where the training data is not at hand."""
    try:
        names = open_source(config.data.source, classes=config.data.classes).class_names
    except UserError:
        names = ()
    return names if len(names) == classes else [str(label) for label in range(classes)]


def _classes(text: str | None, count: int) -> list[int]:
    if text is None:
        return list(range(count))
    try:
        classes = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--classes {text}: must be numbers with commas between, as 0,3,7") from None
    wrong = [label for label in classes if not 0 <= label < count]
    if wrong:
        raise UserError(f"--classes {text}: {wrong[0]} is out of range; the run has classes 0 to {count - 1}")
    return classes


if __name__ == "__main__":
    main()
