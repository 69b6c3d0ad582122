"""Read and write `eval.json`, the evaluations of a run: figures, and the conditions that they depend on."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fastdit.errors import UserError
from fastdit.files import read_json, write_atomically, writing
from fastdit.rundir.run_files import BOARD, EVALUATIONS

TAG = "eval/"  # prefix of a figure's name in metrics.jsonl and TensorBoard


def read(run: Path) -> list[dict]:
    """Return all evaluations of a run, oldest first. Raises UserError if the file is damaged."""
    path = run / EVALUATIONS
    if not path.exists():
        return []
    records = read_json(path, "move it away")
    try:
        if not isinstance(records, list):
            raise TypeError
        for record in records:  # everything that is ever read of it
            line(record), conditions(record), scalars(record)
            if type(record["step"]) is not int or not isinstance(record["checkpoint"], str | None):
                raise TypeError
            if not all(isinstance(value, int | float) for value in scalars(record).values()):
                raise TypeError
    except (ValueError, TypeError, LookupError, AttributeError):
        raise UserError(f"{path}: is no list of evaluations; move it away") from None
    return records


def find(run: Path, step: int) -> dict | None:
    """Return the evaluation that training made after `step` steps, or None. Raises UserError if the file is damaged."""
    return next((record for record in read(run) if record["step"] == step and not record["checkpoint"]), None)


def append(run: Path, record: dict) -> None:
    """Add an evaluation to the file of the run. A reader finds the old file or the new one. Raises UserError."""
    _replace(run, [*read(run), record])


def truncate_after(run: Path, step: int) -> None:
    """Remove the evaluations after `step` that a resumed training repeats. Those of fastdit/evaluate.py stay."""
    records = read(run)
    remaining = [record for record in records if record["checkpoint"] or record["step"] <= step]
    if len(remaining) < len(records):
        _replace(run, remaining)


def _replace(run: Path, records: list[dict]) -> None:
    """Write the file anew. Training and fastdit/evaluate.py may do so at the same time."""
    with write_atomically(run / EVALUATIONS, many_writers=True) as temporary:
        temporary.write_text(json.dumps(records, indent=1))


def scalars(record: dict) -> dict[str, float]:
    """Return the figures of an evaluation by their names in metrics.jsonl and TensorBoard."""
    return {TAG + name: figure["value"] for name, figure in record["figures"].items()}


def to_board(run: Path, record: dict) -> None:
    """Write one evaluation to TensorBoard without an open Recorder."""
    with writing(run / BOARD), SummaryWriter(run / BOARD) as board:
        for name, value in scalars(record).items():
            board.add_scalar(name, value, record["step"])


def shown(name: str, figure: dict) -> str:
    """Return one figure as text: its value, its standard deviation over subsets or splits, and its floor."""
    digits = ".5f" if name.startswith("KID") else ".1%" if name == "class agreement" else ".4g"
    text = f"{figure['value']:{digits}}"
    if "std" in figure:
        text += f" ± {figure['std']:{digits}}"
    return text + (f" (floor {figure['floor']:{digits}})" if "floor" in figure else "")


def conditions(record: dict) -> str:
    """Return a line with all conditions that the figures of an evaluation depend on."""
    return "; ".join(f"{name} {text}" if name == "floor:" else text for name, text in _conditions(record))


def block(record: dict) -> str:
    """Return an evaluation as Markdown: a table of its figures, and all conditions that they depend on."""
    step = f" (step {record['step']:,})" if record["sampling"] else ""
    lines = [f"**{record['checkpoint']}**{step}", "", "| figure | value | floor |", "|---|---|---|"]
    for name, figure in record["figures"].items():
        value, _, floor = shown(name, figure).partition(" (floor ")
        lines.append(f"| {name} | {value} | {floor.rstrip(')')} |")
    lines += ["", *(f"- {name} {text}" for name, text in _conditions(record))]
    lines += [f"- protocol: {record['protocol']}"] if "protocol" in record else []
    versions = record["versions"]
    lines.append(f"- software: fastdit {versions['commit']}, torch {versions['torch']}, on {versions['device']}")
    return "\n".join(lines)


def _conditions(record: dict) -> list[tuple[str, str]]:
    """Return the conditions that the figures depend on, each with the name of its kind."""
    real, net = record["real"], record["features"]
    height, width = record["size"]
    crop = f", cropped as {real['crop']}" if real.get("crop", "center") != "center" else ""
    against = f"{record['n']:,} samples against {_count(real['n'])} of {real['data']} at {height}x{width}{crop}"
    halves = "two halves of the real images, {:,} and {:,}".format(*real["floor_n"]) if any(real["floor_n"]) else ""
    parts = [
        ("n:", against),
        ("floor:", halves),
        *_sampling(record["sampling"]),
        ("features:", f"{net['name']} ({net['weights']}), resize {net['resize']}"),
        ("finite:", f"{record['nonfinite']} samples not finite" if record["nonfinite"] else ""),
        *(("note:", note.removeprefix("note: ")) for note in record.get("notes", ())),
    ]
    return [(name, text) for name, text in parts if text]


def _sampling(how: dict | None) -> list[tuple[str, str]]:
    """Return the conditions of sampling, or that the samples were made elsewhere."""
    if how is None:
        return [("sampling:", "samples made elsewhere")]
    guidance = f"guidance {how['guidance']:g}"
    guidance += f" for noise in {how['interval']}" if how["interval"] else ""
    guidance += f" on {how['guided_channels']} channels" if how["guided_channels"] else ""
    text = f"{how['sampler']}, {how['steps']} steps, {guidance}, {how['labels']} labels, seed {how['seed']}"
    if how.get("precision", "fp32") != "fp32":
        text += f", {how['precision']}"
    return [("sampling:", text), ("weights:", f"EMA {how['ema']}")]


def line(record: dict) -> str:
    """Return a line with the step and the figures of an evaluation."""
    return f"step {record['step']}: " + "  ".join(f"{k} {shown(k, v)}" for k, v in record["figures"].items())


def _count(n: int | None) -> str:
    """Return the number of real images as text. It is None for statistics, which do not say it."""
    return "statistics" if n is None else f"{n:,} images"


def table(records: list[dict]) -> list[dict[str, object]]:
    """Return one row of the report for each evaluation: step, figures by name, conditions."""
    return [
        {
            "step": f"{record['step']:,}",
            "figures": {name: shown(name, figure) for name, figure in record["figures"].items()},
            "conditions": conditions(record),
        }
        for record in records
    ]
