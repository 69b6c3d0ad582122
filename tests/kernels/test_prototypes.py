"""Prototype cross-entropy against DINO's, iBOT's and DINOv2's formulas written out in fp64 over all logits."""

import sys

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import DEVICE, IMPLEMENTATIONS, LargestTensor, assert_as_good_as, assert_exact, normal

from fastdit.kernels import prototype_loss
from fastdit.kernels.prototypes import CENTERINGS

MODULE = sys.modules["fastdit.kernels.prototypes"]
# Another order of an fp32 computation's sums, which a CPU's matrix products choose by shape and place, gives another
# result within `assert_exact`'s tolerance of the exact one. Two such results are at most twice as far apart.
REORDERED = 2e-5
TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def sinkhorn(logits, temperature):
    """DINOv2's balanced assignments: rows of prototypes to 1/K, columns of samples to 1/T, three times."""
    q = torch.exp(logits / temperature).T
    q = q / q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / q.shape[0]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def naive(student, teacher, vs, vt, weight, center=None, centering="ema", tau_s=0.1, tau_t=0.05):
    """(loss, teacher mean, wins, entropy, kl) with all logits at once, in the inputs' precision."""
    ls, lt = (F.normalize(z, dim=1) @ F.normalize(v, dim=1).T for z, v in ((student, vs), (teacher, vt)))
    lt = lt.detach()
    if centering == "sinkhorn":
        q = sinkhorn(lt, tau_t)
    else:
        q = torch.softmax((lt - (center if centering == "ema" else 0)) / tau_t, 1)
    weight = weight / weight.sum()
    loss = -(weight[:, None] * q * torch.log_softmax(ls / tau_s, 1)).sum()
    entropy = -(weight[:, None] * torch.xlogy(q, q)).sum()
    wins = torch.bincount(q.argmax(1), minlength=len(vs))
    return loss, lt.mean(0), wins, entropy, (loss - entropy).detach()


def make(tokens=19, width=10, count=37, dtype=torch.float32):
    """student, teacher near it, both prototype matrices, weights with a zero, a centre."""
    student = 5 * normal(tokens, width, seed=0)
    teacher = student + normal(tokens, width, seed=1)
    vs = normal(count, width, seed=2)
    vt = vs + 0.1 * normal(count, width, seed=3)
    weight = normal(tokens, seed=4).abs()
    weight[1] = 0
    center = 0.1 * normal(count, seed=5)
    return [x.to(dtype) for x in (student, teacher, vs, vt, weight, center)]


def run(inputs, *, centering="ema", upstream=1.0, **choices):
    student, teacher, vs, vt, weight, center = inputs
    student, vs = student.detach().requires_grad_(), vs.detach().requires_grad_()
    center = center if centering == "ema" else None
    result = prototype_loss(
        student, teacher, vs, vt, weight=weight, center=center, centering=centering, **(TEMPERATURES | choices)
    )
    grads = torch.autograd.grad(result.loss, (student, vs), torch.tensor(upstream).to(result.loss))
    return *(x.detach() for x in result), *grads


