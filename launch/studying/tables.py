"""What the rows say: cells at their best and transferred lrs, and the tables of the report."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from studying.config import StudyConfig
from studying.grid import Results, basin, best_lr, sides, swept, wanted
from studying.results import Cell, Row, Run


@dataclass(frozen=True)
class Point:
    """Runs of one cell and lr over its seeds. A run that is not finite makes the mean infinite."""

    lr: float
    rows: tuple[Row, ...]

    @property
    def losses(self) -> list[float]:
        return [row.loss if math.isfinite(row.loss) else math.inf for row in self.rows]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Sample standard deviation over seeds; NaN below two, or where one is infinite."""
        if len(self.rows) < 2 or not math.isfinite(self.mean):
            return math.nan
        return statistics.stdev(self.losses)

    def __str__(self) -> str:
        text = f"{self.mean:.3f}"
        if math.isfinite(self.deviation):
            text += f" ± {self.deviation:.3f}"
        bad = sum(row.diverged or row.stuck for row in self.rows)
        return f"{text} ({len(self.rows)}{f', {bad} diverged or stuck' if bad else ''})"


#: nats that H4 counts as near to the best loss
NEAR = 0.1


@dataclass(frozen=True)
class Found:
    """One cell: its best lr, its transferred one, and whether its basin shows both sides."""

    cell: Cell
    best: Point
    moved: Point | None
    lrs: int
    sides: tuple[bool, bool]
    swept: bool
    """Whether all lrs of the first sweep were run: before, the best lr says nothing."""
    near: int
    """lrs whose loss on the first seed is within ``NEAR`` nats of the best one's: the basin's
    width."""

    @property
    def regret(self) -> float:
        return math.nan if self.moved is None else self.moved.mean - self.best.mean


def cell_of(config: StudyConfig, architecture: str, rule: str, batch: int) -> Cell:
    """The cell of the study's warm-up rule. A half-life rule is its base at the base batch."""
    if config.rules[rule].half_life and batch == config.base_batch:
        rule = config.rules[rule].base
    return Run(architecture, rule, batch, config.warmup(batch), 1.0, 0).rounded().cell


def point(cell: Cell, lr: float, results: Results) -> Point | None:
    rows = [row for run, row in results.items() if run.cell == cell and run.lr == lr]
    return Point(lr, tuple(sorted(rows, key=lambda row: row.run.seed))) if rows else None


def found(
    config: StudyConfig, results: Results, architecture: str, rule: str, batch: int
) -> Found | None:
    """None where the cell has no run that ended well."""
    cell = cell_of(config, architecture, rule, batch)
    rows = basin(cell, results, config.seeds[0])
    lr = best_lr(rows)
    base = basin(cell_of(config, architecture, rule, config.base_batch), results, config.seeds[0])
    base_lr = best_lr(base)
    if lr is None:
        return None
    best = point(cell, lr, results)
    assert best is not None
    moved = None
    if base_lr is not None:
        moved = point(cell, float(f"{config.transferred_lr(base_lr, batch):.6g}"), results)
    done = swept(config, cell, results)
    near = sum(not row.diverged and row.loss <= rows[lr].loss + NEAR for row in rows.values())
    return Found(cell, best, moved, len(rows), sides(config, rows), done, near)


def everything(config: StudyConfig, results: Results) -> dict[tuple[str, str, int], Found]:
    """{(architecture, rule, batch): cell} of all that were run."""
    keys = [
        (architecture, rule, batch)
        for architecture in config.architectures
        for rule in config.rules
        for batch in config.batches
    ]
    cells = {key: found(config, results, *key) for key in keys}
    tried = {(run.architecture, run.rule) for run in results}
    return {key: of for key, of in cells.items() if of is not None and key[:2] in tried}


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _number(value: float, form: str = "+.3f") -> str:
    return "" if math.isnan(value) else format(value, form)


def cells_table(config: StudyConfig, cells: dict[tuple[str, str, int], Found]) -> str:
    rows = []
    for (architecture, rule, batch), of in cells.items():
        base = cells.get((architecture, rule, config.base_batch))
        cost = math.nan if base is None or of.moved is None else of.moved.mean - base.best.mean
        rows.append(
            [
                architecture,
                rule,
                batch,
                config.steps(batch),
                f"{of.best.lr:g}",
                of.best,
                "" if of.moved is None else f"{of.moved.lr:g}",
                of.moved or "",
                _number(cost),
                _number(of.regret),
                f"{of.lrs}{'' if all(of.sides) else ', open ' + _open(of.sides)}",
            ]
        )
    header = "model|rule|batch|steps|best lr|loss|transferred lr|loss|cost|regret|lrs"
    return table(header.split("|"), rows)


