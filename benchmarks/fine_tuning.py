"""Prepare the comparison of methods that fine-tune to few images: `python benchmarks/fine_tuning.py --out FOLDER`.

All data are the shipped 10,000 images of Fashion-MNIST. A plain DiT is pretrained on five of the classes. Each method
then starts from its EMA weights and learns the five other classes from 200 or 500 images. FOLDER gets

    pretrain.tar              all images of classes 0 to 4
    few200.tar, few500.tar    images of classes 5 to 9, equally many of each, relabeled 0 to 4; few500 holds few200
    reference.tar             the other images of classes 5 to 9: held out, to compare samples with
    pretraining               the run of the plain DiT
    pretrained.safetensors    its EMA weights, for --init_from

The command ends with the commands of the comparison, or with `--run` carries them out. They write their journals and
records into FOLDER too. What FOLDER holds already is kept, so that the same command goes on where it was stopped.
"""

import ctypes
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import record as records

from fastdit.command_line import OneLineParser
from fastdit.data import Source, open_source, write_shard
from fastdit.errors import EXIT_CODE, UserError, run_command
from fastdit.parser import parse

ROOT = Path(__file__).parents[1]
DATA, PRETRAINED_CLASSES = "fashion_mnist", 5
COUNTS = (200, 500)  # images to fine-tune on
SEED = 0  # chooses them
CONTENDERS = "sadm_fixed,sadm,psi_align"  # plain DiT is always one more
TEXTS = ("--train", "--compare")  # flags whose value is a text of flags


def main(argv: list[str] | None = None) -> None:
    """Leave the process: 0, or 2 after a UserError."""
    for number in (signal.SIGTERM, signal.SIGINT):  # an exception, which stops the command that runs
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    run_command(_prepare, argv)


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="fine_tuning.py", description="Prepare the comparison of methods that fine-tune.")
    add = parser.add_argument
    add("--out", type=str, required=True, help="folder of everything that is made; what it holds is kept")
    add("--steps", type=int, default=1000, help="steps of pretraining")
    add("--lr", type=float, default=4e-3, help="learning rate of pretraining")
    add("--train", type=str, default="", help="more flags of fastdit/train.py for pretraining")
    add("--compare", type=str, default="", help="more flags of benchmarks/convergence.py for the comparison")
    add("--run", type=bool, default=False, nargs="?", const=True, help="carry out the comparison, not only print it")
    return parser


