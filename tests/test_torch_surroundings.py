"""What torch does around an optimizer: its defaults, schedulers and helpers for state dicts."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lamb_cases import assert_same
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from dist_lamb import GradientNoiseScale, Lamb, ShardedLamb, base, checkpoint

CLASSES: list[Any] = [Lamb, ShardedLamb]


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def _stepped(model: nn.Module, optimizer: Any, value: float = 0.1) -> Any:
    for p in model.parameters():
        p.grad = torch.full(p.shape, value, dtype=p.dtype, device=p.device)
    optimizer.step()
    return optimizer


# --- torch's default device and dtype -------------------------------------------------------------

VARIANTS: list[dict[str, Any]] = [
    {"impl": "foreach"},
    {"impl": "reference", "rule": "lars"},
    {
        "impl": "foreach",
        "state_format": "bfloat16",
        "nonfinite": "skip",
        "max_grad_norm": 1.0,
        "track_grad_norm": True,
    },
]


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("cls", CLASSES)
def test_defaults_leave_no_trace(
    cls: Any, options: dict[str, Any], defaults: None, tmp_path: Any
) -> None:
    """A default device other than the params' (meta stands for a GPU), and every default dtype.

    300 steps of the quickest: a count in bfloat16 would end at 256.
    """
    found, steps = [], 300 if options == VARIANTS[0] else 12
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.float64)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2))
        torch.set_default_dtype(dtype)
        if k:
            torch.set_default_device("meta")
        optimizer = cls(model, lr=1e-3, **options)
        for t in range(steps):
            optimizer.param_groups[0]["lr"] = 1e-3 / (t + 1)
            _stepped(model, optimizer)
        reports = [optimizer.trust_ratios(), optimizer.param_norms(), optimizer.update_norms()]
        assert not optimizer.skipped_steps()
        checkpoint.save(tmp_path / str(k), 1, model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        checkpoint.load(tmp_path / str(k), model, optimizer)
        _stepped(model, optimizer)
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        tensors = {n: p.detach() for n, p in model.named_parameters()}
        for n, p in model.named_parameters():
            tensors |= {f"{n} {key}": value for key, value in optimizer.state[p].items()}
            assert optimizer.state[p]["step"] == steps + 1
            assert optimizer.state[p]["step"].dtype == torch.float32
        for i, report in enumerate(reports):
            tensors |= {f"{i} {n}": value for n, value in report.items()}
        assert all(t.device.type == "cpu" for t in tensors.values())
        found.append(tensors)
    for other in found[1:]:
        assert_same(other, found[0])


def test_a_loaded_lr_keeps_its_digits(defaults: None, tmp_path: Any) -> None:
    """A number that is written into a tensor goes through no bfloat16."""
    model = nn.Linear(3, 3)
    optimizer = _stepped(model, Lamb(model, lr=1.2345e-3))
    into = Lamb(model, lr=torch.tensor(0.1))
    checkpoint.save(tmp_path, 1, model, optimizer)
    torch.set_default_dtype(torch.bfloat16)
    checkpoint.load(tmp_path, model, into)
    assert float(into.param_groups[0]["lr"]) == float(torch.tensor(1.2345e-3, dtype=torch.float32))


def test_noise_scale_under_other_defaults(defaults: None) -> None:
    """And of float64 gradients."""
    for dtype in (torch.float32, torch.float64):
        model = nn.Linear(3, 2).to(dtype)
        torch.set_default_dtype(torch.bfloat16)
        noise = GradientNoiseScale(model, small_batch=2, big_batch=4)
        with noise.watch():
            model(torch.ones(2, 3, dtype=dtype)).sum().backward()
        noise.update(1.0)
        assert noise.mean().signal.dtype == torch.float32
        torch.set_default_dtype(torch.float32)


# --- schedulers that cycle betas or the momentum --------------------------------------------------

CYCLES: dict[str, Any] = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=10),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
}


@pytest.mark.parametrize("name", CYCLES)
@pytest.mark.parametrize("cls", CLASSES)
def test_cycled_momentum(cls: Any, name: str, tmp_path: Any) -> None:
    """LARS as torch's SGD: its momentum is cycled. A group without betas beside one with: nothing
    of it is read there. A rule with neither is refused by torch itself, as its Adagrad is."""
    model = nn.Linear(3, 3)
    lars, sgd = cls(model, rule="lars"), torch.optim.SGD(nn.Linear(3, 3).parameters(), momentum=0.9)
    schedules = [CYCLES[name](lars), CYCLES[name](sgd)]
    for _ in range(5):
        _stepped(model, lars)
        sgd.step()
        for schedule in schedules:
            schedule.step()
        assert lars.param_groups[0]["momentum"] == sgd.param_groups[0]["momentum"] != 0.9
    mixed = cls([{"params": [model.weight]}, {"params": [model.bias], "rule": "lars"}])
    schedule = CYCLES[name](mixed)
    _stepped(model, mixed)
    schedule.step()
    _stepped(model, mixed)
    assert mixed.param_groups[0]["betas"][0] != 0.9
    mixed.load_state_dict(copy.deepcopy(mixed.state_dict()))
    checkpoint.save(tmp_path, 2, model, mixed, stateful={"lr": schedule})
    checkpoint.load(tmp_path, model, mixed, stateful={"lr": schedule})
    schedule.step()
    assert _stepped(model, mixed).state[model.bias]["step"] == 3
    with pytest.raises(ValueError, match="must support momentum"):
        CYCLES[name](cls(model, rule="adagrad"))


# --- torch's helpers for state dicts --------------------------------------------------------------


@pytest.mark.parametrize("there", ["propagate", "skip"])
@pytest.mark.parametrize("here", ["propagate", "skip"])
def test_flattened_state_carries_the_skipped_steps(there: str, here: str) -> None:
    flat = StateDictOptions(flatten_optimizer_state_dict=True)
    model, other = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = _stepped(model, Lamb(model, nonfinite=there))
    if there == "skip":
        _stepped(model, optimizer, float("nan"))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=flat))
    into = Lamb(other, nonfinite=here)
    set_optimizer_state_dict(other, into, saved, options=flat)
    assert into.skipped_steps() == (there == "skip")
    assert _stepped(other, into).state[other.weight]["step"] == 2


@pytest.mark.parametrize("rule", ["lars", "adagrad", "lamb"])
def test_pairs_that_became_lists(rule: str) -> None:
    """Through torch's whole state dicts and through JSON tuples come back as lists."""
    whole = StateDictOptions(full_state_dict=True)
    model = nn.Linear(3, 3)
    optimizer = _stepped(model, Lamb(model, rule=rule))
    saved = get_optimizer_state_dict(model, optimizer, options=whole)
    set_optimizer_state_dict(model, optimizer, saved, options=whole)
    packed = optimizer.state_dict()
    groups = json.loads(json.dumps(packed["param_groups"]))
    optimizer.load_state_dict({**packed, "param_groups": groups})
    assert _stepped(model, optimizer).state[model.weight]["step"] == 2


