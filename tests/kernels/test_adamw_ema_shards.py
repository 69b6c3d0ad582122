"""AdamW with EMAs on two ranks, each with a part of the weights: one norm, one decision to skip."""

import pytest
import torch
from adamw_ema_helpers import tensors
from launching import on_ranks

from fastdit.kernels import AdamWEMA


def sharded(rank: int) -> dict[str, tuple[torch.Tensor, float]]:
    """Return one rank's weights after its steps, and the norm, by implementation."""
    (start,), (grad,) = tensors("cpu", 1001), tensors("cpu", 1001, seed=1)
    mine = slice(0, 501) if rank == 0 else slice(501, None)
    found = {}
    for implementation in ("auto", "reference"):
        param = torch.nn.Parameter(start[mine].clone())
        optimizer = AdamWEMA([param], lr=1e-2, max_norm=0.5, sharded=True, implementation=implementation)
        for step in range(3):
            param.grad = grad[mine] * (step + 1)
            optimizer.step()
        norm = float(optimizer.grad_norm)
        if rank == 1:
            param.grad[3] = float("nan")
        before = param.detach().clone()
        optimizer.step()
        assert torch.equal(param, before)
        assert float(optimizer.nonfinite) == 1
        assert not optimizer.grad_norm.isfinite()
        optimizer.forget_nonfinite()
        param.grad = grad[mine]
        optimizer.require_finite(torch.tensor(float("inf") if rank == 1 else 1.0))  # its gradients are finite
        optimizer.step()
        assert torch.equal(param, before)
        assert float(optimizer.nonfinite) == 1
        found[implementation] = before, norm
    return found


def test_max_norm_over_shards(tmp_path):
    """Two ranks with half of the gradient each clip by the norm of the whole, and skip together."""
    parts = on_ranks(2, sharded, folder=tmp_path)
    (start,), (grad,) = tensors("cpu", 1001), tensors("cpu", 1001, seed=1)
    param = torch.nn.Parameter(start)
    plain = torch.optim.AdamW([param], lr=1e-2, weight_decay=0)
    for step in range(3):
        param.grad = grad * (step + 1)
        torch.nn.utils.clip_grad_norm_([param], 0.5)
        plain.step()
    for implementation in ("auto", "reference"):
        whole = torch.cat([part[implementation][0] for part in parts])
        for part in parts:
            assert part[implementation][1] == pytest.approx(float(grad.double().norm()) * 3, rel=1e-6)
        torch.testing.assert_close(whole, param.detach(), rtol=2e-6, atol=2e-7)
