"""Test files that people have: containers, prefixes, shards, variants, and what is no checkpoint at all."""

import argparse
import bz2
import collections
import gzip
import io
import json
import pickle
import re
import subprocess
import sys
import tarfile
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from launching import ROOT
from safetensors.torch import load_file, save_file
from test_pretrained import CASES, SMALL, assert_refused, make_diffusers, make_official, same

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.models import DiT, load_checkpoint
from fastdit.models.pretrained import to_official
from fastdit.parser import parse

EMA, MODEL = make_official(SMALL, seed=4), make_official(SMALL, seed=5)


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def loaded(path, **options):
    """Return the loaded weights in the original layout, and the lines that were said."""
    lines, model = [], DiT(**SMALL)
    load_checkpoint(model, path, say=lines.append, **options)
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in lines)
    return to_official(model.state_dict(), model.grid), "\n".join(lines)


# Containers and prefixes


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (EMA, ""),
        (prefixed(EMA, "module."), ""),
        (prefixed(EMA, "_orig_mod."), ""),
        (prefixed(EMA, "module._orig_mod."), ""),
        ({key.replace("blocks.1.", "blocks.1._orig_mod."): value for key, value in EMA.items()}, ""),
        (prefixed(EMA, "model."), "starting from its weights, model; it holds no EMA weights"),
        (prefixed(EMA, "module.model._orig_mod."), "starting from its weights, model; it holds no"),
        ({"ema": prefixed(EMA, "module.")}, "starting from its EMA weights, ema"),
        ({"model": EMA, "step": 3}, "starting from its weights, model; it holds no EMA weights"),
        ({"model": MODEL, "ema": EMA}, "its EMA weights, ema; --init_weights chooses others: model"),
        ({"ema": EMA, "model": MODEL, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}}}, "others: model"),
        ({"state_dict": MODEL, "ema_state_dict": EMA}, "EMA weights, ema_state_dict; --init_weights chooses others"),
        ({"state_dict": {"model": MODEL, "model_ema": prefixed(EMA, "module.")}}, "EMA weights, state_dict.model_ema"),
        ({"state_dict": prefixed(MODEL, "model.") | prefixed(EMA, "ema_model.")}, "EMA weights, state_dict.ema_model"),
        ({"non_ema": MODEL, "ema": EMA}, "its EMA weights, ema; --init_weights chooses others: non_ema"),
        ({"module": prefixed(EMA, "module."), "optimizer": None}, "starting from its weights, module"),
        ({"n_averaged": torch.tensor(5)} | prefixed(EMA, "module."), "left out 1 tensors .* an EMA's counters"),
        (EMA | {"projectors.0.0.weight": torch.ones(3), "projectors.0.0.bias": torch.ones(3)}, "left out 2 .*REPA"),
        ({"ema": collections.OrderedDict(EMA), "model": 5}, "EMA weights, ema"),
    ],
)
@pytest.mark.parametrize("legacy", [False, True])
def test_containers_and_prefixes(tmp_path, content, line, legacy):
    torch.save(content, tmp_path / "dit.pt", _use_new_zipfile_serialization=not legacy)
    weights, said = loaded(tmp_path / "dit.pt")
    assert same(weights, EMA)
    assert re.search(line, said) if line else not said, said


def test_averages_without_names_are_not_passed_over(tmp_path):
    torch.save({"model": MODEL, "ema": {"decay": 0.99, "shadow_params": list(EMA.values())}}, tmp_path / "dit.pt")
    refused = "its EMA weights, ema.shadow_params, are a list without names, .* --init_weights model"
    with pytest.raises(UserError, match=refused):
        loaded(tmp_path / "dit.pt")
    assert same(loaded(tmp_path / "dit.pt", weights="model")[0], MODEL)


