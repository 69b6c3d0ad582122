"""Open a finished or running run to draw samples: define the flags of the commands, and build its network."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from jsonargparse import Namespace
from torch import nn

from fastdit import run_parts
from fastdit.command_line import OneLineParser
from fastdit.config import CONFIG_FILE, Config, SampleConfig
from fastdit.data.sources import read_class_names
from fastdit.errors import UserError
from fastdit.noise import SDE, DiffusionForm
from fastdit.parser import load
from fastdit.rundir.checkpoint_files import (
    RAW,
    SAMPLED_EMA,
    choose,
    classes_of,
    first_difference,
    manifest,
    sampled_weights,
)

SAMPLER_FLAGS = ("steps", "sampler", "guidance", "interval", "guided_channels")
SAMPLER_FLAGS += ("diffusion_form", "diffusion_norm", "last_step_size", "precision")


@dataclass(frozen=True)
class SampledRun:
    """Hold one checkpoint of a run, and the network that it belongs to.

    Args:
        config: settings of the run, with the sampler's of the command line.
        checkpoint: folder of the checkpoint.
        shape: shape of a sample.
        network: the network with the weights asked for, by default the EMA weights, in eval mode, fp32, on the CPU.
    """

    config: Config
    checkpoint: Path
    shape: run_parts.Shape
    network: nn.Module

    @property
    def step(self) -> int:
        """Return the number of steps that the weights were trained for."""
        return manifest(self.checkpoint)["step"]


def add_run_flags(parser: OneLineParser, required: bool = True) -> None:
    """Add the flags that choose a run and a checkpoint."""
    kind = {"type": str, "required": True} if required else {"type": str | None, "default": None}
    parser.add_argument("--run", help="folder of the run", **kind)
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="folder of a checkpoint; default: the newest undamaged one",
    )


def add_weights_flag(parser: OneLineParser, name: str, more: str = "") -> None:
    """Add the flag `name`, which chooses the weights in a checkpoint; `more` goes on in its help text."""
    parser.add_argument(
        name,
        type=str,
        default=SAMPLED_EMA,
        help=f"{SAMPLED_EMA}, {RAW} (those that are trained), or another EMA's name{more}",
    )


def add_batch_flag(parser: OneLineParser) -> None:
    """Add the flag of the batch size."""
    parser.add_argument(
        "--batch",
        type=int | None,
        default=None,
        help="samples that are drawn at once; their rounding depends on it; default: 12 on a CPU, 128 on a GPU",
    )


def add_sampler_flags(parser: OneLineParser, lists: bool = False) -> None:
    """Add the flags of the sampler, and of the autoencoder. lists: whether several guidance scales can be given."""
    parser.add_argument(
        "--steps",
        type=int | None,
        default=None,
        help="sampler steps; this and the next eight flags default to the run's settings",
    )
    parser.add_argument(
        "--sampler",
        type=str | None,
        default=None,
        help="heun or euler for edm and flow; full_heun or euler_maruyama for flow; ddpm or ddim for ddpm",
    )
    text = "guidance scale, classifier-free; 1 is off" + ("; or several, such as 1,1.5,2" if lists else "")
    parser.add_argument("--guidance", type=str | None if lists else float | None, default=None, help=text)
    parser.add_argument(
        "--interval",
        type=tuple[float, float] | None,
        default=None,
        help="guide only at noise-to-signal ratios in [lo, hi]",
    )
    parser.add_argument("--guided_channels", type=int | None, default=None, help="guide only this many first channels")
    parser.add_argument(
        "--diffusion_form", type=DiffusionForm | None, default=None, help="diffusion coefficient for euler_maruyama"
    )
    parser.add_argument("--diffusion_norm", type=float | None, default=None, help="factor on it")
    parser.add_argument(
        "--last_step_size", type=float | None, default=None, help="time of euler_maruyama's last step, without noise"
    )
    parser.add_argument(
        "--precision",
        type=Literal["auto", "bf16", "tf32", "fp32"] | None,
        default=None,
        help="arithmetic; auto: bf16 on GPUs (an autoencoder: TF32), fp32 on CPUs",
    )
    parser.add_argument(
        "--autoencoder", type=str | None, default=None, help="decoder of latents; default: the run's data.autoencoder"
    )


def settings_of(args: Namespace) -> Config:
    """Return the run's settings, with those of the sampler and the autoencoder from the command line.

    Raises UserError if the run has no readable config.yaml, or if a value is impossible.
    """
    chosen = {key: getattr(args, key) for key in SAMPLER_FLAGS}
    config = sampling_config(load(Path(args.run) / CONFIG_FILE), chosen, args.autoencoder)
    for note in config.notes:
        print(note, file=sys.stderr)
    return config


def sampling_config(config: Config, chosen: dict[str, object], autoencoder: str | None = None) -> Config:
    """Return a run's settings for sampling: `chosen` replaces those of the sampler, and `autoencoder` the run's own.

    chosen: fields of `SampleConfig` by name; None takes the run's.

    Raises UserError if a value is impossible.
    """
    model = replace(config.model, attention="auto")  # the backend of training may not exist here
    data = replace(config.data, autoencoder=autoencoder or config.data.autoencoder)
    return replace(config, model=model, data=data, sample=choose_sampler(config.sample, chosen))


def choose_sampler(settings: SampleConfig, chosen: dict[str, object]) -> SampleConfig:
    """Return `settings` with the values of `chosen` that are not None. Raises UserError if one is impossible."""
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if chosen.get("sampler", "euler_maruyama") != "euler_maruyama":
        chosen = asdict(SDE()) | chosen  # the run's own settings of an SDE are not for this sampler
    return replace(settings, **chosen)


def open_run(
    args: Namespace,
    config: Config,
    decide: Callable[[Callable], object] = lambda work: work(),
    weights: str = SAMPLED_EMA,
) -> SampledRun:
    """Return the run at `args.run`, at the checkpoint `args.checkpoint` or the newest undamaged one.

    decide: calls a function on one rank for all, as `Runtime.decide` does. Choosing a checkpoint reads all its bytes.
    weights: the weights that are loaded, as in `sampled_weights`.

    Raises UserError if there is no such checkpoint, or if it belongs to another run.
    """
    run = Path(args.run)
    return open_checkpoint(run, config, decide(lambda: choose(run, args.checkpoint)), weights)


def open_checkpoint(run: Path, config: Config, checkpoint: Path, weights: str = SAMPLED_EMA) -> SampledRun:
    """Return a run at one of its checkpoints, which `choose` has found undamaged.

    config: settings of the run, as `sampling_config` returns them.
    weights: the weights that are loaded, as in `sampled_weights`.

    Raises UserError if the checkpoint belongs to another run, or does not hold such weights.
    """
    # Check that it belongs to this run.
    shape = run_parts.shape_of(config, classes_of(checkpoint))
    if difference := first_difference(checkpoint, run_parts.checkpoint_signature(config, shape)):
        field, before, now = difference
        raise UserError(f"{checkpoint}: has {field} {before}, {run} has {now}; give one of that run")

    # Build the network with the weights.
    network = run_parts.build_network(config, shape)
    network.load_state_dict(sampled_weights(checkpoint, weights))
    return SampledRun(config, checkpoint, shape, network.eval())


def known_class_names(run: Path, config: Config) -> Sequence[str]:
    """Return the names of the run's classes that its folder keeps, else those of its data, none if it is not there."""
    try:
        return read_class_names(run) or run_parts.open_data(config).class_names
    except UserError:
        return ()


def class_names(run: Path, config: Config, classes: int) -> list[str]:
    """Return the names of a run's classes, by label: those of `known_class_names`, else the classes' numbers."""
    return names_or_numbers(known_class_names(run, config), classes)


def names_or_numbers(names: Sequence[str], classes: int) -> list[str]:
    """Return `names` if there is one for each of `classes` labels, else the labels as text."""
    return list(names) if len(names) == classes else [str(label) for label in range(classes)]
