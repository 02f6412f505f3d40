"""Reading a checkpoint into a model and an optimizer, sharded in any way."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from ..base import LambBase
from ..sharding.comm import Comm, ProcessGroup, host_comm
from . import folder, schema, storage
from .collective_try import collective_try, on_rank_zero
from .errors import CheckpointError
from .files import Checkpoint
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
            error, since training would silently continue as another run; lr is the checkpoint's.
            ``"saved"``: the checkpoint's options replace the optimizer's, as in torch's
            ``load_state_dict``. ``"own"``: the optimizer's are kept, including lr. The count of
            skipped steps is the checkpoint's, or with ``"own"`` the optimizer's.
        rng: restore the random number generators, if as many ranks wrote as read.
        verify: compare the checksums of all files, each read by one of the ranks. Without it
            damage may not be detected, or only after a part is loaded.
        process_group: as for :func:`save`.

    Returns the checkpoint, with ``step``, ``extra`` and more.

    Raises:
        CheckpointError: on every rank, naming the file that is missing or damaged, or the param
            or option that does not match. Nothing is changed then.
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
            schema.check_groups(checkpoint, names, optimizer, options)
        schema.check_tensors(checkpoint, names)
        for key in stateful or {}:
            if key not in checkpoint.state["stateful"]:
                raise CheckpointError(f"{resolved}: has no state of {key}")
        if verify:
            checkpoint.verify(comm.rank, comm.world_size)
        return checkpoint, names

    checkpoint, names = collective_try(comm, open_and_check)
    _load_stateful(checkpoint, stateful or {}, comm)
    targets = collective_try(comm, lambda: schema.Targets(checkpoint, names, optimizer))
    row = _rng_row(checkpoint, names, comm) if rng else None
    if row is not None:
        targets.tensors["rng"] = row
    storage.read_into(targets.tensors, checkpoint, comm)
    targets.finish()
    if optimizer is not None:
        schema.apply_groups(checkpoint, optimizer, options)
    if row is not None:
        schema.restore_rng(row.flat, schema.device_of(names))
    return checkpoint


def _rng_row(checkpoint: Checkpoint, names: schema.Names, comm: Comm) -> Any:
    if not schema.rng_fits(checkpoint, comm.world_size):
        return None
    return schema.rng_to_save(comm.rank, comm.world_size, schema.device_of(names))


def _load_stateful(checkpoint: Checkpoint, stateful: Mapping[str, Stateful], comm: Comm) -> None:
    """All of them on all ranks, or none: if any fails, those already loaded are restored."""
    before: dict[str, dict[str, Any]] = {}

    def load_all() -> None:
        for key, target in stateful.items():
            before[key] = copy.deepcopy(target.state_dict())
            try:
                target.load_state_dict(checkpoint.state["stateful"][key])
            except Exception as error:
                raise CheckpointError(f"{checkpoint.path}: {key}: {error}") from error

    try:
        collective_try(comm, load_all)
    except CheckpointError:
        for key, state in before.items():
            stateful[key].load_state_dict(state)
        raise
