"""Show settings in parts: `--help` the common ones, `--help GROUP` those of a group, `--help all` every one.

`--help markdown` prints the page docs/configuration.md.
"""

import shutil
import textwrap
from argparse import SUPPRESS, Action
from typing import Literal, get_args, get_origin

from fastdit.command_line import OneLineParser
from fastdit.errors import UserError

FLAGS = ("--help", "-h")
COMMON = """
    preset method out resume dry_run ds_config init_from finetune steps batch micro_batch lr warmup schedule grad_clip
    precision device seed log_every save_every sample_every data.source data.size data.channels data.classes data.flip
    model.size model.patch noise.name ema.kind ema.decay sample.steps sample.guidance eval.every wandb
""".split()  # noqa: SIM905
REST = "run"  # the group of settings without a prefix
WIDEST = 120
PAGE_INTRODUCTION = """\
Every setting is a flag of `fastdit/train.py` and a field of a YAML file: `--model.size B` is `model: {size: B}`. A run
takes the defaults below, then the values of its preset, then those of the command line. `--help GROUP` shows a group on
the terminal. This page is the output of `python fastdit/train.py --help markdown`."""


def asked_group(argv: list[str]) -> str | None:
    """Return what follows `--help`, "" for nothing; None where the flag is not among the words of a command line."""
    for at, word in enumerate(argv):
        if word in FLAGS:
            following = argv[at + 1] if at + 1 < len(argv) else ""
            return "" if following.startswith("-") else following
        if word.startswith("--help="):
            return word.partition("=")[2]
    return None


def help_text(parser: OneLineParser, group: str, command: str) -> str:
    """Return the help of a group of settings, of "all", or for "" the common settings and the names of the groups.

    For "markdown" it is a page with all settings, in a table for each group.

    Raises UserError for a group that does not exist.
    """
    actions = [action for action in parser._actions if action.option_strings and action.help != SUPPRESS]
    settings = {a.dest: a for a in actions if a.dest not in ("help", "local_rank") and not _is_section(a, actions)}
    groups: dict[str, list[str]] = {}
    for name in settings:
        groups.setdefault(name.partition(".")[0] if "." in name else REST, []).append(name)
    width = min(WIDEST, shutil.get_terminal_size().columns)
    if group == "markdown":
        return _page(parser, settings, groups)
    if group:
        found = list(settings) if group == "all" else [name for name in settings if name.startswith(f"{group}.")]
        if not (found := found or groups.get(group, [])):
            raise UserError(f"--help {group}: no such group; choose one of all, {', '.join(groups)}")
        return "\n".join(_explained(parser, [settings[name] for name in found], width))

    lines = [f"usage: {command} [--preset NAME] [--SETTING VALUE ...]", "", parser.description, ""]
    lines += [_short(settings[name], width) for name in COMMON if name in settings]
    lines += ["", "--help GROUP explains all settings of a group, --help all those of every group:"]
    counts = ", ".join(f"{name} ({len(members)})" for name, members in groups.items())
    return "\n".join([*lines, *textwrap.wrap(counts, width - 2, initial_indent="  ", subsequent_indent="  ")])


def _explained(parser: OneLineParser, settings: list[Action], width: int) -> list[str]:
    """Return the lines of settings, with the title of each section before the first that is in it."""
    lines, section = [], ""
    for setting in settings:
        before, section = section, setting.dest.rpartition(".")[0]
        if section != before and section in parser.groups:
            lines += ["", f"{section}: {parser.groups[section].title}"]
        lines.append(_long(setting, width))
    return lines


def _page(parser: OneLineParser, settings: dict[str, Action], groups: dict[str, list[str]]) -> str:
    """Return the settings as Markdown, with a table for each group."""
    lines = ["# Settings", "", PAGE_INTRODUCTION]
    for group, names in groups.items():
        title = parser.groups[group].title if group in parser.groups else "the whole run"
        lines += ["", f"## {group}: {title}", "", "| flag | default | meaning |", "|---|---|---|"]
        for name in names:
            setting = settings[name]
            default = "" if setting.default == SUPPRESS else f"`{_plain(setting.default)}`"
            meaning = f"{_choices(setting)}{_explanation(setting)}".replace("|", "\\|")
            lines.append(f"| `--{name}` | {default} | {meaning} |")
    return "\n".join(lines)


def _is_section(action: Action, actions: list[Action]) -> bool:
    """Return whether an action stands for a whole group, as `--data FILE` does."""
    return any(other.dest.startswith(f"{action.dest}.") for other in actions)


def _explanation(action: Action) -> str:
    """Return an action's help text without jsonargparse's note on its default."""
    return " ".join((action.help or "").partition(" (type: ")[0].replace("%%", "%").split())


def _short(action: Action, width: int) -> str:
    """Return one line: the flag, its default, and the first clause of its help text."""
    clause = _explanation(action)
    for mark in (": ", "; ", ". ", " ("):
        clause = clause.partition(mark)[0]
    default = "" if action.default in (None, SUPPRESS) else f" [{_plain(action.default)}]"
    text = textwrap.shorten(f"{_choices(action)}{clause.rstrip('.')}{default}", width - 20, placeholder=" ...")
    return f"  --{action.dest:<15} {text}"


def _long(action: Action, width: int) -> str:
    """Return a flag with its choices and default, and its whole help text below."""
    default = "" if action.default == SUPPRESS else f" (default: {_plain(action.default)})"
    text = textwrap.fill(_explanation(action), width, initial_indent="      ", subsequent_indent="      ")
    head = " ".join(f"--{action.dest} {_choices(action)}{default}".split())
    return f"  {head}" + (f"\n{text}" if text.strip() else "")


def _choices(action: Action) -> str:
    """Return the values of a setting that has only a few, as `{a,b} `; "" for any other."""
    hint = getattr(action, "_typehint", None)
    parts = hint, *get_args(hint)
    values = [str(value) for part in parts if get_origin(part) is Literal for value in get_args(part)]
    if values and bool in parts:
        values += ["true", "false"]
    return f"{{{','.join(values)}}} " if values else ""


def _plain(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
