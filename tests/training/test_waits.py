"""Where a training step waits for the device: nowhere of ours, and nowhere of DeepSpeed's that a setting turns off."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from launching import TINY, forked, python, run

pytestmark = pytest.mark.launch


def waits(tmp_path: Path, values: dict, *flags, ranks: int = 1) -> Counter[str]:
    """Waits in two steps with this DeepSpeed file, of all ranks: how many in each file."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(values))
    settings = [*TINY, "--grad_clip", "0.5", "--ds_config", file, *flags, "--out", tmp_path / "run"]
    forked(*settings, ranks=ranks, program="find_syncs").succeeded()
    told = [json.loads((tmp_path / "run" / f"waits-{rank}.json").read_text()) for rank in range(ranks)]
    return Counter(Path(call).name.partition(":")[0] for calls in told for call in calls)


CASES = [(stage, "fp32", n) for stage in (0, 1, 2) for n in (1, 2)] + [(1, "bf16", 1), (2, "bf16", 1), (2, "bf16", 2)]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("stage", "precision", "accumulation"), CASES)
def test_a_step_waits_nowhere(tmp_path, stage, precision, accumulation, ranks):
    values = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
    assert waits(tmp_path, values, "--precision", precision, ranks=ranks) == {}


def test_an_aligned_step_waits_nowhere(tmp_path):
    flags = ["--method", "psi_align+sadm", "--sadm.psi_width", 16, "--sadm.start", 0]
    assert waits(tmp_path, {"zero_optimization": {"stage": 1}}, *flags) == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="what only a GPU can tell")
@pytest.mark.parametrize("graphs", ["false", "true"])
@pytest.mark.parametrize("method", ["dit", "sd_dit", "sadm", "psi_align"])
def test_a_gpus_step_waits_nowhere(tmp_path, method, graphs):
    flags = [*TINY, "--device", "cuda", "--data.source", "synthetic:1x28x28:10:64", "--grad_clip", "0.5"]
    flags += ["--method", method, "--cuda_graphs", graphs, "--out", tmp_path / "run"]
    seen = ["env", "CUDA_VISIBLE_DEVICES=0", *python("tests/programs/find_syncs.py", *flags)]
    run(seen, tmp_path / "log").succeeded()
    assert json.loads((tmp_path / "run" / "waits-0.json").read_text()) == []


def test_what_a_file_asks_for_is_found(tmp_path):
    """The same eyes see DeepSpeed's own norm, its look for infinities and its timer."""
    zero = {"stage": 2, "compute_grad_norm": True}
    timers = {"throughput": {"enabled": True, "synchronized": True}}
    values = {"zero_optimization": zero, "timers": timers, "bf16": {"check_grad_overflow": True}}
    found = waits(tmp_path, values, "--precision", "bf16")
    assert found == {"timer.py": 4, "stage_1_and_2.py": 2, "utils.py": 4}
