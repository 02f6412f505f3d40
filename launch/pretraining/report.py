"""The output of a run: a live bar or plain lines, JSON lines, TensorBoard events.

All of them are fed with the same rows, one a training step and one an evaluation. Only rank 0 has
any; on the other ranks a report has no outlets and costs nothing.
"""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import torch
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from torch import Tensor

from pretraining.jsonlines import (
    JsonLines,
    LogError,
    Row,
    Unwritten,
    check_numbers,
    read_rows,
)

LOG_NAME = "log.jsonl"
TENSORS_LOG_NAME = "tensors.jsonl"
#: Columns of a TensorsRow for each tensor: ||x|| / ||u||, ||x|| before the step, ||u||, ||g||.
COLUMNS = ("trust_ratio", "param_norm", "update_norm", "grad_norm")
_TERMINAL = "standard output"


@dataclass(frozen=True)
class Trust:
    """Trust ratios of the weight matrices in one step: over all of them, and the median of each
    layer group."""

    min: float
    median: float
    max: float
    groups: dict[str, float]


@dataclass(frozen=True)
class TrainRow:
    """One step. ``loss`` is the mean of the global batch in nats a masked token; ``trust`` is read
    only at some steps, because reading it waits for the device."""

    step: int
    loss: float
    lr: float
    tokens_per_s: float
    samples: int
    """Training sequences up to and with this step: the position of the next batch."""
    skipped_steps: int
    """Up to and with this step: those that the optimizer skipped, see ``optim.nonfinite``."""
    grad_norm: float | None = None
    """Global L2 norm of the gradients before clipping; None where it is not finite or not known."""
    model_flops_per_s: float = 0.0
    """Of forward and backward, over all ranks, without recomputation: see ``model.train_flops``."""
    trust: Trust | None = None
    noise_scale: float | None = None
    """The batch beyond which larger ones pay less, in sequences; see ``train.noise_every``."""
    kind: ClassVar[str] = "train"


@dataclass(frozen=True)
class HeldOutRow:
    """One evaluation. ``loss`` in nats a masked token, ``accuracy`` in [0, 1]."""

    step: int
    loss: float
    accuracy: float
    kind: ClassVar[str] = "held_out"


@dataclass(frozen=True)
class TensorsRow:
    """One step: for each weight matrix by name what ``COLUMNS`` says, all L2 norms."""

    step: int
    tensors: dict[str, tuple[float, ...]]


class Outlet:
    """Where rows and messages go; each kind leaves out what is not for it."""

    #: the file or folder that it writes, for messages
    name: str

    def train(self, rows: Sequence[TrainRow]) -> None: ...
    def held_out(self, row: HeldOutRow) -> None: ...
    def tensors(self, row: TensorsRow) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Report:
    """Passes every row on to its outlets. Use as a context: leaving it closes them."""

    def __init__(self, outlets: Sequence[Outlet]) -> None:
        self._outlets = outlets
        #: what could not be written first; raised here, on rank 0 alone, it would leave the other
        #: ranks waiting
        self.problem: LogError | None = None

    def train(self, rows: Sequence[TrainRow]) -> None:
        self._each(lambda outlet: outlet.train(rows))

    def held_out(self, row: HeldOutRow) -> None:
        self._each(lambda outlet: outlet.held_out(row))

    def tensors(self, row: TensorsRow) -> None:
        self._each(lambda outlet: outlet.tensors(row))

    def say(self, text: str) -> None:
        self._each(lambda outlet: outlet.say(text))

    def _each(self, call: Callable[[Outlet], None]) -> None:
        for outlet in self._outlets:
            with self.writing(outlet.name):
                call(outlet)

    @contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """As a context: an error of what writes ``name`` becomes the :attr:`problem`."""
        try:
            yield
            return
        except LogError as error:
            problem = error
        except OSError as error:
            problem = _unwritten(error.filename or name, error.strerror or str(error))
        except Exception as error:
            traceback.print_exc()  # nobody has thought of this one
            problem = _unwritten(name, f"{type(error).__name__}: {error}")
        self.problem = self.problem or problem

    def check(self) -> None:
        """Raise the :attr:`problem`, if there is one."""
        if self.problem:
            raise self.problem

    def __enter__(self) -> Report:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._each(lambda outlet: outlet.close())


def _unwritten(name: str, why: str) -> LogError:
    return LogError(
        f"{name}: {why}; correct that and start again: the run goes on from its last checkpoint"
    )


