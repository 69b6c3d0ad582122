"""One typed tree of settings: what every run reads, and what it writes beside its results.

A preset (`fastdit/presets/NAME.yaml`, or a path) differs from these defaults only where it must; any field is a
flag (`--lr 2e-4 --model.patch 4`). Parsing, type checks and `--help` are jsonargparse's.
"""

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from fastdit.errors import UserError
from fastdit.models import SIZES
from fastdit.noise import DDPM, EDM, Flow

PRESETS = Path(__file__).parent / "presets"
CONFIG_FILE = "config.yaml"  # in a run's folder


@dataclass(frozen=True)
class DataConfig:
    """Where training samples come from.

    Args:
        source: name of a shipped set (fashion_mnist), folder of class folders, WebDataset shards (a tar, a folder of
            tars, or a pattern `x-{000..099}.tar`), or `synthetic`.
        size: height and width the network sees, in pixels (or latent cells); one number means square.
        channels: channels of an image (1 or 3) or latent.
        classes: number of classes; none reads it from the source.
        flip: mirror each sample with probability one half. Latents need the mirrored latent in the shards.
        on_corrupt: an undecodable image stops the run, or is replaced by the next one and counted.
        threads: DALI's CPU threads per rank.
        latent_scale: factor on latents after `latent_shift` is subtracted (SD VAE: 0.18215).
        latent_shift: subtracted from latents.
    """

    source: str = "fashion_mnist"
    size: int | tuple[int, int] = 256
    channels: int = 3
    classes: int | None = None
    flip: bool = True
    on_corrupt: Literal["stop", "skip"] = "stop"
    threads: int = 2
    latent_scale: float = 1.0
    latent_shift: float = 0.0


@dataclass(frozen=True)
class ModelConfig:
    """The DiT. `size` gives depth, width and heads as published; each may be overridden.

    Args:
        size: S, B, L or XL.
        patch: patch side in pixels (or latent cells).
        depth: number of blocks.
        width: features per token.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over `width`.
        attention: auto, flash_attn, cudnn, flash, efficient, math or sdpa.
    """

    size: Literal["S", "B", "L", "XL"] = "S"
    patch: int = 2
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    attention: str = "auto"

    def dims(self) -> dict[str, int]:
        """depth, width and heads after overrides."""
        base = SIZES[self.size]
        return {key: getattr(self, key) or base[key] for key in ("depth", "width", "heads")}


@dataclass(frozen=True)
class NoiseConfig:
    """The noise process; only the chosen one's own settings are used.

    Args:
        name: edm, ddpm or flow.
        edm: Karras et al. 2022.
        ddpm: Ho et al. 2020 with learned-range variance (Nichol and Dhariwal 2021).
        flow: linear flow matching.
    """

    name: Literal["edm", "ddpm", "flow"] = "edm"
    edm: EDM = EDM()
    ddpm: DDPM = DDPM()
    flow: Flow = Flow()


@dataclass(frozen=True)
class EMAConfig:
    """The exponential moving average that is sampled.

    Args:
        kind: `fixed` decay with the usual warm-up min(decay, (1+t)/(10+t)), or `power` (Karras et al. 2024, eq. 127:
            a profile whose width is a fixed share of the run, with nothing to warm up).
        decay: for `fixed`.
        std: for `power`: relative width of the profile.
    """

    kind: Literal["fixed", "power"] = "fixed"
    decay: float = 0.9999
    std: float = 0.1


@dataclass(frozen=True)
class SampleConfig:
    """How pictures are drawn during and after training.

    Args:
        sampler: none takes the process's default (edm, flow: heun; ddpm: ddpm).
        steps: sampler steps.
        guidance: classifier-free guidance scale; 1 is off.
        interval: lowest and highest noise-to-signal ratio at which guidance acts; none is everywhere.
        guided_channels: guide only the first so many channels (official DiT checkpoints: 3); none guides all.
        per_class: pictures of each class in the grid.
        max_classes: classes shown in the grid.
        agreement: samples for the class-agreement figure at the end (a k-NN on the training images); 0 is off.
    """

    sampler: str | None = None
    steps: int = 18
    guidance: float = 1.0
    interval: tuple[float, float] | None = None
    guided_channels: int | None = None
    per_class: int = 8
    max_classes: int = 16
    agreement: int = 0


