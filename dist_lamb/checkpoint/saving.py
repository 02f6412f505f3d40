"""Writing checkpoints, in the foreground or in a background thread."""

from __future__ import annotations

import atexit
import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..base import LambBase
from ..sharded import ShardedLamb
from ..sharding.comm import Comm, ProcessGroup, host_comm, is_dtensor
from ..sharding.dtensors import num_pieces
from . import folder, schema, storage
from . import rng as rng_states
from .collective_try import collective_try, on_rank_zero
from .errors import CheckpointError
from .files import check_step
from .fragments import Fragment
from .json_codec import encode


class Stateful(Protocol):
    """An object whose state is saved: an lr schedule, a GradScaler, a data loader."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class _Snapshot:
    """Everything to be written: tensors or, with ``staged``, copies of them; the rest as JSON."""

    tensors: dict[str, Any]
    state: str
    staged: storage.Staged | None = None


class Pending:
    """A checkpoint that is being written in the background."""

    def __init__(self, work: Future[Path]) -> None:
        self._work = work

    def done(self) -> bool:
        """Whether it is written, or failed, on this rank; other ranks may differ."""
        return self._work.done()

    def wait(self) -> Path:
        """Wait until it is written; its folder. Raises ``CheckpointError`` if it failed."""
        global _pending
        if _pending is self:
            _pending = None  # its error is raised once
        return self._work.result()


# One thread for all saves: starting a thread takes longer than submitting work to it. The
# interpreter waits for it at exit, so the last checkpoint is not left incomplete.
_executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dist_lamb.checkpoint")
_pending: Pending | None = None
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
        directory: of all checkpoints of a run, on a filesystem that all ranks share.
        step: the number of completed steps.
        model: its parameters and buffers, by their names in ``model.state_dict()``.
        optimizer: a :class:`dist_lamb.Lamb` or :class:`dist_lamb.ShardedLamb` of this model: its
            moments, masters, step counts, and the options of its groups.
        stateful: {name: object}, e.g. the lr schedule, a GradScaler, the data loader. Their
            ``state_dict()`` may hold what ``extra`` may. Rank 0's is saved.
        extra: numbers, text, bytes and small tensors, and lists, tuples and dicts of them, e.g.
            ``{"tokens_seen": n}``. Rank 0's is saved.
        rng: save the random number generators (torch, CUDA, Python, NumPy) of every rank.
        keep: how many checkpoints of this and earlier steps to keep; older ones are removed. Later
            steps are not touched: a warning names them.
        process_group: the ranks that train this model; default all.

    Returns the checkpoint's folder. After a crash it is complete and on disk, or absent.

    The process of rank 0 is the only writer of ``directory`` until it ends: see :func:`claim`.

    Raises:
        CheckpointError: on every rank, if any fails: naming a file that cannot be written, a value
            that cannot be saved, a step that exists already, or another process that writes to
            ``directory``. Or an earlier :func:`save_async` failed; then nothing is written.
    """
    wait()
    comm = host_comm(process_group)
    result = _result_or_error(
        lambda: _snapshot(comm, step, model, optimizer, stateful, extra, rng, keep)
    )
    return _write(comm, Path(directory), step, result, keep)


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
    """As :func:`save`, but writes a copy in host memory from a background thread.

    Returns when the copy is made or, from a GPU, queued on the current stream. A ``process_group``
    must be one that nothing else uses, preferably gloo: the thread communicates over it. One
    checkpoint is written at a time: this first waits for the one before, and raises its error. Call
    :func:`wait` before the process group is destroyed. The memory of the copy, pinned if it is from
    a GPU, is kept for the next one.
    """
    global _pending
    if process_group is not None and _used_by(optimizer, process_group):
        raise ValueError("save_async needs a process_group of its own; make one by new_group()")
    wait()
    # Now: the process may be elsewhere when the thread comes to write.
    folder_of_all = Path(directory).absolute()
    comm = host_comm(process_group)

    def staged_snapshot() -> _Snapshot:
        global _buffer
        snapshot = _snapshot(comm, step, model, optimizer, stateful, extra, rng, keep)
        staged = storage.stage(snapshot.tensors, _buffer)
        _buffer = staged.buffer
        return _Snapshot(staged.tensors, snapshot.state, staged)

    # Not raised here: an error on this rank alone would leave the threads of the others waiting.
    result = _result_or_error(staged_snapshot)

    def write() -> Path:
        try:
            return _write(comm, folder_of_all, step, result, keep)
        except CheckpointError:
            raise
        except Exception as error:
            text = f"{error} (before its process group is destroyed, wait() for a save_async())"
            raise CheckpointError(text) from error

    _pending = Pending(_executor.submit(write))
    return _pending


