"""Write sample grids during training, and the final grid, class agreement and report at its end."""

import math
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastdit import run_parts
from fastdit.data.order import FixedOrder
from fastdit.errors import UserError
from fastdit.evaluation import class_agreement, draw_samples
from fastdit.evaluation.next_commands import next_commands, picture_hint
from fastdit.files import write_atomically, writing
from fastdit.parser import flat_settings
from fastdit.rundir import eval_log
from fastdit.rundir.facts import read_texts
from fastdit.rundir.metrics_log import read_metrics
from fastdit.rundir.run_files import FACTS, GRID, REAL, grid_file
from fastdit.training.session import Session

LAST_LINES = 5  # of the metrics, whose median loss is compared with the first
FAR_ABOVE = 10.0  # times the first loss: no run that learns ends there


def write_grid(session: Session, step: int) -> None:
    """Write a grid of samples of the EMA weights to samples/step-N.png, TensorBoard and W&B. A collective.

    The grid has one row for each class. Before the first, training images in the same order are written to real.png.
    Nothing is written if samples are latents and the run has no autoencoder.
    """
    if not _can_show(session):
        return
    classes = _shown_classes(session)
    samples = _samples(session, session.config.sample.per_class * len(classes), classes)
    if samples:
        picture = draw_samples.grid(*samples, session.source.class_names)
        path = grid_file(session.run.folder, step)
        with writing(path):
            path.parent.mkdir(exist_ok=True)
        _save(picture, path)
        session.run.recorder.image(step, np.asarray(picture))
        _write_real_grid(session)


