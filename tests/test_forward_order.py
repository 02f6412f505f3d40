"""dist_lamb/sharding/forward_order.py: every module waits for the params that it uses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from overlap_cases import OPTIONS, batch, late_collectives, loss_of, make_net
from ranks import run_ranks
from torch import Tensor, nn

from dist_lamb import ShardedLamb, param_groups

pytestmark = pytest.mark.xdist_group("ranks")


def _own_modules(rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(0)
    # of several sizes: buckets that were paired up wrongly would not fit
    model = nn.ModuleList([nn.Linear(n, n) for n in (40, 300, 40)])
    optimizer = ShardedLamb(model, lr=0.1, bucket_numel=1024, overlap_gather=True)
    for t in range(4):
        chosen = [m for i, m in enumerate(model) if i != 1 or rank == 0 or t == 0]
        torch.stack([m(torch.ones(2, m.in_features)).sum() for m in chosen]).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.synchronize()
    return [p.detach() for p in model.parameters()]


def test_ranks_that_run_different_modules(tmp_path: Path) -> None:
    """None of which is the whole model: on some ranks a module has nobody who waits for it."""
    one, other = run_ranks(2, tmp_path, _own_modules)
    assert all(map(torch.equal, one, other))


def _reading(rank: int, world: int) -> bool:
    """Whoever reads params through the module, or after synchronize(), reads finished ones."""
    with late_collectives():
        model, twin = make_net(), make_net()
        optimizer = ShardedLamb(param_groups(model), overlap_gather=True, **OPTIONS)
        other = ShardedLamb(param_groups(twin), **OPTIONS)

        def train(t: int) -> None:
            for m, o in ((model, optimizer), (twin, other)):
                loss_of(m, t, rank).backward()
                o.step()
                o.zero_grad()

        train(0)
        train(1)
        assert optimizer._gatherer is not None
        # it really is on its way, or the checks below see nothing
        assert len(optimizer._gatherer._pending) > 2
        expected = {n: p.detach().clone() for n, p in twin.named_parameters()}
        stale = [not torch.equal(p, expected[n]) for n, p in model.named_parameters()]
        assert any(stale)
        assert models.digest(dict(model.state_dict())) == models.digest(dict(twin.state_dict()))
        train(2)
        model.twice.state_dict()
        assert torch.equal(model.twice.weight, twin.twice.weight)
        train(3)
        model.eval()
        twin.eval()
        with torch.no_grad():
            assert torch.equal(model(batch(9, 0), True), twin(batch(9, 0), True))
        model.train()
        twin.train()
        train(4)
        optimizer.synchronize()
        assert all(map(torch.equal, model.parameters(), twin.parameters()))
        train(5)
        zeros = {n: torch.zeros_like(t) for n, t in twin.state_dict().items()}
        for m in (model, twin):
            m.load_state_dict(zeros)  # must not be overwritten by what is on its way
        optimizer.synchronize()
        assert not any(bool(p.any()) for p in model.parameters())
        train(6)
        # a compiled forward breaks off to wait
        train(7)
        ids = batch(8, 0)
        assert torch.equal(torch.compile(model, backend="eager")(ids, True), twin(ids, True))
        whole, expected_whole = (o.full_optimizer_state_dict() for o in (optimizer, other))
        for i, entry in whole["state"].items():
            assert all(torch.equal(v, expected_whole["state"][i][k]) for k, v in entry.items())
        # copies and pickles of the model are models of their own
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            loss_of(clone, 7, rank).backward()
        optimizer.synchronize()
        other.step()
    return True


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.tanh(self.linear(x))) + x


def _compiled(rank: int, world: int) -> bool:
    """A compiled module waits for its params outside of its graph, which stays whole."""

    def trained(how: str) -> tuple[list[Tensor], int]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(
            nn.Linear(16, 16), *(Layer() for _ in range(4)), nn.Linear(16, 3)
        )
        graphs = []

        def backend(graph: Any, _: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        how, _, what = how.partition(" ")
        assert isinstance(model, nn.Sequential)
        for i in range(1, 5):
            if how == "compile()" and what == "layers":
                model[i].compile(backend=backend, fullgraph=True)
            elif how == "wrapped" and what == "layers":
                model[i] = torch.compile(model[i], backend=backend, fullgraph=True)
        if what == "model":
            if how == "compile()":
                model.compile(backend=backend, fullgraph=True)
            else:
                model = torch.compile(model, backend=backend, fullgraph=True)
        # one whose hooks go when another takes its place
        older = ShardedLamb(model, lr=0.1, bucket_numel=300, overlap_gather=True)
        older._order._watch([])  # type: ignore[union-attr]
        older._order._watch([0, 2])  # type: ignore[union-attr]
        optimizer = ShardedLamb(model, lr=0.1, bucket_numel=300, overlap_gather=True)
        assert optimizer._order is not None
        del older
        for t in range(6):
            if t == 3 and how == "compile()" and what == "layers":
                optimizer.synchronize()  # compile() forgets the hook
                model[1].compile(backend=backend, fullgraph=True)
            x = torch.ones(4, 16) * (rank + t + 1)
            model(x).square().sum().backward()
            optimizer.step()
            assert optimizer._gatherer is not None
            pending = len(optimizer._gatherer._pending)
            if not (t == 3 and how == "compile()" and what == "layers"):
                assert pending > 5, (how, what, t)
            optimizer.zero_grad()
        optimizer.synchronize()
        copy.deepcopy(model)
        return [p.detach() for p in model.parameters()], len(graphs)

    plain, _ = trained("plain")
    for how in ("compile() layers", "wrapped layers", "compile() model", "wrapped model"):
        with late_collectives():
            params, graphs = trained(how)
        assert graphs == 1, (how, graphs)  # equal layers share one
        torch.testing.assert_close(params, plain, rtol=0, atol=0)
    return True


def test_compiled_modules_wait_outside_of_their_graph(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, _compiled) == [True] * 2


def test_reading_params(tmp_path: Path) -> None:
    assert run_ranks(2, tmp_path, _reading) == [True] * 2
