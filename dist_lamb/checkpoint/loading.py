"""Reading a checkpoint into a model and an optimizer, sharded in any way."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, get_args

from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..base import LambBase
from ..sharding.comm import Comm, ProcessGroup, host_comm
from . import folder, schema, storage
from . import rng as rng_states
from .collective_try import collective_try, on_rank_zero
from .errors import CheckpointError
from .reading import Checkpoint
from .saving import Stateful, wait


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: LambBase | None = None,
    *,
    stateful: Mapping[str, Stateful] | None = None,
    options: schema.WhichOptions = "same",
    rng: bool = True,
    verify: bool = True,
    process_group: ProcessGroup | None = None,
) -> Checkpoint:
    """Read a checkpoint into a model and an optimizer; every rank calls it.

    Any number of ranks may have written it, with a ``Lamb`` on one device, a ``Lamb`` on DTensors
    or a ``ShardedLamb``: the state is the same, bit by bit. Each rank reads the parts it needs.

    Args:
        path: a checkpoint, or a folder of checkpoints, for its latest.
        model: without an optimizer, to start from the weights of another run.
        optimizer: with the same params in the same groups as the one that was saved.
        stateful: what to restore, by the names it was saved under.
        options: ``"same"``: an option other than lr that differs from the checkpoint's is an
            error, since training would silently continue as another run; lr, and betas that a
            schedule in ``stateful`` cycles, are the checkpoint's.
            ``"saved"``: the checkpoint's options replace the optimizer's, as in torch's
            ``load_state_dict``. ``"own"``: the optimizer's are kept, including lr. The count of
            skipped steps is the checkpoint's, or with ``"own"`` the optimizer's.
        rng: restore the random number generators, if as many ranks wrote as read.
        verify: compare the checksums of all files, each read by one of the ranks. Without it
            only their sizes are compared, and damaged elements are loaded.
        process_group: as for :func:`save`.

    Returns the checkpoint, with ``step``, ``extra`` and more.

    Raises:
        CheckpointError: on every rank, naming the file that is missing or damaged, or the param
            or option that does not match. Nothing is changed then, unless files went away while
            they were read: after that ``step()`` raises until a checkpoint was loaded.
    """
    wait()
    comm = host_comm(process_group)
    resolved = on_rank_zero(comm, lambda: folder.resolve(path))

    def open_and_check() -> tuple[Checkpoint, schema.Names]:
        if options not in get_args(schema.WhichOptions):
            raise CheckpointError(f"Invalid options: {options!r}; same, saved or own")
        checkpoint = Checkpoint(resolved)
        names = schema.Names(model, optimizer)
        if optimizer is not None:
            scheduled = _scheduled((stateful or {}).values(), optimizer)
            schema.check_groups(checkpoint, names, optimizer, options, scheduled)
        schema.check_tensors(checkpoint, names)
        for key, target in (stateful or {}).items():
            if key not in checkpoint.state["stateful"]:
                raise CheckpointError(f"{resolved}: has no state of {key}")
            _check_stateful(f"{resolved}: {key}", checkpoint.state["stateful"][key], target)
        checkpoint.check_sizes(comm.rank, comm.world_size)
        if verify:
            checkpoint.verify(comm.rank, comm.world_size)
        return checkpoint, names

    checkpoint, names = collective_try(comm, open_and_check)

    def parse() -> tuple[dict[str, Tensor], list[dict[str, Any]], rng_states.Generators | None]:
        values = [] if optimizer is None else schema.group_values(checkpoint, optimizer, options)
        steps, generators = schema.read_steps(checkpoint, names), None
        if rng and rng_states.fits(checkpoint, comm.world_size):
            generators = rng_states.read(checkpoint, comm.rank, schema.device_of(names))
        return steps, values, generators

    steps, values, generators = collective_try(comm, parse)
    # From here on nothing is checked any more, and things are overwritten.
    restore = _load_stateful(checkpoint, stateful or {}, comm)
    try:
        targets = collective_try(comm, lambda: schema.Targets(checkpoint, names, optimizer, steps))
    except CheckpointError:
        restore()
        raise
    try:
        storage.read_into(targets.tensors, checkpoint, comm)
    except CheckpointError as error:
        restore()
        if optimizer is not None:
            optimizer.state_broken()
        raise CheckpointError(f"{error}; loaded in part: load a checkpoint again") from error
    targets.finish()
    if optimizer is not None:
        schema.apply_groups(values, optimizer)
    if generators is not None:
        generators.restore()
    return checkpoint


def _check_stateful(where: str, saved: Any, target: Stateful) -> None:
    """Refuse what ``LRScheduler.load_state_dict``, which takes everything, could not work with."""
    if not isinstance(target, LRScheduler):
        return
    if not isinstance(saved, dict):
        raise CheckpointError(f"{where}: is a {type(saved).__name__}, not a state")
    own = target.state_dict()
    for key, value in saved.items():
        if not isinstance(key, str) or callable(getattr(type(target), key, None)):
            raise CheckpointError(f"{where}: {key!r} is no part of a {type(target).__name__}")
        # What is None may become something else in the course of training.
        if value is not None and own.get(key) is not None and not _alike(value, own[key]):
            raise CheckpointError(
                f"{where}: {key} is {value!r}, in a {type(target).__name__} here {own[key]!r}"
            )


def _alike(a: Any, b: Any) -> bool:
    """Numbers are alike; lists of numbers are alike, and of nothing yet."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return not a or not b or set(map(_kind, a)) == set(map(_kind, b))
    return bool(_kind(a) == _kind(b))


def _kind(value: Any) -> Any:
    if isinstance(value, (int, float, Tensor)):
        return "number"
    if isinstance(value, (list, tuple)):
        return "list"
    return "dict" if isinstance(value, dict) else type(value)


def _scheduled(schedules: Iterable[Any], optimizer: LambBase) -> set[str]:
    """Options of the optimizer that the schedules among these change, beside lr."""
    found: set[str] = set()
    for schedule in schedules:
        # what SequentialLR and ChainedScheduler are made of
        found |= _scheduled(getattr(schedule, "_schedulers", ()), optimizer)
        own = isinstance(schedule, LRScheduler) and schedule.optimizer is optimizer
        if own and getattr(schedule, "cycle_momentum", False):
            found |= {"betas", "momentum"}
    return found


def _load_stateful(
    checkpoint: Checkpoint, stateful: Mapping[str, Stateful], comm: Comm
) -> Callable[[], None]:
    """All of them on all ranks, or none. Returns what puts them back to what they were."""
    before: dict[str, dict[str, Any]] = {}

    def load_all() -> None:
        for key, target in stateful.items():
            before[key] = copy.deepcopy(target.state_dict())
            try:
                target.load_state_dict(checkpoint.state["stateful"][key])
            except Exception as error:
                raise CheckpointError(f"{checkpoint.path}: {key}: {error}") from error

    def restore() -> None:
        for key, state in before.items():
            # One that refuses what it has saved itself would hide which error it was.
            with suppress(Exception):
                stateful[key].load_state_dict(state)

    try:
        collective_try(comm, load_all)
    except CheckpointError:
        restore()
        raise
    return restore
