"""Reading a checkpoint into a model and an optimizer, cut in any way."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from ..base import LambBase
from ..sharding.comm import Comm, ProcessGroup, host_comm
from . import contents, folder, storage
from .errors import CheckpointError
from .files import Checkpoint
from .saving import Stateful, wait
from .together import on_first, together


def load(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: LambBase | None = None,
    *,
    stateful: Mapping[str, Stateful] | None = None,
    options: contents.WhichOptions = "same",
    rng: bool = True,
    verify: bool = True,
    process_group: ProcessGroup | None = None,
) -> Checkpoint:
    """Read a checkpoint into what :func:`save` was given; every rank calls it.

    It does not matter how many ranks wrote it, nor whether it was a ``Lamb`` on one device or on
    DTensors or a ``ShardedLamb``: the state is the same, bit by bit, and each rank reads what it
    needs of it.

    Args:
        path: a checkpoint, or the folder of a run, for its latest.
        model: alone, to take the weights from another run.
        optimizer: with the same params in the same groups as the one that was saved.
        stateful: what to restore, by the names it was saved under.
        options: ``"same"``: an option other than lr that differs from the checkpoint's is an
            error, since training on would silently be another run; lr is the checkpoint's.
            ``"saved"``: the checkpoint's options replace the optimizer's, as in torch's
            ``load_state_dict``. ``"own"``: the optimizer's stay, lr too.
        rng: restore the random number generators, if as many ranks wrote as read.
        verify: compare the checksums of all files, each read by one of the ranks. Without it
            damage may go unseen, or show when a part is loaded already.
        process_group: as for :func:`save`.

    Returns the checkpoint, with ``step``, ``extra`` and more.

    Raises:
        CheckpointError: on every rank alike, naming the file that is missing or damaged, or the
            param or option that does not fit; nothing is changed then.
    """
    wait()
    comm = host_comm(process_group)
    found = on_first(comm, lambda: folder.resolve(path))

    def opened() -> tuple[Checkpoint, contents.Names]:
        if options not in get_args(contents.WhichOptions):
            raise CheckpointError(f"Invalid options: {options!r}; same, saved or own")
        checkpoint = Checkpoint(found)
        names = contents.Names(model, optimizer)
        if optimizer is not None:
            contents.check_groups(checkpoint, names, optimizer, options)
        contents.check_tensors(checkpoint, names)
        for key in stateful or {}:
            if key not in checkpoint.state["stateful"]:
                raise CheckpointError(f"{found}: has no state of {key}")
        if verify:
            checkpoint.verify(comm.rank, comm.world_size)
        return checkpoint, names

    checkpoint, names = together(comm, opened)
    _load_stateful(checkpoint, stateful or {}, comm)
    targets = together(comm, lambda: contents.Targets(checkpoint, names, optimizer))
    row = _rng_row(checkpoint, names, comm) if rng else None
    if row is not None:
        targets.tensors["rng"] = row
    storage.read_into(targets.tensors, checkpoint, comm)
    targets.finish()
    if optimizer is not None:
        contents.apply_groups(checkpoint, optimizer, options)
    if row is not None:
        contents.restore_rng(row.flat, contents.device_of(names))
    return checkpoint


def _rng_row(checkpoint: Checkpoint, names: contents.Names, comm: Comm) -> Any:
    if not contents.rng_fits(checkpoint, comm.world_size):
        return None
    return contents.rng_to_save(comm.rank, comm.world_size, contents.device_of(names))


def _load_stateful(checkpoint: Checkpoint, stateful: Mapping[str, Stateful], comm: Comm) -> None:
    """All of them on all ranks, or none: what was loaded is put back where any refuses."""
    before: dict[str, dict[str, Any]] = {}

    def each() -> None:
        for key, target in stateful.items():
            before[key] = copy.deepcopy(target.state_dict())
            try:
                target.load_state_dict(checkpoint.state["stateful"][key])
            except Exception as error:
                raise CheckpointError(f"{checkpoint.path}: {key}: {error}") from error

    try:
        together(comm, each)
    except CheckpointError:
        for key, state in before.items():
            stateful[key].load_state_dict(state)
        raise