def _prepare(argv: list[str]) -> None:
    args = _parser().parse(_joined(argv, TEXTS))
    folder = Path(args.out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; name a folder")
    settings = {"steps": args.steps, "lr": args.lr, "train": args.train}

    # Every bad flag is told before anything is made.
    train = _train_words(folder, **settings)
    parse(train)
    commands = [comparison(folder, count, args.compare) for count in COUNTS]
    _settle(folder, settings)

    source = open_source(DATA)
    for name, ids in choose(source.labels).items():
        _make_shard(folder / f"{name}.tar", source, ids)
    _pretrain(folder, train, args.steps)
    for command in commands:
        print(shlex.join(["python", *command]), flush=True)
        if args.run:
            _call([str(ROOT / command[0]), *command[1:]])


def _joined(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    """Return the words with each `--flag TEXT` of `flags` as one word, for else TEXT is taken for a flag itself."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] in flags:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _split(flag: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{flag} {text}: cannot be split into words ({error}); mend its quotes") from None


def _train_words(folder: Path, steps: int, lr: float, train: str) -> list[str]:
    """Return the flags of fastdit/train.py for pretraining. The steps, rate, data and folder come last, so they win."""
    return [
        "--preset", "quickstart", *_split("--train", train), "--data.source", str(folder / "pretrain.tar"),
        "--steps", str(steps), "--lr", repr(lr), "--out", str(folder / "pretraining"), "--resume",
    ]  # fmt: skip


def comparison(folder: Path, count: int, more: str) -> list[str]:
    """Return the script and flags that compare methods on `count` images. A `--common` in `more` adds to ours."""
    words, common = [], f"--init_from {shlex.quote(str(folder / 'pretrained.safetensors'))} --finetune all"
    for word in _joined(_split("--compare", more), ("--common",)):
        if word.startswith("--common="):
            common += " " + word.removeprefix("--common=")
        else:
            words.append(word)
    few = f"few{count}"
    return [
        "benchmarks/convergence.py", "--preset", "quickstart", "--data", str(folder / f"{few}.tar"),
        "--reference", str(folder / "reference.tar"), f"--common={common}", "--contenders", CONTENDERS,
        "--journal", str(folder / f"{few}.jsonl"), "--json", str(folder / f"{few}.json"), *words,
    ]  # fmt: skip


def _settle(folder: Path, settings: dict) -> None:
    """Keep the settings of pretraining in the folder. Raises UserError where it was pretrained with others."""
    path = records.writable("out", str(folder / "pretraining.json"))
    text = path.read_text(encoding="utf-8")
    if not text:  # `writable` made the file
        return records.write_json(settings, path, load=False)
    try:
        kept = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: is not JSON ({error}); give another --out") from None
    if kept != settings:
        flags = shlex.join(word for name, value in kept.items() for word in (f"--{name}", str(value)))
        raise UserError(f"--out {folder}: was pretrained with {flags}; give the same flags, or another --out")


def choose(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the ids of the images in each shard by its name; they are the same in every call.

    labels: int64 (n,), the class labels of all images.
    """
    rng = np.random.default_rng(SEED)
    new = [rng.permutation(np.flatnonzero(labels == c)) for c in range(PRETRAINED_CLASSES, labels.max() + 1)]
    chosen = {"pretrain": np.flatnonzero(labels < PRETRAINED_CLASSES)}
    for count in COUNTS:
        chosen[f"few{count}"] = np.sort(np.concatenate([ids[: count // len(new)] for ids in new]))
    chosen["reference"] = np.sort(np.concatenate([ids[max(COUNTS) // len(new) :] for ids in new]))
    return chosen


def _make_shard(path: Path, source: Source, ids: np.ndarray) -> None:
    """Write images and their labels to a shard, unless it is there."""
    if not path.exists():
        write_shard(path, _samples(source, ids))
        print(f"{path}: {len(ids):,} images", flush=True)


def _samples(source: Source, ids: np.ndarray) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield images as they are stored, with labels that begin at 0."""
    first = source.labels[ids].min()
    for i in ids.tolist():
        files = {"png": source.read(i).tobytes(), "cls": str(source.labels[i] - first).encode()}
        yield source.samples.keys[i].decode(), files


def _pretrain(folder: Path, flags: list[str], steps: int) -> None:
    """Train the plain DiT to its end and export its EMA weights, unless they are there. Raises UserError."""
    weights, run = folder / "pretrained.safetensors", folder / "pretraining"
    if weights.exists():
        return
    last = run / "checkpoints" / f"step-{steps:08d}"
    if not last.exists():
        _call([str(ROOT / "fastdit" / "train.py"), *flags])
    if not last.exists():
        raise UserError(f"{run}: pretraining was stopped before its end; the same command goes on")
    # The file has another name until it is whole.
    unfinished = folder / "unfinished.safetensors"
    script = str(ROOT / "fastdit" / "export.py")
    _call([script, "--run", str(run), "--checkpoint", str(last), "--out", str(unfinished)])
    unfinished.replace(weights)
    print(f"{weights}: EMA weights after {steps} steps", flush=True)


def _call(command: list[str]) -> None:
    """Run a Python script to its end. Its process ends with this one. Raises UserError where it fails."""
    process = subprocess.Popen([sys.executable, *command], preexec_fn=_die_with_parent)
    try:
        code = process.wait()
    except BaseException:  # SIGTERM or Ctrl-C: training saves a checkpoint
        process.terminate()
        process.wait()
        raise
    if code == EXIT_CODE:  # its own line says why
        sys.exit(EXIT_CODE)
    if code:
        raise UserError(f"{command[0]}: ended with code {code}; its last lines say why, and the same command goes on")


def _die_with_parent() -> None:
    """In the new process: ask Linux to kill it when its parent is killed. Else two calls could train one run."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main()
