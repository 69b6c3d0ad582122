"""Write a run's weights for other programs: `python fastdit/export.py --run runs/x --out dit.pt`.

`.pt` gives the original DiT's layout, for programs that read `DiT-XL-2-256x256.pt`; `.safetensors` gives fastdit's,
with a description of the run: its noise process, scale of latents, size and classes (see `weights_description`).
`--format diffusers` writes a folder for diffusers.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import Namespace

from fastdit import run_parts
from fastdit.commands.diffusers_export import DiffusersExport
from fastdit.commands.model_card import model_card
from fastdit.config import CONFIG_FILE, Config
from fastdit.errors import UserError, run_command
from fastdit.evaluation.open_run import (
    SampledRun,
    add_run_flags,
    class_names,
    known_class_names,
    open_checkpoint,
    sampling_config,
)
from fastdit.files import (
    prepare_file,
    prepare_new_folder,
    save_tensors,
    write_atomically,
    write_new_folder,
    write_text,
)
from fastdit.models import DiT, check_official, fold_block_scales, save_official
from fastdit.noise import DDPM, NoiseProcess
from fastdit.parser import OneLineParser, load
from fastdit.rundir.checkpoint_files import RAW, SAMPLED_EMA, choose
from fastdit.weights_description import describe, process_flags

SUFFIXES = {"pt": ".pt", "safetensors": ".safetensors", "diffusers": ""}


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-export`. Exit with 0, or with 2 after a UserError."""
    run_command(_export, argv)


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-export", description="Write a run's weights for other programs.")
    add_run_flags(parser)
    parser.add_argument(
        "--out",
        type=str,
        required=True,
        help="file: .pt for the original DiT's layout, .safetensors for fastdit's; or a new folder for diffusers",
    )
    parser.add_argument(
        "--format",
        type=Literal["pt", "safetensors", "diffusers"] | None,
        default=None,
        help="what is written; default: by the name of --out",
    )
    parser.add_argument(
        "--weights", type=str, default=SAMPLED_EMA, help="ema, raw (those that are trained), or another EMA's name"
    )
    parser.add_argument(
        "--autoencoder",
        type=str | None,
        default=None,
        help="decoder of latents, which becomes diffusers' VAE; default: the run's data.autoencoder",
    )
    parser.add_argument(
        "--card",
        type=str | None,
        default=None,
        help="write a model card to this file, such as README.md; a folder for diffusers always has one",
    )
    return parser


def _export(argv: list[str]) -> None:
    """Export by the flags `argv`. Raises UserError."""
    # Check the flags.
    args = _parser().parse(argv)
    out, run = Path(args.out), Path(args.run)
    form = args.format or {".pt": "pt", ".safetensors": "safetensors"}.get(out.suffix)
    if form is None:
        raise UserError(f"--out {out}: must end in .pt or .safetensors, or name a folder with --format diffusers")
    if SUFFIXES[form] not in ("", out.suffix):
        raise UserError(f"--out {out}: must end in {SUFFIXES[form]} with --format {form}")
    if form == "diffusers" and args.card:
        raise UserError(f"--card {args.card}: the folder for diffusers has its own, README.md; leave it out")

    # Check that the run's network has this layout, and that the output can be written.
    config = sampling_config(load(run / CONFIG_FILE), {}, args.autoencoder)
    if form != "safetensors":
        network = _plain_network(config, out)
        if form == "pt":
            check_official(network)
    if form == "diffusers":
        _export_folder(args, config, network)
        return
    prepare_file(out, f"--out {out}")
    card = Path(args.card) if args.card else None
    if card:
        prepare_file(card, f"--card {card}")

    # Write the weights.
    opened = open_checkpoint(run, config, choose(run, args.checkpoint), args.weights)
    weights, names = fold_block_scales(opened.network.state_dict()), known_class_names(run, config)
    if form == "safetensors":
        save_tensors(weights, out, metadata=describe(config, opened.shape, names))
    else:
        with write_atomically(out) as temporary:
            save_official(weights, temporary, grid=opened.network.grid)
    if card:
        write_text(card, _card(opened, run, args.weights, out))
    print(f"{_named(args.weights)} of {opened.checkpoint} in {out}")
    if form == "pt" and config.noise.process != DDPM():
        print(
            "note: the original DiT's sampler cannot run them: it takes DDPM with 1000 steps, and this run's noise "
            f"process is {_process(config.noise.process)}; sample them with fastdit, and start from them with "
            f"{process_flags(config.noise.name, asdict(config.noise.process))}"
        )


def _export_folder(args: Namespace, config: Config, network: DiT) -> None:
    """Write the folder for diffusers by the flags `args`. Raises UserError.

    network: the run's network, without weights.
    """
    # Find out what can be written, and where.
    out, run = Path(args.out), Path(args.run)
    decoder = run_parts.build_decoder(config, run_parts.shape_of(config, 1))
    export = DiffusersExport(config, network, decoder)
    prepare_new_folder(out, f"--out {out}")

    # Write it, and say what is in it.
    opened = open_checkpoint(run, config, choose(run, args.checkpoint), args.weights)
    names = class_names(run, config, opened.shape.classes)
    with write_new_folder(out) as folder:
        notes = export.write(folder, opened, run, names, args.weights, out.name)
    print(f"{_named(args.weights)} of {opened.checkpoint} in {out}; README.md in it has code that draws")
    for note in notes:
        print(f"note: {note}")


def _plain_network(config: Config, out: Path) -> DiT:
    """Return the run's network without weights. Raises UserError, which names `out`, if it is no plain DiT."""
    with torch.device("meta"):
        network = run_parts.build_network(config, run_parts.shape_of(config, 1))
    if not isinstance(network, DiT):
        raise UserError(
            f"--out {out}: the network of --method {config.method} is no plain DiT, and this layout has no place for "
            "an extra decoder; give a .safetensors file"
        )
    return network


def _card(opened: SampledRun, run: Path, weights: str, out: Path) -> str:
    """Return the model card of a file. Raises UserError."""
    config, names = opened.config, class_names(run, opened.config, opened.shape.classes)
    guidance = config.sample.guidance if config.label_drop else 1.0
    arguments = [f'"{out.name}"', *(['autoencoder="PATH"'] if config.data.autoencoder else [])]
    if out.suffix == ".pt":
        arguments += [f'noise="{config.noise.name}"', f"heads={config.model.dims()['heads']}"]
    code = (
        f"import fastdit\n\nmodel = fastdit.from_pretrained({', '.join(arguments)})\n"
        f"images = model.sample(n=8, guidance={guidance:g}, steps={config.sample.steps})  # uint8 (n, H, W, C)"
    )
    return model_card(opened, run, names, weights, code, [])


def _named(weights: str) -> str:
    """Return the name of the weights in a sentence."""
    return {SAMPLED_EMA: "EMA weights", RAW: "raw weights"}.get(weights, f"EMA weights ({weights})")


def _process(process: NoiseProcess) -> str:
    """Return the name of a noise process, with its settings if it is DDPM."""
    if not isinstance(process, DDPM):
        return process.name
    return f"ddpm with {process.steps} steps and betas from {process.beta_start} to {process.beta_end}"


if __name__ == "__main__":
    main()
