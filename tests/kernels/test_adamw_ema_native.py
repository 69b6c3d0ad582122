"""csrc/adamw_ema: the C++ and the CUDA kernels against a numpy transcription of the rule, bit for bit.

The CUDA kernels run here on the CPU (tests/helpers/cuda_on_cpu) and, where there is a GPU, unchanged on it.
"""

import copy
import math
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from adamw_ema_helpers import tensors

from fastdit.kernels import AdamWEMA, adamw_ema
from fastdit.kernels._native import CudaLibrary, load_native
from fastdit.kernels.adamw_ema import adamw_ema_, squared_norm

CSRC = Path(__file__).parents[2] / "csrc"
CUDA_ON_CPU = Path(__file__).parents[1] / "helpers/cuda_on_cpu"
F = np.float32
NO_CPP = load_native("cpu")[1]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_cpp = pytest.mark.skipif(bool(NO_CPP), reason=f"C++ kernels not built: {NO_CPP}")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA library on the CPU, where a misaligned access or an integer overflow ends the process."""
    path = tmp_path_factory.mktemp("cuda") / "library.so"
    command = ["g++", "-x", "c++", "-std=c++17", "-O1", "-march=x86-64", "-ffp-contract=off", "-shared", "-fPIC"]
    command += ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
    command += [
        "-I",
        str(CUDA_ON_CPU),
        str(CSRC / "adamw_ema_cuda.cu"),
        "-o",
        str(path),
    ]
    subprocess.run(command, check=True)
    return CudaLibrary(str(path), device="cpu")


@pytest.fixture(
    params=[
        pytest.param("cpp", marks=needs_cpp),
        "cuda_on_cpu",
        pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu]),
    ]
)
def device(request, monkeypatch) -> torch.device:
    """The device of one implementation; `implementation="cpp"` is then that one."""
    if request.param == "cuda_on_cpu":
        library = request.getfixturevalue("emulated")
        monkeypatch.setattr(adamw_ema, "load_native", lambda device_type: (library, ""))
    return torch.device("cuda" if request.param == "cuda" else "cpu")


class Numpy:
    """The rule of adamw_ema.h, written again in numpy fp32, one array."""

    def __init__(self, weight, decays):
        self.weight = weight.astype(F)
        self.m, self.v, self.steps = np.zeros_like(self.weight), np.zeros_like(self.weight), 0
        self.averages = {decay: self.weight.copy() for decay in decays}

    @staticmethod
    def lerp(a, b, weight):
        return a + F(weight) * (b - a) if weight < 0.5 else b + F(weight - 1) * (b - a)

    def step(self, grad, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scale=1.0):
        self.steps += 1
        beta1, beta2 = betas
        grad = grad.astype(F) * F(scale)
        self.m = self.lerp(self.m, grad, 1 - beta1)
        self.v = F(beta2) * self.v + F(1 - beta2) * grad * grad
        size = F(lr / (1 - math.pow(beta1, self.steps)))
        root = F(1 / math.sqrt(1 - math.pow(beta2, self.steps)))
        denominator = np.sqrt(self.v) * root + F(eps)
        self.weight = self.weight - (size * self.m / denominator + F(lr * weight_decay) * self.weight)
        for decay, average in self.averages.items():
            self.averages[decay] = self.lerp(average, self.weight, 1 - decay)


def bits(tensor):
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(torch.int32).numpy()


def same_bits(tensor, array):
    return np.array_equal(bits(tensor), np.ascontiguousarray(array, F).view(np.int32))


@pytest.mark.parametrize(("size", "misalign", "steps"), [(1, 0, 50), (7, 0, 50), (9999, 3, 50), (1_000_003, 1, 2)])
def test_bits_of_the_rule(device, size, misalign, steps):
    """50 steps, two averages, a schedule, decay: every bit of every state as numpy fp32 has it."""
    (start,) = tensors(device, size, misalign=misalign)
    param = torch.nn.Parameter(start)
    assert param.data_ptr() == start.data_ptr()
    twin = Numpy(start.cpu().numpy(), [0.9, 0.9999])
    optimizer = AdamWEMA([param], weight_decay=0.1, emas={"fast": 0.9, "slow": 0.9999}, implementation="cpp")
    for step in range(steps):
        (param.grad,) = tensors(device, size, seed=step + 1, misalign=misalign)
        lr = 1e-3 * (step + 1) / steps
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        twin.step(param.grad.cpu().numpy(), lr, weight_decay=0.1)
    state = optimizer.state[param]
    assert float(state["step"]) == steps
    assert same_bits(param, twin.weight)
    assert same_bits(state["exp_avg"], twin.m)
    assert same_bits(state["exp_avg_sq"], twin.v)
    assert same_bits(state["fast"], twin.averages[0.9])
    assert same_bits(state["slow"], twin.averages[0.9999])


def test_many_tensors_with_their_own_steps(device):
    """More tensors than one launch takes (36), odd sizes, some empty or off the grid, some younger than others."""
    sizes = [(i * 37) % 301 for i in range(80)]  # has a 0
    params = [torch.nn.Parameter(tensors(device, n, seed=n, misalign=i % 3)[0]) for i, n in enumerate(sizes)]
    twins = [Numpy(p.detach().cpu().numpy(), [0.5]) for p in params]
    optimizer = AdamWEMA(params, lr=1e-2, emas={"ema": 0.5}, implementation="cpp")
    for step in range(3):
        for i, (param, twin) in enumerate(zip(params, twins)):
            param.grad = None
            if i % 4 or step == 1:
                (param.grad,) = tensors(device, param.numel(), seed=100 * step + i)
                twin.step(param.grad.cpu().numpy(), 1e-2)
        optimizer.step()
    for param, twin in zip(params, twins):
        assert same_bits(param, twin.weight)
        assert same_bits(optimizer.state[param]["ema"], twin.averages[0.5])


def run(device, size=2003, steps=4, emas=None, lr=1e-2, **settings):
    """Parameters and averages after a few steps."""
    params = [torch.nn.Parameter(p) for p in tensors(device, size, count=2)]
    optimizer = AdamWEMA(params, lr=lr, emas=emas, **settings)
    for step in range(steps):
        for i, param in enumerate(params):
            (param.grad,) = tensors(device, size, seed=10 * step + i)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 6])
def test_any_number_of_averages(device, count):
    """Also more than one pass takes (4), which follow by themselves."""
    decays = {f"ema{i}": d for i, d in enumerate([0.3, 0.5, 0.7, 0.9, 0.99, 0.6][:count])}
    params, optimizer = run(device, emas=decays, implementation="cpp")
    exact, expected = run(torch.device("cpu"), emas=decays, implementation="reference")
    for param, other in zip(params, exact):
        torch.testing.assert_close(param.cpu(), other, rtol=2e-6, atol=2e-7)
        assert set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq", *decays}
        for name in decays:
            found = optimizer.state[param][name]
            torch.testing.assert_close(found.cpu(), expected.state[other][name], rtol=2e-6, atol=2e-7)


def test_decays_zero_and_one_are_exact(device):
    start = tensors(device, 2003, count=2)
    params, optimizer = run(device, emas={"weights": 0.0, "start": 1.0}, implementation="cpp")
    for param, first in zip(params, start):
        assert torch.equal(optimizer.state[param]["weights"], param)
        assert torch.equal(optimizer.state[param]["start"], first)
        assert not torch.equal(param, first)


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_gradient_changes_nothing(device, implementation, bad):
    """No tensor of any group changes, wherever the bad value lies."""
    settings = {"emas": {f"ema{i}": 0.9 for i in range(5)}, "implementation": implementation}
    for place in (0, 1001, 2002):
        params, optimizer = run(device, steps=2, **settings)
        optimizer.add_param_group({"params": [torch.nn.Parameter(tensors(device, 5)[0])], "emas": {"ema0": 0.5}})
        params = [*params, optimizer.param_groups[1]["params"][0]]
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        before = {p: (bits(p), {k: bits(v) for k, v in optimizer.state[p].items()}) for p in params}
        assert float(optimizer.nonfinite) == 0
        params[1].grad[place] = bad
        optimizer.step()
        assert float(optimizer.nonfinite) == 1
        for param, (weight, state) in before.items():
            assert np.array_equal(bits(param), weight)
            assert all(np.array_equal(bits(optimizer.state[param][name]), kept) for name, kept in state.items())
        params[1].grad[place] = 0
        optimizer.forget_nonfinite()
        optimizer.step()
        assert float(optimizer.nonfinite) == 0
        assert not np.array_equal(bits(params[2]), before[params[2]][0])


@pytest.mark.parametrize("misalign", [0, 1])
def test_bf16_copy_rounds_to_nearest_even(device, misalign):
    """All 2^16 upper halves with lower halves at and beside each tie, as torch rounds them."""
    upper = torch.arange(2**16, dtype=torch.int64).repeat_interleave(6) << 16
    lower = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]).repeat(2**16)
    values = (upper + lower).to(torch.int32).view(torch.float32)
    values = values[~values.isinf()]
    weight = torch.zeros(len(values) + misalign, device=device)[misalign:].copy_(values)
    zeros = [torch.zeros_like(weight) for _ in range(3)]
    rounded = torch.zeros(len(values), dtype=torch.bfloat16, device=device)
    arguments = [[weight], *([z] for z in zeros), [torch.zeros((), device=device)], []]
    settings = {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bf16_copies": [rounded]}
    adamw_ema_(*arguments, **settings, skip=torch.ones((), device=device), implementation="cpp")
    assert not rounded.any()
    adamw_ema_(*arguments, **settings, skip=torch.zeros((), device=device), implementation="cpp")
    found, expected, numbers = rounded.cpu(), values.bfloat16(), ~values.isnan()
    assert torch.equal(found[numbers].view(torch.int16), expected[numbers].view(torch.int16))
    assert found[~numbers].isnan().all()
    assert torch.equal(weight.cpu()[numbers], values[numbers])
    other = torch.zeros_like(rounded)
    adamw_ema_(*arguments, **settings | {"bf16_copies": [other]}, skip=zeros[0][0], implementation="reference")
    assert torch.equal(rounded[numbers].view(torch.int16), other[numbers].view(torch.int16))


@pytest.mark.parametrize("odd_one", range(7))
def test_any_tensor_may_lie_off_the_grid(device, odd_one):
    """16-byte accesses only where every address allows them."""
    names = ("weight", "gradient", "exp_avg", "exp_avg_sq", "average 1", "average 2")
    weight, gradient, m, v, first, second = (
        tensors(device, 4099, seed=i, misalign=int(i == odd_one))[0].abs_() for i in range(len(names))
    )
    rounded = torch.zeros(4100, dtype=torch.bfloat16, device=device)[int(odd_one == 6) :][:4099]
    twin = Numpy(weight.cpu().numpy(), [])
    twin.m, twin.v = m.cpu().numpy().copy(), v.cpu().numpy().copy()
    twin.averages = {0.9: first.cpu().numpy().copy(), 0.4: second.cpu().numpy().copy()}
    adamw_ema_(
        *([t] for t in (weight, gradient, m, v, torch.zeros((), device=device))),
        [(0.9, [first]), (0.4, [second])],
        lr=1e-2,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.1,
        skip=torch.zeros((), device=device),
        bf16_copies=[rounded],
        implementation="cpp",
    )
    twin.step(gradient.cpu().numpy(), 1e-2, weight_decay=0.1)
    for found, expected in zip((weight, m, v, first, second), (twin.weight, twin.m, twin.v, *twin.averages.values())):
        assert same_bits(found, expected)
    assert torch.equal(rounded, weight.bfloat16())


def test_independent_of_threads_runs_and_place(device):
    """The same bits from any number of threads, every time, and for a weight anywhere in any tensor."""
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            params, optimizer = run(device, 40_009, emas={"ema": 0.99}, max_norm=1.0, implementation="cpp")
            found.append([bits(t) for p in params for t in (p, *optimizer.state[p].values())])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other))

    (whole,), (grad,) = tensors(device, 1000), tensors(device, 1000, seed=1)
    whole = torch.nn.Parameter(whole)
    parts = [torch.nn.Parameter(whole.detach()[a:b].clone()) for a, b in [(0, 1), (1, 18), (18, 1000)]]
    whole.grad = grad
    for part, (a, b) in zip(parts, [(0, 1), (1, 18), (18, 1000)]):
        part.grad = grad[a:b]
    for params in ([whole], parts):
        optimizer = AdamWEMA(params, lr=1e-2, weight_decay=0.3, implementation="cpp")
        optimizer.step()
        optimizer.step()
    assert np.array_equal(bits(whole), bits(torch.cat([p.detach() for p in parts])))


def test_norm(device):
    """Exact to double rounding, the same every time, no overflow, off the grid, over more tensors than one launch."""
    lists = [tensors(device, n, seed=n, misalign=n % 3)[0] for n in (1, 7, 150_001, *range(30, 75))]
    exact = math.fsum(float(x) ** 2 for t in lists for x in t.double().cpu())
    before, totals = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            totals.add(float(squared_norm(lists, implementation="cpp")))
    finally:
        torch.set_num_threads(before)
    assert len(totals) == 1
    assert totals.pop() == pytest.approx(exact, rel=1e-13)
    assert float(squared_norm(lists, implementation="reference")) == pytest.approx(exact, rel=1e-5)
    huge = torch.full((65, 3), 3e38, device=device)
    assert float(squared_norm([huge], implementation="cpp")) == pytest.approx(195 * float(F(3e38)) ** 2, rel=1e-13)
    assert squared_norm([lists[0]], implementation="cpp").device.type == device.type


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_max_norm(device, implementation):
    """Clipping is clip_grad_norm_ over all groups before the step; a norm below the limit and the gradients stay."""
    for limit in (0.5, 1e6):
        ours, theirs = ([torch.nn.Parameter(p) for p in tensors(device, 33, 5, count=3)] for _ in range(2))
        grads = tensors(device, 33, 5, seed=1, count=3)
        mine = AdamWEMA(
            [{"params": ours[:1]}, {"params": ours[1:]}], lr=1e-2, max_norm=limit, implementation=implementation
        )
        plain = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0)
        for _ in range(3):
            for param, other, grad in zip(ours, theirs, grads):
                param.grad, other.grad = grad.clone(), grad.clone()
            torch.nn.utils.clip_grad_norm_(theirs, limit)
            mine.step()
            plain.step()
        for param, other, grad in zip(ours, theirs, grads):
            torch.testing.assert_close(param, other, rtol=2e-6, atol=2e-7)
            torch.testing.assert_close(
                mine.state[param]["exp_avg"], plain.state[other]["exp_avg"], rtol=3e-6, atol=1e-9
            )
            assert torch.equal(param.grad, grad)


def test_close_to_double_precision(device):
    """50 steps against torch's AdamW in fp64 and its averages: an error of a few roundings, no drift."""
    (start,) = tensors(device, 300, 7)
    ours = torch.nn.Parameter(start.clone())
    exact = torch.nn.Parameter(start.double().cpu())
    average = exact.detach().clone()
    mine = AdamWEMA([ours], lr=3e-3, weight_decay=0.05, betas=(0.8, 0.95), emas={"ema": 0.9}, implementation="cpp")
    theirs = torch.optim.AdamW([exact], lr=3e-3, weight_decay=0.05, betas=(0.8, 0.95), foreach=False)
    for step in range(50):
        (ours.grad,) = tensors(device, 300, 7, seed=step + 1)
        exact.grad = ours.grad.double().cpu()
        mine.step()
        theirs.step()
        average.lerp_(exact.detach(), 0.1)
    assert (ours.detach().double().cpu() - exact.detach()).abs().max() < 2e-6
    assert (mine.state[ours]["ema"].double().cpu() - average).abs().max() < 2e-6