def _save(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG. It is whole whenever it is there."""
    with write_atomically(path) as temporary:
        picture.save(temporary, format="png")


def finish(session: Session) -> None:
    """Write the final grid and the report, and print class agreement, paths and the next commands. A collective."""
    # Draw samples for the grid and for class agreement.
    run, settings, figures, share = session.run, session.config.sample, {}, None
    if _can_show(session):
        classes = _shown_classes(session)
        on_grid = settings.per_class * len(classes)
        samples = _samples(session, max(on_grid, settings.agreement), classes)
        if samples:
            images, labels = samples
            picture = draw_samples.grid(images[:on_grid], labels[:on_grid], session.source.class_names)
            _save(picture, run.folder / GRID)
            run.recorder.image(session.config.steps, np.asarray(picture))
            _write_real_grid(session)
            if (n := settings.agreement) and session.source.kind != "latent" and session.shape.classes > 1:
                known = class_agreement.known_images(session.config, session.source)
                share = class_agreement.agreement(images[:n], labels[:n], known)
                figures["class agreement"] = f"{share:.1%} of {n} samples (5-NN on raw pixels of the training images)"

    # Write the report, and print the last lines.
    if session.runtime.first:
        final = _final_figures(run.folder) | ({"class agreement": share} if share is not None else {})
        run.recorder.summarize(run.config.steps, flat_settings(run.config), final)
        report = run.report.finish(figures | _facts(session))
        run.say(_farewell(session, report, figures))
        if run.meter.skipped:
            run.say(run.describe_skipped(run.config.steps))
        if fault := describe_divergence(read_metrics(run.folder)):
            run.say(f"warning: {fault}, so the weights are of no use; train again with a lower --lr")
    session.runtime.barrier()


def _final_figures(folder: Path) -> dict[str, float]:
    """Return the figures by which finished runs are compared: of the last metrics and the last evaluation."""
    lines = [line for line in read_metrics(folder) if "loss" in line]
    last = lines[-1] if lines else {}
    names = ("loss", "images_per_sec", "mfu", "memory_gb", "seconds")
    found = {name: last[name] for name in names if last.get(name) is not None}
    evaluated = [record for record in eval_log.read(folder) if not record["checkpoint"]]
    return found | (eval_log.scalars(evaluated[-1]) if evaluated else {})


def _write_real_grid(session: Session) -> None:
    """Write the first training images of each class to real.png, laid out as the sample grid, on rank 0.

    It is written once, and also to TensorBoard and W&B. Where images cannot be read, nothing is written: training meets
    them too, and tells.
    """
    # Choose the images.
    run, config, source = session.run, session.config, session.source
    path = run.folder / REAL
    if path.exists():
        return
    rows = [np.flatnonzero(source.labels == label)[: config.sample.per_class] for label in _shown_classes(session)]
    ids = np.concatenate(rows)
    if not len(ids):
        return

    # Read them as the network sees them, not mirrored.
    cpu = torch.device("cpu")
    loader = run_parts.build_loader(config, source, batch=len(ids), rank=0, world=1, device=cpu, flip=False)
    loader.order = FixedOrder(source.n, len(ids), flip=False, ids=tuple(ids.tolist()))
    try:
        x, labels = next(loader)
    except UserError:
        return
    finally:
        loader.close()
    if session.decoder is not None:
        parts = x.split(draw_samples.BATCH[session.runtime.device.type])
        x = torch.cat([session.decoder(part.to(session.runtime.device)).cpu() for part in parts])
    picture = draw_samples.grid(draw_samples.to_uint8(x), labels.numpy(), source.class_names)
    _save(picture, path)
    run.recorder.image(0, np.asarray(picture), "training images")


def describe_divergence(metrics: list[dict]) -> str | None:
    """Return why a run's metrics show that it diverged, or None if they do not.

    The first loss is that of a network whose last layer is zero, which later ones stay below. A single micro-batch may
    have a loss of several times that, so the median of the last lines is compared.
    """
    losses = [line["loss"] for line in metrics if "loss" in line]
    if losses and (losses[-1] is None or not math.isfinite(losses[-1])):
        return "the last loss is not finite"
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    if len(finite) > 1 and (last := statistics.median(finite[1:][-LAST_LINES:])) > FAR_ABOVE * finite[0]:
        return f"the loss rose from {finite[0]:.3g} to {last:.3g}"
    return None


def _samples(session: Session, n: int, classes: list[int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Return n samples of the EMA weights and their class labels on rank 0, and None elsewhere. A collective.

    The samples are uint8 (n, H, W, C) and the labels int64 (n,).
    """
    # Draw this rank's samples.
    runtime, batch = session.runtime, draw_samples.BATCH[session.runtime.device.type]
    labels = draw_samples.balanced_labels(n, classes)
    samples = draw_samples.draw(
        draw_samples.prepare(session.ema_network(), session.config.sample, runtime.device),
        session.process,
        session.config.sample,
        session.shape,
        labels,
        indices=range(runtime.rank, n, runtime.world),
        seed=0,
        device=runtime.device,
        decoder=session.decoder,
        progress=partial(runtime.stoppable, count=math.ceil(math.ceil(n / runtime.world) / batch)),
    )

    # Put the ranks' samples into one array, in the order of their indices.
    parts = runtime.gather(draw_samples.to_uint8(samples))
    if parts is None:
        return None
    images = np.empty((n, *parts[0].shape[1:]), np.uint8)
    for rank, part in enumerate(parts):
        images[rank :: runtime.world] = part
    return images, labels


def _can_show(session: Session) -> bool:
    """Return whether samples, or what the decoder makes of them, are images."""
    return session.decoder is not None or (session.source.kind != "latent" and session.shape.channels in (1, 3))


def _shown_classes(session: Session) -> list[int]:
    """Return the class labels on the grid: the first `sample.max_classes`."""
    return list(range(min(session.shape.classes, session.config.sample.max_classes)))


def _facts(session: Session) -> dict[str, str]:
    """Return the lines about the run in the report: those of its start, and how it went."""
    config, run, settings = session.config, session.run, session.config.sample
    lines = [line for line in read_metrics(run.folder) if "loss" in line]
    last = lines[-1] if lines else {}
    sampler = f"{settings.describe_sampler(session.process)}, {settings.steps} steps"
    return read_texts(run.folder / FACTS) | {
        "trained": f"{config.steps:,} steps of {run.deepspeed.batch} in {run.seconds:.0f} s; "
        + run.describe_skipped(config.steps),
        "last loss": f"{last['loss']:.4f}" if last.get("loss") is not None else "none",
        "speed": f"{last['images_per_sec']:.0f} images/s at the end" if last else "none",
        "sampled with": f"{sampler}, guidance {settings.guidance:g}, EMA {config.ema.kind}, seed 0",
    }


def _farewell(session: Session, report: Path, figures: dict[str, str]) -> str:
    """Return the last lines of a run on the terminal: its figures, its files, and commands to run next."""
    folder, shows = session.run.folder, _can_show(session)
    shown = {**figures, **({"pictures": folder / GRID} if (folder / GRID).exists() else {}), "report": report}
    images = 0 if session.source.kind == "latent" else session.source.n
    commands = next_commands(folder, session.config.steps, shows=shows, images=images)
    lines = ["", *(f"{key}: {value}" for key, value in shown.items()), "what to run next:"]
    lines += [f"  {command}   # {why}" for command, why in commands.items()]
    return "\n".join(lines if shows else [*lines, picture_hint(folder)])
