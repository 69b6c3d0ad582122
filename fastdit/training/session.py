"""Open a training run, new or resumed, on every rank."""

import json
from collections.abc import Sequence
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from fastdit import run_parts
from fastdit.config import CONFIG_FILE, Config
from fastdit.data.sources import check_apart, check_classes
from fastdit.distributed import Runtime
from fastdit.errors import UserError, a_few
from fastdit.files import write_text
from fastdit.kernels import AdamWEMA, ApexAdamEMA, describe_attention, describe_native, describe_optimizer
from fastdit.methods.registry import methods_of
from fastdit.models.dit import Block, keep_biases
from fastdit.parser import dump, flat_settings
from fastdit.rundir.checkpoint_files import newest_good
from fastdit.rundir.facts import start_facts
from fastdit.rundir.metrics_log import Recorder, versions
from fastdit.rundir.report import LiveReport
from fastdit.rundir.run_files import CHECKPOINTS, CLASSES, FACTS, VERSIONS
from fastdit.rundir.wandb_run import WandbRun
from fastdit.training import cuda_graphs
from fastdit.training.deepspeed_config import DeepSpeedConfig, make_deepspeed_config
from fastdit.training.deepspeed_internals import shorten_step_on_one_rank, skip_muon
from fastdit.training.ema import EMA, ema_state
from fastdit.training.ema_replicas import EMAReplicas
from fastdit.training.loop import Run
from fastdit.training.meter import Meter
from fastdit.weights_description import check_class_names, differ, named


