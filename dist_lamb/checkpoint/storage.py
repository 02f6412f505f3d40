"""The interface to torch.distributed.checkpoint (DCP), which plans which rank writes or reads what.

DCP gets a flat dict {key: tensor}, where a tensor is a whole tensor, a DTensor or ``LocalBoxes``.
The files are written by :mod:`.files`, not by DCP's own writers, whose metadata is a pickle.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from ..sharding.comm import Comm, is_dtensor
from ..sharding.dtensors import local_of
from .errors import CheckpointError
from .files import (
    ALIGNMENT,
    MANIFEST,
    STATE,
    TENSORS,
    Chunk,
    DataFile,
    Entry,
    FileInfo,
    os_errors,
    write_index,
    write_manifest,
    write_text,
)
from .folder import discard, publish
from .fragments import Fragment
from .owner import check_claims
from .reading import Checkpoint


class LocalBoxes:
    """This rank's boxes of one tensor, by their offsets; has the methods that DCP calls."""

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, parts: Mapping[tuple[int, ...], Tensor]
    ) -> None:
        self._shape = shape
        self._properties = TensorProperties(dtype=dtype)
        self._parts = parts

    @staticmethod
    def of(fragment: Fragment) -> LocalBoxes:
        return LocalBoxes(fragment.shape, fragment.flat.dtype, fragment.parts)

    def size(self) -> torch.Size:
        return self._shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(offsets), part.shape)
            for offsets, part in self._parts.items()
        ]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, self._properties, self._shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._parts[tuple(index.offset)]


class _SavePlanner(DefaultSavePlanner):
    def __init__(self) -> None:
        super().__init__(
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
            # Of the replicas of a shard only the lowest rank's is written.
            dedup_save_to_lowest_rank=True,
        )

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        if isinstance(value, LocalBoxes):
            return value.__get_tensor_shard__(index)
        return super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        # Not DCP's own, which looks for meta tensors and replaces LocalBoxes by None.
        self.state_dict, self.metadata = state_dict, metadata
        self.original_state_dict, self.is_coordinator = state_dict, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        value = self.state_dict[index.fqn]
        if isinstance(value, LocalBoxes):
            return value.__get_tensor_shard__(index)
        tensor: Tensor = super().lookup_tensor(index)
        return tensor


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """A chunk that was written. Every chunk of a file holds the file's final size and checksum."""

    chunk: Chunk
    dtype: torch.dtype
    info: FileInfo


