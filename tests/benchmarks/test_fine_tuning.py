"""benchmarks/fine_tuning.py: its shards, the pretrained weights, the commands it ends with, and what it keeps."""

import shlex
import signal
import sys

import numpy as np
import pytest
import torch
from launching import ROOT, Launched, averages, checkpoint, forked, metrics, python, run
from safetensors.torch import load_file

sys.path.insert(0, str(ROOT / "benchmarks"))
import fine_tuning

from fastdit.data import open_source
from fastdit.errors import UserError
from fastdit.parser import parse

MODEL = "--model.depth 2 --model.width 32 --model.heads 2 --model.patch 7"
TINY = f"--device cpu --threads 1 --data.threads 1 {MODEL} --batch 8 --sample.steps 2 --sample.agreement 0"
TINY += " --log_every 1 --sample.per_class 1"
FLAGS = ["--steps", "2", "--train", TINY, "--compare", f"--seeds 3 --common '{MODEL}' --device cpu"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Return the folder of a finished call, one with a space in its name, and what the call printed."""
    folder = tmp_path_factory.mktemp("fine tuning")
    return folder, forked("--out", folder, *FLAGS, program="fine_tuning").succeeded().text


def contents(path):
    """Return {key: (image bytes, label)} of a source."""
    source = open_source(str(path))
    return {source.samples.keys[i].decode(): (source.read(i).tobytes(), int(source.labels[i])) for i in range(source.n)}


@pytest.mark.launch
def test_shards(prepared):
    shipped = contents("fashion_mnist")
    shards = {name: contents(prepared[0] / f"{name}.tar") for name in ("pretrain", "few200", "few500", "reference")}
    for name, samples in shards.items():
        first = 0 if name == "pretrain" else 5
        assert all(shipped[key] == (image, label + first) for key, (image, label) in samples.items())
        counts = np.bincount([label for _, label in samples.values()])
        assert counts.tolist() == [{"pretrain": 1000, "few200": 40, "few500": 100, "reference": 900}[name]] * 5
    assert shards["few200"].keys() < shards["few500"].keys()
    assert not shards["reference"].keys() & shards["few500"].keys()
    assert len(shards["pretrain"]) + len(shards["few500"] | shards["reference"]) == len(shipped)


def test_choice_is_always_the_same():
    labels = open_source("fashion_mnist").labels
    first, again = fine_tuning.choose(labels), fine_tuning.choose(labels)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["few500"], np.flatnonzero(labels >= 5)[:500])


@pytest.mark.launch
def test_fine_tuning_starts_from_the_pretrained_weights(prepared, tmp_path):
    """With learning rate 0 the EMA after a step still has the pretrained weights, and only labels are new."""
    folder, _ = prepared
    own = ["--steps", 1, "--warmup", 0, "--lr", 0, "--seed", 1, "--out", tmp_path / "run"]
    start = ["--data.source", folder / "few200.tar", "--init_from", folder / "pretrained.safetensors"]
    flags = ["--preset", "quickstart", *shlex.split(TINY), *start, "--finetune", "all", *own]
    forked(*flags).succeeded()
    pretrained, found = load_file(folder / "pretrained.safetensors"), averages(tmp_path / "run", 1)
    assert found.keys() == pretrained.keys()
    for name, value in pretrained.items():
        if name == "label_embed.weight":
            assert found[name].shape == value.shape == (6, 32)
            assert (found[name] - value)[:-1].abs().amax(1).min() > 0.01
            value, found[name] = value[-1], found[name][-1]  # the null label's row
        torch.testing.assert_close(found[name], value)
    trained = averages(folder / "pretraining", 2)
    assert all(torch.equal(trained[name], value) for name, value in pretrained.items())


@pytest.mark.launch
def test_printed_commands_parse(prepared):
    import convergence

    folder, text = prepared
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python benchmarks/convergence.py")]
    assert len(commands) == 2
    for count, words in zip((200, 500), commands):
        args = convergence._parser().parse(words[2:])
        assert (args.preset, args.contenders) == ("quickstart", "sadm_fixed,sadm,psi_align")
        assert set(args.contenders.split(",")) <= convergence.CONTENDERS.keys()
        assert args.data == str(folder / f"few{count}.tar")
        assert args.reference == str(folder / "reference.tar")
        assert args.journal == str(folder / f"few{count}.jsonl")
        assert args.json == str(folder / f"few{count}.json")
        assert (args.seeds, args.device) == ("3", "cpu")
        config = parse(["--preset", "quickstart", *shlex.split(args.common)])
        assert (config.init_from, config.finetune) == (str(folder / "pretrained.safetensors"), "all")
        assert (config.model.depth, config.model.width) == (2, 32)


@pytest.mark.launch
def test_a_second_call_repeats_nothing(prepared):
    folder, text = prepared

    def times():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}

    before = times()
    again = forked("--out", folder, *FLAGS, program="fine_tuning").succeeded()
    assert times() == before
    assert again.text.splitlines() == text.splitlines()[-2:]
    with pytest.raises(UserError, match=r"was pretrained with --steps 2 --lr 0.004 --train .*another --out"):
        fine_tuning._prepare(["--out", str(folder), *FLAGS, "--steps", "3"])


@pytest.mark.launch
def test_run_carries_out_the_commands(prepared, monkeypatch):
    folder, text = prepared
    called = []
    monkeypatch.setattr(fine_tuning, "_call", called.append)
    fine_tuning._prepare(["--out", str(folder), *FLAGS, "--run"])
    printed = [shlex.split(line)[1:] for line in text.splitlines()[-2:]]
    assert called == [[str(ROOT / script), *words] for script, *words in printed]


@pytest.mark.launch
def test_a_killed_call_goes_on(tmp_path):
    """SIGKILL and SIGTERM of the command end its training run too, which the next call resumes."""
    folder = tmp_path / "made"
    flags = ["--out", folder, "--steps", 300, "--train", f"{TINY} --save_every 20 --keep_checkpoints 20"]
    command = python("benchmarks/fine_tuning.py", *flags)
    for number, step in ((signal.SIGKILL, 20), (signal.SIGTERM, 60)):
        with Launched(command, tmp_path / f"{number}.log") as launched:
            launched.until(checkpoint(folder / "pretraining", step).exists, f"step {step}")
            launched.process.send_signal(number)
            assert launched.wait().code == (-number if number == signal.SIGKILL else 128 + number)
        assert not (folder / "pretrained.safetensors").exists()
    assert "stopped by SIGTERM" in launched.text
    text = run(command, tmp_path / "last.log").succeeded().text
    assert "resumed" in text
    assert [line["step"] for line in metrics(folder / "pretraining")] == list(range(1, 301))
    assert (folder / "pretrained.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "/dev/null/x"], ["--out", "/dev/null/x"]),
        (["--steps", "0"], ["steps", "at least 1"]),
        (["--lr", "fast"], ["lr", "fast"]),
        (["--train", "--model.widht 3"], ["model.widht", "model.width"]),
        (["--train", "--model.width '3"], ["--train", "quotes"]),
        (["--compare", "--data 'x"], ["--compare", "quotes"]),
        (["--step", "3"], ["--step"]),
    ],
)
def test_bad_input_is_one_line(tmp_path, argv, words):
    with pytest.raises(UserError) as caught:
        fine_tuning._prepare(["--out", str(tmp_path / "made"), *argv])
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value
    assert not (tmp_path / "made").exists(), "bad flags are told before anything is made"


def test_bad_input_ends_with_code_2():
    ended = forked("--steps", "3", program="fine_tuning")
    assert ended.code == 2
    assert ended.text.strip().count("\n") == 0
    assert "--out: must be given" in ended.text


def test_a_failed_part_ends_the_command(tmp_path):
    script = tmp_path / "ends.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    fine_tuning._call([str(script), "0"])
    with pytest.raises(UserError, match="ended with code 3"):
        fine_tuning._call([str(script), "3"])
    with pytest.raises(SystemExit) as ended:
        fine_tuning._call([str(script), "2"])
    assert ended.value.code == 2
