"""Run a module's `main(argv)` in a process that cannot import NVIDIA DALI, for the data tests.

python tests/programs/without_dali.py MODULE [flags of its command]
"""

import importlib
import sys


def main(argv: list[str]) -> None:
    """Hide DALI from this process and run the command."""
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:  # the server of forks has them
        del sys.modules[name]
    sys.modules.pop("fastdit.data.pipeline", None)
    sys.modules["nvidia.dali"] = None
    importlib.import_module(argv[0]).main(argv[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
