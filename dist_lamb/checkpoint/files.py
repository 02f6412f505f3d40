"""The files of one checkpoint: format, writing, reading and checksums.

::

    step-100/manifest.json    step, world size; bytes and SHA-256 of every other file
             tensors.json     {key: {dtype, shape, chunks: [{offsets, sizes, file, at}]}}
             state.json       everything but tensors
             rank-0.bin ...   the elements of the chunks that rank 0 wrote: row-major,
                              little-endian, each chunk from byte ``at`` on

A chunk is a box of a tensor. Nothing is pickled, and no file name can refer to another folder, so
opening an untrusted checkpoint is safe.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .json_codec import DTYPE_NAMES, DTYPES, decode, memory_of

FORMAT = "dist_lamb"
VERSION = 1
MANIFEST, TENSORS, STATE = "manifest.json", "tensors.json", "state.json"
#: Chunks start at multiples of this, so that a file can be mapped and read in place.
ALIGNMENT = 64

#: A step as the name of a folder has it: one way to write each number.
STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
MAX_STEP = 10**18

_NAME = re.compile(r"rank-(0|[1-9][0-9]{0,8})\.bin|tensors\.json|state\.json")


@dataclass(frozen=True)
class FileInfo:
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, and the file and byte offset of its elements."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    at: int


@dataclass(frozen=True)
class Entry:
    """A whole tensor, which its chunks cover."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise a ``CheckpointError`` that names the file instead of an OSError."""
    try:
        yield
    except OSError as error:
        file = Path(error.filename) if isinstance(error.filename, str) else path
        raise CheckpointError(f"{file}: {error.strerror or error}") from error


# --- writing -------------------------------------------------------------------------------------


class DataFile:
    """A new file to which tensors are appended; at the end of the context it is synced to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> DataFile:
        # Unbuffered: tensors are written without a copy, and an error is raised at once.
        self._file = self.path.open("xb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._nbytes = 0
        return self

    def append(self, t: Tensor) -> int:
        """Write the elements of ``t``, row-major; returns the byte offset of the first."""
        self._write(memoryview(bytes(-self._nbytes % ALIGNMENT)))
        offset = self._nbytes
        elements = t.detach().cpu().contiguous()
        self._write(memory_of(elements))
        return offset

    def text(self, text: str) -> None:
        self._write(memoryview(text.encode()))

    def _write(self, data: memoryview) -> None:
        self._sha256.update(data)
        self._nbytes += len(data)
        while len(data):
            data = data[self._file.write(data) :]

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:
            if error is None:
                os.fsync(self._file.fileno())

    @property
    def info(self) -> FileInfo:
        return FileInfo(self._nbytes, self._sha256.hexdigest())


def write_text(path: Path, text: str) -> FileInfo:
    with DataFile(path) as file:
        file.text(text)
    return file.info


def write_index(path: Path, tensors: Mapping[str, Entry]) -> FileInfo:
    content = {
        key: {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": entry.shape,
            "chunks": [asdict(chunk) for chunk in entry.chunks],
        }
        for key, entry in sorted(tensors.items())
    }
    return write_text(path, json.dumps(content))


def write_manifest(path: Path, step: int, world_size: int, files: Mapping[str, FileInfo]) -> None:
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "world_size": world_size,
        "torch": torch.__version__,
        "byteorder": sys.byteorder,
        "files": {name: asdict(info) for name, info in sorted(files.items())},
    }
    write_text(path, json.dumps({**content, "sha256": _digest(content)}, indent=1))


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync_folder(path: Path) -> None:
    """Sync a folder's entries to disk; without it a power failure may lose whole files."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- reading -------------------------------------------------------------------------------------