def _open(shown: tuple[bool, bool]) -> str:
    return " and ".join(name for name, seen in zip(("below", "above"), shown) if not seen)


def four_times_table(config: StudyConfig, cells: dict[tuple[str, str, int], Found]) -> str:
    """The base batch and four times it, rule by rule."""
    rows = []
    for (architecture, rule, batch), of in cells.items():
        base = cells.get((architecture, rule, config.base_batch))
        if batch != 4 * config.base_batch or base is None:
            continue
        rows.append(
            [
                architecture,
                rule,
                base.best,
                of.best,
                _number(of.best.mean - base.best.mean),
                of.moved or "",
                _number(math.nan if of.moved is None else of.moved.mean - base.best.mean),
            ]
        )
    b = config.base_batch
    header = f"model|rule|best at {b}|best at {4 * b}|change|transferred to {4 * b}|change"
    return table(header.split("|"), rows)


def difference_table(config: StudyConfig, cells: dict[tuple[str, str, int], Found]) -> str:
    """Each rule's best loss minus that of the first rule."""
    rows = []
    reference = next(iter(config.rules))
    for (architecture, rule, batch), of in cells.items():
        other = cells.get((architecture, reference, batch))
        if rule != reference and other is not None:
            difference, noise, seen = _tuned(of, other)
            numbers = _number(difference), _number(noise, ".3f")
            rows.append([architecture, rule, batch, *numbers, seen])
    header = f"model|rule|batch|best loss minus {reference}'s|2 pooled deviations|difference"
    return table(header.split("|"), rows)


def _tuned(of: Found, other: Found) -> tuple[float, float, str]:
    """Difference of the best losses, two pooled standard deviations of the seeds, and whether it is
    within them."""
    both = [d for d in (of.best.deviation, other.best.deviation) if math.isfinite(d)]
    noise = 2 * math.sqrt(sum(d * d for d in both) / len(both)) if both else math.nan
    difference = of.best.mean - other.best.mean
    seen = "within" if abs(difference) <= noise else "seen"
    if math.isnan(noise) or not (of.swept and other.swept):
        seen = "open"
    return difference, noise, seen


def verdicts(config: StudyConfig, cells: dict[tuple[str, str, int], Found]) -> list[str]:
    """H1 to H4 of ``study_large_batch`` as the numbers have them, each by architecture."""
    lines = []
    for architecture in config.architectures:
        for batch in [b for b in config.batches if b >= 16 * config.base_batch]:
            costs = {rule: _cost(config, cells, architecture, rule, batch) for rule in config.rules}
            lamb, adamw = costs.get("lamb"), costs.get("adamw")
            if lamb and adamw:
                compared = _compared("LAMB", lamb, "AdamW", adamw)
                lines.append(f"* H1, {architecture}, batch {batch}: {compared}")
        for batch in config.batches:
            of, other = (cells.get((architecture, rule, batch)) for rule in ("lamb", "adamw"))
            if of and other:
                difference, noise, seen = _tuned(of, other)
                verdict = {"within": "held", "seen": "refuted"}.get(seen, seen)
                lines.append(
                    f"* H2, {architecture}, batch {batch}: LAMB minus AdamW {difference:+.3f}, "
                    f"noise {noise:.3f}; {verdict}"
                )
        largest = config.batches[-1]
        scaled = _regret(cells.get((architecture, "adamw-halflife", largest)))
        fixed = _regret(cells.get((architecture, "adamw", largest)))
        if scaled and fixed:
            compared = _compared("regret with half-life", scaled, "without", fixed)
            lines.append(f"* H3, {architecture}, batch {largest}: {compared}")
        of, other = (cells.get((architecture, rule, largest)) for rule in ("adamh", "lamb"))
        if of and other:
            verdict = "held" if of.near >= other.near else "refuted"
            if not all((*of.sides, *other.sides)):
                verdict = "open"
            lines.append(
                f"* H4, {architecture}, batch {largest}: lrs within {NEAR:g} nats of the best: "
                f"AdamH {of.near}, LAMB {other.near}; {verdict}"
            )
    return lines


Estimate = tuple[float, float]  # value, standard error (NaN: unknown)


def _error(of: Point) -> float:
    return of.deviation / math.sqrt(len(of.rows))


def _difference(a: Point, b: Point) -> Estimate:
    return a.mean - b.mean, math.hypot(_error(a), _error(b))


def _cost(
    config: StudyConfig,
    cells: dict[tuple[str, str, int], Found],
    architecture: str,
    rule: str,
    batch: int,
) -> Estimate | None:
    base = cells.get((architecture, rule, config.base_batch))
    of = cells.get((architecture, rule, batch))
    if base is None or of is None or of.moved is None:
        return None
    return _difference(of.moved, base.best)


