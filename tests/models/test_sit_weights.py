"""Test that SiT's and REPA's files load under their convention alone, and that the convention travels with weights."""

import argparse
import json
import re
import shutil

import numpy as np
import pytest
import torch
from launching import TINY, averages, forked
from safetensors.torch import load_file
from test_pretrained import make_official

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.export import _export
from fastdit.models.pretrained import from_official
from fastdit.parser import parse
from fastdit.rundir.checkpoint_files import first_difference
from fastdit.sample import _sample

CASE = {"input_size": 8, "patch": 2, "channels": 4, "width": 48, "depth": 2, "heads": 4, "classes": 7}
SHAPE = run_parts.Shape(4, 8, 8, 7)
FLAGS = "--data.size 8 --data.channels 4 --model.patch 2 --model.width 48 --model.depth 2 --model.heads 4"
SIT = "--noise.name flow --noise.flow.convention sit"
REPA = "--noise.name flow --noise.flow.convention repa"
SIT_ARGUMENTS = argparse.Namespace(path_type="Linear", prediction="velocity", num_classes=7)
REPA_ARGUMENTS = argparse.Namespace(path_type="linear", prediction="v", num_classes=7)


def doubled(zeros=True):
    """Weights with twice the outputs. SiT's trainer leaves the second half zero, DDPM's does not."""
    state = make_official(CASE | {"out_channels": 8})
    for leaf in ("weight", "bias") if zeros else ():
        state[f"final_layer.linear.{leaf}"].unflatten(0, (4, 2, 4))[:, 1] = 0
    return state


def start(path, flags=""):
    return run_parts.build_training(parse([*FLAGS.split(), *flags.split(), "--init_from", str(path)]), SHAPE)[0]