def run_naive(inputs, *, centering="ema", dtype=torch.float64):
    student, teacher, vs, vt, weight, center = (x.to(dtype) for x in inputs)
    student.requires_grad_(), vs.requires_grad_()
    result = naive(student, teacher, vs, vt, weight, center, centering)
    return *(x.detach() for x in result), *torch.autograd.grad(result[0], (student, vs))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of prototypes to a row, the last ragged."""
    monkeypatch.setattr(MODULE, "_BLOCK", 16)


@pytest.mark.parametrize("centering", CENTERINGS)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("chunk", [7, None])
def test_loss_statistics_and_gradients(implementation, centering, chunk):
    inputs = make()
    got = run(inputs, centering=centering, chunk=chunk, implementation=implementation)
    exact = run_naive(inputs, centering=centering)
    for index, (a, b) in enumerate(zip(got, exact, strict=True)):
        if index == 2:
            assert a.dtype == torch.int64
            assert torch.equal(a, b)
        else:
            assert_exact(a, b)


@pytest.mark.parametrize(("tokens", "width", "count"), [(2, 5, 9), (3, 72, 5), (2, 3, 4097)])
def test_sizes_with_the_block_of_a_gpu(tokens, width, count, monkeypatch):
    monkeypatch.setattr(MODULE, "_BLOCK", 4096)
    inputs = make(tokens, width, count)
    for a, b in zip(run(inputs, implementation="triton"), run_naive(inputs)):
        assert_exact(a, b) if a.is_floating_point() else torch.testing.assert_close(a, b)


def test_a_student_that_equals_its_teacher_is_at_rest():
    """At one temperature and without a centre, KL is 0 and flat."""
    student, _, vs, _, weight, _ = make()
    result = run(
        [student, student, vs, vs, weight, None], centering="none", student_temperature=0.05, teacher_temperature=0.05
    )
    assert result[4].abs() < 1e-5
    assert all(grad.abs().max() < 1e-6 for grad in result[5:])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_chunks_do_not_matter(implementation):
    inputs = make()
    whole = run(inputs, chunk=19, centering="sinkhorn", implementation=implementation)
    for chunk in (1, 8, 1000):
        parts = run(inputs, chunk=chunk, centering="sinkhorn", implementation=implementation)
        for a, b in zip(parts, whole):
            assert_exact(a, b.double(), REORDERED)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_token_does_not_depend_on_its_neighbours(implementation):
    inputs = make()
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    student, teacher, vs, vt, weight, center = inputs
    plain = run(inputs, chunk=7, implementation=implementation)
    moved = run([student[order], teacher[order], vs, vt, weight[order], center], chunk=7, implementation=implementation)
    assert torch.equal(moved[2], plain[2])
    for a, b in zip((moved[0], moved[5], moved[6]), (plain[0], plain[5][order], plain[6])):
        assert_exact(a, b.double(), REORDERED)


def test_ranks_joined_by_the_hook_equal_one():
    """Two ranks in threads, each with half of the tokens, summing through the hook."""
    import threading

    student, teacher, vs, vt, _, _ = make(28)
    barrier, slots, results = threading.Barrier(2), [None, None], [None, None]

    def rank(index):
        def all_reduce(total):
            slots[index] = total.clone()
            barrier.wait()
            total.copy_(slots[0] + slots[1])
            barrier.wait()

        half = slice(14 * index, 14 * index + 14)
        results[index] = prototype_loss(
            student[half], teacher[half], vs, vt, centering="sinkhorn", all_reduce=all_reduce, **TEMPERATURES
        )

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    together = prototype_loss(student, teacher, vs, vt, centering="sinkhorn", **TEMPERATURES)
    for name in ("loss", "teacher_entropy", "kl", "teacher_mean"):
        a, b = (getattr(result, name).double() for result in results)
        assert_exact((a + b) / 2, getattr(together, name).double(), REORDERED)
    assert torch.equal(results[0].wins + results[1].wins, together.wins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_low_precision(implementation, dtype):
    """Against torch in that precision, with fp32 softmaxes as under autocast."""
    inputs = make(dtype=dtype)
    got = run(inputs, implementation=implementation)
    exact = run_naive([x.float() for x in inputs])
    student, teacher, vs, vt, weight, center = (x.clone() for x in inputs)
    student.requires_grad_(), vs.requires_grad_()
    ls, lt = (F.normalize(z, dim=1) @ F.normalize(v, dim=1).T for z, v in ((student, vs), (teacher, vt)))
    q = torch.softmax((lt.detach().float() - center.float()) / 0.05, 1)
    w = weight.float() / weight.float().sum()
    loss = -(w[:, None] * q * torch.log_softmax(ls.float() / 0.1, 1)).sum()
    assert_exact(got[0], exact[0], 2e-3)
    for a, low, b in zip(got[5:], torch.autograd.grad(loss, (student, vs)), exact[5:]):
        assert_as_good_as(a, low, b)
    assert got[1].dtype == torch.float32


def test_low_precision_features_with_fp32_prototypes():
    """Training has bf16 features and fp32 master prototypes, which get an fp32 gradient."""
    student, teacher, vs, vt, weight, center = make()
    low = [student.bfloat16(), teacher.bfloat16(), vs, vt, weight, center]
    got, exact = run(low), run_naive(low)
    assert got[5].dtype == torch.bfloat16
    assert got[6].dtype == torch.float32
    assert_exact(got[0], exact[0], 1e-2)
    assert_exact(got[6], exact[6], 2e-2)


def test_autocast_changes_nothing():
    inputs = make()
    with torch.autocast(DEVICE, torch.bfloat16):
        under = run(inputs, centering="sinkhorn")
    for a, b in zip(under, run(inputs, centering="sinkhorn")):
        assert torch.equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_expanded_and_upstream(implementation):
    inputs = make()
    expected = run(inputs, implementation=implementation, upstream=3.0)
    strided = [x.T.contiguous().T if x.dim() == 2 else torch.stack([x, x], 1)[:, 0] for x in inputs]
    for a, b in zip(run(strided, implementation=implementation, upstream=3.0), expected):
        assert_exact(a, b.double(), REORDERED)
    assert_exact(expected[5], 3 * run_naive(inputs)[5])
    student, teacher, vs, vt, _, center = inputs
    flat = [student[:1].expand(9, -1), teacher[:1].expand(9, -1), vs, vt, inputs[4][:1].expand(9), center]
    for a, b in zip(run(flat, implementation=implementation), run_naive(flat)):
        assert_exact(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_twice_the_same_bits(implementation):
    first, second = (run(make(), chunk=5, implementation=implementation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_only_what_needs_a_gradient_gets_one(implementation):
    inputs = make()
    both = run(inputs, implementation=implementation)
    student, teacher, vs, vt, weight, center = inputs
    for leaf, expected in ((0, both[5]), (2, both[6])):
        arguments = [student.clone(), teacher.clone().requires_grad_(), vs.clone(), vt.clone().requires_grad_()]
        arguments[leaf].requires_grad_()
        result = prototype_loss(*arguments, weight=weight, center=center, implementation=implementation, **TEMPERATURES)
        result.loss.backward()
        assert torch.equal(arguments[leaf].grad, expected)
        assert all(x.grad is None for index, x in enumerate(arguments) if index != leaf)
        assert not any(x.requires_grad for x in result[1:])
    with torch.no_grad():
        free = prototype_loss(*arguments, weight=weight, center=center, implementation=implementation, **TEMPERATURES)
    assert torch.equal(free.loss, both[0])


def test_weights():
    inputs = make()
    ones = [*inputs[:4], torch.ones_like(inputs[4]), inputs[5]]
    assert torch.equal(run([*inputs[:4], None, inputs[5]])[0], run(ones)[0])
    zero = run([*inputs[:4], 0 * inputs[4], inputs[5]])
    assert all((zero[index] == 0).all() for index in (0, 3, 5, 6))


def test_gradients_by_finite_differences():
    student, teacher, vs, vt, weight, center = make(4, 3, 5, torch.float64)
    for centering in CENTERINGS:
        c = center if centering == "ema" else None
        torch.autograd.gradcheck(
            lambda s, v, c=c, centering=centering: (
                prototype_loss(
                    s, teacher, v, vt, weight=weight, center=c, centering=centering, chunk=3, **TEMPERATURES
                ).loss
            ),
            (student.requires_grad_(), vs.requires_grad_()),
        )


@pytest.mark.parametrize(("dtype", "centering"), [(torch.float32, "sinkhorn"), (torch.bfloat16, "ema")])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_memory_is_bounded_by_a_chunk(implementation, dtype, centering):
    """40 tokens by 30 prototypes in chunks of 6: nothing exceeds a chunk's logits, or a copy of an input."""
    student, teacher, vs, vt, _, center = (x.clone() for x in make(40, 4, 30, dtype))
    count, chunk = 30, 6
    center = center if centering == "ema" else None
    inputs = (student.requires_grad_(), teacher, vs.requires_grad_(), vt)
    with LargestTensor() as largest:
        offset = MODULE._sinkhorn(teacher.float(), vt.float(), 0.05, chunk, None)
        MODULE._cross_entropy.function(
            student.detach(), teacher, vs.detach(), vt, offset, offset.new_ones(40), 0.1, 0.05, chunk, True, True,
            implementation,
        )  # fmt: skip
        prototype_loss(*inputs, center=center, centering=centering, chunk=chunk, **TEMPERATURES).loss.backward()
    assert largest.bytes == 4 * max(chunk * count, student.numel())


