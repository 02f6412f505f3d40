"""Edits of a ShardedLamb between steps, alone and on two ranks.

All cases run in one pair of processes, for starting them takes seconds. Each has a process group of
its own, so that a case that fails on one rank alone fails on the other by a timeout, no more.
"""

from __future__ import annotations

import copy
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from edit_cases import (
    DEFAULTS,
    SHAPES,
    Plain,
    Twin,
    copied,
    everything,
    gradient,
    half,
    make,
    same_bits,
    states,
)
from ranks import run_ranks
from test_edits_errors import WHY, failing_once
from test_edits_masters import _all_at_once, _clamped, _copied_to_one, _loaded
from test_edits_nonfinite import _counted
from test_edits_norms import check_norms
from torch import Tensor, nn

from dist_lamb import ShardedLamb

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.05}


class Here(NamedTuple):
    """Where a case runs."""

    impl: str
    rank: int
    world: int
    group: Any

    def sharded(self, params: Any, **options: Any) -> ShardedLamb:
        options = {**OPTIONS, "bucket_numel": 2**11, **options}
        return ShardedLamb(params, impl=self.impl, process_group=self.group, **options)

    def twin(
        self, dtype: torch.dtype = torch.float32, stage: int = 2, also: Any = (), **options: Any
    ) -> Ranked:
        params = make(dtype, {**SHAPES, "w": (43, 59)})
        tracked = {"track_grad_norm": True, **dict(also)}
        opt = self.sharded(list(params.items()), stage=stage, **options, **tracked)
        return Ranked(params, opt, self.rank, self.world, **OPTIONS, **options)

    def the_same(self, value: Any) -> None:
        """On all ranks."""
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value, group=self.group)
        assert all(other == value for other in found), found


class Ranked(Twin):
    """Gradients come from a backward, as they do in a training."""

    #: (param, its element, the value that the last rank finds there)
    spoilt: tuple[str, int, float] | None = None

    def set_gradients(self, absent: Iterable[str] = ()) -> dict[str, Tensor]:
        mean = {n: gradient(n, p, self.t) for n, p in self.params.items() if n not in absent}
        self.t += 1
        mine = {n: g * self._factor for n, g in mean.items()}
        if self.spoilt is not None and self._factor in (1, -1):
            name, element, value = self.spoilt
            mine[name].view(-1)[element] = value
        if mine:
            sum((self.params[n] * g).sum().float() for n, g in mine.items()).backward()
        return mean


# --- state ---------------------------------------------------------------------------------------


def reset(here: Here) -> None:
    """Zero moments, counters 0, and masters from the params."""
    for dtype, how in product((torch.float32, half(here.impl)), ("assigned", "cleared", "deleted")):
        twin = here.twin(dtype)
        twin.step(steps=3)
        gone = dict(twin.params)
        if how == "assigned":
            twin.opt.state = defaultdict(dict)
        elif how == "cleared":
            twin.opt.state.clear()
        else:
            gone = {n: twin.params[n] for n in "cw"}
            for p in gone.values():
                del twin.opt.state[p]
        for n, p in gone.items():
            twin.plain.start_anew(n, p)
        for _ in range(2):
            twin.step()
            twin.check()
        twin.opt.consolidate_state_dict(0)
        if here.rank == 0:
            saved = twin.opt.state_dict()["state"]
            counts = [int(saved[i]["step"]) for i in range(len(twin.params))]
            assert counts == [2 if n in gone else 5 for n in twin.params]


# --- groups --------------------------------------------------------------------------------------


def _grouped(here: Here) -> Ranked:
    params = make(shapes={**SHAPES, "w": (43, 59)})
    groups = [
        {"params": [(n, params[n]) for n in "abcw"]},
        {"params": [(n, params[n]) for n in "de"], "lr": 0.03, "weight_decay": 0.0},
        {"params": [("f", params["f"])], "lr": 0.0},
    ]
    twin = Ranked(params, here.sharded(groups), here.rank, here.world, **OPTIONS)
    for n in "de":
        twin.plain.options[n].update(lr=0.03, weight_decay=0.0)
    twin.plain.options["f"]["lr"] = 0.0
    twin.step(absent="cd")
    twin.step(steps=3)
    return twin


def _moved(here: Here, ratios: bool) -> None:
    twin = _grouped(here)
    first, second, third = (group["params"] for group in twin.opt.param_groups)
    third.insert(0, second.pop())  # the order of all stays as it was
    twin.plain.options["e"] = {**DEFAULTS, **OPTIONS, "lr": 0.0}
    fixed = {"e": twin.params["e"].detach().clone()}
    _goes_on(twin, ratios)
    same_bits({"e": twin.params["e"].detach()}, fixed)
    second.append(first.pop(0))
    twin.plain.options["a"] = dict(twin.plain.options["d"])
    _goes_on(twin, ratios)
    first.reverse()
    _goes_on(twin, ratios)
    twin.opt.param_groups.reverse()
    _goes_on(twin, ratios)


