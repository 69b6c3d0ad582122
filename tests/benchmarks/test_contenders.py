"""Test what benchmarks/throughput.py times a step with: its stopwatch, its cuts of a step, and plain PyTorch."""

import os

import pytest
import torch
from throughput_helpers import ROOT, RUN, SAME

from fastdit import run_parts
from fastdit.errors import UserError
from fastdit.parser import parse


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Put benchmarks/ on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


@pytest.mark.parametrize("decoder", ["extra", "split"])
def test_components_are_cut_where_they_end(decoder):
    """Check that each cut of the backward pass comes when a component's gradients have been computed."""
    from contenders import cut_components

    sizes = [] if decoder == "extra" else ["--sd_dit.decoder_width", "null", "--sd_dit.decoder_depth", "null"]
    sizes += [] if decoder == "extra" else ["--sd_dit.decoder_heads", "null"]
    config = parse([*RUN, *SAME, "--method", "sd_dit", "--sd_dit.decoder", decoder, *sizes])
    module, method = run_parts.build_training(config, run_parts.shape_of(config, 7))
    seen: list[str] = []

    class Watch:
        def lap(self, name: str) -> None:
            seen.append(f"| {name}")

    assert cut_components(module, method, Watch()) == "encoder"
    for name, parameter in module.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    generator = torch.Generator().manual_seed(0)
    x0, y = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0, 3, 6])
    outcome = method.loss(module, x0, y, generator)
    forward, seen[:] = list(seen), []
    assert forward == [
        f"| forward{part}" for part in ("", "/teacher", "", "/encoder", "/decoder", "/head")
    ]  # the teacher's own encoder cuts nothing
    outcome.loss.backward()
    seen.append("| backward/encoder")
    text = "\n".join(seen).split("| ")
    names = [part.split("\n")[0] for part in text[1:]]
    assert names == ["backward", "backward/head", "backward/decoder", "backward/encoder"]
    made = [{name for name in part.split("\n")[1:] if name} for part in ["\n" + text[0], *text[1:-1]]]
    later = ("network.decoder.", "network.bridge.")
    if decoder == "split":
        later = ("network.blocks.1.", "network.head.")  # adaln and patch_embed serve both, and end with the encoder
    parts = [set(), set(), set(), set()]
    for name, _ in module.named_parameters():
        parts[1 if name.startswith("head.") else 2 if name.startswith(later) else 3].add(name)
    assert made == parts


def test_a_graph_holds_the_whole_of_a_split_dit():
    from contenders import cut_components

    config = parse(["--method", "sd_dit", *SAME, "--model.depth", "2", "--model.width", "32", "--model.heads", "2"])
    module, method = run_parts.build_training(config, run_parts.shape_of(config, 7))
    seen: list[str] = []

    class Watch:
        def lap(self, name: str) -> None:
            seen.append(name)

    assert cut_components(module, method, Watch(), graphs=True) == "network"
    method.loss(module, torch.randn(3, 3, 16, 16), torch.tensor([0, 3, 6]), torch.Generator()).loss.backward()
    assert seen == [
        "forward", "forward/teacher", "forward", "forward/network", "forward/head", "backward", "backward/head"
    ]  # fmt: skip


def test_the_game_is_cut_from_its_base():
    """Check what runs between cuts: the passes of Psi, and the gradients that exist by then."""
    from contenders import cut_game

    config = parse([*RUN, *SAME, "--method", "sadm", "--sadm.psi_width", "16"])
    module, game = run_parts.build_training(config, run_parts.shape_of(config, 7))
    game.to(torch.device("cpu"), torch.float32)
    seen: list[str] = []

    class Watch:
        def lap(self, name: str) -> None:
            seen.append(f"| {name}")

    cut_game(game, Watch(), "forward/network")
    module.register_forward_hook(lambda *_: seen.append("denoiser"))
    game.psi.register_forward_hook(lambda *_: seen.append("psi"))
    module.register_full_backward_hook(lambda *_: seen.append("denoiser backward"))
    generator = torch.Generator().manual_seed(0)
    x0, y = torch.randn(3, 3, 16, 16, generator=generator), torch.tensor([0, 3, 6])
    loss = game.loss(module, x0, y, generator).loss
    assert seen == ["denoiser", "| forward/network", "psi", "psi"]
    assert all(p.grad is not None for p in game.psi.parameters())
    assert all(p.grad is None for p in module.parameters())
    loss.backward()
    assert seen[4:] == ["denoiser backward"]
    assert all(p.grad is not None for p in module.parameters())
    game.end_step()
    assert seen[5:] == ["| extras"]