@pytest.mark.parametrize(("word", "expected"), [("model", MODEL), ("ema", EMA), ("train.ema", EMA), (None, EMA)])
def test_a_flag_chooses_the_weights(tmp_path, word, expected):
    torch.save({"train": {"model": MODEL, "ema": EMA}}, tmp_path / "dit.pt")
    assert same(loaded(tmp_path / "dit.pt", weights=word)[0], expected)


def test_the_flag_in_a_run(tmp_path, capsys):
    tiny = {"input_size": 28, "patch": 7, "channels": 1, "width": 32, "depth": 1, "heads": 2, "classes": 10}
    first, second = make_official(tiny, seed=1), make_official(tiny, seed=2)
    torch.save({"model": first, "ema": second}, tmp_path / "dit.pt")
    flags = "--data.size 28 --data.channels 1 --model.patch 7 --model.width 32 --model.depth 1 --model.heads 2"
    flags = [*flags.split(), "--init_from", str(tmp_path / "dit.pt")]
    for word, expected in (("model", first), (None, second)):
        config = parse([*flags, *(["--init_weights", word] if word else [])])
        network, _ = run_parts.build_training(config, run_parts.Shape(1, 28, 28, 10))
        assert torch.equal(network.blocks[0].qkv.weight, expected["blocks.0.attn.qkv.weight"])
    assert "starting from its EMA weights, ema; --init_weights chooses others: model" in capsys.readouterr().out
    with pytest.raises(UserError, match="init_weights: chooses weights in a file; give --init_from too"):
        parse(["--init_weights", "ema"])


def test_an_unknown_choice_is_refused(tmp_path):
    torch.save({"model": MODEL, "ema": EMA}, tmp_path / "dit.pt")
    with pytest.raises(UserError, match="no weights called 'raw', only model, ema; change --init_weights"):
        loaded(tmp_path / "dit.pt", weights="raw")


def test_safetensors_with_prefixes_and_either_name(tmp_path):
    """The content decides how a file is read, and not its name."""
    save_file({key: value.contiguous() for key, value in prefixed(EMA, "module.").items()}, tmp_path / "dit.bin")
    torch.save(EMA, tmp_path / "dit.safetensors")
    for name in ("dit.bin", "dit.safetensors"):
        assert same(loaded(tmp_path / name)[0], EMA)


# Folders of diffusers


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_folders(tmp_path, safe, variant):
    reference, whole, model = make_diffusers(SMALL), DiT(**SMALL), DiT(**SMALL)
    reference.save_pretrained(tmp_path / "whole")
    load_checkpoint(whole, tmp_path / "whole")
    place = tmp_path / "pipeline" / "transformer"
    reference.save_pretrained(place, safe_serialization=safe, variant=variant, max_shard_size="200KB")
    (index,) = place.glob("*.index*.json")
    load_checkpoint(model, place)
    assert same(model.state_dict(), whole.state_dict())
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    load_checkpoint(model, tmp_path / "pipeline")
    shard = sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    (place / shard).unlink()
    assert_refused(model, place, f"{index.name} lists {shard}, which is not in the folder")
    index.write_text("{}")
    assert_refused(model, place, f"{index.name} cannot be read")


def test_variants(tmp_path):
    reference, lines = make_diffusers(SMALL), []
    reference.save_pretrained(tmp_path, variant="fp16")
    model = DiT(**SMALL)
    load_checkpoint(model, tmp_path, say=lines.append)
    assert lines == [f"{tmp_path}: starting from diffusion_pytorch_model.fp16.safetensors"]
    half = model.head.bias.detach().clone()
    with torch.no_grad():
        reference.proj_out_2.bias += 1
    reference.save_pretrained(tmp_path)
    load_checkpoint(model, tmp_path, say=lines.append)
    assert torch.equal(model.head.bias, reference.proj_out_2.bias)
    assert lines[-1].endswith("model.safetensors; --init_weights chooses other variants: fp16")
    load_checkpoint(model, tmp_path, weights="fp16")
    assert torch.equal(model.head.bias, half)
    with pytest.raises(UserError, match=r"no variant 'bf16' of the weights, only \(without a variant\), fp16"):
        load_checkpoint(model, tmp_path, weights="bf16")
    assert_refused(model, tmp_path / "diffusion_pytorch_model.safetensors", "weights of diffusers; give the folder")


