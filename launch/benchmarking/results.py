"""Tables, CSV rows with hardware and versions, and charts of the benchmarks."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import importlib.util
import platform
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent.parent / "results"


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"


def common(device: str, *packages: str) -> dict[str, str]:
    """What every row of a run has: date, hardware and versions; empty where not installed."""
    found = {"date": datetime.date.today().isoformat(), "hardware": hardware(device)}
    found["torch"] = torch.__version__
    for name in ("triton", *packages):
        found[name] = ""
        if importlib.util.find_spec(name):
            with suppress(importlib.metadata.PackageNotFoundError):
                found[name] = importlib.metadata.version(name)
    return found


def print_table(
    title: str,
    columns: Sequence[tuple[str, str, str]],
    rows: Sequence[dict[str, Any]],
    skipped: Sequence[str],
) -> None:
    """``columns`` are (header, key, format); then what was not measured, and why."""
    from rich.console import Console
    from rich.table import Table

    if rows:
        table = Table(title=title)
        for header, key, _ in columns:
            left = key == "contender"
            table.add_column(header, justify="left" if left else "right", no_wrap=left)
        for row in rows:
            values = (format(row[key], spec) for _, key, spec in columns)
            table.add_row(*("-" if value == "nan" else value for value in values))
        Console(width=140).print(table)
    for line in skipped:
        print(f"  not measured - {line}")


def append(path: Path, common: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Add ``rows`` to a CSV file.

    Raises:
        ValueError: the file has other columns.
    """
    columns = [*common, *rows[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        with path.open(newline="") as f:
            old = next(csv.reader(f), [])
        if old != columns:
            raise ValueError(f"{path} has other columns: {old} instead of {columns}")
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**common, **rounded})


def chart(
    path: Path,
    title: str,
    rows: Sequence[dict[str, Any]],
    *,
    facets: tuple[str, ...],
    value: str,
    ours: tuple[str, ...],
    marked: str | None = None,
    log: bool = False,
) -> None:
    """Bars of ``value``, in ms, one panel for each combination of ``facets``.

    ``ours`` are what the names of our contenders begin with; the value of the contender
    ``marked`` is a line through its panel.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(tuple(row[facet] for facet in facets), []).append(row)
    height = len(panels) + len(rows)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 0.5 + 0.34 * height), squeeze=False, constrained_layout=True
    )
    for ax, (key, chosen) in zip(axes[:, 0], panels.items()):
        chosen = sorted(chosen, key=lambda row: -float(row[value]))
        names = [row["contender"] for row in chosen]
        colors = ["#1f77b4" if name.startswith(ours) else "#999999" for name in names]
        bars = ax.barh(names, [row[value] for row in chosen], color=colors)
        ax.bar_label(bars, fmt="%.3g", padding=3)
        if marked in names:
            ax.axvline(chosen[names.index(marked)][value], color="#c8442d", linewidth=1)
        if log:
            ax.set_xscale("log")
        ax.margins(x=0.15)
        ax.set_xlabel("ms per step (log)" if log else "ms per step")
        panel = ", ".join(f"{facet} {k}" for facet, k in zip(facets, key))
        ax.set_title(f"{panel}: {chosen[0]['params'] / 1e6:.1f} M params")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
