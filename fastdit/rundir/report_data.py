"""Read everything that a report shows from a run's folder, also where files are missing, damaged or half written."""

import math
import shlex
import statistics
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import yaml

from fastdit.command_line import read_settings
from fastdit.config import CONFIG_FILE
from fastdit.errors import UserError
from fastdit.methods.denoising import Panels
from fastdit.methods.registry import METHODS
from fastdit.parser import dump, flatten, parse
from fastdit.rundir import eval_log
from fastdit.rundir.facts import PRESET, read_texts
from fastdit.rundir.metrics_log import read_lines
from fastdit.rundir.run_files import FACTS, GRIDS, METRICS, VERSIONS
from fastdit.rundir.run_lock import trains

Curves = dict[str, list[tuple[int, float]]]  # label -> points (step, value)
OWN = ("out", "resume", "wandb")  # settings that are no part of what is trained
# Title of each panel, and the label of each metric in it. A panel without data is left out.
_OF_RUNS: Panels = {
    "loss": {"loss": "loss"},
    "gradient norm": {"grad_norm": "gradient norm"},
    "learning rate": {"lr": "learning rate"},
    "images / s": {"images_per_sec": "images / s"},
    "MFU": {"mfu": "MFU"},
    "memory (GB)": {"memory_gb": "largest so far, of all ranks"},
}
_OF_EVALUATIONS: Panels = {
    "FID": {"eval/FID": "FID", "eval/sFID": "sFID"},
    "FD-lite0": {"eval/FD-lite0": "FD-lite0"},
    "KID": {"eval/KID": "KID", "eval/KID-lite0": "KID-lite0"},
    "Inception score": {"eval/IS": "Inception score", "eval/IS-lite0": "IS-lite0"},
    "precision and recall": {
        "eval/precision": "precision",
        "eval/recall": "recall",
        "eval/precision-lite0": "precision-lite0",
        "eval/recall-lite0": "recall-lite0",
    },
    "class agreement": {"eval/class agreement": "class agreement"},
}
_COUNTERS = {"skipped": "skipped steps", "corrupt_skipped": "corrupt images replaced"}  # shown once they are not zero
_AXES = {"step", "images", "seconds", "seconds_per_step"}  # metrics that are no signal of their own
LAST = 5  # lines whose median is shown as the last loss


@dataclass(frozen=True)
class RunRecord:
    """Hold what a run's folder holds.

    Args:
        folder, name: the folder, and its last part.
        lines: the metrics.
        evaluations: the evaluations, oldest first.
        facts, versions: texts by name.
        settings: the settings by flag, empty if config.yaml cannot be read.
        config: the text of config.yaml.
        grids: steps and paths of the sample grids, oldest first.
        training: whether a process trains into the folder.
        notes: a line for each file that could not be read, or not wholly.
    """

    folder: Path
    name: str
    lines: list[dict]
    evaluations: list[dict]
    facts: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, object]
    config: str
    grids: list[tuple[int, Path]]
    training: bool
    notes: list[str] = field(default_factory=list)

    @property
    def last(self) -> dict:
        """Return the last line of training metrics, or an empty one."""
        return next((line for line in reversed(self.lines) if "images_per_sec" in line or "loss" in line), {})

    @property
    def steps(self) -> int | None:
        """Return the number of steps of the whole run, None if the settings cannot be read."""
        steps = self.settings.get("steps")
        return steps if type(steps) is int else None

    @property
    def finished(self) -> bool:
        """Return whether the last step is done and nothing more is under way."""
        return not self.training and self.steps is not None and self.last.get("step", -1) >= self.steps

    def last_loss(self) -> float | None:
        """Return the median of the last losses, which a single micro-batch does not move."""
        losses = [line["loss"] for line in self.lines if is_finite(line.get("loss"))]
        return statistics.median(losses[-LAST:]) if losses else None


