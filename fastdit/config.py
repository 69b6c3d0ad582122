"""Define the settings of a run, as one typed tree. Every run writes its tree beside its results.

A preset (`fastdit/presets/NAME.yaml`, or a path) differs from these defaults only where it must; any field is a
flag (`--lr 2e-4 --model.patch 4`). Parsing, type checks and `--help` are jsonargparse's.
"""

from dataclasses import dataclass, make_dataclass
from typing import Literal

from fastdit.errors import UserError, check_ranges
from fastdit.methods.registry import METHODS, canonical_name, methods_of
from fastdit.models import SIZES, check_fp8_width, check_head_dim
from fastdit.noise import PROCESSES, NoiseProcess
from fastdit.sample_settings import EvalConfig, SampleConfig
from fastdit.wandb_settings import WandbSettings

CONFIG_FILE = "config.yaml"  # in a run's folder


@dataclass(frozen=True)
class DataConfig:
    """Choose the training samples and how they are read.

    Args:
        source: training samples: name of a shipped set (fashion_mnist), folder of class folders, WebDataset shards (a
            tar, a folder of tars, or a pattern `x-{000..099}.tar`), a Hugging Face data set (a parquet or Arrow file,
            a folder of one split, or a pattern 'data/train-*.parquet'), or `synthetic`. With one class, a folder of
            images.
        size: height and width the network sees, in pixels (or latent cells); one number means square.
        channels: channels of an image (1 or 3) or latent.
        classes: number of classes; none reads it from the source.
        labels: folders that are the classes of a tree: the first below the source, or the deepest, which hold images.
            auto is first, and refuses trees whose first folders hold only folders, or are named like splits. none puts
            all samples, of any source, into one class. Or a file of labels: CSV, text, JSON, or a list of paths.
        image_column: column of a Hugging Face data set that holds the images; none takes the only one.
        label_column: its column that holds the class labels, as numbers or text; none takes the only one.
        flip: mirror each sample with probability one half. Latents need the mirrored latent in the shards.
        on_corrupt: an undecodable image stops the run, or is replaced by the next one and counted.
        convert: images with other than `channels` channels are made to fit (gray repeated, color made gray,
            transparency dropped); else they stop the run.
        reader: library that reads files: dali (NVIDIA DALI), torch (its DataLoader with Pillow), or auto (DALI where
            it is installed). Samples, their order and latents are the same; pixels differ by a few levels.
        crop: the way in which images are scaled to cover `size` before the center is cut out: in one bicubic step
            (center), or as ADM's code and reference batches do (adm), by halving first. adm is read by Pillow.
        threads: DALI's CPU threads, or the DataLoader's workers, per rank.
        latent_scale: factor on latents after `latent_shift` is subtracted (SD VAE: 0.18215); one number, or one a
            channel.
        latent_shift: subtracted from latents; a number, or one a channel.
        standardize: factor takes scale and shift as they stand here. channels sets both, for each channel, from the
            statistics in the shards' manifest: mean 0, and the deviation that the noise process is made for (edm:
            its sigma_data; others: 1). A run's config.yaml has the numbers.
        cache: latents are read anew (none), or kept in memory: the device's, or the host's (cpu), shared out among the
            ranks. auto: the device where they fill a tenth of its memory at most, else the host up to a quarter.
            The order is the same.
        autoencoder: decoder of latents into pictures: identity, space_to_depth:K, a folder that diffusers saved
            (AutoencoderKL, AutoencoderTiny), or taef2's pair of files. none: no pictures are drawn of latents.
    """

    source: str = "fashion_mnist"
    size: int | tuple[int, int] = 256
    channels: int = 3
    classes: int | None = None
    labels: str = "auto"
    image_column: str | None = None
    label_column: str | None = None
    flip: bool = True
    on_corrupt: Literal["stop", "skip"] = "stop"
    convert: bool = False
    reader: Literal["auto", "dali", "torch"] = "auto"
    crop: Literal["center", "adm"] = "center"
    threads: int = 2
    latent_scale: float | tuple[float, ...] = 1.0
    latent_shift: float | tuple[float, ...] = 0.0
    standardize: Literal["factor", "channels"] = "factor"
    cache: Literal["auto", "none", "cpu", "device"] = "auto"
    autoencoder: str | None = None

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be."""
        check_ranges(self, "data.", {"size channels classes threads": (1,), "latent_scale": (1e-6,)})
        for name in ("latent_scale", "latent_shift"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != self.channels:
                raise UserError(f"data.{name}: {len(value)} numbers for {self.channels} channels; give one a channel")


@dataclass(frozen=True)
class ModelConfig:
    """Choose the DiT. `size` gives depth, width and heads as published; each may be overridden.

    Args:
        size: S, B, L or XL.
        patch: patch side in pixels (or latent cells).
        depth: number of blocks.
        width: features per token.
        heads: attention heads.
        mlp_ratio: hidden width of the MLP over `width`.
        attention: kernel of `fastdit.kernels.attention`; auto: flash-attn where it can be used, products for short bf16
            sequences on CPUs, else torch's choice.
        grad_checkpoint: what the backward pass recomputes to save memory: nothing (none), or each block from its input
            (blocks). Results are the same. MFU does not count what is recomputed.
        qk_norm: norm of each head's queries and keys, before the rotation: none, or rms (root mean square, with learned
            weights that the heads of a block share).
        rope: rotate queries and keys by the patches' rows and columns (RoPE). The table of positions stays.
        stream: dtype of the residual stream under precision bf16 and fp8. fp32 halves the errors of outputs and
            gradients in deep networks, as torch.autocast does; bf16 moves a seventh fewer bytes outside the matrix
            products. A run may change between both when it resumes.
    """

    size: Literal["S", "B", "L", "XL"] = "S"
    patch: int = 2
    depth: int | None = None
    width: int | None = None
    heads: int | None = None
    mlp_ratio: float = 4.0
    attention: Literal["auto", "flash_attn", "sdpa", "cudnn", "flash", "efficient", "math", "products"] = "auto"
    grad_checkpoint: Literal["none", "blocks"] = "none"
    qk_norm: Literal["none", "rms"] = "none"
    rope: bool = False
    stream: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be."""
        check_ranges(self, "model.", {"patch depth width heads": (1,), "mlp_ratio": (0.01, 100)})
        dims = self.dims()
        width, heads = dims["width"], dims["heads"]
        if width % heads or width % 4:
            raise UserError(f"model.width: {width} must be a multiple of model.heads ({heads}) and of 4; change one")
        if width * self.mlp_ratio < 1:
            raise UserError(f"model.mlp_ratio: {self.mlp_ratio} of model.width ({width}) is no hidden unit; raise one")
        self.check_head_dim(width, heads, "model.")

    def check_head_dim(self, width: int, heads: int, prefix: str) -> None:
        """Raise UserError unless `qk_norm` and `rope` can serve heads of these sizes; prefix: of the sizes' names."""
        check_head_dim(width, heads, self.qk_norm == "rms", self.rope, prefix)

    def dims(self) -> dict[str, int]:
        """Return depth, width and heads after overrides."""
        base = SIZES[self.size]
        return {key: getattr(self, key) or base[key] for key in ("depth", "width", "heads")}


