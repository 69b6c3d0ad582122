"""Test what exports say of their weights, and that a run of another noise process refuses them."""

import json
from dataclasses import replace

import pytest
import torch
from launching import TINY, forked
from safetensors import safe_open
from safetensors.torch import save_file

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.export import main as export_command
from fastdit.models import load_checkpoint
from fastdit.parser import load, parse
from fastdit.weights_description import FORMAT, KEY, describe, read_description

SMALL = ["--data.size", "8", "--data.channels", "1", "--model.patch", "4", "--model.width", "16", "--model.depth", "1"]
SMALL += ["--model.heads", "2"]
SHAPE = run_parts.Shape(1, 8, 8, 3)


def written(path, *flags, metadata=None):
    """Write the initial weights of a small run as an export does."""
    config = parse([*SMALL, *flags])
    state = run_parts.build_network(config, SHAPE).state_dict()
    save_file(state, path, metadata=describe(config, SHAPE, ("a", "b", "c")) if metadata is None else metadata)
    return path


def start(path, *flags):
    return run_parts.build_training(parse([*SMALL, *flags, "--init_from", str(path)]), SHAPE)


@pytest.mark.parametrize(
    ("trained", "flags", "message"),
    [
        (["--noise.name", "flow"], [], "trained with the noise process flow, this run has edm; take --noise.name flow"),
        ([], ["--noise.name", "flow"], "trained with the noise process edm, .*; take --noise.name edm"),
        (["--noise.name", "ddpm"], [], "take --noise.name ddpm"),
        (["--noise.edm.sigma_data", "0.7"], [], "take --noise.edm.sigma_data 0.7"),
        (
            ["--noise.name", "ddpm", "--noise.ddpm.steps", "500"],
            ["--noise.name", "ddpm"],
            "trained with noise.ddpm.steps 500, this run has 1000; take --noise.ddpm.steps 500",
        ),
        (
            ["--noise.name", "flow", "--noise.flow.convention", "sit"],
            [],
            "take --noise.name flow --noise.flow.convention sit$",
        ),
        (
            ["--noise.name", "flow"],
            ["--noise.name", "flow", "--noise.flow.convention", "repa"],
            "trained with noise.flow.convention own, this run has repa; take --noise.flow.convention own$",
        ),
        (["--model.heads", "4"], [], "4 attention heads, this run's has 2; take --model.heads 4"),
    ],
)
def test_another_process_is_refused_with_the_flag(tmp_path, trained, flags, message):
    """The flag that the message names makes the run accept the file."""
    path = written(tmp_path / "w.safetensors", *trained)
    with pytest.raises(UserError, match=message) as refused:
        start(path, *flags)
    assert str(refused.value).startswith(f"{path}: ")
    start(path, *flags, *str(refused.value).split("; take ")[1].split())


def test_settings_of_training_and_sampling_may_differ(tmp_path):
    start(written(tmp_path / "w.safetensors"), "--noise.edm.p_mean", "-0.4", "--noise.edm.rho", "5")
    start(
        written(tmp_path / "flow.safetensors", "--noise.name", "flow"), "--noise.name", "flow", "--noise.flow.std", "2"
    )


def test_an_export_without_a_convention_has_ours(tmp_path):
    """Versions before the setting wrote none, and had no other."""
    flags = ["--noise.name", "flow"]
    described = json.loads(describe(parse([*SMALL, *flags]), SHAPE)[KEY])
    del described["noise"]["convention"]
    path = written(tmp_path / "w.safetensors", *flags, metadata={KEY: json.dumps(described)})
    start(path, *flags)
    with pytest.raises(UserError, match=r"take --noise\.flow\.convention own"):
        start(path, *flags, "--noise.flow.convention", "sit")


def test_another_scale_of_latents_is_said(tmp_path, capsys):
    path = written(tmp_path / "w.safetensors", "--data.latent_scale", "0.18215")
    start(path)
    assert (
        f"{path}: its weights were trained with data.latent_scale 0.18215, this run has 1.0" in capsys.readouterr().out
    )
    start(path, "--data.latent_scale", "0.18215")
    assert not capsys.readouterr().out


