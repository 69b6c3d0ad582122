"""Define the commands' argument parser: jsonargparse's, with errors of one line that a user can act on."""

import difflib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace

from fastdit.errors import UserError

MOST_VALUES = 10_000  # in a file of settings
LONGEST = 500  # characters of a message that quotes the input
COLUMNS = ("image_column", "label_column")  # of a Hugging Face data set
SOURCE_FLAGS = ("classes", "labels", *COLUMNS)
_TYPES = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text", "NoneType": "null"}


def _any_of(match: re.Match) -> str:
    """Return the types of a union in words."""
    types = re.findall(r"typing\.Literal\[[^\]]*\]|[\w.]+(?:\[[^\]]*\])?", match[1])
    literals = (re.sub(r"typing\.Literal\[(.*)\]", r"\1", name).replace("'", "") for name in types)
    return f"expected {' or '.join(_TYPES.get(name, name) for name in literals)}, got "


# Patterns of jsonargparse's messages, and what replaces them.
_REWORDED = (
    (r"^unrecognized arguments: (--[^\s=]+).*", r"\1: no such setting"),
    (r"^unrecognized arguments: (\S+).*", r"\1: belongs to no flag; write --name value"),
    (r"^Option '(\S+)' is not accepted.*", r"\1: no such setting"),
    (r"^Group '(\S+)' does not accept option '(\S+)'.*", r"\1.\2: no such setting"),
    (r"^argument (\S+): expected one argument", r"\1: expected a value"),
    (r'^"([\w.]+)": ', r"\1: "),
    (r"Unable to load config '(.*?)'.*", r"expected settings as {name: value}, got \1"),
    (r"Does not validate against any .* Subtypes: \[(.*)\] Errors: .* Given value: ?", _any_of),
    (r"Expected an? (.*)\. Got value: ?", r"expected \1, got "),
    (r"typing\.Literal\[(.*?)\]", r"one of \1"),
    (r", got $", ", got nothing"),
    (r"expected tuple\[float, float\]", "expected a pair [a, b]"),
    (r"expected tuple( with 2 elements)?", "expected a pair [a, b]"),
    (r"tuple\[(.*?)\]", r"[\1]"),
    (r"expected (bool|int|float|str)\b", lambda match: f"expected {_TYPES[match[1]]}"),
    (r"NoneType", "null"),
    (r"^functools\.partial.*", "a section is null; fill it or leave it out"),
)


_POWER = re.compile(r"\d+(\.\d+)?[eE]\+?\d{1,2}")  # 1e5


class OneLineParser(ArgumentParser):
    """Parse command lines and settings files. Every error is one `UserError`, and flags cannot be abbreviated."""

    def __init__(
        self,
        renamed: dict[str, str] | None = None,
        foreign: Callable[[str], str | None] = lambda name: None,
        **options,
    ):
        """Make a parser without flags.

        renamed: the names of settings by older ones, which are still accepted.
        foreign: returns what stands for a name that other programs have for a setting, or None.
        """
        super().__init__(allow_abbrev=False, **options)
        self.renamed, self.foreign = renamed or {}, foreign

    def error(self, message: str, *args, **kwargs) -> NoReturn:  # jsonargparse calls it with the exception too
        """Raise UserError. jsonargparse calls this for every error, and its own method would exit."""
        raise UserError(self._explained(message))

    def parse(self, argv: list[str], base: Namespace | None = None) -> Namespace:
        """Return the typed values of a command line, which replace those of `base`. Raises UserError."""
        argv = self._whole_numbers([self._current_flag(word) for word in argv])
        return self._typed(lambda: self.instantiate(self.parse_args(argv, base)))

    def _current_flag(self, word: str) -> str:
        """Return a word of a command line; an older name of a flag is replaced, with a note."""
        name, equals, value = word.partition("=")
        if (current := self.renamed.get(name.removeprefix("--"))) is None or not name.startswith("--"):
            return word
        print(f"note: {name} is now --{current}", file=sys.stderr)
        return f"--{current}{equals}{value}"

    def _whole_numbers(self, argv: list[str]) -> list[str]:
        """Return a command line in which whole numbers like 1e5 are written out, where a flag takes such a number."""
        words = []
        for word in argv:
            flag, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
            action = self._option_string_actions.get(flag or (words[-1] if words else ""))
            whole = action is not None and _takes_whole_number(action)
            words.append(f"{flag}{equals}{_whole_number(value) if whole else value}")
        return words

    def read(self, path: str | Path, base: Namespace | None = None) -> Namespace:
        """Return the values of a YAML file, which replace those of `base`, as a base for `parse`. Raises UserError."""
        values = read_settings(path)
        _rename(values, self.renamed)
        sections = {action.dest.rpartition(".")[0] for action in self._actions}
        values = {name: value for name, value in values.items() if value is not None or name not in sections}
        for action in filter(_takes_whole_number, self._actions):
            *groups, name = action.dest.split(".")
            inner = _section(values, groups)
            if name in inner:
                inner[name] = _whole_number(inner[name])
        return self._typed(lambda: self.parse_object(values, base), f"{path}: ")

    def _typed(self, make: Callable[[], Namespace], where: str = "") -> Namespace:
        """Return `make()`. Raises every error as a UserError that begins with `where`."""
        try:
            return make()
        except UserError as error:
            raise UserError(f"{where}{error}") from None
        except Exception as error:  # jsonargparse raises ArgumentError, TypeError, KeyError
            raise UserError(where + self._explained(error)) from None

    def _called(self, name: str) -> str:
        """Return what a user calls an argument: its flag, or the name of a word without a flag."""
        flags = (action.option_strings for action in self._actions if action.dest == name)
        return next((strings[0] for strings in flags if strings), name)

    def _explained(self, message: object) -> str:
        """Return jsonargparse's message, or its exception, as one line in this project's words."""
        text = _one_line(message)
        for pattern, words in _REWORDED:
            text = re.sub(pattern, words, text)
        if found := re.fullmatch(r"the following arguments are required: (.*)", text):
            missing = [self._called(name) for name in found[1].split(", ")]
            return f"{' and '.join(missing)}: must be given; --help tells what {'they are' if missing[1:] else 'it is'}"
        if text.endswith(": no such setting"):
            dashes, name = re.match(r"(-*)(.*): no", text).groups()
            if stands := self.foreign(name):
                return f"{text}; fastdit has {stands}"
            near = difflib.get_close_matches(name, [action.dest for action in self._actions], n=1)
            text += f"; did you mean {dashes}{near[0]}?" if near else "; --help lists them all"
        return text


