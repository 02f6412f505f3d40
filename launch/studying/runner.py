"""Works through the queue of runs on every device until its time is over."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pretraining.config import ConfigError

from studying import identity
from studying.config import StudyConfig
from studying.data import Sequences, load_data
from studying.grid import next_pack, wanted
from studying.results import FILE, Row, Run, append, read
from studying.training import Job, Mode, Stopped, checkpoint_name, train_rows

_data: Sequences | None = None  # of this worker
_shapes: Counter[tuple[str, int, int]] = Counter()  # trained by this worker


@dataclass(frozen=True)
class Outcome:
    """Of one pack: its rows, or why there are none."""

    rows: tuple[Row, ...] = ()
    seconds: float = 0.0
    lines: tuple[str, ...] = ()
    out_of_memory: bool = False


def devices(device: str) -> list[str]:
    """``auto``: every visible GPU, else the CPU; or names with commas between.

    Raises:
        ConfigError: a device that is not there.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if device == "auto":
        return gpus or ["cpu"]
    names, known = device.split(","), ["cpu", *(["cuda"] if gpus else []), *gpus]
    for name in names:
        if name not in known:
            raise ConfigError(f"--device {name}: not on this machine, which has {', '.join(known)}")
    return names


def prepare_worker(names: multiprocessing.Queue[str], config: StudyConfig, folder: Path) -> None:
    """Take a device and bring the data to it."""
    global _data
    device = torch.device(names.get())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _data = load_data(folder, config.seq_len, config.held_out, device)


def work(job: Job) -> Outcome:
    assert _data is not None
    device = _data.train.device
    if device.type == "cuda":
        torch.cuda.set_device(device)  # belongs to the thread
    began, lines = time.monotonic(), list[str]()
    shape = (job.runs[0].architecture, job.runs[0].batch, len(job.runs))
    _shapes[shape] += 1
    if job.mode == "compile" and not job.long and _shapes[shape] <= 2:
        # Compiling takes longer than it gains, unless the shape comes again.
        job = replace(job, mode="graph")
    try:
        rows = train_rows(job, _data, lines.append)
    except Stopped:
        lines.append(f"stopped {len(job.runs)} runs; {job.checkpoint} has what they reached")
        return Outcome(lines=tuple(lines))
    except torch.OutOfMemoryError:
        lines.append(f"out of memory with {len(job.runs)} runs together")
        return Outcome(lines=tuple(lines), out_of_memory=True)
    finally:
        # A pack refers to itself; its graph's memory would stay until a later collection.
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return Outcome(tuple(rows), time.monotonic() - began, tuple(lines))


def run_study(
    config: StudyConfig,
    folder: Path,
    out: Path,
    *,
    minutes: float,
    mode: Mode,
    device: str = "auto",
    say: Callable[[str], None] = print,
) -> int:
    """Train what :func:`studying.grid.wanted` says until nothing is left or the time is over.

    Rows go to ``study.csv`` in ``out`` as soon as their pack has ended; runs that are in it are not
    made again. A pack that cannot end in time leaves a checkpoint.

    Returns:
        The number of new rows.

    Raises:
        ConfigError: ``out`` is another study's, or ``device`` is not there.
        DataError: no tokens in ``folder``.
        ResultsError: damaged rows in ``out``.
    """
    deadline = time.time() + 60 * minutes
    names = devices(device)
    # Here, since a pool would only say that a worker could not start.
    data = load_data(folder, config.seq_len, config.held_out, torch.device("cpu"))
    path = out / FILE
    results = read(path)
    identity.claim(config, data.sha256, out, results, say)
    del data
    queue: multiprocessing.Queue[str] = multiprocessing.get_context("spawn").Queue()
    for name in names:
        queue.put(name)
    executor: Executor
    given = queue, config, folder
    if len(names) == 1:
        executor = ThreadPoolExecutor(1, initializer=prepare_worker, initargs=given)
    else:
        executor = ProcessPoolExecutor(
            len(names),
            mp_context=multiprocessing.get_context("spawn"),
            initializer=prepare_worker,
            initargs=given,
        )
    rates: dict[tuple[str, int], float] = {}
    limits: dict[int, int] = {}
    jobs: dict[Future[Outcome], Job] = {}
    made = 0
    say(f"{len(results)} rows in {path}; {len(names)} x {names[0]}, mode {mode}")
    with executor:
        while True:
            while len(jobs) < len(names):
                running = [run for job in jobs.values() for run in job.runs]
                left = wanted(config, results, running)
                rate = config.tokens_per_s
                if left:
                    rate = rates.get((left[0].architecture, left[0].batch), rate)
                pack = next_pack(config, left, rate, deadline - time.time())
                if not pack:
                    break
                pack = pack[: limits.get(pack[0].batch, len(pack))]
                tokens = len(pack) * config.samples * config.seq_len
                job = Job(
                    config,
                    tuple(pack),
                    mode,
                    out / checkpoint_name(pack),
                    deadline,
                    long=tokens / rate > 45,
                )
                jobs[executor.submit(work, job)] = job
                say(f"start {_named(pack)}")
            if not jobs:
                break
            for future in wait(jobs, return_when=FIRST_COMPLETED).done:
                job = jobs.pop(future)
                outcome = future.result()
                for line in outcome.lines:
                    say(line)
                if outcome.out_of_memory:
                    if len(job.runs) == 1:
                        raise RuntimeError(f"{job.runs[0]} does not fit into the device's memory")
                    limits[job.runs[0].batch] = len(job.runs) // 2
                    continue
                if outcome.rows:
                    append(path, list(outcome.rows))
                    results.update({row.run: row for row in outcome.rows})
                    made += len(outcome.rows)
                    # With what starting and evaluating cost: it is to fit into the time.
                    rate = sum(row.tokens for row in outcome.rows) / outcome.seconds
                    rates[job.runs[0].architecture, job.runs[0].batch] = rate
                    for row in outcome.rows:
                        say(_line(row))
                    say(
                        f"{deadline - time.time():.0f} s left; {rate / 1e6:.2f} M tokens/s with, "
                        f"{outcome.rows[0].tokens_per_s / 1e6:.2f} without start and evaluation"
                    )
    left = wanted(config, results)
    say(f"{made} new rows, {len(results)} in all; {len(left)} runs are known to be left")
    return made


def _named(pack: list[Run]) -> str:
    first = pack[0]
    lrs = ", ".join(f"{run.rule} {run.lr:g} s{run.seed}" for run in pack)
    return f"{first.architecture} batch {first.batch}, {len(pack)} runs: {lrs}"


def _line(row: Row) -> str:
    run = row.run
    state = "  diverged" if row.diverged else "  stuck" if row.stuck else ""
    return (
        f"{run.architecture} {run.rule} batch {run.batch} warm-up {run.warmup:g} lr {run.lr:g} "
        f"seed {run.seed}: {row.loss:.4f}{state}"
    )