def wait() -> None:
    """Wait for the last :func:`save_async`. Raises ``CheckpointError``, once, if it failed."""
    if _pending is not None:
        _pending.wait()


@atexit.register
def _say_what_failed() -> None:
    """Nobody may have waited for the last :func:`save_async`. (Its thread has ended by now.)"""
    if _pending is not None and _pending.done():
        try:
            wait()
        except CheckpointError as error:
            print(f"dist_lamb: the last save_async() failed: {error}", file=sys.stderr)


def _used_by(optimizer: LambBase | None, group: ProcessGroup) -> bool:
    return isinstance(optimizer, ShardedLamb) and optimizer.process_group is group


def _result_or_error(take: Callable[[], _Snapshot]) -> _Snapshot | Exception:
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
    check_step(step)
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise CheckpointError(f"keep must be None or an integer >= 1, got {keep!r}")
    if optimizer is not None:
        try:
            optimizer.refuse_broken()
        except RuntimeError as error:  # it would be taken for the latest one
            raise CheckpointError(str(error)) from None
    names = schema.Names(model, optimizer)
    tensors = schema.tensors_to_save(names, optimizer)
    pieces = {key: num_pieces(t) for key, t in tensors.items() if is_dtensor(t)}
    if isinstance(optimizer, ShardedLamb):
        pieces["the optimizer's state"] = optimizer._comm.world_size
    for what, ranks in pieces.items():
        if ranks > comm.world_size:  # else a part would be written, and only loading would tell
            raise CheckpointError(
                f"{what} is cut over {ranks} ranks, but process_group has {comm.world_size}"
            )
    if comm.rank:
        # Rank 0 writes what is the same on every rank.
        tensors = {k: t for k, t in tensors.items() if isinstance(t, Fragment) or is_dtensor(t)}
    if rng:
        device = schema.device_of(names)
        tensors["rng"] = rng_states.to_save(comm.rank, comm.world_size, device)
    for key, target in (stateful or {}).items():
        if not callable(getattr(target, "state_dict", None)):
            kind = type(target).__name__
            raise CheckpointError(f"stateful {key!r} is of type {kind}, which has no state_dict()")
    state = {
        "about": schema.about(names, optimizer),
        "groups": schema.groups_to_save(names, optimizer),
        "stateful": {key: s.state_dict() for key, s in (stateful or {}).items()},
        "extra": extra,
    }
    text = json.dumps({key: encode(value, key) for key, value in state.items()})
    return _Snapshot(tensors, text)


def _write(
    comm: Comm, directory: Path, step: int, result: _Snapshot | Exception, keep: int | None
) -> Path:
    def completed() -> _Snapshot:
        if isinstance(result, Exception):
            raise result
        if result.staged is not None:
            result.staged.wait()
        return result

    snapshot = collective_try(comm, completed)
    steps = sorted(set(comm.gather_objects(step)))
    if len(steps) > 1:
        raise CheckpointError(f"the ranks save different steps: {steps}")
    temporary = on_rank_zero(comm, lambda: folder.create_temporary(directory, step))
    storage.write(snapshot.tensors, temporary, step, snapshot.state, comm)
    if keep is not None and comm.rank == 0:
        folder.retain(directory, step, keep)
    return temporary.with_name(f"step-{step}")  # where rank 0 has it
