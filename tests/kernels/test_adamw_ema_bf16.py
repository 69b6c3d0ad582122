"""csrc/adamw_ema with bf16 gradients: the bits of the same gradients in fp32, on CPU, emulated CUDA and GPU."""

import math

import numpy as np
import pytest
import torch
from adamw_ema_helpers import tensors
from test_adamw_ema_native import Numpy, bits, device, emulated, same_bits  # noqa: F401 - fixtures

from fastdit.kernels import AdamWEMA
from fastdit.kernels.adamw_ema import squared_norm

SIZES = [1, 3, 4, 7, 0, 1000, 4099, *range(30, 75)]  # more tensors than one launch takes
EMAS = {"fast": 0.9, "slow": 0.9999}


def bf16(device, size, seed=0, misalign=0, scale=1.0):  # noqa: F811
    """Normal bf16 numbers, `misalign` numbers off the 16-byte grid."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.zeros(size + misalign, dtype=torch.bfloat16, device=device)
    return base[misalign:].copy_(torch.randn(size, generator=generator) * scale)


def train(device, half, implementation="cpp", misalign=0, steps=4, sizes=SIZES, spoil=None, **settings):  # noqa: F811
    """Return parameters, optimizer and bf16 copies after steps by bf16 gradients, or by their values in fp32."""
    params = [torch.nn.Parameter(tensors(device, n, seed=i)[0]) for i, n in enumerate(sizes)]
    copies = {p: bf16(device, p.numel(), misalign=misalign) for p in params}
    optimizer = AdamWEMA(params, lr=1e-2, weight_decay=0.1, emas=EMAS, implementation=implementation, **settings)
    for step in range(steps):
        grads = {p: bf16(device, p.numel(), 100 * step + i, misalign) for i, p in enumerate(params)}
        if step == spoil:
            grads[params[5]][-1] = math.nan
        optimizer.update(grads if half else {p: g.float() for p, g in grads.items()}, copies)
    return params, optimizer, copies


def everything(params, optimizer, copies) -> list[torch.Tensor]:
    """All tensors that an update writes."""
    states = [state for p in params for state in optimizer.state[p].values()]
    return [t.detach().cpu() for t in (*params, *states, *copies.values(), optimizer.grad_norm)]


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
@pytest.mark.parametrize("misalign", range(5))
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_the_bits_are_those_of_fp32_gradients(device, implementation, misalign, max_norm):  # noqa: F811
    settings = {"implementation": implementation, "misalign": misalign, "max_norm": max_norm}
    half, single = (everything(*train(device, kind, **settings)) for kind in (True, False))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(half, single, strict=True))


@pytest.mark.parametrize(("size", "misalign", "steps"), [(1, 0, 20), (7, 1, 20), (9999, 3, 20), (1_000_003, 2, 2)])
def test_bits_of_the_rule(device, size, misalign, steps):  # noqa: F811
    """Against numpy fp32, on gradients converted there."""
    param = torch.nn.Parameter(tensors(device, size)[0])
    copy = torch.zeros(size, dtype=torch.bfloat16, device=device)
    twin = Numpy(param.detach().cpu().numpy(), EMAS.values())
    optimizer = AdamWEMA([param], lr=1e-3, weight_decay=0.1, emas=EMAS, implementation="cpp")
    for step in range(steps):
        grad = bf16(device, size, step + 1, misalign)
        optimizer.update({param: grad}, {param: copy})
        twin.step(grad.float().cpu().numpy(), 1e-3, weight_decay=0.1)
    state = optimizer.state[param]
    found = (param, state["exp_avg"], state["exp_avg_sq"], state["fast"], state["slow"])
    for tensor, array in zip(found, (twin.weight, twin.m, twin.v, *twin.averages.values()), strict=True):
        assert same_bits(tensor, array)
    assert torch.equal(copy, param.bfloat16())


@pytest.mark.parametrize("implementation", ["cpp", "reference"])
def test_a_nan_changes_nothing(device, implementation):  # noqa: F811
    """Neither weights, states and bf16 copies, and the next step goes on."""
    settings = {"implementation": implementation, "max_norm": 0.5}
    before = everything(*train(device, True, steps=2, **settings))
    params, optimizer, copies = train(device, True, steps=3, spoil=2, **settings)
    assert float(optimizer.nonfinite) == 1
    assert not optimizer.grad_norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before[:-1], everything(params, optimizer, copies)[:-1]))
    optimizer.update({p: bf16(device, p.numel()) for p in params}, copies)
    assert optimizer.grad_norm.isfinite()
    assert not np.array_equal(bits(params[5]), bits(before[5]))


@pytest.mark.parametrize("misalign", range(5))
def test_norm(device, misalign):  # noqa: F811
    """The bits of the norm in fp32, no overflow, over more tensors and blocks than one launch and one chunk."""
    sizes = (1, 7, 150_001, 65_536, *range(30, 75))
    lists = [bf16(device, n, n, misalign, scale=10.0 ** (n % 9 - 4)) for n in sizes]
    found = squared_norm(lists, implementation="cpp")
    assert torch.equal(found, squared_norm([t.float() for t in lists], implementation="cpp"))
    exact = math.fsum(x**2 for t in lists for x in t.double().cpu().tolist())
    assert float(found) == pytest.approx(exact, rel=1e-13)
    reference = squared_norm(lists, implementation="reference")
    assert torch.equal(reference, squared_norm([t.float() for t in lists], implementation="reference"))
    assert found.device.type == reference.device.type == device.type
    huge = torch.full((65,), 3e38, dtype=torch.bfloat16, device=device)
    assert float(squared_norm([huge], implementation="cpp")) == pytest.approx(65 * float(huge[0]) ** 2, rel=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norm_is_not_finite_wherever_a_gradient_is_not(device, bad):  # noqa: F811
    for place in (0, 31, 32, 65_535, 65_536, 65_538):
        values = torch.zeros(65_539, dtype=torch.bfloat16, device=device)
        values[place] = bad
        assert not squared_norm([values], implementation="cpp").isfinite()


def test_mixed_gradients_go_to_torch(device):  # noqa: F811
    """Lists of bf16 and fp32 gradients are updated too, and refused only where the kernels were ordered."""
    params = [torch.nn.Parameter(tensors(device, 33, seed=i)[0]) for i in range(2)]
    grads = {params[0]: bf16(device, 33), params[1]: bf16(device, 33).float()}
    with pytest.raises(ValueError, match="implementation='cpp' cannot run here: it takes contiguous"):
        AdamWEMA(params, implementation="cpp").update(grads)
    AdamWEMA(params, lr=0.1).update(grads)
    expected = [torch.nn.Parameter(tensors(device, 33, seed=i)[0]) for i in range(2)]
    AdamWEMA(expected, lr=0.1, implementation="reference").update({p: bf16(device, 33).float() for p in expected})
    assert all(torch.equal(a, b) for a, b in zip(params, expected))
