"""Denoising loss and clean estimate against the noise processes and their formulas in fp64."""

import sys

import pytest
import torch
from kernel_checks import DEVICE, IMPLEMENTATIONS, assert_exact, normal

from fastdit.kernels import DenoiseCoefficients, affine_denoise_loss
from fastdit.noise import EDM, Flow

MODULE = sys.modules["fastdit.kernels.denoise"]
SHAPE = (3, 4, 5, 7)


def edm_coefficients(sigma, sd=0.5):
    """Karras et al., Table 1, from their c_skip and c_out: target (x0 - c_skip x_t) / c_out."""
    c_skip = sd**2 / (sigma**2 + sd**2)
    c_out = sigma * sd / (sigma**2 + sd**2).sqrt()
    return (1 - c_skip) / c_out, -c_skip * sigma / c_out, c_skip, c_skip * sigma, c_out, torch.ones_like(sigma)


def flow_coefficients(t):
    one = torch.ones_like(t)
    return -one, one, 1 - t, t, -t, one


PROCESSES = {
    "edm": (EDM(), edm_coefficients, torch.tensor([0.01, 0.5, 30.0])),
    "flow": (Flow(), flow_coefficients, torch.tensor([0.001, 0.4, 0.99])),
}


def make(dtype=torch.float32, data=torch.float32):
    return normal(*SHAPE, seed=0, dtype=dtype), normal(*SHAPE, seed=1, dtype=data), normal(*SHAPE, seed=2, dtype=data)


def coefficients(dtype=torch.float32):
    return DenoiseCoefficients(*(normal(3, seed=10 + index, dtype=dtype) for index in range(6)))


def naive(out, x0, eps, table):
    losses, estimates = [], []
    for b in range(len(out)):
        tx, te, cx, ce, co, weight = (float(column[b]) for column in table)
        losses.append(weight * ((out[b] - tx * x0[b] - te * eps[b]) ** 2).mean())
        estimates.append(cx * x0[b] + ce * eps[b] + co * out[b])
    return torch.stack(losses), torch.stack(estimates)


