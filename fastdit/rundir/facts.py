"""Keep, in `facts.json`, lines about a run that its other files do not tell: its command, host, dates and results."""

import shlex
import socket
from datetime import UTC, datetime
from pathlib import Path

from fastdit.errors import UserError
from fastdit.files import read_json
from fastdit.parser import preset_names
from fastdit.rundir.run_files import FACTS, VERSIONS

PRESET = "preset"  # the fact that names the presets
FIRST = ("command", PRESET, "started")  # facts of a run's first start, which a resumed one keeps


def start_facts(
    folder: Path, argv: list[str], first_step: int, ranks: int, described: dict[str, str]
) -> dict[str, str]:
    """Return the facts that are known when a run starts, or goes on after `first_step` steps.

    argv: the flags of the command. described: what is trained, by name. Those of the first start are kept.
    """
    # Describe this start.
    presets = preset_names(argv)
    command = shlex.join(["fastdit/train.py", *(word for word in argv if not word.startswith("--local_rank"))])
    where = f"{now()} on {socket.gethostname()}, {ranks} rank{'s' if ranks > 1 else ''}"
    facts = {"command": command, PRESET: shlex.join(presets) or "none", "started": where}

    # Keep the first one's description, and add this one's.
    before = read_texts(folder / FACTS) if first_step and (folder / FACTS).exists() else {}
    if "command" in before:
        facts = {name: before.get(name, "") for name in FIRST} | ({PRESET: facts[PRESET]} if presets else {})
        facts["resumed"] = f"after {first_step:,} steps, {where}: {command}"
    return facts | described


def read_texts(path: Path) -> dict[str, str]:
    """Return a file of names and texts. Raises UserError if it is none."""
    found = read_json(path, "remove it")
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UserError(f"{path}: is no list of names and texts; remove it")
    return found


def facts_and_versions(folder: Path) -> list[dict[str, str]]:
    """Return the facts and the versions that a run has written, each empty if it has not. Raises UserError."""
    return [read_texts(path) if path.exists() else {} for path in (folder / FACTS, folder / VERSIONS)]


def now() -> str:
    """Return the date and time in UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
