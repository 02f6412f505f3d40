"""``bench.py train``: whole training steps on several ranks, run under torchrun.

Every contender trains the same model on the same batches. Its params after a few steps of a small
model must be those of plain LAMB (:mod:`benchmarking.train_gate`) before it is timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import gc
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from pretraining.config import ConfigError, TrainConfig
from pretraining.ranks import Ranks, started
from torch import Tensor, nn
from torch.profiler import record_function

from . import contenders, results, train_curve, train_trace
from .agreement import Failed, agreed
from .train_contenders import CONTENDERS, PRECISIONS, Contender, ForwardBackward, Setting, Training
from .train_gate import GATE, Gate
from .train_work import WORKS, Work, prepared

T = TypeVar("T")
ALONE = "forward, backward alone"
FAILED_GATE = "FAILED THE GATE"
OPTIMIZER_STEPS = 8  # timed alone, after the whole steps
#: header, column of the rows, format
COLUMNS = (
    ("contender", "contender", ""),
    ("step ms", "step_ms", ".2f"),
    ("p20", "step_ms_p20", ".2f"),
    ("p80", "step_ms_p80", ".2f"),
    ("ratio", "ratio", ".3f"),
    ("exposed ms", "exposed_ms", ".2f"),
    # step() and zero_grad() from idle, until the next forward may begin, and until all is idle
    # again: what lies between is communication that the next forward covers
    ("optimizer ms", "optimizer_ms", ".2f"),
    ("idle ms", "idle_ms", ".2f"),
    ("peak GB", "peak_gb", ".2f"),
    ("tokens/s", "tokens_per_s", ".0f"),
    ("loss", "loss", ".3f"),
    ("error", "error", ".0e"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--model", default="large" if on_gpu else "tiny", choices=tuple(WORKS), help="size of BERT"
    )
    parser.add_argument("--micro-batch", type=int, metavar="N", help="sequences a rank and step")
    parser.add_argument("--seq-len", type=int, metavar="N", help="tokens a sequence")
    parser.add_argument(
        "--contenders",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="names, or patterns such as 'ShardedLamb*'; all: "
        + ", ".join(c.name for c in CONTENDERS).replace("%", "%%"),
    )
    parser.add_argument(
        "--precisions",
        nargs="+",
        choices=tuple(PRECISIONS),
        help="fp32; autocast: fp32 params, forward in bf16; bf16, fp16: params and all. Default: "
        "autocast and bf16 on CUDA, else fp32; --trace: bf16 (fp32); --curve: fp32",
    )
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before timing")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="timed steps a round")
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="times to go through all contenders, so that all see the machine's changes of speed",
    )
    parser.add_argument("--lr", type=float, default=contenders.LR)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model's layers, one by one"
    )
    parser.add_argument("--impl", default="auto", help="of Lamb and ShardedLamb")
    parser.add_argument(
        "--timeout", type=float, default=3.0, metavar="MINUTES", help="of one collective"
    )
    parser.add_argument(
        "--trace", action="store_true", help="profile 3 steps of the one contender that is named"
    )
    parser.add_argument(
        "--trace-dir", type=Path, default=Path("runs/trace"), help="where the trace itself goes"
    )
    parser.add_argument(
        "--curve", type=int, metavar="N", help="compare the losses of N steps of the contenders"
    )
    parser.add_argument(
        "--curve-tolerance", type=float, default=1e-3, help="largest difference of two losses"
    )
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="folder of results")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--tracebacks", action="store_true", help="of contenders that fail")


def main(args: argparse.Namespace) -> int:
    try:
        chosen = choose(args.contenders)
        work = work_of(args)
        if args.trace and len(chosen) != 1:
            raise ConfigError(f"--trace takes one contender, got {len(chosen)}: name it")
        if (args.trace or args.curve) and len(args.precisions or [""]) != 1:
            raise ConfigError("--trace and --curve take one of --precisions")
        config = TrainConfig(
            steps=args.steps,
            global_batch=work.micro_batch,
            micro_batch=work.micro_batch,
            device=args.device,
            timeout_minutes=args.timeout,
        )
        with started(config) as ranks:
            return run(args, work, chosen, ranks)
    except (ConfigError, Failed) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"bench train: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace, work: Work, chosen: list[Contender], ranks: Ranks) -> int:
    """What ``args`` ask for, in a process group that is there already; the exit status."""
    if args.trace:
        return trace(args, work, chosen[0], ranks)
    if args.curve:
        return curve(args, work, chosen, ranks)
    return measure(args, work, chosen, ranks)


def choose(patterns: Sequence[str]) -> list[Contender]:
    """The contenders that match one of ``patterns``, in the order of the registry.

    Raises:
        ConfigError: a pattern that matches none.
    """
    names: set[str] = set()
    for pattern in patterns:
        found = fnmatch.filter([c.name for c in CONTENDERS], pattern)
        if not found:
            known = ", ".join(c.name for c in CONTENDERS)
            raise ConfigError(f"--contenders: no contender is named {pattern!r}; there are {known}")
        names.update(found)
    return [c for c in CONTENDERS if c.name in names]


def work_of(args: argparse.Namespace) -> Work:
    """The work named by ``args``, with their batch.

    Raises:
        ConfigError: a number that is not positive.
    """
    for name in ("micro_batch", "seq_len", "steps", "rounds", "curve"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.warmup < 0:
        raise ConfigError(f"--warmup must be at least 0, got {args.warmup}")
    given = {"micro_batch": args.micro_batch, "seq_len": args.seq_len}
    return dataclasses.replace(WORKS[args.model], **{k: v for k, v in given.items() if v})


# --- the three things it can do ----------------------------------------------------------------


def measure(args: argparse.Namespace, work: Work, chosen: list[Contender], ranks: Ranks) -> int:
    """Times of every contender at every precision. Rank 0 prints, and saves row by row."""
    first = ranks.rank == 0
    on_gpu = ranks.device.type == "cuda"
    common = results.common(ranks.device.type, "transformers", "timm", "deepspeed")
    about: dict[str, Any] = {"ranks": ranks.world_size, "model": args.model}
    batches = list(work.batches(args.warmup + args.steps + 1, ranks.rank, ranks.device))
    template, gate = work.template(), Gate(ranks)
    about["params"] = sum(p.numel() for p in template.parameters())
    about |= {"micro_batch": work.micro_batch, "seq_len": work.seq_len, "compiled": args.compile}
    rows: list[dict[str, Any]] = []
    failed = 0
    for precision in args.precisions or (["autocast", "bf16"] if on_gpu else ["fp32"]):
        setting = _setting(args, work, precision, ranks)
        these: list[dict[str, Any]] = []
        skipped: list[str] = []
        # Alone a second time: the difference of the two is the variation of the machine.
        runs = [_Run(c) for c in (_alone(ALONE), *chosen, _alone(f"{ALONE}, again"))]
        for last in [False] * (args.rounds - 1) + [True]:
            for run in list(runs):
                why = None if run.rounds else _checked(gate, run, setting, args)
                failed += why is not None and FAILED_GATE in why
                row = None
                if why is None:
                    do = partial(_timed, run, template, batches, setting, args, ranks)
                    row, why = attempt(args, do)
                    _free(ranks.device)
                if row is None:
                    skipped.append(f"{run.contender.name}: {why}")
                    runs.remove(run)
                elif last:
                    alone = these[0]["step_ms"] if these else row["step_ms"]
                    tokens = ranks.world_size * work.micro_batch * work.seq_len
                    row = {
                        **about,
                        "precision": precision,
                        "params_dtype": str(setting.dtype).removeprefix("torch."),
                        "contender": run.contender.name,
                        **row,
                        "exposed_ms": row["step_ms"] - alone,
                        "ratio": row["step_ms"] / alone,
                        "tokens_per_s": tokens / row["step_ms"] * 1e3,
                        "error": run.error,
                    }
                    these.append(row)
                    if not args.no_save:
                        # At once: a contender that hangs ends the run.
                        save = partial(results.append, args.results / "train.csv", common, [row])
                        agreed(save if first else lambda: None)
        if first:
            title = (
                f"BERT {args.model}, {about['params'] / 1e6:.1f} M params, {ranks.world_size} x "
                f"{work.micro_batch} x {work.seq_len} tokens, {precision} ({setting.dtype} params)"
                + (", layers compiled" if args.compile else "")
            )
            results.print_table(title, COLUMNS, these, skipped)
        rows += these
    if first and rows and not args.no_save:
        path = args.results / f"train_{ranks.device.type}_x{ranks.world_size}.png"
        title = f"{common['hardware']} x {ranks.world_size}, torch {common['torch']}"
        results.chart(
            path,
            title,
            rows,
            facets=("model", "precision"),
            value="step_ms",
            ours=("Sharded", "DDP + Lamb", "FSDP2 + Lamb"),
            marked=ALONE,
        )
        print(f"appended {len(rows)} rows to {args.results / 'train.csv'}; chart {path}")
    return 1 if failed else 0


def trace(args: argparse.Namespace, work: Work, contender: Contender, ranks: Ranks) -> int:
    """A profile of three steps, its picture, and how much of the communication is covered."""
    default = "bf16" if ranks.device.type == "cuda" else "fp32"
    setting = _setting(args, work, (args.precisions or [default])[0], ranks)
    why = contender.why_not(setting)
    if why is not None:
        raise ConfigError(f"{contender.name}: {why}")
    batches = work.batches(args.warmup, ranks.rank, ranks.device)
    training = prepared(contender, work.template(), setting)
    for batch in batches:
        _step(training, batch, setting)
    _synchronize(ranks)
    name = contender.name.replace(" ", "_").replace("/", "_")
    path = args.trace_dir / f"{name}_{setting.precision}_x{ranks.world_size}.json.gz"
    steps = train_trace.WARMUP + train_trace.STEPS
    batches = work.batches(steps, ranks.rank, ranks.device, seed=1)
    with train_trace.recorded(path if ranks.rank == 0 else None, ranks.device.type) as ended:
        for i, batch in enumerate(list(batches), start=1):
            _step(training, batch, setting)
            if i == steps:  # communication that still runs belongs to the trace
                _synchronize(ranks)
            ended()

    def show() -> None:
        timeline = train_trace.read(path)
        folder = args.trace_dir if args.no_save else args.results
        title = (
            f"{contender.name}, BERT {args.model}, {setting.precision}, "
            f"{results.hardware(ranks.device.type)} x {ranks.world_size}: 3 steps of rank 0"
        )
        train_trace.draw(timeline, folder / "train_trace.png", title)
        print(f"{title}; trace {path}, picture {folder / 'train_trace.png'}")
        for line in train_trace.describe(timeline):
            print(f"  {line}")

    agreed(show if ranks.rank == 0 else lambda: None)
    return 0


def curve(args: argparse.Namespace, work: Work, chosen: list[Contender], ranks: Ranks) -> int:
    """Losses of ``args.curve`` steps of every contender, from one start, on the same batches."""
    setting = _setting(args, work, (args.precisions or ["fp32"])[0], ranks)
    template = work.template()
    curves: dict[str, list[float]] = {}
    skipped = []
    for contender in chosen:
        why = contender.why_not(setting)
        if why is None:
            do = partial(_losses, contender, template, work, setting, args.curve, ranks)
            found, why = attempt(args, do)
            if found is not None:
                curves[contender.name] = found
        if why is not None:
            skipped.append(f"{contender.name}: {why}")
        _free(ranks.device)
    if ranks.rank == 0:
        for line in skipped:
            print(f"  not measured - {line}")
    return train_curve.compare(
        curves,
        args.curve_tolerance,
        None
        if args.no_save or ranks.rank
        else args.results / f"train_curve_{ranks.device.type}_x{ranks.world_size}.csv",
        say=print if ranks.rank == 0 else lambda _: None,
    )


def _losses(
    contender: Contender,
    template: nn.Module,
    work: Work,
    setting: Setting,
    steps: int,
    ranks: Ranks,
) -> list[float]:
    """The loss of every step, the mean over ranks."""
    training = prepared(contender, template, setting)
    batches = work.batches(steps, ranks.rank, ranks.device)
    found = torch.stack([_step(training, batch, setting) for batch in batches])
    return [float(loss) for loss in ranks.mean(found.double())]


# --- one contender -----------------------------------------------------------------------------


def _setting(args: argparse.Namespace, work: Work, precision: str, ranks: Ranks) -> Setting:
    return Setting(
        device=ranks.device,
        precision=precision,
        micro_batch=work.micro_batch,
        lr=args.lr,
        impl=args.impl,
        compiled=args.compile,
    )


def _alone(name: str) -> Contender:
    return Contender(name=name, make=lambda module, _: ForwardBackward(module), is_lamb=False)


def attempt(args: argparse.Namespace, do: Callable[[], T]) -> tuple[T | None, str | None]:
    """(what ``do`` returns, None), or (None, why not) if it raises on any rank.

    A peer that does not run here is not our failure.
    """
    try:
        return agreed(do), None
    except Failed as error:
        if args.tracebacks:
            traceback.print_exc()
        return None, str(error)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _step(training: Training, batch: tuple[Tensor, ...], setting: Setting) -> Tensor:
    with record_function("forward"):
        loss = training.forward(batch, setting)
    with record_function("backward"):
        training.backward(loss)
    with record_function("step"):
        training.step()
    return loss.detach()


def _synchronize(ranks: Ranks) -> None:
    """All ranks' devices are idle."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
    ranks.barrier()