def refusal(path, flags):
    with pytest.raises(UserError) as refused:
        start(path, flags)
    text = str(refused.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize("declared", [True, False])
def test_a_file_of_sit_keeps_the_first_half_of_its_outputs(tmp_path, capsys, declared):
    """Its arguments tell a file of SiT's even if the second half has other numbers than zeros."""
    path, state = tmp_path / "sit.pt", doubled(zeros=not declared)
    torch.save({"model": state, "args": SIT_ARGUMENTS} if declared else state, path)
    loaded = start(path, SIT).state_dict()
    expected = from_official(state)
    for leaf in ("weight", "bias"):
        rows = expected.pop(f"head.{leaf}").unflatten(0, (2, 2, 8))  # patch rows, patch columns, channels
        assert torch.equal(loaded.pop(f"head.{leaf}"), rows[:, :, :4].flatten(0, 2))
    assert all(torch.equal(loaded[key], value) for key, value in expected.items() if key != "pos_embed")
    line = "left out the second half of its outputs, which SiT's networks have and do not use"
    assert capsys.readouterr().out.endswith(f"{path}: {line}\n")


def test_a_file_of_sit_without_the_second_half_loads(tmp_path):
    torch.save(make_official(CASE), tmp_path / "sit.pt")
    start(tmp_path / "sit.pt", SIT)


@pytest.mark.parametrize("flags", ["", "--noise.name ddpm", "--noise.name flow", REPA])
def test_zeros_tell_a_file_of_sit(tmp_path, flags):
    torch.save(doubled(), tmp_path / "sit.pt")
    text = refusal(tmp_path / "sit.pt", flags)
    assert text == f"the second half of its outputs is zero, as in SiT's files; take {SIT}"
    start(tmp_path / "sit.pt", text.partition("; take ")[2])


def test_twice_the_outputs_may_be_a_ddpms(tmp_path):
    torch.save(doubled(zeros=False), tmp_path / "dit.pt")
    start(tmp_path / "dit.pt", "--noise.name ddpm")
    for flags in ("", "--noise.name flow"):
        assert refusal(tmp_path / "dit.pt", flags).endswith("it predicts a variance too: take --noise.name ddpm")
    assert refusal(tmp_path / "dit.pt", SIT).endswith("is not zero, as SiT's is; take --noise.name ddpm")


@pytest.mark.parametrize("flags", ["", "--noise.name flow", SIT, REPA])
def test_projectors_tell_a_file_of_repa(tmp_path, flags):
    state = make_official(CASE) | {"projectors.0.0.weight": torch.zeros(3, 3)}
    torch.save({"ema": state}, tmp_path / "repa.pt")
    if flags == REPA:
        start(tmp_path / "repa.pt", flags)
    else:
        assert refusal(tmp_path / "repa.pt", flags).endswith("--noise.flow.convention repa")


@pytest.mark.parametrize(("arguments", "fitting"), [(SIT_ARGUMENTS, SIT), (REPA_ARGUMENTS, REPA)], ids=["sit", "repa"])
@pytest.mark.parametrize("flags", ["", "--noise.name ddpm", "--noise.name flow", SIT, REPA])
def test_training_arguments_tell_the_convention(tmp_path, arguments, fitting, flags):
    path, state = tmp_path / "0050000.pt", make_official(CASE)
    torch.save({"model": state, "ema": state, "opt": {}, "args": arguments}, path)
    if flags == fitting:
        start(path, flags)
        return
    text = refusal(path, flags)
    assert text.startswith("its weights were trained with ")
    start(path, f"{flags} {text.partition('; take ')[2]}")


@pytest.mark.parametrize(("path_type", "prediction"), [("GVP", "velocity"), ("Linear", "noise"), ("cosine", "v")])
def test_other_paths_and_predictions_are_refused(tmp_path, path_type, prediction):
    arguments = {"path_type": path_type, "prediction": prediction}
    torch.save({"ema": make_official(CASE), "args": arguments}, tmp_path / "x.pt")
    for flags in ("", SIT, REPA):
        text = refusal(tmp_path / "x.pt", flags)
        assert text.startswith(
            f"it was trained on the path {path_type} to predict {prediction}; fastdit has the linear"
        )


@pytest.mark.parametrize("arguments", [{"prediction": "noise"}, {"path_type": ["a"], "prediction": 3}, {}])
def test_arguments_of_other_trainers_tell_nothing(tmp_path, arguments):
    torch.save({"ema": make_official(CASE), "args": arguments}, tmp_path / "x.pt")
    start(tmp_path / "x.pt", "--noise.name flow")


# Runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return the folder of a run of one step in SiT's convention, sampled by its SDE."""
    run = tmp_path_factory.mktemp("trained") / "run"
    flags = [*SIT.split(), "--sample.sampler", "euler_maruyama", "--sample.steps", 5]
    forked(*TINY, *flags, "--steps", 1, "--out", run).succeeded()
    return run


@pytest.mark.launch
@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_an_export_starts_a_run_of_the_same_convention(trained, tmp_path, capsys, name):
    path, exported = tmp_path / name, averages(trained, 1)
    _export(["--run", str(trained), "--out", str(path)])
    told = capsys.readouterr().out
    flags = [*TINY, "--steps", 1, "--lr", 0, "--init_from", path]
    outcome = forked(*flags, *SIT.split(), "--out", tmp_path / "same").succeeded()
    assert "convention: sit" in (tmp_path / "same/config.yaml").read_text(), outcome.text
    assert all(torch.equal(value, exported[key]) for key, value in averages(tmp_path / "same", 1).items())
    if name == "w.pt":  # which has no place for a description
        assert f"start from them with {SIT}\n" in told
        return
    assert load_file(path).keys() == exported.keys()
    outcome = forked(*flags, "--noise.name", "flow", "--out", tmp_path / "other")
    assert outcome.code == 2
    text = outcome.text.strip().splitlines()[-1]
    assert text == (
        f"error: {path}: its weights were trained with noise.flow.convention sit, this run has own; "
        "take --noise.flow.convention sit"
    )


@pytest.mark.launch
def test_a_run_keeps_its_convention(trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    outcome = forked("--resume", "--out", run, "--steps", 2, "--noise.flow.convention", "own")
    assert outcome.code == 2
    assert "was written with noise.flow.convention sit, this run has own" in outcome.text.splitlines()[-1]
    forked("--resume", "--out", run, "--steps", 2).succeeded()
    # With another convention in the run's settings, nothing is drawn.
    settings = run / "config.yaml"
    settings.write_text(settings.read_text().replace("convention: sit", "convention: repa"))
    with pytest.raises(UserError, match=r"has noise\.flow\.convention sit, .* has repa; give one of that run"):
        _sample(["--run", str(run), "--device", "cpu", "--out", str(tmp_path / "x.npz")])


def test_settings_that_older_checkpoints_do_not_hold(tmp_path):
    """A flow's convention was ours. Those of EDM and DDPM are not known, and not compared."""
    (tmp_path / "manifest.json").write_text(json.dumps({"step": 1, "sha256": {}}))
    assert first_difference(tmp_path, {"noise.flow.convention": "own"}) is None
    found = first_difference(tmp_path, {"noise.flow.convention": "sit"})
    assert found == ("noise.flow.convention", "own", "sit")
    assert first_difference(tmp_path, {"noise.edm.sigma_data": 0.7}) is None
    assert first_difference(tmp_path, {"sd_dit.split": 3}) == ("sd_dit.split", None, 3)


@pytest.mark.launch
def test_samples_of_the_sde_depend_on_seed_and_index_alone(trained, tmp_path):
    def drawn(flags=""):
        out = tmp_path / "x.npz"
        _sample(["--run", str(trained), "--device", "cpu", "--out", str(out), *flags.split()])
        return np.load(out)["images"]

    many = drawn("--n 14")  # more than a batch
    assert np.array_equal(many, drawn("--n 14"))
    assert np.array_equal(many[:3], drawn("--n 3"))
    for flags in ("--seed 1", "--diffusion_form decreasing", "--diffusion_norm 0.5", "--last_step_size 0.2"):
        assert not np.array_equal(many[:3], drawn(f"--n 3 {flags}")), flags
    assert np.array_equal(many[:3], drawn("--n 3 --diffusion_form sigma --diffusion_norm 1 --last_step_size 0.04"))
    for flags, words in (
        ("--diffusion_form cosine", "diffusion_form"),
        ("--last_step_size 0", r"sample\.last_step_size: must be from 0\.0001"),
        ("--sampler ddim", "flow has no 'ddim'; choose one of heun, euler, full_heun, euler_maruyama"),
    ):
        with pytest.raises(UserError, match=words):
            drawn(flags)
    assert re.search(r"euler_maruyama \(sigma x 1, last step 0\.04\), 5 steps", (trained / "report.html").read_text())
