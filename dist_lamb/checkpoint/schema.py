"""The tensors and options in a checkpoint of a model and its LAMB, the same for every engine.

==================================  =============================================================
``model.<name>``                    a parameter or buffer, by its name in ``model.state_dict()``
``optimizer.<name>.<state>``        ``exp_avg``, ``exp_avg_sq``, ``master`` (where the parameter has
                                    half precision) or ``remainder``, in the parameter's shape and
                                    the format they are stored in; ``step``, 0-d
``rng``                             [ranks, n] bytes: every rank's random number generators
==================================  =============================================================

The state of a parameter that never had a gradient may be absent; it is zero then.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.nn.parallel import DistributedDataParallel

from .. import options as lamb_options
from .. import rules
from .._torch_private import is_optimized_module
from ..base import SKIPPED, LambBase
from ..lamb import Lamb
from ..rules import Rule
from ..sharded import ShardedLamb
from ..sharding.comm import is_dtensor
from ..sharding.dtensors import local_of, wrapped
from ..state import (
    MASTER,
    REMAINDER,
    TENSOR_STATES,
    Formats,
    scalar_of,
    state_like,
    states_of,
    stored_dtype,
)
from .errors import CheckpointError
from .files import Entry
from .fragments import Fragment
from .reading import Checkpoint
from .stored import equal, has_state, saved_key, take_converted

#: If options differ: raise, use the checkpoint's, or keep the optimizer's.
WhichOptions: TypeAlias = Literal["same", "saved", "own"]

#: Group entries that :func:`check_groups` does not compare: the params, the flags that select the
#: implementation, what a schedule changes, the count of skipped steps, and how states are stored,
#: which loading converts.
_NOT_COMPARED = frozenset(
    {
        *("params", "param_names", "lr", "initial_lr", "skipped_steps"),
        *lamb_options.FORMATS,
        *lamb_options.TORCH_FLAGS,
    }
)
#: Parts of names that wrappers add: torch.compile, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: parameter or buffer}; a tied one once, under its first name."""
    inner: Any = model
    while is_optimized_module(inner) or isinstance(inner, DistributedDataParallel):
        inner = inner.module if isinstance(inner, DistributedDataParallel) else inner._orig_mod
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in inner.state_dict(keep_vars=True).items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if not isinstance(t, Tensor):
            raise CheckpointError(f"{name} of the model is no tensor but a {type(t).__name__}")
        if id(t) not in seen:
            seen.add(id(t))
            tensors[name] = t
    return tensors


class Names:
    """The names in a checkpoint of the model's tensors and of the optimizer's params.

    Raises ``CheckpointError`` naming a param of the optimizer that the model does not have.
    """

    def __init__(self, model: nn.Module, optimizer: LambBase | None) -> None:
        self.model = model_tensors(model)
        names = {id(t): name for name, t in self.model.items()}
        self.groups: list[list[str]] = []
        self.params: dict[str, Tensor] = {}
        self.rules: dict[str, Rule] = {}
        self.formats: dict[str, Formats] = {}
        if optimizer is None:
            return
        if not isinstance(optimizer, Lamb | ShardedLamb):
            ours = isinstance(optimizer, LambBase)
            way_out = "; under DeepSpeed use its engine's save_checkpoint()" if ours else ""
            kind = type(optimizer).__name__
            raise TypeError(f"Lamb or ShardedLamb expected, got {kind}{way_out}")
        for group, options in zip(optimizer.named_groups(), optimizer.param_groups):
            for name, p in group:
                if id(p) not in names:
                    raise CheckpointError(f"{name} of the optimizer is no parameter of the model")
            params = {names[id(p)]: p for _, p in group}
            self.groups.append(list(params))
            self.params.update(params)
            self.rules.update(dict.fromkeys(params, rules.of(options)))
            self.formats.update(dict.fromkeys(params, Formats.of(options)))

    def states(self, name: str) -> dict[str, torch.dtype]:
        """{name: dtype} of what a param's state consists of."""
        stored = states_of(self.params[name].dtype, self.rules[name], self.formats[name])
        return {"step": torch.float32, **stored}


# --- saving --------------------------------------------------------------------------------------


