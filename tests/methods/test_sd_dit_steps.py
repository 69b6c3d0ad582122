"""Test SD-DiT from step to step: schedules, centers over micro-batches and ranks, what is saved, and counted FLOPs."""

import math

import pytest
import torch
from launching import on_ranks
from sd_dit_reference import randomise
from test_self_discrimination import CLASSES, PROCESSES, PROTOTYPES, batch, make, seeded
from torch.utils.flop_counter import FlopCounterMode

from fastdit.methods.denoising import Denoising
from fastdit.methods.self_discrimination import SDDiT


def test_schedules():
    settings = SDDiT(momentum=0.9, momentum_end=0.98, teacher_temperature_warmup=0.2)
    momenta = [settings.momentum_at(step, 100) for step in (0, 25, 50, 100)]
    assert momenta == pytest.approx([0.9, 0.94 - 0.04 * math.sqrt(0.5), 0.94, 0.98])
    temperatures = [settings.teacher_temperature_at(done) for done in (0, 0.1, 0.2, 0.7)]
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert SDDiT(teacher_temperature_warmup=0).teacher_temperature_at(0) == 0.07
    constant = SDDiT(momentum=0.9999, momentum_end=0.9999)
    assert constant.momentum_at(0, 100) == constant.momentum_at(70, 100) == pytest.approx(0.9999)
    method, student = make(momentum=0.996)
    assert method.begin_step(3, 6) == {"teacher": pytest.approx(0.998)}
    x0, y = batch()
    late = method.loss(student, x0, y, seeded()).terms["teacher_entropy"]
    method.begin_step(0, 6)
    assert method.loss(student, x0, y, seeded()).terms["teacher_entropy"] < late - 0.1, "colder at first"


@pytest.mark.parametrize("steps", [212, 1000, 5000, 400_000])
def test_momentum_follows_the_runs_length(steps):
    """The initial weights leave the teacher of any run; long runs have iBOT's momentum."""
    settings = SDDiT()
    assert settings.momentum_at(0, steps) == pytest.approx(min(0.996, 1 - 20 / steps))
    assert settings.momentum_at(steps, steps) == 1
    initial = math.prod(settings.momentum_at(step, steps) for step in range(steps))
    assert initial < 1e-4
    if steps == 212:
        published = SDDiT(momentum=0.996)
        assert math.prod(published.momentum_at(step, steps) for step in range(steps)) > 0.6


def test_very_short_runs_have_a_momentum():
    assert [SDDiT().momentum_at(0, steps) for steps in (1, 20, 40)] == [0, 0, pytest.approx(0.5)]


@pytest.mark.parametrize("decoder", ["extra", "split"])
def test_steps_between_comparisons_generate_only(decoder):
    method, student = make(decoder=decoder, every=3, momentum=0.9, momentum_end=0.9)
    calls = []
    method.teacher.register_forward_hook(lambda *_: calls.append(step))
    for step in range(7):
        decays = method.begin_step(step, 7)
        assert decays == ({"teacher": pytest.approx(0.9**3)} if step % 3 == 0 else {})
        student.zero_grad()
        outcome = method.loss(student, *batch(), seeded(step))
        outcome.loss.backward()
        signals = method.end_step()
        compared = step % 3 == 0
        assert ("discriminative_loss" in outcome.terms) == ("center_norm" in signals) == compared
        assert outcome.loss > outcome.terms["loss"] if compared else outcome.loss == outcome.terms["loss"]
        for name, p in student.head.named_parameters():
            assert p.grad is not None, name
            assert p.grad.any() == compared, name
    assert calls == [0, 3, 6]


@pytest.mark.parametrize("decoder", ["extra", "split"])
def test_at_the_end_a_step_is_the_plain_one(decoder):
    """Nothing is hidden then, and no random number is drawn for hiding."""
    method, student = make(decoder=decoder, until=0.5)
    assert method.begin_step(4, 10)
    assert method.hides
    assert method.begin_step(5, 10) == {}
    x0, y = batch()
    outcome = method.loss(student, x0, y, seeded())
    plain = Denoising(method.noise, CLASSES, 0.3).loss(student.network, x0, y, seeded())
    expected = torch.autograd.grad(plain.loss, list(student.network.parameters()))
    found = torch.autograd.grad(outcome.loss, list(student.network.parameters()))
    assert torch.equal(outcome.loss, plain.loss)
    assert all(map(torch.equal, found, expected))
    assert outcome.terms.keys() == {"loss"}
    assert method.end_step() == {}
    flops = method.flops(student)
    assert flops["head"] == flops["teacher"] == 0


