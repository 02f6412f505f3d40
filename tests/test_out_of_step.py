"""What starts a collective is the same on all ranks, or an error on all that says what differed.

All cases run in one pair of processes; each has a process group of its own, so that ranks which it
leaves out of step do not matter to the next.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import models
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.utils.checkpoint import checkpoint

from dist_lamb import Lamb, ShardedLamb, _torch_private

WORLD = 2
#: of collectives: no case but one waits for it
TIMEOUT = timedelta(seconds=100)
SIZES = {"a": (40, 30), "b": (7,), "c": (1500,), "d": (3, 5)}
Case = Callable[[int, Any], Any]


class Net(nn.Module):
    """Losses linear in the params: gradients are the factors that were given."""

    def __init__(self, **more: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.p = nn.ParameterDict(
            {
                n: nn.Parameter(torch.randn(s, generator=generator))
                for n, s in (SIZES | more).items()
            }
        )

    def forward(self, factors: dict[str, Any], x: Any = 0.0) -> Tensor:
        return x + sum((self.p[n] * f).sum() for n, f in factors.items())


def digest(net: Net) -> str:
    return models.digest({n: p.detach() for n, p in net.p.items()})


def factors(t: int, rank: int, names: str = "abcd") -> dict[str, float]:
    """Their mean over two ranks is exact."""
    return {n: float((3 * t + 5 * k + 2 * rank) % 7 - 3) for k, n in enumerate(names)}


def sharded(net: Net, group: Any, params: bool = False, **options: Any) -> ShardedLamb:
    given = list(net.p.values()) if params else net
    options = {"lr": 0.1, "bucket_numel": 1, **options}
    return ShardedLamb(given, process_group=group, **options)


def by_lamb(means: list[dict[str, Any]], **more: tuple[int, ...]) -> str:
    """Bits after steps on these gradients."""
    net = Net(**more)
    optimizer = Lamb(net.p.values(), lr=0.1)
    for mean in means:
        for n, p in net.p.items():
            p.grad = torch.full_like(p, mean[n]) if n in mean else None
        optimizer.step()
    return digest(net)


def mean(*ranks: dict[str, float], factor: float = 0.5) -> dict[str, float]:
    names = dict.fromkeys(n for rank in ranks for n in rank)
    return {n: sum(rank.get(n, 0.0) for rank in ranks) * factor for n in names}


def both(t: int) -> dict[str, float]:
    return mean(factors(t, 0), factors(t, 1))


def refused(match: str, call: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError, match=match) as error:
        call()
    return str(error.value)


# --- loss scaling --------------------------------------------------------------------------------


def scalers(rank: int, group: Any) -> None:
    """Without an overflow the same bits as without a scaler; with one on a rank, skipped by all."""
    want = by_lamb([both(t) for t in range(3)])
    for kind in (torch.amp.GradScaler, ShardedGradScaler):
        for where in ({"stage": 1}, {"stage": 2, "overlap": False}):
            for unscale in (False, True):
                net = Net()
                optimizer = sharded(net, group, **where)
                scaler = kind("cpu", init_scale=4.0, growth_interval=2)
                for t in range(3):
                    scaler.scale(net(factors(t, rank))).backward()
                    if unscale:
                        scaler.unscale_(optimizer)
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                assert digest(net) == want, (kind, where, unscale)
                # an overflow on rank 1 alone
                scaler.scale(net(factors(3, rank) | {"a": torch.inf if rank else 1.0})).backward()
                if unscale:
                    scaler.unscale_(optimizer)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                assert digest(net) == want, (kind, where, unscale)
                scaler.scale(net(factors(4, rank))).backward()
                if kind is ShardedGradScaler:
                    assert scaler.get_scale() == 4.0, (where, unscale)  # grown once, and halved
                    scaler.step(optimizer)
                    assert digest(net) == by_lamb([both(t) for t in (0, 1, 2, 4)])
                else:
                    assert scaler.get_scale() == (4.0 if rank else 16.0)
                    refused("overflowed on 1 of 2 ranks.*Sharded", lambda: scaler.step(optimizer))  # noqa: B023


def scalers_where_gradients_are_gone(rank: int, group: Any) -> None:
    for kind in (torch.amp.GradScaler, ShardedGradScaler):
        for unscale in (False, True):
            net = Net()
            optimizer = sharded(net, group)
            net(factors(0, rank)).backward()
            optimizer.step()
            before = digest(net)
            scaler = kind("cpu")
            scaler.scale(net(factors(1, rank))).backward()
            if unscale:
                scaler.unscale_(optimizer)
            refused("stage=1 or overlap=False", lambda: scaler.step(optimizer))  # noqa: B023
            optimizer.zero_grad()
            assert digest(net) == before
            net(factors(1, rank)).backward()
            optimizer.step()
            assert digest(net) == by_lamb([both(0), both(1)])


def edited_gradients(rank: int, group: Any) -> None:
    """Through .data, and non-finite ones zeroed where they are, on the one rank that has them."""
    for where in ({"stage": 1}, {"stage": 2, "overlap": False}):
        net = Net()
        optimizer = sharded(net, group, **where)
        for t in range(3):
            net(factors(t, rank) | ({"b": torch.nan} if t == 1 and rank else {})).backward()
            for p in net.p.values():
                p.grad.data.mul_(2.0)
                torch.nan_to_num_(p.grad, nan=0.0)
            optimizer.step()
            optimizer.zero_grad()
        second = mean(factors(1, 0), factors(1, 1) | {"b": 0.0}, factor=1.0)
        double = [mean(factors(t, 0), factors(t, 1), factor=1.0) for t in (0, 2)]
        assert digest(net) == by_lamb([double[0], second, double[1]])


# --- freezing ------------------------------------------------------------------------------------


def unfrozen(rank: int, group: Any) -> None:
    """At once, after a loaded state, and after another group."""
    names = "abc"
    for stage in (1, 2):
        for how in ("plain", "loaded", "added"):
            net = Net(e=(4,))
            net.p["d"].requires_grad_(False)
            net.p["e"].requires_grad_(how != "added")
            named = [(n, p) for n, p in net.p.items() if how != "added" or n != "e"]
            options = {"lr": 0.1, "bucket_numel": 1, "stage": stage, "process_group": group}
            optimizer = ShardedLamb(named, **options)
            means = []
            for t in range(5):
                used = names + ("d" if t > 2 else "")
                if t == 2 and how == "loaded":
                    optimizer.load_state_dict(optimizer.full_optimizer_state_dict())
                if t == 2 and how == "added":
                    net.p["e"].requires_grad_(True)
                    optimizer.add_param_group({"params": [("e", net.p["e"])]})
                if t == 3:
                    net.p["d"].requires_grad_(True)
                net(factors(t, rank, used)).backward()
                optimizer.step()
                optimizer.zero_grad()
                means.append(mean(factors(t, 0, used), factors(t, 1, used)))
            assert digest(net) == by_lamb(means, e=(4,)), (stage, how)
            assert float(optimizer.state[net.p["d"]]["step"]) == 2


def unfrozen_on_one_rank(rank: int, group: Any) -> str:
    net = Net()
    net.p["d"].requires_grad_(False)
    optimizer = sharded(net, group)
    net(factors(0, rank, "abc")).backward()
    optimizer.step()
    optimizer.zero_grad()
    net.p["d"].requires_grad_(rank == 1)
    net(factors(1, rank, "abc")).backward()
    return refused("rank 1 came for step 1 with newly trainable", optimizer.step)


def frozen_between_steps(rank: int, group: Any) -> None:
    for params in (False, True):
        net = Net()
        optimizer = sharded(net, group, params=params)
        means = []
        for t, names in enumerate(("abcd", "abc", "ac", "bcd", "abcd")):
            for n, p in net.p.items():
                p.requires_grad_(n in names)
            net(factors(t, rank, names)).backward()
            optimizer.step()
            optimizer.zero_grad()
            means.append(mean(factors(t, 0, names), factors(t, 1, names)))
        assert digest(net) == by_lamb(means)


# --- one optimizer after the other ---------------------------------------------------------------


def _hooks(net: Net) -> int:
    of_params = sum(len(p._post_accumulate_grad_hooks or ()) for p in net.p.values())  # type: ignore[attr-defined]
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks")
    kinds += ("_load_state_dict_pre_hooks",)
    return of_params + sum(len(getattr(m, kind)) for m in net.modules() for kind in kinds)


def newer_takes_over(rank: int, group: Any) -> None:
    for stage in (1, 2):
        net, means = Net(), [both(0)]
        older = sharded(net, group, stage=stage)
        held = torch.optim.lr_scheduler.ConstantLR(older)
        net(factors(0, rank)).backward()
        older.step()
        older.zero_grad()
        state = older.full_optimizer_state_dict()
        newer = sharded(net, group, stage=stage)
        newer.load_state_dict(state)
        newer.param_groups[0]["lr"] = 0.1
        for t in (1, 2):
            net(factors(t, rank)).backward()
            refused("a newer ShardedLamb was made of the same params", older.step)
            newer.step()
            newer.zero_grad()
            means.append(both(t))
        plain = Net()
        lamb = Lamb(plain.p.values(), lr=0.1 / 3)
        for m, lr in zip(means, (0.1 / 3, 0.1, 0.1)):
            lamb.param_groups[0]["lr"] = lr
            for n, p in plain.p.items():
                p.grad = torch.full_like(p, m[n])
            lamb.step()
        assert digest(net) == digest(plain)
        assert held.optimizer is older


def no_hook_stays(rank: int, group: Any) -> None:
    net = Net()
    counts = []
    for again in range(30):
        optimizer = sharded(net, group, overlap_gather=again % 2 == 0)
        net(factors(again, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
        counts.append(_hooks(net))
    assert counts[-2:] == counts[:2], counts
    del optimizer
    gc.collect()
    assert _hooks(net) == 0


# --- in step -------------------------------------------------------------------------------------


class Checkpointed(Net):
    def forward(self, factors: dict[str, Any], x: Any = 0.0) -> Tensor:
        for n, f in factors.items():
            x = checkpoint(lambda y, n=n, f=f: y + (self.p[n] * f).sum(), x, use_reentrant=True)
        return x


def all_in_reentrant_checkpoints(rank: int, group: Any) -> None:
    """Params given, two backwards, and a layer that one rank leaves out."""
    for params in (True, False):
        net, means = Checkpointed(), []
        optimizer = sharded(net, group, params=params)
        for t in range(4):
            names = ["abcd", "abd" if t > 1 else "abcd"]
            for micro in (0, 1):
                x = torch.zeros((), requires_grad=True)
                net(factors(t + 9 * micro, rank, names[rank]), x).backward()
            optimizer.step()
            optimizer.zero_grad()
            parts = [factors(t + 9 * m, r, names[r]) for r in (0, 1) for m in (0, 1)]
            means.append(mean(*parts))
        assert digest(net) == by_lamb(means), params


def gradients_of_inputs_on_one_rank(rank: int, group: Any) -> None:
    net = Net()
    optimizer = sharded(net, group)
    for t in range(4):
        if rank == 0 and t:
            for mode in (False, True):
                net.train(mode)
                x = torch.ones((), requires_grad=True)
                (of_x,) = torch.autograd.grad(net(factors(t, 0), x), x)
                assert float(of_x) == 1.0
                torch.autograd.grad(net(factors(t, 0), x), list(net.p.values()))
            named = dict(net.named_parameters())

            def loss(p: dict[str, Tensor], t: int = t) -> Tensor:
                return torch.func.functional_call(net, p, (factors(t, 0),))

            assert float(torch.func.grad(loss)(named)["p.b"][0]) == factors(t, 0)["b"]
            assert torch.func.jacrev(loss)(named)["p.b"].shape == (7,)
        net(factors(t, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert digest(net) == by_lamb([both(t) for t in range(4)])


def empty_param(rank: int, group: Any) -> None:
    for stage in (1, 2):
        net = Net(empty=(0, 3))
        optimizer = sharded(net, group, stage=stage)
        for t in range(3):
            names = "abcd"
            more = {"empty": 1.0} if rank == 1 or t == 2 else {}
            net(factors(t, rank, names) | more).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert digest(net) == by_lamb([both(t) for t in range(3)], empty=(0, 3))
        assert float(optimizer.state[net.p["empty"]]["step"]) == 3
        state = optimizer.full_optimizer_state_dict()["state"]
        assert {float(entry["step"]) for entry in state.values()} == {3.0}


# --- out of step ---------------------------------------------------------------------------------


def _two_steps(rank: int, group: Any, **options: Any) -> tuple[Net, ShardedLamb]:
    net = Net()
    optimizer = sharded(net, group, **options)
    for t in range(2):
        net(factors(t, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return net, optimizer


def one_backward_more(rank: int, group: Any) -> str:
    net, optimizer = _two_steps(rank, group)

    def train() -> None:
        for _ in range(1 + rank):
            net(factors(2, rank)).backward()
        optimizer.step()

    return refused(r"rank 0 came for step 2 after round 1 .*rank 1 came for round 2 ", train)


def as_often_as_one_likes_at_stage_1(rank: int, group: Any) -> None:
    net, optimizer = _two_steps(rank, group, stage=1)
    for _ in range(1 + rank):
        net(factors(2, rank)).backward()
    optimizer.step()
    third = mean(factors(2, 0), factors(2, 1), factors(2, 1))
    assert digest(net) == by_lamb([both(0), both(1), third])


class _Stop(Exception):
    pass


def raised_inside_backward(rank: int, group: Any, after: str = "a") -> str:
    """After buckets have left, and goes on with the next batch."""
    net, optimizer = _two_steps(rank, group)

    def stop(_: Tensor) -> None:
        raise _Stop

    def train() -> None:
        for t in (2, 3):
            handle = net.p[after].register_hook(stop) if rank and t == 2 else None  # type: ignore[no-untyped-call]
            try:
                net(factors(t, rank)).backward()
                optimizer.step()
            except _Stop:
                assert handle is not None
                handle.remove()
            optimizer.zero_grad()

    return refused(r"ranks are out of step: rank 0 .*rank 1 .*1 backward\(s\) that raised", train)


def raised_before_anything_left(rank: int, group: Any) -> str:
    return raised_inside_backward(rank, group, after="c")


def does_not_come(rank: int, group: Any) -> str:
    net, optimizer = _two_steps(rank, group)
    lockstep = optimizer._members.lockstep
    assert lockstep._timeout == 0.9 * TIMEOUT  # before that of a collective
    lockstep._timeout = timedelta(seconds=2)
    store = _torch_private.default_store()
    if rank == 1:
        store.wait(["rank 0 was told"], TIMEOUT)  # and finds what was decided without it
    told = refused(r"rank 1 has not come in 2 s", lambda: net(factors(2, rank)).backward())
    store.set("rank 0 was told", "yes")
    return told


def bad_on_one_rank(rank: int, group: Any) -> None:
    """An option, and a sparse gradient: the others say what that rank says."""
    net, optimizer = _two_steps(rank, group)
    before = digest(net)
    optimizer.param_groups[0]["lr"] = float("nan") if rank else 0.1
    net(factors(2, rank)).backward()
    if rank:
        with pytest.raises(ValueError, match="learning rate"):
            optimizer.step()
    else:
        refused("rank 1 refuses step 2.*learning rate", optimizer.step)
    assert digest(net) == before
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()  # nothing was lost
    assert digest(net) == by_lamb([both(0), both(1), both(2)])


def other_options_on_one_rank(rank: int, group: Any) -> None:
    """As ReduceLROnPlateau changes them by a rank's own loss; nothing is lost."""
    net, optimizer = _two_steps(rank, group)
    before, (of,) = digest(net), optimizer.param_groups
    net(factors(2, rank)).backward()
    for name, values in {
        "lr": (0.3, 0.2),
        "weight_decay": (0.25, 0.5),
        "betas": ((0.8, 0.9), (0.7, 0.9)),
    }.items():
        own, of[name] = of[name], values[rank]
        zero, one = (re.escape(f"{name}={value!r} in group 0") for value in values)
        refused(
            rf"rank 0 came for step 2.* with {zero}; rank 1 came for .* with {one}\.",
            optimizer.step,
        )
        of[name] = own
    # A list, as JSON gives, that is changed in place; and a param that moves.
    of["betas"] = list(of["betas"])
    of["betas"][0] -= 0.1 * rank
    refused(r"rank 1 came for .* with betas=\(0\.8, 0\.999\) in group 0", optimizer.step)
    of["betas"] = (0.9, 0.999)
    if rank:
        of["params"].reverse()
    refused(r"rank 1 came for .* with 4 params \(\w{8}\) in group 0\.", optimizer.step)
    if rank:
        of["params"].reverse()
    of["lr"] = torch.tensor(0.5 if rank else own_lr(optimizer))
    told = "rank 1 came for step 2.* with lr=0.5 in group 0"
    refused(told, optimizer.step)
    of["lr"] = own_lr(optimizer)
    assert digest(net) == before
    # Equal values, of other types.
    of["betas"] = [0.9, 0.999] if rank else (0.9, 0.999)
    of["eps"] = np.float64(1e-6) if rank else 1e-6
    optimizer.step()
    assert digest(net) == by_lamb([both(0), both(1), both(2)])