def test_operator_is_registered_soundly():
    student, teacher, vs, vt, weight, center = make(5, 3, 18)
    inputs = (student.requires_grad_(), teacher, vs.requires_grad_(), vt, center, weight, 0.1, 0.05, 3)
    torch.library.opcheck(MODULE._cross_entropy.op, (*inputs, True, True, "triton"))
    torch.library.opcheck(MODULE._cross_entropy.op, (*inputs, True, True, "reference"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled(implementation):
    inputs = make(9, 4, 18)

    def step(student, teacher, vs, vt, weight, center):
        result = prototype_loss(
            student, teacher, vs, vt, weight=weight, center=center, implementation=implementation, **TEMPERATURES
        )
        return result.loss, result.kl, result.teacher_mean, result.wins.float()

    student, vs = (inputs[index].requires_grad_() for index in (0, 2))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    for a, b in zip(compiled, step(*inputs)):
        assert_exact(a, b.double(), 1e-6)
    grads = (torch.autograd.grad(loss, (student, vs)) for loss in (compiled[0], step(*inputs)[0]))
    for a, b in zip(*grads):
        assert_exact(a, b.double(), 1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(4, 2)}, "one shape"),
        ({"student": torch.zeros(0, 3), "teacher": torch.zeros(0, 3)}, "not empty"),
        ({"student_prototypes": torch.zeros(5, 2)}, r"student_prototypes must be \(K, k\) with k = 3"),
        ({"teacher_prototypes": torch.zeros(6, 3)}, "teacher_prototypes must be"),
        ({"teacher_prototypes": torch.zeros(5, 3, dtype=torch.int64)}, "floating"),
        ({"center": torch.zeros(4)}, "center must be floating"),
        ({"center": None}, "center goes with"),
        ({"centering": "none"}, "center goes with"),
        ({"centering": "mean"}, "centering='mean' is unknown; choose one of ema"),
        ({"weight": torch.zeros(5)}, "weight must be floating"),
        ({"chunk": 0}, "chunk=0"),
        ({"teacher_temperature": 0.0}, "temperatures must be positive"),
        ({"centering": "sinkhorn", "center": None, "teacher_temperature": 0.02}, "0.025"),
        ({"implementation": "cpp"}, "cpp"),
    ],
)
def test_contract(change, message):
    arguments = {
        "student": torch.zeros(4, 3),
        "teacher": torch.zeros(4, 3),
        "student_prototypes": torch.zeros(5, 3),
        "teacher_prototypes": torch.zeros(5, 3),
        "center": torch.zeros(5),
        **TEMPERATURES,
    }
    with pytest.raises(ValueError, match=message):
        prototype_loss(**(arguments | change))