class _Marks:
    """Times between marks in the device's queue: nothing waits for the device before the end."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        return list(self._differences())

    def _differences(self) -> Iterator[float]:
        if self._on_gpu:
            torch.cuda.synchronize()
        for begin, end in zip(self._marks, self._marks[1:]):
            yield begin.elapsed_time(end) if self._on_gpu else (end - begin) * 1e3


@dataclass
class _Run:
    """A contender and what was measured of it on this rank, in all rounds so far."""

    contender: Contender
    #: against plain LAMB
    error: float = float("nan")
    rounds: int = 0
    peak: int = 0
    step_ms: list[float] = field(default_factory=list)
    optimizer_ms: list[float] = field(default_factory=list)
    idle_ms: list[float] = field(default_factory=list)


def _checked(gate: Gate, run: _Run, setting: Setting, args: argparse.Namespace) -> str | None:
    """Why a contender gets no row; notes its error."""
    why = run.contender.why_not(setting)
    if why is not None or not run.contender.is_lamb:
        return why
    checked, why = attempt(args, partial(gate.error, run.contender, setting))
    _free(setting.device)
    if checked is None:
        return why
    run.error, worst = checked
    if run.error <= GATE[setting.dtype]:
        return None
    return f"{FAILED_GATE}: off by {run.error:.1e} in {worst}; no speed is shown"


def _timed(
    run: _Run,
    template: nn.Module,
    batches: list[tuple[Tensor, ...]],
    setting: Setting,
    args: argparse.Namespace,
    ranks: Ranks,
) -> dict[str, Any]:
    """Another round: times and memory of the slowest rank in all of them, the same on all ranks."""
    on_gpu = ranks.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    training = prepared(run.contender, template, setting)
    for batch in batches[: args.warmup]:
        _step(training, batch, setting)
    _synchronize(ranks)
    if on_gpu:
        # The memory that building takes is not counted as that of training.
        torch.cuda.reset_peak_memory_stats()
    marks = _Marks(ranks.device)
    for batch in batches[args.warmup : -1]:
        marks.mark()
        loss = _step(training, batch, setting)
    marks.mark()
    run.step_ms += marks.intervals_ms()
    if on_gpu:
        run.peak = max(run.peak, torch.cuda.max_memory_allocated() - before)
    run.rounds += 1

    # Not within the steps above: the waits would remove their overlap.
    for _ in range(OPTIMIZER_STEPS if training.optimizes else 0):
        training.backward(training.forward(batches[-1], setting))
        _synchronize(ranks)
        begin = time.perf_counter()
        training.step()
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        run.optimizer_ms.append((time.perf_counter() - begin) * 1e3)
        if on_gpu:
            torch.cuda.synchronize()
        run.idle_ms.append((time.perf_counter() - begin) * 1e3)

    mean_loss = float(ranks.mean(loss.double()))
    if mean_loss != mean_loss:
        raise ArithmeticError(f"the loss is {mean_loss} after {len(run.step_ms)} steps")
    every: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(every, (run.step_ms, run.optimizer_ms, run.idle_ms, run.peak))
    slowest = max((times for times, *_ in every), key=statistics.median)
    spread = slowest if len(slowest) > 1 else slowest * 2
    quantiles = statistics.quantiles(spread, n=10, method="inclusive")

    def longest(column: int) -> float:
        medians = [statistics.median(own[column]) for own in every if own[column]]
        return float(max(medians, default=float("nan")))

    return {
        "step_ms": statistics.median(slowest),
        "step_ms_p20": quantiles[1],
        "step_ms_p80": quantiles[7],
        "optimizer_ms": longest(1),
        "idle_ms": longest(2),
        "peak_gb": max(peak for *_, peak in every) / 1e9 if on_gpu else float("nan"),
        "loss": mean_loss,
    }
