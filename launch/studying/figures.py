"""The figures, each drawn from the CSV files alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from studying.config import StudyConfig
from studying.grid import Results, basin
from studying.results import read_table
from studying.tables import Found, fewest_steps

_COLORS = ["#2b5c94", "#c8442d", "#7aa6d8", "#e2a08f", "#4f8f4f", "#8a5fa8", "#b58b2b"]


def draw(
    config: StudyConfig,
    results: Results,
    cells: dict[tuple[str, str, int], Found],
    noise: Path,
    trust: Path,
    to: Path,
) -> list[Path]:
    """Draw all for which there are rows; the files that were written."""
    to.mkdir(parents=True, exist_ok=True)
    colors = dict(zip(config.rules, _COLORS * 9))
    noises = read_table(noise, ("batch", "step", "steps", "noise_scale"))
    trusts = read_table(trust, ("batch", "step", "steps", "trust_ratio"))
    figures: dict[str, Figure | None] = {
        f"study_basins_{a}.png": _basins(config, results, cells, a, colors)
        for a in config.architectures
    }
    if len(config.batches) > 1:
        figures["study_transfer.png"] = _transfer(config, cells, colors)
        figures["study_steps.png"] = _steps(config, results, noises, colors)
    figures["study_noise.png"] = _noise(config, noises, colors)
    figures["study_trust.png"] = _trust(trusts)
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(to / name, dpi=110)
            plt.close(figure)
            written.append(to / name)
    return written


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _basins(
    config: StudyConfig,
    results: Results,
    cells: dict[tuple[str, str, int], Found],
    architecture: str,
    colors: dict[str, str],
) -> Figure | None:
    """Loss against lr; the second row shows what is near the best losses."""
    own = {key: of for key, of in cells.items() if key[0] == architecture}
    if all(of.lrs < 2 for of in own.values()):
        return None
    rows = [row for run, row in results.items() if run.architecture == architecture]
    finite = [row.loss for row in rows if math.isfinite(row.loss)]
    unigram, low = rows[0].unigram_loss, min(finite)
    # As high as the best of every basin, and a little above it.
    near = max((of.best.mean for of in own.values() if of.swept), default=low) + 0.25
    count = len(config.batches)
    size = 4 * count, 7
    figure, grid = plt.subplots(
        2, count, figsize=size, sharex="col", sharey="row", squeeze=False, layout="constrained"
    )
    figure.suptitle(f"{architecture}: held-out loss against lr")
    for line, high in zip(grid, (min(max(finite), unigram + 0.3) + 0.1, near)):
        line[0].set_ylim(low - 0.1 * (high - low), high)
        line[0].set_ylabel("nats a predicted token")
        for axes, batch in zip(line, config.batches):
            tried: set[float] = set()
            for rule, color in colors.items():
                of = own.get((architecture, rule, batch))
                half_life_at_base = config.rules[rule].half_life and batch == config.base_batch
                if of is not None and not half_life_at_base:
                    tried |= _basin(axes, config, results, of, high, color)
            axes.axhline(unigram, color="#999999", linewidth=0.8, linestyle=":")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted(tried), [f"{lr:g}" for lr in sorted(tried)], rotation=60)
            _plain(axes)
    for axes, batch in zip(grid[0], config.batches):
        axes.set_title(f"batch {batch}, {config.steps(batch):,} steps", fontsize=10)
    for axes in grid[1]:
        axes.set_xlabel("lr")
    # One line of each rule, from whichever panel has it.
    lines = {of.get_label(): of for axes in grid[0] for of in axes.get_legend_handles_labels()[0]}
    # Beside the panels: in one it would cover points.
    figure.legend(handles=list(lines.values()), loc="outside right upper", frameon=False)
    return figure


def _basin(
    axes: Axes, config: StudyConfig, results: Results, of: Found, high: float, color: str
) -> set[float]:
    """Draw one basin and return its lrs. Runs that diverged stand at the upper edge as crosses,
    those that are stuck are hollow; a triangle is the transferred lr, a star the best, a small dot
    another seed."""
    rows = basin(of.cell, results, config.seeds[0])
    well = {lr: row.loss for lr, row in rows.items() if not row.diverged}
    axes.plot(list(well), list(well.values()), color=color, label=of.cell.rule, lw=1.3)
    for lr, row in rows.items():
        if row.diverged:
            axes.plot(lr, high, "x", color=color, markersize=7, clip_on=False)
        else:
            fill = "white" if row.stuck else color
            axes.plot(lr, row.loss, "o", color=color, mfc=fill, markersize=5)
    for run, row in results.items():
        if run.cell == of.cell and run.seed != config.seeds[0] and not row.diverged:
            axes.plot(run.lr, row.loss, ".", color=color, alpha=0.5, markersize=5)
    if of.swept:
        axes.plot(of.best.lr, of.best.rows[0].loss, "*", color=color, markersize=13)
    if of.moved is not None:
        at_bottom = axes.get_xaxis_transform()
        axes.plot(of.moved.lr, 0.04, "^", color=color, markersize=8, transform=at_bottom)
    return set(rows)


def _transfer(
    config: StudyConfig, cells: dict[tuple[str, str, int], Found], colors: dict[str, str]
) -> Figure | None:
    names = [a for a in config.architectures if any(key[0] == a for key in cells)]
    if not names:
        return None
    figure, grid = plt.subplots(
        2, len(names), figsize=(5.5 * len(names), 7), squeeze=False, layout="constrained"
    )
    for column, architecture in enumerate(names):
        for rule, color in colors.items():
            base = cells.get((architecture, rule, config.base_batch))
            series: list[tuple[int, float, float, float]] = []
            for batch in config.batches:
                of = cells.get((architecture, rule, batch))
                if of is None or of.moved is None or base is None:
                    continue
                error = of.moved.deviation if math.isfinite(of.moved.deviation) else 0.0
                series.append((batch, of.moved.mean - base.best.mean, of.regret, error))
            for axes, index in ((grid[0][column], 1), (grid[1][column], 2)):
                points = [(s[0], s[index], s[3]) for s in series if math.isfinite(s[index])]
                if points:
                    x, y, bars = zip(*points)
                    axes.errorbar(x, y, bars, color=color, marker="o", label=rule, capsize=3)
                lost = [s[0] for s in series if not math.isfinite(s[index])]
                for x in lost:
                    at_top = axes.get_xaxis_transform()
                    axes.plot(x, 1.0, "x", color=color, transform=at_top, clip_on=False)
        for axes, name in (
            (grid[0][column], "cost, transferred minus base"),
            (grid[1][column], "regret, transferred minus best of the batch"),
        ):
            axes.set_title(f"{architecture}: {name}", fontsize=10)
    for axes in grid.flat:
        axes.set_xscale("log", base=4)
        axes.set_xticks(config.batches, [str(b) for b in config.batches])
        axes.set_xlabel("batch")
        axes.set_ylabel("nats")
        axes.axhline(0, color="#999999", linewidth=0.8)
        _plain(axes)
    grid[0][0].legend(frameon=False, fontsize=8)
    return figure


def _steps(
    config: StudyConfig,
    results: Results,
    noise: Sequence[dict[str, str]],
    colors: dict[str, str],
) -> Figure | None:
    """Fewest steps to a loss that all batches reach; grey: the noise scale near the run's end."""
    names = [a for a in config.architectures if any(run.architecture == a for run in results)]
    if not names:
        return None
    figure, grid = plt.subplots(
        1, len(names), figsize=(5.5 * len(names), 4.5), squeeze=False, layout="constrained"
    )
    for axes, architecture in zip(grid[0], names):
        target = math.nan
        for rule, color in colors.items():
            target, fewest = fewest_steps(config, results, architecture, rule)
            points = {b: s for b, s in fewest.items() if math.isfinite(s)}
            if len(points) < 2:
                continue
            axes.plot(list(points), list(points.values()), "o-", color=color, label=rule)
            if config.base_batch in points and rule in ("adamw", "lamb"):
                perfect = [points[config.base_batch] * config.base_batch / b for b in points]
                axes.plot(list(points), perfect, "--", color=color, linewidth=0.8)
        scales = [
            float(row["noise_scale"])
            for row in noise
            if row["architecture"] == architecture and 2 * int(row["step"]) >= int(row["steps"])
        ]
        scales = [s for s in scales if math.isfinite(s) and s > 0]
        if scales:
            low, high = np.quantile(scales, [0.25, 0.75])
            axes.axvspan(low, high, color="#dddddd", zorder=0, label="noise scale, 2nd half")
        axes.set_xscale("log", base=4)
        axes.set_yscale("log")
        axes.set_xticks(config.batches, [str(b) for b in config.batches])
        axes.set_xlabel("batch")
        axes.set_ylabel(f"steps to {target:.2f} nats")
        axes.set_title(f"{architecture}; dashed: perfect scaling")
        axes.legend(frameon=False, fontsize=8)
        _plain(axes)
    return figure


