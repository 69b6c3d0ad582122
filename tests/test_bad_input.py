"""Training on what a user can get wrong: one line that names the file or field and the remedy, before time is lost.

All cases run in one other process, because training joins a process group and sets the device of a process.
"""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdit.data import write_shards
from fastdit.models import DiT, save_official

TRAIN = Path(__file__).parents[1] / "fastdit/train.py"
TINY = {
    "batch": 4,
    "steps": 2,
    "data.size": 8,
    "data.channels": 1,
    "model.patch": 4,
    "model.width": 16,
    "model.depth": 1,
    "model.heads": 2,
    "device": "cpu",
    "sample.steps": 1,
    "threads": 1,
}


def png(seed: int, mode: str = "L") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8) if mode == "L" else (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def shard(folder: Path, images: list[bytes], labels=(0, 1, 2)) -> Path:
    folder.mkdir()
    samples = (
        (f"s{i:02d}", {"png": data, "cls": str(labels[i % len(labels)]).encode()}) for i, data in enumerate(images)
    )
    write_shards(folder / "x-%02d.tar", samples, len(images))
    return folder / "x-00.tar"


def make_inputs(home: Path) -> None:
    """Good and bad data, settings and checkpoints."""
    good = [png(i) for i in range(8)]
    shard(home / "grey", good)
    cut = shard(home / "cut", good)
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    corrupt = png(9)[:40] + b"\0" * 40
    shard(home / "corrupt", [*good[:3], corrupt, *good[3:]])
    (home / "empty").mkdir()
    (home / "tree/cat").mkdir(parents=True)
    (home / "tree/dog").mkdir()
    (home / "tree/cat/1.png").write_bytes(png(1))
    (home / "file.txt").write_text("hello")
    (home / "run").mkdir()
    (home / "run/metrics.jsonl").write_text("steps: 1\n")
    (home / "mine.yaml").write_text("model: {wdith: 3}\n")
    (home / "fp16.json").write_text('{"fp16": {"enabled": true}}')
    (home / "batch.json").write_text('{"train_batch_size": 32}')
    (home / "broken.json").write_text('{"train_batch_size": 32')
    (home / "junk.pt").write_bytes(b"junk")
    torch.save({"epoch": 3}, home / "other.pt")
    kept = {"input_size": 8, "patch": 4, "channels": 1, "depth": 1, "heads": 2, "classes": 3}
    for width in (16, 24):
        network = DiT(width=width, **kept)
        save_official(network.state_dict(), home / f"w{width}.pt", grid=network.grid)


@dataclass(frozen=True)
class Case:
    """Hold the flags that are wrong beside a tiny run on grey 8x8 images; `words` must be in the line."""

    name: str
    flags: dict
    words: tuple[str, ...]


CASES = [
    Case("preset", {"preset": "nope"}, ("--preset nope", "quickstart")),
    Case("field", {"model.wdith": 3}, ("--model.wdith", "--model.width?")),
    Case("field in a file", {"preset": "{home}/mine.yaml"}, ("mine.yaml", "model.wdith", "model.width?")),
    Case("type", {"lr": "fast"}, ("lr:", "a number", "fast")),
    Case("no such data", {"data.source": "{home}/none"}, ("{home}/none", "no such file or folder", "fashion_mnist")),
    Case("empty folder", {"data.source": "{home}/empty"}, ("{home}/empty", "neither .tar shards nor class folders")),
    Case("empty class folder", {"data.source": "{home}/tree"}, ("{home}/tree/dog", "holds no images")),
    Case("not a shard", {"data.source": "{home}/file.txt"}, ("{home}/file.txt",)),
    Case("cut shard", {"data.source": "{home}/cut"}, ("{home}/cut/x-00.tar", "truncated", "copy or make it again")),
    Case("corrupt image", {"data.source": "{home}/corrupt"}, ("x-00.tar", "s03", "corrupt", "on_corrupt")),
    Case("grey, not colour", {"data.channels": 3}, ("{home}/grey", "x-00.tar", "channel", "3")),
    Case("five channels", {"data.channels": 5}, ("{home}/grey", "1 or 3 channels", "5")),
    Case("label out of range", {"data.classes": 2}, ("x-00.tar", "label 2 is out of range", "2 classes")),
    Case("latents of another shape", {"data.source": "synthetic:4x8x8:3:9"}, ("(4, 8, 8)", "(1, 8, 8)")),
    Case("other width", {"init_from": "{home}/w24.pt"}, ("{home}/w24.pt", "24", "16")),
    Case("other depth", {"init_from": "{home}/w16.pt", "model.depth": 2}, ("{home}/w16.pt",)),
    Case("other classes", {"init_from": "{home}/w16.pt", "data.classes": 9}, ("{home}/w16.pt",)),
    Case("not a checkpoint", {"init_from": "{home}/junk.pt"}, ("{home}/junk.pt",)),
    Case("another kind of .pt", {"init_from": "{home}/other.pt"}, ("{home}/other.pt",)),
    Case("no checkpoint", {"init_from": "{home}/none.pt"}, ("{home}/none.pt",)),
    Case("a run is there", {"out": "{home}/run"}, ("--out {home}/run", "already holds a run", "--resume")),
    Case("resume another run", {"out": "{home}/done", "resume": "true", "model.depth": 2}, ("model.depth 1", "has 2")),
    Case("heads", {"model.heads": 3}, ("model.width", "16", "model.heads (3)")),
    Case("patch", {"model.patch": 3}, ("data.size", "8", "model.patch (3)")),
    Case("batch", {"batch": 5, "micro_batch": 2}, ("batch: 5", "micro_batch 2")),
    Case("no batch", {"batch": "null"}, ("batch: not set", "--batch")),
    Case("attention", {"model.attention": "flsh"}, ("model.attention", "'math'", "flsh")),
    Case("sampler", {"sample.sampler": "ddim"}, ("sample.sampler", "edm", "heun, euler")),
    Case("interval", {"sample.interval": "[2,1]"}, ("sample.interval", "below")),
    Case("sampler steps", {"noise.name": "ddpm", "sample.steps": 2000}, ("sample.steps", "1000")),
    Case("optimizer", {"optimizer": "apex"}, ("optimizer: apex", "--optimizer fastdit")),
    Case("no ds_config", {"ds_config": "zero7"}, ("--ds_config zero7", "zero0, zero1, zero2, zero3")),
    Case("fp16", {"ds_config": "{home}/fp16.json"}, ("fp16.json", "bf16")),
    Case("broken ds_config", {"ds_config": "{home}/broken.json"}, ("broken.json", "not valid JSON")),
    Case("ds_config's batch", {"ds_config": "{home}/batch.json"}, ("batch.json", "is 32", "--batch is 4")),
]
IN_A_BATCH = ("corrupt image", "grey, not colour")
NO_GPU = Case("device", {"device": "cuda"}, ("--device cuda", "--device cpu"))
UNUSABLE = Case("attention that cannot be used", {"model.attention": "cudnn"}, ("attention", "cudnn", "CUDA"))

DRIVER = """
import json, sys, traceback
import torch.distributed
from fastdit.errors import UserError
from fastdit.train import _train

torch.distributed.destroy_process_group = lambda: None  # a process can join one once; the cases share it
for name, argv in json.load(open(sys.argv[1])):
    try:
        _train(argv)
        told = {"kind": "trained"}
    except UserError as error:
        told = {"kind": "UserError", "text": str(error)}
    except BaseException as error:
        told = {"kind": type(error).__name__, "text": traceback.format_exc()}
    print("\\nTOLD " + json.dumps([name, told]), flush=True)
"""


def arguments(home: Path, number: int, flags: dict) -> list[str]:
    flags = {"data.source": "{home}/grey", "out": f"{{home}}/out-{number}", **TINY, **flags}
    return [part.format(home=home) for key, value in flags.items() for part in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    make_inputs(home)
    return home


@pytest.fixture(scope="module")
def told(home) -> dict[str, dict]:
    """Return how each case ended, by its name; "good" and "skip", which must train, come first."""
    runs = [Case("good", {"out": "{home}/done"}, ())]
    runs += [Case("skip", {"data.source": "{home}/corrupt", "data.on_corrupt": "skip", "batch": 9}, ())]
    runs += [*CASES, NO_GPU, UNUSABLE]
    argvs = [(case.name, arguments(home, i, case.flags)) for i, case in enumerate(runs)]
    (home / "cases.json").write_text(json.dumps(argvs))
    clean = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", DRIVER, home / "cases.json"]
    answer = subprocess.run(command, capture_output=True, text=True, env=clean)
    lines = [line.removeprefix("TOLD ") for line in answer.stdout.splitlines() if line.startswith("TOLD ")]
    assert len(lines) == len(runs), answer.stderr
    return dict(json.loads(line) for line in lines)


def check(told: dict[str, dict], case: Case, home: Path) -> None:
    outcome = told[case.name]
    assert outcome["kind"] == "UserError", outcome.get("text", "it trained")
    text = outcome["text"]
    assert "\n" not in text
    assert len(text) < 400
    assert [word for word in case.words if word.format(home=home) not in text] == [], text


def test_good_input_trains(told, home):
    assert told["good"]["kind"] == "trained", told["good"]
    assert (home / "done/report.html").is_file()


def test_a_corrupt_image_can_be_skipped_and_is_counted(told, home):
    assert told["skip"]["kind"] == "trained", told["skip"]
    lines = (home / "out-1/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["corrupt_skipped"] == 1


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_each_mistake_is_one_line_that_names_it(told, case, home):
    check(told, case, home)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(told, home):
    check(told, NO_GPU, home)


def test_an_attention_backend_that_cannot_be_used_here(told, home):
    check(told, UNUSABLE, home)


def test_nothing_is_left_behind_and_nothing_is_lost(told, home):
    """A refused start writes no run, so that the mended command works in the same folder; and it touches no other."""
    left = {path.name for path in home.glob("out-*")}
    seen_in_the_first_batch = {f"out-{2 + i}" for i, case in enumerate(CASES) if case.name in IN_A_BATCH}
    assert left == {"out-1", *seen_in_the_first_batch}
    assert not any((home / name / "checkpoints").exists() for name in seen_in_the_first_batch)
    assert (home / "run/metrics.jsonl").read_text() == "steps: 1\n"
    assert [path.name for path in (home / "run").iterdir()] == ["metrics.jsonl"]


def test_the_command_exits_with_2_and_one_line(home):
    flags = arguments(home, 99, {"data.source": "{home}/none"})
    answer = subprocess.run([sys.executable, TRAIN, *flags], capture_output=True, text=True)
    assert answer.returncode == 2
    (line,) = answer.stderr.strip().splitlines()
    assert line.startswith(f"error: {home}/none: no such file or folder")
    assert answer.stdout.strip() == ""