def moved_between_groups(here: Here) -> None:
    _moved(here, ratios=False)


def trust_ratios_when_moved(here: Here) -> None:
    _moved(here, ratios=True)


def _goes_on(twin: Ranked, ratios: bool = False) -> None:
    for absent in ("b", ""):
        twin.step(absent=absent)
        twin.check()
        if not ratios:
            continue
        found = twin.opt.trust_ratios()
        assert found.keys() == twin.params.keys()
        for n, ratio in found.items():
            want = twin.plain.rho[n]
            assert float(ratio) == pytest.approx(want, rel=1e-4, nan_ok=True), n


def _first_deleted(groups: Any) -> None:
    del groups[0]["params"][0]


def _appended(groups: Any) -> None:
    groups[1]["params"].append(nn.Parameter(torch.ones(5)))


def _exchanged(groups: Any) -> None:
    groups[0]["params"][2] = nn.Parameter(torch.ones_like(groups[0]["params"][2]))


def _group_dropped(groups: Any) -> None:
    del groups[1]


def another_set_of_params(here: Here) -> None:
    """Refused in the same words on all ranks, with nothing changed; taken back, it goes on."""
    for edit in (_first_deleted, _appended, _exchanged, _group_dropped):
        twin = _grouped(here)
        before = everything(twin.opt, twin.params)
        kept = [(group, list(group["params"])) for group in twin.opt.param_groups]
        edit(twin.opt.param_groups)
        twin.set_gradients()
        with pytest.raises(RuntimeError, match="add_param_group") as error:
            twin.opt.step()
        here.the_same(str(error.value))
        twin.opt.param_groups[:] = [group for group, _ in kept]
        for group, params in kept:
            group["params"][:] = params
        twin.opt.zero_grad()
        same_bits(everything(twin.opt, twin.params), before)
        _goes_on(twin)


# --- masters -------------------------------------------------------------------------------------


def written_params(here: Here) -> None:
    """What all ranks write into half-precision params is where the next step starts from."""
    for stage in (1, 2):
        twin = here.twin(half(here.impl), stage)
        twin.step()
        for edit in (_loaded, _copied_to_one, _clamped, _all_at_once):
            edit(twin.params)
            twin.follow_masters()
            twin.step(steps=2)
            twin.check()
        for n, p in twin.params.items():
            p.data.mul_(2.0)
            twin.plain.x[n] = p.detach().double()
        twin.opt.refresh_masters()
        twin.step(steps=2)
        twin.check()
        _clamped(twin.params)
        starts = twin.follow_masters()
        twin.opt.param_groups[0]["lr"] = 0.0
        twin.set_gradients()
        twin.opt.step()
        state = states(twin.opt)
        same_bits({n: state[p]["master"] for n, p in twin.params.items()}, starts)


def resumed(here: Here) -> None:
    """Model and optimizer of a checkpoint in either order, of a model that was written or not."""
    for edit, model_first in product((False, True), (False, True)):
        twin = here.twin(half(here.impl))
        twin.step(steps=3)
        if edit:
            _clamped(twin.params)
            twin.follow_masters()
        weights = {n: p.detach().clone() for n, p in twin.params.items()}
        state, at = twin.opt.full_optimizer_state_dict(), twin.t
        twin.step(steps=2)
        twin.check()
        params = copied(twin.params)
        again = Ranked(params, here.sharded(list(params.items())), here.rank, here.world)
        again.step(steps=2)
        again.t = at
        for model in (model_first, not model_first):
            if model:
                with torch.no_grad():
                    for n, p in params.items():
                        p.copy_(weights[n])
            else:
                again.opt.load_state_dict(copy.deepcopy(state))
        again.step(steps=2)
        same_bits(everything(again.opt, params), everything(twin.opt, twin.params))


# --- options -------------------------------------------------------------------------------------


def invalid_options(here: Here) -> None:
    twin = here.twin()
    twin.step(steps=2)
    group, before = twin.opt.param_groups[0], everything(twin.opt, twin.params)
    invalid = {"lr": float("nan"), "betas": (2.0, 0.9), "eps": "x"}
    for (name, value), told in zip(invalid.items(), ("lr|learning rate", "beta", "eps")):
        right, group[name] = group[name], value
        twin.set_gradients()
        with pytest.raises(ValueError, match=told) as error:
            twin.opt.step()
        here.the_same(str(error.value))
        same_bits(everything(twin.opt, twin.params), before)
        group[name] = right
        twin.opt.zero_grad()
    twin.step(steps=2)
    twin.check()