def add_source_flags(parser: OneLineParser) -> None:
    """Add the flags that tell how a command reads a source: `open_source` has arguments of these names."""
    parser.add_argument("--classes", type=int | None, default=None, help="number of classes; default: the source's")
    parser.add_argument("--labels", type=str, default="auto", help="as --data.labels of a run")
    add_column_flags(parser, "as --data.{} of a run")


def add_column_flags(parser: OneLineParser, text: str) -> None:
    """Add the flags that choose columns of a Hugging Face data set. text: their help, with {} for the name."""
    for name in COLUMNS:
        parser.add_argument(f"--{name}", type=str | None, default=None, help=text.format(name))


def _takes_whole_number(action) -> bool:
    """Return whether a flag's type is int or int | None."""
    kind = getattr(action, "_typehint", action.type)
    return kind is int or kind == int | None


def _whole_number(value: object) -> object:
    """Return a value for a whole number: text like 1e5 is written out, and a float without a fraction is an int."""
    if isinstance(value, str) and _POWER.fullmatch(value) and float(value) % 1 == 0:
        return str(int(float(value)))
    return int(value) if isinstance(value, float) and value % 1 == 0 else value


def preset_of(path: str | Path) -> str | None:
    """Return the preset that a file of settings builds on, its `preset:`, or None. Raises UserError."""
    name = read_settings(path).get("preset")
    if not isinstance(name, str | None):
        raise UserError(f"{path}: preset: expected text, got {name!r}")
    return name


def read_settings(path: str | Path) -> dict:
    """Return the content of a YAML file of settings. Raises UserError."""
    try:
        values = _load_yaml(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else _one_line(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
        raise UserError(f"{path}: cannot be read ({reason}); give a run, or a file of settings") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no settings; write one `name: value` a line, as in a run's config.yaml")
    return values


def _load_yaml(text: str) -> object:
    """Return the content of a YAML document. Raises YAMLError, ValueError, or RecursionError.

    A name that is given twice in a section is an error: YAML would take the last. Aliases may name a value many times.
    A file of a few lines whose aliases multiply to more than MOST_VALUES, or that holds itself, is refused before it is
    built.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        waiting, count = [root], 0
        while waiting:
            node, count = waiting.pop(), count + 1
            if count > MOST_VALUES:
                raise ValueError(f"it holds more than {MOST_VALUES:,} values")
            if isinstance(node, yaml.MappingNode):
                waiting += [part for pair in node.value for part in pair]
                _check_names(node)
            elif isinstance(node, yaml.SequenceNode):
                waiting += node.value
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _check_names(section: yaml.MappingNode) -> None:
    """Raise ValueError that names a key with two values, and its lines."""
    lines: dict[tuple[str, str], int] = {}
    for key, _ in section.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
            continue
        name, line = (key.tag, key.value), key.start_mark.line + 1
        if name in lines:
            raise ValueError(f"{key.value} is given twice, on line {lines[name]} and on line {line}")
        lines[name] = line


def _rename(values: dict, renamed: dict[str, str]) -> None:
    """Give settings of a file, nested by section, their current names."""
    for older, current in renamed.items():
        *sections, name = older.split(".")
        inner = _section(values, sections)
        if name in inner:
            inner[current.rpartition(".")[2]] = inner.pop(name)


def _section(values: dict, names: list[str]) -> dict:
    """Return the section of that name, nested by `names`, or an empty one."""
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


def _one_line(message: object) -> str:
    """Return the text of a message or exception in one line, without jsonargparse's internal words."""
    message = re.sub(r"\s+", " ", str(message)).replace("Parser key ", "").strip()
    message = re.sub(r"<class '([\w.]+)'>", r"\1", message)
    return message if len(message) <= LONGEST else f"{message[:LONGEST]} ..."
