"""What a checkpoint of a model and its LAMB holds, whichever engine trains it.

==================================  =============================================================
``model.<name>``                    a parameter or buffer, by its name in ``model.state_dict()``
``optimizer.<name>.<state>``        ``exp_avg``, ``exp_avg_sq``, ``master`` (where the parameter has
                                    half precision), in the parameter's shape; ``step``, 0-d
``rng``                             [ranks, n] bytes: every rank's random number generators
==================================  =============================================================

A parameter that never had a gradient may lack its state, which is zero then.
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import options as lamb_options
from ..base import LambBase
from ..sharded import ShardedLamb
from ..sharding.comm import is_dtensor
from ..sharding.dtensors import local_of, wrapped
from ..state import TENSOR_STATES, needs_master, state_dtype, state_like
from .errors import CheckpointError
from .files import Checkpoint, Entry
from .fragments import Fragment
from .plain import decode, encode, memory_of

#: What to do with options that differ: refuse, take the checkpoint's, keep the optimizer's own.
WhichOptions: TypeAlias = Literal["same", "saved", "own"]

#: Not compared: which params, how they are computed, and what a schedule changes.
_NOT_COMPARED = frozenset({"params", "param_names", "lr", "initial_lr", *lamb_options.TORCH_FLAGS})
#: Parts of names that wrappers put in: torch.compile, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
_RNG_NBYTES = 2**15


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """{name: parameter or buffer}; a tied one once, under its first name."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, t in model.state_dict(keep_vars=True).items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        if not isinstance(t, Tensor):
            raise CheckpointError(f"{name} of the model is no tensor but a {type(t).__name__}")
        if id(t) not in seen:
            seen.add(id(t))
            found[name] = t
    return found


class Names:
    """Who is called what in a checkpoint.

    Raises ``CheckpointError`` naming a param of the optimizer that the model does not have.
    """

    def __init__(self, model: nn.Module, optimizer: LambBase | None) -> None:
        self.model = model_tensors(model)
        names = {id(t): name for name, t in self.model.items()}
        self.groups: list[list[str]] = []
        self.params: dict[str, Tensor] = {}
        if optimizer is None:
            return
        if not isinstance(optimizer, LambBase):
            raise TypeError(f"Lamb or ShardedLamb expected, got {type(optimizer).__name__}")
        for group in optimizer.param_groups:
            for own, p in zip(optimizer._names_of(group), group["params"]):
                if id(p) not in names:
                    raise CheckpointError(f"{own} of the optimizer is no parameter of the model")
            self.groups.append([names[id(p)] for p in group["params"]])
            self.params.update(zip(self.groups[-1], group["params"]))


# --- saving --------------------------------------------------------------------------------------


def tensors_to_save(names: Names, optimizer: LambBase | None) -> dict[str, Any]:
    """{key: tensor, DTensor or Fragment}: this rank's part of everything, and what all have."""
    pieces = optimizer.pieces() if isinstance(optimizer, ShardedLamb) else {}
    found: dict[str, Any] = {}
    for name, t in names.model.items():
        piece = pieces.get(t)
        cut = piece is not None and t.numel()
        found[f"model.{name}"] = _fragment(piece, "param") if cut else t.detach()
    for name, p in names.params.items():
        assert optimizer is not None
        state = optimizer.state.get(p, {})
        for kind, value in state.items():
            key = f"optimizer.{name}.{kind}"
            if kind == "step":
                found[key] = torch.as_tensor(value, dtype=torch.float32).detach()
            elif kind not in TENSOR_STATES:
                raise CheckpointError(f"{key} is no state of LAMB")
            elif p in pieces and p.numel():
                found[key] = _fragment(pieces[p], kind)
            else:
                # An empty param's piece is flat; what is saved has the param's shape.
                found[key] = value.detach().view(p.shape) if p in pieces else value.detach()
    return found


