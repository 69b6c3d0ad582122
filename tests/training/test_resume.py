"""Resuming continues to the bit, after a crash at any moment."""

import json
import shutil

import pytest
import torch
from launching import RECIPE, TINY, Launched, checkpoint, deepspeed, forked, metrics, run

from fastdit.rundir.checkpoint_files import BUFFERS, MANIFEST, PROGRESS, SHARDS, damage
from fastdit.rundir.shards import PieceReader

pytestmark = pytest.mark.launch


def assert_same(a, b, where: str) -> None:
    """Equal to the bit, all the way down; the clock's share apart."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


def optimizer_state(folder) -> dict[str, torch.Tensor]:
    """The weights and the optimizer's state by name, each kind laid end to end."""
    reader = PieceReader(folder / SHARDS)
    kinds = [kind for kind in reader.kinds if kind != BUFFERS]
    return {kind: torch.cat([reader.read(kind, name) for name in sorted(reader.shapes(kind))]) for kind in kinds}


def assert_same_run(mine, straight, step: int) -> None:
    """Metrics (without times) and every file of the last checkpoint are equal."""
    assert metrics(mine, untimed=True) == metrics(straight, untimed=True)
    a, b = checkpoint(mine, step), checkpoint(straight, step)
    names = sorted(str(path.relative_to(a)) for path in a.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(b)) for path in b.rglob("*") if path.is_file())
    assert len(names) > 3
    assert damage(a) is None
    for name in names:
        if name == PROGRESS:
            assert_same(*(json.loads((folder / name).read_text()) for folder in (a, b)), name)
        elif name != MANIFEST:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_two_ranks_killed_after_a_checkpoint(straight, tmp_path):
    folder = tmp_path / "run"
    flags = [*RECIPE, "--ds_config", "zero1", "--out", folder]
    # Drawing pictures at step 25 takes so long that the kill falls between two checkpoints.
    slow = ["--sample_every", 25, "--sample.steps", 2000]
    with Launched(deepspeed(*flags, *slow), tmp_path / "log") as launched:
        launched.until(lambda: "step 24/" in launched.text, "step 24")
        launched.kill()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000020"]
    assert metrics(folder)[-1]["step"] == 24, "lines that the resumed run writes again"
    assert not launched.processes()
    outcome = run(deepspeed(*flags, "--resume"), tmp_path / "log").succeeded()
    assert f"resumed {checkpoint(folder, 20)}" in outcome.text
    assert "steps 20 to 40" in outcome.text
    assert_same_run(folder, straight("zero1"), 40)


ONE_RANK = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "accumulation": {
        "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
    },
    "bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "bf16-accumulation": {
        "zero_optimization": {"stage": 1},
        "bf16": {"enabled": True},
        "gradient_accumulation_steps": 2,
    },
    "bf16-zero3": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
}


@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_stopped_half_way(tmp_path, name):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(ONE_RANK[name]))
    # `--steps 5` and on to 10 is a stop at 5, since the schedule is constant.
    flags = [*TINY, "--ds_config", file, "--ema.kind", "power", "--grad_clip", "0.5", "--log_every", 5]
    forked(*flags, "--steps", 10, "--out", tmp_path / "straight").succeeded()
    forked(*flags, "--steps", 5, "--out", tmp_path / "run").succeeded()
    outcome = forked("--resume", "--out", tmp_path / "run", "--steps", 10).succeeded()  # the run's own config.yaml
    assert "steps 5 to 10" in outcome.text
    assert_same_run(tmp_path / "run", tmp_path / "straight", 10)