def read_run(folder: Path) -> RunRecord:
    """Return what the folder of a run holds. Raises UserError if it is no run's.

    A file that is damaged is left out, and named in the notes; of the metrics only the lines that are damaged are.
    """
    if not any((folder / name).exists() for name in (CONFIG_FILE, METRICS)):
        raise UserError(f"{folder}: holds no run; name a folder with {CONFIG_FILE} and {METRICS}")
    notes: list[str] = []

    def attempt(read, *args, missing):
        try:
            return read(*args)
        except UserError as error:
            notes.append(str(error))
            return missing

    # Read each file by itself.
    lines, faults = attempt(read_lines, folder / METRICS, missing=([], []))
    if faults:
        some = ", ".join(map(str, faults[:5])) + (", ..." if len(faults) > 5 else "")
        notes.append(f"{folder / METRICS}: lines that cannot be read are left out: {some}")
    training = trains(folder)
    if not training and _is_cut(folder / METRICS):
        notes.append(f"{folder / METRICS}: its last line is cut off, and left out")
    texts = [folder / FACTS, folder / VERSIONS]
    facts, versions = (attempt(read_texts, path, missing={}) if path.exists() else {} for path in texts)
    config, settings = folder / CONFIG_FILE, {}
    if config.exists():
        settings = flatten(attempt(read_settings, config, missing={}))
    else:
        notes.append(f"{config}: is missing, so the settings are not known")

    return RunRecord(
        folder=folder,
        name=folder.resolve().name,
        lines=sorted(lines, key=lambda line: line["step"]),
        evaluations=attempt(eval_log.read, folder, missing=[]),
        facts=facts,
        versions=versions,
        settings=settings,
        config=config.read_bytes().decode(errors="replace") if config.is_file() else "",
        grids=_grids(folder),
        training=training,
        notes=notes,
    )


def _grids(folder: Path) -> list[tuple[int, Path]]:
    """Return steps and paths of the sample grids of a run, oldest first."""
    paths = sorted((folder / GRIDS).glob("step-*.png"))
    return [(int(path.stem[5:]), path) for path in paths if path.stem[5:].isdecimal()]


def differences(record: RunRecord) -> tuple[str, list[tuple[str, str, str]]]:
    """Return what a run's settings are compared with, and (flag, text there, text of the run) where they differ.

    They are compared with the run's preset, or with the defaults if it had none.
    """
    named = record.facts.get(PRESET, "none")
    where = "the defaults" if named == "none" else f"preset {named}"
    try:
        base = _preset_settings(named)
    except UserError as error:
        where, base = f"the defaults, for {error}", _preset_settings("none")
    pairs = [(flag, base.get(flag), value) for flag, value in record.settings.items() if flag not in OWN]
    return where, [(flag, plain(there), plain(here)) for flag, there, here in pairs if there != here]


@lru_cache(maxsize=8)
def _preset_settings(named: str) -> dict[str, object]:
    """Return the settings of presets, of which `named` is written as in facts.json. Raises UserError."""
    names = [] if named == "none" else shlex.split(named)
    return flatten(yaml.safe_load(dump(parse([word for name in names for word in ("--preset", name)]))))


def plain(value: object) -> str:
    """Return a setting as text."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def panels(metrics: list[dict]) -> list[tuple[str, Curves]]:
    """Return title and curves of the panels that have data. A value that is not finite has no point.

    First come those of every run, of each registered method and of evaluations; methods may share a panel. Every other
    metric gets a panel of its own, so that no signal is left out.
    """
    # Collect the points of each metric.
    series: dict[str, list[tuple[int, float]]] = {}
    for line in metrics:
        step = line["step"]
        for key, value in line.items():
            if key not in _AXES and is_finite(value):
                series.setdefault(key, []).append((step, value))

    # Collect the panels that are known, and add one for each other metric.
    known: Panels = {}
    for part in (_OF_RUNS, *(method.panels for method in METHODS.values()), _OF_EVALUATIONS):
        for title, labels in part.items():
            known[title] = known.get(title, {}) | labels
    others = series.keys() - set(_COUNTERS).union(*known.values())
    for key in (key for key in series if key in others):
        name = key.removeprefix(eval_log.TAG)
        known[name] = known.get(name, {}) | {key: name}
    for key, title in _COUNTERS.items():
        if any(value for _, value in series.get(key, [])):
            known[title] = {key: title}

    # Leave out those without points.
    filled = {
        title: {label: series[key] for key, label in labels.items() if key in series} for title, labels in known.items()
    }
    return [(title, curves) for title, curves in filled.items() if curves]


def _is_cut(metrics: Path) -> bool:
    """Return whether the file of metrics ends within a line, as a run that was killed may leave it."""
    try:
        text = metrics.read_bytes()
    except OSError:
        return False
    return bool(text) and not text.endswith(b"\n")


def is_finite(value: object) -> bool:
    """Return whether a value of a line of metrics is a number that can be plotted."""
    return value is not None and abs(value) < 1e300 and not math.isnan(value)
