"""Write reports from what runs left: `fastdit-report runs/a` for one run, `fastdit-report runs/a runs/b` to compare."""

from pathlib import Path

from fastdit.command_line import OneLineParser
from fastdit.errors import UserError, run_command
from fastdit.files import prepare_file

COMPARISON = "comparison.html"
MARK = '<meta name="generator" content="fastdit">'  # at the head of every page
HEAD = 1000  # bytes in which it stands


def main(argv: list[str] | None = None) -> None:
    """Run the command `fastdit-report`. Exit with 0, or with 2 after a UserError."""
    run_command(_report, argv)


def _parser() -> OneLineParser:
    """Return the parser of the command's flags."""
    parser = OneLineParser(
        prog="fastdit-report", description="Write the report of a run again, or a page that compares several runs."
    )
    parser.add_argument("runs", type=str, nargs="+", help="folders of runs")
    parser.add_argument(
        "--out", type=str | None, default=None, help=f"the page; default: RUN/report.html, or {COMPARISON} for several"
    )
    return parser


def _report(argv: list[str]) -> None:
    """Write the page that the flags `argv` ask for, and print its path. Raises UserError."""
    args = _parser().parse(argv)
    runs, out = [Path(run) for run in args.runs], None if args.out is None else Path(args.out)
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run}: is no folder; name the folder of a run, as --out of the training command has it")
    if out is None and len(runs) > 1:
        out = Path(COMPARISON)
    if out is not None:
        _check_place(out)

    from fastdit.rundir.report import write_report
    from fastdit.rundir.report_compare import write_comparison

    print(write_report(runs[0], path=out) if len(runs) == 1 else write_comparison(runs, out))


def _check_place(out: Path) -> None:
    """Raise UserError unless `out` can become a page, and does not replace a file that is none of fastdit's."""
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"--out {out}: must end in .html")
    prepare_file(out, f"--out {out}")
    if out.exists() and MARK.encode() not in out.read_bytes()[:HEAD]:
        raise UserError(f"--out {out}: is a file that was not made by this command; remove it, or choose another name")


if __name__ == "__main__":
    main()
