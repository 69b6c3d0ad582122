"""Check a source: `fastdit-data check SOURCE` reads all of it and prints each problem with its file and byte."""

from fastdit.command_line import SOURCE_FLAGS, OneLineParser, add_source_flags
from fastdit.data.checking import check, place_of_manifest
from fastdit.data.manifest import build_manifest, write_json
from fastdit.errors import UserError


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(prog="fastdit-data check", description="Verify shards, labels, checksums and images.")
    parser.add_argument("source", type=str, help="path or name, as in --data.source")
    add_source_flags(parser)
    parser.add_argument("--decode", type=bool, default=True, help="decode every image")
    parser.add_argument("--write_manifest", type=bool, default=False, help="write a missing manifest.json")
    parser.add_argument("--most", type=int, default=50, help="number of problems to print")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads that decode images")
    return parser


def run(argv: list[str]) -> None:
    """Print the problems, or one line that says which properties were verified. Raises UserError after problems."""
    # Check the flags, and then the source.
    args = _parser().parse(argv)
    for field, least in (("most", 0), ("threads", 1), ("classes", 1)):
        if (value := getattr(args, field)) is not None and value < least:
            raise UserError(f"--{field} {value}: must be at least {least}")
    place = place_of_manifest(args.source) if args.write_manifest else None
    options = {field: getattr(args, field) for field in (*SOURCE_FLAGS, "decode", "threads")}
    found = check(args.source, **options)

    # Print the problems, or what was verified.
    for note in found.notes:
        print(note)
    if lines := found.problems.lines:
        rest = [f"and {len(lines) - args.most} more"] if len(lines) > args.most else []
        print("\n".join([*lines[: args.most], *rest]))
        counts = f"{_number(len(lines), 'problem')} in {_number(len(found.problems.files), 'file')}"
        raise UserError(f"{args.source}: {counts}; each is printed above, with what to do")
    print(found.summary)
    if place:
        write_json(place, build_manifest(found.samples, found.classes))
        print(f"{place}: written; later checks compare the shards with it")


def _number(n: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{n} {noun}" + ("" if n == 1 else "s")
