"""Options and state dicts of other programs' LAMB and of torch's AdamW, in the terms of this one.

Names and layouts as in apex ``FusedLAMB``, timm 1.0 ``Lamb``, DeepSpeed ``FusedLamb`` and torch
2.13 ``AdamW``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from . import options, rules

#: Constructor arguments of other programs, and what to write instead.
_ARGUMENTS = {
    "use_nvlamb": 'adapt="all" (True) or "decayed" (False)',
    "always_adapt": 'adapt="all" (True) or "decayed" (False)',
    "adam_w_mode": "decoupled=",
    "decoupled_decay": 'rule="lamb_outside" with decay_first=True',
    "max_coeff": "trust_clip=(min_coeff, max_coeff)",
    "min_coeff": "trust_clip=(min_coeff, max_coeff)",
    "set_grad_none": "zero_grad(set_to_none=)",
    "max_norm": "max_grad_norm=",
    "clip_grad_norm": "max_grad_norm=",
    "eps_inside_sqrt": "eps=, which is added outside of the root",
    "caution": "not supported, and left out",
    "wd": "weight_decay=",
    "learning_rate": "lr=",
}
#: Options under which another program computes something that this package does not.
_UNSUPPORTED = ("caution", "corrected_weight_decay")


def refuse_unknown(owner: str, unknown: Iterable[str], known: Sequence[str]) -> None:
    """Raise ``TypeError`` naming arguments that are no options, and what was meant by each."""
    hints = []
    for name in sorted(unknown):
        near = get_close_matches(name, known, n=3, cutoff=0.5)
        if name in _ARGUMENTS:
            hints.append(f"{name} is here {_ARGUMENTS[name]}")
        elif near:
            hints.append(f"for {name}, did you mean {', '.join(near)}?")
    if unknown:
        names = ", ".join(sorted(unknown))
        raise TypeError("; ".join([f"{owner} has no option {names}", *hints]))


def translated(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved param group with the options of other programs under their names here.

    Raises ``ValueError`` naming an option that has no equal here.
    """
    for name in _UNSUPPORTED:
        if group.get(name):
            raise ValueError(f"the state dict was saved with {name}={group[name]!r}: not supported")
    new = dict(group)
    if isinstance(new.get("trust_clip"), bool):
        new["trust_clip"] = (0.0, 1.0) if new["trust_clip"] else None
    # DeepSpeed, whose defaults these are; in a dict of this package they were left behind
    if {"min_coeff", "max_coeff"} & new.keys() and "rule" not in new:
        new["trust_clip"] = (new.pop("min_coeff", 0.01), new.pop("max_coeff", 10.0))
    if isinstance(new.get("bias_correction"), int):
        new["bias_correction"] = bool(new["bias_correction"])
    if new.pop("decoupled_decay", False):
        new.update(rule="lamb_outside", decay_first=True)
    for name in ("always_adapt", "use_nvlamb"):
        if name in new:
            new["adapt"] = "all" if new.pop(name) else "decayed"
    return new


def understood(
    state_dict: Mapping[str, Any], own_groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A state dict as this package writes it: options that it lacks are the optimizer's own.

    So are the formats: loaded state is converted into them.
    apex and timm count steps by group; here every param has its own count.
    """
    state, groups = dict(state_dict["state"]), []
    for i, saved in enumerate(state_dict["param_groups"]):
        own = options.owned(own_groups[i]) if i < len(own_groups) else {}
        group = {**own, **translated(saved), **options.formats(own)}
        rule = options.rule_named(group.get("rule", "lamb"))
        # torch's Adam and AdamW
        decoupled = None if "rule" in saved else group.pop("decoupled_weight_decay", None)
        if decoupled is not None and saved.get("weight_decay"):
            if options.reads(rule, "decoupled"):
                group["decoupled"] = bool(decoupled)
            elif not decoupled:
                raise ValueError(
                    f"the state dict was saved with L2 decay ({saved['weight_decay']}), which rule "
                    f"{rule.name!r} has not: set its weight_decay to 0 first"
                )
        if "betas" in group and not options.reads(rule, "betas"):
            group["betas"] = options.neutral("betas")  # a schedule may have cycled them
        step = group.get("step")
        if isinstance(step, (int, float, Tensor)):
            for key in group["params"]:
                if key in state and "step" not in state[key]:
                    state[key] = {**state[key], "step": step}
        if "rule" not in saved:
            # Before a first step other programs hold what a first step here begins with.
            for key in group["params"]:
                if key in state and float(state[key].get("step", 1)) == 0:
                    del state[key]
        groups.append(group)
    return {**state_dict, "state": state, "param_groups": groups}


def refuse_other_states(
    saved: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Raise ``ValueError`` naming a saved state that is not what the rule here has.

    A dict without a rule is another program's: the names of its states decide.
    """
    for group in saved["param_groups"]:
        options.rule_named(group.get("rule", "lamb"))
    theirs = [(key, group) for group in saved["param_groups"] for key in group["params"]]
    own = [rules.of(group) for group in groups for _ in group["params"]]
    for (key, group), rule, name in zip(theirs, own, names):
        made_for = rules.of(group) if "rule" in group else rule
        for state in saved["state"].get(key, ()):
            if state in rules.STATES and (
                state not in rule.states or made_for.states != rule.states
            ):
                raise ValueError(
                    f"the saved {state} of {name} is of rule {group.get('rule', 'unknown')!r} "
                    f"(amsgrad={group.get('amsgrad', False)}, {made_for.states.get(state)}); here "
                    f"rule {rule.name!r} has {dict(rule.states)}"
                )
