"""Steps of Lamb that must leave no trace, and torch.distributed.checkpoint, which makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from lamb_cases import Params, assert_same, everything, gradients, make_params, train
from numpy_lamb import NumpyLamb, relative_error, to_numpy
from torch import Tensor, nn

from dist_lamb import Lamb


def dummy_step(opt: Lamb, params: Params) -> None:
    """What torch.distributed.checkpoint.state_dict does to an optimizer without state."""
    lrs = [group["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], Tensor) else 0.0
    for p in params.values():
        p.grad = torch.zeros_like(p)
    opt.step(closure=None)
    for group, lr in zip(opt.param_groups, lrs):
        group["lr"] = lr
    opt.zero_grad()


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 1.0},
        {"decoupled": False},
        {"maximize": True},
        {"adapt": False},
        {"eps": 0.0},
        {"weight_decay": 0.0},
    ],
    ids=str,
)
def test_dummy_step(
    impl: str, options: dict[str, Any], dtype: torch.dtype, tensor_lr: bool
) -> None:
    params, other = make_params(dtype), make_params(dtype)
    lr = torch.tensor(0.25) if tensor_lr else 0.25
    options = {"weight_decay": 0.1, **options}
    opt, fresh = (Lamb(ps.values(), lr=lr, impl=impl, **options) for ps in (params, other))
    start = {n: p.detach().clone() for n, p in params.items()}
    dummy_step(opt, params)
    assert_same(params, start)
    for p in params.values():
        assert opt.state[p]["step"] == 0
        assert not opt.state[p]["exp_avg"].any()
        assert not opt.state[p]["exp_avg_sq"].any()
    train(opt, params, 2)
    train(fresh, other, 2)
    assert_same(everything(opt, params), everything(fresh, other))


@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["float", "tensor"])
def test_a_warm_up_from_lr_zero_counts(impl: str, lr: float | Tensor) -> None:
    params = make_params(torch.float64)
    opt = Lamb(params.items(), lr=lr, impl=impl, weight_decay=0.1)
    oracle = NumpyLamb(to_numpy(params), [(list(params), {"weight_decay": 0.1})])
    for step, rate in enumerate((0.0, 0.1, 0.2)):
        opt.param_groups[0]["lr"] = torch.tensor(rate).double() if step else lr
        for options in oracle.options.values():
            options["lr"] = float(torch.tensor(rate))
        train(opt, params, 1, step)
        oracle.step(to_numpy(gradients(params, step)))
        for name, p in params.items():
            assert opt.state[p]["step"] == step + 1
            assert relative_error(p, oracle.x[name]) <= 1e-13


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_lr_zero_and_zero_gradients_count_once_there_is_a_history(
    impl: str, beta1: float, decoupled: bool
) -> None:
    """Only a param whose moments are all zero has not begun; with beta1 = 0, v alone tells."""
    params = make_params(torch.float64)
    options = {"betas": (beta1, 0.9), "weight_decay": 0.1, "decoupled": decoupled, "lr": 0.1}
    opt = Lamb(params.items(), impl=impl, **options)
    oracle = NumpyLamb(to_numpy(params), [(list(params), options)])
    for step, rate in enumerate((0.1, 0.0, 0.1)):
        grads = {n: g * (rate > 0) for n, g in gradients(params, step).items()}
        for name, p in params.items():
            oracle.options[name]["lr"] = opt.param_groups[0]["lr"] = rate
            p.grad = grads[name]
        opt.step()
        oracle.step(to_numpy(grads))
        for name, p in params.items():
            assert opt.state[p]["step"] == step + 1
            assert relative_error(p, oracle.x[name]) <= 1e-13
            assert relative_error(opt.state[p]["exp_avg_sq"], oracle.v[name]) <= 1e-13


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        nn.init.zeros_(self.fc.bias)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.norm(self.fc(self.emb(ids)))
        return out


def train_net(model: Net, opt: Lamb, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        ids = torch.arange(5) + step % 3
        opt.zero_grad()
        model(ids).float().square().mean(dim=0).mul(torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        opt.step()
    opt.zero_grad()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")
def test_distributed_checkpoint(
    tmp_path: Path, dtype: torch.dtype, flat: bool, tensor_lr: bool
) -> None:
    """Save and load through torch's own helpers, which step a fresh optimizer once."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    def fresh(seed: int) -> tuple[Net, Lamb]:
        torch.manual_seed(seed)
        model = Net().to(dtype)
        lr = torch.tensor(0.1) if tensor_lr else 0.1
        return model, Lamb(model.parameters(), lr=lr, weight_decay=0.1)

    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = fresh(0)
    untouched, before = fresh(0)
    get_optimizer_state_dict(model, opt, options=how)
    assert_same(dict(model.named_parameters()), dict(untouched.named_parameters()))
    assert all(state["step"] == 0 for state in opt.state.values())
    train_net(model, opt, 3)
    train_net(untouched, before, 3)
    assert_same(everything(opt), everything(before))

    saved = {"optim": get_optimizer_state_dict(model, opt, options=how)}
    dcp.save(saved, checkpoint_id=tmp_path / "at3")
    resumed, after = fresh(1)
    resumed.load_state_dict(model.state_dict())
    target = {"optim": get_optimizer_state_dict(resumed, after, options=how)}
    dcp.load(target, checkpoint_id=tmp_path / "at3")
    set_optimizer_state_dict(resumed, after, target["optim"], options=how)
    assert_same(everything(after), everything(opt))
    train_net(model, opt, 2, 3)
    train_net(resumed, after, 2, 3)
    assert_same(everything(after), everything(opt))
