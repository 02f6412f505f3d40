"""The way to torch.distributed.checkpoint (DCP), which plans who writes and reads which box.

DCP sees a flat dict {key: tensor}, where a tensor is plain, a DTensor or pieces of a whole. What
it plans is stored by :mod:`.files` and not by DCP's own writers, whose metadata is a pickle.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
    Checkpoint,
    Chunk,
    DataFile,
    Entry,
    FileInfo,
    naming,
    write_index,
    write_manifest,
    write_text,
)
from .folder import discard, publish
from .fragments import Fragment


class Pieces:
    """Boxes of one whole tensor, by their offsets, in the form in which DCP takes them."""

    def __init__(
        self, shape: torch.Size, dtype: torch.dtype, parts: Mapping[tuple[int, ...], Tensor]
    ) -> None:
        self._shape = shape
        self._properties = TensorProperties(dtype=dtype)
        self._parts = parts

    @staticmethod
    def of(fragment: Fragment) -> Pieces:
        return Pieces(fragment.shape, fragment.flat.dtype, fragment.parts)

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
            # Replicas of a shard: the first writes.
            dedup_save_to_lowest_rank=True,
        )

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        if isinstance(found, Pieces):
            return found.__get_tensor_shard__(index)
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
        # Not DCP's, which would replace Pieces by None on its search for meta tensors.
        self.state_dict, self.metadata = state_dict, metadata
        self.original_state_dict, self.is_coordinator = state_dict, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        if isinstance(found, Pieces):
            return found.__get_tensor_shard__(index)
        tensor: Tensor = super().lookup_tensor(index)
        return tensor


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """Where a chunk went, and the file it is in, which every chunk of the file brings along."""

    chunk: Chunk
    dtype: torch.dtype
    info: FileInfo


class _Writer(StorageWriter):
    """Writes this rank's chunks to one file in ``aside``; rank 0 then completes the checkpoint."""

    def __init__(self, aside: Path, step: int, world_size: int, state: str) -> None:
        self._aside, self._step, self._world_size, self._state = aside, step, world_size, state

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
            path = self._aside / name
            with naming(path), DataFile(path) as file:
                for item in plan.items:
                    t = planner.resolve_data(item)
                    assert isinstance(t, Tensor)
                    assert item.tensor_data is not None
                    box = item.tensor_data.chunk
                    at = file.append(t)
                    chunk = Chunk(tuple(box.offsets), tuple(box.sizes), name, at)
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
        for result in (r for of_rank in results for r in of_rank):
            stored: _Stored = result.storage_data
            chunks.setdefault(result.index.fqn, []).append(stored)
            files[stored.chunk.file] = stored.info
        index = {
            key: Entry(
                found[0].dtype,
                tuple(metadata.state_dict_metadata[key].size),  # type: ignore[union-attr]
                tuple(s.chunk for s in found),
            )
            for key, found in chunks.items()
        }
        with naming(self._aside):
            files[TENSORS] = write_index(self._aside / TENSORS, index)
            files[STATE] = write_text(self._aside / STATE, self._state)
            write_manifest(self._aside / MANIFEST, self._step, self._world_size, files)
        publish(self._aside, self._step)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def write(tensors: dict[str, Any], aside: Path, step: int, state: str, comm: Comm) -> None:
    """Write ``tensors`` and ``state`` (JSON) into ``aside``, which becomes ``step-<step>``.

    A collective of ``comm``. Raises ``CheckpointError`` on every rank if any fails; no checkpoint
    has come into being then.
    """
    writer = _Writer(aside, step, comm.world_size, state)
    try:
        with _dcp_errors(comm):
            dcp_save(
                _for_dcp(tensors),
                storage_writer=writer,
                planner=_SavePlanner(),
                process_group=comm.group,
            )
    except CheckpointError:
        if comm.rank == 0:
            discard(aside)
        raise


@dataclass(frozen=True)
class Staged:
    """Copies on the host of what a rank writes."""

    tensors: dict[str, Any]
    buffer: Tensor  # which they lie in
    copied: torch.cuda.Event | None  # when a GPU has made them

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()


def stage(tensors: dict[str, Any], buffer: Tensor | None) -> Staged:
    """Copy what this rank would write of ``tensors``, to be written later.

    A GPU copies when its current stream gets there: after the step at hand and before the next
    one. ``buffer``, of an earlier call, is used again where it is large enough: the pages of new
    memory cost more than the copy.
    """
    local = {key: t.flat if isinstance(t, Fragment) else local_of(t) for key, t in tensors.items()}
    on_gpu = any(t.is_cuda for t in local.values())
    starts, end = {}, 0
    for key, t in local.items():
        starts[key] = end
        end += -(-t.nbytes // ALIGNMENT) * ALIGNMENT
    if buffer is None or buffer.numel() < end or (on_gpu and not buffer.is_pinned()):
        buffer = torch.empty(end, dtype=torch.uint8, pin_memory=on_gpu)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for key, t in local.items():
            raw = buffer[starts[key] : starts[key] + t.nbytes]
            copy = raw.view(t.dtype).view(t.shape)
            copy.copy_(t, non_blocking=True)
            whole = tensors[key]
            if isinstance(whole, Fragment):
                found[key] = whole.elsewhere(copy)
            elif is_dtensor(whole):
                # No coordinate: a rank outside the mesh, which holds nothing.
                if whole.device_mesh.get_coordinate() is not None:
                    parts = {tuple(c.offsets): copy for c in whole.__create_chunk_list__()}
                    found[key] = Pieces(whole.shape, whole.dtype, parts)
            else:
                found[key] = copy
    copied = None
    if on_gpu:
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()
    return Staged(found, buffer, copied)


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
    """Overwrite ``tensors``, however they are cut, with those of the same keys; a collective.

    The keys and shapes must fit. Raises ``CheckpointError`` on every rank if any fails.
    """
    with _dcp_errors(comm):
        dcp_load(
            _for_dcp(tensors),
            storage_reader=_Reader(checkpoint),
            planner=_LoadPlanner(),
            process_group=comm.group,
        )


def _for_dcp(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return {key: Pieces.of(t) if isinstance(t, Fragment) else t for key, t in tensors.items()}


@contextmanager
def _dcp_errors(comm: Comm) -> Iterator[None]:
    """DCP's exception, a BaseException with a traceback of every rank, as one of ours."""
    try:
        if comm.group is not None:
            yield
        else:
            with warnings.catch_warnings():
                # It warns that torch.distributed is not there, which is no news here.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")
                yield
    except CheckpointException as error:
        rank, (first, _) = min(error.failures.items(), key=lambda item: item[0])
        kind = "" if isinstance(first, CheckpointError) else f"{type(first).__name__}: "
        raise CheckpointError(f"{kind}{first} (on rank {rank})") from error
