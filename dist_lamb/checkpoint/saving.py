"""Writing checkpoints, at once or beside the training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..base import LambBase
from ..sharded import ShardedLamb
from ..sharding.comm import Comm, ProcessGroup, host_comm, is_dtensor
from . import contents, folder, storage
from .errors import CheckpointError
from .fragments import Fragment
from .plain import encode
from .together import on_first, together


class Stateful(Protocol):
    """What has a state to save: an lr schedule, a GradScaler, a data loader."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class _Snapshot:
    """All that is to be written: tensors where they lie, or copies, and the rest as JSON."""

    tensors: dict[str, Any]
    state: str
    staged: storage.Staged | None = None


class Pending:
    """A checkpoint that is being written beside the training."""

    def __init__(self, work: Future[Path]) -> None:
        self._work = work

    def done(self) -> bool:
        """Whether it is written, or failed; other ranks may see another answer."""
        return self._work.done()

    def wait(self) -> Path:
        """Wait until it is there; its folder. Raises ``CheckpointError`` if it failed."""
        global _in_flight
        if _in_flight is self:
            _in_flight = None  # what it has to say is said once
        return self._work.result()


# One thread for good: starting one takes longer than handing it work. A program that ends waits for
# it, so its last checkpoint is not left half written.
_beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dist_lamb.checkpoint")
_in_flight: Pending | None = None
_buffer: Tensor | None = None


def save(
    directory: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: LambBase | None = None,
    *,
    stateful: Mapping[str, Stateful] | None = None,
    extra: Any = None,
    rng: bool = True,
    keep: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Path:
    """Write ``directory/step-<step>``; every rank calls it, and every rank writes its own part.

    Args:
        directory: of all checkpoints of a run, on a disk that all ranks share.
        step: the number of steps done.
        model: its parameters and buffers, by their names in ``model.state_dict()``.
        optimizer: a :class:`dist_lamb.Lamb` or :class:`dist_lamb.ShardedLamb` of this model: its
            moments, masters, step counts, and the options of its groups.
        stateful: whatever has a ``state_dict()`` of plain data and small tensors, by a name of
            your choice: the lr schedule, a GradScaler, the data loader. Rank 0's is saved.
        extra: plain data of your own, e.g. ``{"tokens_seen": n}``; rank 0's is saved.
        rng: save the random number generators (torch, CUDA, Python, NumPy) of every rank.
        keep: remove all but the last so many checkpoints of ``directory``.
        process_group: the ranks that train this model together; default all.

    Returns the checkpoint's folder. It appears under that name complete and on disk, or not at all.

    Raises:
        CheckpointError: on every rank, if any could not do its part: naming a file that cannot be
            written, a value that is no plain data, or a step that is there already. Or an earlier
            :func:`save_async` failed, and nothing was tried now.
    """
    wait()
    comm = host_comm(process_group)
    taken = _caught(lambda: _snapshot(comm, step, model, optimizer, stateful, extra, rng, keep))
    return _write(comm, Path(directory), step, taken, keep)


def save_async(
    directory: str | os.PathLike[str],
    step: int,
    model: nn.Module,
    optimizer: LambBase | None = None,
    *,
    stateful: Mapping[str, Stateful] | None = None,
    extra: Any = None,
    rng: bool = True,
    keep: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Pending:
    """As :func:`save`, but training goes on as soon as a copy is made in host memory.

    A ``process_group`` must be one that nothing else uses, best of gloo: another thread works with
    it. One checkpoint at a time: this waits first for the one before, and raises its error. Call
    :func:`wait` before the process group is destroyed. The copy's memory, this rank's part of the
    checkpoint and pinned if it comes from a GPU, is kept for the next one.
    """
    global _in_flight
    if process_group is not None and _trains(optimizer, process_group):
        raise ValueError("save_async needs a process_group of its own; make one by new_group()")
    wait()
    comm = host_comm(process_group)

    def copied() -> _Snapshot:
        global _buffer
        now = _snapshot(comm, step, model, optimizer, stateful, extra, rng, keep)
        staged = storage.stage(now.tensors, _buffer)
        _buffer = staged.buffer
        return _Snapshot(staged.tensors, now.state, staged)

    # Not raised here: on this rank alone it would leave the others' threads waiting.
    taken = _caught(copied)
    _in_flight = Pending(_beside.submit(_write, comm, Path(directory), step, taken, keep))
    return _in_flight


def wait() -> None:
    """Wait for a :func:`save_async` that is still at work. Raises ``CheckpointError`` if it failed,
    once."""
    if _in_flight is not None:
        _in_flight.wait()


def _trains(optimizer: LambBase | None, group: ProcessGroup) -> bool:
    return isinstance(optimizer, ShardedLamb) and optimizer._comm.group is group


def _caught(take: Callable[[], _Snapshot]) -> _Snapshot | Exception:
    try:
        return take()
    except Exception as error:
        return error


def _snapshot(
    comm: Comm,
    step: int,
    model: nn.Module,
    optimizer: LambBase | None,
    stateful: Mapping[str, Stateful] | None,
    extra: Any,
    rng: bool,
    keep: int | None,
) -> _Snapshot:
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise CheckpointError(f"step must be an integer >= 0, got {step!r}")
    if keep is not None and keep < 1:
        raise CheckpointError(f"keep must be None or at least 1, got {keep}")
    names = contents.Names(model, optimizer)
    tensors = contents.tensors_to_save(names, optimizer)
    if comm.rank:
        # What every rank has alike, rank 0 writes.
        tensors = {k: t for k, t in tensors.items() if isinstance(t, Fragment) or is_dtensor(t)}
    if rng:
        device = contents.device_of(names)
        tensors["rng"] = contents.rng_to_save(comm.rank, comm.world_size, device)
    state = {
        "about": contents.about(names, optimizer),
        "groups": contents.groups_to_save(names, optimizer),
        "stateful": {key: s.state_dict() for key, s in (stateful or {}).items()},
        "extra": extra,
    }
    text = json.dumps({key: encode(value, key) for key, value in state.items()})
    return _Snapshot(tensors, text)


def _write(
    comm: Comm, directory: Path, step: int, taken: _Snapshot | Exception, keep: int | None
) -> Path:
    def usable() -> _Snapshot:
        if isinstance(taken, Exception):
            raise taken
        if taken.staged is not None:
            taken.staged.wait()
        return taken

    snapshot = together(comm, usable)
    aside = on_first(comm, lambda: folder.begin(directory, step))
    storage.write(snapshot.tensors, aside, step, snapshot.state, comm)
    if keep is not None and comm.rank == 0:
        folder.retain(directory, keep)
    return directory / f"step-{step}"
