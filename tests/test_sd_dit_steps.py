"""SD-DiT from step to step: schedules, centres over micro-batches and ranks, what is saved, and the FLOPs it counts."""

import math
import multiprocessing

import pytest
import torch
import torch.distributed as dist
from launching import free_port
from test_self_discrimination import PROTOTYPES, batch, make, seeded
from torch.utils.flop_counter import FlopCounterMode

from fastdit.methods.self_discrimination import SDDiT


def test_schedules():
    settings = SDDiT(momentum=0.9, momentum_end=0.98, teacher_temperature_warmup=0.2)
    momenta = [settings.momentum_at(done) for done in (0, 0.25, 0.5, 1)]
    assert momenta == pytest.approx([0.9, 0.94 - 0.04 * math.sqrt(0.5), 0.94, 0.98])
    temperatures = [settings.teacher_temperature_at(done) for done in (0, 0.1, 0.2, 0.7)]
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert SDDiT(teacher_temperature_warmup=0).teacher_temperature_at(0) == 0.07
    assert SDDiT(momentum_end=0.996).momentum_at(0.3) == pytest.approx(0.996)
    method, student = make()
    assert method.begin_step(3, 6) == {"teacher": pytest.approx(0.998)}
    x0, y = batch()
    late = method.loss(student, x0, y, seeded()).terms["teacher_entropy"]
    method.begin_step(0, 6)
    assert method.loss(student, x0, y, seeded()).terms["teacher_entropy"] < late - 0.1, "colder at first"


def means_of(method, student, x0, y, generator):
    """(2, K) means of the teacher's logits for a batch, which moves nothing."""
    method.loss(student, x0, y, generator)
    means = method.means / method.count
    method._forget()
    return means


def test_centres_follow_the_mean_of_all_micro_batches():
    method, student = make(center_momentum=0.8)
    parts = [means_of(method, student, *batch(seed=seed), seeded(seed)) for seed in (1, 2, 3)]
    before = method.centers
    for seed in (1, 2):
        method.loss(student, *batch(seed=seed), seeded(seed))
    method.end_step()
    first = 0.8 * before + 0.2 * (parts[0] + parts[1]) / 2
    torch.testing.assert_close(method.centers, first, rtol=0, atol=1e-7)
    method.loss(student, *batch(seed=3), seeded(3))
    method.end_step()
    torch.testing.assert_close(method.centers, 0.8 * first + 0.2 * parts[2], rtol=0, atol=1e-7)
    assert not torch.equal(method.centers[0], method.centers[1])


def test_usage_counts_a_prototype_that_any_micro_batch_prefers():
    method, student = make()
    won = []
    for seed in (1, 4):
        method.loss(student, *batch(n=1, seed=seed), seeded(seed))
        won.append(method.wins > 0)
        method._forget()
    for seed in (1, 4):
        method.loss(student, *batch(n=1, seed=seed), seeded(seed))
    usage = method.end_step()["prototype_usage"].item()
    assert usage == pytest.approx((won[0] | won[1]).float().mean().item())
    assert all(usage > own.float().mean() > 0 for own in won)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_teacher_features_that_are_not_finite_leave_the_centres(bad):
    method, student = make()
    x0, y = batch()
    before = method.centers.clone()
    method.loss(student, x0.index_fill(0, torch.tensor([2]), bad), y, seeded())
    method.end_step()
    assert torch.equal(method.centers, before)
    method.loss(student, x0, y, seeded())
    method.end_step()
    assert method.centers.isfinite().all()
    assert not torch.equal(method.centers, before)


def test_state():
    method, _ = make()
    again, _ = make()
    again.centers.zero_()
    again.load_state_dict(method.state_dict())
    assert torch.equal(again.centers, method.centers)


@pytest.mark.parametrize(("mask_ratio", "error"), [(0.0, 1e-3), (0.35, 0.01)])
@pytest.mark.parametrize("cls", ["token", "mean"])
def test_flops_are_those_torch_counts(cls, mask_ratio, error):
    """Forward, and prototypes apart, which torch does not look into. Parts of a few tokens are not counted."""
    method, student = make(cls=cls, mask_ratio=mask_ratio)
    with FlopCounterMode(display=False) as counter:
        method.loss(student, *batch(), seeded())
    flops = method.flops(student)
    assert flops.keys() == {"encoder", "decoder", "head", "teacher"}
    prototypes = 2 * 2 * (method.keep + 1) * 20 * PROTOTYPES  # of both sides
    forward = flops["teacher"] + (flops["encoder"] + flops["decoder"] + flops["head"]) / 3 - prototypes
    assert forward == pytest.approx(counter.get_total_flops() / 4, rel=error)
    for p in student.parameters():
        p.data = p.data.new_empty(0)  # as ZeRO-3 leaves them
    assert method.flops(student) == flops


def share(rank: int, ranks: int) -> list[float]:
    """Loss on this rank's part of a batch of 4, then centres and prototype usage."""
    method, student = make(centering="sinkhorn", mask_ratio=0.0)
    x0, y = batch()
    own = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    level, eps = method.noise.draw(4, generator=seeded(), device="cpu"), torch.randn(x0.shape, generator=seeded(8))
    method.draw = lambda x0, y, generator: (level[own], eps[own], y)
    with torch.no_grad():
        terms = method.loss(student, x0[own], y[own], None).terms
    signals = method.end_step()
    return [terms["discriminative_loss"].item(), signals["prototype_usage"].item(), *method.centers.flatten().tolist()]


def one_of_two(rank: int, port: str, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results.put(share(rank, 2))
    dist.destroy_process_group()


@pytest.mark.launch
def test_two_ranks_balance_their_assignments_together():
    """Sinkhorn's sums, means and wins run over both: together they are one rank with the whole batch."""
    context = multiprocessing.get_context("spawn")
    results, port = context.Queue(), free_port()
    processes = [context.Process(target=one_of_two, args=(rank, port, results)) for rank in (0, 1)]
    for process in processes:
        process.start()
    (loss, *rest), (other_loss, *other_rest) = (results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    whole = share(0, 1)
    assert abs(loss - other_loss) > 1e-3
    assert (loss + other_loss) / 2 == pytest.approx(whole[0], rel=1e-5)
    assert rest == other_rest
    assert rest == pytest.approx(whole[1:], abs=1e-6)
