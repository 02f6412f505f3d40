"""Parameter groups by name: what decays, and what the trust ratio applies to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

#: Regular expressions searched for in a param's name, or a predicate of (name, param).
Selector: TypeAlias = Sequence[str] | Callable[[str, Tensor], bool]


class ParamGroups(list[dict[str, Any]]):
    """Groups that remember the module they are of: ShardedLamb overlaps its forward."""

    module: nn.Module | None = None


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    weight_decay: float = 0.01,
    *,
    no_decay: Selector | None = None,
    no_adapt: Selector = (),
) -> ParamGroups:
    """Named groups for ``Lamb(param_groups(model), ...)``; empty ones are left out.

    Args:
        model: a module, or its ``named_parameters()``. Frozen params are left out; a tied param
            comes once.
        weight_decay: of everything but ``no_decay``.
        no_decay: params with weight decay 0. Default: tensors of fewer than two dims, which are
            the biases and normalisation weights.
        no_adapt: params with trust ratio 1, whatever their decay.

    Raises:
        ValueError: a pattern that matches no param (most often a typo) or is no regular expression,
            or no params at all. TypeError: params without names, or groups.
    """
    named = model.named_parameters() if isinstance(model, nn.Module) else _pairs(model)
    params = [(name, p) for name, p in named if p.requires_grad]
    if not params:
        raise ValueError("param_groups got no trainable params")
    lazy = [name for name, p in params if is_lazy(p)]
    if lazy:
        raise ValueError(
            f"param_groups cannot sort {lazy[0]}: it has no shape yet; run the model forward once"
        )
    plain = _selected("no_decay", no_decay, params)
    if no_decay is None:
        plain = {name for name, p in params if len(_logical_shape(p)) < 2}
    fixed = _selected("no_adapt", no_adapt, params)
    groups = ParamGroups()
    groups.module = model if isinstance(model, nn.Module) else None
    for decays in (True, False):
        for adapts in (True, False):
            chosen = [
                (n, p)
                for n, p in params
                if (n not in plain) == decays and (n not in fixed) == adapts
            ]
            if chosen:
                group: dict[str, Any] = {"params": chosen}
                group["weight_decay"] = weight_decay if decays else 0.0
                if not adapts:
                    # Only set where it differs: the optimizer's own default decides the rest.
                    group["adapt"] = False
                groups.append(group)
    return groups


def _pairs(given: Any) -> list[tuple[str, Tensor]]:
    """(name, param) pairs that are such: a [2, n] weight, for one, would unpack into two rows."""
    # a dict's keys, and a tensor's rows, are not what was given
    loose = isinstance(given, Iterable) and not isinstance(given, (Tensor, Mapping))
    entries = list(given) if loose else [given]
    for entry in entries:
        pair = isinstance(entry, (tuple, list)) and len(entry) == 2
        if pair and isinstance(entry[0], str) and isinstance(entry[1], Tensor):
            continue
        got = "None" if entry is None else type(entry).__name__
        if loose and isinstance(entry, Mapping):
            got = "groups; give them to the optimizer as they are"
        raise TypeError(f"param_groups takes a module, or its named_parameters(); it got {got}")
    return entries


def _logical_shape(p: Tensor) -> tuple[int, ...]:
    # Under DeepSpeed's zero.Init a param is an empty vector and carries its shape beside it.
    return tuple(getattr(p, "ds_shape", p.shape))


def _selected(
    what: str, selector: Selector | None, params: Sequence[tuple[str, Tensor]]
) -> set[str]:
    if selector is None:
        return set()
    if callable(selector):
        return {name for name, p in params if selector(name, p)}
    if isinstance(selector, (str, re.Pattern)):
        kind = "string" if isinstance(selector, str) else "pattern"
        raise ValueError(f"{what} takes a sequence of patterns, got the {kind} {selector!r}")
    found: set[str] = set()
    for pattern in selector:
        try:
            matching = {name for name, _ in params if re.search(pattern, name)}
        except re.error as problem:
            raise ValueError(
                f"{what}: pattern {pattern!r} is no regular expression: {problem}"
            ) from None
        if not matching:
            raise ValueError(f"{what}: pattern {pattern!r} matches no param")
        found |= matching
    return found


def without_decay_1d(params: Iterable[Any]) -> list[dict[str, Any]]:
    """Params, ``(name, param)`` pairs or groups of either, as groups: what has fewer than two dims
    in one with weight decay 0, but for groups that have a ``weight_decay`` of their own."""
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    made: list[dict[str, Any]] = []
    for group in groups:
        if "weight_decay" in group:
            made.append(group)
            continue
        of = group["params"]
        members = [of] if isinstance(of, Tensor) else list(of)
        flat = [len(_logical_shape(m if isinstance(m, Tensor) else m[1])) < 2 for m in members]
        decayed = [m for m, is_flat in zip(members, flat) if not is_flat]
        plain = [m for m, is_flat in zip(members, flat) if is_flat]
        if decayed:
            made.append({**group, "params": decayed})
        if plain:
            made.append({**group, "params": plain, "weight_decay": 0.0})
    return made