def _fragment(piece: Any, kind: str) -> Fragment:
    return Fragment(piece.whole.shape, piece.whole.stride, piece.start, piece.views[kind])


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
    """Raise ``CheckpointError`` naming the first param or state that is missing or another."""
    saved, where = checkpoint.tensors, checkpoint.path
    own = {f"model.{name}": t for name, t in names.model.items()}
    for key, t in own.items():
        if key not in saved:
            raise CheckpointError(f"{where}: has no {key}")
        _compare(where, key, saved[key], tuple(t.shape), t.dtype)
    for key in saved:
        if key.startswith("model.") and key not in own:
            raise CheckpointError(f"{where}: has {key}, which the model lacks")
    for name, p in names.params.items():
        kinds = states_of(p) if has_state(checkpoint, name) else []
        for kind in kinds:
            key = f"optimizer.{name}.{kind}"
            if key not in saved:
                raise CheckpointError(f"{where}: has no {key}")
            if kind == "step":
                _compare(where, key, saved[key], (), torch.float32)
            else:
                _compare(where, key, saved[key], tuple(p.shape), state_dtype(p.dtype))


def _compare(
    where: Any, key: str, saved: Entry, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if (saved.shape, saved.dtype) != (shape, dtype):
        raise CheckpointError(
            f"{where}: {key} is {list(saved.shape)} {saved.dtype}, here it is {list(shape)} {dtype}"
        )


def has_state(checkpoint: Checkpoint, name: str) -> bool:
    """Whether there is any state of this param."""
    kinds = ("step", *TENSOR_STATES)
    return any(f"optimizer.{name}.{kind}" in checkpoint.tensors for kind in kinds)


def states_of(p: Tensor) -> list[str]:
    kinds = ["step", "exp_avg", "exp_avg_sq"]
    return [*kinds, "master"] if needs_master(p.dtype) else kinds


def check_groups(
    checkpoint: Checkpoint, names: Names, optimizer: LambBase, which: WhichOptions
) -> None:
    """Raise ``CheckpointError`` naming a param in another group, or an option that differs."""
    saved, where = checkpoint.state["groups"], checkpoint.path
    if not saved:
        raise CheckpointError(f"{where}: was saved without an optimizer")
    homes = {name: i for i, group in enumerate(saved) for name in group["params"]}
    for i, params in enumerate(names.groups):
        for name in params:
            if homes.pop(name, None) != i:
                raise CheckpointError(
                    f"{where}: {name} is not in parameter group {i}, as it is here"
                )
    for name, i in homes.items():
        raise CheckpointError(
            f"{where}: {name} is in parameter group {i}, and not in this optimizer"
        )
    for i, (theirs, ours) in enumerate(zip(saved, optimizer.param_groups)):
        if which == "saved":
            rest = {k: v for k, v in theirs.items() if k != "params"}
            try:
                lamb_options.check_group({**optimizer.defaults, **rest})
            except ValueError as error:
                raise CheckpointError(f"{where}: parameter group {i}: {error}") from None
        for option in sorted((theirs.keys() & ours.keys()) - _NOT_COMPARED):
            if which == "same" and not _equal(theirs[option], ours[option]):
                raise CheckpointError(
                    f"{where}: {option} of parameter group {i} is {theirs[option]!r}, here it is "
                    f'{ours[option]!r}; load with options="saved" or options="own"'
                )


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return bool(torch.equal(torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()))
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return tuple(a) == tuple(b)
    return bool(a == b)


def apply_groups(checkpoint: Checkpoint, optimizer: LambBase, which: WhichOptions) -> None:
    """Take over lr and other options; tensors that groups hold are overwritten, not replaced."""
    if which == "own":
        return
    for theirs, ours in zip(checkpoint.state["groups"], optimizer.param_groups):
        for option, value in theirs.items():
            if option in ("params", *lamb_options.TORCH_FLAGS):
                continue
            if isinstance(ours.get(option), Tensor):
                ours[option].fill_(torch.as_tensor(value).item())
            else:
                ours[option] = value


class Targets:
    """The memory that a checkpoint's tensors are read into, and what is to be done afterwards.

    Raises nothing that depends on the rank; all checks come before.
    """

    def __init__(self, checkpoint: Checkpoint, names: Names, optimizer: LambBase | None) -> None:
        self._optimizer, self._names = optimizer, names
        self._steps: dict[Tensor, Tensor] = {}
        self._fresh: dict[Tensor, dict[str, Tensor]] = {}
        saved = {name: has_state(checkpoint, name) for name in names.params}
        pieces = {}
        if isinstance(optimizer, ShardedLamb):
            pieces = optimizer.pieces(build=any(saved.values()))
        self._pieces = pieces
        self.tensors: dict[str, Any] = {}
        for name, t in names.model.items():
            cut = t in pieces and t.numel()
            self.tensors[f"model.{name}"] = _fragment(pieces[t], "param") if cut else t.detach()
        for name, p in names.params.items():
            if saved[name]:
                self._state(name, p)
        self._absent = [p for name, p in names.params.items() if not saved[name]]

    def _state(self, name: str, p: Tensor) -> None:
        assert self._optimizer is not None
        for kind in states_of(p):
            target: Any
            if kind == "step":
                target = self._steps[p] = torch.zeros(())
            elif p in self._pieces:
                target = _fragment(self._pieces[p], kind) if p.numel() else torch.empty(p.shape)
            else:
                had = self._optimizer.state.get(p, {}).get(kind)
                fits = had is not None and (had.shape, had.dtype) == (p.shape, state_dtype(p.dtype))
                target = had if fits else wrapped(state_like(local_of(p)), p)
                self._fresh.setdefault(p, {})[kind] = target
            self.tensors[f"optimizer.{name}.{kind}"] = target

    @torch.no_grad()
    def finish(self) -> None:
        """Once :attr:`tensors` are read: a collective, where the optimizer is sharded."""
        optimizer = self._optimizer
        if optimizer is None:
            return
        if isinstance(optimizer, ShardedLamb):
            if self._pieces:
                for p in self._absent:
                    self._reset(p)
                optimizer.take_pieces(self._steps)
            return
        for p in self._absent:
            optimizer.state.pop(p, None)
        for p, state in self._fresh.items():
            optimizer.state[p].update(state)
            optimizer.state[p]["step"] = self._steps[p]
        optimizer._forget_caches()

    def _reset(self, p: Tensor) -> None:
        """As a param that has had no gradient: moments zero, its master the param's value."""
        for kind, view in self._pieces[p].views.items():
            if kind == "master":
                view.copy_(self._pieces[p].views["param"])
            elif kind != "param":
                view.zero_()


# --- random numbers ------------------------------------------------------------------------------


def rng_to_save(rank: int, world_size: int, device: torch.device) -> Fragment:
    """This rank's row of ``rng``: the states of torch's, Python's and NumPy's generators."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    row = torch.full((_RNG_NBYTES,), ord(" "), dtype=torch.uint8)
    text = json.dumps(encode(state, "rng")).encode()
    memory_of(row)[: len(text)] = text
    return Fragment((world_size, _RNG_NBYTES), (_RNG_NBYTES, 1), rank * _RNG_NBYTES, row)


def restore_rng(row: Tensor, device: torch.device) -> None:
    """Set the generators as in a row that :func:`rng_to_save` made."""
    state = decode(json.loads(bytes(memory_of(row))))
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if "numpy" in sys.modules and "numpy" in state:
        numpy = sys.modules["numpy"]
        kind, keys, *rest = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))


def rng_fits(checkpoint: Checkpoint, world_size: int) -> bool:
    """Whether there is a row for every rank, and for no other."""
    entry = checkpoint.tensors.get("rng")
    return entry is not None and entry.shape == (world_size, _RNG_NBYTES)


def device_of(names: Names) -> torch.device:
    for t in names.model.values():
        return t.device
    return torch.device("cpu")


def about(names: Names, optimizer: LambBase | None) -> dict[str, Any]:
    """What wrote the checkpoint, for :mod:`dist_lamb.__main__`."""
    sharded = any(is_dtensor(t) for t in names.model.values())
    engine = "none" if optimizer is None else type(optimizer).__name__
    found: dict[str, Any] = {"engine": f"{engine} on DTensors" if sharded else engine}
    if isinstance(optimizer, ShardedLamb):
        found["stage"] = optimizer.stage
    return found