def test_adagrad_s_start_is_counted_once() -> None:
    """torch's state of a param that was not stepped yet begins with it; so does the rule here."""
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    theirs = torch.optim.Adagrad([p], lr=0.1, initial_accumulator_value=0.1)
    ours = Lamb([q], rule="adagrad")
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for _ in range(2):
        p.grad, q.grad = torch.full((3,), 0.1), torch.full((3,), 0.1)
        theirs.step()
        ours.step()
        torch.testing.assert_close(q, p)
        torch.testing.assert_close(ours.state[q]["sum"], theirs.state[p]["sum"])


def test_an_unknown_rule_is_named() -> None:
    optimizer = Lamb(nn.Linear(3, 3))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["rule"] = "lion"
    with pytest.raises(ValueError, match="Unknown rule: 'lion'; known: lamb"):
        optimizer.load_state_dict(saved)


# --- params ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
def test_overlaps_are_looked_for_once(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a group: 2,000 groups took 26 s."""
    looked: list[int] = []
    look = base.first_overlap

    def counted(named: list[tuple[str, Tensor]]) -> str | None:
        looked.append(len(named))
        return look(named)

    monkeypatch.setattr(base, "first_overlap", counted)
    params = [nn.Parameter(torch.ones(2)) for _ in range(20)]
    optimizer = cls([{"params": [p]} for p in params])
    assert looked == [20]
    with pytest.raises(ValueError, match="param_20 shares memory with param_3"):
        optimizer.add_param_group({"params": [nn.Parameter(params[3].detach()[:1])]})
    assert len(optimizer.param_groups) == 20


@pytest.mark.parametrize("rule", ["lars", "lars_optax", "lans", "lamb"])
def test_norms_of_params_under_every_ratio(rule: str) -> None:
    model = nn.Linear(4, 1, bias=False)
    nn.init.ones_(model.weight)
    assert _stepped(model, Lamb(model, rule=rule)).param_norms() == {"weight": 2.0}