class Session:
    """Hold a training run, new or resumed, and the parts that it was built from.

    Attributes:
        config, runtime: the settings and this rank's place.
        source, shape: the training data, and the shape of a sample.
        process: the noise process.
        decoder: the decoder of latents on the device, or None.
        parameters, trained_parameters: the number of parameters, and of those that are trained.
        attention: a description of the attention backend.
        graphs: a description of the CUDA graphs, empty where none were wanted.
        run: the run that the loop trains.
        first_step: the number of finished steps.
    """

    def __init__(self, config: Config, runtime: Runtime, argv: Sequence[str] = ()):
        """Build all parts. With `config.resume`, load the newest undamaged checkpoint. Raises UserError.

        argv: the flags that gave `config`, for the report.
        """
        self.runtime, self.argv = runtime, list(argv)

        # Complete the settings by the DeepSpeed file and the data.
        if config.precision == "fp8":
            _check_fp8(runtime.device)
        settings = make_deepspeed_config(config, runtime.world, runtime.device.type == "cuda")
        if config.cuda_graphs is True:
            cuda_graphs.check(settings, runtime.device)
        for kind in methods_of(config.method):
            kind.check_batch(settings.micro_batch * runtime.world)
        self.source = run_parts.open_data(config)
        check_apart(self.source, Path(config.out), "--out", around=False)
        self.class_names = self.source.class_names
        if config.resume:  # a run that has begun keeps its classes
            self._keep_classes(config)
        else:
            check_classes(self.source, config.data.classes, "data.classes")
            if config.init_from and config.finetune is None:
                check_class_names(config.init_from, self.source.class_names)
        self.config = config = run_parts.standardized(config, self.source)
        self.shape = run_parts.shape_of(config, self.source.classes)
        self.process = run_parts.build_noise(config)
        if self.source.kind == "image" and config.data.autoencoder not in (None, "identity"):
            raise UserError(
                f"data.autoencoder: {config.data.autoencoder} decodes latents, and {self.source.path} holds images; "
                "leave it out, or train on latents"
            )

        # Build the network, its method, the optimizer and the engine.
        self.decoder = run_parts.build_decoder(config, self.shape)
        module, method = run_parts.build_training(config, self.shape, self.decoder)
        if self.decoder:
            self.decoder.to(runtime.device)
        if settings.stage == 3:
            keep_biases(module)
        network = method.sampled_network(module)
        self.parameters = sum(p.numel() for p in module.parameters())
        self.attention = _attention(config.model.attention, runtime.device, settings.precision, network)
        decays = {EMA: config.ema.decay, **method.begin_step(0, config.steps)}
        trained = [p for p in module.parameters() if p.requires_grad]
        self.trained_parameters = sum(p.numel() for p in trained)
        optimizer = make_optimizer(config, settings, runtime.device, trained, decays)
        with skip_muon():
            engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings.merged)
        shorten_step_on_one_rank(engine, optimizer.update if config.optimizer == "fastdit" else None)
        method.to(runtime.device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
        # Record before the loader's threads start, since no thread may allocate during a capture.
        self.graphs = ""
        if cuda_graphs.wanted(config.cuda_graphs, settings, runtime.device, self.parameters):
            parts = method.graphed(engine.module, settings.micro_batch)
            self.graphs = cuda_graphs.record_all(parts, required=config.cuda_graphs is True)

        # Open the data and assemble the run. Nothing of a step draws from torch's global generators. They are seeded so
        # that nothing else depends on their default seeds.
        torch.manual_seed(config.seed)
        loader = run_parts.build_loader(
            config,
            self.source,
            batch=settings.micro_batch,
            rank=runtime.rank,
            world=runtime.world,
            device=runtime.device,
            cache=config.data.cache,
            group=dist.group.WORLD if runtime.world > 1 else None,
        )
        self.run = Run(
            config=config,
            deepspeed=settings,
            runtime=runtime,
            folder=Path(config.out),
            checkpoint_signature=run_parts.checkpoint_signature(config, self.shape),
            engine=engine,
            optimizer=optimizer,
            method=method,
            ema_replicas=[EMAReplicas(engine, name, *lists) for name, lists in method.ema_replicas(module).items()],
            loader=loader,
            meter=Meter(runtime.device, runtime.world),
        )
        self.first_step = self._resume() if config.resume else 0
        if runtime.first:
            if not config.dry_run:
                self._open_folder()
            self.run.say(self._introduction())

    def _keep_classes(self, config: Config) -> None:
        """Keep the names of the run's classes. Raises UserError if those of the data are others."""
        path = Path(config.out) / CLASSES
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # is written anew
            return
        before = tuple(map(str, before)) if isinstance(before, list) else ()
        if differ(before, self.class_names):
            raise UserError(
                f"{path}: the run's classes are {a_few(before)}, and {self.source.path} has "
                f"{a_few(self.class_names)}; give the run's data, or start another run from its weights "
                "(--init_from, --finetune all)"
            )
        if named(before) and len(before) == len(self.class_names):
            self.class_names = before

    def _open_folder(self) -> None:
        """Write the run's settings and versions, and open its metrics."""
        folder = self.run.folder
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / CONFIG_FILE, dump(self.config))
        write_text(folder / CLASSES, json.dumps(self.class_names))
        write_text(folder / VERSIONS, json.dumps(versions(), indent=1))
        facts = start_facts(folder, self.argv, self.first_step, self.runtime.world, self._describe())
        write_text(folder / FACTS, json.dumps(facts, indent=1))
        wandb = WandbRun(folder, self.config, flat_settings(self.config)) if self.config.wandb else None
        self.run.recorder = Recorder(folder, self.first_step, self.config.steps, wandb)
        self.run.report = LiveReport(folder, self.run.say)

    def _describe(self) -> dict[str, str]:
        """Return the lines of the report about what is trained."""
        config, total, trained = self.config, self.parameters, self.trained_parameters
        part = "all trained" if trained == total else f"{trained / 1e6:.2f} M trained ({trained / total:.1%})"
        start = f"{config.init_from}, weights {config.init_weights or 'EMA, else the first'}"
        return {
            "method": f"{config.method}, noise {self.process.name}",
            "parameters": f"{total / 1e6:.1f} M, {part}",
            "initial weights": start if config.init_from else "random",
            "fine-tuning": config.finetune or "none",
            "data": f"{self.source.n:,} samples of {self.source.path}, {self.source.classes:,} classes",
            "seed": str(config.seed),
        }

    def _resume(self) -> int:
        """Load the newest undamaged checkpoint, if there is any. Return the number of finished steps.

        Raises UserError if all checkpoints are damaged or the newest one does not fit.
        """
        run, folder = self.run, self.run.folder / CHECKPOINTS
        say = print if self.runtime.first else (lambda text: None)
        found = self.runtime.decide(lambda: newest_good(folder, say))
        if found is None:
            say(f"{folder}: nothing to resume yet; starting at step 0")
            return 0
        step = run.restore(found)
        say(f"resumed {found}")
        return step

    def _introduction(self) -> str:
        """Return the lines that a run prints when it starts."""
        config, runtime, settings, shape = self.config, self.runtime, self.run.deepspeed, self.shape
        source = f"{self.source.n:,} samples of {self.source.path} as {shape.channels}x{shape.height}x{shape.width}"
        if cached := self.run.loader.held:
            size, device = f"{cached.bytes / 1e9:.3g} GB", cached.views.device.type
            source += f" ({size} {'a rank ' if cached.group else ''}kept on {device})"
        if reading := self.run.loader.reading:
            source += f", {reading}"
        optimizer = "optimizer: apex" if config.optimizer == "apex" else describe_optimizer(runtime.device)
        batch = (
            f"{settings.batch} = {settings.micro_batch} x {settings.accumulation} accumulated x {runtime.world} ranks"
        )
        return "".join(f"{note}\n" for note in self.source.notes) + (
            f"{config.method} on {source}, {shape.classes} classes\n"
            f"{self.parameters / 1e6:.1f} M parameters, {self._arithmetic()}, {self.process.name}; "
            f"{'; '.join(filter(None, (self.attention, self.graphs, describe_native(runtime.device), optimizer)))}\n"
            f"{versions()['device']}, ZeRO-{settings.stage}, batch {batch}\n"
            f"steps {self.first_step} to {config.steps} into {self.run.folder}"
            + (" (a dry run: nothing is written)" if config.dry_run else "")
            + "".join(f"\n{n}" for n in config.notes)
        )

    def _arithmetic(self) -> str:
        """Return a description of the run's arithmetic."""
        if self.config.precision != "fp8":
            return self.run.deepspeed.precision
        slow = " (computed in fp32 on this CPU, slowly)" if self.runtime.device.type == "cpu" else ""
        return f"fp8 products in blocks{slow}, else bf16"

    def ema_network(self) -> nn.Module:
        """Return the sampled network with the EMA weights: unsharded, in eval mode, on the device. A collective."""
        network = run_parts.build_network(self.config, self.shape)
        network.load_state_dict(ema_state(self.run.engine, self.run.sampled_network, "cpu"))
        return network.to(self.runtime.device).eval()

    def close(self) -> None:
        """Stop the loader, close the metrics, and leave the process group."""
        self.run.loader.close()
        if self.run.recorder:
            self.run.recorder.close()
        self.runtime.leave()


