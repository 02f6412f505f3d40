"""Files of one JSON object a line, steps ascending, that a resumed run continues."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = dict[str, Any]


class LogError(ValueError):
    """A log that cannot be read or written; the message names the file, and the line if it is one's
    fault."""


class Unwritten:
    """Lines that could not be written, by the name of their file. They are saved with a checkpoint,
    which may be on another disk: else a resumed run would never have these rows."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.lines)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.lines = dict(state)


class JsonLines:
    """A file that rows are added to. Rows of steps after ``first_step``, written by a run that got
    further than its last checkpoint, are removed.

    Args:
        check: as of :func:`read_rows`.
        unwritten: of a run that is resumed: what it has of this file is added.

    Raises:
        LogError: a line is no row. OSError: the file cannot be written.
    """

    def __init__(
        self, path: Path, first_step: int, check: Callable[[Row], None], unwritten: Unwritten
    ) -> None:
        late = unwritten.lines.get(path.name, "")
        rows = read_rows(path, check) if first_step else []
        rows += _parsed(late.encode().splitlines(), check, f"the checkpoint's part of {path}")
        # Some may have been written in the end, after the checkpoint was.
        kept = {_line(row): row["step"] for row in rows if row["step"] <= first_step}
        part = path.with_name(f".{path.name}.part")
        part.write_text("".join(sorted(kept, key=lambda line: kept[line])), encoding="utf-8")
        part.replace(path)
        unwritten.lines.pop(path.name, None)
        self._path, self._unwritten = path, unwritten

    def add(self, rows: Iterable[Row] = ()) -> None:
        """Add rows; they are in the file when this returns. After an ``OSError`` none is, and the
        next call adds them too."""
        name = self._path.name
        text = self._unwritten.lines.pop(name, "") + "".join(map(_line, rows))
        if not text:
            return
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("ab") as file:
                file.write(text.encode())
        except OSError:
            self._unwritten.lines[name] = text
            # Half a line could not be read once another one follows it.
            with suppress(OSError):
                os.truncate(self._path, size)
            raise


def read_rows(path: Path, check: Callable[[Row], None]) -> list[Row]:
    """The rows of a file; none where there is no file. A last line cut short by a crash is left
    out.

    Args:
        check: raises what reading it would raise, or ``TypeError``, where a row lacks what is read
            of it besides its integer "step".

    Raises:
        LogError: another line is no row.
    """
    return _parsed(path.read_bytes().splitlines() if path.exists() else [], check, str(path))


def _parsed(lines: list[bytes], check: Callable[[Row], None], where: str) -> list[Row]:
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
                    f"{where}, line {number}: damaged: {line[:60].decode(errors='replace')!r}; "
                    "correct or remove this line, or move the file away"
                ) from None
    return rows


def check_numbers(values: Iterable[Any]) -> None:
    """Raise ``TypeError`` if one of ``values`` is no number; NaN and infinities are numbers."""
    for value in values:
        if type(value) not in (int, float):
            raise TypeError(value)


def _line(row: Row) -> str:
    return json.dumps(row) + "\n"