def tensors_to_save(names: Names, optimizer: LambBase | None) -> dict[str, Any]:
    """{key: tensor, DTensor or Fragment}: this rank's part of everything, and what all have."""
    pieces = optimizer.pieces() if isinstance(optimizer, ShardedLamb) else {}
    tensors: dict[str, Any] = {}
    for name, t in names.model.items():
        tensors[f"model.{name}"] = (
            _fragment(pieces[t], "param") if t in pieces and t.numel() else t.detach()
        )
    for name, p in names.params.items():
        assert optimizer is not None
        for state_name, value in optimizer.state.get(p, {}).items():
            key = f"optimizer.{name}.{state_name}"
            if state_name == "step":
                tensors[key] = scalar_of(value, torch.float32).detach()
            elif state_name not in TENSOR_STATES:
                raise CheckpointError(f"{key} is no state of LAMB")
            elif p in pieces and p.numel():
                tensors[key] = _fragment(pieces[p], state_name)
            else:
                # An empty param's piece is flat; what is saved has the param's shape.
                tensors[key] = value.detach().view(p.shape) if p in pieces else value.detach()
    return tensors


def _fragment(piece: Any, view: str) -> Fragment:
    return Fragment(piece.whole.shape, piece.whole.stride, piece.start, piece.views[view])


def groups_to_save(names: Names, optimizer: LambBase | None) -> list[dict[str, Any]]:
    """The options of each group, with the names of its params."""
    if optimizer is None:
        return []
    return [
        {
            "params": params,
            **{k: v for k, v in group.items() if k not in ("params", "param_names")},
        }
        for params, group in zip(names.groups, optimizer.param_groups)
    ]


# --- loading -------------------------------------------------------------------------------------


def check_tensors(checkpoint: Checkpoint, names: Names) -> None:
    """Raise ``CheckpointError`` naming the first param or state that is missing or differs."""
    saved, path = checkpoint.tensors, checkpoint.path
    own = {f"model.{name}": t for name, t in names.model.items()}
    for key, t in own.items():
        if key not in saved:
            raise CheckpointError(f"{path}: has no {key}")
        _check_entry(path, key, saved[key], tuple(t.shape), t.dtype)
    for key in saved:
        if key.startswith("model.") and key not in own:
            raise CheckpointError(f"{path}: has {key}, which the model lacks")
    for name, p in names.params.items():
        for state_name, dtype in names.states(name).items() if has_state(checkpoint, name) else ():
            key = saved_key(checkpoint, name, state_name)
            if key not in saved:
                raise CheckpointError(f"{path}: has no {key}")
            if state_name == "step":
                _check_entry(path, key, saved[key], (), dtype)
            else:
                other = stored_dtype(key.rpartition(".")[2], saved[key].dtype, p.dtype)
                _check_entry(path, key, saved[key], tuple(p.shape), other)


