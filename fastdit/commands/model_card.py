"""Write the model card of exported weights: what they are, how they were trained, and code that draws with them."""

from collections.abc import Sequence
from pathlib import Path

from fastdit import run_parts
from fastdit.config import Config
from fastdit.evaluation.open_run import SampledRun
from fastdit.rundir import eval_log
from fastdit.rundir.checkpoint_files import SAMPLED_EMA

MOST_NAMES = 20  # class names that a card lists


def model_card(
    opened: SampledRun, run: Path, names: Sequence[str], weights: str, code: str, notes: Sequence[str]
) -> str:
    """Return the text of a README.md, with the metadata that model hubs read.

    opened: the checkpoint. run: folder of the run. names: class names. weights: as in `sampled_weights`.
    code: Python that draws. notes: lines about what a user should know.

    Raises UserError if the run's eval.json is damaged.
    """
    config, shape = opened.config, opened.shape
    sections = [
        "\n".join(
            [
                "---",
                "# license: name here the license under which you publish these weights",
                f"library_name: {'diffusers' if 'diffusers' in code else 'fastdit'}",
                "pipeline_tag: unconditional-image-generation",
                "tags: [diffusion, dit, class-conditional, fastdit]",
                "---",
            ]
        ),
        f"# {run.resolve().name}",
        "A class-conditional diffusion transformer (DiT), trained with fastdit.",
        "\n".join(f"- {key}: {value}" for key, value in _facts(opened, config, weights).items()),
        f"Classes ({shape.classes}): {_listed(names)}.",
        "## Use",
        f"```python\n{code.rstrip()}\n```",
        "\n".join(f"- {note}" for note in notes),
        _figures(run, opened.step),
        "## License\n\nThe license of these weights is for their publisher to state.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _facts(opened: SampledRun, config: Config, weights: str) -> dict[str, str]:
    """Return what a reader asks first, by name."""
    shape, dims, process = opened.shape, config.model.dims(), run_parts.build_noise(config)
    millions = sum(parameter.numel() for parameter in opened.network.parameters()) / 1e6
    sample, ema = config.sample, config.ema
    size = f"{shape.channels} x {shape.height} x {shape.width}"
    average = f"power EMA, relative width {ema.std}" if ema.kind == "power" else f"EMA of decay {ema.decay}"
    guidance = f"guidance {sample.guidance:g}" if config.label_drop else "no guidance (no null label was trained)"
    return {
        "network": f"depth {dims['depth']}, width {dims['width']}, {dims['heads']} heads, patch {config.model.patch}, "
        f"{millions:.1f} M parameters, {average if weights == SAMPLED_EMA else f'{weights} weights'}",
        "samples": f"{size} ({'latents' if config.data.autoencoder else 'values in [-1, 1]'})",
        "data": Path(config.data.source).name,
        "training": f"{opened.step:,} steps, AdamW, peak learning rate {config.lr:g}, method {config.method}",
        "noise process": f"{process.name} ({process.summary})",
        "sampler": f"{sample.describe_sampler(process)}, {sample.steps} steps, {guidance}",
    }


def _listed(names: Sequence[str]) -> str:
    """Return the first class names in words."""
    return "; ".join(names[:MOST_NAMES]) + ("; ..." if len(names) > MOST_NAMES else "")


def _figures(run: Path, step: int) -> str:
    """Return the newest evaluation of the weights of `step`, or nothing if there is none."""
    records = [record for record in eval_log.read(run) if record["step"] == step]
    if not records:
        return ""
    shown = [f"- {name}: {eval_log.shown(name, figure)}" for name, figure in records[-1]["figures"].items()]
    head = f"## Figures\n\n{records[-1]['n']:,} samples, by fastdit's own evaluation:\n\n"
    return head + "\n".join(shown)
