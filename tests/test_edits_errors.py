"""Steps that fail half-way, params that share memory, and what else is refused or let through."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from edit_cases import (
    DEFAULTS,
    KINDS,
    MORE_KINDS,
    Twin,
    copied,
    dtypes,
    everything,
    gradient,
    lamb_twin,
    make,
    on,
    same_bits,
    value_of,
)
from torch import Tensor, nn

import dist_lamb.rules.lamb
from dist_lamb import Lamb, ShardedLamb

OPTIONS = {"lr": 0.1, "weight_decay": 0.05}
WHY = "no luck between moments and apply"


# --- an error in the middle of a step ------------------------------------------------------------


@contextmanager
def failing_once(impl: str) -> Iterator[None]:
    """The next step fails when moments have been updated and params have not."""
    failed: list[bool] = []

    def fail() -> None:
        if not failed:
            failed.append(True)
            raise RuntimeError(WHY)

    with pytest.MonkeyPatch.context() as patch:
        if impl == "triton":
            from triton.runtime.interpreter import GridExecutor

            launch = GridExecutor.__call__

            def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
                if "apply" in self.fn.__name__:
                    fail()
                return launch(self, *args, **kwargs)

            patch.setattr(GridExecutor, "__call__", launched)
        else:
            trust_ratio = dist_lamb.rules.lamb.trust_ratio

            def computed(*args: Any) -> Any:
                fail()
                return trust_ratio(*args)

            patch.setattr(dist_lamb.rules.lamb, "trust_ratio", computed)
        yield
    assert failed


def _half_done(impl: str, cls: Any) -> None:
    for dtype in dtypes(impl):
        for steps in (2,) if impl == "triton" else (0, 2):
            twin = lamb_twin(impl, dtype, cls=cls, max_grad_norm=1.0)
            twin.step(steps=steps)
            saved = copy.deepcopy(twin.opt.state_dict())
            weights = {n: p.detach().clone() for n, p in twin.params.items()}
            twin.set_gradients()
            with failing_once(impl), pytest.raises(RuntimeError, match=WHY):
                twin.opt.step()
            for _ in range(2):
                with pytest.raises(RuntimeError, match=r"(?i)\bload\b"):
                    twin.opt.step()
            same_bits({n: p.detach() for n, p in twin.params.items()}, weights)
            twin.opt.zero_grad()
            twin.opt.load_state_dict(saved)
            twin.step(steps=2)
            twin.check()


@pytest.mark.parametrize(("impl", "cls"), MORE_KINDS)
def test_a_step_that_failed_half_way(impl: str, cls: Any) -> None:
    """The moments are one step ahead of the params: training on from there would be wrong."""
    on(impl, _half_done, cls)


# --- params that share memory --------------------------------------------------------------------


def _overlapping(how: str) -> list[tuple[str, Tensor]]:
    base = value_of("base", (4, 6))
    if how == "expanded":
        return [("left", nn.Parameter(torch.zeros(1, 4).expand(3, 4)))]
    if how == "windows":
        return [("left", nn.Parameter(torch.zeros(9).as_strided((4, 3), (2, 1))))]
    if how == "ranges":
        pair = base.view(-1)[:14], base.view(-1)[13:]
    elif how == "the same":
        pair = base, base
    elif how == "one inside the other":
        pair = base, base[2, 3:5]
    else:
        pair = base[:, :4], base[:, 3:]
    return [("left", nn.Parameter(pair[0])), ("right", nn.Parameter(pair[1]))]


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize(
    "how", ["expanded", "windows", "ranges", "the same", "one inside the other", "columns"]
)
def test_overlapping_params(cls: Any, how: str) -> None:
    other = ("other", nn.Parameter(torch.ones(3)))
    named = _overlapping(how)
    told = "left" if len(named) == 1 else "(?s)left.*right|right.*left"
    with pytest.raises(ValueError, match=told):
        cls([other, *named])
    with pytest.raises(ValueError, match=told):
        cls([{"params": [other, named[0]]}, *({"params": [pair]} for pair in named[1:])])
    # added later, within a group and against a param of an earlier group
    for steps in (0, 3):
        named, twin = _overlapping(how), lamb_twin("foreach", cls=cls)
        if len(named) == 2 and steps == 0:
            twin.opt.add_param_group({"params": named[:1], **OPTIONS})
            twin.params["left"] = named[0][1]
            twin.plain.add(*named[0], **OPTIONS)
        twin.step(steps=steps)
        groups = len(twin.opt.param_groups)
        before = everything(twin.opt, twin.params)
        with pytest.raises(ValueError, match=told):
            twin.opt.add_param_group({"params": named[steps == 0 and len(named) == 2 :]})
        assert len(twin.opt.param_groups) == groups
        assert sum(len(group["params"]) for group in twin.opt.param_groups) == len(twin.params)
        same_bits(everything(twin.opt, twin.params), before)
        twin.step(steps=2)
        twin.check()


def _disjoint(impl: str, cls: Any) -> None:
    for how in ("columns", "rows", "empty"):
        base = value_of("base", (6, 8))
        start = base.clone()
        if how == "columns":
            views = [base[:, :3], base[:, 3:7]]
        elif how == "rows":
            views = [base[::2, :7], base[1::2, :7]]
        else:
            views = [base[:, :7], torch.zeros(0, 3), torch.zeros(0, 3)]
        params: dict[str, Tensor] = {f"v{i}": nn.Parameter(v) for i, v in enumerate(views)}
        twin = Twin(params, cls(list(params.items()), impl=impl, **OPTIONS), **OPTIONS)
        for _ in range(4):
            twin.step()
            twin.check([n for n, p in params.items() if p.numel()])
        assert torch.equal(base[:, 7], start[:, 7])


@pytest.mark.parametrize(("impl", "cls"), KINDS)
def test_interleaved_params(impl: str, cls: Any) -> None:
    """Views of one base that have no element in common are legal, and so they were."""
    on(impl, _disjoint, cls)


# --- a module ------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(7, 4)
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.emb.weight
        self.fc.bias.requires_grad_(False)


@pytest.mark.parametrize("impl", ["reference", "foreach"])
def test_a_module(impl: str) -> None:
    """As its named_parameters(): a tied param comes once, and is stepped once."""
    models = [Tied(), Tied()]
    opt = Lamb(models[0], impl=impl, **OPTIONS)  # type: ignore[arg-type]
    same = Lamb(models[1].named_parameters(), impl=impl, **OPTIONS)
    names = [n for n, _ in models[0].named_parameters()]
    assert [group["param_names"] for group in opt.param_groups] == [names]
    assert all(a is b for a, b in zip(opt.param_groups[0]["params"], models[0].parameters()))
    trained = {n: p for n, p in models[0].named_parameters() if p.requires_grad}
    twin = Twin(trained, opt, **OPTIONS)
    for t in range(4):
        for n, p in models[1].named_parameters():
            p.grad = gradient(n, p, t) if p.requires_grad else None
        twin.step()
        same.step()
        twin.check()
    params = [dict(model.named_parameters()) for model in models]
    same_bits(everything(opt, params[0]), everything(same, params[1]))
    assert opt.trust_ratios().keys() == same.trust_ratios().keys() == set(names)


# --- options that do not exist -------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_gradnorm": 1.0}, "max_grad_norm"),
        ({"weight_decays": 0.1}, r"\bweight_decay\b"),
        ({"trustclip": None}, "trust_clip"),
        ({"use_nvlamb": True}, "adapt"),
        ({"always_adapt": True}, r"\badapt\b"),
        ({"adam_w_mode": True}, "decoupled"),
        ({"max_coeff": 10.0}, "trust_clip"),
        ({"min_coeff": 0.01}, "trust_clip"),
        ({"set_grad_none": True}, r"zero_grad\(.*set_to_none"),
    ],
)
def test_unknown_options(cls: Any, given: dict[str, Any], told: str) -> None:
    """The error has the name of the option that was meant, here or in another package."""
    params = make()
    with pytest.raises(TypeError, match=told) as error:
        cls(list(params.items()), **given)
    assert next(iter(given)) in str(error.value)


def test_options_are_in_the_signature() -> None:
    found = inspect.signature(Lamb).parameters
    own = {"nonfinite": "propagate", "impl": "auto", "maximize": False, "foreach": None}
    for name, value in {**DEFAULTS, **own, "fused": None, "capturable": False}.items():
        assert found[name].default == value, name


# --- other keys of a state -----------------------------------------------------------------------


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("impl", ["reference", "foreach"])
def test_other_keys_of_a_loaded_state(cls: Any, impl: str) -> None:
    """torch.optim.Optimizer hands them on; training is as it would be without."""
    twin = lamb_twin(impl, cls=cls)
    twin.step(steps=3)
    saved = copy.deepcopy(twin.opt.state_dict())
    extra = {"extra": {"a": 1}, "number": 5, "like a param's": {"exp_avg": torch.ones(2)}}
    saved["state"].update(extra)
    params = copied(twin.params)
    other = Twin(params, cls(list(params.items()), impl=impl, **OPTIONS))
    other.plain, other.t = twin.plain, twin.t
    other.opt.load_state_dict(saved)
    for done in range(4):
        assert other.opt.state["extra"] == {"a": 1}
        assert other.opt.state["number"] == 5
        assert torch.equal(other.opt.state["like a param's"]["exp_avg"], torch.ones(2))
        again = other.opt.state_dict()["state"]
        assert again["extra"] == {"a": 1}
        assert again["number"] == 5
        assert [int(again[i]["step"]) for i in range(len(params))] == [3 + done] * len(params)
        other.step()
        other.check()


# --- gradients with the negative bit -------------------------------------------------------------


def _negative(impl: str, cls: Any) -> None:
    """The memory of such a tensor holds what it is not: its negative."""
    for clip in (0.5,) if impl == "triton" else (None, 0.5):
        twin = lamb_twin(impl, cls=cls, max_grad_norm=clip)
        for t in range(6):
            mean = twin.set_gradients()
            for n, p in twin.params.items():
                # all at once from the beginning; one after a few plain ones; and back
                if t in (0, 1, 5) or (t == 4 and n == "c"):
                    p.grad = _with_negative_bit(mean[n], of_complex=t == 1 or n == "e")
            twin.opt.step()
            twin.plain.step(mean)
            twin.check()


def _with_negative_bit(g: Tensor, of_complex: bool) -> Tensor:
    """The same values, at strides of its own or at those of ``g``."""
    if of_complex:
        g = torch.complex(torch.full_like(g, 3.0), -g).conj().imag
    else:
        g = torch._neg_view(-g)
    assert g.is_neg()
    return g


@pytest.mark.parametrize(("impl", "cls"), KINDS)
def test_gradients_with_the_negative_bit(impl: str, cls: Any) -> None:
    on(impl, _negative, cls)


def test_groups_that_lack_options_are_refused() -> None:
    """Groups put in place by hand, as ``opt.param_groups = [...]`` allows."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    opt = Lamb([p], impl="foreach")
    opt.param_groups = [{"params": [p], "lr": 0.1}]
    with pytest.raises(ValueError, match="lacks the option betas, which rule 'lamb' has; put it"):
        opt.step()
    assert torch.equal(p.detach(), torch.ones(3))
