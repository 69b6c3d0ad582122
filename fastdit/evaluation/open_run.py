"""A finished run, or one at work, as the commands open it to draw samples: their flags, and the network they get."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from jsonargparse import Namespace
from torch import nn

from fastdit import run_parts
from fastdit.command_line import OneLineParser
from fastdit.config import CONFIG_FILE, Config, load
from fastdit.errors import UserError
from fastdit.rundir.checkpoint_files import choose, classes_of, manifest, sampled_weights

SAMPLER_FLAGS = ("steps", "sampler", "guidance", "interval", "guided_channels")


@dataclass(frozen=True)
class SampledRun:
    config: Config
    checkpoint: Path
    shape: run_parts.Shape
    network: nn.Module  # on the CPU, with the averaged weights, in eval mode

    @property
    def step(self) -> int:
        """How many steps the weights were trained for."""
        return manifest(self.checkpoint)["step"]


def add_run_flags(parser: OneLineParser) -> None:
    parser.add_argument("--run", type=str, required=True, help="folder of the run")
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="one checkpoint folder; default: the newest good one",
    )


def add_sampler_flags(parser: OneLineParser) -> None:
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


def settings_of(args: Namespace) -> Config:
    """The run's settings with the sampler's of the command line. Raises UserError."""
    config = load(Path(args.run) / CONFIG_FILE)
    chosen = {key: getattr(args, key) for key in SAMPLER_FLAGS if getattr(args, key) is not None}
    model = replace(config.model, attention="auto")  # the one it was trained with may not run here
    data = replace(config.data, autoencoder=args.autoencoder or config.data.autoencoder)
    return replace(config, model=model, data=data, sample=replace(config.sample, **chosen))


def open_run(args: Namespace, config: Config, decide: Callable[[Callable], object] = lambda work: work()) -> SampledRun:
    """The network of `args.run`, of `args.checkpoint` or the newest good one. Raises UserError.

    decide: makes one rank choose for all (`Runtime.decide`): choosing reads every byte of a checkpoint.
    """
    run = Path(args.run)
    checkpoint = decide(lambda: choose(run, args.checkpoint))
    shape = run_parts.shape_of(config, classes_of(checkpoint))
    written = manifest(checkpoint)
    for field, value in run_parts.checkpoint_signature(config, shape).items():
        if written.get(field) != value:
            raise UserError(f"{checkpoint}: has {field} {written.get(field)}, {run} has {value}; give one of that run")
    network = run_parts.build_network(config, shape)
    network.load_state_dict(sampled_weights(checkpoint))
    return SampledRun(config, checkpoint, shape, network.eval())
