"""Pieces of tensors: any number of ranks writes them, any other reads them, and what is missing is named."""

import pytest
import torch

from fastdit.errors import UserError
from fastdit.rundir.shards import Piece, PieceReader, write_pieces
from fastdit.rundir.state_files import load_state, save_state

WHOLE = {"a": torch.arange(35.0).view(5, 7), "b": torch.arange(3.0).bfloat16(), "empty": torch.zeros(0, 4)}


def write(folder, world: int) -> None:
    """Lay the tensors end to end and cut them into one run a rank, as ZeRO does; the cuts fall inside of tensors."""
    folder.mkdir(exist_ok=True)
    size = -(-sum(value.numel() for value in WHOLE.values()) // world)
    for rank in range(world):
        pieces, at = [], 0
        for name, value in WHOLE.items():
            first, last = max(at, rank * size), min(at + value.numel(), (rank + 1) * size)
            if first < last or (rank == 0 and not value.numel()):
                pieces.append(Piece(name, value.shape, first - at, value.flatten()[first - at : max(last, first) - at]))
            at += value.numel()
        write_pieces(folder, "weights", rank, world, pieces)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 50])
def test_any_run_comes_back_whatever_the_number_of_ranks(tmp_path, world):
    write(tmp_path, world)
    reader = PieceReader(tmp_path)
    assert reader.kinds == ["weights"]
    assert reader.shapes("weights") == {name: tuple(value.shape) for name, value in WHOLE.items()}
    for name, value in WHOLE.items():
        assert torch.equal(reader.read_whole("weights", name), value)
    for start in range(35):
        for length in (0, 1, 5, 35 - start):
            expected = WHOLE["a"].flatten()[start : start + length]
            assert torch.equal(reader.read("weights", "a", start, length), expected[: 35 - start])
        if start >= 30:
            break


def test_ranks_may_hold_the_same(tmp_path):
    for rank in (0, 1):
        write_pieces(tmp_path, "step", rank, 2, [Piece("a", (), 0, torch.full((1,), 7.0))])
    assert PieceReader(tmp_path).read_whole("step", "a").item() == 7


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_what_is_missing_is_named(tmp_path, lost):
    write(tmp_path, 3)
    next(tmp_path.glob(f"weights-{lost:05d}-*")).unlink()
    reader = PieceReader(tmp_path)
    with pytest.raises(UserError, match=r"lacks elements .* of the weights of a|holds no weights of"):
        [reader.read_whole("weights", name) for name in WHOLE]
    with pytest.raises(UserError, match="holds no ema of a"):
        reader.read("ema", "a")


@pytest.mark.parametrize(
    "piece",
    [
        Piece("a", (5, 7), 30, torch.zeros(9)),
        Piece("a", (5, 7), -1, torch.zeros(9)),
        Piece("a", (7, 5), 0, torch.zeros(9)),
        Piece("a", (5, 7), 0, torch.zeros(3, 3)),
    ],
    ids=["beyond", "before", "shape", "not flat"],
)
def test_pieces_that_cannot_be_are_one_line(tmp_path, piece):
    write_pieces(tmp_path, "weights", 0, 2, [Piece("a", (5, 7), 0, torch.zeros(18))])
    write_pieces(tmp_path, "weights", 1, 2, [piece])
    with pytest.raises(UserError, match=r"weights-00001-of-00002.safetensors: cannot be read \(.*; use another"):
        PieceReader(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", (10).to_bytes(8, "little") + b'{"a": 1}  '])
def test_a_file_that_is_none_is_one_line(tmp_path, content):
    for path, read in ((tmp_path / "weights-00000-of-00001.safetensors", lambda path: PieceReader(path.parent)),
                       (tmp_path / "method.safetensors", load_state)):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path}: cannot be read"):
            read(path)


def test_a_nested_state_comes_back(tmp_path):
    shared = torch.arange(6.0).view(2, 3)
    state = {
        "centers": shared,
        "same": shared.t(),
        "count": torch.tensor(3),
        "optimizer": {"state": {0: {"step": torch.ones(())}}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.99)}]},
        "nothing": {},
        "flags": [True, None, "x", float("inf"), 2**60],
    }
    save_state(state, tmp_path / "state.safetensors")
    found = load_state(tmp_path / "state.safetensors")
    assert found.keys() == state.keys()
    assert torch.equal(found["centers"], shared)
    assert torch.equal(found["same"], shared.t())
    assert (found["count"].item(), found["count"].dtype) == (3, torch.int64)
    assert found["optimizer"]["state"][0]["step"].item() == 1
    assert found["optimizer"]["param_groups"] == [{"lr": 1e-3, "betas": [0.9, 0.99]}]
    assert (found["nothing"], found["flags"]) == ({}, state["flags"])
    with pytest.raises(TypeError, match="cannot hold set"):
        save_state({"a": {1}}, tmp_path / "x.safetensors")