@pytest.mark.parametrize("decoder", ["extra", "split"])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.35])
def test_the_gradient_ratio_is_that_of_two_backward_passes(decoder, mask_ratio):
    """The signal comes from the step's one backward pass, over all micro-batches."""
    method, student = make(decoder=decoder, mask_ratio=mask_ratio, beta=0.7)
    fork, forks = method.gradients.fork, []
    method.gradients.fork = lambda x: forks.append(fork(x)) or forks[-1]
    expected = torch.zeros(2)
    for seed in (1, 2):
        loss = method.loss(student, *batch(seed=seed), seeded(seed)).loss
        generated, compared = forks[-1]
        gradients = torch.autograd.grad(loss, [generated, compared], retain_graph=True)
        expected += torch.stack([gradient.square().sum() for gradient in gradients])
        assert not method.gradients.squares.isnan().any()
        loss.backward()
    signals = method.end_step()
    assert signals["discriminative_gradient_ratio"].item() == pytest.approx((expected[1] / expected[0]).sqrt().item())
    assert signals["discriminative_gradient_ratio"] > 0
    method.begin_step(1, 9)
    assert not method.gradients.squares.any()


def test_the_gradient_ratio_is_proportional_to_beta():
    ratios = []
    for beta in (0.2, 0.8):
        method, student = make(decoder="split", beta=beta)
        method.loss(student, *batch(), seeded()).loss.backward()
        ratios.append(method.end_step()["discriminative_gradient_ratio"].item())
    assert ratios[1] == pytest.approx(4 * ratios[0], rel=1e-4)


def test_beta_auto_keeps_the_gradient_ratio():
    """The ratio comes to its target whatever the losses are, survives a restart, and is bounded."""
    method, student = make(decoder="split", beta="auto", gradient_ratio=0.4)
    betas = []
    for step in range(60):
        method.begin_step(step, 60)
        student.zero_grad()
        loss = method.loss(student, *batch(), seeded(step)).loss
        loss.backward()
        signals = method.end_step()
        betas.append(signals["beta"].item())
    assert signals["discriminative_gradient_ratio"].item() == pytest.approx(0.4, rel=0.25)
    assert betas[0] == pytest.approx(1e-3), "the least, before anything was measured"
    other, _ = make(decoder="split", beta="auto", gradient_ratio=0.4)
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.balance.weight, method.balance.weight)
    fixed = make(decoder="split", beta=0.3)[0]
    assert set(fixed.state_dict()) == {"centers"}, "checkpoints of a fixed beta stay as they were"
    other.load_state_dict(fixed.state_dict())


def test_gradients_that_are_not_finite_leave_beta():
    method, student = make(decoder="split", beta="auto")
    method.loss(student, *batch(), seeded()).loss.backward()
    method.end_step()
    before = method.balance.weight.clone()
    method.loss(student, *batch(), seeded()).loss.backward()
    method.gradients.squares[1] = torch.inf
    method.end_step()
    assert torch.equal(method.balance.weight, before)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_the_teachers_level_is_a_quantile_of_the_students_law(process):
    method, _ = make(process, teacher_noise="quantile:0.1")
    drawn = process.draw(20_000, generator=seeded(), device="cpu")
    level = method._teacher_level(drawn[:5], seeded())
    assert level.shape == (5,)
    assert len(level.unique()) == 1
    assert (drawn < level[0]).float().mean() == pytest.approx(0.1, abs=0.01)
    shares = torch.linspace(0.02, 0.98, 49)
    levels = process.at_quantile(shares)
    error = 1 / 999 if process.name == "ddpm" else 1e-4
    torch.testing.assert_close(process.quantile_of(levels), shares, rtol=0, atol=error)
    assert torch.equal(process.at_quantile(process.quantile_of(levels)), levels) or process.name != "ddpm"


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: p.name)
def test_the_teachers_level_may_follow_the_students(process):
    """It is lower by at most the given share of the law, and no level is too low for the process."""
    method, student = make(process, teacher_noise="relative:0.3")
    level = process.draw(2000, generator=seeded(), device="cpu")
    lower = process.quantile_of(level) - process.quantile_of(method._teacher_level(level, seeded(1)))
    inside = process.quantile_of(level) > 0.31
    assert lower.min() > -2e-3
    assert lower.max() < 0.3 + 2e-3
    assert lower[inside].mean() == pytest.approx(0.15, abs=0.01)
    assert method.loss(student, *batch(), seeded()).loss.isfinite()
    assert method.pooled_features(batch()[0]).isfinite().all()


