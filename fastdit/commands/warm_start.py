"""Warm-start SADM's encoder: `fastdit-warm-start --preset quickstart --steps 500 --out psi.safetensors`.

The encoder learns to classify the data that the diffusion transformer will be trained on. The file holds the encoder
without the classifier, for `--sadm.psi_weights` or `--psi_align.psi_weights`. Several runs can share it; without it,
each run warm-starts its own.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from fastdit import distributed, run_parts
from fastdit.command_line import OneLineParser
from fastdit.config import Config, DataConfig, ModelConfig
from fastdit.data.sources import check_classes
from fastdit.errors import UserError, run_command
from fastdit.files import prepare_file
from fastdit.methods.encoder_warm_start import LR, WEIGHT_DECAY, WINDOW, Diverged, warm_start_encoder
from fastdit.models.structure_encoders import LatentResNet, save_structure_encoder
from fastdit.parser import parse, presets

NAMES = ", ".join(presets())


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-warm-start`. Exit with 0, or with 2 after a UserError."""
    run_command(_warm_start, argv)


def _parser(base: Config) -> OneLineParser:
    """Return the parser; settings that are not given are those of `base`."""
    psi = base.sadm
    parser = OneLineParser(prog="fastdit-warm-start", description="Train SADM's encoder as a classifier of the data.")
    parser.add_argument("--preset", type=str | None, default=None, help="take data and encoder from one of " + NAMES)
    parser.add_argument("--out", type=str, required=True, help="file for the encoder's weights, .safetensors")
    parser.add_argument("--steps", type=int, required=True, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=256, help="samples per step")
    parser.add_argument("--lr", type=float, default=LR, help="AdamW's learning rate, which follows a cosine to zero")
    parser.add_argument("--weight_decay", type=float, default=WEIGHT_DECAY, help="AdamW's weight decay")
    parser.add_argument("--width", type=int, default=psi.psi_width, help="the run's sadm.psi_width")
    parser.add_argument("--features", type=int, default=psi.psi_features, help="the run's sadm.psi_features")
    parser.add_argument("--spectral_norm", type=bool, default=psi.spectral_norm, help="the run's sadm.spectral_norm")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the order of the data")
    parser.add_argument("--device", type=Literal["auto", "cpu", "cuda"], default="auto")
    parser.add_class_arguments(DataConfig, "data")
    parser.set_defaults({"data": asdict(base.data)})
    return parser


def _warm_start(argv: list[str]) -> None:
    """Train the encoder by the flags `argv`, and write it. Raises UserError."""
    # Read the flags, twice if a preset gives the defaults.
    args = _parser(Config()).parse(argv)
    if args.preset:
        args = _parser(parse(["--preset", args.preset])).parse(argv)
    out = Path(args.out)
    if out.suffix != ".safetensors":
        raise UserError(f"--out {out}: must end in .safetensors")
    shared = ("steps", "batch", "lr", "weight_decay", "seed", "device", "data")
    config = Config(model=ModelConfig(patch=1), **{field: getattr(args, field) for field in shared})  # checks ranges
    device = distributed.choose_device(config.device)
    prepare_file(out, f"--out {out}")

    # Open the data and build the encoder.
    source = run_parts.open_data(config)
    check_classes(source, config.data.classes, "data.classes")
    if config.data.standardize != "factor":
        raise UserError(
            "data.standardize: depends on the run's noise process; give data.latent_scale and data.latent_shift of its "
            "config.yaml instead"
        )
    encoder = LatentResNet(
        channels=config.data.channels,
        features=args.features,
        width=args.width,
        spectral_norm=args.spectral_norm,
        seed=config.seed,
    ).to(device)

    # Train it and write it.
    with closing(run_parts.build_loader(config, source, batch=config.batch, rank=0, world=1, device=device)) as loader:
        accuracy = _train(encoder, source.classes, loader, config, device)
    save_structure_encoder(encoder, out)
    epochs = config.steps * config.batch / source.n
    print(
        f"accuracy {accuracy:.1%} on the last {min(WINDOW, config.steps)} batches, each before it was trained on, "
        f"in epoch {epochs:.1f}; encoder in {out}"
    )


def _train(
    encoder: LatentResNet, classes: int, batches: Iterator[tuple[Tensor, Tensor]], config: Config, device: torch.device
) -> float:
    """Train the encoder behind a progress bar. Return its accuracy. Raises UserError when training diverges."""
    with tqdm(total=config.steps, desc="warm start", unit="step") as bar:

        def report(step: int, accuracy: float) -> None:
            bar.set_postfix_str(f"accuracy {accuracy:.1%}", refresh=False)
            bar.update(step - bar.n)

        try:
            return warm_start_encoder(
                encoder,
                classes,
                batches,
                steps=config.steps,
                lr=config.lr,
                weight_decay=config.weight_decay,
                bf16=device.type == "cuda",
                report=report,
            )
        except Diverged as error:
            raise UserError(f"--lr {config.lr}: the loss is not finite by step {error}; lower it") from None


if __name__ == "__main__":
    main()
