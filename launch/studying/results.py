"""A run, its row, and the CSV file that outlives every interruption."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE = "study.csv"


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


_COLUMNS = [f.name for f in fields(Run)] + [f.name for f in fields(Row) if f.name != "run"]


def append(path: Path, rows: list[Row]) -> None:
    """Add rows; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and path.stat().st_size and path.read_bytes()[-1:] != b"\n"
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        if cut_off:
            file.write("\n")
        for row in rows:
            values = {**asdict(row.run), **{n: getattr(row, n) for n in _COLUMNS[6:]}}
            values["curve"] = " ".join(f"{step}:{loss:.5g}" for step, loss in row.curve)
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )
        file.flush()
        os.fsync(file.fileno())


def read(*paths: Path) -> dict[Run, Row]:
    """The rows of all files, the later one where a run has two. A last line that was cut off by an
    interruption is left out; its run is made again."""
    found: dict[Run, Row] = {}
    for path in paths:
        if not path.exists():
            continue
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != _COLUMNS:
                raise ValueError(f"{path} has other columns than {', '.join(_COLUMNS)}")
            for values in reader:
                if None not in values.values():
                    row = _row(values)
                    found[row.run] = row
    return found


def _row(values: dict[str, str]) -> Row:
    def typed(cls: type, name: str) -> object:
        kind = next(f.type for f in fields(cls) if f.name == name)
        return {"int": int, "float": float}.get(str(kind), str)(values[name])

    run = Run(**{f.name: typed(Run, f.name) for f in fields(Run)})  # type: ignore[arg-type]
    points = (point.split(":") for point in values["curve"].split())
    curve = tuple((int(step), float(loss)) for step, loss in points)
    rest = {n: typed(Row, n) for n in _COLUMNS[6:] if n != "curve"}
    return Row(run=run, curve=curve, **rest)  # type: ignore[arg-type]
