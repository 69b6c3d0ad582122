"""A program of tests: trains where the package wandb is not installed."""

import sys


def main(argv: list[str]) -> None:
    sys.modules["wandb"] = None  # then importing it raises ImportError
    from fastdit import train

    train.main(argv)
