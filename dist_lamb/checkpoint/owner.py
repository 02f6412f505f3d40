"""One writer of a folder at a time: who it is, whether it lives, and who may take over.

The owner's file is ``.owner-<n>``, of several the one with the highest number. It begins with a
count, its beat, that a thread of the owner raises for as long as the process lives. A newcomer
reads it again and again: it is refused if the count moves, and takes over, with the file of the
next number, if the count stands still. It need not wait for that if both are attempts of one
torchrun job, or if the owner ran on this very kernel, its lock on the file is free, and no torchrun
starts it again: between two attempts of a job the folder is the job's. Host names
and process numbers are in the file for error messages alone: containers repeat both, and clocks
jump.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
import warnings
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path

from .errors import CheckpointError
from .files import open_file, os_errors

#: Seconds from one beat to the next, and from one look at another owner's beat to the next.
BEAT_SECONDS = 1.0
#: After so many looks at a beat that stands still its owner counts as dead. A process that is
#: stopped with its owner does not look either, so no clock decides.
PATIENCE = 60

_NAME = re.compile(r"\.owner-([1-9][0-9]{0,17})")
_BEAT_DIGITS = 20
#: Owner's files are shorter; of something else no more is read.
_MAX_NBYTES = 4096


class Owner:
    """This process as the one writer of a folder, until it ends or :meth:`release`."""

    def __init__(self, directory: Path, number: int, fd: int, about: bytes) -> None:
        self.directory = directory
        self._number, self._about = number, about
        self._fd: int | None = fd
        self._beats = 0
        self._file_lock = threading.Lock()

    def problem(self) -> str | None:
        """Who owns the folder now, if not this process."""
        found = _current(self.directory)
        if found is None:
            return f"{self.directory}: the file .owner-{self._number} of this process is gone"
        number, content = found
        if number == self._number and content[_BEAT_DIGITS:] == self._about:
            return None
        return (
            f"{self.directory}: {_who(content)} has taken over, since this process gave no sign of "
            "life"
        )

    def beat(self) -> None:
        """Show that this process lives."""
        self._beats += 1
        # Without the lock the number of a closed file could be that of another file by now.
        with self._file_lock, suppress(OSError):
            # Into the file that was opened, whatever has its name now. If it fails others see the
            # beat stand still, and this process is told at its next save.
            if self._fd is not None:
                os.pwrite(self._fd, b"%0*d" % (_BEAT_DIGITS, self._beats), 0)

    def release(self, failed: bool = False) -> None:
        """Let others write here at once; if the process has ``failed`` and torchrun starts it
        again, that attempt alone, and others a minute later."""
        with self._file_lock:
            if self._fd is None or _owned.get(self.directory) is not self:
                return
            del _owned[self.directory]
            os.close(self._fd)
            self._fd = None
        if self.problem() is None and not (failed and _is_restarted()):
            (self.directory / f".owner-{self._number}").unlink(missing_ok=True)


_owned: dict[Path, Owner] = {}
_lock = threading.Lock()
_thread: threading.Thread | None = None


def claim(directory: str | os.PathLike[str]) -> Owner:
    """Become the one writer of a folder, which is created; one process of a job calls it.

    :func:`save` does so with its folder. A program that writes other files beside checkpoints
    claims the folder of all of them first, before it looks for what is there.

    If another process was the owner and ended, this returns at once if it ended without an error,
    was an earlier attempt of the same torchrun job, or ended on this machine with no torchrun that
    starts it again; else in a minute.

    Raises:
        CheckpointError: naming the owner, or the folder or file that cannot be written.
    """
    path = Path(os.path.realpath(directory))
    if os.path.islink(directory) and not path.exists():
        raise CheckpointError(f"{directory}: a link to {path}, which is not there")
    with _lock:
        owner = _owned.get(path)
        if owner is not None and owner.problem():
            owner.release()
            owner = None
        if owner is None:
            with os_errors(path):
                path.mkdir(parents=True, exist_ok=True)
                owner = _owned[path] = _acquire(path)
            Finalize(None, _release_quietly, (owner,), exitpriority=-100)
            _start_beating()
    return owner


def check_claims(directory: Path) -> None:
    """Raise ``CheckpointError`` if this process owned the folder, or one above, and does no longer.

    Called before anything is published: a process that was stopped for a while may have lost it.
    """
    path = Path(os.path.realpath(directory))
    for folder in (path, *path.parents):
        problem = _owned[folder].problem() if folder in _owned else None
        if problem is not None:
            raise CheckpointError(f"{problem}; nothing was written")


def _acquire(path: Path) -> Owner:
    while True:
        found = _current(path)
        if found is not None and not (_same_job(found[1]) or _is_dead(path, *found)):
            continue  # its file is gone
        number = 1 if found is None else found[0] + 1
        name = path / f".owner-{number}"
        try:
            # Only one of several newcomers can create it.
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            fd = os.open(name, flags, 0o644)
        except FileExistsError:
            continue
        about = _about(locked=_lock_file(fd))
        os.pwrite(fd, b"0" * _BEAT_DIGITS + about, 0)
        numbers = _numbers(path)
        if numbers[-1:] != [number]:
            # A newcomer that was stopped may find the next number free again.
            name.unlink(missing_ok=True)
            os.close(fd)
            continue
        for older in numbers[:-1]:
            (path / f".owner-{older}").unlink(missing_ok=True)
        return Owner(path, number, fd, about)


def _is_dead(path: Path, number: int, content: bytes) -> bool:
    """Whether an owner shows no sign of life; False if its file is gone meanwhile.

    Raises ``CheckpointError`` naming an owner that lives.
    """
    for look in range(PATIENCE):
        if _lock_is_free(path / f".owner-{number}", content):
            return True
        if look == 2:
            warnings.warn(
                f"{path}: waiting for a sign of life from {_who(content)}, at most "
                f"{PATIENCE * BEAT_SECONDS:.0f} s",
                stacklevel=2,
            )
        time.sleep(BEAT_SECONDS)
        now = _current(path)
        if now is None:
            return False
        if now != (number, content):
            raise CheckpointError(
                f"{path}: {_who(now[1])} writes here; stop it, or choose another folder"
            )
    return True


def _numbers(path: Path) -> list[int]:
    matches = (_NAME.fullmatch(name) for name in os.listdir(path))
    return sorted(int(match[1]) for match in matches if match)


def _current(path: Path) -> tuple[int, bytes] | None:
    """The number and the content of the owner's file, if there is one."""
    while True:
        try:
            numbers = _numbers(path)
        except FileNotFoundError:
            return None
        if not numbers:
            return None
        name = path / f".owner-{numbers[-1]}"
        try:
            with open_file(name) as file, os_errors(name):
                return numbers[-1], file.read(_MAX_NBYTES)
        except CheckpointError:
            if name.exists() or name.is_symlink():
                raise