def groups_that_ranks_do_not_share(rank: int, group: Any) -> None:
    """A group that is refused does not stay, and many groups make no long message."""
    net = Net(**{f"more{i}": (2,) for i in range(60)})
    params = list(net.p.values())
    optimizer = sharded(net, group, params=True)
    optimizer.param_groups[0]["params"][1:] = []
    one_each = ShardedLamb(
        [{"params": [p]} for p in params[1:]], lr=0.1, bucket_numel=1, process_group=group
    )
    for t in range(2):
        net(factors(t, rank)).backward()
        one_each.step()
    added = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"rank 0 has weight_decay=0\.0 in group 63, rank 1 "):
        one_each.add_param_group({"params": [added], "weight_decay": float(rank)})
    assert len(one_each.param_groups) == 63
    for i, of in enumerate(one_each.param_groups):
        of["lr"], of["weight_decay"] = 0.2, 0.5 * (rank and i == 40)
    net(factors(2, rank)).backward()
    told = refused(r"lr=0\.2 in group 0, 1, 2, 3 to 62 \(\w{8}\), weight_decay=", one_each.step)
    assert len(told) < 700
    one_each.param_groups[40]["weight_decay"] = 0.0
    one_each.step()
    # What was agreed on is told no more.
    one_each.param_groups[1]["lr"] = 0.3 + rank
    net(factors(3, rank)).backward()
    told = refused("rank 0 came for step 3 .*with lr=0.3 in group 1; rank 1", one_each.step)
    assert "0.2" not in told


