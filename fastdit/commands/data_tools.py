"""Obtain, convert and verify images and weights: `fastdit-data fetch`, `convert`, `check`, `weights` and others."""

import importlib

from fastdit.errors import UserError, run_command

# Each command's module, and what it does.
COMMANDS = {
    "fetch": ("fastdit.commands.data_fetch", "obtain Fashion-MNIST or CIFAR-10, or learn how to get ImageNet"),
    "convert": ("fastdit.commands.data_convert", "write the images of a source to shards"),
    "convert-imagenet": ("fastdit.commands.data_convert_imagenet", "write ImageNet's official tar to shards"),
    "convert-set": ("fastdit.commands.data_convert_set", "write the download of Food-101, CelebA and others to shards"),
    "check": ("fastdit.commands.data_check", "verify shards, labels, checksums and images"),
    "weights": ("fastdit.commands.data_weights", "obtain published weights, and verify them"),
}


def main(argv: list[str] | None = None) -> None:
    """Run the command `fastdit-data` and leave the process with code 0, or 2 after a UserError."""
    run_command(_data, argv)


def _data(argv: list[str]) -> None:
    """Call `run(argv)` of the module that COMMANDS names. Raises UserError for an unknown command."""
    if argv[:1] in ([], ["-h"], ["--help"]):
        print("fastdit-data COMMAND --help")
        for name, (_, does) in COMMANDS.items():
            print(f"  {name:16}  {does}")
    elif argv[0] in COMMANDS:
        importlib.import_module(COMMANDS[argv[0]][0]).run(argv[1:])
    else:
        raise UserError(f"{argv[0]}: no such command; fastdit-data knows {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
