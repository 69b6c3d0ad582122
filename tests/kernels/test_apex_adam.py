"""ApexAdamEMA with a stand-in for apex, whose own FusedAdam needs a GPU: against AdamWEMA, and what it may change."""

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fastdit.config import Config
from fastdit.errors import UserError
from fastdit.kernels import AdamWEMA, ApexAdamEMA
from fastdit.training.session import make_optimizer

SHAPES = [(0,), (7, 5), (13,), (3, 2, 3, 3), (), (0,)]
EMAS = {"slow": 0.99, "quick": 0.3, "still": 1.0, "none": 0.0}
RULES = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6}


class FusedAdam(torch.optim.Optimizer):
    """NVIDIA's in float32, as capturable: what it reads of its groups and its scaler, and when it does nothing."""

    def __init__(self, params, lr=1e-3, *, adam_w_mode=True, capturable=False):
        assert adam_w_mode
        assert capturable
        super().__init__(params, {"lr": torch.tensor(lr)})
        self.param_groups_master = [{"params": [None] * len(group["params"])} for group in self.param_groups]
        self._dummy_overflow_buf = torch.tensor([0], dtype=torch.int)

    def step(self, closure=None, *, grad_scaler):
        for group, master in zip(self.param_groups, self.param_groups_master):
            if not group["params"]:
                continue
            group["step"] += (self._dummy_overflow_buf != 1).to(torch.int)
            taken = [p for p, _ in zip(group["params"], master["params"]) if p.grad is not None]
            self._dummy_overflow_buf.copy_(grad_scaler._check_inf_per_device(self)[taken[0].device])
            inv_scale = grad_scaler._get_scale_async().double().reciprocal().float()
            assert (group["lr"].dtype, group["step"].dtype) == (torch.float32, torch.int32)
            assert not any("exp_avg" not in self.state[p] for p in taken)
            if taken[-1].numel() and self._dummy_overflow_buf.item() != 1:
                self._update(group, taken, inv_scale)

    def _update(self, group, params, inv_scale):
        (beta1, beta2), step = group["betas"], group["step"].item()
        for p in params:
            m, v = self.state[p]["exp_avg"], self.state[p]["exp_avg_sq"]
            p.grad.mul_(inv_scale)
            m.copy_(beta1 * m + (1 - beta1) * p.grad)
            v.copy_(beta2 * v + (1 - beta2) * p.grad * p.grad)
            m_hat, v_hat = m / (1 - beta1**step), v / (1 - beta2**step)
            p.sub_(group["lr"] * (m_hat / (v_hat.sqrt() + group["eps"]) + group["weight_decay"] * p))


@pytest.fixture
def apex(monkeypatch):
    """A package `apex` with nothing but the stand-in."""
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam, package.optimizers = FusedAdam, optimizers
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)
    return optimizers


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def groups(params: list) -> list[dict]:
    """Two groups with rules and averages of their own."""
    slow = {"slow": EMAS["slow"]}
    return [
        {"params": params[:3], "weight_decay": 0.1, "emas": slow},
        {"params": params[3:], "lr": 1e-3, "emas": EMAS},
    ]


