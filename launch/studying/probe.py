"""Along one LAMB and one AdamW run: the noise scale of the gradient, and LAMB's trust ratios."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pretraining.config import ConfigError
from torch import Tensor

from studying import identity
from studying.config import StudyConfig
from studying.data import Sequences
from studying.grid import basin, best_lr, first_lrs
from studying.results import FILE, Run, read
from studying.training import Mode, Pack, make_pack

NOISE_FILE, TRUST_FILE = "noise.csv", "trust.csv"
_SMALL, _COUNT = 16, 32


def noise_scale(small: Tensor, large: Tensor, b_small: int, b_large: int) -> tuple[Tensor, Tensor]:
    """McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1: from the mean squared norms of the
    gradients of two batch sizes, the unbiased estimates of ``tr(Sigma)`` and ``|G|^2``. Their ratio
    is the simple noise scale, in units of the batch."""
    square = (b_large * large - b_small * small) / (b_large - b_small)
    trace = (small - large) / (1 / b_small - 1 / b_large)
    return trace, square


def squared_norms(pack: Pack, first: int, count: int, batch: int) -> tuple[Tensor, Tensor]:
    """Mean squared norm of the gradients of ``count`` batches, and that of their mean: each [R],
    float64."""
    total: list[Tensor] | None = None
    small = torch.zeros(len(pack.runs), dtype=torch.float64, device=pack.device)
    columns = torch.arange(batch, device=pack.device)
    for k in range(count):
        _, grads = pack.gradients(pack.batch_at(first + k * batch + columns))
        small += _squares(grads) / count
        total = grads if total is None else [a.add_(b) for a, b in zip(total, grads)]
    assert total is not None
    return small, _squares([g / count for g in total])


def _squares(grads: list[Tensor]) -> Tensor:
    return torch.stack([g.double().flatten(1).square().sum(1) for g in grads]).sum(0)


def probe(
    config: StudyConfig,
    data: Sequences,
    out: Path,
    *,
    mode: Mode,
    say: Callable[[str], None] = print,
) -> None:
    """For each architecture, AdamW and LAMB at the middle batch and their best lrs, or the middle
    ones of the first sweep where there are no results yet; writes ``noise.csv`` and ``trust.csv``.

    Raises:
        ConfigError: ``out`` is another study's, or its runs are too short.
    """
    if config.samples < 2 * _SMALL:
        # The noise scale is told from gradients of two batch sizes.
        raise ConfigError(f"study.samples ({config.samples}): a probe needs {2 * _SMALL}")
    results = read(out / FILE)
    identity.claim(config, data.sha256, out, results, say)
    batch = config.batches[len(config.batches) // 2]
    for architecture in config.architectures:
        runs = []
        for rule in [n for n, r in config.rules.items() if not (r.late or r.half_life)]:
            warmup = config.warmup(batch)
            cell = Run(architecture, rule, batch, warmup, 1.0, 0).rounded().cell
            lrs = first_lrs(config, cell)
            lr = best_lr(basin(cell, results, config.seeds[0])) or lrs[len(lrs) // 2]
            runs.append(Run(architecture, rule, batch, warmup, lr, config.seeds[0]))
        _one(config, data, runs, out, mode, say)


def _one(
    config: StudyConfig,
    data: Sequences,
    runs: list[Run],
    out: Path,
    mode: Mode,
    say: Callable[[str], None],
) -> None:
    pack = make_pack(config, runs, data, mode, say)
    count = min(_COUNT, config.samples // _SMALL)
    noise: list[dict[str, Any]] = []
    trust: list[dict[str, Any]] = []

    def at_eval(step: int) -> None:
        # Other samples than the run's next ones would have to be held back for this; these are
        # those that it trains on next, or the last of its stream.
        first = min(step * pack.batch, config.samples - count * _SMALL)
        small, large = squared_norms(pack, first, count, _SMALL)
        trace, square = noise_scale(small, large, _SMALL, count * _SMALL)
        for r, run in enumerate(runs):
            at = {"architecture": run.architecture, "rule": run.rule, "batch": run.batch}
            at |= {"lr": run.lr, "step": step, "steps": pack.steps}
            noise.append(
                {
                    **at,
                    "trace": float(trace[r]),
                    "square": float(square[r]),
                    "noise_scale": float(trace[r] / square[r]),
                }
            )
            ratios = getattr(pack.optimizers[r], "trust_ratios", dict)()
            if step:
                trust.extend(
                    {**at, "param": name, "trust_ratio": float(ratio)}
                    for name, ratio in ratios.items()
                )

    pack.train(at_eval=at_eval)
    for name, rows in ((NOISE_FILE, noise), (TRUST_FILE, trust)):
        if not rows:
            continue
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            for row in rows:
                writer.writerow(
                    {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                )
        say(f"{len(rows)} rows to {path}")
    for row in noise[-len(runs) :]:
        say(
            f"{row['architecture']} {row['rule']}: noise scale at the end "
            f"{row['noise_scale']:.0f} sequences"
        )
