"""Write a run's EMA weights for other programs: `python fastdit/export.py --run runs/x --out dit.pt`.

`.pt` gives the original DiT's layout, for programs that read `DiT-XL-2-256x256.pt`; `.safetensors` gives fastdit's,
with a description of the run: its noise process, scale of latents, size and classes (see `weights_description`).
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fastdit import run_parts
from fastdit.config import CONFIG_FILE, Config
from fastdit.data.sources import read_class_names
from fastdit.errors import UserError, run_command
from fastdit.files import prepare_file, save_tensors, write_atomically
from fastdit.models import fold_block_scales, save_official
from fastdit.noise import DDPM, NoiseProcess
from fastdit.parser import OneLineParser, load
from fastdit.rundir.checkpoint_files import choose, classes_of, sampled_weights
from fastdit.weights_description import describe, process_flags


def main(argv: list[str] | None = None) -> None:
    """Run the command, also installed as `fastdit-export`. Exit with 0, or with 2 after a UserError."""
    run_command(_export, argv)


def _export(argv: list[str]) -> None:
    """Export by the flags `argv`. Raises UserError."""
    # Check the flags against the run.
    parser = OneLineParser(prog="fastdit-export", description="Write a run's EMA weights for other programs.")
    parser.add_argument("--run", type=str, required=True, help="folder of the run")
    parser.add_argument(
        "--checkpoint", type=str | None, default=None, help="folder of a checkpoint; default: the newest undamaged one"
    )
    parser.add_argument(
        "--out", type=str, required=True, help="file: .pt for the original DiT's layout, .safetensors for fastdit's"
    )
    args = parser.parse(argv)
    out, run = Path(args.out), Path(args.run)
    if out.suffix not in (".pt", ".safetensors"):
        raise UserError(f"--out {out}: must end in .pt or .safetensors")
    config = load(run / CONFIG_FILE)
    if out.suffix == ".pt" and config.uses("sd_dit") and config.sd_dit.decoder == "extra":
        raise UserError(
            f"--out {out}: the original DiT's layout has no place for an extra decoder; give a .safetensors file"
        )

    prepare_file(out, f"--out {out}")

    # Write the EMA weights.
    checkpoint = choose(run, args.checkpoint)
    weights = fold_block_scales(sampled_weights(checkpoint))
    shape = run_parts.shape_of(config, classes_of(checkpoint))
    if out.suffix == ".safetensors":
        save_tensors(weights, out, metadata=describe(config, shape, _class_names(run, config)))
    else:
        network = run_parts.build_network(config, shape)
        with write_atomically(out) as temporary:
            save_official(weights, temporary, grid=network.grid)
    print(f"EMA weights of {checkpoint} in {out}")
    if out.suffix == ".pt" and config.noise.process != DDPM():
        print(
            "note: the original DiT's sampler cannot run them: it takes DDPM with 1000 steps, and this run's noise "
            f"process is {_process(config.noise.process)}; sample them with fastdit, and start from them with "
            f"{process_flags(config.noise.name, asdict(config.noise.process))}"
        )


def _class_names(run: Path, config: Config) -> Sequence[str]:
    """Return the names of the run's classes that its folder keeps, else those of its data, none if it is not there."""
    try:
        return read_class_names(run) or run_parts.open_data(config).class_names
    except UserError:
        return ()


def _process(process: NoiseProcess) -> str:
    """Return the name of a noise process, with its settings if it is DDPM."""
    if not isinstance(process, DDPM):
        return process.name
    return f"ddpm with {process.steps} steps and betas from {process.beta_start} to {process.beta_end}"


if __name__ == "__main__":
    main()
