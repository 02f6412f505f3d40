"""Which runs come next: pure functions of the configuration and of the results so far."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch

from studying.config import StudyConfig
from studying.optimizers import BFLOAT16_WEIGHTS
from studying.results import Cell, Row, Run

Results = Mapping[Run, Row]


def wanted(config: StudyConfig, results: Results, running: Iterable[Run] = ()) -> list[Run]:
    """Runs that are neither done nor ``running``, the most important first.

    Each architecture in turn: a sweep of lrs in every cell, more lrs until both sides of each basin
    show, the transferred lrs, the other seeds at best and transferred lrs, other warm-ups at the
    largest batch. Rules marked late go through the same after all others.
    """
    busy = set(running)
    found: dict[Run, None] = {}
    for late in (False, True):
        rules = [name for name, rule in config.rules.items() if rule.late == late]
        for architecture in config.architectures:
            cells = [
                Cell(architecture, rule, batch, config.warmup(batch))
                for batch in _ends_first(config.batches)
                for rule in rules
                if batch in (config.rules[rule].batches or config.batches)
                and not (config.rules[rule].half_life and batch == config.base_batch)
            ]
            for stage in (_sweep, _extension, _transfer, _seeds, _warmups):
                for run in stage(config, cells, results, busy):
                    found[run.rounded()] = None
    return [run for run in found if run not in results and run not in busy]


def _ends_first(batches: tuple[int, ...]) -> list[int]:
    # The two ends decide about transfer; what lies between fills the figures.
    return [batches[0], *reversed(batches[1:])]


def first_lrs(config: StudyConfig, cell: Cell) -> list[float]:
    """The lrs of the first sweep, moved up by half of what the square-root rule says: the best lr
    grows more slowly where it is bounded by stability."""
    moved = round(math.log2(math.sqrt(cell.batch / config.base_batch)) / 2)
    return [lr * 2.0**moved for lr in config.rules[cell.rule].lrs]


def basin(cell: Cell, results: Results, seed: int) -> dict[float, Row]:
    """{lr: row} of one seed in ascending order of lr."""
    rows = {run.lr: row for run, row in results.items() if run.cell == cell and run.seed == seed}
    return dict(sorted(rows.items()))


def best_lr(rows: Mapping[float, Row]) -> float | None:
    """The lr of the lowest loss among runs that did not diverge."""
    alive = {lr: row.loss for lr, row in rows.items() if not row.diverged}
    return min(alive, key=lambda lr: alive[lr]) if alive else None


def sides(config: StudyConfig, rows: Mapping[float, Row]) -> tuple[bool, bool]:
    """Whether the loss has risen by ``config.rise`` below the best lr, and above it."""
    best = best_lr(rows)
    if best is None:
        return False, False
    limit = rows[best].loss + config.rise
    risen = [lr for lr, row in rows.items() if row.diverged or row.loss > limit]
    return any(lr < best for lr in risen), any(lr > best for lr in risen)


def swept(config: StudyConfig, cell: Cell, results: Results) -> bool:
    """Whether all lrs of the first sweep were run."""
    rows = basin(_rounded(cell), results, config.seeds[0])
    return all(float(f"{lr:.6g}") in rows for lr in first_lrs(config, cell))


def complete(config: StudyConfig, cell: Cell, results: Results) -> bool:
    """Whether no lr will be added to this basin any more."""
    rows = basin(_rounded(cell), results, config.seeds[0])
    ends = all(sides(config, rows)) or len(rows) >= config.max_lrs
    return ends and swept(config, cell, results)


def _rounded(cell: Cell) -> Cell:
    run = Run(cell.architecture, cell.rule, cell.batch, cell.warmup, 1.0, 0)
    return run.rounded().cell


def _run(cell: Cell, lr: float, seed: int) -> Run:
    return Run(cell.architecture, cell.rule, cell.batch, cell.warmup, lr, seed)


def _sweep(
    config: StudyConfig, cells: list[Cell], results: Results, busy: set[Run]
) -> Iterator[Run]:
    for cell in cells:
        for lr in first_lrs(config, cell):
            yield _run(cell, lr, config.seeds[0])


def _extension(
    config: StudyConfig, cells: list[Cell], results: Results, busy: set[Run]
) -> Iterator[Run]:
    for cell in map(_rounded, cells):
        rows = basin(cell, results, config.seeds[0])
        unfinished = {r for r in busy if r.cell == cell and r.seed == config.seeds[0]}
        if len(rows) < len(first_lrs(config, cell)) or unfinished:
            continue
        lower, upper = sides(config, rows)
        lrs = list(rows)
        if len(lrs) >= config.max_lrs:
            continue
        if best_lr(rows) is None:
            # Everything diverged: the basin lies below.
            lower, upper = False, True
        if not lower:
            yield _run(cell, lrs[0] / 2, config.seeds[0])
        if not upper:
            yield _run(cell, lrs[-1] * 2, config.seeds[0])


def transferred(config: StudyConfig, cell: Cell, results: Results) -> Run | None:
    """The run that the paper's rule alone gives: seed 0, lr from the best one at the base batch."""
    rule = config.rules[cell.rule].base if config.rules[cell.rule].half_life else cell.rule
    base = Cell(cell.architecture, rule, config.base_batch, config.warmup(config.base_batch))
    if not complete(config, base, results):
        return None
    best = best_lr(basin(_rounded(base), results, config.seeds[0]))
    if best is None:
        return None
    return _run(cell, config.transferred_lr(best, cell.batch), config.seeds[0]).rounded()


