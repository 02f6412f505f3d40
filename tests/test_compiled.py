"""The compiled backend: compiled once, whatever changes between steps."""

from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from torch._dynamo.utils import counters

from dist_lamb import Lamb, ShardedLamb, kernels
from dist_lamb.kernels import compiled

pytestmark = pytest.mark.xdist_group("compile")


def _frames() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_nothing_recompiles_when_numbers_change(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 steps with a scheduler, changing options, sizes and a param that comes and goes."""
    # A matrix of one row is a graph of its own; the tensors below have several.
    monkeypatch.setattr(compiled, "SMALL_NUMEL", 64)
    monkeypatch.setattr(compiled, "ROW_NUMEL", 8)
    torch._dynamo.reset()
    before = _frames()
    params = models.make_params()
    optimizer = cls(models.groups_of(params), lr=0.1, impl="compiled", max_grad_norm=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    graphs = []
    for t in range(20):
        absent = ("fc.weight",) if t % 3 == 1 else ()
        for name, g in models.mean_gradients(params, t, absent).items():
            params[name].grad = g
        if t == 5:
            optimizer.param_groups[0]["weight_decay"] = 0.3
        if t == 7:
            optimizer.param_groups[0].update(betas=(0.8, 0.99), eps=1e-8, decoupled=False)
        if t == 9:
            optimizer.param_groups[1].update(adapt=False, phi=(0.1, 10.0), maximize=True)
        if t == 11:
            optimizer.param_groups[0]["max_grad_norm"] = 0.5
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        graphs.append(_frames() - before)
    assert 0 < graphs[0] <= 3  # grad_sq, moments and apply
    assert graphs[1:] == [graphs[1]] * 19
    # other sizes: no graph per tensor either
    more = models.make_params(seed=1)
    more["big"] = torch.nn.Parameter(torch.ones(70_001))
    other = cls(models.groups_of(more), impl="compiled", max_grad_norm=1.0)
    for name, g in models.mean_gradients(more, 0).items():
        more[name].grad = g
    other.step()
    assert _frames() - before == graphs[1]


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_a_step_inside_of_a_compiled_function(cls: Any) -> None:
    """Between two graphs: traced, it failed on what it keeps from step to step."""
    torch.manual_seed(0)
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(8, 4)
    for model, compile_it in zip(models, (True, False)):
        optimizer = cls(model.parameters(), lr=0.05, impl="foreach")

        def train_step(model: Any = model, optimizer: Any = optimizer) -> None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        run = torch.compile(train_step, backend="eager") if compile_it else train_step
        for _ in range(3):
            run()
    for p, q in zip(models[0].parameters(), models[1].parameters()):
        torch.testing.assert_close(p, q)


def test_auto_compiles_only_what_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, large = torch.device("cpu"), kernels.COMPILE_FROM_NUMEL
    assert kernels.backend_for("auto", cpu, large - 1).__name__.endswith("foreach")
    monkeypatch.setattr(kernels, "has_cpp_compiler", lambda: True)
    assert kernels.backend_for("auto", cpu, large).__name__.endswith("compiled")
    monkeypatch.setattr(kernels, "has_cpp_compiler", lambda: False)
    assert kernels.backend_for("auto", cpu, large).__name__.endswith("foreach")
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler, and none was found"):
        kernels.backend_for("compiled", cpu, 1)


def test_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.has_cpp_compiler.cache_clear()
    assert kernels.has_cpp_compiler()
    kernels.has_cpp_compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not kernels.has_cpp_compiler()
    kernels.has_cpp_compiler.cache_clear()