def _check_entry(
    path: Path, key: str, saved: Entry, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if (saved.shape, saved.dtype) != (shape, dtype):
        raise CheckpointError(
            f"{path}: {key} is {list(saved.shape)} {saved.dtype}, here it is {list(shape)} {dtype}"
        )


def check_groups(
    checkpoint: Checkpoint,
    names: Names,
    optimizer: LambBase,
    which: WhichOptions,
    scheduled: Set[str],
) -> None:
    """Raise ``CheckpointError`` naming a param in another group, or an option that differs and is
    not ``scheduled``."""
    saved, path = checkpoint.state["groups"], checkpoint.path
    if not saved:
        raise CheckpointError(f"{path}: was saved without an optimizer")
    group_of = {name: i for i, group in enumerate(saved) for name in group["params"]}
    for i, params in enumerate(names.groups):
        for name in params:
            if group_of.pop(name, None) != i:
                raise CheckpointError(
                    f"{path}: {name} is not in parameter group {i}, as it is here"
                )
    for name, i in group_of.items():
        raise CheckpointError(
            f"{path}: {name} is in parameter group {i}, and not in this optimizer"
        )
    for i, (theirs, ours) in enumerate(zip(saved, optimizer.param_groups)):
        rule = rules.of(ours)
        if "rule" in theirs and theirs["rule"] not in list(rules.RULES):
            raise CheckpointError(
                f"{path}: parameter group {i} has rule {theirs['rule']!r}, unknown"
            )
        made_for = rules.of(theirs) if "rule" in theirs else rule
        if made_for.states != rule.states:
            raise CheckpointError(
                f"{path}: parameter group {i} was saved under rule {theirs['rule']!r}, "
                f"whose states are {dict(made_for.states)}; here rule {rule.name!r} has "
                f"{dict(rule.states)}"
            )
        if which == "saved" and made_for is not rule and isinstance(optimizer, ShardedLamb):
            raise CheckpointError(
                f"{path}: parameter group {i} was saved under rule {theirs['rule']!r}, and the "
                f"buffers of this ShardedLamb are for {rule.name!r}: make one of that rule first"
            )
        for option in sorted((theirs.keys() & ours.keys()) - _NOT_COMPARED - scheduled):
            if which == "same" and not equal(theirs[option], ours[option]):
                raise CheckpointError(
                    f"{path}: {option} of parameter group {i} is {theirs[option]!r}, here it is "
                    f'{ours[option]!r}; load with options="saved" or options="own"'
                )


def group_values(
    checkpoint: Checkpoint, optimizer: LambBase, which: WhichOptions
) -> list[dict[str, Any]]:
    """What each group of the optimizer gets: lr, the other options, the count of skipped steps.

    Raises ``CheckpointError`` naming an option with a value that is not valid.
    """
    if which == "own":
        return [{} for _ in optimizer.param_groups]
    values = []
    for i, (theirs, ours) in enumerate(zip(checkpoint.state["groups"], optimizer.param_groups)):
        rest = {k: v for k, v in theirs.items() if k != "params"}
        own = (*lamb_options.TORCH_FLAGS, *lamb_options.FORMATS)
        taken = {k: v for k, v in rest.items() if k not in own}
        try:
            lamb_options.check_group({**optimizer.defaults, **rest})
            _check_schedule(taken)
            values.append({k: _value_for(ours.get(k), v) for k, v in taken.items()})
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            where = f"{checkpoint.path}: parameter group {i}"
            raise CheckpointError(f"{where}: {error}") from None
    return values


def _check_schedule(group: Mapping[str, Any]) -> None:
    """What a schedule and the optimizer itself keep in a group; raises ``ValueError``."""
    initial = group.get("initial_lr", 0.0)
    if not math.isfinite(scalar_of(initial).item()):
        raise ValueError(f"Invalid initial_lr: {initial!r}")
    skipped = scalar_of(group.get(SKIPPED, 0))
    if skipped.is_floating_point() or skipped.item() < 0:
        raise ValueError(f"Invalid {SKIPPED}: {skipped!r}")


def _value_for(own: Any, value: Any) -> Any:
    # A tensor in the group is overwritten, not replaced; else a copy, since the optimizer changes
    # tensors in place, and the checkpoint keeps its own.
    return scalar_of(value).item() if isinstance(own, Tensor) else copy.deepcopy(value)


def apply_groups(values: list[dict[str, Any]], optimizer: LambBase) -> None:
    """Set the options that :func:`group_values` has returned.

    Tensors that the groups hold are overwritten, not replaced: others may refer to them.
    """
    for taken, ours in zip(values, optimizer.param_groups):
        for option, value in taken.items():
            if isinstance(ours.get(option), Tensor):
                ours[option].fill_(value)
            else:
                ours[option] = value


def read_steps(checkpoint: Checkpoint, names: Names) -> dict[str, Tensor]:
    """{name: step count}, 0-d, of the params that have state.

    Raises ``CheckpointError`` naming a count that is none.
    """
    steps = {}
    for name in names.params:
        if has_state(checkpoint, name):
            count = checkpoint.tensor(f"optimizer.{name}.step")
            if not (count >= 0 and count.isfinite() and count == count.floor()):
                raise CheckpointError(
                    f"{checkpoint.path}: optimizer.{name}.step is {float(count)}, no count"
                )
            steps[name] = count
    return steps


class Targets:
    """The memory that a checkpoint's tensors are read into, and the steps after reading.

    Raises nothing that depends on the rank; all checks come before.

    Args:
        steps: the step counts of the params that have state, as :func:`read_steps` returns them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Names,
        optimizer: LambBase | None,
        steps: Mapping[str, Tensor],
    ) -> None:
        self._optimizer = optimizer
        self._model = list(names.model.values())
        self._steps = {names.params[name]: count for name, count in steps.items()}
        self._new_state: dict[Tensor, dict[str, Tensor]] = {}
        #: (piece of a param, name of a state, its elements as they were saved)
        self._converted: list[tuple[Any, str, Tensor]] = []
        self._pieces: Mapping[Tensor, Any] = {}
        kept = set(steps)
        if isinstance(optimizer, ShardedLamb):
            self._pieces = optimizer.pieces(build=bool(steps))
            kept = {name for name in steps if names.params[name] in self._pieces}
            _warn_of_frozen([name for name in names.params if name in steps.keys() - kept])
        self.tensors: dict[str, Any] = {}
        for name, t in names.model.items():
            sharded = t in self._pieces and t.numel()
            target = _fragment(self._pieces[t], "param") if sharded else t.detach()
            self.tensors[f"model.{name}"] = target
        for name, p in names.params.items():
            if name in kept:
                self._add_state(checkpoint, name, p, names.states(name))
        self._without_state = [p for name, p in names.params.items() if name not in kept]

    def _add_state(
        self, checkpoint: Checkpoint, name: str, p: Tensor, states: Mapping[str, torch.dtype]
    ) -> None:
        assert self._optimizer is not None
        for state_name, dtype in states.items():
            if state_name == "step":
                continue  # known before anything is overwritten
            key = saved_key(checkpoint, name, state_name)
            saved_name, saved_dtype = key.rpartition(".")[2], checkpoint.tensors[key].dtype
            target: Any
            if p in self._pieces:
                piece = self._pieces[p]
                target = torch.empty(p.shape, dtype=saved_dtype, device="cpu")
                if p.numel():
                    target = _fragment(piece, state_name)
                    if (saved_name, saved_dtype) != (state_name, dtype):
                        target = target.with_flat(torch.empty_like(target.flat, dtype=saved_dtype))
                        self._converted.append((piece, state_name, target.flat))
            else:
                # In the format it was saved in: the next step converts it.
                old = self._optimizer.state.get(p, {}).get(saved_name)
                fits = old is not None and (old.shape, old.dtype) == (p.shape, saved_dtype)
                target = old if fits else wrapped(state_like(local_of(p), dtype=saved_dtype), p)
                self._new_state.setdefault(p, {})[saved_name] = target
            self.tensors[key] = target

    @torch.no_grad()
    def finish(self) -> None:
        """To be called after :attr:`tensors` are read; a collective if the optimizer is sharded."""
        # They were read without torch's knowledge: masters must see that the params are others.
        increment_version(self._model)
        optimizer = self._optimizer
        if optimizer is None:
            return
        if isinstance(optimizer, ShardedLamb):
            if self._pieces:
                for piece, state_name, given in self._converted:
                    take_converted(piece.views, state_name, given)
                for p in self._without_state:
                    if p in self._pieces:  # a frozen param has no state at all
                        self._reset(p)
                optimizer.take_pieces(self._steps)
            return
        for p in self._without_state:
            optimizer.state.pop(p, None)
        for p, state in self._new_state.items():
            for other in {MASTER, REMAINDER} & optimizer.state[p].keys() - state.keys():
                del optimizer.state[p][other]
            optimizer.state[p].update(state)
            optimizer.state[p]["step"] = self._steps[p]
        optimizer.state_loaded()

    def _reset(self, p: Tensor) -> None:
        """The state of a param that never had a gradient: zeros, the param as master."""
        views = self._pieces[p].views
        for name, view in views.items():
            if name == MASTER:
                view.copy_(views["param"])
            elif name != "param":
                view.zero_()


def _warn_of_frozen(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(
            f"{names[0]}{more} has state in the checkpoint and is frozen here: ShardedLamb keeps "
            "no state of frozen params",
            stacklevel=2,
        )


def device_of(names: Names) -> torch.device:
    for t in names.model.values():
        return t.device
    return torch.device("cpu")


def about(names: Names, optimizer: LambBase | None) -> dict[str, Any]:
    """The engine that writes the checkpoint; ``python -m dist_lamb inspect`` prints it."""
    sharded = any(is_dtensor(t) for t in names.model.values())
    engine = "none" if optimizer is None else type(optimizer).__name__
    description: dict[str, Any] = {"engine": f"{engine} on DTensors" if sharded else engine}
    if isinstance(optimizer, ShardedLamb):
        description["stage"] = optimizer.stage
    return description
