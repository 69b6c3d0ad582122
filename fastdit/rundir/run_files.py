"""Name the files in a run's folder."""

from pathlib import Path

CHECKPOINTS = "checkpoints"
LOCK = ".lock"  # names the process that trains
METRICS = "metrics.jsonl"
VERSIONS = "versions.json"
CLASSES = "classes.json"  # names of the classes, by label
GRID = "samples.png"
REAL = "real.png"  # training images, in the order of the sample grid
GRIDS = "samples"  # folder of step-NNNNNNNN.png, written during training
CURVES = "curves.png"
REPORT = "report.html"
EVALUATIONS = "eval.json"
FACTS = "facts.json"  # lines about the run in the report
PLOTLY = "plotly.min.js"  # for the report of a run that trains; later ones carry it inside
WANDB = "wandb.json"  # the run's id at Weights & Biases
BOARD = "tensorboard"


def grid_file(run: Path, step: int) -> Path:
    """Return the path of the sample grid that training draws after `step` steps."""
    return run / GRIDS / f"step-{step:08d}.png"