def make_optimizer(
    config: Config, settings: DeepSpeedConfig, device: torch.device, parameters: list[nn.Parameter], decays: dict
) -> AdamWEMA:
    """Return AdamW with one EMA of the weights for each name in `decays`, by the kernel that `config.optimizer` names.

    Raises UserError if `config.optimizer` is apex and apex cannot be used here.
    """
    options = {name: getattr(config, name) for name in ("lr", "betas", "eps", "weight_decay")}
    options |= {"emas": decays, "max_norm": settings.clip or None, "sharded": settings.stage > 0}
    if config.optimizer == "fastdit":
        return AdamWEMA(parameters, **options)
    try:
        optimizer = ApexAdamEMA(parameters, **options)
    except ValueError as error:
        raise UserError(f"optimizer: {error}; mend that, or take --optimizer fastdit") from None
    offload = settings.merged.get("zero_optimization", {}).get("offload_optimizer") or {}
    if device.type != "cuda" or offload.get("device", "none") != "none":
        raise UserError("optimizer: apex works on GPUs only, without offload_optimizer; take --optimizer fastdit")
    return optimizer


def _check_fp8(device: torch.device) -> None:
    """Raise UserError if the device has no fp8 products with a scale for each row. A CPU computes them in fp32."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        raise UserError(
            f"precision: fp8 needs a GPU of compute capability 9.0 (Hopper) or later, and {device} has "
            f"{major}.{minor}; take --precision bf16"
        )


def _attention(backend: str, device: torch.device, precision: str, network: nn.Module) -> str:
    """Return a description of the network's attention backend. Raises UserError if `backend` cannot be used."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    sizes = [block.proj.in_features // block.heads for block in network.modules() if isinstance(block, Block)]
    try:
        described = [describe_attention(backend, device, dtype, size) for size in dict.fromkeys(sizes)]
    except ValueError as error:
        raise UserError(f"model.attention: {error}") from None
    return described[0]  # the encoder's, which comes first
