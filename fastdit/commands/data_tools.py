"""Obtain, convert and verify images and weights: `fastdit-data fetch`, `convert`, `check`, `weights` and others."""

import importlib

from fastdit.errors import UserError, run_command

COMMANDS = {
    "fetch": "fastdit.commands.data_fetch",
    "convert": "fastdit.commands.data_convert",
    "convert-imagenet": "fastdit.commands.data_convert_imagenet",
    "convert-set": "fastdit.commands.data_convert_set",
    "check": "fastdit.commands.data_check",
    "weights": "fastdit.commands.data_weights",
}


def main(argv: list[str] | None = None) -> None:
    """Run the command `fastdit-data` and leave the process with code 0, or 2 after a UserError."""
    run_command(_data, argv)


def _data(argv: list[str]) -> None:
    """Call `run(argv)` of the module that COMMANDS names. Raises UserError for an unknown command."""
    if argv[:1] in ([], ["-h"], ["--help"]):
        print("\n".join(["fastdit-data COMMAND --help", *(f"  {name}" for name in COMMANDS)]))
    elif argv[0] in COMMANDS:
        importlib.import_module(COMMANDS[argv[0]]).run(argv[1:])
    else:
        raise UserError(f"{argv[0]}: no such command; fastdit-data knows {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
