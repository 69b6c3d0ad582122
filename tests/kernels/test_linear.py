"""Modulated and GELU linear layers against fp64 formulas; what a block keeps; the whole model on kernels."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, assert_as_good_as, assert_exact, normal
from torch.library import opcheck

from fastdit.kernels import gelu_linear, modulated_linear
from fastdit.kernels._native import load_native
from fastdit.kernels.linear import gelu, gelu_backward
from fastdit.models import DiT
from fastdit.models.dit import Block

CPP = DEVICE == "cpu" and load_native("cpu")[0] is not None
IMPLEMENTATIONS = ["reference", "triton", *(["cpp"] if CPP else [])]


def plain(x, y, gate, scale, shift, weight, bias, *, norm="layer", rows=None):
    """In PyTorch's words, in the inputs' precision."""
    r = x if y is None else x + gate[:, None] * y
    if rows is not None:
        r = torch.stack([sample[picked] for sample, picked in zip(r, rows.long())])
    centred = r - r.mean(-1, keepdim=True) if norm == "layer" else r
    normed = centred * (centred.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return r, (normed * (1 + scale[:, None]) + shift[:, None]) @ weight.T + (0 if bias is None else bias)


def plain_gelu(u, weight, bias):
    g = 0.5 * u * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)))
    return g @ weight.T + (0 if bias is None else bias)


def inputs(batch=3, tokens=7, width=72, out=40, dtype=torch.float32):
    x, y = normal(2, batch, tokens, width, seed=0, dtype=dtype)
    vectors = normal(batch, 5, width, seed=1, dtype=dtype).unbind(1)[1:4]
    weight, bias = normal(out, width, seed=2, dtype=dtype) / width**0.5, normal(out, seed=3, dtype=dtype)
    return [t.detach().requires_grad_() for t in (x, y, *vectors, weight, bias)]


def double(tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def compare(call, exact_call, tensors, used=(0, 1), tolerance=1e-5):
    """Outputs and every gradient; the upstream gradients are transposed in memory."""
    results = []
    for f, leaves in ((call, tensors), (exact_call, double(tensors))):
        out = f(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        picked = [out[i] for i in used]
        upstream = [normal(*o.shape[::-1], seed=4 + i).to(o.dtype).permute(2, 1, 0) for i, o in zip(used, picked)]
        wanted = [leaf for leaf in leaves if leaf is not None]
        results.append([*out, *torch.autograd.grad(picked, wanted, upstream, allow_unused=True)])
    for got, exact in zip(*results):
        if exact is None:
            assert got is None
        else:
            assert_exact(got, exact, tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("keep_x", [False, True])
@pytest.mark.parametrize("used", [(0, 1), (0,), (1,)], ids=["both", "stream", "product"])
@pytest.mark.parametrize("first", [False, True])
def test_modulated_linear(implementation, keep_x, used, first):
    tensors = inputs()
    if first:
        tensors[1:3] = None, None
    if first and used == (0,):
        pytest.skip("r is x")
    call = partial(modulated_linear, keep_x=keep_x, implementation=implementation)
    compare(call, plain, tensors, used)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("keep_x", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_modulated_linear_of_some_tokens(implementation, keep_x, first):
    tensors = inputs()
    tensors[6] = None
    if first:
        tensors[1:3] = None, None
    options = {"norm": "rms", "rows": torch.tensor([[3, 0, 6], [1, 5, 2], [6, 4, 0]], device=DEVICE)}
    call = partial(modulated_linear, **options, keep_x=keep_x, implementation=implementation)
    compare(call, partial(plain, **options), tensors)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gelu_linear(implementation, with_bias):
    *_, weight, bias = inputs()
    u = (2 * normal(3, 7, 72, seed=6)).requires_grad_()
    compare(
        partial(gelu_linear, implementation=implementation), plain_gelu, [u, weight, bias if with_bias else None], (0,)
    )


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by Triton's interpreter; it is meant to
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_gelu_far_out(implementation):
    """No overflow, and the limits are u and 0."""
    u = torch.tensor([[-1e4, -30.0, -5.0, 0.0, 5.0, 30.0, 1e4]], device=DEVICE, requires_grad=True)
    g = gelu_linear(u, torch.eye(7, device=DEVICE), implementation=implementation)
    (slope,) = torch.autograd.grad(g.sum(), u)
    u64 = u.detach().double().requires_grad_()
    g64 = F.gelu(u64, approximate="tanh")
    torch.testing.assert_close(g.double(), g64, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope.double(), torch.autograd.grad(g64.sum(), u64)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_parameters(frozen):
    """Their gradients are not computed; all others are what they were."""
    tensors = inputs()
    names = ["x", "y", "gate", "scale", "shift", "weight", "bias"]
    hidden = normal(3, 7, 72, seed=6).requires_grad_()
    results = []
    for freeze in (False, True):
        leaves = [t.detach().requires_grad_(not (freeze and name == frozen)) for name, t in zip(names, tensors)]
        r, out = modulated_linear(*leaves, implementation="triton")
        out2 = gelu_linear(hidden, *leaves[5:], implementation="triton")
        loss = r.square().sum() + out.square().sum() + out2.square().sum()
        loss.backward()
        results.append([t.grad for t in leaves])
    for name, free, held in zip(names, *results):
        assert held is None if name == frozen else torch.equal(free, held)


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_autocast(implementation):
    """It is nn.Linear under autocast: a bf16 product of fp32 parameters, whose gradients are fp32."""
    tensors = inputs()
    x, *_, weight, bias = tensors
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        r, out = modulated_linear(*tensors, implementation=implementation)
        out2 = gelu_linear(x, weight, bias, implementation=implementation)
        low = (*plain_under_autocast(*tensors), F.linear(F.gelu(x, approximate="tanh"), weight, bias))
    assert (r.dtype, out.dtype, out2.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    exact = double(tensors)
    out64 = *plain(*exact), plain_gelu(exact[0], *exact[5:])
    results = []
    for outputs, leaves in (((r, out, out2), tensors), (low, tensors), (out64, exact)):
        loss = sum((o * o.detach()).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    assert all(g.dtype == torch.float32 for g in results[0][3:])
    for got, torchs, want in zip(*results):
        assert_as_good_as(got, torchs, want)


def plain_under_autocast(x, y, gate, scale, shift, weight, bias):
    r = x + gate[:, None] * y
    return r, F.linear(F.layer_norm(r, r.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None], weight, bias)


def test_bf16():
    tensors = inputs(dtype=torch.bfloat16)
    hidden = normal(3, 7, 72, seed=6, dtype=torch.bfloat16).requires_grad_()

    def kernels(*leaves, u):
        r, out = modulated_linear(*leaves, implementation="triton")
        return r, out, gelu_linear(u, *leaves[5:], implementation="triton")

    def torchs(*leaves, u):
        return *plain_under_autocast(*leaves), F.linear(F.gelu(u, approximate="tanh"), *leaves[5:])

    def exact(*leaves, u):
        return *plain(*leaves), plain_gelu(u, *leaves[5:])

    results = []
    for call, (*leaves, u) in (
        (kernels, (*tensors, hidden)),
        (torchs, (*tensors, hidden)),
        (exact, double((*tensors, hidden))),
    ):
        outputs = call(*leaves, u=u)
        grads = torch.autograd.grad(outputs, (*leaves, u), [normal(*o.shape, seed=7).to(o.dtype) for o in outputs])
        results.append([*outputs, *grads])
    for got, low, want in zip(*results):
        assert_as_good_as(got, low, want)


def test_the_same_bits_twice():
    results = []
    for _ in range(2):
        tensors = inputs(tokens=19)
        r, out = modulated_linear(*tensors, implementation="triton")
        out2 = gelu_linear(out, normal(24, 40, seed=8), implementation="triton")
        results.append([r, out, out2, *torch.autograd.grad(out2.square().sum() + r.square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


def test_operators():
    u, dg = normal(2, 3, 7, 72, seed=0)
    opcheck(gelu.op, (u,))
    opcheck(gelu.op, (u.transpose(1, 2),))
    opcheck(gelu_backward.op, (dg.transpose(1, 2), u.transpose(1, 2), None))
    opcheck(gelu_backward.op, (dg, u, normal(72, seed=1).bfloat16()))


def test_contracts():
    x, y, gate, scale, shift, weight, bias = inputs()
    with pytest.raises(ValueError, match=r"weight must be \(O, 72\), got \(40, 71\)"):
        modulated_linear(x, y, gate, scale, shift, weight[:, :71], bias)
    with pytest.raises(ValueError, match=r"bias must be \(O,\) = \(40,\), got \(39,\)"):
        gelu_linear(x, weight, bias[:39])
    with pytest.raises(ValueError, match="y and gate go together"):
        modulated_linear(x, y, None, scale, shift, weight)
    with pytest.raises(ValueError, match="scale must be"):
        modulated_linear(x, y, gate, scale[:2], shift, weight)
    with pytest.raises(ValueError, match="implementation='triton' cannot"):
        gelu_linear(x.double(), weight.double(), implementation="triton")
    with pytest.raises(ValueError, match="implementation='cpp' cannot"):
        gelu_linear(x, weight, implementation="cpp")


# What a block keeps for the backward pass


def kept_bytes(run, others) -> int:
    """Count the bytes that autograd holds after `run`, memory of `others` aside."""
    storages = {}

    def note(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    for tensor in others:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.57), (torch.bfloat16, 0.42)])
def test_stored_activations_of_a_block(monkeypatch, dtype, share):
    """The stream, y, q, k, v, the attention's output, its projection, the hidden layer: 11 tensors of the stream's
    size, and the attention's log-sum-exp. On a GPU torch pads that to 32 tokens and keeps a random state of 16 bytes.
    PyTorch's own operations keep 20 tensors in fp32, and fp32 copies in bf16."""
    batch, tokens, width, heads = 2, 16, 64, 2
    block = Block(width, heads, 4 * width, "sdpa").to(DEVICE, dtype)
    with torch.no_grad():
        for i, weight in enumerate(block.parameters()):
            weight.copy_(normal(*weight.shape, seed=i) / 8)
    x, y = (normal(batch, tokens, width, seed=seed, dtype=dtype).clone().requires_grad_() for seed in (0, 1))
    vectors = normal(batch, 7, width, seed=1, dtype=dtype).requires_grad_().unbind(1)
    kept = {}
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("FASTDIT_KERNELS", kernels)
        kept[kernels] = kept_bytes(lambda: block(x, y, *vectors), [*block.parameters(), *vectors])
    stream = x.numel() * x.element_size()
    sums, random_state = (tokens, 0) if DEVICE == "cpu" else (32, 16)
    statistics = 2 * batch * tokens * 2 * 4 + batch * heads * sums * 4 + random_state
    assert kept["triton"] <= 11 * stream + statistics
    assert kept["triton"] <= share * kept["reference"]


