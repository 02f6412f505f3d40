"""Reading a checkpoint that may be damaged, or made to do harm.

Everything that its files say is checked before anything is made of it: kinds and limits of values,
sizes against the file system, and that the chunks of a tensor are disjoint and cover it.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import CheckpointError
from .files import (
    FILE_NAME,
    FORMAT,
    MANIFEST,
    MAX_STEP,
    OLDEST_VERSION,
    STATE,
    STEP_NAME,
    TENSORS,
    VERSION,
    Chunk,
    Entry,
    FileInfo,
    manifest_digest,
    open_file,
    os_errors,
)
from .fragments import are_disjoint
from .json_codec import DTYPES, decode, memory_of, parse, text_of

#: Larger ones are not read: parsed they take ten times as much memory.
MAX_JSON_NBYTES = 2**28
#: What torch can make: dims, and elements even if one of the sizes were not 0.
_MAX_NDIM, _MAX_NUMEL = 64, 2**62

T = TypeVar("T")


class Checkpoint:
    """A checkpoint on disk, opened for reading.

    Raises:
        CheckpointError: not a checkpoint, one of another format, or a damaged one, naming the file.
            The elements of tensors are compared with checksums by :meth:`verify` only.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = self._manifest()
        self.step = _integer(manifest, "step", MAX_STEP)
        self.world_size = _integer(manifest, "world_size", 2**31)
        self.torch_version = text_of(manifest["torch"])
        self.files = {
            name: FileInfo(_integer(f, "nbytes", 2**63), text_of(f["sha256"]))
            for name, f in manifest["files"].items()
        }
        name = STEP_NAME.fullmatch(self.path.name)
        if name and int(name[1]) != self.step:
            raise CheckpointError(
                f"{self.path}: holds step {self.step}; rename the folder to step-{self.step}, or "
                "to a name of another kind"
            )
        self.tensors: Mapping[str, Entry] = self._index()

    def _manifest(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        with open_file(path) as file, os_errors(path):
            content = _json(path, file)
        found, version = content.get("format"), content.get("version")
        if found != FORMAT or type(version) is not int:
            raise CheckpointError(f"{path}: not a checkpoint's manifest")
        if not OLDEST_VERSION <= version <= VERSION:
            age = "a newer" if version > VERSION else "an older"
            raise CheckpointError(
                f"{path}: format {version}, of {age} dist_lamb; this one reads formats "
                f"{OLDEST_VERSION} to {VERSION}"
            )
        try:
            _check_manifest(content)
        except _NOT_UNDERSTOOD as error:
            raise CheckpointError(f"{path}: not a checkpoint's manifest: {error}") from None
        if content.pop("sha256") != manifest_digest(content):
            raise CheckpointError(f"{path}: damaged: its SHA-256 does not match")
        if content["byteorder"] != sys.byteorder:
            raise CheckpointError(
                f"{self.path}: written on a {content['byteorder']}-endian machine"
            )
        for name in content["files"]:
            if not FILE_NAME.fullmatch(name):
                raise CheckpointError(f"{path}: {name!r} is no file of a checkpoint")
        return content

    def _index(self) -> dict[str, Entry]:
        path = self.path / TENSORS
        entries = {}
        for key, value in self._verified_json(TENSORS).items():
            try:
                entries[text_of(key)] = _entry(value)
            except _NOT_UNDERSTOOD as error:
                raise CheckpointError(f"{path}: {key}: not understood: {error}") from None
            self._check(key, entries[key])
        self._check_ranges(entries)
        return entries

    def _check(self, key: str, entry: Entry) -> None:
        where = f"{self.path / TENSORS}: {key}"
        for c in entry.chunks:
            inside = len(c.offsets) == len(c.sizes) == len(entry.shape) and all(
                o + n <= size for o, n, size in zip(c.offsets, c.sizes, entry.shape)
            )
            if not inside or c.file not in self.files or _end(entry, c) > self.files[c.file].nbytes:
                raise CheckpointError(f"{where}: chunk {c} cannot be")
        if sum(math.prod(c.sizes) for c in entry.chunks) != math.prod(entry.shape):
            raise CheckpointError(f"{where}: its chunks do not cover it")
        if not are_disjoint([(c.offsets, c.sizes) for c in entry.chunks]):
            raise CheckpointError(f"{where}: its chunks do not cover it: some overlap")

    def _check_ranges(self, entries: Mapping[str, Entry]) -> None:
        """No two chunks share a byte of a file."""
        ranges = sorted(
            (c.file, c.at, _end(entry, c), key)
            for key, entry in entries.items()
            for c in entry.chunks
            if math.prod(c.sizes)
        )
        for (file, _, end, one), (other_file, start, _, other) in pairwise(ranges):
            if file == other_file and start < end:
                raise CheckpointError(
                    f"{self.path / TENSORS}: chunks of {one} and {other} share bytes of {file}"
                )

    @cached_property
    def state(self) -> dict[str, Any]:
        """Everything but tensors: ``about``, ``groups``, ``stateful``, ``extra``."""
        path = self.path / STATE
        content = self._verified_json(STATE)
        try:
            state = {text_of(key): decode(value) for key, value in content.items()}
            _check_state(state)
        except (CheckpointError, *_NOT_UNDERSTOOD) as error:
            raise CheckpointError(f"{path}: {error}") from None
        return state

    @property
    def extra(self) -> Any:
        """The argument ``extra`` of :func:`save`."""
        return self.state["extra"]

    @contextmanager
    def _opened(self, name: str) -> Iterator[io.FileIO]:
        """One of the files, which has the size that was written."""
        path = self.path / name
        if name not in self.files:
            raise CheckpointError(f"{self.path / MANIFEST}: {name} is not in it")
        with open_file(path) as file, os_errors(path):
            self._compare_size(name, os.fstat(file.fileno()).st_size)
            yield file

    def _compare_size(self, name: str, nbytes: int) -> None:
        expected = self.files[name].nbytes
        if nbytes != expected:
            raise CheckpointError(
                f"{self.path / name}: damaged: {nbytes} bytes, {expected} were written"
            )

    def _compare_digest(self, name: str, sha256: str) -> None:
        if sha256 != self.files[name].sha256:
            raise CheckpointError(
                f"{self.path / name}: damaged: its SHA-256 is not that of what was written"
            )

    def _verified_json(self, name: str) -> dict[str, Any]:
        with self._opened(name) as file:
            digest = hashlib.file_digest(file, "sha256")
            self._compare_digest(name, digest.hexdigest())
            file.seek(0)
            return _json(self.path / name, file)

    def check_sizes(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare the size of every ``world_size``-th file, from the ``rank``-th on, with what was
        written. Raises ``CheckpointError`` naming the first that is missing or differs.
        """
        for name in sorted(self.files)[rank::world_size]:
            self._check_size(name)

    def _check_size(self, name: str) -> None:
        path = self.path / name
        with os_errors(path):
            found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path}: is no file of its own")
        self._compare_size(name, found.st_size)

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare every ``world_size``-th file, from the ``rank``-th on, with its checksum.

        Raises ``CheckpointError`` naming the first that is missing, truncated or changed.
        """
        self.check_sizes(rank, world_size)
        for name in sorted(self.files)[rank::world_size]:
            with self._opened(name) as file:
                digest = hashlib.file_digest(file, "sha256")
                self._compare_digest(name, digest.hexdigest())

    def read(self, key: str, chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of ``sizes`` at ``offsets`` within a chunk, on the CPU."""
        dtype = self.tensors[key].dtype
        rows = tuple(sizes[:1]) + chunk.sizes[1:]
        # Whole rows are read, and none before the first or after the last that is needed.
        first = offsets[0] * math.prod(chunk.sizes[1:]) if sizes else 0
        with self._opened(chunk.file) as file:
            box = torch.empty(rows, dtype=dtype, device="cpu")
            file.seek(chunk.at + first * dtype.itemsize)
            rest = memory_of(box)
            while len(rest):  # a system call moves 2 GiB at most
                count = file.readinto(rest)
                if not count:
                    raise CheckpointError(f"{self.path / chunk.file}: damaged: it ends early")
                rest = rest[count:]
        for dim in range(1, len(sizes)):
            box = box.narrow(dim, offsets[dim], sizes[dim])
        return box

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, on the CPU.

        Raises ``CheckpointError`` if no tensor has that name.
        """
        entry = self._entry_of(key)
        return self.region(key, [0] * len(entry.shape), entry.shape)

    def region(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of ``sizes`` at ``offsets`` of a tensor, on the CPU."""
        entry = self._entry_of(key)
        parts = []
        for c in entry.chunks:
            start = [max(a, b) for a, b in zip(offsets, c.offsets)]
            stop = [min(a + m, b + n) for a, m, b, n in zip(offsets, sizes, c.offsets, c.sizes)]
            if all(a < b for a, b in zip(start, stop)):
                parts.append((c, start, [b - a for a, b in zip(start, stop)]))
        # Before there is memory for all of it.
        for name in sorted({c.file for c, _, _ in parts}):
            self._check_size(name)
        region = torch.empty(tuple(sizes), dtype=entry.dtype, device="cpu")
        missing = region.numel()
        for c, start, n in parts:
            box = region[tuple(slice(a - o, a - o + k) for a, o, k in zip(start, offsets, n))]
            box.copy_(self.read(key, c, [a - b for a, b in zip(start, c.offsets)], n))
            missing -= box.numel()
        assert not missing, f"{missing} elements of {key} were not read"
        return region

    def _entry_of(self, key: str) -> Entry:
        if key not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {key}")
        return self.tensors[key]


#: What checks raise about values of the wrong kind.
_NOT_UNDERSTOOD = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def _json(path: Path, file: io.FileIO) -> dict[str, Any]:
    if os.fstat(file.fileno()).st_size > MAX_JSON_NBYTES:
        raise CheckpointError(f"{path}: damaged: larger than {MAX_JSON_NBYTES} bytes")
    try:
        content = parse(file.read())
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged: not valid JSON") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object")
    return content


def _kind(value: Any, kind: type[T], what: str) -> T:
    if type(value) is not kind:
        raise TypeError(f"{what} is a {type(value).__name__}, not a {kind.__name__}")
    return value


def _integer(values: Mapping[str, Any], name: str, limit: int) -> int:
    value = _kind(values[name], int, name)
    if not 0 <= value < limit:
        raise ValueError(f"{name} is not in [0, {limit})")
    return value


def _check_manifest(content: Mapping[str, Any]) -> None:
    kinds: dict[str, type[Any]] = {"torch": str, "byteorder": str, "sha256": str, "files": dict}
    known = {"format", "version", "step", "world_size", *kinds}
    if content.keys() != known:
        raise ValueError(f"it has {sorted(content)}, not {sorted(known)}")
    for name, kind in kinds.items():
        _kind(content[name], kind, name)
    _integer(content, "step", MAX_STEP)
    _integer(content, "world_size", 2**31)
    text_of(content["torch"])
    for name, info in content["files"].items():
        _kind(info, dict, name)
        if info.keys() != {"nbytes", "sha256"}:
            raise ValueError(f"{name} has {sorted(info)}")
        _integer(info, "nbytes", 2**63)
        _kind(info["sha256"], str, "sha256")


def _entry(value: Any) -> Entry:
    _kind(value, dict, "it")
    shape = _ints(value["shape"])
    if len(shape) > _MAX_NDIM or math.prod(max(1, n) for n in shape) > _MAX_NUMEL:
        raise ValueError("no tensor can have its shape")
    chunks = tuple(
        Chunk(
            _ints(_kind(c, dict, "a chunk")["offsets"]),
            _ints(c["sizes"]),
            _kind(c["file"], str, "file"),
            *_ints([c["at"]]),
        )
        for c in _kind(value["chunks"], list, "chunks")
    )
    return Entry(DTYPES[_kind(value["dtype"], str, "dtype")], shape, chunks)


def _end(entry: Entry, chunk: Chunk) -> int:
    return chunk.at + math.prod(chunk.sizes) * entry.dtype.itemsize


def _ints(values: Any) -> tuple[int, ...]:
    if type(values) is not list or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError("integers >= 0 expected")
    return tuple(values)


def _check_state(state: Mapping[str, Any]) -> None:
    about = _kind(state["about"], dict, "about")
    _kind(about["engine"], str, "engine")
    if "stage" in about:
        _kind(about["stage"], int, "stage")
    names: set[str] = set()
    for i, group in enumerate(_kind(state["groups"], list, "groups")):
        where = f"group {i}"
        _kind(group, dict, where)
        for key in group:
            _kind(key, str, f"{where}: a key")
        for name in _kind(group["params"], list, f"params of {where}"):
            if _kind(name, str, f"a param of {where}") in names:
                raise ValueError(f"{name} is in two groups")
            names.add(name)
    for key in _kind(state["stateful"], dict, "stateful"):
        _kind(key, str, "a key of stateful")
    if "extra" not in state:
        raise KeyError("extra")
