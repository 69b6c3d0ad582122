"""README and docs: links lead somewhere, flags exist, generated pages are current, and the README's commands run."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from launching import ROOT

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
