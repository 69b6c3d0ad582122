"""One typed tree of settings: what every run reads, and what it writes beside its results.

A preset (`fastdit/presets/NAME.yaml`, or a path) differs from these defaults only where it must; any field is a
flag (`--lr 2e-4 --model.patch 4`). Parsing, type checks and `--help` are jsonargparse's.
"""

import os
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import yaml
from jsonargparse import Namespace

from fastdit.command_line import OneLineParser
from fastdit.config_checks import check
from fastdit.errors import UserError
from fastdit.methods.psi_alignment import PsiAlign
from fastdit.methods.self_discrimination import SDDiT
from fastdit.methods.structure_game import SADM
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
        convert: images with other than `channels` channels are made to fit (grey repeated, colour made grey,
            transparency dropped); else they stop the run.
        reader: library that reads files: dali (NVIDIA DALI), torch (its DataLoader with Pillow), or auto (DALI where
            it is installed). Samples, their order and latents are the same; pixels differ by a few levels.
        threads: DALI's CPU threads, or the DataLoader's workers, per rank.
        latent_scale: factor on latents after `latent_shift` is subtracted (SD VAE: 0.18215); one number, or one a
            channel.
        latent_shift: subtracted from latents; a number, or one a channel.
        standardise: factor takes scale and shift as they stand here. channels sets both, for each channel, from the
            statistics in the shards' manifest: mean 0, and the deviation that the noise process is made for (edm:
            its sigma_data; others: 1). A run's config.yaml has the numbers.
        cache: latents are read anew (none), or kept in memory: the device's, or the host's (cpu), shared out among the
            ranks. auto: the device where they fill a tenth of its memory at most, else the host up to a quarter.
            The order is the same.
        autoencoder: what decodes latents into pictures: identity, space_to_depth:K, a folder that diffusers saved
            (AutoencoderKL, AutoencoderTiny), or taef2's pair of files. none: no pictures are drawn of latents.
    """

    source: str = "fashion_mnist"
    size: int | tuple[int, int] = 256
    channels: int = 3
    classes: int | None = None
    flip: bool = True
    on_corrupt: Literal["stop", "skip"] = "stop"
    convert: bool = False
    reader: Literal["auto", "dali", "torch"] = "auto"
    threads: int = 2
    latent_scale: float | tuple[float, ...] = 1.0
    latent_shift: float | tuple[float, ...] = 0.0
    standardise: Literal["factor", "channels"] = "factor"
    cache: Literal["auto", "none", "cpu", "device"] = "auto"
    autoencoder: str | None = None


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
        attention: kernel of `fastdit.kernels.attention`; auto: flash-attn where it can be used, else torch's choice.
    """

    size: Literal["S", "B", "L", "XL"] = "S"
    patch: int = 2
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    attention: Literal["auto", "flash_attn", "sdpa", "cudnn", "flash", "efficient", "math"] = "auto"

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
        agreement: samples for the class-agreement figure at the end (a k-NN on the training images, so not for
            latents); 0 is off.
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
class EvalConfig:
    """Figures of the averaged weights: Frechet and kernel distance, precision and recall, class agreement.

    Args:
        every: steps between evaluations, the last step has one too; 0 is off. Its time is not counted as training.
        n: samples drawn.
        n_real: images of the data, chosen at random but always the same; none takes all.
        data: reference: a source as in data.source, or statistics of the ADM evaluator (.npz); none: the training data.
        labels: of the samples: balanced (counts differ by at most one) or random (uniform).
        features: network: lite0 (packaged; gives FD-lite0) or inception (gives FID; weights are yours).
        weights: file of the network's weights; none: the packaged ones, or those in torch's cache.
        seed: of noise and random labels; sample i depends on it and on i alone.
    """

    every: int = 0
    n: int = 10_000
    n_real: int | None = None
    data: str | None = None
    labels: Literal["balanced", "random"] = "balanced"
    features: Literal["lite0", "inception"] = "lite0"
    weights: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Config:
    """Everything a training run depends on.

    Args:
        method: what is trained: dit, the plain denoising loss; sd_dit, self-supervised discrimination beside it; sadm,
            the structure game; psi_align, alignment with an encoder that knows the classes; joined by +, both.
        out: folder of the run.
        resume: go on from the newest good checkpoint in `out`.
        ds_config: DeepSpeed configuration: zero0, zero1, zero2, zero3, zero3_offload, or a path to a JSON file.
        init_from: start from these weights: official DiT .pt, a folder saved by diffusers, or fastdit's own export.
        finetune: carry `init_from` to other data: a new label table, and all weights trained, or diffit's subset
            (biases, label table, a factor on each block: below 1 % of a DiT). none: the same classes, all weights.
        device: cpu, cuda, or auto (a GPU when there is one).
        precision: bf16 (fp32 master weights), fp32, or auto (bf16 on GPUs, fp32 on CPUs).
        steps: optimizer steps of the whole run.
        batch: samples per optimizer step over all ranks; none reads it from the DeepSpeed file.
        micro_batch: samples per rank and forward pass; none takes batch / ranks.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: after the warm-up: constant, or cosine to zero at `steps`.
        optimizer: who does AdamW's arithmetic: fastdit, or apex (FusedAdam of NVIDIA's apex, where that is installed).
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's, decoupled.
        grad_clip: largest gradient norm; 0 is off; none reads it from the DeepSpeed file.
        label_drop: probability of training a sample without its label (classifier-free guidance).
        seed: of weights, data order, noise.
        cuda_graphs: replay the networks' passes as CUDA graphs, for small networks or batches, whose kernels take the
            GPU less than their launches the host. Not with ZeRO-3, nor with accumulation.
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
        eval: figures on the way, drawn as `sample` says.
        sd_dit: settings of that method.
        sadm: settings of that method.
        psi_align: settings of that method.
    """

    method: Literal["dit", "sd_dit", "sadm", "sd_dit+sadm", "psi_align", "psi_align+sadm"] = "dit"
    out: str = "runs/default"
    resume: bool = False
    ds_config: str = "zero1"
    init_from: str | None = None
    finetune: Literal["all", "diffit"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    steps: int = 400_000
    batch: int | None = None
    micro_batch: int | None = None
    lr: float = 1e-4
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    optimizer: Literal["fastdit", "apex"] = "fastdit"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = None
    label_drop: float = 0.1
    seed: int = 0
    cuda_graphs: bool = False
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
    eval: EvalConfig = EvalConfig()
    sd_dit: SDDiT = SDDiT()
    sadm: SADM = SADM()
    psi_align: PsiAlign = PsiAlign()

    def uses(self, method: str) -> bool:
        """Whether `method`, sd_dit, sadm or psi_align, is part of what is trained."""
        return method in self.method.split("+")

    @property
    def shares_psi(self) -> bool:
        """Whether psi_align takes its Psi from SADM."""
        both = self.uses("psi_align") and self.uses("sadm")
        return both and self.sadm.psi == "latent_resnet" and self.sadm.structure != "off"

    def __post_init__(self):
        # The run's config.yaml names the decoder.
        object.__setattr__(self, "sd_dit", replace(self.sd_dit, decoder=self.sd_dit.named_decoder))
        check(self)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="fastdit-train", description="Train a diffusion transformer.")
    parser.add_argument("--preset", type=str, help="named settings (or a path): " + ", ".join(presets()))
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
    for arg, after in zip(argv, [*argv[1:], None]):
        if arg == "--resume" and after not in ("true", "false"):
            args += ["--resume", "true"]
        else:
            args += arg.split("=", 1) if arg.startswith(("--preset=", "--out=", "--resume=")) else [arg]
    files = _saved_settings(args)
    while "--preset" in args:
        at = args.index("--preset")
        if at + 1 >= len(args):
            raise UserError(f"--preset: name one of {', '.join(presets())}, or a YAML file")
        files.append(_preset_path(args[at + 1]))
        del args[at : at + 2]
    parser, base = _parser(), None
    for file in files:
        base = parser.read(file, base)
    return _config(parser.parse(args, base))


def _saved_settings(args: list[str]) -> list[str]:
    """A resumed run needs no more than `--resume --out DIR`: its own config.yaml stands for the preset."""
    given = dict(pairwise(args))
    path = Path(given.get("--out", Config.out)) / CONFIG_FILE
    return [str(path)] if given.get("--resume") == "true" and "--preset" not in args and path.is_file() else []


def load(path: str | Path) -> Config:
    """Read a `config.yaml` that a run wrote. Raises UserError when it is missing or not one."""
    parser = _parser()
    return _config(parser.parse([], parser.read(path)))


def _config(values: Namespace) -> Config:
    return Config(**{key: value for key, value in vars(values).items() if key in Config.__dataclass_fields__})


def dump(config: Config) -> str:
    """`Config` as YAML text that `load` reads back to an equal one."""

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(asdict(config)), sort_keys=False)
