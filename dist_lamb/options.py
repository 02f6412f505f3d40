"""The options: their names, defaults, checks and presets. Each rule says which of them it reads.

Every option lives in a torch parameter group, so it may differ between groups, is saved in
``state_dict()`` and can be changed between steps.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

from torch import Tensor

from . import rules

Impl: TypeAlias = Literal["auto", "reference", "foreach", "compiled", "triton"]
Adapt: TypeAlias = Literal["all", "decayed"]
Nonfinite: TypeAlias = Literal["propagate", "skip"]
StateFormat: TypeAlias = Literal["float32", "bfloat16", "bfloat16-nearest"]
Master: TypeAlias = Literal["float32", "remainder"]

#: Options that every group has, with the defaults of arXiv 1904.00962 v5 (preset ``"v5"``). A rule
#: may have more: :attr:`dist_lamb.rules.Rule.options`.
RULE_DEFAULTS: Final[dict[str, Any]] = {
    "rule": "lamb",
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "weight_decay": 0.01,
    "grad_averaging": True,
    "bias_correction": True,
    "decoupled": True,
    "max_grad_norm": None,
    "adapt": "all",
    "trust_clip": None,
    "phi": None,
    "maximize": False,
    "nonfinite": "propagate",
    "amsgrad": False,
    "state_format": "float32",
    "master": "float32",
}
#: Those that say how states are stored: a state dict's do not replace an optimizer's own.
FORMATS: Final = ("state_format", "master")
#: Those that every rule reads.
_COMMON: Final = frozenset(("rule", "lr", "max_grad_norm", "maximize", "nonfinite", *FORMATS))
_BOOLS: Final = (
    "grad_averaging", "bias_correction", "decoupled", "maximize", "amsgrad", "nesterov", "larc",
    "decay_first",
)  # fmt: skip

#: torch.optim's implementation flags; they select ``impl`` and are kept in the groups because
#: trainers read them there.
TORCH_FLAGS: Final[dict[str, Any]] = {"foreach": None, "capturable": False, "fused": None}

_PRESETS: Final[dict[str, dict[str, Any]]] = {
    # The paper's ICLR version.
    "v5": {},
    # The paper's third arXiv version: no bias correction.
    "v3": {"bias_correction": False},
    # NVIDIA's NVLAMB: gradients clipped to global norm 1 first, every tensor adapted.
    "nvlamb": {"max_grad_norm": 1.0},
    # apex FusedLAMB's defaults: as NVLAMB, but only decayed tensors are adapted.
    "apex": {"max_grad_norm": 1.0, "adapt": "decayed"},
    # timm Lamb's defaults.
    "timm": {"max_grad_norm": 1.0, "adapt": "decayed"},
    # LAMBC: the trust ratio never above 1.
    "lambc": {"trust_clip": (0.0, 1.0)},
    # NVIDIA's largest MLPerf BERT run (v4.0, 3472 GPUs); biases and norm weights undecayed.
    "mlperf": {
        "max_grad_norm": 1.0,
        "adapt": "decayed",
        "lr": 3.6e-3,
        "betas": (0.75, 0.9),
        "weight_decay": 0.0166629,
    },
    # The authors' program (NVIDIA/apex PR 1362).
    "lans": {"rule": "lans"},
    # timm's Lars, and optax's.
    "lars": {"rule": "lars", "adapt": "decayed", "eps": 1e-8, "weight_decay": 0.0},
    "lars_optax": {"rule": "lars_optax", "eps": 0.0, "weight_decay": 0.0},
    # levanter's, for the weights of linear layers; all else goes into groups with rule="adamw".
    "adamh": {"rule": "adamh", "betas": (0.9, 0.95), "eps": 1e-8},
}


def preset(name: str) -> dict[str, Any]:
    """Options under which ``Lamb(params, **preset(name))`` computes what ``name`` names.

    ``"v5"`` (the default), ``"v3"``, ``"nvlamb"``, ``"apex"``, ``"timm"``, ``"lambc"``,
    ``"mlperf"``; other rules: ``"lans"``, ``"lars"``, ``"lars_optax"``, ``"adamh"``.
    NVIDIA's BERT recipes are ``preset("apex")`` with biases and normalisation weights in a
    ``weight_decay=0`` group, which :func:`dist_lamb.param_groups` makes.
    """
    if name not in _PRESETS:
        raise ValueError(f"Unknown preset: {name!r}; known: {', '.join(_PRESETS)}")
    return dict(_PRESETS[name])


def resolve_impl(impl: str, foreach: bool | None, fused: bool | None) -> str:
    """The ``impl`` meant by our argument and torch's ``foreach``/``fused`` flags together."""
    if impl not in get_args(Impl):
        raise ValueError(f"Invalid impl: {impl!r}; known: {', '.join(get_args(Impl))}")
    if foreach and fused:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if foreach:
        if impl not in ("auto", "foreach"):
            raise ValueError(f"foreach=True contradicts impl={impl!r}")
        return "foreach"
    # fused=True asks for the fastest fused code there is, which is what "auto" chooses;
    # False and None ask for nothing.
    return impl


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _check_range(name: str, value: object) -> None:
    ok = isinstance(value, (tuple, list)) and len(value) == 2 and all(map(_is_number, value))
    if not ok or not 0.0 <= value[0] <= value[1]:  # type: ignore[index]
        raise ValueError(
            f"Invalid {name} value: {value!r}; None or (lo, hi) with 0 <= lo <= hi expected"
        )


