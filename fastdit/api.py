"""Use fastdit from Python: open runs and files of weights, draw samples, and evaluate. `import fastdit` has its names.

    import fastdit

    run = fastdit.load("runs/quickstart")
    images = run.sample(classes=["Coat"], n=8, guidance=2.0, seed=0)  # uint8 (8, 28, 28, 1)

Every mistake of a user raises `fastdit.UserError`, whose text is one line.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from fastdit import run_parts
from fastdit.config import CONFIG_FILE, Config, EvalConfig, SampleConfig
from fastdit.distributed import Runtime, choose_device
from fastdit.errors import UserError
from fastdit.evaluation.model import Model, one_of, whole
from fastdit.evaluation.open_run import (
    SAMPLER_FLAGS,
    class_names,
    names_or_numbers,
    open_checkpoint,
    sampling_config,
)
from fastdit.methods.denoising import Shape
from fastdit.models import LatentDecoder, open_autoencoder, open_network
from fastdit.noise import DDPM, PROCESSES, Flow, NoiseProcess
from fastdit.parser import load as load_settings
from fastdit.rundir import eval_log
from fastdit.rundir.checkpoint_files import SAMPLED_EMA, choose, manifest
from fastdit.rundir.metrics_log import read_metrics
from fastdit.rundir.run_files import CHECKPOINTS
from fastdit.weights_description import check_process, read_description

# Noise processes by name: those of `--noise.name`, and the conventions of flow that published weights have.
NOISES: dict[str, NoiseProcess] = {name: process() for name, process in PROCESSES.items()}
NOISES |= {convention: Flow(convention=convention) for convention in ("sit", "repa")}


class Run(Model):
    """Hold one checkpoint of a training run. It has the attributes of `Model`, and these:

    Attributes:
        path: folder of the run.
        config: settings of the run, as its config.yaml has them.
        checkpoint: folder of the checkpoint.
        step: number of steps that the weights were trained for.
        weights: ema, raw, or another EMA's name.
    """

    def __init__(
        self,
        path: Path,
        config: Config,
        checkpoint: Path,
        weights: str,
        device: torch.device,
        autoencoder: str | None,
    ) -> None:
        """Read the weights of a checkpoint that `choose` has found undamaged; see `load`. Raises UserError."""
        self._sampled = sampling_config(config, {}, autoencoder)
        opened = open_checkpoint(path, self._sampled, checkpoint, weights)
        super().__init__(
            opened.network,
            run_parts.build_noise(config),
            opened.shape,
            class_names(path, config, opened.shape.classes),
            device,
            config.sample,
            str(path),
        )
        self.path, self.config, self.checkpoint, self.weights = path, config, checkpoint, weights
        self.step = manifest(checkpoint)["step"]

    def metrics(self) -> list[dict[str, float | None]]:
        """Return the lines of metrics.jsonl: for each record the step and the figures by name. Raises UserError."""
        return read_metrics(self.path)

    def evaluations(self) -> list[dict]:
        """Return the records in eval.json, oldest first: figures, and what they depend on. Raises UserError."""
        return eval_log.read(self.path)

    def evaluate(
        self,
        n: int = EvalConfig.n,
        *,
        data: str | Path | None = None,
        n_real: int | None = None,
        labels: str = EvalConfig.labels,
        features: str = EvalConfig.features,
        feature_weights: str | Path | None = None,
        seed: int = 0,
        progress: bool = False,
        **settings,
    ) -> dict[str, dict[str, float]]:
        """Compare samples with real images, and return the figures by name, such as "FD-lite0" or "class agreement".

        A figure is a dict with its `value`, and with its `std` and its `floor` where they exist. With equal settings,
        figures are those of `fastdit/evaluate.py`. That command also adds them to the run's files, and can share the
        work among several GPUs.

        Args:
            n: number of samples.
            data: real images, as `--data` of that command; None takes the run's.
            n_real: number of real images; None takes all.
            labels: class labels of the samples, balanced or random.
            features: feature network, lite0 or inception.
            feature_weights: file of its weights; None takes the packaged or the cached file.
            seed: seed of the noise and of random labels.
            progress: whether to show progress bars.
            settings: those of the sampler, as `sample` has them.

        Raises UserError if a value is impossible, or if anything that an evaluation needs is missing.
        """
        from fastdit.evaluation.evaluator import Evaluator

        if unknown := sorted(settings.keys() - set(SAMPLER_FLAGS)):
            raise UserError(f"{unknown[0]}: no such setting of a sampler")
        chosen = EvalConfig(
            n=whole("n", n),
            data=None if data is None else str(data),
            n_real=None if n_real is None else whole("n_real", n_real),
            labels=one_of(EvalConfig, "labels", labels),
            features=one_of(EvalConfig, "features", features),
            weights=None if feature_weights is None else str(feature_weights),
            seed=whole("seed", seed),
        )
        sampler = self.choose(settings)
        config = replace(self._sampled, eval=chosen, sample=sampler)
        alone = Runtime(rank=0, world=1, local_rank=0, device=self.device)
        evaluator = Evaluator(config, self.shape, alone, decoder=self.decoder, live=progress)
        return evaluator(self._prepared(sampler), self.step, str(self.checkpoint))["figures"]

    def _build_decoder(self) -> LatentDecoder | None:
        return run_parts.build_decoder(self._sampled, self.shape)


class Pretrained(Model):
    """Hold a network from a file of weights; see `from_pretrained`.

    It has the attributes of `Model`, and `scale` and `shift`: the network's latents are (z - shift) * scale of the
    autoencoder's z. None is the autoencoder's own, with which its makers train.
    """

    scale: float | Sequence[float] | None = None
    shift: float | Sequence[float] | None = None
    autoencoder: str | None = None

    def _build_decoder(self) -> LatentDecoder | None:
        if self.autoencoder is None:
            return None
        autoencoder = open_autoencoder(self.autoencoder)
        scale = autoencoder.scale if self.scale is None else self.scale
        shift = autoencoder.shift if self.shift is None else self.shift
        if autoencoder.channels != self.shape.channels:
            raise UserError(
                f"autoencoder: latents of {self.autoencoder} have {autoencoder.channels} channels, those of "
                f"{self._name} {self.shape.channels}; give the autoencoder that the latents were made with"
            )
        return LatentDecoder(autoencoder, scale=scale, shift=shift)


def load(
    run: str | Path,
    *,
    checkpoint: str | Path | int | None = None,
    weights: str = SAMPLED_EMA,
    device: str | torch.device = "auto",
    autoencoder: str | Path | None = None,
) -> Run:
    """Open a finished or running run, and return it at one of its checkpoints.

    Args:
        run: folder of the run.
        checkpoint: folder of a checkpoint, or its step; None takes the newest undamaged one.
        weights: the EMA weights (ema), those that are trained (raw), or another EMA's name.
        device: auto (a GPU if there is one), cpu, cuda, or any other name that torch knows.
        autoencoder: decoder of latents; None takes the run's.

    Raises UserError if there is no such run or checkpoint, or if the device cannot be used.
    """
    run, place = Path(run), choose_device(str(device))
    config = load_settings(run / CONFIG_FILE)
    if isinstance(checkpoint, int | np.integer):
        checkpoint = run / CHECKPOINTS / f"step-{checkpoint:08d}"
    chosen = choose(run, None if checkpoint is None else str(checkpoint))
    return Run(run, config, chosen, weights, place, None if autoencoder is None else str(autoencoder))


def from_pretrained(
    path: str | Path,
    *,
    noise: NoiseProcess | str | None = None,
    weights: str | None = None,
    heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    autoencoder: str | Path | None = None,
    device: str | torch.device = "auto",
) -> Pretrained:
    """Return the network in a file of weights: fastdit's export, an original DiT's .pt, or a folder of diffusers.

    Everything that a file tells is read from it. fastdit's .safetensors tells all, so that `sample` works at once.

    Args:
        path: file, or folder.
        noise: the noise process that it was trained for, as a name or an object of `fastdit.noise`; None takes the
            file's, or that of a pipeline's scheduler. It is needed for sampling alone.
        weights: name of the weights to take from a file that holds several; None takes the EMA weights if it has some.
        heads: number of attention heads; None takes the file's, or the published size's.
        size: side, or (height, width), of a sample as the network sees it; None takes the file's.
        autoencoder: decoder of latents, as `--data.autoencoder` of a run; None takes a pipeline's VAE.
        device: as in `load`.

    Raises UserError if the file cannot be read, is no plain DiT, or lacks what is needed and not given, or if its noise
    process is another one than `noise`.
    """
    # Read what the file tells of itself, and open the network.
    path, place = Path(path), choose_device(str(device))
    asked = _process(noise)
    told = read_description(path) or {}
    found = _told_process(told.get("noise") or _scheduler_process(path), asked, path)

    def check_noise(trained: dict | None) -> bool:
        nonlocal found
        found = found or _told_process(trained, asked, path) or asked
        return found is not None and found.spare_outputs

    network = open_network(
        path,
        weights=weights,
        heads=heads or told.get("model", {}).get("heads"),
        size=(size, size) if isinstance(size, int) else tuple(size or told.get("size") or ()) or None,
        classes=told.get("classes"),
        check_noise=check_noise,
    )

    if found is not None and network.out_channels != (outputs := found.out_channels(network.channels)):
        raise UserError(
            f"{path}: has {network.out_channels} outputs, and the noise process {found.name} has {outputs}; give "
            f"another one of {_names()}"
        )

    # Hold it with its classes and its latents' scale.
    shape = Shape(network.channels, *network.input_size, network.classes)
    names = names_or_numbers(told.get("class_names", ()), shape.classes)
    settings = SampleConfig(steps=250) if isinstance(found, DDPM) else SampleConfig()  # as the original DiT draws
    model = Pretrained(network, found, shape, names, place, settings, str(path), network.null_class)
    if autoencoder is not None:
        model.scale, model.shift = told.get("latent_scale"), told.get("latent_shift")
        model.autoencoder = str(autoencoder)
    elif (path / "vae" / "config.json").is_file():
        model.shift, model.autoencoder = 0.0, str(path / "vae")  # DiTPipeline knows no shift
    return model


def _scheduler_process(path: Path) -> dict | None:
    """Return the noise process that the scheduler in a pipeline's folder states, if it is DDPM's, or None."""
    try:
        config = json.loads((path / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        linear = config["beta_schedule"] == "linear" and config.get("trained_betas") is None
        if not linear or config.get("prediction_type", "epsilon") != "epsilon":
            return None
        steps, start, end = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
        return {"name": "ddpm", "steps": int(steps), "beta_start": float(start), "beta_end": float(end)}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def _process(noise: NoiseProcess | str | None) -> NoiseProcess | None:
    """Return the noise process of that name, or the one that is given. Raises UserError for an unknown name."""
    if not isinstance(noise, str):
        return noise
    if noise not in NOISES:
        raise UserError(f"noise: unknown process {noise!r}; choose one of {_names()}")
    return NOISES[noise]


def _told_process(trained: dict | None, asked: NoiseProcess | None, path: Path) -> NoiseProcess | None:
    """Return the noise process that a file states, None if it states none. Raises UserError if `asked` contradicts."""
    if trained is None:
        return None
    if asked is not None:
        check_process(asked, trained, path)
        return asked
    kind = PROCESSES.get(str(trained.get("name")))
    if kind is None:
        raise UserError(f"{path}: its noise process {trained.get('name')} is not known here; update fastdit")
    try:
        return kind(**{field.name: trained[field.name] for field in fields(kind) if field.name in trained})
    except TypeError:
        raise UserError(
            f"{path}: its noise process has settings that fastdit does not write; export it again"
        ) from None


def _names() -> str:
    return ", ".join(NOISES)