@dataclass(frozen=True)
class Config:
    """Everything a training run depends on.

    Args:
        method: what is trained; dit is the plain denoising loss.
        out: folder of the run.
        resume: go on from the newest good checkpoint in `out`.
        ds_config: DeepSpeed configuration: zero0, zero1, zero2, zero3, zero3_offload, or a path to a JSON file.
        init_from: start from these weights: official DiT .pt, a folder saved by diffusers, or fastdit's own export.
        device: cpu, cuda, or auto (a GPU when there is one).
        precision: bf16 (fp32 master weights), fp32, or auto (bf16 on GPUs, fp32 on CPUs).
        steps: optimizer steps of the whole run.
        batch: samples per optimizer step over all ranks; none reads it from the DeepSpeed file.
        micro_batch: samples per rank and forward pass; none takes batch / ranks.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: after the warm-up: constant, or cosine to zero at `steps`.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's, decoupled.
        grad_clip: largest gradient norm; 0 is off; none reads it from the DeepSpeed file.
        label_drop: probability of training a sample without its label (classifier-free guidance).
        seed: of weights, data order, noise.
        threads: CPU threads per rank; 0 shares the cores evenly.
        log_every: steps between records; scalars leave the device only then.
        save_every: steps between checkpoints; the last step always has one.
        sample_every: steps between sample grids; 0 draws only at the end.
        keep_checkpoints: how many of the newest checkpoints stay.
        max_nonfinite: steps with a non-finite loss or gradient, each skipped, after which the run stops.
        data: where samples come from.
        model: the network.
        noise: the noise process.
        ema: the weights that are sampled.
        sample: how pictures are drawn.
    """

    method: Literal["dit"] = "dit"
    out: str = "runs/default"
    resume: bool = False
    ds_config: str = "zero1"
    init_from: str | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    steps: int = 400_000
    batch: int | None = None
    micro_batch: int | None = None
    lr: float = 1e-4
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = None
    label_drop: float = 0.1
    seed: int = 0
    threads: int = 0
    log_every: int = 50
    save_every: int = 10_000
    sample_every: int = 0
    keep_checkpoints: int = 2
    max_nonfinite: int = 3
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    noise: NoiseConfig = NoiseConfig()
    ema: EMAConfig = EMAConfig()
    sample: SampleConfig = SampleConfig()

    def __post_init__(self):
        for field in ("steps", "log_every", "save_every", "keep_checkpoints", "batch", "micro_batch"):
            if (value := getattr(self, field)) is not None and value < 1:
                raise UserError(f"{field}: must be at least 1, got {value}")
        if not 0 <= self.label_drop <= 1:
            raise UserError(f"label_drop: must lie in [0, 1], got {self.label_drop}")
        dims = self.model.dims()
        if dims["width"] % dims["heads"]:
            raise UserError(f"model.width: {dims['width']} is not divisible by model.heads {dims['heads']}")


class OneLineParser(ArgumentParser):
    """An argument parser whose every error is one `UserError`."""

    def error(self, message: str, *args, **kwargs) -> NoReturn:  # jsonargparse calls it with the exception too
        raise UserError(_one_line(message))

    def parse(self, argv: list[str]) -> Namespace:
        """Typed values of a command line. Raises UserError."""
        return self._typed(lambda: self.parse_args(argv))

    def parse_values(self, values: dict) -> Namespace:
        """Typed values of a mapping read from a file. Raises UserError."""
        return self._typed(lambda: self.parse_object(values))

    def _typed(self, read) -> Namespace:
        try:
            return self.instantiate(read())
        except UserError:
            raise
        except Exception as error:  # argparse.ArgumentError, TypeError, KeyError: jsonargparse raises several
            raise UserError(_one_line(error)) from None


def _one_line(message: str) -> str:
    message = re.sub(r"\s+", " ", str(message)).replace("Parser key ", "").strip()
    return re.sub(r"<class '([\w.]+)'>", r"\1", message)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="fastdit-train", description="Train a diffusion transformer.")
    parser.add_argument("--preset", action="config", help="named settings (or a path): " + ", ".join(presets()))
    parser.add_class_arguments(Config, as_group=False)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    return parser


def presets() -> list[str]:
    """Names of the shipped presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _preset_path(name: str) -> str:
    if name in presets():
        return str(PRESETS / f"{name}.yaml")
    if not os.path.isfile(name):
        raise UserError(f"--preset {name}: no such preset; known are {', '.join(presets())}, or give a YAML file")
    return name


def parse(argv: list[str]) -> Config:
    """Command line to `Config`. A preset is read first wherever it stands; flags override it.

    Raises UserError for an unknown field, a wrong type or an impossible value.
    """
    args = []
    for arg in argv:
        args += arg.split("=", 1) if arg.startswith(("--preset=", "--out=")) else [arg]
    args = ["--resume=true" if arg == "--resume" else arg for arg in args]
    front = _saved_settings(args)
    while "--preset" in args:
        at = args.index("--preset")
        if at + 1 >= len(args):
            raise UserError(f"--preset: name one of {', '.join(presets())}, or a YAML file")
        front += ["--preset", _preset_path(args[at + 1])]
        del args[at : at + 2]
    return _config(_parser().parse(front + args))


def _saved_settings(args: list[str]) -> list[str]:
    """A resumed run needs no more than `--resume --out DIR`: its own config.yaml stands for the preset."""
    if "--resume=true" not in args or "--preset" in args or "--out" not in args[:-1]:
        return []
    path = Path(args[args.index("--out") + 1]) / CONFIG_FILE
    return ["--preset", str(path)] if path.is_file() else []


def load(path: str | Path) -> Config:
    """Read a `config.yaml` that a run wrote. Raises UserError when it is missing or not one."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); give the folder of a fastdit run") from None
    return _config(_parser().parse_values(values))


def _config(values: Namespace) -> Config:
    return Config(**{key: value for key, value in vars(values).items() if key in Config.__dataclass_fields__})


def dump(config: Config) -> str:
    """`Config` as YAML text that `load` reads back to an equal one."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(asdict(config)), sort_keys=False)
