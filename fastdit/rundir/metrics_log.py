"""Write metrics of a run as JSON lines, to TensorBoard, to Weights & Biases and to the terminal; collect versions."""

import json
import math
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from fastdit.errors import UserError
from fastdit.files import write_atomically, writing
from fastdit.rundir.commit import find_commit
from fastdit.rundir.run_files import BOARD, METRICS
from fastdit.rundir.wandb_run import WandbRun

PACKAGES = ("fastdit", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "flash-attn", "numpy")
# Dense bf16 TFLOP/s from datasheets, by a part of the GPU's name. CPUs have no such figure, and so no MFU.
PEAK_TFLOPS = {
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "GH200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
}
RENAMED = {"centre_norm": "center_norm"}  # metrics by older names


def versions() -> dict[str, str]:
    """Return the versions, the commit and the hardware that a figure of this run depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # includes the build, such as +cpu or +cu130
    found["commit"] = _commit()
    found["cuda"] = torch.version.cuda or "none"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return found


def _commit() -> str:
    """Return the commit of this checkout."""
    return find_commit(Path(__file__).resolve().parents[2])


def _cpu() -> str:
    """Return the name of the CPU, and the number of threads that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device) -> float | None:
    """Return the datasheet FLOP/s of a GPU in dense bf16, or None for CPUs and unknown GPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> float:
    """Return the largest memory so far in GB: what torch reserved on a GPU, or this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Recorder:
    """Write the metrics of one run, on rank 0. `step` counts finished optimizer steps.

    Metrics after `first_step`, left by an earlier start of the run, are removed. With `wandb`, which the recorder
    closes, metrics and pictures go to Weights & Biases too.
    """

    def __init__(self, folder: Path, first_step: int, last_step: int, wandb: WandbRun | None = None):
        self.path, self.wandb = folder / METRICS, wandb
        _truncate_after(self.path, first_step)
        with writing(self.path):
            self.file = self.path.open("a", buffering=1)
        with writing(folder / BOARD):
            self.board = SummaryWriter(folder / BOARD, purge_step=first_step + 1 if first_step else None)
        self.live = sys.stderr.isatty()
        self.bar = tqdm(
            total=last_step,
            initial=first_step,
            unit="step",
            disable=not self.live,
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def advance(self) -> None:
        """Advance the progress bar by one step."""
        self.bar.update()

    def figures(self, step: int, values: dict[str, float]) -> None:
        """Write one line of metrics. A value that is not finite becomes null, as JSON has no NaN."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        with writing(self.path):
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
        with writing(self.path.parent / BOARD):
            for key, value in values.items():
                self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(step, values)
            self._pass_on(self.wandb)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one line of training metrics, and show some of them on the terminal.

        `values` has at least `loss`, `images_per_sec` and `seconds_per_step`.
        """
        # Write the line, and choose what the terminal shows.
        self.figures(step, values)
        shown = {"loss": f"{values['loss']:.4f}", "img/s": f"{values['images_per_sec']:.0f}"}
        if "mfu" in values:
            shown["MFU"] = f"{values['mfu']:.1%}"
        self.bar.set_postfix(shown, refresh=False)
        if not self.live:
            left = (self.bar.total - step) * values["seconds_per_step"]
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"step {step}/{self.bar.total}  {text}  left {tqdm.format_interval(left)}", flush=True)

    def image(self, step: int, picture: np.ndarray, name: str = "samples") -> None:
        """Write a grid of images, uint8 (H, W, 3), to TensorBoard and to Weights & Biases."""
        with writing(self.path.parent / BOARD):
            self.board.add_image(name, picture, step, dataformats="HWC")
        if self.wandb:
            self.wandb.image(step, picture, name)

    def summarize(self, step: int, settings: dict[str, object], figures: dict[str, float]) -> None:
        """Write a finished run's settings and final figures, which other programs compare runs by.

        TensorBoard shows them on its page HParams, with `final/` before the name of a figure.
        """
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
        final = {f"final/{key}": value for key, value in figures.items() if math.isfinite(value)}
        with writing(self.path.parent / BOARD):
            # `SummaryWriter.add_hparams` would write into a folder of its own, as another run.
            for summary in hparams(plain, final):
                self.board.file_writer.add_summary(summary, step)
            for key, value in final.items():
                self.board.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.summarize(final)

    def say(self, text: str) -> None:
        """Print a line without breaking the progress bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def _pass_on(self, wandb: WandbRun) -> None:
        """Print what Weights & Biases has to say since the last time."""
        for line in wandb.take_messages():
            self.say(line)

    def close(self) -> None:
        """Close the progress bar and the files, and give Weights & Biases some seconds to upload the rest."""
        if self.wandb:
            self.wandb.close()
            self._pass_on(self.wandb)
        self.bar.close()
        with writing(self.path.parent / BOARD):
            self.board.close()
        with writing(self.path):
            self.file.close()


def read_metrics(folder: Path) -> list[dict]:
    """Return the lines of a run's metrics, an empty list if there are none yet; older names are replaced.

    The last line is left out if a crash cut it short. Raises UserError if the file is damaged.
    """
    lines, faults = read_lines(folder / METRICS)
    if faults:
        raise UserError(
            f"{folder / METRICS}: line {faults[0]} is no line of metrics; remove that line, or move the file away"
        )
    return lines


def read_lines(path: Path) -> tuple[list[dict], list[int]]:
    """Return the lines of a file of metrics, and the numbers of the lines, counted from 1, that are none.

    Older names of metrics are replaced. A last line that a crash cut short counts as missing. Raises UserError if the
    file cannot be read.
    """
    try:
        texts = path.read_bytes().decode(errors="replace").split("\n") if path.exists() else []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); move it away") from None
    texts = [(number, text) for number, text in enumerate(texts, 1) if text.strip()]
    lines, faults = [], []
    for number, text in texts:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if _is_line(line):
            lines.append({RENAMED.get(name, name): value for name, value in line.items()})
        elif number != texts[-1][0]:
            faults.append(number)
    return lines, faults


def _is_line(line: object) -> bool:
    """Return whether an object has the form of a line of metrics: a step, and numbers or null by name."""
    return (
        isinstance(line, dict)
        and type(line.get("step")) is int
        and all(value is None or type(value) in (int, float) for value in line.values())
    )


def _truncate_after(path: Path, step: int) -> None:
    """Remove the lines after `step`, which a resumed run writes again, and a line cut short by a crash."""
    if not path.exists():
        return
    remaining = [json.dumps(line) + "\n" for line in read_metrics(path.parent) if line["step"] <= step]
    with write_atomically(path) as temporary:
        temporary.write_text("".join(remaining))
