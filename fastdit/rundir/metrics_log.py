"""What a run leaves behind: settings, versions, metrics (JSON lines and TensorBoard), and its line on the terminal."""

import json
import math
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fastdit.rundir.commit import find_commit
from fastdit.rundir.run_files import BOARD, METRICS

PACKAGES = ("fastdit", "torch", "triton", "deepspeed", "nvidia-dali-cuda130", "flash-attn", "numpy")
# Dense bf16 TFLOP/s by datasheet. A CPU has no such figure, so no MFU is shown there.
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


def versions() -> dict[str, str]:
    """Versions, commit and hardware that a figure of this run depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["torch"] = torch.__version__  # with its build: +cpu, +cu130
    found["commit"] = _commit()
    found["cuda"] = torch.version.cuda or "none"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu()
    return found


def _commit() -> str:
    return find_commit(Path(__file__).resolve().parents[2])


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def peak_flops(device: torch.device) -> float | None:
    """Datasheet FLOP/s of one GPU in dense bf16; None when unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tera * 1e12 for key, tera in PEAK_TFLOPS.items() if key in name), None)


class Recorder:
    """Metrics of one run, written by rank 0. `step` counts finished optimizer steps."""

    def __init__(self, folder: Path, first_step: int, last_step: int):
        self.path = folder / METRICS
        _forget_after(self.path, first_step)
        self.file = self.path.open("a", buffering=1)
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
        self.bar.update()

    def figures(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics. A value that is not finite is written as null: JSON has no other word for it."""
        finite = {key: value if math.isfinite(value) else None for key, value in values.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        for key, value in values.items():
            self.board.add_scalar(key, value, step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """A line of training's own metrics, shown on the terminal too."""
        self.figures(step, values)
        shown = {"loss": f"{values['loss']:.4f}", "img/s": f"{values['images_per_sec']:.0f}"}
        if "mfu" in values:
            shown["MFU"] = f"{values['mfu']:.1%}"
        self.bar.set_postfix(shown, refresh=False)
        if not self.live:
            left = (self.bar.total - step) * values["seconds_per_step"]
            text = "  ".join(f"{key} {value}" for key, value in shown.items())
            print(f"step {step}/{self.bar.total}  {text}  left {tqdm.format_interval(left)}", flush=True)

    def image(self, step: int, picture) -> None:
        """`picture`: uint8 (H, W, 3)."""
        self.board.add_image("samples", picture, step, dataformats="HWC")

    def say(self, text: str) -> None:
        """A line for the user that does not tear the progress bar."""
        self.bar.write(text, file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        self.file.close()


def read_metrics(folder: Path) -> list[dict]:
    """The lines of a run's metrics; none when there are none yet."""
    path = folder / METRICS
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def _forget_after(path: Path, step: int) -> None:
    """Drop what a resumed run is about to write again, and a line cut short by a crash."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            keep = json.loads(line)["step"] <= step
        except (ValueError, KeyError):
            continue
        if keep:
            kept.append(line + "\n")
    aside = path.with_suffix(".partial")
    aside.write_text("".join(kept))
    aside.replace(path)  # whole at every moment
