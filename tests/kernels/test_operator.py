"""Operators step aside where nothing watches them, and only there."""

from pathlib import Path

import pytest
import torch
from kernel_checks import DEVICE, normal
from launching import TINY, python, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastdit.kernels.adaln as adaln
import fastdit.kernels.linear as linear
from fastdit.kernels._operator import Operator, operator


class Seen(TorchDispatchMode):
    """Names of the operators that the dispatcher met."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def registered() -> Operator:
    made = operator("fastdit_tests::double")(_double)
    made.register_fake(lambda x: torch.empty_like(x))
    made.register_autograd(lambda ctx, grad: 2 * grad)
    return made


@pytest.fixture
def double(registered, monkeypatch) -> Operator:
    monkeypatch.setattr(registered, "op", Counted(registered.op))
    return registered


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Counted:
    def __init__(self, op):
        self.op, self.calls = op, 0

    def __call__(self, *args):
        self.calls += 1
        return self.op(*args)


def test_without_gradients_or_tracers_the_function_runs_itself(double):
    x = normal(2, 3, seed=1)
    with torch.no_grad():
        assert torch.equal(double(x), 2 * x)
        assert torch.equal(double(torch.nn.Parameter(x)), 2 * x)
    with torch.inference_mode():
        double(x)
    assert double.op.calls == 0


def test_autograd_sees_the_operator(double):
    x = normal(2, 3, seed=1).requires_grad_()
    double(x).sum().backward()
    assert double.op.calls == 1
    assert torch.equal(x.grad, torch.full_like(x, 2))


def test_an_operator_without_a_backward_pass_refuses(double):
    """Also where its own function would be differentiable: a second derivative must not lose a part."""
    made = operator("fastdit_tests::no_backward")(_double)
    with pytest.raises(RuntimeError, match="fastdit_tests::no_backward has no backward pass"):
        made(normal(2, 3, seed=1).requires_grad_()).sum().backward()
    x, vector = normal(2, 3, 8, seed=1).requires_grad_(), normal(2, 8, seed=2)
    (first,) = torch.autograd.grad((adaln.modulate(x, vector, vector) * x.detach()).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="adaln_backward has no backward pass"):
        (first.square().sum() + x.square().sum()).backward()


def test_dispatch_modes_and_fake_tensors_see_the_operator(double):
    x = normal(2, 3, seed=1)
    with torch.no_grad():
        with Seen() as seen:
            double(x)
        assert seen.names[0] == "fastdit_tests::double"
        with FakeTensorMode() as mode:
            fake = mode.from_tensor(x)
        assert double(fake).shape == x.shape, "a fake tensor outside of its mode"
    assert double.op.calls == 2


def test_the_compiler_sees_the_operator(double):
    x, graphs = normal(2, 3, seed=1), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        assert torch.equal(torch.compile(lambda x: double(x) + 1, backend=keep, fullgraph=True)(x), 2 * x + 1)
    assert "fastdit_tests.double" in graphs[0].print_readable(print_output=False)


def test_every_operator_is_registered_here():
    folder = Path(adaln.__file__).parent
    assert [path.name for path in folder.glob("*.py") if "torch.library" in path.read_text()] == ["_operator.py"]


def test_a_blocks_layers_do_without_the_dispatcher(monkeypatch):
    """modulated_linear and gelu_linear, forward and backward."""

    def refuse(*args):
        raise AssertionError("the dispatcher was asked")

    for op in (linear.adaln, adaln.adaln_backward, linear.gelu, linear.gelu_backward):
        monkeypatch.setattr(op, "op", refuse)
    x, y = (normal(2, 5, 8, seed=seed).requires_grad_() for seed in (1, 2))
    vectors = [normal(2, 8, seed=seed).requires_grad_() for seed in (3, 4, 5)]
    weight = normal(12, 8, seed=6).requires_grad_()
    r, out = linear.modulated_linear(x, y, *vectors, weight, implementation="triton")
    out = linear.gelu_linear(out, normal(8, 12, seed=7).requires_grad_(), implementation="triton")
    (r.sum() + out.sum()).backward()
    assert x.grad.device.type == DEVICE


def test_a_constant_result_is_what_torch_makes_of_it():
    """The decorator sets the attribute that torch's own sets, and no other; torch's takes long to import."""
    from fastdit.kernels._dispatch import constant_result

    assert vars(constant_result(lambda: 0)) == vars(torch.compiler.assume_constant_result(lambda: 0)) != {}


COMMANDS = """
import sys, fastdit.evaluate, fastdit.sample, fastdit.train
fastdit.train._train({train})
fastdit.sample._sample({sample})
print("torch._dynamo" in sys.modules)
"""


@pytest.mark.launch
def test_training_and_sampling_do_not_import_the_compiler(tmp_path):
    train = [*TINY, "--steps", "1", "--out", str(tmp_path / "run"), "--sample.agreement", "0"]
    sample = ["--run", str(tmp_path / "run"), "--n", "2", "--out", str(tmp_path / "grid.png"), "--device", "cpu"]
    outcome = run(python("-c", COMMANDS.format(train=train, sample=sample)), tmp_path / "log").succeeded()
    assert outcome.text.rstrip().endswith("False")