def set_gradients(params: list, step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 10 ** (step % 5 - 2)


def run(optimizer, params: list, steps) -> None:
    for step in steps:
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        optimizer.param_groups[1]["emas"] = EMAS | {"quick": 0.3 + step / 100}
        set_gradients(params, step)
        optimizer.step()


def state_of(optimizer, params: list) -> list[torch.Tensor]:
    """Weights and every state tensor, copied."""
    states = [optimizer.state[param][name] for param in params for name in sorted(optimizer.state[param])]
    return [tensor.detach().clone() for tensor in [*params, *states]]


def assert_close(mine, params, theirs, others) -> None:
    for a, b in zip(params, others):
        torch.testing.assert_close(a, b, rtol=5e-6, atol=5e-7)
        assert mine.state[a].keys() == theirs.state[b].keys()
        for name, value in mine.state[a].items() if a.numel() else ():  # csrc/ does not count an empty one's steps
            torch.testing.assert_close(value, theirs.state[b][name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_steps_are_those_of_adamw_ema(apex, max_norm):
    params, others = parameters(), parameters()
    mine = ApexAdamEMA(groups(params), **RULES, max_norm=max_norm)
    theirs = AdamWEMA(groups(others), **RULES, max_norm=max_norm, implementation="reference")
    run(mine, params, range(12))
    run(theirs, others, range(12))
    assert_close(mine, params, theirs, others)
    assert mine.state[params[1]]["step"] == 12
    assert [p.shape for p in params] == [mine.state[p]["exp_avg"].shape for p in params]
    assert (mine.nonfinite.item(), mine.nonfinite.dtype) == (0, torch.float32)


def test_each_average_is_its_recursion_in_fp64(apex):
    params = parameters()
    optimizer = ApexAdamEMA(groups(params), **RULES)
    averages = [p.detach().double() for p in params[3:]]
    first = [p.detach().clone() for p in params]
    for step in range(12):
        run(optimizer, params, [step])
        decay = 0.3 + step / 100
        averages = [decay * a + (1 - decay) * p.detach().double() for a, p in zip(averages, params[3:])]
    for param, start, average in zip(params[3:], first[3:], averages):
        state = optimizer.state[param]
        torch.testing.assert_close(state["quick"].double(), average, rtol=3e-6, atol=3e-7)
        assert torch.equal(state["still"], start)
        assert torch.equal(state["none"], param)
    assert optimizer.state[params[1]].keys() == {"step", "exp_avg", "exp_avg_sq", "slow"}


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("when", [0, 3])
def test_a_bad_gradient_changes_nothing_and_the_next_step_goes_on(apex, bad, when):
    struck, calm = parameters(), parameters()
    optimizer, unstruck = ApexAdamEMA(groups(struck), **RULES), ApexAdamEMA(groups(calm), **RULES)
    run(optimizer, struck, range(when))
    run(unstruck, calm, range(when))
    before = [p.detach().clone() for p in struck]
    set_gradients(struck, 99)
    struck[3].grad.view(-1)[-1] = bad
    optimizer.step()
    assert optimizer.nonfinite.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, struck)), "weights of every group"
    if when:
        assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer, struck), state_of(unstruck, calm)))
    run(optimizer, struck, range(when, when + 2))
    run(unstruck, calm, range(when, when + 2))
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer, struck), state_of(unstruck, calm)))
    assert optimizer.nonfinite.item() == 1, "remembered until forgotten"
    optimizer.forget_nonfinite()
    run(optimizer, struck, [7])
    assert optimizer.nonfinite.item() == 0


def test_another_ranks_bad_gradient_counts(apex, monkeypatch):
    params = parameters()
    optimizer = ApexAdamEMA(groups(params), **RULES)
    run(optimizer, params, range(2))
    before = state_of(optimizer, params)
    monkeypatch.setattr("fastdit.kernels.adamw_ema._sum_over_ranks", lambda value: value + float("inf"))
    optimizer.step()
    assert optimizer.nonfinite.item() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(optimizer, params)))


def test_one_parameter_at_a_time_as_under_zero_3(apex):
    """Each keeps its own step count though all are of one group, which is empty between the updates."""
    params, others = parameters(), parameters()
    mine = ApexAdamEMA(params, **RULES, emas=EMAS)
    theirs = AdamWEMA(others, **RULES, emas=EMAS, implementation="reference")
    for optimizer, own in ((mine, params), (theirs, others)):
        optimizer.param_groups[0]["params"] = []
        for step in range(4):
            set_gradients(own, step)
            for param in own:
                optimizer.param_groups[0]["params"] = [param]
                optimizer.step()
                optimizer.param_groups[0]["params"] = []
    assert_close(mine, params, theirs, others)


def test_parameters_without_a_gradient_stay(apex):
    params = parameters()
    optimizer = ApexAdamEMA(groups(params), **RULES)
    set_gradients(params, 0)
    params[1].grad = None
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    assert params[1] not in optimizer.state
    assert params[2] in optimizer.state


