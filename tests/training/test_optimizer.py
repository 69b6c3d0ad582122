"""AdamWEMA against torch's AdamW and an fp64 average; what a bad gradient may change: nothing."""

import copy

import pytest
import torch

from fastdit.kernels import AdamWEMA

SHAPES = [(7, 5), (13,), (3, 2, 3, 3), ()]
EMAS = {"slow": 0.99, "quick": 0.3, "still": 1.0, "none": 0.0}
RULES = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6}


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list) -> list[dict]:
    """Two groups with rules of their own."""
    return [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 1e-3}]


def set_gradients(params: list, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 10 ** (step % 5 - 2)


def run(optimizer, params: list, steps) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def state_of(optimizer, params: list) -> list[torch.Tensor]:
    """Weights and every state tensor, copied."""
    states = [optimizer.state[param][name] for param in params for name in sorted(optimizer.state[param])]
    return [tensor.detach().clone() for tensor in [*params, *states]]


@pytest.fixture(params=["auto", "reference"])
def implementation(request):
    """Choose what runs here by itself (compiled where it was built), or PyTorch."""
    return request.param


def test_the_reference_is_torchs_adamw_to_the_bit():
    """torch's fused implementation; its foreach one rounds otherwise."""
    mine, theirs = parameters(), parameters()
    optimizer = AdamWEMA(groups(mine), **RULES, emas=EMAS, implementation="reference")
    expected = torch.optim.AdamW(groups(theirs), **RULES, weight_decay=0.0, fused=True)
    for step in range(20):
        for opt, params in ((optimizer, mine), (expected, theirs)):
            opt.param_groups[0]["lr"] = 0.1 / (step + 1)
            run(opt, params, [step])
    for a, b in zip(mine, theirs):
        assert torch.equal(a, b)
        for name in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][name], expected.state[b][name])


def test_every_implementation_is_close_to_torchs_foreach(implementation):
    mine, theirs = parameters(), parameters()
    optimizer = AdamWEMA(groups(mine), **RULES, emas=EMAS, implementation=implementation)
    expected = torch.optim.AdamW(groups(theirs), **RULES, weight_decay=0.0, foreach=True)
    run(optimizer, mine, range(20))
    run(expected, theirs, range(20))
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
        assert optimizer.state[a]["step"] == 20
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[a][name], expected.state[b][name], rtol=1e-5, atol=1e-7)


def test_each_average_is_its_recursion_in_fp64(implementation):
    params = parameters()
    optimizer = AdamWEMA(groups(params), **RULES, emas=EMAS, implementation=implementation)
    averages = {name: [param.detach().double() for param in params] for name in EMAS}
    first = [param.detach().clone() for param in params]
    for step in range(20):
        changing = {**EMAS, "quick": 0.3 + step / 100}
        for group in optimizer.param_groups:
            group["emas"] = dict(changing)
        run(optimizer, params, [step])
        for name, decay in changing.items():
            averages[name] = [decay * a + (1 - decay) * p.detach().double() for a, p in zip(averages[name], params)]
    for i, param in enumerate(params):
        state = optimizer.state[param]
        for name in EMAS:
            torch.testing.assert_close(state[name].double(), averages[name][i], rtol=3e-6, atol=3e-7)
        assert torch.equal(state["still"], first[i])
        assert torch.equal(state["none"], param)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("when", [0, 3])
def test_a_bad_gradient_changes_nothing_and_the_next_step_goes_on(implementation, bad, when):
    struck, calm = parameters(), parameters()
    optimizer = AdamWEMA(groups(struck), **RULES, emas=EMAS, implementation=implementation)
    unstruck = AdamWEMA(groups(calm), **RULES, emas=EMAS, implementation=implementation)
    run(optimizer, struck, range(when))
    run(unstruck, calm, range(when))
    assert optimizer.nonfinite.item() == 0

    before = [param.detach().clone() for param in struck]
    set_gradients(struck, 99)
    struck[2].grad.view(-1)[-1] = bad
    optimizer.step()
    assert optimizer.nonfinite.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, struck)), "weights of every group"
    if when:
        assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer, struck), state_of(unstruck, calm)))

    run(optimizer, struck, range(when, when + 2))
    run(unstruck, calm, range(when, when + 2))
    assert optimizer.nonfinite.item() == 1, "remembered until forgotten"
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer, struck), state_of(unstruck, calm)))
    optimizer.forget_nonfinite()
    run(optimizer, struck, [7])
    assert optimizer.nonfinite.item() == 0
    assert optimizer.nonfinite.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_with_good_gradients_changes_nothing(implementation, bad):
    struck, calm = parameters(), parameters()
    optimizer = AdamWEMA(groups(struck), **RULES, emas=EMAS, max_norm=1.0, implementation=implementation)
    unstruck = AdamWEMA(groups(calm), **RULES, emas=EMAS, max_norm=1.0, implementation=implementation)
    for step in range(2):
        optimizer.require_finite(torch.tensor(3e38))
        run(optimizer, struck, [step])
        run(unstruck, calm, [step])
    assert optimizer.nonfinite.item() == 0

    for loss in (1.0, bad, 2.0):  # three micro-batches of one step
        optimizer.require_finite(torch.tensor(loss, requires_grad=True))
    run(optimizer, struck, [99])
    assert optimizer.nonfinite.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer, struck), state_of(unstruck, calm)))

    optimizer.forget_nonfinite()
    run(optimizer, struck, [5])
    run(unstruck, calm, [5])
    assert optimizer.nonfinite.item() == 0
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer, struck), state_of(unstruck, calm)))


