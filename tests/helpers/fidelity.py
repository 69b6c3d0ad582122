"""Import torch-fidelity, which the tests compare with.

Its import asks for torchvision, which the tests do not need. If that is missing, or built for another torch, a stand-in
serves while importing.
"""

import importlib
import sys
from types import ModuleType
from unittest.mock import patch

import pytest

_ASKED = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")


class _StandIn(ModuleType):
    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", object)


def torch_fidelity(module: str = "") -> ModuleType:
    """Return the package, or a module of it. Skip the test if it is not installed."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("torch-fidelity is not installed")
    name = f"torch_fidelity.{module}" if module else "torch_fidelity"
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError):
        with patch.dict(sys.modules, {asked: _StandIn(asked) for asked in _ASKED}):
            importlib.import_module("torch_fidelity")
            found = {key: value for key, value in sys.modules.items() if key.startswith("torch_fidelity")}
        sys.modules.update(found)
        return importlib.import_module(name)
