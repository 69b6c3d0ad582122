"""`eval.json`: every evaluation of a run, the figures with all that they depend on; and how they are shown."""

import json
import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from fastdit.errors import UserError
from fastdit.rundir.run_files import BOARD, EVALUATIONS

TAG = "eval/"  # before a figure's name, in metrics.jsonl and TensorBoard


def read(run: Path) -> list[dict]:
    """All evaluations, in the order they were made. Raises UserError when the file is damaged."""
    path = run / EVALUATIONS
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text())
        assert isinstance(records, list)
        return records
    except (ValueError, AssertionError):
        raise UserError(f"{path}: is no list of evaluations; move it away") from None


def append(run: Path, record: dict) -> None:
    """Whole at every moment."""
    _replace(run, [*read(run), record])


def forget_after(run: Path, step: int) -> None:
    """Drop what a resumed training is about to evaluate again; what the command evaluated stays."""
    records = read(run)
    kept = [record for record in records if record["checkpoint"] or record["step"] <= step]
    if len(kept) < len(records):
        _replace(run, kept)


def _replace(run: Path, records: list[dict]) -> None:
    path = run / EVALUATIONS
    aside = path.with_suffix(f".{os.getpid()}.partial")
    aside.write_text(json.dumps(records, indent=1))
    aside.replace(path)


def scalars(record: dict) -> dict[str, float]:
    return {TAG + name: figure["value"] for name, figure in record["figures"].items()}


def to_board(run: Path, record: dict) -> None:
    """For who has no board open."""
    with SummaryWriter(run / BOARD) as board:
        for name, value in scalars(record).items():
            board.add_scalar(name, value, record["step"])


def shown(name: str, figure: dict) -> str:
    """One figure: its value, its spread over subsets or splits, its floor."""
    digits = ".5f" if name.startswith("KID") else ".1%" if name == "class agreement" else ".4g"
    text = f"{figure['value']:{digits}}"
    if "std" in figure:
        text += f" ± {figure['std']:{digits}}"
    return text + (f" (floor {figure['floor']:{digits}})" if "floor" in figure else "")


def conditions(record: dict) -> str:
    """All that the figures of a record depend on, in a line."""
    real, how, net = record["real"], record["sampling"], record["features"]
    height, width = record["size"]
    guidance = f"guidance {how['guidance']:g}"
    guidance += f" for noise in {how['interval']}" if how["interval"] else ""
    guidance += f" on {how['guided_channels']} channels" if how["guided_channels"] else ""
    parts = [
        f"{record['n']:,} samples against {_count(real['n'])} of {real['data']} at {height}x{width}",
        "floor: two halves of the real images, {:,} and {:,}".format(*real["floor_n"]) if any(real["floor_n"]) else "",
        f"{how['sampler']}, {how['steps']} steps, {guidance}, {how['labels']} labels, seed {how['seed']}",
        f"EMA {how['ema']}",
        f"{net['name']} ({net['weights']}), resize {net['resize']}",
        f"{record['nonfinite']} samples not finite" if record["nonfinite"] else "",
    ]
    return "; ".join(part for part in parts if part)


def line(record: dict) -> str:
    """The figures of a record in a line, as training says them."""
    return f"step {record['step']}: " + "  ".join(f"{k} {shown(k, v)}" for k, v in record["figures"].items())


def _count(n: int | None) -> str:
    return "statistics" if n is None else f"{n:,} images"


def table(records: list[dict]) -> list[dict[str, str]]:
    """Rows for the report: step, figures, conditions."""
    return [
        {
            "step": f"{record['step']:,}",
            "figures": [f"{name} {shown(name, figure)}" for name, figure in record["figures"].items()],
            "conditions": conditions(record),
        }
        for record in records
    ]
