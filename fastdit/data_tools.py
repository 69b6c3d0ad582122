"""Sets of images and shards, obtained and verified: `fastdit-data fetch NAME`, `convert-imagenet TAR`, `check DIR`."""

import importlib

from fastdit.errors import UserError, run_command

COMMANDS = {
    "fetch": "fastdit.data_fetch",
    "convert-imagenet": "fastdit.data_convert_imagenet",
    "check": "fastdit.data_check",
}


def main(argv: list[str] | None = None) -> None:
    """The command `fastdit-data`. Leaves the process: 0, or 2 after a UserError."""
    run_command(_data, argv)


def _data(argv: list[str]) -> None:
    """Each of COMMANDS' modules has a function `run(argv)`."""
    if argv[:1] in ([], ["-h"], ["--help"]):
        print("\n".join(["fastdit-data COMMAND --help", *(f"  {name}" for name in COMMANDS)]))
    elif argv[0] in COMMANDS:
        importlib.import_module(COMMANDS[argv[0]]).run(argv[1:])
    else:
        raise UserError(f"{argv[0]}: no such command; fastdit-data knows {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