def open_report(
    run_dir: Path, first_step: int, total_steps: int, unwritten: Unwritten, tensors: bool = False
) -> Report:
    """Rank 0's report. Rows of steps after ``first_step``, written by a run that got further than
    its last checkpoint, are removed.

    Args:
        unwritten: of the run that is resumed, and from now on of this one.
        tensors: whether there will be a TensorsRow.

    Raises:
        LogError: a log that is there cannot be continued.
    """
    # First what may fail, since the others empty their files where a run starts over.
    outlets: list[Outlet] = [TensorBoard(run_dir / "tensorboard", first_step)]
    outlets.append(Log(run_dir / LOG_NAME, first_step, _check, unwritten))
    tensors_log = run_dir / TENSORS_LOG_NAME
    if tensors or tensors_log.exists():
        outlets.append(TensorsLog(tensors_log, first_step, _check_tensors, unwritten))
    return Report([*outlets, terminal(first_step, total_steps)])


class _RowsFile(Outlet):
    """One JSON object a line, steps ascending."""

    def __init__(
        self, path: Path, first_step: int, check: Callable[[Row], None], unwritten: Unwritten
    ) -> None:
        self.name = str(path)
        self._file = JsonLines(path, first_step, check, unwritten)

    def close(self) -> None:
        self._file.add()


class Log(_RowsFile):
    """Kinds ``train`` and ``held_out``. The file has every row that the terminal shows."""

    def train(self, rows: Sequence[TrainRow]) -> None:
        self._file.add({"kind": row.kind, **asdict(row)} for row in rows)

    def held_out(self, row: HeldOutRow) -> None:
        self._file.add([{"kind": row.kind, **asdict(row)}])


class TensorsLog(_RowsFile):
    """A ``TensorsRow`` each."""

    def tensors(self, row: TensorsRow) -> None:
        self._file.add([asdict(row)])


def read_log(path: Path) -> list[Row]:
    """The rows of a log; none where there is no file. A last line cut short by a crash is left
    out.

    Raises:
        LogError: another line is no row.
    """
    return read_rows(path, _check)


def _check(row: Row) -> None:
    """What is read of a row is there; other kinds than ours are taken as they are."""
    if row["kind"] == TrainRow.kind:
        trust = row["trust"]
        check_numbers([row["loss"], *(trust["groups"].values() if trust else [])])
    elif row["kind"] == HeldOutRow.kind:
        check_numbers([row["loss"], row["accuracy"]])


def read_tensors_log(path: Path) -> list[Row]:
    """As :func:`read_log`, of rows that are a ``TensorsRow`` each."""
    return read_rows(path, _check_tensors)


def _check_tensors(row: Row) -> None:
    for values in row["tensors"].values():
        check_numbers([values[0], *values])


class TensorBoard(Outlet):
    """Event files under ``directory``."""

    def __init__(self, directory: Path, first_step: int) -> None:
        self.name = str(directory)
        # Imported here: it takes a second, and only rank 0 comes here.
        from torch.utils.tensorboard import SummaryWriter

        if not first_step and directory.is_dir():
            # TensorBoard would draw the events of an earlier run into the same curves.
            for old in directory.glob("events.out.tfevents.*"):
                old.unlink()
        self.writer = SummaryWriter(
            str(directory), purge_step=first_step + 1 if first_step else None
        )

    def train(self, rows: Sequence[TrainRow]) -> None:
        add = self.writer.add_scalar
        for row in rows:
            add("train/loss", row.loss, row.step)
            add("train/lr", row.lr, row.step)
            add("train/tokens_per_s", row.tokens_per_s, row.step)
            add("train/model_flops_per_s", row.model_flops_per_s, row.step)
            add("train/skipped_steps", row.skipped_steps, row.step)
            if row.grad_norm is not None:
                add("train/grad_norm", row.grad_norm, row.step)
            if row.noise_scale is not None:
                add("train/noise_scale", row.noise_scale, row.step)
            if row.trust is not None:
                for name in ("min", "median", "max"):
                    add(f"trust_ratio/{name}", getattr(row.trust, name), row.step)
                for group, value in row.trust.groups.items():
                    add(f"trust_ratio_of/{group}", value, row.step)

    def held_out(self, row: HeldOutRow) -> None:
        self.writer.add_scalar("held_out/loss", row.loss, row.step)
        self.writer.add_scalar("held_out/accuracy", row.accuracy, row.step)

    def tensors(self, row: TensorsRow) -> None:
        for k, column in enumerate(COLUMNS):
            values = torch.tensor([value[k] for value in row.tensors.values()])
            found = values[values.isfinite()]
            if len(found):
                self.writer.add_histogram(f"tensors/{column}", found, row.step)

    def close(self) -> None:
        self.writer.close()


