"""Run a module's `main(argv)` in a process that cannot import NVIDIA DALI, for the data tests.

python tests/without_dali.py MODULE [flags of its command]
"""

import importlib
import sys


def main(argv: list[str]) -> None:
    """Hide DALI from this process and run the command."""
    sys.modules["nvidia.dali"] = None
    importlib.import_module(argv[0]).main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