def _regret(of: Found | None) -> Estimate | None:
    if of is None or of.moved is None:
        return None
    # Where both are the same runs their noise cancels.
    return (0.0, 0.0) if of.moved.lr == of.best.lr else _difference(of.moved, of.best)


def _compared(name: str, first: Estimate, other_name: str, other: Estimate) -> str:
    text = f"{name} {first[0]:+.3f}, {other_name} {other[0]:+.3f}; "
    if math.isinf(first[0]) and math.isinf(other[0]):
        return text + "both not finite: refuted"
    difference = first[0] - other[0]
    if difference >= 0:
        return text + "refuted"
    error = math.hypot(first[1], other[1])
    if math.isinf(difference):
        return text + "held"
    if math.isnan(error):
        return text + "in its direction; open, too few seeds"
    return text + ("held" if -difference > 2 * error else "in its direction; within two errors")


def failures_table(config: StudyConfig, results: Results) -> str:
    """Runs that diverged or got stuck, among all runs."""
    rows = []
    for architecture in config.architectures:
        for rule in config.rules:
            row: list[object] = [architecture, rule]
            for batch in config.batches:
                of = [
                    row
                    for run, row in results.items()
                    if (run.architecture, run.rule, run.batch) == (architecture, rule, batch)
                ]
                diverged = sum(r.diverged for r in of)
                stuck = sum(r.stuck and not r.diverged for r in of)
                row.append(f"{diverged} + {stuck} of {len(of)}" if of else "")
            if any(row[2:]):
                rows.append(row)
    return table(["model", "rule", *(f"batch {b}" for b in config.batches)], rows)


def warmups_table(config: StudyConfig, results: Results) -> str:
    """Best loss at the largest batch by warm-up, and the lr it was at; seed of the sweep."""
    rows = []
    batch = config.batches[-1]
    shares = sorted({config.warmup(batch), *config.more_warmups})
    for architecture in config.architectures:
        for rule in config.rules:
            row: list[object] = [architecture, rule]
            for share in shares:
                cell = Run(architecture, rule, batch, share, 1.0, 0).rounded().cell
                of = basin(cell, results, config.seeds[0])
                lr = best_lr(of)
                row.append("" if lr is None else f"{of[lr].loss:.3f} at {lr:g} ({len(of)} lrs)")
            if any(row[3:]):
                rows.append(row)
    return table(["model", "rule", *(f"warm-up {100 * s:g} %" for s in shares)], rows)


def missing_lines(config: StudyConfig, results: Results) -> list[str]:
    """What the configuration asks for, as far as the results can tell, and they lack."""
    first = config.seeds[0]
    kinds: dict[tuple[str, str, int], Counter[str]] = {}
    for run in wanted(config, results):
        kind = "lrs" if run.seed == first else "runs with other seeds"
        if run.cell != cell_of(config, run.architecture, run.rule, run.batch):
            kind = "runs with other warm-ups"
        kinds.setdefault((run.architecture, run.rule, run.batch), Counter())[kind] += 1
    return [
        f"* {architecture}, {rule}, batch {batch}: "
        + ", ".join(f"{count} {kind}" for kind, count in sorted(of.items()))
        for (architecture, rule, batch), of in sorted(
            kinds.items(), key=lambda item: (config.architectures.index(item[0][0]), item[0])
        )
    ]


def steps_to(row: Row, target: float) -> float:
    """Steps until the held-out curve first meets ``target``, between two evaluations linearly in
    the loss; infinite where it does not."""
    before: tuple[int, float] | None = None
    for step, loss in row.curve:
        if math.isfinite(loss) and loss <= target:
            if before is None or not math.isfinite(before[1]):
                return float(step)
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (step - before[0])
        before = step, loss
    return math.inf


def fewest_steps(
    config: StudyConfig, results: Results, architecture: str, rule: str
) -> tuple[float, dict[int, float]]:
    """The loss that a run at every batch reaches, for all rules of the model, and {batch: fewest
    steps to it} over all lrs of a rule; of cells whose first lrs were all run."""
    best: list[float] = []
    runs: dict[int, list[Row]] = {}
    for of in config.rules:
        for batch in config.batches:
            cell = cell_of(config, architecture, of, batch)
            if not swept(config, cell, results):
                continue
            rows = list(basin(cell, results, config.seeds[0]).values())
            alive = [row.loss for row in rows if not row.diverged]
            if alive:
                best.append(min(alive))
            if of == rule:
                runs[batch] = rows
    if not best:
        return math.nan, {}
    target = max(best) + 0.01
    return target, {
        batch: min((steps_to(row, target) for row in rows), default=math.inf)
        for batch, rows in runs.items()
    }