@pytest.mark.parametrize("first", [4, 8])
def test_other_micro_batches_in_bf16(tmp_path, first):
    """ZeRO-1 then goes on with another of DeepSpeed's optimizers: with the same weights, moments, average and count."""
    flags = [*TINY, "--ds_config", "zero1", "--precision", "bf16", "--out", tmp_path / "run"]
    forked(*flags, "--micro_batch", first, "--steps", 5).succeeded()
    forked(*flags, "--micro_batch", 12 - first, "--steps", 6, "--lr", 0, "--resume").succeeded()
    before, after = (optimizer_state(checkpoint(tmp_path / "run", step)) for step in (5, 6))
    assert torch.equal(before["weights"], after["weights"])
    assert (before["step"].unique().tolist(), after["step"].unique().tolist()) == ([5], [6])
    average = 0.4 * before["ema"] + 0.6 * before["weights"]  # the sixth step's decay: 6 of 15
    torch.testing.assert_close(after["ema"], average, rtol=1e-5, atol=1e-8)
    gradients = (after["exp_avg"] - 0.9 * before["exp_avg"]) / 0.1
    assert gradients.norm() > 0.1
    squares = (after["exp_avg_sq"] - 0.999 * before["exp_avg_sq"]) / 0.001
    torch.testing.assert_close(gradients.square(), squares, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_this_runs_clipping_rules_not_the_checkpoints(tmp_path, precision):
    """From none to DeepSpeed's to the optimizer's, each time to another limit."""
    file, out = tmp_path / "mine.json", tmp_path / "run"
    flags = [*TINY, "--precision", precision, "--ds_config", file, "--out", out, "--lr", 1e-3, "--eps", 1e3]

    def resumed(steps: int, *more, **zero):
        file.write_text(json.dumps({"zero_optimization": {"stage": 1, **zero}}))
        return forked(*flags, "--steps", steps, *more)

    def mean() -> torch.Tensor:
        """Norm of the mean of the last ten gradients or so."""
        return optimizer_state(checkpoint(out, metrics(out)[-1]["step"]))["exp_avg"].norm()

    resumed(3, "--grad_clip", 0).succeeded()
    assert mean() > 0.05
    for steps, limit, own in ((103, 1e-3, {"compute_grad_norm": True}), (203, 1e-2, {})):
        resumed(steps, "--grad_clip", limit, "--resume", **own).succeeded()
        assert 0.3 * limit < mean() < 1.001 * limit


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    forked(*TINY, "--steps", 10, "--save_every", 3, "--log_every", 2, "--out", folder).succeeded()
    return folder


def test_keeps_the_newest_checkpoints_only(finished):
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]


def flip_a_byte(folder):
    file = next(folder.glob("shards/exp_avg-*"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "flipped bit": (flip_a_byte, "is not what was written"),
    "lost progress": (lambda folder: (folder / PROGRESS).unlink(), f"{PROGRESS} is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "manifest.json is missing"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_falls_back_from_a_damaged_checkpoint(finished, tmp_path, name):
    folder = shutil.copytree(finished, tmp_path / "run")
    spoil, fault = DAMAGES[name]
    spoil(checkpoint(folder, 10))
    # What a crash in the middle of saving leaves: half a checkpoint in a hidden folder, and half a line of metrics.
    half = folder / "checkpoints" / ".step-00000007.partial"
    shutil.copytree(checkpoint(finished, 9) / SHARDS, half / SHARDS)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    outcome = forked("--resume", "--out", folder).succeeded()
    assert f"{checkpoint(folder, 10)}: " in outcome.text
    assert f"{fault}" in outcome.text
    assert f"resumed {checkpoint(folder, 9)}" in outcome.text
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]
    assert_same_run(folder, finished, 10)


def test_stops_when_every_checkpoint_is_damaged(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    for step in (9, 10):
        flip_a_byte(checkpoint(folder, step))
    before = (folder / "metrics.jsonl").read_bytes()
    outcome = forked("--resume", "--out", folder)
    assert outcome.code == 2
    assert "all 2 checkpoints are damaged" in outcome.text
    assert "Traceback" not in outcome.text
    assert (folder / "metrics.jsonl").read_bytes() == before, "nothing is lost"


def test_refuses_a_checkpoint_of_another_network(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    outcome = forked("--resume", "--out", folder, "--model.width", 64)
    assert outcome.code == 2
    assert "model.width" in outcome.text.splitlines()[-1]
    assert "Traceback" not in outcome.text


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "run")
    forked("--resume", "--out", folder).succeeded()
    assert_same_run(folder, finished, 10)
    assert (folder / "samples.png").read_bytes() == (finished / "samples.png").read_bytes()