def _about(locked: bool) -> bytes:
    about = {
        "id": uuid.uuid4().hex,
        "job": _job(),
        "kernel": _kernel() if locked and not _is_restarted() else None,
        "who": f"process {os.getpid()} on {socket.gethostname()}, there since {time.ctime()},",
    }
    return json.dumps(about).encode()


def _is_restarted() -> bool:
    """Whether torchrun starts this job again should it end now."""
    most, count = (
        int(os.environ.get(f"TORCHELASTIC_{name}", "0"))
        for name in ("MAX_RESTARTS", "RESTART_COUNT")
    )
    return most > count


def _lock_file(fd: int) -> bool:
    """Lock a file for as long as this process lives, if the file system can."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _lock_is_free(name: Path, content: bytes) -> bool:
    """Whether the lock of an owner that ran on this kernel went with it.

    Between machines that is not sure: on some network file systems locks are local.
    """
    kernel = _kernel()
    if kernel is None or _parsed(content).get("kernel") != kernel:
        return False
    try:
        with open_file(name) as file:
            return _lock_file(file.fileno())
    except CheckpointError:
        return False


def _kernel() -> str | None:
    """A random number that the kernel drew as it started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    except OSError:
        return None


def _parsed(content: bytes) -> dict[str, object]:
    try:
        parsed = json.loads(content[_BEAT_DIGITS:])
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _who(content: bytes) -> str:
    return str(_parsed(content).get("who", "another process"))


def _same_job(content: bytes) -> bool:
    job = _job()
    return job is not None and _parsed(content).get("job") == job


def _job() -> str | None:
    """What all attempts of one torchrun job have in common, and no other job has.

    The folder in which torchrun keeps the logs of its attempts, as it is told to the ranks: it has
    a random name, made once for a job. The job's own name (``--rdzv-id``) is the same whenever the
    same script is started.
    """
    attempt, sep, rest = os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition("/attempt_")
    if not sep or rest.count("/") != 2:
        return None
    text = f"{os.environ.get('TORCHELASTIC_RUN_ID')} {attempt}"
    return hashlib.sha256(text.encode()).hexdigest()


def _start_beating() -> None:
    global _thread
    if _thread is None or not _thread.is_alive():
        _thread = threading.Thread(target=_beat, daemon=True, name="dist_lamb.checkpoint.owner")
        _thread.start()


def _beat() -> None:
    while True:
        time.sleep(BEAT_SECONDS)
        for owner in list(_owned.values()):
            owner.beat()


def _release_quietly(owner: Owner) -> None:
    # An exception that ended the program. torchrun starts it again: until then the folder is not
    # free for another job, which would shut the next attempt out.
    failed = getattr(sys, "last_value", None) is not None
    # If it fails others take over when they see no beat.
    with suppress(OSError, CheckpointError):
        owner.release(failed)


def _forget() -> None:
    """A forked process owns nothing."""
    global _lock, _thread
    _owned.clear()
    _lock, _thread = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
