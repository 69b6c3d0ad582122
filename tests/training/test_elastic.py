"""A checkpoint is resumed on any number of ranks, at any ZeRO stage, in any precision and with any micro-batch."""

import json
import os
import pickle
import shutil

import pytest
import torch
from launching import TINY, checkpoint, forked, metrics
from safetensors.torch import load_file

from fastdit.rundir.checkpoint_files import BUFFERS, MANIFEST, SHARDS, WEIGHTS, damage, sampled_weights, seal
from fastdit.rundir.shards import PieceReader

pytestmark = pytest.mark.launch

RECIPE = [*TINY, "--batch", 12, "--weight_decay", 0.1, "--grad_clip", 0.5, "--ema.decay", 0.8, "--eps", 1e-4]
HALF, STEPS = 4, 8


def whole_state(path) -> dict[str, torch.Tensor]:
    """Every tensor that the ranks of a checkpoint share, by kind and name."""
    reader = PieceReader(path / SHARDS)
    return {f"{kind}/{name}": reader.read_whole(kind, name) for kind in reader.kinds for name in reader.shapes(kind)}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """One rank at ZeRO-1 all the way, without a stop."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    forked(*RECIPE, "--steps", STEPS, "--out", folder).succeeded()
    return folder


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Half of it, on two ranks, as a kill after the checkpoint leaves it: in the middle of a line of metrics."""
    folder = tmp_path_factory.mktemp("half") / "run"
    flags = [*RECIPE, "--log_every", 3, "--steps", HALF + 2, "--save_every", HALF, "--ds_config", "zero1"]
    forked(*flags, "--out", folder, ranks=2).succeeded()
    shutil.rmtree(checkpoint(folder, HALF + 2))
    return folder


def ds_config(folder, stage: int, **more) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, **more}))
    return str(path)


SETUPS = {  # ranks, stage, precision, micro-batch
    "1 rank": (1, 1, "fp32", 12),
    "zero0": (1, 0, "fp32", 12),
    "zero3": (2, 3, "fp32", 6),
    "3 ranks": (3, 2, "fp32", 4),
    "accumulated": (1, 1, "fp32", 4),
    "bf16": (2, 2, "bf16", 6),
    "bf16 accumulated": (1, 1, "bf16", 6),
    "bf16 zero3": (1, 3, "bf16", 12),
}


@pytest.mark.parametrize("setup", SETUPS)
def test_every_weight_moment_and_ema_arrives_to_the_bit(half, tmp_path, setup):
    """Loading and saving at once gives the same tensors; and from there the first set-up loads them again."""
    ranks, stage, precision, micro = SETUPS[setup]
    folder = shutil.copytree(half, tmp_path / "run")
    flags = ["--resume", "--out", folder, "--ds_config", ds_config(tmp_path, stage), "--micro_batch", micro]
    forked(*flags, "--precision", precision, ranks=ranks, program="save_again").succeeded()
    before, after = whole_state(checkpoint(half, HALF)), whole_state(checkpoint(folder, HALF))
    assert len(list((checkpoint(folder, HALF) / SHARDS).glob(f"{WEIGHTS}-*"))) == ranks
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.startswith(BUFFERS) and precision == "bf16":
            value = value.bfloat16().to(after[name].dtype) if value.is_floating_point() else value
        assert torch.equal(value, after[name].to(value.dtype)), name
    again = ["--resume", "--out", folder, "--ds_config", "zero1", "--precision", "fp32", "--micro_batch", 6]
    forked(*again, ranks=2, program="save_again").succeeded()
    for name, value in whole_state(checkpoint(folder, HALF)).items():
        assert name.startswith(BUFFERS) or torch.equal(value, before[name]), name