def own_lr(optimizer: ShardedLamb) -> float:
    return float(optimizer.defaults["lr"])


def whole_state_on_one_rank(rank: int, group: Any) -> str:
    net, optimizer = _two_steps(rank, group)
    net(factors(2, rank)).backward()
    call = optimizer.full_optimizer_state_dict if rank else optimizer.step
    return refused("rank 0 came for step 2.*rank 1 came for a whole state dict", call)


CASES: list[Case] = [
    scalers,
    scalers_where_gradients_are_gone,
    edited_gradients,
    unfrozen,
    unfrozen_on_one_rank,
    frozen_between_steps,
    newer_takes_over,
    no_hook_stays,
    all_in_reentrant_checkpoints,
    gradients_of_inputs_on_one_rank,
    empty_param,
    one_backward_more,
    as_often_as_one_likes_at_stage_1,
    raised_inside_backward,
    raised_before_anything_left,
    does_not_come,
    bad_on_one_rank,
    other_options_on_one_rank,
    groups_that_ranks_do_not_share,
    whole_state_on_one_rank,
]


def _run_all(rank: int, _: int) -> dict[str, tuple[str | None, Any]]:
    """{case: (what went wrong, what it returned)}."""
    found: dict[str, tuple[str | None, Any]] = {}
    for case in CASES:
        group = dist.new_group(timeout=TIMEOUT)
        try:
            found[case.__name__] = (None, case(rank, group))
        except BaseException:  # pytest.fail's among them
            found[case.__name__] = (traceback.format_exc(), None)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(WORLD, tmp_path_factory.mktemp("ranks"), _run_all, timeout=280.0)


@pytest.mark.xdist_group("out_of_step")
@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_out_of_step(outcomes: list[Any], case: str) -> None:
    wrong = [outcome[case][0] for outcome in outcomes]
    assert not any(wrong), "\n".join(f"rank {i}: {text}" for i, text in enumerate(wrong))
    assert outcomes[0][case][1] == outcomes[1][case][1]
