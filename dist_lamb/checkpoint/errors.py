"""The exception that this package raises."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or applied; names the file, param or option.

    With several ranks it is raised on all of them.
    """
