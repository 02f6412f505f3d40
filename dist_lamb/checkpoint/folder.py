"""The folder of a run's checkpoints: which are there, and how one comes into being or goes.

A checkpoint is written under another name and renamed when it is whole and on disk, so a name
``step-<n>`` always stands for a complete one, wherever the writer was stopped.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
import warnings
from pathlib import Path

from .errors import CheckpointError
from .files import MANIFEST, naming, sync_folder

_STEP = re.compile(r"step-(\d+)")
_ASIDE = re.compile(r"\.step-\d+\.(new|old)-[0-9a-f]{32}")


def checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """The complete checkpoints of a folder, by step; none where there is no folder."""
    try:
        names = [n for n in os.listdir(directory) if _STEP.fullmatch(n)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [Path(directory, name) for name in sorted(names, key=lambda n: int(n[5:]))]
    # One that was copied here, and only in part, has no manifest or not yet.
    return [path for path in found if (path / MANIFEST).is_file()]


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """The complete checkpoint of the highest step in a folder, or None."""
    found = checkpoints(directory)
    return found[-1] if found else None


def resolve(path: str | os.PathLike[str]) -> Path:
    """A checkpoint's own folder, given that or the folder it is the latest of.

    Raises ``CheckpointError`` where there is none.
    """
    if Path(path, MANIFEST).exists():
        return Path(path)
    found = latest(path)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint here (no {MANIFEST})")
    return found


def begin(directory: Path, step: int) -> Path:
    """An empty folder to write the checkpoint of ``step`` into; leftovers are removed.

    Raises ``CheckpointError`` if that step is there already, or the folder cannot be written to.
    """
    with naming(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(directory):
            if _ASIDE.fullmatch(name):
                shutil.rmtree(directory / name, ignore_errors=True)
        if (directory / f"step-{step}").exists():
            raise CheckpointError(
                f"{directory / f'step-{step}'} is there already; remove it, and any later one, "
                "to go on from an earlier step"
            )
        aside = directory / f".step-{step}.new-{uuid.uuid4().hex}"
        aside.mkdir()
    return aside


def publish(aside: Path, step: int) -> Path:
    """Give a folder that is complete, its files on disk, the name of its step."""
    final = aside.with_name(f"step-{step}")
    with naming(final):
        sync_folder(aside)
        aside.rename(final)
        sync_folder(final.parent)
    return final


def discard(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)


def retain(directory: Path, keep: int) -> None:
    """Remove all but the last ``keep`` checkpoints."""
    for path in checkpoints(directory)[:-keep]:
        aside = path.with_name(f".{path.name}.old-{uuid.uuid4().hex}")
        try:
            # Renamed first: half of one must not be found under its name.
            path.rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            # The new checkpoint is there, which is what was asked for.
            warnings.warn(f"{path} could not be removed: {error.strerror}", stacklevel=2)