def test_the_description_tells_whether_there_is_a_null_class(tmp_path, capsys):
    """Nine classes and the null class make ten rows, which would else be taken for ten classes."""
    config, shape, path = parse(SMALL), replace(SHAPE, classes=9), tmp_path / "w.safetensors"
    state = run_parts.build_network(config, shape).state_dict()
    save_file(state, path, metadata=describe(config, shape))
    network, _ = start(path, "--finetune", "all")
    assert torch.equal(network.label_embed.weight[-1], state["label_embed.weight"][-1])
    assert not capsys.readouterr().out


def test_files_without_a_description_load(tmp_path):
    start(written(tmp_path / "w.safetensors", "--noise.name", "flow", metadata={}))
    assert read_description(tmp_path / "w.safetensors") is None
    assert read_description(tmp_path / "none.safetensors") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"format": FORMAT + 1}), "a later version of fastdit wrote it .format 2.; update fastdit"),
        ("{", "its metadata is not what fastdit writes; export it again"),
        ("[1]", "its metadata is not what fastdit writes"),
        ("{}", "its metadata is not what fastdit writes"),
        ('{"format": 1, "noise": 5}', "its metadata is not what fastdit writes"),
        ('{"format": 1, "noise": {}, "model": {}, "classes": "3"}', "its metadata is not what fastdit writes"),
    ],
)
def test_descriptions_that_are_not_understood(tmp_path, text, message):
    path = written(tmp_path / "w.safetensors", metadata={KEY: text})
    with pytest.raises(UserError, match=message):
        start(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    flags = ["--noise.name", "flow", "--data.latent_scale", "0.5", "--steps", 1]
    forked(*TINY, *flags, "--out", folder / "run").succeeded()
    return folder / "run"


def export(run, out):
    with pytest.raises(SystemExit) as ended:
        export_command(["--run", str(run), "--out", str(out)])
    assert ended.value.code == 0


@pytest.mark.launch
def test_an_export_describes_its_run(trained, tmp_path, capsys):
    export(trained, tmp_path / "w.safetensors")
    assert "note:" not in capsys.readouterr().out
    with safe_open(tmp_path / "w.safetensors", "pt") as file:
        found = json.loads(file.metadata()["fastdit"])
    config = load(trained / "config.yaml")
    names = run_parts.open_data(config).class_names
    assert found == {
        "format": 1,
        "noise": {
            "name": "flow",
            "law": "logit_normal",
            "mean": 0.0,
            "std": 1.0,
            "weighting": "output",
            "convention": "own",
        },
        "latent_scale": 0.5,
        "latent_shift": 0.0,
        "channels": 1,
        "size": [28, 28],
        "model": {"patch": config.model.patch, **config.model.dims()},
        "classes": 10,
        "class_names": list(names),
    }
    assert "Sneaker" in names
    flags = [*map(str, TINY), "--init_from", str(tmp_path / "w.safetensors")]
    with pytest.raises(UserError, match=r"take --noise\.name flow"):
        run_parts.build_training(parse(flags), run_parts.Shape(1, 28, 28, 10))


@pytest.mark.launch
def test_an_export_for_the_original_sampler_says_that_it_cannot_run_it(trained, tmp_path, capsys):
    export(trained, tmp_path / "dit.pt")
    assert "note: the original DiT's sampler cannot run them" in (text := capsys.readouterr().out)
    assert "noise process is flow; sample them with fastdit, and start from them with --noise.name flow" in text
    network = run_parts.build_network(parse([*map(str, TINY)]), run_parts.Shape(1, 28, 28, 10))
    load_checkpoint(network, tmp_path / "dit.pt")


@pytest.mark.launch
@pytest.mark.parametrize(("steps", "said"), [(1000, False), (500, True)])
def test_nothing_is_said_of_ddpm_with_the_originals_steps_and_betas(tmp_path, capsys, steps, said):
    flags = ["--noise.name", "ddpm", "--noise.ddpm.steps", steps, "--steps", 1]
    forked(*TINY, *flags, "--out", tmp_path / "run").succeeded()
    export(tmp_path / "run", tmp_path / "dit.pt")
    assert ("note: the original" in (text := capsys.readouterr().out)) == said
    assert ("ddpm with 500 steps and betas from 0.0001 to 0.02" in text) == said
    assert torch.load(tmp_path / "dit.pt", weights_only=True)
    assert torch.load(tmp_path / "dit.pt", weights_only=True)