def test_huge_but_finite_gradients_are_no_failure(implementation):
    params = parameters()
    optimizer = AdamWEMA(params, **RULES, implementation=implementation)
    set_gradients(params, 0)
    params[0].grad *= 1e18
    optimizer.step()
    assert optimizer.nonfinite.item() == 0
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("max_norm", [None, 0.1])
def test_grad_norm_is_of_all_gradients_before_clipping(implementation, max_norm):
    params = parameters()
    optimizer = AdamWEMA(groups(params), **RULES, max_norm=max_norm, implementation=implementation)
    assert optimizer.grad_norm is None
    for step in range(3):
        run(optimizer, params, [step])
        exact = torch.cat([param.grad.double().flatten() for param in params]).norm()
        torch.testing.assert_close(optimizer.grad_norm, exact, rtol=1e-6, atol=0)
    params[3].grad = torch.tensor(float("nan"))
    optimizer.step()
    assert not optimizer.grad_norm.isfinite()
    run(optimizer, params, [4])
    assert optimizer.grad_norm.isfinite()


def test_parameters_without_a_gradient_stay(implementation):
    params = parameters()
    optimizer = AdamWEMA(groups(params), **RULES, emas=EMAS, implementation=implementation)
    set_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    assert params[0] in optimizer.state


def test_resume_in_a_new_optimizer_is_exact(implementation, tmp_path):
    straight, stopped = parameters(), parameters()
    whole = AdamWEMA(groups(straight), **RULES, emas=EMAS, implementation=implementation)
    run(whole, straight, range(10))

    half = AdamWEMA(groups(stopped), **RULES, emas=EMAS, implementation=implementation)
    run(half, stopped, range(4))
    torch.save({"optimizer": half.state_dict(), "weights": stopped}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=False)  # written a line above
    fresh = [torch.nn.Parameter(param.detach().clone()) for param in saved["weights"]]
    other_rules = {"lr": 1.0, "betas": (0.5, 0.5), "eps": 1.0, "weight_decay": 1.0}
    resumed = AdamWEMA(groups(fresh), **other_rules, emas=EMAS, implementation=implementation)
    resumed.load_state_dict(saved["optimizer"])
    for a, b in zip(resumed.param_groups, half.param_groups):
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}
    run(resumed, fresh, range(4, 10))
    assert all(torch.equal(a, b) for a, b in zip(state_of(whole, straight), state_of(resumed, fresh)))


def test_state_names_and_kinds(implementation):
    params = parameters()
    optimizer = AdamWEMA(params, **RULES, emas=EMAS, implementation=implementation)
    run(optimizer, params, range(2))
    for param in params:
        state = optimizer.state[param]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq", *EMAS}
        assert (state["step"].dtype, state["step"].shape) == (torch.float32, ())
        for name in state.keys() - {"step"}:
            assert (state[name].dtype, state[name].shape) == (param.dtype, param.shape)


def test_groups_do_not_share_their_decays():
    params = parameters()
    optimizer = AdamWEMA(groups(params), emas=EMAS)
    optimizer.param_groups[0]["emas"]["slow"] = 0.5
    assert optimizer.param_groups[1]["emas"] == EMAS == {"slow": 0.99, "quick": 0.3, "still": 1.0, "none": 0.0}


def test_gradients_are_left_as_they_are(implementation):
    params = parameters()
    optimizer = AdamWEMA(params, **RULES, emas=EMAS, implementation=implementation)
    set_gradients(params, 0)
    before = copy.deepcopy([param.grad for param in params])
    optimizer.step()
    assert all(torch.equal(a, param.grad) for a, param in zip(before, params))


def test_a_closure_is_refused():
    with pytest.raises(ValueError, match="closure"):
        AdamWEMA(parameters()).step(lambda: 0)


def test_torchs_adamw_and_this_one_read_each_others_state():
    """The averages of a run that had none start at its weights."""
    mine, theirs = parameters(), parameters()
    expected = torch.optim.AdamW(groups(theirs), **RULES, weight_decay=0.0, fused=True)
    run(expected, theirs, range(5))
    mine = [torch.nn.Parameter(param.detach().clone()) for param in theirs]
    optimizer = AdamWEMA(groups(mine), emas={"ema": 0.9}, implementation="reference")
    optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))
    at_load = [param.detach().clone() for param in mine]
    for opt, params in ((optimizer, mine), (expected, theirs)):
        run(opt, params, range(5, 8))
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs))
    for param, start in zip(mine, at_load):
        assert not torch.equal(optimizer.state[param]["ema"], param)
        assert (optimizer.state[param]["ema"] - start).abs().max() < (param - start).abs().max()

    back = [torch.nn.Parameter(param.detach().clone()) for param in mine]
    adamw = torch.optim.AdamW(groups(back), fused=True)
    adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for opt, params in ((optimizer, mine), (adamw, back)):
        run(opt, params, [9])
    assert all(torch.equal(a, b) for a, b in zip(mine, back))
