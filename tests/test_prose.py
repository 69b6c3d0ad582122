"""Test how the source reads: docstrings begin with a sentence, and no file is too long to read at one sitting."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCES = ("fastdit", "kernels", "benchmarks", "tests")
FRAGMENT = re.compile(r"(Of|What|That|For who|As|By)\b")  # first words of fragments, such as "Of one device."
MOST_LINES = 450


def python_files(*folders: str) -> list[Path]:
    """Return the Python files under folders of the repository, in the order of their names."""
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def docstrings(file: Path) -> list[tuple[int, str]]:
    """Return (line, text) of the docstrings of a file's module, classes and functions."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, owners)]
    return [(node.body[0].lineno, text) for node in nodes if (text := ast.get_docstring(node))]


def test_no_docstring_begins_as_a_fragment():
    fragments = [
        f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for file in python_files(*SOURCES)
        for line, text in docstrings(file)
        if FRAGMENT.match(text)
    ]
    assert not fragments, "begin with an imperative verb:\n" + "\n".join(fragments)


def test_no_file_is_too_long():
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in python_files(*SOURCES)}
    long = [f"{file.relative_to(ROOT)}: {count} lines" for file, count in lengths.items() if count > MOST_LINES]
    assert not long, f"split files of more than {MOST_LINES} lines by topic:\n" + "\n".join(long)