def run(function, out, *rest, **named):
    """Values, and the gradient when both results are used."""
    out = out.detach().requires_grad_()
    loss, clean = function(out, *rest, **named)
    upstream = normal(3, seed=3).to(loss), normal(*SHAPE, seed=4).to(clean)
    (grad,) = torch.autograd.grad((loss, clean), out, upstream)
    return loss.detach(), clean.detach(), grad


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """140 numbers a sample in three blocks, the last ragged."""
    monkeypatch.setattr(MODULE, "_BLOCK", 64)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_equals_the_noise_process(implementation, process):
    noise, formula, level = PROCESSES[process]
    level = level.double().to(DEVICE)
    table = DenoiseCoefficients(*(x.float() for x in formula(level)))
    out, x0, eps = make()
    got = run(affine_denoise_loss, out, x0, eps, table, implementation=implementation)
    exact = run(noise.loss, *(x.double() for x in (out, x0, eps)), level)
    for a, b in zip(got, exact):
        assert a.dtype == torch.float32
        assert_exact(a, b, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_values_and_gradient(implementation):
    table = coefficients()
    got = run(affine_denoise_loss, *make(), table, implementation=implementation)
    exact = run(naive, *(x.double() for x in make()), table)
    for a, b in zip(got, exact):
        assert_exact(a, b, 2e-6)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_result_used(implementation, used):
    table, (out, x0, eps) = coefficients(), make()
    out.requires_grad_()
    result = affine_denoise_loss(out, x0, eps, table, implementation=implementation)[used]
    (got,) = torch.autograd.grad(result.sum(), out)
    exact_out = out.detach().double().requires_grad_()
    exact = torch.autograd.grad(naive(exact_out, x0.double(), eps.double(), table)[used].sum(), exact_out)[0]
    assert_exact(got, exact, 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_output(implementation, dtype):
    """fp32 arithmetic on what the network rounded: no error but that of the gradient's own rounding.

    The interpreter truncates to bf16: a whole unit in the last place is allowed, not half of one.
    """
    table, (out, x0, eps) = coefficients(), make(dtype)
    got = run(affine_denoise_loss, out, x0, eps, table, implementation=implementation)
    exact = run(naive, *(x.double() for x in (out, x0, eps)), table)
    assert got[2].dtype == dtype
    for a, b in zip(got[:2], exact):
        assert a.dtype == torch.float32
        assert_exact(a, b, 2e-6)
    allowed = torch.finfo(dtype).eps * exact[2].abs() + 1e-5
    assert ((got[2] - exact[2]).abs() <= allowed).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision_data_and_coefficients(implementation):
    table, inputs = coefficients(torch.bfloat16), make(torch.bfloat16, torch.bfloat16)
    got = run(affine_denoise_loss, *inputs, table, implementation=implementation)
    for a, b in zip(got[:2], run(naive, *(x.double() for x in inputs), table)):
        assert_exact(a, b, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_and_expanded(implementation):
    table, (out, x0, eps) = coefficients(), make()
    plain = run(affine_denoise_loss, out, x0[:1].expand(SHAPE), eps, table, implementation=implementation)
    channels_last = [x.contiguous(memory_format=torch.channels_last) for x in (out, eps)]
    spread = DenoiseCoefficients(*(torch.stack([x, x], 1)[:, 0] for x in table))
    got = run(
        affine_denoise_loss, channels_last[0], x0[:1].expand(SHAPE), channels_last[1], spread,
        implementation=implementation,
    )  # fmt: skip
    for a, b in zip(got, plain):
        assert_exact(a, b.double(), 1e-6)
    leaf = out.clone().requires_grad_()
    loss, _ = affine_denoise_loss(leaf, x0, eps, table, implementation=implementation)
    leaf64 = out.double().requires_grad_()
    (exact,) = torch.autograd.grad(naive(leaf64, x0.double(), eps.double(), table)[0].mean(), leaf64)
    assert_exact(torch.autograd.grad(loss.mean(), leaf)[0], exact, 2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_bits_twice_and_at_any_place_of_the_batch(implementation):
    table, inputs = coefficients(), make()
    order = [2, 0, 1]
    moved_table = DenoiseCoefficients(*(x[order] for x in table))
    first, second, moved = (
        affine_denoise_loss(*x, t, implementation=implementation)
        for x, t in ((inputs, table), (inputs, table), ([x[order] for x in inputs], moved_table))
    )
    for a, b, c in zip(first, second, moved):
        assert torch.equal(a, b)
        assert torch.equal(a[order], c)


def test_the_block_of_a_gpu(monkeypatch):
    monkeypatch.setattr(MODULE, "_BLOCK", 2048)
    for a, b in zip(
        run(affine_denoise_loss, *make(), coefficients(), implementation="triton"),
        run(naive, *(x.double() for x in make()), coefficients()),
    ):
        assert_exact(a, b, 2e-6)


def test_fp64_by_finite_differences():
    table = coefficients(torch.float64)
    out, x0, eps = (x[:, :1, :2, :2].double() for x in make())
    torch.autograd.gradcheck(lambda out: affine_denoise_loss(out, x0, eps, table), out.requires_grad_())


def test_operators_are_registered_soundly():
    out, x0, eps = make(torch.bfloat16)
    table = torch.stack(coefficients())
    torch.library.opcheck(MODULE._denoise.op, (out.requires_grad_(), x0, eps, table))
    detached = (out.detach(), x0, eps, table)
    torch.library.opcheck(MODULE._denoise_backward.op, (normal(3, seed=5), None, *detached))
    torch.library.opcheck(MODULE._denoise_backward.op, (None, normal(*SHAPE, seed=5), *detached))


@pytest.mark.parametrize(("implementation", "backend"), [("reference", "aot_eager"), ("triton", "inductor")])
def test_compiled(implementation, backend):
    table, (out, x0, eps) = coefficients(), make()

    def step(out):
        loss, clean = affine_denoise_loss(out, x0, eps, table, implementation=implementation)
        return loss.mean() + clean.square().mean()

    out.requires_grad_()
    got, plain = torch.compile(step, fullgraph=True, backend=backend)(out), step(out)
    assert_exact(got, plain.double(), 1e-6)
    grads = [torch.autograd.grad(x, out)[0] for x in (got, plain)]
    assert_exact(grads[0], grads[1].double(), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(2, 4)}, "one shape"),
        ({"out": torch.zeros(3), "x0": torch.zeros(3), "eps": torch.zeros(3)}, r"\(B, \.\.\.\)"),
        ({"coefficients": [torch.zeros(3)] * 5}, "six floating"),
        ({"coefficients": [torch.zeros(2)] * 6}, r"six floating \(3,\)"),
        ({"x0": torch.zeros(3, 4, requires_grad=True)}, "only out gets a gradient"),
        ({"coefficients": [torch.zeros(3, requires_grad=True)] * 6}, "only out gets a gradient"),
        ({"implementation": "cpp"}, "cpp"),
    ],
)
def test_contract(change, message):
    arguments = {name: torch.zeros(3, 4) for name in ("out", "x0", "eps")} | {"coefficients": [torch.zeros(3)] * 6}
    with pytest.raises(ValueError, match=message):
        affine_denoise_loss(**(arguments | change))
