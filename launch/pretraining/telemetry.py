"""Trust ratio and norms of every weight matrix, their heat map, and the gradient noise scale.

To draw a run's again: ``PYTHONPATH=launch python -m pretraining.telemetry RUN_DIR``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_lamb import GradientNoiseScale
from pretraining.config import ConfigError, PretrainConfig
from pretraining.report import TENSORS_LOG_NAME, TensorsRow, layer_group, read_tensors_log

PICTURE_NAME = "trust_ratios.png"


def read_tensors(step: int, optimizer: Any, shapes: Mapping[str, torch.Size]) -> TensorsRow | None:
    """What the last step did; waits for the device once. None before the first step.

    Biases and normalisation weights are left out, as in :func:`pretraining.report.summarize_trust`.
    """
    ratios: dict[str, Tensor] = optimizer.trust_ratios()
    norms = (optimizer.param_norms(), optimizer.update_norms(), optimizer.grad_norms())
    names = [name for name in ratios if len(shapes[name]) > 1]
    if not names:
        return None
    nan = ratios[names[0]].new_full((), torch.nan)
    columns = [
        torch.stack([of.get(name, nan).float() for name in names]) for of in (ratios, *norms)
    ]
    # One copy to the host for all.
    values = torch.stack(columns).T.tolist()
    return TensorsRow(step, {name: tuple(row) for name, row in zip(names, values, strict=True)})


def noise_scale_of(
    config: PretrainConfig, model: nn.Module, micro_batch: int
) -> GradientNoiseScale | None:
    """What measures the gradient noise scale, in sequences; None where it is not asked for.

    Raises:
        ConfigError: it cannot be measured in this run.
    """
    optim, of = config.optim, config.train
    if not of.noise_every:
        return None
    if optim.engine not in ("sharded", "ddp"):
        raise ConfigError(f"train.noise_every is for engines sharded and ddp, not {optim.engine}")
    try:
        return GradientNoiseScale(model, small_batch=micro_batch, big_batch=of.global_batch)
    except ValueError:
        raise ConfigError(
            f"train.noise_every compares two batch sizes, but train.global_batch = "
            f"{of.global_batch} is one micro-batch; lower train.micro_batch"
        ) from None


def _depth(name: str) -> tuple[int, str]:
    group = layer_group(name)
    return ({"embeddings": 0, "head": 2}.get(group, 1), group)


def draw_heat_map(run_dir: Path) -> Path | None:
    """Trust ratios, a row for each weight matrix from the embeddings to the head, a column for each
    logged step, on a logarithmic scale. None where nothing was logged."""
    import matplotlib

    matplotlib.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    rows = read_tensors_log(run_dir / TENSORS_LOG_NAME)
    if not rows:
        return None
    names = sorted(rows[0]["tensors"], key=_depth)  # stable: in the model's order within a layer
    values = np.array([[row["tensors"].get(name, [np.nan])[0] for row in rows] for name in names])
    values = np.ma.masked_where(~(values > 0), values)
    few = len(names) <= 40
    height = max(3.0, (0.22 if few else 0.055) * len(names) + 1.4)
    figure, axes = plt.subplots(figsize=(11, height), layout="constrained", dpi=130)
    steps = [row["step"] for row in rows]
    low, high = np.nanpercentile(values.compressed(), (1, 99)) if values.count() else (0.1, 1.0)
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=LogNorm(low, max(high, low * 1.01)),
        extent=(-0.5, len(steps) - 0.5, len(names) - 0.5, -0.5),
    )
    ticks = range(0, len(steps), -(-len(steps) // 12))
    axes.set_xticks(ticks, [str(steps[i]) for i in ticks])
    axes.set_xlabel("step")
    if few:
        short = [name.removeprefix("bert.").removesuffix(".weight") for name in names]
        axes.set_yticks(range(len(names)), short, fontsize=7)
    else:
        groups = [layer_group(name) for name in names]
        firsts = [i for i, group in enumerate(groups) if i == 0 or group != groups[i - 1]]
        axes.set_yticks(firsts, [groups[i] for i in firsts], fontsize=7)
        for i in firsts[1:]:
            axes.axhline(i - 0.5, color="white", linewidth=0.4)
    bar = figure.colorbar(image, ax=axes, extend="both", pad=0.01, format="{x:g}")
    bar.set_label("trust ratio ||x|| / ||u||")
    title = f"trust ratio of each weight matrix: {run_dir.name}"
    axes.set_title(title, loc="left", fontsize=11, parse_math=False)
    path = run_dir / PICTURE_NAME
    part = path.with_name(f".{PICTURE_NAME}.part")
    figure.savefig(part, format="png")
    plt.close(figure)
    part.replace(path)
    return path


if __name__ == "__main__":
    print(draw_heat_map(Path(sys.argv[1])))