# The whole model


def make_model(**changes):
    sizes = {"input_size": 6, "patch": 2, "channels": 3, "width": 72, "depth": 2, "heads": 3, "classes": 5}
    model = DiT(**(sizes | changes)).to(DEVICE)
    with torch.no_grad():
        for i, weight in enumerate(model.parameters()):
            fan_in = weight[0].numel() if weight.dim() > 1 else 4
            weight.copy_(normal(*weight.shape, seed=i) / fan_in**0.5)
    return model


def step(model, call=None):
    """Output and all gradients of one small batch, the input's with them."""
    x = normal(3, 3, 6, 6, seed=100).requires_grad_()
    out = (model if call is None else call)(
        x, torch.tensor([0.0, 999.0, 417.5], device=DEVICE), torch.tensor([0, 5, 3], device=DEVICE)
    )
    return out, torch.autograd.grad(out.square().sum(), [x, *model.parameters()])


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-5)
    for one, other in zip(got[1], want[1]):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * other.abs().max().item())


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS[1:])
@pytest.mark.parametrize("grad_checkpoint", [False, True])
def test_model_on_kernels_equals_the_plain_model(monkeypatch, kernels, grad_checkpoint):
    model = make_model(grad_checkpoint=grad_checkpoint)
    monkeypatch.setenv("FASTDIT_KERNELS", "reference")
    plain_step = step(model)
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    assert_same(step(model), plain_step)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_compiled_model(monkeypatch, kernels):
    """Forward and backward in one graph, as torch.compile traces them."""
    monkeypatch.setenv("FASTDIT_KERNELS", kernels)
    torch.compiler.reset()
    model = make_model()
    assert_same(step(model, torch.compile(model, fullgraph=True, backend="aot_eager")), step(model))