def test_small_decay_is_exact(device):
    """`weight *= 1 - lr * weight_decay` would lose 1.3 % of a decay of 1e-6 to the rounding of that factor."""
    (start,) = tensors(device, 4096)
    param = torch.nn.Parameter(start.clone())
    optimizer = AdamWEMA([param], lr=1e-4, weight_decay=1e-2, implementation="cpp")
    for _ in range(300):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    decay = -(param.detach().double() / start.double()).log().mean()
    assert float(decay) == pytest.approx(300e-6, rel=3e-3)


def test_state_goes_to_and_from_torch_adamw(device):
    """A run handed over midway, either way, goes on as one of the other kind; missing averages start at its weights."""

    def go(optimizer, params, first, last):
        for step in range(first, last):
            for i, param in enumerate(params):
                (param.grad,) = tensors(device, 501, seed=10 * step + i)
            optimizer.step()

    def fresh(kind, values, **settings):
        params = [torch.nn.Parameter(value.detach().clone()) for value in values]
        return params, kind(params, lr=1e-2, weight_decay=0.1, **settings)

    ours = {"emas": {"ema": 0.9}, "implementation": "cpp"}
    start = tensors(device, 501, count=2)
    expected, plain = fresh(torch.optim.AdamW, start)
    go(plain, expected, 0, 6)

    for settings in ({}, {"fused": True}, {"foreach": True}):
        theirs, their_optimizer = fresh(torch.optim.AdamW, start, **settings)
        go(their_optimizer, theirs, 0, 3)
        params, optimizer = fresh(AdamWEMA, theirs, **ours)
        optimizer.load_state_dict(copy.deepcopy(their_optimizer.state_dict()))
        state = optimizer.state[params[0]]
        assert state["step"].dtype == torch.float32
        assert state["step"].device.type == device.type
        assert optimizer.param_groups[0]["emas"] == {"ema": 0.9}
        go(optimizer, params, 3, 6)
        for param, other in zip(params, expected):
            torch.testing.assert_close(param, other, rtol=2e-6, atol=2e-7)
        assert float(state["step"]) == 6
        late, reference = fresh(AdamWEMA, theirs, **ours)  # what averages from step 3 on would be
        reference.load_state_dict(copy.deepcopy(their_optimizer.state_dict()))
        average = late[0].detach().clone()
        for step in range(3, 6):
            go(reference, late, step, step + 1)
            average.lerp_(late[0].detach(), 0.1)
        torch.testing.assert_close(state["ema"], average, rtol=2e-6, atol=2e-7)

        params, optimizer = fresh(AdamWEMA, start, **ours)
        go(optimizer, params, 0, 3)
        theirs, their_optimizer = fresh(torch.optim.AdamW, params, **settings)
        their_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        go(their_optimizer, theirs, 3, 6)
        for param, other in zip(theirs, expected):
            torch.testing.assert_close(param, other, rtol=2e-6, atol=2e-7)


def test_own_state_continues_to_the_bit(device):
    settings = {"emas": {"ema": 0.9}, "implementation": "cpp"}
    whole, optimizer = run(device, steps=3, **settings)
    again = [torch.nn.Parameter(p.detach().clone()) for p in whole]
    resumed = AdamWEMA(again, **settings)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for params, each in ((whole, optimizer), (again, resumed)):
        for i, param in enumerate(params):
            (param.grad,) = tensors(device, param.numel(), seed=77 + i)
        each.step()
    for param, other in zip(whole, again):
        assert np.array_equal(bits(param), bits(other))
        assert all(np.array_equal(bits(v), bits(resumed.state[other][k])) for k, v in optimizer.state[param].items())


def test_autograd_notices_the_update(device):
    params, optimizer = run(device, steps=1, implementation="cpp")
    loss = (params[0] * params[0]).sum()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
