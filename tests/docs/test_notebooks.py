"""Execute the notebooks of docs/notebooks on a tiny run, so that they stay true."""

from pathlib import Path

import nbformat
import pytest
from launching import ROOT, THREADS, TINY, forked
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
SMALL = 200_000  # bytes of a notebook with its outputs
PATIENCE = 240  # seconds for a cell, on a busy machine


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    forked(*TINY, "--sample.agreement", 0, "--steps", 2, "--out", folder).succeeded()
    return folder


def outputs(notebook) -> list[dict]:
    """All outputs of a notebook's code cells."""
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(run, path, tmp_path, monkeypatch):
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source = f"run_folder, device, samples, real_images = {str(run)!r}, 'cpu', 8, 12"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # references stay out of the user's cache
    for name, value in THREADS.items():
        monkeypatch.setenv(name, value)
    NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3", resources={"metadata": {"path": ROOT}}).execute()
    kinds = {kind for output in outputs(notebook) for kind in output.get("data", {})}
    assert {"image/png", "text/plain"} <= kinds
    pictures = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(pictures) == 2, "a grid and a curve"
    assert any("FD-lite0" in output.get("data", {}).get("text/plain", "") for output in outputs(notebook))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_executed_and_small(path):
    assert path.stat().st_size < SMALL
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == 2
    assert not any(output.output_type in ("error", "stream") for output in outputs(notebook))
    assert "/tmp" not in path.read_text(), "no path of the machine that ran it"