class _Writer(StorageWriter):
    """Writes this rank's chunks to one file; rank 0 then adds the other files and publishes."""

    def __init__(self, temporary: Path, step: int, world_size: int, state: str) -> None:
        self._temporary, self._step = temporary, step
        self._world_size, self._state = world_size, state

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [replace(plan, storage_data=f"rank-{i}.bin") for i, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name: str = plan.storage_data
        written = []
        if plan.items:
            path = self._temporary / name
            with os_errors(path), DataFile(path) as file:
                for item in plan.items:
                    t = planner.resolve_data(item)
                    assert isinstance(t, Tensor)
                    assert item.tensor_data is not None
                    box = item.tensor_data.chunk
                    offset = file.append(t)
                    chunk = Chunk(tuple(box.offsets), tuple(box.sizes), name, offset)
                    written.append((item.index, chunk, t.dtype, t.nbytes))
        done: Future[list[WriteResult]] = Future()
        done.set_result(
            [
                WriteResult(index, nbytes, _Stored(chunk, dtype, file.info))
                for index, chunk, dtype, nbytes in written
            ]
        )
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        chunks: dict[str, list[_Stored]] = {}
        files: dict[str, FileInfo] = {}
        for result in chain.from_iterable(results):
            stored: _Stored = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(stored)
            files[stored.chunk.file] = stored.info
        index = {
            key: Entry(
                stored_chunks[0].dtype,
                tuple(metadata.state_dict_metadata[key].size),  # type: ignore[union-attr]
                tuple(s.chunk for s in stored_chunks),
            )
            for key, stored_chunks in chunks.items()
        }
        with os_errors(self._temporary):
            files[TENSORS] = write_index(self._temporary / TENSORS, index)
            files[STATE] = write_text(self._temporary / STATE, self._state)
            write_manifest(self._temporary / MANIFEST, self._step, self._world_size, files)
        publish(self._temporary, self._step)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def write(tensors: dict[str, Any], temporary: Path, step: int, state: str, comm: Comm) -> None:
    """Write ``tensors`` and ``state`` (JSON) into ``temporary``, which becomes ``step-<step>``.

    A collective of ``comm``. If any rank fails, ``CheckpointError`` is raised on every rank and no
    checkpoint is created.
    """
    writer = _Writer(temporary, step, comm.world_size, state)
    try:
        with _dcp_errors(comm):
            dcp_save(
                _for_dcp(tensors),
                storage_writer=writer,
                planner=_SavePlanner(),
                **_ranks(comm),
            )
    except CheckpointError:
        if comm.rank == 0:
            discard(temporary)
            # A new owner removed the files that were being written.
            check_claims(temporary.parent)
        raise


@dataclass(frozen=True)
class Staged:
    """Copies in host memory of what a rank writes."""

    tensors: dict[str, Any]
    buffer: Tensor  # the memory of the copies
    copied: torch.cuda.Event | None  # recorded after the copies from a GPU

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


def stage(tensors: dict[str, Any], buffer: Tensor | None) -> Staged:
    """Copy what this rank has of ``tensors`` to host memory, to be written later.

    Copies from a GPU are queued on its current stream: after the present step and before the next
    one. ``buffer``, of an earlier call, is used again if it is large enough: the page faults of new
    memory cost more than the copy.
    """
    local = {key: t.flat if isinstance(t, Fragment) else local_of(t) for key, t in tensors.items()}
    on_gpu = any(t.is_cuda for t in local.values())
    starts, end = {}, 0
    for key, t in local.items():
        starts[key] = end
        end += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
    if buffer is None or buffer.numel() < end or (on_gpu and not buffer.is_pinned()):
        buffer = torch.empty(end, dtype=torch.uint8, device="cpu", pin_memory=on_gpu)
    copies: dict[str, Any] = {}
    with torch.no_grad():
        for key, t in local.items():
            raw = buffer[starts[key] : starts[key] + t.nbytes]
            copy = raw.view(t.dtype).view(t.shape)
            copy.copy_(t, non_blocking=True)
            whole = tensors[key]
            if isinstance(whole, Fragment):
                copies[key] = whole.with_flat(copy)
            elif is_dtensor(whole):
                # A rank outside the mesh has no coordinate, and holds nothing.
                if whole.device_mesh.get_coordinate() is not None:
                    chunks = whole.__create_chunk_list__()  # type: ignore[no-untyped-call]
                    parts = {tuple(c.offsets): copy for c in chunks}
                    copies[key] = LocalBoxes(whole.shape, whole.dtype, parts)
            else:
                copies[key] = copy
    copied = None
    if on_gpu:
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
    return Staged(copies, buffer, copied)


# --- reading -------------------------------------------------------------------------------------


class _Reader(StorageReader):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=entry.dtype),
                    torch.Size(entry.shape),
                    [
                        ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes))
                        for c in entry.chunks
                    ],
                )
                for key, entry in self._checkpoint.tensors.items()
            }
        )

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        chunks = {
            (key, c.offsets): c
            for key, entry in self._checkpoint.tensors.items()
            for c in entry.chunks
        }
        for item in plan.items:
            self._read(item, planner, chunks)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _read(
        self,
        item: ReadItem,
        planner: LoadPlanner,
        chunks: Mapping[tuple[str, tuple[int, ...]], Chunk],
    ) -> None:
        if not math.prod(item.lengths):
            return
        assert item.storage_index.offset is not None
        key = item.storage_index.fqn
        chunk = chunks[key, tuple(item.storage_index.offset)]
        target = planner.resolve_tensor(item).detach()
        target.copy_(self._checkpoint.read(key, chunk, item.storage_offsets, item.lengths))
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def read_into(tensors: dict[str, Any], checkpoint: Checkpoint, comm: Comm) -> None:
    """Overwrite ``tensors``, sharded in any way, with the saved ones of the same keys.

    A collective. Keys and shapes must match. Raises ``CheckpointError`` on every rank if any fails.
    """
    with _dcp_errors(comm):
        dcp_load(
            _for_dcp(tensors),
            storage_reader=_Reader(checkpoint),
            planner=_LoadPlanner(),
            **_ranks(comm),
        )


def _for_dcp(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {key: LocalBoxes.of(t) if isinstance(t, Fragment) else t for key, t in tensors.items()}


def _ranks(comm: Comm) -> dict[str, Any]:
    """One rank needs no group: it may be destroyed while a thread still writes."""
    return {"no_dist": True} if comm.world_size == 1 else {"process_group": comm.group}


@contextmanager
def _dcp_errors(comm: Comm) -> Iterator[None]:
    """Raise a ``CheckpointError`` instead of DCP's error, a BaseException with all tracebacks."""
    try:
        if comm.world_size > 1:
            yield
        else:
            with warnings.catch_warnings():
                # DCP warns that it does not use torch.distributed: correct on one process.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                yield
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        prefix = "" if isinstance(first, CheckpointError) else f"{type(first).__name__}: "
        raise CheckpointError(f"{prefix}{first} (on rank {rank})") from error
