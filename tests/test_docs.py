"""README and docs: links lead somewhere, flags exist, generated pages are current, and the README's commands run.

The block of a day's commands runs as it stands, in one shell, with flags added that make networks and numbers small.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from data_helpers import encode, picture
from launching import PATIENCE, ROOT, Launched

from fastdit import parser as training_parser
from fastdit.parser import parse

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / name / "README.md" for name in ("kernels", "csrc", "benchmarks")),
    ROOT / "benchmarks" / "RESULTS.md",
]
# Programs whose flags are looked up. `fastdit-data` takes a command first.
PARSERS = {
    "train": training_parser._parser,
    **{
        name: lambda name=name: importlib.import_module(f"fastdit.{name}")._parser()
        for name in ("sample", "evaluate", "encode", "export")
    },
}


def code_blocks(page: Path) -> list[str]:
    """Return the lines of code of a Markdown page, with continued lines joined: indented by four, or fenced."""
    text = page.read_text()
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(
        r"^ {4,}(\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    joined = "\n".join([*fenced, *indented]).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines()]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Return the commands of fastdit on a page: the program's name, and its words."""
    found = []
    for line in code_blocks(page):
        words = (
            shlex.split(line.partition("  #")[0], posix=True) if line.count('"') % 2 == line.count("'") % 2 == 0 else []
        )
        for at, word in enumerate(words):
            if match := re.fullmatch(r"(?:.*/)?fastdit[/-](train|sample|evaluate|encode|export)(?:\.py)?", word):
                found.append((match[1], words[at + 1 :]))
                break
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    for link in links:
        if not link.startswith(("http://", "https://", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


def test_every_page_is_found_from_the_readme():
    text = PAGES[0].read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_have_flags_that_exist(page):
    for program, words in commands(page):
        flags = {action for known in PARSERS[program]()._actions for action in known.option_strings}
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used - flags == set(), f"{program} {' '.join(words)}"


def test_the_readmes_commands_are_seen():
    assert [program for program, _ in commands(PAGES[0])].count("train") >= 4
    assert {program for program, _ in commands(PAGES[0])} == set(PARSERS)


def test_the_page_of_settings_is_current(capsys):
    with pytest.raises(SystemExit):
        parse(["--help", "markdown"])
    page = ROOT / "docs" / "configuration.md"
    assert capsys.readouterr().out == page.read_text(), (
        "run: python fastdit/train.py --help markdown > docs/configuration.md"
    )


# What is added to the README's commands, by program and, where it matters, by preset.
SMALL = {
    "train": "--device cpu --threads 1 --data.threads 1 --model.depth 2 --model.width 32 --model.heads 2 --batch 4 "
    "--log_every 1 --sample.steps 2 --sample.per_class 1 --sample.agreement 0",
    "sample": "--steps 2 --n 3",
    "evaluate": "--steps 2 --n 8 --n_real 20",
    "encode": "--size 16 --device cpu",
    "export": "",
}
LATENTS = "--data.size 16 --data.channels 3 --data.latent_scale 1 --sd_dit.decoder split --sadm.psi_warm_steps 2"


@pytest.mark.launch
def test_the_commands_of_a_day(tmp_path, two_classes):
    """Every line of the block, one after the other; data/train and the autoencoder are small ones."""
    # Make the commands small, and let them write into a folder of the test.
    page = PAGES[0].read_text()
    block = page[page.index("## A day with it") : page.index("Open `runs/mine/report.html`")]
    lines = [line.strip() for line in re.findall(r"^    (\S.*)$", block, re.MULTILINE)]
    assert len(lines) == 8
    script = ["set -e"]
    for line in lines:
        (program,) = re.findall(r"fastdit/(\w+)\.py", line)
        steps = "--steps 2" if "--steps" not in line else ""
        more = f"{SMALL[program]} {steps if program == 'train' else ''} {LATENTS if 'imagenet256' in line else ''}"
        line = line.partition("  #")[0].replace("--steps 2000", "--steps 4")
        line = line.replace("models/sd-vae", "identity").replace("--dry_run", "--dry_run true")
        for name in ("runs/", "data/", "grid.png", "dit.safetensors"):
            line = re.sub(rf"(?<=[ =]){re.escape(name)}", f"{tmp_path}/{name}", line)
        script.append(f"{line.replace('deepspeed fastdit', 'deepspeed --quiet fastdit')} {more}")
    (tmp_path / "data").mkdir()
    two_classes.rename(tmp_path / "data" / "train")

    # Run them.
    with Launched(["bash", "-c", "\n".join(script)], tmp_path / "log") as started:
        text = started.wait(3 * PATIENCE).succeeded().text
    assert "step 4/4" in text
    assert "(a dry run: nothing is written)" in text
    assert "sd_dit+sadm on 6 samples" in text
    for name in ("grid.png", "dit.safetensors", "runs/mine/eval.json", "runs/xl2/report.html"):
        assert (tmp_path / name).exists(), name

    # Run the lines of Python.
    code = page[page.index("In Python:") : page.index("| page | |")]
    lines = re.findall(r"^    (\S.*)$", code, re.MULTILINE)
    names: dict = {}
    exec("\n".join(lines).replace("runs/", f"{tmp_path}/runs/"), names)
    assert names["images"].shape == (8, 28, 28, 1)


@pytest.fixture
def two_classes(tmp_path) -> Path:
    """A folder of two classes of three pictures each."""
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "images" / name / f"{i}.png").write_bytes(encode(picture(16, 16), "PNG"))
    return tmp_path / "images"
