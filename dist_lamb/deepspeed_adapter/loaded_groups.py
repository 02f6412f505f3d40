"""Param groups after DeepSpeed, or another optimizer's checkpoint, has changed them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

#: Entry of a param group: the lr of all groups. DeepSpeed's universal loader at ZeRO-3 gives all
#: groups what it finds in the first one.
ALL_LRS = "group_lrs"


def restore_groups(
    groups: Sequence[dict[str, Any]],
    starts: Sequence[int],
    options_of: Mapping[int, Mapping[str, Any]],
) -> None:
    """Each group is what it was, whatever was loaded: another optimizer's groups have no number
    here, and DeepSpeed's universal loader at ZeRO-3 gives all groups the options of the first, so
    that a group of biases would start to decay.

    Args:
        groups: of the optimizer as they are; all, where one has no number.
        starts: by group, the first of its params; and their end.
        options_of: by group, options as last seen.
    """
    found = [group.get("group_index") for group in groups]
    if None not in found and len(set(found)) == len(found):
        return
    numbers = list(range(len(starts) - 1))
    if len(groups) < len(numbers):  # DeepSpeed drops groups without params
        numbers = [i for i, (lo, hi) in enumerate(pairwise(starts)) if lo < hi]
    for i, group in zip(numbers, groups, strict=True):
        if group.get("group_index", i) != i:
            # A schedule goes on from the lrs that were saved.
            saved = group.get(ALL_LRS, ())
            known = len(saved) == len(options_of)
            lr = saved[i] if known else group["lr"]
            if not known and options_of[i]["lr"] != lr:
                warnings.warn(
                    f"DeepSpeed loaded lr = {lr} of the first param group into all of them, "
                    f"which differed in it: set that of group {i} again",
                    stacklevel=4,
                )
            group.update({**options_of[i], "lr": lr})
            group.pop("param_steps", None)
        group["group_index"] = i
