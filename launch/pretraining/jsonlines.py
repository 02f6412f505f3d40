"""Files of one JSON object a line, steps ascending, that a resumed run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


class LogError(ValueError):
    """A log that cannot be read or written; the message names the file, and the line if it is one's
    fault."""


class JsonLines:
    """A file that rows are added to. Rows of steps after ``first_step``, written by a run that got
    further than its last checkpoint, are removed.

    Args:
        check: as of :func:`read_rows`.

    Raises:
        LogError: a line is no row. OSError: the file cannot be written.
    """

    def __init__(self, path: Path, first_step: int, check: Callable[[Row], None]) -> None:
        rows = read_rows(path, check) if first_step else []
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(_lines(row for row in rows if row["step"] <= first_step))
        part.replace(path)
        self.path, self._unwritten = path, b""

    def add(self, rows: Iterable[Row] = ()) -> None:
        """Add rows; they are in the file when this returns. After an ``OSError`` none is, and the
        next call adds them too."""
        self._unwritten += _lines(rows)
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("ab") as file:
                file.write(self._unwritten)
        except OSError:
            # Half a line could not be read once another one follows it.
            with suppress(OSError):
                os.truncate(self.path, size)
            raise
        self._unwritten = b""


def read_rows(path: Path, check: Callable[[Row], None]) -> list[Row]:
    """The rows of a file; none where there is no file. A last line cut short by a crash is left
    out.

    Args:
        check: raises what reading it would raise, or ``TypeError``, where a row lacks what is read
            of it besides its integer "step".

    Raises:
        LogError: another line is no row.
    """
    lines = path.read_bytes().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if type(row["step"]) is not int:
                raise TypeError(row["step"])
            check(row)
            rows.append(row)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            if number < len(lines):
                raise LogError(
                    f"{path}, line {number}: damaged: {line[:60].decode(errors='replace')!r}; "
                    "correct or remove this line, or move the file away"
                ) from None
    return rows


def check_numbers(values: Iterable[Any]) -> None:
    """Raise ``TypeError`` if one of ``values`` is no number; NaN and infinities are numbers."""
    for value in values:
        if type(value) not in (int, float):
            raise TypeError(value)


def _lines(rows: Iterable[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