def _noise(
    config: StudyConfig, rows: Sequence[dict[str, str]], colors: dict[str, str]
) -> Figure | None:
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for line, architecture in zip(("-", "--"), config.architectures):
        for rule, color in colors.items():
            own = [r for r in rows if (r["architecture"], r["rule"]) == (architecture, rule)]
            # A negative estimate of |G|^2 gives no scale.
            points = [(int(r["step"]) / int(r["steps"]), float(r["noise_scale"])) for r in own]
            points = [p for p in points if p[1] > 0]
            if points:
                axes.plot(*zip(*points), line, color=color, label=f"{architecture}, {rule}")
    for batch in config.batches:
        axes.axhline(batch, color="#999999", linewidth=0.7, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("share of the run")
    axes.set_ylabel("simple noise scale, sequences")
    axes.set_title("noise scale along a run; dotted: the study's batches")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return figure


def _trust(rows: Sequence[dict[str, str]]) -> Figure | None:
    """Trust ratio of every adapted tensor along a run: log colour, steps to the right."""
    if not rows:
        return None
    first = rows[0]["architecture"], rows[0]["rule"]
    own = [r for r in rows if (r["architecture"], r["rule"]) == first]
    names = list(dict.fromkeys(r["param"] for r in own))
    steps = sorted({int(r["step"]) for r in own})
    values = np.full((len(names), len(steps)), np.nan)
    for r in own:
        values[names.index(r["param"]), steps.index(int(r["step"]))] = float(r["trust_ratio"])
    # Tensors that are not adapted have ratio 1 throughout.
    adapted = [k for k in range(len(names)) if not np.all(values[k] == 1)]
    if not adapted:
        return None
    values, names = values[adapted], [names[k] for k in adapted]
    figure, axes = plt.subplots(figsize=(8, 2.5 + 0.2 * len(names)), layout="constrained")
    picture = axes.pcolormesh(
        np.arange(len(steps) + 1), np.arange(len(names) + 1), values, norm=LogNorm(), cmap="viridis"
    )
    axes.set_yticks(np.arange(len(names)) + 0.5, names, fontsize=7)
    every = max(1, len(steps) // 8)
    axes.set_xticks(np.arange(len(steps))[::every] + 0.5, [str(s) for s in steps[::every]])
    axes.invert_yaxis()
    axes.set_xlabel("step")
    run = own[0]
    axes.set_title(
        f"trust ratios: {run['architecture']}, {run['rule']}, batch {run['batch']}, lr {run['lr']}"
    )
    figure.colorbar(picture)
    return figure