def another_optimizer_s_state(here: Here) -> None:
    own = {"max_grad_norm": 0.5, "adapt": "decayed", "trust_clip": (0.0, 0.7)}
    loaded = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.2}
    twin = here.twin(**own)
    twin.step(steps=2)
    others = copied(twin.params)
    adamw = torch.optim.AdamW(others.values(), **loaded)
    for n, p in others.items():
        p.grad = gradient(n, p, 0)
    adamw.step()
    twin.opt.load_state_dict(adamw.state_dict())
    twin.plain = Plain(twin.params, **own, **loaded)
    for n, p in others.items():
        twin.plain.m[n] = adamw.state[p]["exp_avg"].double()
        twin.plain.v[n] = adamw.state[p]["exp_avg_sq"].double()
        twin.plain.t[n] = 1
    twin.step(steps=2)
    twin.check()


# --- numbers that are not finite, errors, norms --------------------------------------------------


def bad_gradient_on_one_rank(here: Here) -> None:
    clips = (None, 0.5)
    for dtype, stage, clip in product((torch.float32, half(here.impl)), (1, 2), clips):
        twin = here.twin(dtype, stage, {"nonfinite": "skip"}, max_grad_norm=clip)
        twin.step(steps=2)
        bad = [("w", -1, float("nan")), ("a", 0, float("inf")), ("d", 1399, float("-inf"))]
        for done, twin.spoilt in enumerate(bad, start=1):
            before = everything(twin.opt, twin.params)
            twin.set_gradients()
            twin.opt.step()
            twin.opt.zero_grad()
            same_bits(everything(twin.opt, twin.params), before)
            _counted(twin.opt, done)
            twin.spoilt = None
            twin.step()
            twin.check()
        params = copied(twin.params)
        other = here.sharded(list(params.items()), nonfinite="skip")
        other.load_state_dict(twin.opt.full_optimizer_state_dict())
        _counted(other, 3)
        same_bits(everything(other, params), everything(twin.opt, twin.params))


@contextmanager
def _last_sum_fails(calls: list[int]) -> Iterator[None]:
    """``calls``: how many all-reduces a step makes; none fails where that is not known yet."""
    all_reduce, made = dist.all_reduce, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        if calls and made == calls[-1]:
            raise RuntimeError(WHY)
        return all_reduce(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        yield
    calls.append(made)


def step_that_failed_half_way(here: Here) -> None:
    """In the trust ratio, or in the last sum over ranks."""
    for dtype, where in product((torch.float32, half(here.impl)), ("ratio", "sum")):
        twin = here.twin(dtype, max_grad_norm=1.0)
        twin.step(steps=2)
        calls: list[int] = []
        with _last_sum_fails(calls):
            twin.step()
        if where == "sum" and here.world == 1:
            continue
        saved = twin.opt.full_optimizer_state_dict()
        weights = {n: p.detach().clone() for n, p in twin.params.items()}
        twin.set_gradients()
        fails = _last_sum_fails(calls) if where == "sum" else failing_once(here.impl)
        with fails, pytest.raises(RuntimeError, match=WHY):
            twin.opt.step()
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"(?i)\bload\b"):
                twin.opt.step()
        same_bits({n: p.detach() for n, p in twin.params.items()}, weights)
        twin.opt.zero_grad()
        twin.opt.load_state_dict(saved)
        twin.step(steps=2)
        twin.check()


def norms(here: Here) -> None:
    """Of averaged gradients and whole tensors, the same on all ranks."""
    clips = (None, 0.3)
    for dtype, stage, clip in product((torch.float32, half(here.impl)), (1, 2), clips):
        twin = here.twin(dtype, stage, max_grad_norm=clip)
        for absent in ("", "", "bd", ""):
            twin.step(absent=absent)
            check_norms(twin)
            here.the_same([float(twin.opt.grad_norm())])
        twin.step(absent=twin.params)
        assert float(twin.opt.grad_norm()) == 0.0
        check_norms(twin)
        assert all(ratio.isnan() for ratio in twin.opt.trust_ratios().values())
        twin.step()
        check_norms(twin)


CASES: list[Callable[[Here], None]] = [
    reset,
    moved_between_groups,
    trust_ratios_when_moved,
    another_set_of_params,
    written_params,
    resumed,
    invalid_options,
    another_optimizer_s_state,
    bad_gradient_on_one_rank,
    step_that_failed_half_way,
    norms,
]


def _run_all(rank: int, _: int) -> dict[tuple[str, int], str | None]:
    """{(case, number of ranks): what went wrong}."""
    found: dict[tuple[str, int], str | None] = {}
    for case, world in product(CASES, (1, 2)):
        group = dist.new_group(list(range(world)), timeout=timedelta(seconds=15))
        if rank < world:
            try:
                case(Here("foreach", rank, world, group))
                found[case.__name__, world] = None
            except BaseException:  # pytest.fail's among them
                found[case.__name__, world] = traceback.format_exc()
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(2, tmp_path_factory.mktemp("ranks"), _run_all, timeout=280.0)


@pytest.mark.xdist_group("edits_sharded")
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_between_steps(outcomes: list[Any], case: str, world: int) -> None:
    wrong = [outcome[case, world] for outcome in outcomes[:world]]
    assert not any(wrong), "\n".join(f"rank {i}: {text}" for i, text in enumerate(wrong))