@pytest.mark.parametrize("setup", ["1 rank", "zero3", "3 ranks", "accumulated"])
def test_the_losses_are_those_of_the_straight_run(half, straight, tmp_path, setup):
    """Noise, levels and dropped labels belong to the samples, not to the ranks."""
    ranks, stage, _, micro = SETUPS[setup]
    folder = shutil.copytree(half, tmp_path / "run")
    config = ds_config(tmp_path, stage)
    flags = ["--resume", "--out", folder, "--ds_config", config, "--micro_batch", micro, "--steps", STEPS]
    forked(*flags, "--log_every", 1, ranks=ranks).succeeded()
    mine, other = metrics(folder), metrics(straight)
    for line in other:
        if line["step"] > HALF + 1:  # the line of that step also has the one before it
            (found,) = (m for m in mine if m["step"] == line["step"])
            assert found["loss"] == pytest.approx(line["loss"], rel=1e-4)
            assert found["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
            assert found["images"] == line["images"]
    a, b = (sampled_weights(checkpoint(run, STEPS)) for run in (folder, straight))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-5)


def test_running_means_cross_the_stop(half, straight, tmp_path):
    """Steps 4 to 6 make one line: one step was two ranks', two are one rank's with three micro-batches."""
    folder = shutil.copytree(half, tmp_path / "run")
    flags = ["--resume", "--out", folder, "--ds_config", "zero1", "--micro_batch", 4, "--steps", 6]
    forked(*flags).succeeded()
    losses = [line["loss"] for line in metrics(straight) if line["step"] in (4, 5, 6)]
    mine = [line["loss"] for line in metrics(folder) if line["step"] == 6]
    assert mine == [pytest.approx(sum(losses) / 3, rel=1e-4)]


class Spy:
    """A pickle that leaves a file behind when somebody reads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.fixture
def older(straight, tmp_path, monkeypatch):
    """The straight run stopped half way, with a checkpoint of the first version."""
    folder = tmp_path / "older"
    forked(*RECIPE, "--steps", HALF, "--out", folder).succeeded()
    monkeypatch.setenv("AS_OLDER", "1")
    forked("--resume", "--out", folder, program="save_again").succeeded()
    monkeypatch.delenv("AS_OLDER")
    assert not (checkpoint(folder, HALF) / SHARDS).exists()
    return folder


def test_an_older_checkpoint_is_read_where_it_is_trusted(older, straight):
    refused = forked("--resume", "--out", older, "--steps", STEPS)
    assert refused.code == 2
    assert "can run code when they are read; if you know where they come from, add --trust" in refused.text
    config = older / "config.yaml"
    config.write_text(f"{config.read_text()}trust: true\n")
    assert forked("--resume", "--out", older, "--steps", STEPS).code == 2, "the folder cannot vouch for itself"
    ema = load_file(checkpoint(older, HALF) / "ema.safetensors")
    assert all(torch.equal(ema[name], value) for name, value in sampled_weights(checkpoint(older, HALF)).items())
    for wrong, words in ((["--precision", "bf16"], "--precision fp32"), (["--ds_config", "zero0"], "the ZeRO stage")):
        outcome = forked("--resume", "--trust", "--out", older, "--steps", STEPS, *wrong)
        assert (outcome.code, "Traceback" in outcome.text) == (2, False)
        assert words in outcome.text
    forked("--resume", "--trust", "--out", older, "--steps", STEPS).succeeded()
    assert metrics(older, untimed=True) == metrics(straight, untimed=True)


def test_no_pickle_in_a_folder_is_read(half, tmp_path):
    """Somebody else's folder, with a manifest that fits, and pickles beside our files and instead of one."""
    folder, trap = shutil.copytree(half, tmp_path / "run"), tmp_path / "trap"
    path = checkpoint(folder, HALF)
    told = json.loads((path / MANIFEST).read_text())
    for name in ("deepspeed/mp_rank_00_model_states.pt", "rank-0.pt", "rank-1.pt", "method.pt", "method.safetensors"):
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(pickle.dumps(Spy(trap)))
    seal(path, {key: value for key, value in told.items() if key not in ("sha256", "seal")})
    assert damage(path) is None
    flags = ["--resume", "--out", folder, "--steps", STEPS]
    outcome = forked(*flags)
    assert (outcome.code, "Traceback" in outcome.text) == (2, False)
    assert "method.safetensors: cannot be read" in outcome.text
    older = {key: value for key, value in told.items() if key not in ("sha256", "seal", "format", "sampled")}
    seal(path, older)
    assert forked(*flags).code == 2
    assert not trap.exists()
    with pytest.raises(FileExistsError):
        pickle.loads(pickle.dumps(Spy(tmp_path)))  # the trap works
