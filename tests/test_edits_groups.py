"""Groups that are edited in place, options that become invalid, and other optimizers' options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from edit_cases import (
    BACKENDS,
    DEFAULTS,
    KINDS,
    Plain,
    Twin,
    close,
    copied,
    everything,
    gradient,
    lamb_twin,
    make,
    on,
    same_bits,
    value_of,
)
from torch import Tensor, nn

from dist_lamb import Lamb, ShardedLamb

NAN = float("nan")


# --- params that come, go and change places ------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    {"lr": 0.1, "weight_decay": 0.05},
    {"lr": 0.03, "weight_decay": 0.0, "trust_clip": (0.01, 0.5)},
    {"lr": 0.0, "weight_decay": 0.3},
]
MEMBERS = ["abc", "de", "f"]


def _newcomer(twin: Twin, group: int) -> Tensor:
    p = twin.params["n"] = nn.Parameter(value_of("n", (4, 3)))
    twin.plain.add("n", p, **OPTIONS[group])
    return p


def _to_the_frozen_group(twin: Twin, groups: list[Any]) -> None:
    """The order of all params stays as it was."""
    groups[2]["params"].insert(0, groups[1]["params"].pop())
    twin.plain.options["e"] = {**DEFAULTS, **OPTIONS[2]}


def _first_to_the_next_group(twin: Twin, groups: list[Any]) -> None:
    groups[1]["params"].append(groups[0]["params"].pop(0))
    twin.plain.options["a"] = {**DEFAULTS, **OPTIONS[1]}


def _swapped(twin: Twin, groups: list[Any]) -> None:
    first, second = groups[0]["params"], groups[1]["params"]
    first[1], second[0] = second[0], first[1]
    options = twin.plain.options
    options["b"], options["d"] = options["d"], options["b"]


def _reversed(twin: Twin, groups: list[Any]) -> None:
    groups[0]["params"].reverse()


def _groups_reversed(twin: Twin, groups: list[Any]) -> None:
    groups.reverse()


def _inserted_and_dropped(twin: Twin, groups: list[Any]) -> None:
    groups[0]["params"].insert(0, _newcomer(twin, 0))
    assert groups[0]["params"].pop() is twin.params.pop("c")


def _first_deleted(twin: Twin, groups: list[Any]) -> None:
    del groups[0]["params"][0]
    del twin.params["a"]


def _appended(twin: Twin, groups: list[Any]) -> None:
    groups[0]["params"].append(_newcomer(twin, 0))


def _group_dropped(twin: Twin, groups: list[Any]) -> None:
    twin.opt.param_groups = twin.opt.param_groups[1:]
    for n in MEMBERS[0]:
        del twin.params[n]


EDITS = [
    _to_the_frozen_group,
    _first_to_the_next_group,
    _reversed,
    _groups_reversed,
    _inserted_and_dropped,
    _swapped,
    _first_deleted,
    _group_dropped,
    _appended,
]


def _edited(impl: str, edit: Any, ratios: bool) -> None:
    params = make()
    groups = [
        {"params": [(n, params[n]) for n in names], **options}
        for names, options in zip(MEMBERS, OPTIONS)
    ]
    twin = Twin(params, Lamb(groups, impl=impl))
    for names, options in zip(MEMBERS, OPTIONS):
        for n in names:
            twin.plain.options[n].update(options)
    twin.step(absent="cd")  # which count one step less from here on
    twin.step(steps=2)
    edit(twin, twin.opt.param_groups)
    gone = {n: p for n, p in params.items() if n not in twin.params}
    kept = {n: p.detach().clone() for n, p in gone.items()}
    fixed = {n: params[n].detach().clone() for n in "ef" if n in twin.params}
    for t in range(2):
        for p in gone.values():
            p.grad = torch.ones_like(p)
        twin.step(absent="b" if t else "")
        if ratios:
            _ratios_are(twin)
        else:
            twin.check()
    same_bits({n: p.detach() for n, p in gone.items()}, kept)
    if edit is _to_the_frozen_group:
        same_bits({n: params[n].detach() for n in fixed}, fixed)


def _ratios_are(twin: Twin) -> None:
    """By the names the params were given; a newcomer's name is not said."""
    found = dict(twin.opt.trust_ratios())
    assert len(found) == len(twin.params), sorted(found)
    for n in twin.params:
        if n != "n":
            close(f"trust ratio of {n}", found.pop(n), twin.plain.rho[n], 1e-4)
    for ratio in found.values():
        close("trust ratio of the newcomer", ratio, twin.plain.rho["n"], 1e-4)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("edit", EDITS)