def _noise_fields() -> type:
    """Build a dataclass with a `name`, and for each registered process a field with its settings."""
    *others, last = PROCESSES
    named = ("name", Literal[tuple(PROCESSES)], "edm")
    built = make_dataclass(
        "_NoiseFields", [named, *((name, kind, kind()) for name, kind in PROCESSES.items())], frozen=True
    )
    # jsonargparse takes the headings and texts of --help from the docstring.
    texts = {"name": f"{', '.join(others)} or {last}"} | {name: kind.summary for name, kind in PROCESSES.items()}
    lines = (f"    {name}: {text}." for name, text in texts.items())
    built.__doc__ = "\n".join(["Hold the name of a noise process and the settings of each.", "", "Args:", *lines])
    return built


@dataclass(frozen=True)
class NoiseConfig(_noise_fields()):
    """Choose a noise process by `name`. Only the settings of the chosen process are used."""

    def __post_init__(self) -> None:
        """Raise UserError for a name that is not registered."""
        if self.name not in PROCESSES:
            raise UserError(f"noise.name: unknown process {self.name!r}; choose one of {', '.join(PROCESSES)}")

    @property
    def process(self) -> NoiseProcess:
        """Return the chosen process with its settings."""
        return getattr(self, self.name)


@dataclass(frozen=True)
class EMAConfig:
    """Choose the EMA whose weights are sampled.

    Args:
        kind: law of the decay: `fixed`, with the usual warm-up min(decay, (1+t)/(10+t)); `constant`, the same decay at
            every step, as the original DiT has it; or `power` (Karras et al. 2024, eq. 127: a profile whose width is a
            fixed share of the run, with nothing to warm up).
        decay: decay of `fixed` and `constant`.
        std: relative width of the profile of `power`.
    """

    kind: Literal["fixed", "constant", "power"] = "fixed"
    decay: float = 0.9999
    std: float = 0.1

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be."""
        # A power-function profile cannot be wider than 12^-1/2.
        check_ranges(self, "ema.", {"decay": (0, 1), "std": (0.001, 0.28)})


@dataclass(frozen=True)
class _RunConfig:
    """Hold the settings of a training run, but for those of methods.

    Args:
        out: folder of the run.
        resume: continue from the newest good checkpoint in `out`.
        trust: resume from a checkpoint of an older version, although reading it can run code that somebody put there.
            Only the command line can set it.
        dry_run: build everything, take a few training steps, and print what the run needs of time, memory and disk.
            Nothing is written. Only the command line can set it.
        ds_config: DeepSpeed configuration: zero0, zero1, zero2, zero3, zero3_offload, or a path to a JSON file.
        init_from: start from these weights: official DiT .pt, a folder saved by diffusers, or fastdit's own export.
        init_weights: name of the weights in `init_from`, such as ema, model, or fp16 (a diffusers variant). none: the
            EMA weights where there are some, else the first.
        finetune: carry `init_from` to other data: a new label table, and all weights trained, or diffit's subset
            (biases, label table, a factor on each block: below 1 % of a DiT). none: the same classes, all weights.
        device: hardware: cpu, cuda, or auto (a GPU when there is one).
        precision: arithmetic: bf16 (fp32 master weights), fp8, fp32, or auto (bf16 on GPUs, fp32 on CPUs). fp8 is bf16
            with fp8 products in the blocks' linear layers, except for the weights' gradients. It needs a Hopper GPU or
            a later one, and widths that are multiples of 16. On CPUs it is slow and serves tests.
        steps: optimizer steps of the whole run.
        batch: samples per optimizer step over all ranks; none reads it from the DeepSpeed file.
        micro_batch: samples per rank and forward pass; none takes batch / ranks.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        schedule: after the warm-up: constant, or cosine to zero at `steps`.
        optimizer: implementation of AdamW: fastdit, or apex (FusedAdam of NVIDIA's apex, where that is installed).
        betas: AdamW's decay rates of both moments.
        eps: AdamW's epsilon.
        weight_decay: AdamW's decoupled weight decay.
        grad_clip: largest gradient norm; 0 is off; none reads it from the DeepSpeed file.
        label_drop: probability of training a sample without its label (classifier-free guidance).
        seed: seed of weights, data order and noise.
        cuda_graphs: replay the networks' passes as CUDA graphs. This helps when launching the kernels takes longer than
            running them, with small networks or batches. ZeRO-3 and accumulation exclude it. auto: on a GPU, for
            networks of up to 200 million parameters.
        threads: CPU threads per rank; 0 shares the cores evenly.
        log_every: steps between records; scalars leave the device only then.
        save_every: steps between checkpoints; the last step always has one.
        sample_every: steps between sample grids; 0 draws only at the end.
        keep_checkpoints: how many of the newest checkpoints stay.
        max_nonfinite: steps with a non-finite loss or gradient, each skipped, after which the run stops.
        data: where samples come from.
        model: the network.
        noise: the noise process.
        ema: the EMA weights, which are sampled.
        sample: how pictures are drawn.
        eval: evaluations during the run, of samples that are drawn as `sample` says.
    """

    method: str = "dit"
    out: str = "runs/default"
    resume: bool = False
    trust: bool = False
    dry_run: bool = False
    ds_config: str = "zero1"
    init_from: str | None = None
    init_weights: str | None = None
    finetune: Literal["all", "diffit"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp8", "fp32"] = "auto"
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
    cuda_graphs: bool | Literal["auto"] = "auto"
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


# One field for the settings of each registered method that has some.
_WITH_SETTINGS = {name: method.settings_type for name, method in METHODS.items() if method.settings_type}
_MethodFields = make_dataclass(
    "_MethodFields", [(name, settings, settings()) for name, settings in _WITH_SETTINGS.items()], frozen=True
)
# jsonargparse reads help texts from here.
_MethodFields.__doc__ = "\n    ".join(
    [
        "Hold the settings of each method.\n\nArgs:",
        f"method: what is trained: {'; '.join(f'{name}, {method.summary}' for name, method in METHODS.items())}; "
        "joined by +, several.",
        *(f"{name}: settings of that method." for name in _WITH_SETTINGS),
    ]
)


@dataclass(frozen=True)
class Config(_MethodFields, _RunConfig, WandbSettings):
    """Hold everything that a training run depends on."""

    def uses(self, method: str) -> bool:
        """Return whether the method of this name is part of what is trained."""
        return method in self.method.split("+")

    @property
    def notes(self) -> list[str]:
        """Return lines about settings that are allowed and hardly meant."""
        if self.label_drop == 0 and self.sample.guidance != 1:
            return [
                "note: --label_drop 0 trains no null label, which --sample.guidance "
                f"{self.sample.guidance:g} draws with; train with --label_drop 0.1, or sample with guidance 1"
            ]
        return []

    def __post_init__(self) -> None:
        """Raise UserError for the first setting that cannot be, or does not fit those of another group."""
        # Check the numbers of this group; every other group has checked its own.
        counts = "steps batch micro_batch log_every save_every keep_checkpoints max_nonfinite"
        ranges = {counts: (1,), "warmup lr eps weight_decay grad_clip seed threads sample_every": (0,)}
        check_ranges(self, "", ranges | {"betas": (0, 0.999999), "label_drop": (0, 1)})

        self.check_wandb()

        # Check what depends on two groups.
        if self.finetune and not self.init_from:
            raise UserError("finetune: needs the weights to start from; give --init_from")
        if self.init_weights and not self.init_from:
            raise UserError("init_weights: chooses weights in a file; give --init_from too")
        self._check_size()
        self._check_sampling()
        if self.precision == "fp8":
            width = self.model.dims()["width"]
            check_fp8_width("model.width", width)
            check_fp8_width("model.mlp_ratio x model.width", int(width * self.model.mlp_ratio))

        # A method names what its settings leave open, then checks them against the others.
        object.__setattr__(self, "method", canonical_name(self.method))
        for name in _WITH_SETTINGS:
            object.__setattr__(self, name, METHODS[name].complete(getattr(self, name)))
        for method in methods_of(self.method):
            method.check(self)

    def _check_size(self) -> None:
        """Raise UserError if patches do not tile the samples."""
        size, patch = self.data.size, self.model.patch
        for side in (size,) if isinstance(size, int) else size:
            if side % patch:
                raise UserError(f"data.size: {side} is not a multiple of model.patch ({patch}); change one")

    def _check_sampling(self) -> None:
        """Raise UserError if the sampler does not fit the noise process or the samples."""
        process, settings = self.noise.process, self.sample
        if settings.sampler not in (None, *process.samplers):
            choices = ", ".join(process.samplers)
            raise UserError(f"sample.sampler: {process.name} has no {settings.sampler!r}; choose one of {choices}")
        process.check_sampling_steps(settings.steps)
        guided = settings.guided_channels or 0
        if guided > self.data.channels:
            raise UserError(f"sample.guided_channels: {guided}; data.channels is {self.data.channels}")
