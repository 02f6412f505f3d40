"""The chart at the end of a run, drawn from its log.

To redraw it: ``PYTHONPATH=launch python -m pretraining.curves RUN_DIR``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from pretraining.report import LOG_NAME, read_log

FILE_NAME = "curves.png"

_INK = "#333333"
_TRAIN = "#9db7d5"
_SMOOTH = "#2b5c94"
_HELD_OUT = "#c8442d"


def draw(run_dir: Path, title: str) -> Path:
    """Draw ``log.jsonl`` of ``run_dir``: losses above, trust ratios by layer group below.

    Raises:
        LogError: the log is damaged. OSError: the picture cannot be written.
    """
    rows = read_log(run_dir / LOG_NAME)
    train = [row for row in rows if row["kind"] == "train"]
    held_out = [row for row in rows if row["kind"] == "held_out"]
    figure, (upper, lower) = plt.subplots(
        2, 1, figsize=(9, 8), sharex=True, layout="constrained", dpi=130
    )
    # A run may be named after variables that nobody expanded, $USER_$JOB: that is no formula.
    figure.suptitle(title, x=0.01, ha="left", color=_INK, fontsize=13, parse_math=False)
    _draw_losses(upper, train, held_out)
    _draw_trust(lower, [row for row in train if row["trust"]])
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=_INK)
        axes.margins(x=0.01)
    path = run_dir / FILE_NAME
    part = path.with_name(f".{FILE_NAME}.part")
    figure.savefig(part, format="png")
    plt.close(figure)
    part.replace(path)
    return path


def _draw_losses(axes: Axes, train: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> None:
    axes.set_title("loss, nats a masked token", loc="left", color=_INK, fontsize=11)
    steps = np.array([row["step"] for row in train])
    losses = np.array([row["loss"] for row in train])
    axes.plot(steps, losses, color=_TRAIN, linewidth=0.8, label="training batch")
    # Odd, so that the mean lies over the middle of its window and does not lag behind.
    half = len(steps) // 80
    if half:
        window = 2 * half + 1
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        axes.plot(
            steps[half:-half],
            smooth,
            color=_SMOOTH,
            linewidth=1.6,
            label=f"mean of {window} batches",
        )
    axes.plot(
        [row["step"] for row in held_out],
        [row["loss"] for row in held_out],
        color=_HELD_OUT,
        marker="o",
        markersize=4,
        linewidth=1.4,
        label="held out",
    )
    for row, offset in zip([*held_out[:1], *held_out[-1:]], ((8, 0), (0, 10))):
        axes.annotate(
            f"{row['loss']:.2f}",
            (row["step"], row["loss"]),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] else "right",
            va="center",
            color=_HELD_OUT,
        )
    axes.legend(frameon=False, labelcolor=_INK)


def _draw_trust(axes: Axes, rows: list[dict[str, Any]]) -> None:
    axes.set_title(
        "trust ratio, median of each group's weight matrices", loc="left", color=_INK, fontsize=11
    )
    if not rows:
        axes.text(0.5, 0.5, "no trust ratios", transform=axes.transAxes, ha="center", color=_INK)
        return
    axes.set_yscale("log")
    # Mostly within one decade, where the default labels are few and in powers of ten.
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    steps = [row["step"] for row in rows]
    layers = [group for group in rows[0]["trust"]["groups"] if group.startswith("layer")]
    others = [group for group in rows[0]["trust"]["groups"] if group not in layers]
    # Layers are ordered by depth, so they share one ramp; other groups have colours outside it.
    ramp = plt.get_cmap("viridis")(np.linspace(0.05, 0.9, max(len(layers), 1)))
    apart = {"embeddings": _INK, "head": _HELD_OUT}
    for group in others[:1] + layers + others[1:]:
        values = [row["trust"]["groups"][group] for row in rows]
        if group in layers:
            style = {"color": ramp[layers.index(group)], "linewidth": 1.4}
        else:
            style = {"color": apart.get(group, _INK), "linewidth": 1.6, "linestyle": "--"}
        axes.plot(steps, values, label=group, **style)
    axes.legend(
        frameon=False, labelcolor=_INK, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9
    )


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    print(draw(directory, directory.name))