class Checkpoint:
    """A checkpoint on disk, opened for reading.

    Raises:
        CheckpointError: not a checkpoint, or a damaged one, naming the file. Data files are
            checked by :meth:`verify` only.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        manifest = _json(self.path / MANIFEST, _read(self.path / MANIFEST))
        try:
            format_name, version, order = (manifest[k] for k in ("format", "version", "byteorder"))
            digest = manifest.pop("sha256")
            self.step = int(manifest["step"])
            self.world_size = int(manifest["world_size"])
            self.torch_version = str(manifest["torch"])
            self.files = {
                str(name): FileInfo(int(f["nbytes"]), str(f["sha256"]))
                for name, f in manifest["files"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise CheckpointError(f"{self.path / MANIFEST}: not a checkpoint's manifest") from None
        if format_name != FORMAT or version != VERSION:
            raise CheckpointError(
                f"{self.path / MANIFEST}: format {format_name} {version}; "
                f"this program reads {FORMAT} {VERSION}"
            )
        if digest != _digest(manifest):
            raise CheckpointError(f"{self.path / MANIFEST}: damaged: its SHA-256 does not match")
        if order != sys.byteorder:
            raise CheckpointError(f"{self.path}: written on a {order}-endian machine")
        for name in self.files:
            if not _NAME.fullmatch(name):
                raise CheckpointError(
                    f"{self.path / MANIFEST}: {name!r} is no file of a checkpoint"
                )
        self.tensors: Mapping[str, Entry] = self._index()

    def _index(self) -> dict[str, Entry]:
        content = _json(self.path / TENSORS, self._verified(TENSORS))
        entries = {}
        for key, value in content.items():
            try:
                chunks = tuple(
                    Chunk(
                        _ints(c["offsets"]),
                        _ints(c["sizes"]),
                        str(c["file"]),
                        *_ints([c["at"]]),
                    )
                    for c in value["chunks"]
                )
                entry = Entry(DTYPES[value["dtype"]], _ints(value["shape"]), chunks)
            except (KeyError, TypeError, ValueError):
                raise CheckpointError(f"{self.path / TENSORS}: {key}: not understood") from None
            self._check(key, entry)
            entries[key] = entry
        return entries

    def _check(self, key: str, entry: Entry) -> None:
        for c in entry.chunks:
            inside = len(c.offsets) == len(c.sizes) == len(entry.shape) and all(
                o + n <= size for o, n, size in zip(c.offsets, c.sizes, entry.shape)
            )
            end = c.at + math.prod(c.sizes) * entry.dtype.itemsize
            if not inside or c.file not in self.files or end > self.files[c.file].nbytes:
                raise CheckpointError(f"{self.path / TENSORS}: {key}: chunk {c} cannot be")
        if sum(math.prod(c.sizes) for c in entry.chunks) != math.prod(entry.shape):
            raise CheckpointError(f"{self.path / TENSORS}: {key}: its chunks do not cover it")

    @cached_property
    def state(self) -> dict[str, Any]:
        """Everything but tensors: ``about``, ``groups``, ``stateful``, ``extra``."""
        path = self.path / STATE
        content = _json(path, self._verified(STATE))
        try:
            return {str(key): decode(value) for key, value in content.items()}
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None

    @property
    def extra(self) -> Any:
        """The argument ``extra`` of :func:`save`."""
        return self.state.get("extra")

    def _verified(self, name: str) -> bytes:
        data = _read(self.path / name)
        self._compare(name, len(data), hashlib.sha256(data).hexdigest())
        return data

    def _compare(self, name: str, nbytes: int, sha256: str) -> None:
        if name not in self.files:
            raise CheckpointError(f"{self.path / MANIFEST}: {name} is not in it")
        expected = self.files[name]
        if nbytes != expected.nbytes:
            raise CheckpointError(
                f"{self.path / name}: damaged: {nbytes} bytes, {expected.nbytes} were written"
            )
        if sha256 != expected.sha256:
            raise CheckpointError(
                f"{self.path / name}: damaged: its SHA-256 is not that of what was written"
            )

    def verify(self, rank: int = 0, world_size: int = 1) -> None:
        """Compare every ``world_size``-th file, from the ``rank``-th on, with its checksum.

        Raises ``CheckpointError`` naming the first that is missing, truncated or changed.
        """
        for name in sorted(self.files)[rank::world_size]:
            path = self.path / name
            with open_file(path) as file, os_errors(path):
                nbytes = os.fstat(file.fileno()).st_size
                self._compare(name, nbytes, hashlib.file_digest(file, "sha256").hexdigest())

    def read(self, key: str, chunk: Chunk, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of ``sizes`` at ``offsets`` within a chunk, on the CPU."""
        path, dtype = self.path / chunk.file, self.tensors[key].dtype
        rows = tuple(sizes[:1]) + chunk.sizes[1:]
        box = torch.empty(rows, dtype=dtype)
        # Whole rows are read, and none before the first or after the last that is needed.
        first = offsets[0] * math.prod(chunk.sizes[1:]) if sizes else 0
        with open_file(path) as file, os_errors(path):
            file.seek(chunk.at + first * dtype.itemsize)
            rest = memory_of(box)
            while len(rest):  # a system call moves 2 GiB at most
                count = file.readinto(rest)
                if not count:
                    raise CheckpointError(f"{path}: damaged: it ends early")
                rest = rest[count:]
        for dim in range(1, len(sizes)):
            box = box.narrow(dim, offsets[dim], sizes[dim])
        return box

    def tensor(self, key: str) -> Tensor:
        """A whole tensor, on the CPU.

        Raises ``CheckpointError`` if no tensor has that name.
        """
        if key not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {key}")
        entry = self.tensors[key]
        whole = torch.empty(entry.shape, dtype=entry.dtype)
        for c in entry.chunks:
            box = whole[tuple(slice(o, o + n) for o, n in zip(c.offsets, c.sizes))]
            box.copy_(self.read(key, c, [0] * len(c.sizes), c.sizes))
        return whole


def open_file(path: Path) -> io.FileIO:
    """A regular file, opened for reading. Links are refused: they may point to other folders."""
    try:
        # Without O_NONBLOCK opening a pipe would block forever.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "is a link" if error.errno == errno.ELOOP else error.strerror
        raise CheckpointError(f"{path}: {reason}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(f"{path}: is no file")
    return io.FileIO(fd, "rb")


def _read(path: Path) -> bytes:
    with open_file(path) as file, os_errors(path):
        return file.read()


def _json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: damaged: not valid JSON") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: damaged: not a JSON object")
    return content


def _ints(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and v >= 0 for v in values):
        raise ValueError
    return tuple(values)