@pytest.mark.parametrize("then", [ApexAdamEMA, AdamWEMA])
@pytest.mark.parametrize("first", [ApexAdamEMA, AdamWEMA])
def test_resume_of_either_by_either(apex, first, then, tmp_path):
    straight, stopped = parameters(), parameters()
    whole = then(groups(straight), **RULES)
    run(whole, straight, range(8))
    half = first(groups(stopped), **RULES)
    run(half, stopped, range(4))
    torch.save({"optimizer": half.state_dict(), "weights": stopped}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=False)  # written a line above
    fresh = [torch.nn.Parameter(param.detach().clone()) for param in saved["weights"]]
    resumed = then(groups(fresh), lr=1.0, eps=1.0)
    resumed.load_state_dict(saved["optimizer"])
    run(resumed, fresh, range(4, 8))
    if first is then:
        assert all(torch.equal(a, b) for a, b in zip(state_of(whole, straight), state_of(resumed, fresh)))
    assert_close(resumed, fresh, whole, straight)


def test_gradients_are_left_as_they_are(apex):
    params = parameters()
    optimizer = ApexAdamEMA(groups(params), **RULES)
    set_gradients(params, 0)
    before = copy.deepcopy([param.grad for param in params])
    optimizer.step()
    assert all(torch.equal(a, param.grad) for a, param in zip(before, params))


def test_what_fused_adam_cannot_take_is_refused(apex):
    for param in (torch.zeros(2, 3, dtype=torch.bfloat16), torch.empty(2**31, device="meta")):
        optimizer = ApexAdamEMA([torch.nn.Parameter(param)])
        (only,) = optimizer.param_groups
        with pytest.raises(ValueError, match="float32 parameters of less than"):
            optimizer._step_group(only, only["params"], [None], [], torch.zeros(()), None)
    with pytest.raises(ValueError, match="closure"):
        ApexAdamEMA(parameters()).step(lambda: 0)


def made_by(optimizer: str, device="cuda", clip=None, stage=1, **zero) -> AdamWEMA:
    """Return the optimizer that a run with this setting gets."""
    plan = SimpleNamespace(merged={"zero_optimization": zero}, clip=clip, stage=stage)
    return make_optimizer(Config(optimizer=optimizer), plan, torch.device(device), parameters(), EMAS)


def refusal(**where) -> str:
    """The line with which a run with apex is refused."""
    with pytest.raises(UserError) as caught:
        made_by("apex", **where)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_apex_one_line_says_what_to_do(monkeypatch):
    for name in ("apex", "apex.optimizers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="built from source"):
        ApexAdamEMA(parameters())
    line = refusal()
    assert line.startswith("optimizer: apex.optimizers.FusedAdam cannot be imported")
    for words in (
        "github.com/NVIDIA/apex",
        "the package named apex on the index is another one",
        "--optimizer fastdit",
    ):
        assert words in line


def test_an_apex_that_cannot_work_here_is_refused_in_one_line(apex, monkeypatch):
    def without_extensions(*args, **kwargs):
        raise RuntimeError("apex.optimizers.FusedAdam requires cuda extensions")

    monkeypatch.setattr(apex, "FusedAdam", without_extensions)
    assert "requires cuda extensions" in refusal()


def test_the_setting_chooses_the_optimizer(apex):
    assert type(made_by("fastdit", device="cpu")) is AdamWEMA
    assert type(made_by("apex")) is ApexAdamEMA
    assert type(made_by("apex", offload_optimizer={"device": "none"})) is ApexAdamEMA
    assert made_by("apex").param_groups[0]["emas"] == EMAS
    for where in ({"device": "cpu"}, {"offload_optimizer": {"device": "cpu"}}):
        assert "GPUs only, without offload_optimizer; take --optimizer fastdit" in refusal(**where)


@pytest.mark.parametrize("optimizer", ["apex", "fastdit"])
def test_both_clip_as_the_plan_says(apex, optimizer):
    for clip, stage, expected in (
        (0.5, 1, (0.5, True)),
        (0.0, 2, (None, True)),
        (None, 3, (None, True)),
        (2.0, 0, (2.0, False)),
    ):
        made = made_by(optimizer, clip=clip, stage=stage)
        assert (made.max_norm, made.sharded) == expected
