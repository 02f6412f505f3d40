"""The rules: each a page of equations beside its paper, run by every backend as it stands."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any, Final

from .adagrad import ADAGRAD, LAMB_ADAGRAD
from .adamh import ADAMH
from .adamw import ADAMW
from .lamb import LAMB, LAMB_OUTSIDE
from .lans import LANS
from .lars import LARS, LARS_OPTAX
from .rule import EARLY, Rule
from .stable_adamw import STABLE_ADAMW

__all__ = ["EARLY", "OPTIONS", "RULES", "STATES", "Rule", "of"]

RULES: Final[dict[str, Rule]] = {
    rule.name: rule
    for rule in (
        LAMB,
        LAMB_OUTSIDE,
        LAMB_ADAGRAD,
        LANS,
        LARS,
        LARS_OPTAX,
        ADAMH,
        STABLE_ADAMW,
        ADAMW,
        ADAGRAD,
    )
}
_ALL = [*RULES.values(), *(r.amsgrad for r in RULES.values() if r.amsgrad is not None)]
#: Names of the states that some rule has, each once.
STATES: Final = tuple(dict.fromkeys(chain.from_iterable(rule.states for rule in _ALL)))
#: Names of the options that some rule has.
OPTIONS: Final = tuple(dict.fromkeys(chain.from_iterable(rule.options for rule in _ALL)))


def of(group: Mapping[str, Any]) -> Rule:
    """The rule of a parameter group; LAMB where it names none."""
    rule = RULES[group.get("rule", "lamb")]
    return rule.amsgrad if group.get("amsgrad") and rule.amsgrad is not None else rule
