"""The folder of a run's checkpoints: listing, creating and removing them.

A checkpoint is written into a temporary folder, which is renamed when all of it is on disk. So
``step-<n>`` is always complete, wherever the writer was stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
import warnings
from pathlib import Path

from .errors import CheckpointError
from .files import MANIFEST, STEP_NAME, os_errors, sync_folder
from .owner import check_claims, claim

_TEMPORARY = re.compile(r"\.step-[0-9]+\.(new|old)-[0-9a-f]{32}")


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a folder, by step; none where there is no folder."""
    try:
        names = [n for n in os.listdir(directory) if STEP_NAME.fullmatch(n)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    paths = [Path(directory, name) for name in sorted(names, key=lambda n: int(n[5:]))]
    # A folder without a manifest is an incomplete copy.
    return [path for path in paths if (path / MANIFEST).is_file()]


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in a folder, or None."""
    complete = checkpoints(directory)
    if not complete:
        # Who writes there renames: the old ones may have gone, and a new one come, meanwhile.
        complete = checkpoints(directory)
    return complete[-1] if complete else None


def resolve(path: str | os.PathLike[str]) -> Path:
    """The folder of a checkpoint: ``path`` itself, or the latest one in it.

    Raises ``CheckpointError`` if there is none.
    """
    if Path(path, MANIFEST).exists():
        return Path(path)
    checkpoint = latest(path)
    if checkpoint is None:
        raise CheckpointError(f"{path}: no checkpoint here (no {MANIFEST})")
    return checkpoint


def create_temporary(directory: Path, step: int) -> Path:
    """An empty temporary folder for the checkpoint of ``step``; older temporary ones are removed.

    Raises ``CheckpointError`` if that step is there already, the folder cannot be written to, or
    another process writes to it.
    """
    claim(directory)
    check_claims(directory)
    with os_errors(directory):
        for name in os.listdir(directory):
            if _TEMPORARY.fullmatch(name):
                shutil.rmtree(directory / name, ignore_errors=True)
        if os.path.lexists(directory / f"step-{step}"):
            raise CheckpointError(
                f"{directory / f'step-{step}'} is there already; remove it, and any later one, "
                "to go on from an earlier step"
            )
        temporary = directory / f".step-{step}.new-{uuid.uuid4().hex}"
        temporary.mkdir()
    return temporary


def publish(temporary: Path, step: int) -> Path:
    """Rename a complete temporary folder, its files on disk, to ``step-<step>``."""
    final = temporary.with_name(f"step-{step}")
    with os_errors(final):
        check_claims(final.parent)  # a new owner may have removed the temporary folder
        sync_folder(temporary)
        # Again, after what may take long. A new owner removes temporary folders at its
        # first save, so that the rename of a process that is stopped before it fails.
        check_claims(final.parent)
        temporary.rename(final)
        sync_folder(final.parent)
    return final


def discard(temporary: Path) -> None:
    shutil.rmtree(temporary, ignore_errors=True)


def retain(directory: Path, step: int, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints up to ``step``, which was just written.

    Later steps are of an earlier run. They are left alone: a warning names them.
    """
    complete = checkpoints(directory)
    steps = [int(path.name.removeprefix("step-")) for path in complete]
    later = [path.name for path, found in zip(complete, steps) if found > step]
    if later:
        warnings.warn(
            f"{directory}: {', '.join(later)} are later than step-{step}, which was just written, "
            "and will be taken for the latest; remove them",
            stacklevel=2,
        )
    for path in [path for path, found in zip(complete, steps) if found <= step][:-keep]:
        if path.is_symlink():
            warnings.warn(f"{path} is a link: it is not removed", stacklevel=2)
            continue
        temporary = path.with_name(f".{path.name}.old-{uuid.uuid4().hex}")
        try:
            # Renamed first: if removal stops half-way, the rest is no checkpoint.
            path.rename(temporary)
            shutil.rmtree(temporary)
        except OSError as error:
            # Only a warning: the new checkpoint is complete.
            warnings.warn(f"{path} could not be removed: {error.strerror}", stacklevel=2)
