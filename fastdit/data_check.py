"""Is a set whole? `fastdit-data check SOURCE` reads all of it and says what is wrong, with file and byte."""

from fastdit.command_line import OneLineParser
from fastdit.data.checking import check, place_of_manifest
from fastdit.data.manifest import describe, write_json
from fastdit.errors import UserError


def _parser() -> OneLineParser:
    parser = OneLineParser(prog="fastdit-data check", description="Verify shards, labels, checksums and images.")
    parser.add_argument("source", type=str, help="as a run's data.source")
    parser.add_argument("--classes", type=int | None, default=None, help="number of classes; default: the source's")
    parser.add_argument("--decode", type=bool, default=True, help="decode every image")
    parser.add_argument("--write_manifest", type=bool, default=False, help="of shards without one, if nothing is wrong")
    parser.add_argument("--most", type=int, default=50, help="problems that are printed")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads that decode")
    return parser


def run(argv: list[str]) -> None:
    """Prints the problems, or one line on what was verified. Raises UserError where something is wrong."""
    args = _parser().parse(argv)
    for field, least in (("most", 0), ("threads", 1), ("classes", 1)):
        if (value := getattr(args, field)) is not None and value < least:
            raise UserError(f"--{field} {value}: must be at least {least}")
    place = place_of_manifest(args.source) if args.write_manifest else None
    found = check(args.source, classes=args.classes, decode=args.decode, threads=args.threads)
    if lines := found.problems.lines:
        left = [f"and {len(lines) - args.most} more"] if len(lines) > args.most else []
        print("\n".join([*lines[: args.most], *left]))
        many = f"{_number(len(lines), 'problem')} in {_number(len(found.problems.files), 'file')}"
        raise UserError(f"{args.source}: {many}; each is said above, with what to do")
    print(found.summary)
    if place:
        write_json(place, describe(found.samples, found.classes))
        print(f"{place}: written; later damage to these shards will show")


def _number(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")