def test_a_run_is_not_a_folder_of_weights(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("steps: 1\n")
    assert_refused(DiT(**SMALL), tmp_path, "it is a run; export its weights first: fastdit-export --run")


# What is something else


def archive(kind):
    """Return the bytes of an archive with a text in it."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("readme.txt", "weights")
    elif kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as file:
            file.addfile(tarfile.TarInfo("x"), io.BytesIO())
    elif kind == "npz":
        np.savez(buffer, a=np.ones(3))
    elif kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 2700611775\n"


@pytest.mark.parametrize("name", ["dit.pt", "dit.safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty; copy or download it again"),
        (LFS, "it is a Git LFS pointer, not the file itself; fetch the file with: git lfs pull"),
        (b"\n<!DOCTYPE html>\n<html><body>Not found</body></html>", "it is an HTML page; download the file itself"),
        (b"<html>", "it is an HTML page"),
        (gzip.compress(b"weights"), "it is compressed with gzip; unpack it with: gunzip"),
        (bz2.compress(b"weights"), "it is compressed with bzip2"),
        (archive("tar"), "it is a tar archive"),
        (archive("zip"), "it is a zip archive that torch.save did not write"),
        (archive("npz"), "it is an archive of NumPy arrays"),
        (archive("script"), "it is a TorchScript module"),
        (archive("zip")[:60], "it is cut short or damaged; copy or download it again"),
        (b"404: Not Found\n", "it is a text file"),
        (b'{"weight_map": {}}', "it is a text file"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,
)
def test_other_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert_refused(DiT(**SMALL), tmp_path / name, f"{name} cannot be read as a checkpoint: {words}")


def test_plain_pickles_are_not_loaded(tmp_path):
    for protocol in (2, 5):
        (tmp_path / "dit.pt").write_bytes(pickle.dumps({"a": 1}, protocol))
        assert_refused(DiT(**SMALL), tmp_path / "dit.pt", "it is a pickle that torch.save did not write, or damaged")


def test_the_command_ends_in_one_line(tmp_path):
    (tmp_path / "dit.pt").write_bytes(LFS)
    flags = ["--preset", "quickstart", "--device", "cpu", "--init_from", tmp_path / "dit.pt", "--out", tmp_path / "run"]
    done = subprocess.run([sys.executable, "fastdit/train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path}/dit.pt: dit.pt cannot be read")
    assert "Traceback" not in done.stderr


# Objects beside the weights


class Settings:
    """Stands for a class of a training script."""

    width = 3


class Hostile:
    """Would write a file if it were unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (
            (Path.touch, (Path(self.path),)) if isinstance(self.path, Path) else (exec, (f"open({self.path!r},'w')",))
        )


@pytest.mark.parametrize(
    "value",
    [
        argparse.Namespace(path=Path("x"), model="DiT-S/2", lr=np.float64(1e-4)),
        Path("x"),
        np.float32(0.5),
        np.arange(3),
        types.SimpleNamespace(a=1),
        collections.OrderedDict(a=1),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("legacy", [False, True])
def test_harmless_objects_do_not_matter(tmp_path, value, legacy):
    torch.save({"ema": EMA, "args": value}, tmp_path / "dit.pt", _use_new_zipfile_serialization=not legacy)
    assert same(loaded(tmp_path / "dit.pt")[0], EMA)


@pytest.mark.parametrize("legacy", [False, True])
def test_other_objects_are_named_by_type_with_the_remedy(tmp_path, legacy):
    """The remedy does what it says, and never suggests the unsafe loader."""
    path = tmp_path / "it's.pt"
    torch.save({"ema": EMA, "args": Settings()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError) as refused:
        loaded(path)
    text = str(refused.value)
    assert "it holds objects of type test_weight_files.Settings, and only tensors and plain values are read" in text
    assert "weights_only" not in text
    assert "\x1b" not in text
    assert "\n" not in text
    command = text[text.index("python -c") :].replace("python", sys.executable, 1)
    subprocess.run(
        ["sh", "-c", command],
        check=True,
        env={"PYTHONPATH": f"{ROOT}:{Path(__file__).parent}:{ROOT / 'tests/helpers'}"},
    )
    assert same(loaded(tmp_path / "it's-tensors.pt")[0], EMA)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("as_path", [False, True])
def test_nothing_runs(tmp_path, legacy, as_path):
    target = tmp_path / "ran"
    hostile = Hostile(target if as_path else str(target))
    torch.save({"ema": EMA, "args": hostile}, tmp_path / "dit.pt", _use_new_zipfile_serialization=not legacy)
    words = (
        "builtins.getattr|pathlib.*touch" if as_path else "it calls builtins.exec, which can run any code; do not use"
    )
    assert_refused(DiT(**SMALL), tmp_path / "dit.pt", words)
    assert not target.exists()


def test_a_whole_network_is_named(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "dit.pt")
    assert_refused(DiT(**SMALL), tmp_path / "dit.pt", "it holds a whole network .* save network.state_dict")


# The null class


@pytest.mark.parametrize("rows", [3, 1000])
@pytest.mark.parametrize("new_labels", [True, False])
def test_a_file_without_a_null_class(tmp_path, rows, new_labels):
    """The last class does not become the null label."""
    case, lines = CASES["patch4"] | {"classes": rows - 1}, []
    state = make_official(case)
    torch.save(state, tmp_path / "dit.pt")
    model = DiT(**case | {"classes": 3})
    fresh, table = model.label_embed.weight.detach().clone(), state["y_embedder.embedding_table.weight"]
    if rows == 1000 and not new_labels:
        return assert_refused(model, tmp_path / "dit.pt", "is 1000 in this file, 4 in this model; take --finetune all")
    load_checkpoint(model, tmp_path / "dit.pt", new_labels=new_labels, say=lines.append)
    expected = fresh if new_labels else torch.cat([table, fresh[-1:]])
    assert torch.equal(model.label_embed.weight, expected)
    assert lines == [
        f"{tmp_path}/dit.pt: its label table of {rows} rows has no null class; a new null label is trained"
    ]
    return None


@pytest.mark.parametrize(("declared", "has_null"), [(7, True), (8, False), (None, True)])
def test_the_files_own_number_of_classes_decides(tmp_path, declared, has_null):
    state = make_official(SMALL)  # 8 rows
    torch.save({"ema": state, "args": argparse.Namespace(num_classes=declared)}, tmp_path / "dit.pt")
    model, lines = DiT(**SMALL | {"classes": 3}), []
    load_checkpoint(model, tmp_path / "dit.pt", new_labels=True, say=lines.append)
    stored = state["y_embedder.embedding_table.weight"][-1]
    assert torch.equal(model.label_embed.weight[-1], stored) == has_null
    words = "the last of its 8 label rows is taken as the null label" if declared is None else "has no null class"
    assert any(words in line for line in lines) == (declared != 7)


def test_published_sizes_have_a_flag(tmp_path):
    small = {"input_size": 4, "patch": 2, "channels": 1, "classes": 2, "width": 384, "depth": 12, "heads": 6}
    save_file(DiT(**small).state_dict(), tmp_path / "dit.safetensors")
    assert load_file(tmp_path / "dit.safetensors")
    wide = DiT(**small | {"width": 768, "heads": 12})
    assert_refused(wide, tmp_path / "dit.safetensors", "width is 384 in this file, 768 .*; take --model.size S$")
    odd = DiT(**small | {"depth": 2})
    assert_refused(odd, tmp_path / "dit.safetensors", "take --model.depth 12 --model.width 384 --model.heads 6")
