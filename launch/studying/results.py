"""A run, its row, and the CSV file that outlives every interruption."""

from __future__ import annotations

import csv
import fcntl
import io
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "study.csv"


class ResultsError(ValueError):
    """Rows that cannot be read; the message names the file, the line and the way out."""


@dataclass(frozen=True, order=True)
class Run:
    """One training run; two with equal fields are the same run."""

    architecture: str
    rule: str
    batch: int
    warmup: float
    lr: float
    seed: int

    @property
    def cell(self) -> Cell:
        return Cell(self.architecture, self.rule, self.batch, self.warmup)

    def rounded(self) -> Run:
        """As the CSV gives it back."""
        return Run(
            self.architecture,
            self.rule,
            self.batch,
            float(f"{self.warmup:.6g}"),
            float(f"{self.lr:.6g}"),
            self.seed,
        )


@dataclass(frozen=True, order=True)
class Cell:
    """Runs that differ in lr and seed alone: one basin."""

    architecture: str
    rule: str
    batch: int
    warmup: float


@dataclass(frozen=True)
class Row:
    """What a run came to. Losses in nats a predicted token, ``nan`` where not finite.

    ``curve`` holds (step, held-out loss); ``seconds`` the time of the ``pack_runs`` runs that were
    trained together, so ``tokens_per_s`` is that of the device, not of one run.
    """

    run: Run
    steps: int
    samples: int
    tokens: int
    loss: float
    train_loss: float
    curve: tuple[tuple[int, float], ...]
    unigram_loss: float
    nonfinite_step: int
    beta2: float
    pack_runs: int
    seconds: float
    tokens_per_s: float
    mode: str
    parameters: int
    data_sha256: str
    hardware: str
    torch: str
    date: str

    @property
    def best_seen(self) -> float:
        return min((loss for _, loss in self.curve if math.isfinite(loss)), default=math.nan)

    @property
    def diverged(self) -> bool:
        """Not finite at the end, or 0.5 nats above what the run itself had reached."""
        return not math.isfinite(self.loss) or self.loss > self.best_seen + 0.5

    @property
    def stuck(self) -> bool:
        """Ended within 0.2 nats of what token frequencies alone give: it never left the plateau, or
        fell back onto it."""
        return math.isfinite(self.loss) and self.loss > self.unigram_loss - 0.2


_TYPES = {f.name: str(f.type) for f in (*fields(Run), *fields(Row))}
_COLUMNS = [f.name for f in fields(Run)] + [f.name for f in fields(Row) if f.name != "run"]


def append(path: Path, rows: list[Row]) -> None:
    """Add rows; they are on the disk when this returns. A last line that was cut off goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        # Another process with this --out may write as well: not between reading and truncating.
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        whole = _whole(path)
        if len(whole) < path.stat().st_size:
            file.truncate(len(whole))
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        if not whole:
            writer.writeheader()
        elif not whole.endswith(b"\n"):
            file.write("\n")
        for row in rows:
            values = {**asdict(row.run), **{n: getattr(row, n) for n in _COLUMNS[6:]}}
            values["curve"] = " ".join(f"{step}:{loss:.5g}" for step, loss in row.curve)
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )
        file.flush()
        os.fsync(file.fileno())


def _whole(path: Path) -> bytes:
    """Content of ``path`` without a last line that an interrupted write cut off."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    last = content[end:].decode("utf-8", errors="replace")
    if not end:
        # Anything but our header may be another's file.
        cut_off = ",".join(_COLUMNS).startswith(last)
    else:
        cut_off = len(next(csv.reader([last]), [])) < len(_COLUMNS)
    return content[:end] if cut_off else content


def read(*paths: Path) -> dict[Run, Row]:
    """The rows of all files, the later one where a run has two. A last line that was cut off by an
    interruption is left out; its run is made again.

    Raises:
        ResultsError: a file with other columns, or with a damaged row.
    """
    found: dict[Run, Row] = {}
    for path in paths:
        if not path.exists():
            continue
        number = 1
        try:
            lines = csv.reader(io.StringIO(_whole(path).decode("utf-8"), newline=""))
            header = next(lines, _COLUMNS)
            if header != _COLUMNS:
                raise ResultsError(
                    f"{path} has other columns than {', '.join(_COLUMNS)}; give another --out"
                )
            number = lines.line_num + 1
            for given in lines:
                if given:
                    row = _row(given)
                    found[row.run] = row
                number = lines.line_num + 1
        except ResultsError:
            raise
        except (ValueError, csv.Error) as error:
            if isinstance(error, UnicodeDecodeError):
                number += error.object[: error.start].count(b"\n")
            raise ResultsError(
                f"{path}, line {number}: {error}; put it right or remove it: then its run is made "
                "again"
            ) from None
    return found


def read_table(path: Path, numbers: Sequence[str]) -> list[dict[str, str]]:
    """The rows of another CSV file by its header; none where there is no file.

    Args:
        numbers: columns whose values are numbers.

    Raises:
        ResultsError: a damaged row, or one without these columns.
    """
    if not path.exists():
        return []
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        try:
            for row in lines:
                if None in row or None in row.values():
                    raise ValueError("not as many fields as the header has")
                for name in numbers:
                    float(row[name])
                rows.append(row)
        except (ValueError, KeyError, csv.Error) as error:
            raise ResultsError(
                f"{path}, line {lines.line_num}: {error}; put it right, or move the file away"
            ) from None
    return rows


def _points(text: str) -> tuple[tuple[int, float], ...]:
    points = (point.split(":") for point in text.split())
    return tuple((int(step), float(loss)) for step, loss in points)


_CONVERT: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "tuple[tuple[int, float], ...]": _points,
}


def _row(given: list[str]) -> Row:
    if len(given) != len(_COLUMNS):
        raise ValueError(f"{len(given)} fields, not {len(_COLUMNS)}")
    found: dict[str, Any] = {}
    for name, text in zip(_COLUMNS, given):
        try:
            found[name] = _CONVERT[_TYPES[name]](text)
        except ValueError:
            raise ValueError(f"{name} is {text!r}") from None
    run = Run(**{f.name: found.pop(f.name) for f in fields(Run)})
    return Row(run=run, **found)
