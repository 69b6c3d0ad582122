"""Write a run's network as a folder of diffusers: the transformer, a scheduler, the VAE, and a model card.

DiTPipeline opens the folder if the noise process is DDPM and the latents' autoencoder is one of diffusers'. Otherwise
there is no model_index.json, and the model card has a loop of a few lines that draws with transformer and scheduler.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastdit.config import Config
from fastdit.errors import UserError
from fastdit.evaluation.open_run import SampledRun
from fastdit.files import save_tensors
from fastdit.methods.denoising import Shape
from fastdit.models import (
    FREQ_SHIFT,
    NULL_LABEL,
    DiT,
    LatentDecoder,
    fold_block_scales,
    pipeline_vae,
    to_diffusers,
    transformer_config,
)
from fastdit.noise import DDPM, EDM, Flow, NoiseProcess
from fastdit.weights_description import DIFFUSERS_FILE, describe

from .model_card import model_card

DRAWN_STEPS = 50  # sampler steps in a model card, at least


class Scheduler(NamedTuple):
    """Choose a scheduler of diffusers, and say how a loop uses it.

    kind, settings: name of its class, and the arguments.
    no_pipeline: why DiTPipeline cannot use it, if it cannot.
    steps, start, model_input, time, sign: Python of the loop: the argument of `set_timesteps`, a factor on the noise,
        the network's inputs from x and t, and the sign of its output.
    """

    kind: str
    settings: dict[str, object]
    no_pipeline: str | None = None
    steps: str = "steps"
    start: str = ""
    model_input: str = "x"
    time: str = "t"
    sign: str = ""


def scheduler_for(process: NoiseProcess) -> Scheduler | None:
    """Return the scheduler of diffusers that fits a noise process, or None if there is none."""
    if isinstance(process, DDPM):
        # Diffusers steps by a fixed stride, which fits "leading" timesteps alone. The learned variance is not used.
        settings = {
            "num_train_timesteps": process.steps,
            "beta_start": process.beta_start,
            "beta_end": process.beta_end,
            "beta_schedule": "linear",
            "clip_sample": False,
            "set_alpha_to_one": True,
            "steps_offset": 0,
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
        }
        return Scheduler("DDIMScheduler", settings)
    if isinstance(process, EDM):
        settings = {name: getattr(process, name) for name in ("sigma_min", "sigma_max", "sigma_data", "rho")}
        settings |= {"sigma_schedule": "karras", "prediction_type": "epsilon", "final_sigmas_type": "zero"}
        return Scheduler(
            "EDMEulerScheduler",
            settings,
            "it starts from noise of deviation 1, and this noise process from sigma_max",
            start="scheduler.config.sigma_max * ",
            model_input="scheduler.scale_model_input(x, t)",
        )
    if isinstance(process, Flow):
        time, sign = {"own": ("t", ""), "sit": ("(1 - t / 1000)", "-1 * "), "repa": ("(t / 1000)", "")}[
            process.convention
        ]
        return Scheduler(
            "FlowMatchEulerDiscreteScheduler",
            {"num_train_timesteps": 1000, "shift": 1.0},
            "it calls scale_model_input, which diffusers' schedulers of flow matching lack",
            steps="sigmas=torch.linspace(1, 1 / steps, steps).tolist()",
            time=time,
            sign=sign,
        )
    return None


class DiffusersExport:
    """Hold what is written for a run, and the reasons for what is not."""

    def __init__(self, config: Config, network: DiT, decoder: LatentDecoder | None) -> None:
        """Find out what can be written. Raises UserError if the transformer cannot, or if diffusers is not installed.

        network: the run's network, on any device, with or without weights.
        """
        try:
            import diffusers
        except ImportError:
            raise UserError(
                "--format diffusers: diffusers is not installed; pip install 'fastdit[autoencoder]'"
            ) from None
        self.diffusers, self.config = diffusers, config
        transformer_config(network)  # which refuses what diffusers' class cannot compute
        self.scheduler = scheduler_for(config.noise.process)
        self.vae, self.reason = self._find_vae(decoder)

    def _find_vae(self, decoder: LatentDecoder | None) -> tuple[nn.Module | None, str | None]:
        """Return the VAE, if there is one, and the reason why DiTPipeline cannot be used, if it cannot."""
        if self.scheduler is None:
            return None, f"diffusers has no scheduler for the noise process {self.config.noise.name}"
        vae, reason = None, None
        if decoder is None:
            reason = "it decodes latents, and this run has no autoencoder"
        else:
            try:
                vae = pipeline_vae(decoder)
            except UserError as error:
                reason = f"it needs a VAE, and {error}"
        return vae, self.scheduler.no_pipeline or reason

    def write(
        self, folder: Path, opened: SampledRun, run: Path, names: Sequence[str], weights: str, title: str
    ) -> list[str]:
        """Write the parts into the empty `folder`, and the model card with code that names it `title`.

        opened: the checkpoint. names: the class names. weights: their name, for the card.

        Returns what a user should know of the folder, in lines.
        """
        # Build diffusers' class, whose settings depend on the number of classes.
        shape, reason = opened.shape, self.reason
        if shape.classes > NULL_LABEL:
            reason = reason or f"it guides with label {NULL_LABEL}, which is one of this run's classes"
        with torch.device("meta"):
            model = self.diffusers.DiTTransformer2DModel(**transformer_config(opened.network))

        # Write the transformer, with the description by which fastdit knows it again.
        state = fold_block_scales(opened.network.state_dict())
        freq_shift = int(state["time_embed.freq_shift"])
        converted = to_diffusers(state)
        model.load_state_dict(converted, assign=True)  # which compares names and shapes
        transformer = folder / "transformer"
        model.save_config(transformer)
        metadata = {"format": "pt", FREQ_SHIFT: str(freq_shift), **describe(self.config, shape, names)}
        save_tensors(converted, transformer / DIFFUSERS_FILE, metadata=metadata)

        # Write the scheduler, the VAE, and what makes them a pipeline.
        parts = {"transformer": model}
        if self.scheduler:
            parts["scheduler"] = getattr(self.diffusers, self.scheduler.kind)(**self.scheduler.settings)
            parts["scheduler"].save_pretrained(folder / "scheduler")
        if self.vae is not None:
            parts["vae"] = self.vae
            self.vae.save_pretrained(folder / "vae")
        if reason is None:
            index = {"_class_name": "DiTPipeline", "_diffusers_version": self.diffusers.__version__}
            index |= {name: ["diffusers", type(part).__name__] for name, part in sorted(parts.items())}
            index["id2label"] = {str(label): name for label, name in enumerate(names)}
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

        # Write the card.
        notes = self._notes(reason, list(parts), freq_shift)
        code = self._code(title, shape, freq_shift, reason is None)
        card = model_card(opened, run, names, weights, code, notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return notes

    @staticmethod
    def _notes(reason: str | None, parts: Sequence[str], freq_shift: int) -> list[str]:
        """Return what a user should know of a folder with `parts`, which DiTPipeline cannot open for `reason`."""
        notes = []
        if reason:
            notes.append(f"DiTPipeline cannot draw with it: {reason}. The folder has {', '.join(parts)}.")
        if freq_shift == 0:
            notes.append(
                "Set downscale_freq_shift to 0 as in the code: the network was trained with the original DiT's time "
                "frequencies. Diffusers' class has others, with which it draws similar pictures, not the same."
            )
        return notes

    def _code(self, title: str, shape: Shape, freq_shift: int, pipeline: bool) -> str:
        """Return Python that draws samples of two classes, with DiTPipeline or without."""
        sample = self.config.sample
        guidance = sample.guidance if self.config.label_drop else 1.0
        steps = min(max(sample.steps, DRAWN_STEPS), getattr(self.config.noise.process, "steps", sample.steps + 1000))
        labels = list(range(min(2, shape.classes)))
        device = 'device = "cuda" if torch.cuda.is_available() else "cpu"'
        device = f'# "{title}" is this folder: run this beside it, or give its path.\n{device}'
        if pipeline:
            lines = [
                "import torch",
                "from diffusers import DiTPipeline",
                "",
                device,
                f'pipeline = DiTPipeline.from_pretrained("{title}").to(device)',
                *_frequencies("pipeline.transformer", freq_shift),
                f"images = pipeline({labels}, guidance_scale={guidance:g}, num_inference_steps={steps},",
                "                  generator=torch.Generator(device).manual_seed(0)).images",
                "# pipeline.labels has the labels of all class names",
            ]
            return "\n".join(lines)
        if self.scheduler is None:
            lines = [
                "from diffusers import DiTTransformer2DModel",
                "",
                f'transformer = DiTTransformer2DModel.from_pretrained("{title}", subfolder="transformer")',
                *_frequencies("transformer", freq_shift),
            ]
            return "\n".join(lines)
        return "\n".join(self._loop(title, shape, labels, guidance, steps, device, freq_shift))

    def _loop(
        self, title: str, shape: Shape, labels: list[int], guidance: float, steps: int, device: str, shift: int
    ) -> list[str]:
        """Return the lines of a sampling loop."""
        how = self.scheduler
        vae = type(self.vae).__name__ if self.vae is not None else None
        kinds = ", ".join(sorted(filter(None, [vae, "DiTTransformer2DModel", how.kind])))
        size = f"{shape.channels}, {shape.height}, {shape.width}"
        opened = f'from_pretrained("{title}", subfolder='
        lines = [
            "import torch",
            f"from diffusers import {kinds}",
            "",
            device,
            f'transformer = DiTTransformer2DModel.{opened}"transformer").to(device).eval()',
            f'scheduler = {how.kind}.{opened}"scheduler")',
            *([f'vae = {vae}.{opened}"vae").to(device).eval()'] if vae else []),
            *_frequencies("transformer", shift),
            f"guidance, steps, labels = {guidance:g}, {steps}, torch.tensor({labels}, device=device)",
            "null = torch.full_like(labels, transformer.config.num_embeds_ada_norm)",
            f"noise = torch.randn(len(labels), {size}, generator=torch.manual_seed(0)).to(device)",
            f"scheduler.set_timesteps({how.steps})",
            f"x = {how.start}noise",
            "with torch.no_grad():",
            "    for t in scheduler.timesteps:",
            f"        inputs = torch.cat(2 * [{how.model_input}])",
            f"        time = {how.time}.expand(len(inputs)).to(device)",
            "        out = transformer(inputs, timestep=time, class_labels=torch.cat([labels, null])).sample",
            f"        conditional, unconditional = ({how.sign}out[:, :{shape.channels}]).chunk(2)",
            "        guided = unconditional + guidance * (conditional - unconditional)",
            "        x = scheduler.step(guided, t, x).prev_sample",
            *(["    x = vae.decode(x / vae.config.scaling_factor).sample"] if vae else []),
        ]
        if vae or shape.channels in (1, 3):
            return [*lines, "images = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()  # (n, channels, height, width)"]
        return [*lines, "# x holds latents, (z - data.latent_shift) * data.latent_scale of the autoencoder's z"]


def _frequencies(transformer: str, freq_shift: int) -> list[str]:
    """Return the lines that give diffusers' class the time frequencies of the weights, if it has others."""
    if freq_shift == 1:
        return []
    return [
        f"for block in {transformer}.transformer_blocks:  # the original DiT's time frequencies",
        f"    block.norm1.emb.time_proj.downscale_freq_shift = {freq_shift}",
    ]
