"""The exception that this package raises."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or applied; names the file, param or option.

    With several ranks it is raised on all of them. The text has no control characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def printable(text: str) -> str:
    """``text`` with what a terminal would obey, or cannot show, as backslash escapes."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )
