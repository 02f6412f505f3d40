"""What Lamb keeps from one step to the next, and whatever may happen between two steps."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import fused_cases
import pytest
import torch
from torch import Tensor, nn

from dist_lamb import Lamb

pytestmark = pytest.mark.xdist_group("triton")


def kept_of(optimizer: Any, forget: bool = False) -> Any:
    """What the optimizer keeps: with ``forget`` nothing from now on, until the next step.

    The only private name in this file.
    """
    if forget:
        optimizer._kept = None
    return optimizer._kept


def _set_gradients(params: list[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)


def _gradient_absent(optimizer: Any, params: list[Tensor]) -> None:
    params[1].grad = None


def _all_but_one_absent(optimizer: Any, params: list[Tensor]) -> None:
    for p in params[:2]:
        p.grad = None


def _other_strides_at_the_same_address(optimizer: Any, params: list[Tensor]) -> None:
    assert params[0].grad is not None
    params[0].grad = params[0].grad.view(-1).view(params[0].shape[::-1]).t()


def _param_moved(optimizer: Any, params: list[Tensor]) -> None:
    params[0].data = params[0].data.clone()


def _state_dropped(optimizer: Any, params: list[Tensor]) -> None:
    del optimizer.state[params[0]]


def _state_emptied(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[0]].clear()


def _moment_replaced(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[1]]["exp_avg_sq"] = torch.ones_like(params[1])


def _step_count_replaced(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.state[params[0]]["step"] = torch.tensor(0.0)


def _state_offloaded_and_back(optimizer: Any, params: list[Tensor]) -> None:
    for entry in optimizer.state.values():
        for name, value in entry.items():
            entry[name] = value.to("cpu", copy=True)


def _state_replaced_through_an_old_reference(optimizer: Any, params: list[Tensor]) -> None:
    for entry in optimizer.__dict__["state"].values():  # optimizer.state would be noticed
        for name, value in entry.items():
            entry[name] = value.clone()


def _memory_of_state_replaced(optimizer: Any, params: list[Tensor]) -> None:
    for entry in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name].data = entry[name].data.clone()


def _state_loaded(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def _group_added(optimizer: Any, params: list[Tensor]) -> None:
    late = nn.Parameter(torch.ones(5))
    late.grad = torch.full((5,), 0.5)
    optimizer.add_param_group({"params": [late], "lr": 0.3})
    params.append(late)


def _options_changed(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0].update(lr=0.01, betas=(0.5, 0.9), weight_decay=0.3, decoupled=False)


def _lr_becomes_zero(optimizer: Any, params: list[Tensor]) -> None:
    optimizer.param_groups[0]["lr"] = 0.0


EVENTS = (
    _gradient_absent,
    _all_but_one_absent,
    _other_strides_at_the_same_address,
    _param_moved,
    _state_dropped,
    _state_emptied,
    _moment_replaced,
    _step_count_replaced,
    _state_offloaded_and_back,
    _state_replaced_through_an_old_reference,
    _memory_of_state_replaced,
    _state_loaded,
    _group_added,
    _options_changed,
    _lr_becomes_zero,
)


def _run_with(event: Callable[..., None], impl: str, planned: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    params: list[Tensor] = [
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 7), (9,), (1030,))
    ]
    optimizer = Lamb(params, lr=0.1, weight_decay=0.1, impl=impl)
    for step in range(5):
        _set_gradients(params, step)
        if step == 3:
            assert kept_of(optimizer)[0] is not None or not planned
            event(optimizer, params)
        if not planned:
            kept_of(optimizer, forget=True)
        optimizer.step()
    found = {f"{i}": p.detach() for i, p in enumerate(params)}
    for i, p in enumerate(params):
        found |= {f"{i} {name}": value for name, value in optimizer.state[p].items()}
    return found


def _event_errors(event: Callable[..., None]) -> dict[str, float]:
    expected = _run_with(event, "reference", planned=False)
    return dict(fused_cases.errors(_run_with(event, "triton"), expected))


@pytest.mark.parametrize("event", EVENTS)
def test_whatever_happens_between_steps(
    interpreted: Callable[..., Any], event: Callable[..., None]
) -> None:
    """A table of addresses made at an earlier step must not be used where it no longer holds."""
    found = interpreted(_event_errors, event)
    assert max(found.values()) < 40, found


@pytest.mark.parametrize("impl", ["reference", "foreach", "compiled"])
@pytest.mark.parametrize("event", EVENTS)
def test_whatever_happens_between_steps_elsewhere(event: Callable[..., None], impl: str) -> None:
    """The other backends keep views of the tensors, on a CPU."""
    found, expected = (_run_with(event, impl, planned) for planned in (True, False))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_other_plans_keep_no_gradients() -> None:
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, 2))]
    optimizer = Lamb(params, impl="foreach")
    plans = []
    for step in range(5):
        for p in params:
            p.grad = torch.ones_like(p)
        storages = [p.grad.untyped_storage()._weak_ref() for p in params]  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
        assert all(map(torch.UntypedStorage._expired, storages)), step
        plans.append(kept_of(optimizer))
    assert plans[0] is not None
    assert all(plan is plans[0] for plan in plans)


def _planned_steps() -> None:
    params = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(3, 2))]
    optimizer = Lamb(params, impl="triton")
    plans = []
    for _ in range(4):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        plans.append(kept_of(optimizer))
    assert plans[0] is not None
    assert all(plan is plans[0] for plan in plans)
    away = [weakref.ref(t) for entry in optimizer.state.values() for t in entry.values()]
    for entry in optimizer.state.values():
        for name in entry:
            entry[name] = entry[name].clone()
    assert [ref() for ref in away] == [None] * 6


def test_a_plan_is_kept_and_keeps_no_memory_of_state(interpreted: Callable[..., Any]) -> None:
    interpreted(_planned_steps)


def test_params_that_left_the_groups() -> None:
    """They are not kept alive; those that live have their names when they come back."""
    params = {n: nn.Parameter(torch.randn(3, 2)) for n in ("stays", "leaves", "is gone")}
    optimizer = Lamb(params.items(), impl="foreach")
    group = optimizer.param_groups[0]
    _set_gradients(list(params.values()), 0)
    optimizer.step()
    group["params"] = [params["stays"]]
    del group["param_names"]
    gone = params.pop("is gone")
    del optimizer.state[gone]
    left = weakref.ref(gone)
    del gone
    optimizer.step()
    gc.collect()
    assert left() is None
    optimizer.add_param_group({"params": [params["leaves"]]})
    optimizer.step()
    assert list(optimizer.trust_ratios()) == ["stays", "leaves"]
    # Another tensor may come to lie where one was.
    others = [nn.Parameter(torch.randn(3, 2)) for _ in range(64)]
    optimizer.add_param_group({"params": others})
    names = [name for name, _ in optimizer.named_groups()[-1]]
    assert all(name.startswith("param_") for name in names)


@pytest.mark.parametrize("named", [False, True])
def test_params_may_be_swapped(named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does with DTensors when a model is converted: not with weak references to them."""
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True, raising=True)
    model = nn.Linear(4, 3)
    optimizer = Lamb(model if named else model.parameters(), impl="foreach")
    for _ in range(2):
        model.to(torch.float32).to("cpu")
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    model.double()
    assert all(p is q for p, q in zip(model.parameters(), optimizer.param_groups[0]["params"]))
