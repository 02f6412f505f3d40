"""The files of one checkpoint: their format, and writing them.

::

    step-100/manifest.json    format, step, world size; bytes and SHA-256 of every other file
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
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .json_codec import DTYPE_NAMES, memory_of

FORMAT = "dist_lamb"
#: Counted up when older programs could not read, or would misread, what is written.
VERSION = 1
#: The oldest that is still read.
OLDEST_VERSION = 1
MANIFEST, TENSORS, STATE = "manifest.json", "tensors.json", "state.json"
#: Chunks start at multiples of this, so that a file can be mapped and read in place.
ALIGNMENT = 64

#: A step as the name of a folder has it: one way to write each number.
STEP_NAME = re.compile(r"step-(0|[1-9][0-9]{0,17})")
MAX_STEP = 10**18

FILE_NAME = re.compile(r"rank-(0|[1-9][0-9]{0,8})\.bin|tensors\.json|state\.json")


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


def check_step(step: object) -> None:
    """Raise ``CheckpointError`` for what no checkpoint can have as its step."""
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < MAX_STEP:
        raise CheckpointError(f"step must be an integer >= 0 and < {MAX_STEP}, got {step!r}")


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise a ``CheckpointError`` that names the file instead of an OSError."""
    try:
        yield
    except OSError as error:
        file = Path(error.filename) if isinstance(error.filename, str) else path
        raise CheckpointError(f"{file}: {error.strerror or error}") from error


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
    write_text(path, json.dumps({**content, "sha256": manifest_digest(content)}, indent=1))


def manifest_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync_folder(path: Path) -> None:
    """Sync a folder's entries to disk; without it a power failure may lose whole files."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