def terminal(first_step: int, total_steps: int) -> Outlet:
    """A live bar on a terminal, a line every log step where the output is a file."""
    if sys.stdout is not None and sys.stdout.isatty():
        return LiveBar(first_step, total_steps)
    return PlainLines(first_step, total_steps)


class _TwoLines(Progress):
    """A bar, and below it one line of numbers, cut where the terminal ends."""

    numbers = "starting"

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.numbers, no_wrap=True, overflow="ellipsis")


class LiveBar(Outlet):
    """A bar at the bottom of the terminal; evaluations and messages scroll above it."""

    name = _TERMINAL

    def __init__(self, first_step: int, total_steps: int, console: Console | None = None) -> None:
        self._bar = _TwoLines(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(compact=True),
            console=console or Console(highlight=False),
            expand=True,
        )
        self._task: TaskID = self._bar.add_task("", total=total_steps, completed=first_step)
        self._bar.start()

    def train(self, rows: Sequence[TrainRow]) -> None:
        self._bar.numbers = _numbers(rows[-1])
        self._bar.update(self._task, completed=rows[-1].step)

    def held_out(self, row: HeldOutRow) -> None:
        self.say(_held_out_line(row))

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


class PlainLines(Outlet):
    """One line for every log step, so that a log file stays readable."""

    name = _TERMINAL

    def __init__(self, first_step: int, total_steps: int) -> None:
        self._first_step = first_step
        self._total_steps = total_steps
        self._started = time.monotonic()

    def train(self, rows: Sequence[TrainRow]) -> None:
        row = rows[-1]
        pace = (time.monotonic() - self._started) / (row.step - self._first_step)
        eta = clock(pace * (self._total_steps - row.step))
        self.say(f"{row.step:>{len(str(self._total_steps))}}/{self._total_steps}  "
                 f"{_numbers(row)}  eta {eta}")  # fmt: skip

    def held_out(self, row: HeldOutRow) -> None:
        self.say(_held_out_line(row))
        if row.step == self._first_step:
            # Counted among the first few steps, it would make the run look twice as long.
            self._started = time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)


def _numbers(row: TrainRow) -> str:
    parts = [f"loss {row.loss:.4f}", f"lr {row.lr:.1e}", f"{compact(row.tokens_per_s)} tokens/s"]
    if row.grad_norm is not None:
        parts.insert(2, f"|g| {row.grad_norm:.3g}")
    if row.skipped_steps:
        parts.append(f"skipped {row.skipped_steps}")
    if row.trust is not None:
        parts.append(f"trust {row.trust.min:.2g}/{row.trust.median:.2g}/{row.trust.max:.2g}")
    return "  ".join(parts)


def _held_out_line(row: HeldOutRow) -> str:
    return (
        f"step {row.step}: held-out loss {row.loss:.4f}, masked accuracy {100 * row.accuracy:.1f} %"
    )


def compact(number: float) -> str:
    """12345 as ``12.3k``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def layer_group(name: str) -> str:
    """The group of a parameter of BERT: ``embeddings``, ``layer 00`` .. or ``head``."""
    parts = name.split(".")
    if "layer" in parts:
        return f"layer {int(parts[parts.index('layer') + 1]):02}"
    return "embeddings" if "embeddings" in parts else "head"


def summarize_trust(ratios: dict[str, Tensor], shapes: dict[str, torch.Size]) -> Trust | None:
    """Read the trust ratios of a step; waits for the device once. None where there are none.

    Biases and normalisation weights are left out: they start at 0 or 1, so their ratios are on
    another scale (or 1 where they are not adapted), and would hide those of the weight matrices.

    Args:
        ratios: 0-d tensors by parameter name.
        shapes: of the parameters by name.
    """
    names = [name for name in ratios if len(shapes[name]) > 1]
    if not names:
        return None
    values = torch.stack([ratios[name].float() for name in names]).cpu()
    by_group: dict[str, list[float]] = {}
    for name, value in zip(names, values.tolist(), strict=True):
        by_group.setdefault(layer_group(name), []).append(value)
    return Trust(
        min=values.min().item(),
        median=values.median().item(),
        max=values.max().item(),
        groups={group: statistics.median(by_group[group]) for group in sorted(by_group)},
    )