def test_groups_edited_in_place(impl: str, edit: Any) -> None:
    """Every param has the options of the group that it is in now, and its own counter."""
    if impl == "triton" and edit not in EDITS[::4]:
        pytest.skip("the interpreter is slow")
    on(impl, _edited, edit, False)


@pytest.mark.parametrize("impl", BACKENDS)
@pytest.mark.parametrize("edit", EDITS)
def test_trust_ratios_of_edited_groups(impl: str, edit: Any) -> None:
    """Under the name that a param was given, its own."""
    if impl == "triton" and edit is not _reversed:
        pytest.skip("the interpreter is slow")
    on(impl, _edited, edit, True)


# --- options that become invalid -----------------------------------------------------------------

INVALID: list[tuple[str, Any, str]] = [
    ("lr", NAN, "lr|learning rate"),
    ("lr", torch.tensor(NAN), "lr|learning rate"),
    ("lr", -0.1, "lr|learning rate"),
    ("betas", (2.0, 0.9), "beta"),
    ("betas", 0.9, "beta"),
    ("eps", "x", "eps"),
    ("weight_decay", -1.0, "weight_decay"),
    ("max_grad_norm", NAN, "max_grad_norm"),
    ("adapt", "some", "adapt"),
    ("trust_clip", (1.0, 0.0), "trust_clip"),
    ("phi", 3.0, "phi"),
    ("decoupled", None, "decoupled"),
]


def _invalid(impl: str, cls: Any) -> None:
    twin = lamb_twin(impl, cls=cls, shapes={"a": (6, 7), "b": (9,)})
    twin.step(steps=2)
    for option, value, name in INVALID:
        before = everything(twin.opt, twin.params)
        group = twin.opt.param_groups[0]
        right = group[option]
        for _ in range(2):
            group[option] = value
            for n, p in twin.params.items():
                p.grad = gradient(n, p, 77)
            with pytest.raises(ValueError, match=name):
                twin.opt.step()
            same_bits(everything(twin.opt, twin.params), before)
        group[option] = right
        twin.opt.zero_grad()
        twin.step()
        twin.check()


@pytest.mark.parametrize(("impl", "cls"), KINDS)
def test_options_that_become_invalid(impl: str, cls: Any) -> None:
    on(impl, _invalid, cls)


# --- state dicts of other optimizers -------------------------------------------------------------

OWN = {"max_grad_norm": 0.5, "adapt": "decayed", "trust_clip": (0.0, 0.7), "grad_averaging": False}
LOADED = {"lr": 0.05, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.2}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # what is in the group; what must be the options then, beside LOADED
    "apex": ({"bias_correction": False, "grad_averaging": True, "max_grad_norm": 2.0}, {}),
    "timm": (
        {
            "bias_correction": True,
            "grad_averaging": True,
            "max_grad_norm": 2.0,
            "trust_clip": True,
            "always_adapt": True,
            "caution": False,
        },
        {"trust_clip": (0.0, 1.0), "adapt": "all"},
    ),
    "timm, plain": (
        {
            "bias_correction": True,
            "grad_averaging": True,
            "max_grad_norm": 2.0,
            "trust_clip": False,
            "always_adapt": False,
            "caution": False,
        },
        {"trust_clip": None, "adapt": "decayed"},
    ),
    "DeepSpeed": (
        {"bias_correction": True, "max_grad_norm": 0.0, "max_coeff": 0.6, "min_coeff": 0.01},
        {"trust_clip": (0.01, 0.6)},
    ),
    "Adam": ({"decoupled_weight_decay": False}, {"decoupled": False}),
}


