"""Test that all copies to a GPU go through one helper, which pins their source so that the host does not wait."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdit.data.transfer import to_device

FASTDIT = Path(__file__).parents[2] / "fastdit"
HELPER = FASTDIT / "data" / "transfer.py"


def keywords(path: Path, name: str) -> list[int]:
    """Return the lines of a file where a call has the keyword `name`."""
    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [call.lineno for call in calls if any(keyword.arg == name for keyword in call.keywords)]


def test_no_other_copy_is_non_blocking():
    """Find the keyword, and a constant True, which is the argument by position: `.to(device, dtype, True)`."""
    found = {path: keywords(path, "non_blocking") for path in FASTDIT.rglob("*.py")}
    assert [path for path, lines in found.items() if lines] == [HELPER]
    for path in FASTDIT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("to", "copy_")
            ):
                assert not any(isinstance(value, ast.Constant) and value.value is True for value in node.args), path


@pytest.mark.parametrize("pinned", [False, True])
def test_the_source_of_a_copy_to_a_gpu_is_pinned_once(monkeypatch, pinned):
    """Replace torch's three calls, because this machine may have no GPU."""
    calls = []
    device = torch.device("cuda", 0)
    values = torch.arange(3)

    def pin(self):
        calls.append("pin")
        return self

    def copy(self, where, non_blocking=False):
        calls.append((where, non_blocking))
        return self

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: pinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    assert to_device(values, device).tolist() == [0, 1, 2]
    assert calls == [*([] if pinned else ["pin"]), (device, True)]


def test_on_a_cpu_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", None)
    assert to_device(np.arange(3), torch.device("cpu")).tolist() == [0, 1, 2]
    assert to_device(torch.arange(3), torch.device("cpu")).tolist() == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pinned_memory_is_reused_only_after_its_copy():
    """Copy many times in a row while the GPU is busy, and expect each copy to arrive whole."""
    device = torch.device("cuda")
    torch.cuda._sleep(100_000_000)
    copies = [to_device(np.full(1000, k), device) for k in range(200)]
    assert all((copy == k).all() for k, copy in enumerate(copies))