def test_laps_add_up_and_turns_turn(monkeypatch):
    import stopwatch
    from journal import Journal
    from stopwatch import Contender, Rounds, Stopwatch, Turn

    now = iter(range(10**6))
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(now) / 1e3)
    watch, order = Stopwatch(torch.device("cpu")), []

    class Fake(Contender):
        def __init__(self, name: str):
            super().__init__(watch)
            self.name = name

        def step(self) -> None:
            order.append(self.name)
            self.watch.start()
            for lap in ("forward", "forward/x", "forward"):
                self.watch.lap(lap)

    class Alone:
        def barrier(self) -> None:
            order.append("|")

    journal = Journal()
    rounds = Rounds(Alone(), Turn(1, 2), journal)
    for _ in range(2):
        rounds.take({name: Fake(name) for name in "abc"})
    assert "".join(order) == "|aaa|bbb|ccc|bbb|ccc|aaa"
    assert [line["what"] for line in journal.lines] == ["round", "round"]
    for line in journal.lines:
        assert list(line["laps"]) == ["a", "b", "c"]
        for turn in line["laps"].values():
            assert turn == [{"forward": pytest.approx(2.0), "forward/x": pytest.approx(1.0)}] * 2


def test_a_gpu_is_waited_for_once_a_turn(monkeypatch):
    from stopwatch import Stopwatch

    calls = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            calls.append("record")
            self.at = len(calls) ** 2

        def elapsed_time(self, later: "Event") -> float:
            assert "wait" in calls
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    watch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        watch.start()
        watch.lap("forward")
        watch.lap("backward")
    assert watch.read() == [{"forward": 3, "backward": 5}, {"forward": 9, "backward": 11}]
    assert calls == ["record"] * 6 + ["wait"]
    assert watch.read() == []


def test_plain_pytorch_trains(monkeypatch):
    """Compare AdamW's step with one computed by hand from its gradients, and the EMA weights after it."""
    from contenders import Plain
    from stopwatch import Stopwatch

    from fastdit.distributed import Runtime

    monkeypatch.delenv("FASTDIT_KERNELS", raising=False)
    config = parse([*RUN, *SAME, "--lr", "1e-2", "--weight_decay", "0.1", "--ema.decay", "0.75"])
    contender = Plain(config, Runtime(0, 1, 0, torch.device("cpu")), Stopwatch(torch.device("cpu")))
    before = [p.detach().clone() for p in contender.weights]
    grads = {}
    for i, p in enumerate(contender.weights):
        p.register_post_accumulate_grad_hook(lambda p, i=i: grads.update({i: p.grad.clone()}))
    contender.step()
    contender.close()
    assert "FASTDIT_KERNELS" not in os.environ
    assert len(grads) == len(before)
    for i, (old, new, average) in enumerate(zip(before, contender.weights, contender.averages)):
        expected = old * (1 - 1e-2 * 0.1) - 1e-2 * grads[i] / (grads[i].abs() + 1e-8)
        torch.testing.assert_close(new.detach(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(average, torch.lerp(old, new.detach(), 0.25))
        assert new.grad is None


@pytest.mark.parametrize(("size", "out"), [((16, 8), 3), ((16, 16), 4)])
def test_a_peer_has_limits(size, out):
    from peers import build_peer

    with pytest.raises(UserError, match="--against peer"):
        build_peer(torch.nn.Module, {}, 4.0, 4, run_parts.Shape(3, *size, 7), out)