def test_a_frozen_teacher_of_a_new_dit_skips_its_blocks():
    method, student = make(decoder="split", random=False, momentum=1.0)
    called = []
    for block in method.teacher.encoder.blocks:
        block.register_forward_hook(lambda *_: called.append(1))
    assert method.begin_step(0, 9) == {}
    assert method.ema_replicas(student) == {}
    x0, y = batch()
    quiet = method.loss(student, x0, y, seeded())
    assert called == []
    moving, other = make(decoder="split", random=False)
    moving.begin_step(0, 9)
    expected = moving.loss(other, x0, y, seeded())
    torch.testing.assert_close(quiet.loss, expected.loss)
    assert torch.equal(method.pooled_features(x0), moving.pooled_features(x0))
    assert [part for part, _ in method.graphed(student, 4)] == [student.network]
    assert method.teacher_flops() < 0.1 * moving.teacher_flops()


def test_a_frozen_teacher_of_a_trained_dit_runs_them_and_is_saved():
    """No EMA holds it, and the file that it started from may be gone when the run goes on."""
    method, student = make(decoder="split", random=False, momentum=1.0)
    randomise(student, seed=1)
    method = type(method)(method.noise, CLASSES, 0.1, method.settings, student)
    assert not method.teacher.skips_blocks
    again, _ = make(decoder="split", random=False, momentum=1.0)
    again.load_state_dict(method.state_dict())
    for a, b in zip(method.teacher.parameters(), again.teacher.parameters(), strict=True):
        assert torch.equal(a, b)


def means_of(method, student, x0, y, generator):
    """Return the means (2, K) of the teacher's logits for a batch, without a move of the centers."""
    method.loss(student, x0, y, generator)
    means = method.means / method.count
    method._reset()
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
        method._reset()
    for seed in (1, 4):
        method.loss(student, *batch(n=1, seed=seed), seeded(seed))
    usage = method.end_step()["prototype_usage"].item()
    assert usage == pytest.approx((won[0] | won[1]).float().mean().item())
    assert all(usage > wins.float().mean() > 0 for wins in won)


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
@pytest.mark.parametrize(("decoder", "cls"), [("extra", "token"), ("extra", "mean"), ("split", "mean")])
def test_flops_are_those_torch_counts(decoder, cls, mask_ratio, error):
    """It counts the forward pass without the prototypes, which torch does not look into."""
    method, student = make(decoder=decoder, cls=cls, mask_ratio=mask_ratio)
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
    """Return the loss on this rank's part of a batch of 4, then prototype usage and centers."""
    method, student = make(centering="sinkhorn", mask_ratio=0.0)
    x0, y = batch()
    part = slice(rank * 4 // ranks, (rank + 1) * 4 // ranks)
    level, eps = method.noise.draw(4, generator=seeded(), device="cpu"), torch.randn(x0.shape, generator=seeded(8))
    method.draw = lambda x0, y, generator: (level[part], eps[part], y)
    with torch.no_grad():
        terms = method.loss(student, x0[part], y[part], None).terms
    signals = method.end_step()
    return [terms["discriminative_loss"].item(), signals["prototype_usage"].item(), *method.centers.flatten().tolist()]


@pytest.mark.launch
def test_two_ranks_balance_their_assignments_together(tmp_path):
    """Sinkhorn's sums, means and wins run over both ranks: together they are one rank with the whole batch."""
    (loss, *rest), (other_loss, *other_rest) = on_ranks(2, share, 2, folder=tmp_path)
    whole = share(0, 1)
    assert abs(loss - other_loss) > 1e-3
    assert (loss + other_loss) / 2 == pytest.approx(whole[0], rel=1e-5)
    assert rest == other_rest
    assert rest == pytest.approx(whole[1:], abs=1e-6)