def neutral(name: str) -> Any:
    """What a shared option is in groups whose rule does not read it."""
    return 0.0 if name == "weight_decay" else RULE_DEFAULTS[name]


def _is_neutral(name: str, value: Any) -> bool:
    # A pair that went through JSON, or through torch's helpers, is a list.
    return bool((tuple(value) if isinstance(value, list) else value) == neutral(name))


def reads(rule: rules.Rule, name: str) -> bool:
    """Whether ``rule`` reads the option."""
    has_amsgrad = rules.RULES[rule.name].amsgrad is not None
    return name in _COMMON or name in rule.options or (name == "amsgrad" and has_amsgrad)


def rule_named(name: object) -> rules.Rule:
    if not isinstance(name, str) or name not in rules.RULES:
        raise ValueError(f"Unknown rule: {name!r}; known: {', '.join(rules.RULES)}")
    return rules.RULES[name]


def completed(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a new group: its own, then the optimizer's, as far as its rule reads them.

    Raises ``ValueError`` naming an option of the group that its rule does not have.
    """
    rule = rule_named(group.get("rule", defaults["rule"]))
    for name in (*rules.OPTIONS, "amsgrad"):
        if name not in group or reads(rule, name):
            continue
        if name not in RULE_DEFAULTS or not _is_neutral(name, group[name]):
            way_out = "make it 0 in this group" if name == "weight_decay" else "leave it out"
            raise ValueError(f"rule {rule.name!r} has no option {name}; {way_out}")
    own: dict[str, Any] = {}
    for name, value in {**rule.options, **RULE_DEFAULTS}.items():
        own[name] = defaults.get(name, value) if reads(rule, name) else neutral(name)
    return {**own, **group, "rule": rule.name}


def of_optimizer(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's ``defaults``: torch's schedulers cycle betas where these have any, and else
    the momentum."""
    rule = rule_named(defaults["rule"])
    kept = {n: v for n, v in defaults.items() if n != "betas" or reads(rule, n)}
    momentum = {n: v for n, v in rule.options.items() if n == "momentum"}
    return {**momentum, **kept}


def check_group(group: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` naming the first option of a parameter group that is not valid.

    The texts start as torch.optim's do (``Invalid learning rate: ...``).
    """
    rule = rule_named(group.get("rule", "lamb"))
    for name in (*RULE_DEFAULTS, *rule.options):
        if name not in group and name not in ("rule", "amsgrad"):  # they say what there is
            raise ValueError(
                f"A param group lacks the option {name}, which rule {rule.name!r} has; put it into "
                "the group (a new one gets it by add_param_group())"
            )
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
        # On a GPU the check would wait for the device.
        if lr.device.type == "cpu" and not 0.0 <= float(lr) < math.inf:
            raise ValueError(f"Invalid learning rate: {lr!r}")
    elif not _is_number(lr) or not 0.0 <= lr < math.inf:
        raise ValueError(f"Invalid learning rate: {lr!r}")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas!r}; a pair expected")
    for i, beta in enumerate(betas):
        if not _is_number(beta) or not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta!r}")
    for name in ("eps", "weight_decay"):
        if not _is_number(group[name]) or not 0.0 <= group[name] < math.inf:
            raise ValueError(f"Invalid {name} value: {group[name]!r}")
    for name in _BOOLS:
        if not isinstance(group.get(name, False), bool):
            raise ValueError(f"Invalid {name} value: {group[name]!r}; True or False expected")
    limit = group["max_grad_norm"]
    # 0 means off: clipping to norm 0, as apex and timm do, would erase every gradient.
    if limit is not None and (not _is_number(limit) or not limit >= 0.0):
        raise ValueError(f"Invalid max_grad_norm value: {limit!r}; None or a number >= 0 expected")
    adapt = group["adapt"]
    if not isinstance(adapt, bool) and adapt not in get_args(Adapt):
        raise ValueError(
            f"Invalid adapt value: {adapt!r}; 'all', 'decayed', True or False expected"
        )
    if group["nonfinite"] not in get_args(Nonfinite):
        raise ValueError(
            f"Invalid nonfinite value: {group['nonfinite']!r}; 'propagate' or 'skip' expected"
        )
    for name, known in (("state_format", StateFormat), ("master", Master)):
        if group[name] not in get_args(known):
            expected = ", ".join(map(repr, get_args(known)))
            raise ValueError(f"Invalid {name} value: {group[name]!r}; one of {expected} expected")
    for name in ("trust_clip", "phi"):
        if group[name] is not None:
            _check_range(name, group[name])
    for name in RULE_DEFAULTS:
        # torch's schedulers cycle betas in every group of an optimizer that has any.
        if name == "betas" or reads(rule, name) or name not in group:
            continue
        if not _is_neutral(name, group[name]):
            raise ValueError(f"rule {rule.name!r} has no option {name}, got {group[name]!r}")
    for name, value in rule.options.items():
        if isinstance(value, float) and not (_is_number(group[name]) and group[name] >= 0.0):
            raise ValueError(f"Invalid {name} value: {group[name]!r}")
    problem = rule.problem(group)
    if problem:
        raise ValueError(problem)


def owned(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options among a parameter group's entries."""
    names = (*RULE_DEFAULTS, *rules.OPTIONS, *TORCH_FLAGS)
    return {name: group[name] for name in dict.fromkeys(names) if name in group}


def formats(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say how states are stored, and change no equation."""
    return {name: group[name] for name in FORMATS if name in group}


def clips(group: Mapping[str, Any]) -> bool:
    """Whether this group's gradients are clipped by the global norm."""
    return bool(group["max_grad_norm"])
