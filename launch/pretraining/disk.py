"""Files that survive a crash, a lock that does not, and what this machine knows of files."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def locked(path: Path, say: Callable[[str], None]) -> Iterator[bool]:
    """Hold a lock that ends with its process, however that ends. (Process numbers tell nothing:
    in a container the next process may have the same.) False on a file system without locks."""
    with path.open("wb") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that holds {path}")
                fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
            held = False
        yield held


def write_synced(path: Path, parts: Iterable[bytes], also: Any = None) -> tuple[int, str]:
    """Write a file and sync it to disk; its size and SHA-256. ``also``: another hash to feed."""
    own, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
            size += len(part)
            for digest in (own, also) if also else (own,):
                digest.update(part)
        file.flush()
        os.fsync(file.fileno())
    return size, own.hexdigest()


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _notes(directory: Path) -> Path:
    """Where this machine, or container, keeps what it knows of the files in a folder."""
    of = hashlib.sha256(str(directory.resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"dist_lamb-{os.getuid()}", f"{of}.json")


def known_versions(directory: Path) -> Any:
    """What :func:`note_versions` was last given on this machine; None if it was not."""
    path = _notes(directory)
    try:
        # The file's owner could say that tokens were compared.
        return json.loads(path.read_bytes()) if path.stat().st_uid == os.getuid() else None
    except (OSError, ValueError):
        return None


def note_versions(directory: Path, versions: dict[str, list[int]]) -> None:
    """Note that the files in a folder were found in order, in these versions."""
    path = _notes(directory)
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        part.write_text(json.dumps(versions), encoding="utf-8")
        part.replace(path)
    except OSError:
        # Then the next start compares again, which costs time and nothing else.
        part.unlink(missing_ok=True)
