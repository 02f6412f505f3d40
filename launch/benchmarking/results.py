"""Tables, CSV rows with hardware and versions, and charts of the benchmarks."""

from __future__ import annotations

import csv
import datetime
import importlib.util
import platform
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


def versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "triton": ""}
    if importlib.util.find_spec("triton"):
        import triton

        found["triton"] = triton.__version__
    return found


def print_table(title: dict[str, Any], rows: list[dict[str, Any]], skipped: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    if rows:
        what = ", ".join(f"{key} {value}" for key, value in title.items())
        table = Table(
            title=f"{what}: {rows[0]['params'] / 1e6:.1f} M in {rows[0]['tensors']} tensors"
        )
        for column in ("contender", "device ms", "p20-p80", "host ms", "GB/s", "B/param", "error"):
            table.add_column(column, justify="left" if column == "contender" else "right")
        for r in sorted(rows, key=lambda r: float(r["device_ms"])):
            table.add_row(
                r["contender"],
                f"{r['device_ms']:.3f}",
                f"{r['device_ms_p20']:.3f}-{r['device_ms_p80']:.3f}",
                f"{r['host_ms']:.3f}",
                f"{r['moved_gb_s']:.0f}",
                f"{r['effective_bytes']:.1f}",
                f"{r['error']:.0e}",
            )
        Console(width=110).print(table)
    for line in skipped:
        print(f"  not measured - {line}")


def save(name: str, device: str, rows: list[dict[str, Any]]) -> None:
    """Append to results/<name>.csv and draw this run's rows as results/<name>_<device>.png."""
    FOLDER.mkdir(exist_ok=True)
    common = {
        "date": datetime.date.today().isoformat(),
        "hardware": hardware(device),
        **versions(),
    }
    path = FOLDER / f"{name}.csv"
    new = not path.exists()
    with path.open("a", newline="") as f:
        writer = csv.DictWriter(f, [*common, *rows[0]], lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow({**common, **rounded})
    chart(FOLDER / f"{name}_{device}.png", common, rows)
    print(f"appended {len(rows)} rows to {path}")


def chart(path: Path, common: dict[str, str], rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = list(dict.fromkeys((r["workload"], r["dtype"], r["clip"]) for r in rows))
    height = sum(1 + sum((r["workload"], r["dtype"], r["clip"]) == k for r in rows) for k in keys)
    figure, axes = plt.subplots(
        len(keys), 1, figsize=(9, 0.5 + 0.34 * height), squeeze=False, constrained_layout=True
    )
    for ax, key in zip(axes[:, 0], keys):
        chosen = [r for r in rows if (r["workload"], r["dtype"], r["clip"]) == key]
        chosen.sort(key=lambda r: -float(r["device_ms"]))
        names = [r["contender"] for r in chosen]
        colors = ["#1f77b4" if n.startswith(("Lamb", "Sharded")) else "#999999" for n in names]
        bars = ax.barh(names, [r["device_ms"] for r in chosen], color=colors)
        ax.bar_label(bars, fmt="%.3g", padding=3)
        ax.set_xscale("log")
        ax.margins(x=0.15)
        ax.set_xlabel("ms per step (log)")
        ax.set_title(f"{key[0]}, {key[1]}, clip {key[2]}: {chosen[0]['params'] / 1e6:.1f} M params")
    figure.suptitle(f"{common['hardware']}, torch {common['torch']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