def _transfer(
    config: StudyConfig, cells: list[Cell], results: Results, busy: set[Run]
) -> Iterator[Run]:
    for cell in cells:
        run = transferred(config, cell, results)
        if run:
            yield run


def _seeds(
    config: StudyConfig, cells: list[Cell], results: Results, busy: set[Run]
) -> Iterator[Run]:
    for seed in config.seeds[1:]:
        for cell in cells:
            chosen = [transferred(config, cell, results)]
            if complete(config, cell, results):
                best = best_lr(basin(_rounded(cell), results, config.seeds[0]))
                chosen.append(None if best is None else _run(cell, best, 0))
            for run in chosen:
                if run:
                    yield _run(cell, run.lr, seed)


def _warmups(
    config: StudyConfig, cells: list[Cell], results: Results, busy: set[Run]
) -> Iterator[Run]:
    for cell in cells:
        if cell.batch != config.batches[-1] or not complete(config, cell, results):
            continue
        best = best_lr(basin(_rounded(cell), results, config.seeds[0]))
        for warmup in config.more_warmups if best else ():
            other = Cell(cell.architecture, cell.rule, cell.batch, warmup)
            for factor in (1.0, 2.0, 0.5):
                assert best is not None
                yield _run(other, best * factor, config.seeds[0])


def dtype_of(config: StudyConfig, run: Run) -> torch.dtype:
    """Of the weights of a run."""
    half = config.rules[run.rule].optimizer in BFLOAT16_WEIGHTS
    return torch.bfloat16 if half else torch.float32


def pack_key(config: StudyConfig, run: Run) -> tuple[str, int, torch.dtype]:
    """What runs that train together have alike: their weights are stacked."""
    return run.architecture, run.batch, dtype_of(config, run)


def next_pack(
    config: StudyConfig, queue: list[Run], tokens_per_s: float, seconds_left: float
) -> list[Run]:
    """The first run of ``queue`` and those after it that train beside it: of the same
    :func:`pack_key`, as many as fit ``pack_sequences``, ``pack_seconds`` and the time left. Empty
    if not even one fits."""
    if not queue:
        return []
    of_one = config.samples * config.seq_len / tokens_per_s
    if of_one > seconds_left:
        return []
    first = queue[0]
    limit = min(
        config.pack_sequences // first.batch, int(min(config.pack_seconds, seconds_left) / of_one)
    )
    alike = [r for r in queue if pack_key(config, r) == pack_key(config, first)]
    return alike[: max(1, limit)]