def _adamw(params: dict[str, Tensor], **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    others = copied(params)
    adamw = torch.optim.AdamW(others.values(), **LOADED, **more)
    for t in range(3):
        for n, p in others.items():
            p.grad = gradient(n, p, t)
        adamw.step()
    return copy.deepcopy(adamw.state_dict()), {}


def _stepped_by_group(
    layout: str, params: dict[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    inside, meant = LAYOUTS[layout]
    state = {
        i: {
            "exp_avg": value_of(n, tuple(p.shape), 3),
            "exp_avg_sq": value_of(n, tuple(p.shape), 4).square(),
        }
        for i, (n, p) in enumerate(params.items())
    }
    group = {**LOADED, **inside, "step": 3, "params": list(range(len(params)))}
    same = {n: v for n, v in inside.items() if n in DEFAULTS}
    return {"state": state, "param_groups": [group]}, {**same, **meant}


def _foreign(impl: str, cls: Any, layout: str) -> None:
    for steps_before in (2,) if impl == "triton" else (0, 3):
        twin = lamb_twin(impl, cls=cls, **OWN)
        twin.step(steps=steps_before)
        if layout == "AdamW":
            saved, meant = _adamw(twin.params)
        else:
            saved, meant = _stepped_by_group(layout, twin.params)
        given = copy.deepcopy(saved)
        twin.opt.load_state_dict(saved)
        assert saved["param_groups"] == given["param_groups"]
        options = {**DEFAULTS, **OWN, **LOADED, **meant}
        group = twin.opt.param_groups[0]
        for name, value in options.items():
            assert group[name] == value, (name, group[name], value)
        _goes_on(twin, saved["state"], options)
        # what is saved now is no foreign dict: nothing of it may be taken for one again
        params = copied(twin.params)
        again = Twin(params, cls(list(params.items()), impl=impl))
        again.opt.load_state_dict(copy.deepcopy(twin.opt.state_dict()))
        again.plain, again.t = twin.plain, twin.t
        again.check()
        again.step()
        again.check()


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
def test_entries_that_another_program_left(cls: Any) -> None:
    """Of a dict of this package its own options count: earlier versions kept others' entries."""
    p = nn.Parameter(torch.ones(3, 2))
    opt = cls([("p", p)], lr=0.1, trust_clip=(0.0, 1.0))
    saved = copy.deepcopy(opt.state_dict())
    left = {"decoupled_weight_decay": False, "min_coeff": 0.01, "max_coeff": 10.0}
    saved["param_groups"][0].update(left)
    opt.load_state_dict(saved)
    group = opt.param_groups[0]
    assert (group["decoupled"], tuple(group["trust_clip"])) == (True, (0.0, 1.0))
    adamw = torch.optim.AdamW([p], lr=0.1)
    l2 = cls([("p", p)], lr=0.1, decoupled=False)
    l2.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert l2.param_groups[0]["decoupled"]
    more = copy.deepcopy(torch.optim.Adam([{"params": [p]}], weight_decay=0.1).state_dict())
    more["param_groups"].append({"params": [1], "decoupled_weight_decay": False})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        opt.load_state_dict(more)
    no_l2 = cls([("p", p)], lr=0.1, rule="lans")
    with pytest.raises(ValueError, match=r"was saved with L2 decay \(0.1\), which rule 'lans'"):
        no_l2.load_state_dict(copy.deepcopy(torch.optim.Adam([p], weight_decay=0.1).state_dict()))


def _goes_on(twin: Twin, state: dict[Any, Any], options: dict[str, Any]) -> None:
    twin.plain = Plain(twin.params, **options)
    for i, n in enumerate(twin.params):
        twin.plain.m[n] = state[i]["exp_avg"].double()
        twin.plain.v[n] = state[i]["exp_avg_sq"].double()
        twin.plain.t[n] = 3
    twin.t = 10
    twin.step(steps=2)
    twin.check()


@pytest.mark.parametrize(("impl", "cls"), KINDS)
@pytest.mark.parametrize("layout", ["AdamW", *LAYOUTS])
def test_other_optimizers_state_dicts(impl: str, cls: Any, layout: str) -> None:
    """Their lr, betas, eps and weight_decay count; what they know nothing of stays as it was."""
    if impl == "triton" and layout != "timm":
        pytest.skip("the interpreter is slow")
    on(impl, _foreign, cls, layout)


@pytest.mark.parametrize("cls", [Lamb, ShardedLamb])
@pytest.mark.parametrize("what", ["amsgrad", "caution"])
def test_other_rules_are_refused(cls: Any, what: str) -> None:
    twin = lamb_twin("foreach", cls=cls, **OWN)
    twin.step(steps=3)
    if what == "amsgrad":
        saved, _ = _adamw(twin.params, amsgrad=True)
    else:
        saved, _ = _stepped_by_group("timm", twin.params)
        saved["param_groups"][0]["caution"] = True
    before = everything(twin.opt, twin.params)
    groups = [{**g, "params": list(g["params"])} for g in twin.opt.param_groups]
    with pytest.raises(ValueError, match=what):
        twin.opt.load_state_dict(saved)
    same_bits(everything(twin.opt, twin.params), before)
    for group, was in zip(twin.opt.param_groups, groups):
        assert {**group, "params": 0} == {**was, "params": 0}
        assert all(p is q for p, q in zip(group["params"], was["params"]))
    twin.step(steps=2)
    twin.check()
